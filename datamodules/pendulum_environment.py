"""The double pendulum as an environment of gymnasium: "datamodules.pendulum_environment:DoublePendulum-v0".

Importing this module registers it. Physics and images are those of `DoublePendulum`, the data module.
"""

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from datamodules.physics import FRAME_SECONDS, Pendulum, sample_initial_states, state_labels
from datamodules.rendering import render
from datamodules.rng import seeded_generator
from datamodules.torques import ANYWHERE, WARM_UP_FRAMES, after_warm_up

TORQUE_LIMITS = (10.0, 5.0)
"""Of shoulder and elbow in newton meters, as in configs/pendulum/actuated.yaml."""


class DoublePendulumEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A double pendulum with torques at shoulder and elbow; a step takes 0.05 s.

    A third of the episodes start in any state, the rest from hanging after up to three seconds of random torques. The
    observation is sine and cosine of both angles and both angular velocities in radians per second; an action is both
    torques over their limits. The reward is the height of the tip over that of a standing pendulum, so -1 is hanging
    and 1 standing.

    Args:
        render_mode: "rgb_array".
        image_size: Height and width of rendered images in pixels.
        torque_limits: Maximum torques of shoulder and elbow in newton meters.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / FRAME_SECONDS)}  # noqa: RUF012

    def __init__(
        self, render_mode: str = "rgb_array", image_size: int = 64, torque_limits: tuple[float, float] = TORQUE_LIMITS
    ) -> None:
        self.render_mode, self.image_size = render_mode, image_size
        self.limits = (float(torque_limits[0]), float(torque_limits[1]))
        self.pendulum = Pendulum()
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = spaces.Box(-np.inf, np.inf, (6,), np.float32)
        self.state = torch.zeros(4, dtype=torch.float64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode; `options={"state": ...}` gives theta1, theta2, omega1, omega2."""
        super().reset(seed=seed)
        generator = seeded_generator(int(self.np_random.integers(2**31)))
        if options and "state" in options:
            self.state = torch.as_tensor(options["state"], dtype=torch.float64)
        elif self.np_random.random() < ANYWHERE:
            self.state = sample_initial_states(1, generator)[0].double()
        else:
            frames = torch.randint(WARM_UP_FRAMES + 1, (1,), generator=generator)
            self.state = after_warm_up(self.pendulum, self.limits, frames, 5, generator)[0]
        return self._observation(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Apply torques for 0.05 s."""
        torques = torch.as_tensor(np.clip(action, -1, 1), dtype=torch.float64) * torch.tensor(self.limits).double()
        self.state = self.pendulum.simulate(self.state[None], 2, torques[None, None])[0, -1]
        height = self.pendulum.positions(self.state)[3] / sum(self.pendulum.lengths)
        return self._observation(), float(height), False, False, {}

    def render(self) -> NDArray[np.uint8]:
        """The pendulum, (H, W, 3) uint8."""
        image = render(self.state.float(), self.image_size, self.pendulum.lengths, 3)
        return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()

    def get_state(self) -> torch.Tensor:
        """The state, for `set_state`: theta1, theta2 in radians, omega1, omega2 in radians per second."""
        return self.state.clone()

    def set_state(self, state: torch.Tensor) -> None:
        """Put the pendulum into a state."""
        self.state = state.clone()

    def _observation(self) -> NDArray[np.float32]:
        return state_labels(self.state).float().numpy()


gymnasium.register("DoublePendulum-v0", entry_point=f"{__name__}:{DoublePendulumEnv.__name__}")
