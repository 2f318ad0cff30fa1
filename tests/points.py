"""A world of twenty lines: a point that is pushed around, seen as a bright spot; and networks that know it."""

from typing import Any

import gymnasium
import numpy as np
import torch


class Points(gymnasium.Env):
    """The state is a place in [-1, 1]; an action in [-2, 2] moves it. `choices` makes the actions discrete."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(
        self, render_mode: str = "rgb_array", choices: bool = False, noise: float = 0.0, ends: bool = False
    ) -> None:
        self.render_mode, self.noise, self.ends = render_mode, noise, ends
        self.metadata = {"render_modes": ["rgb_array"]}
        self.moves = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]]) if choices else None
        self.action_space = gymnasium.spaces.Discrete(5) if choices else gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2)
        return self.state.astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        push = np.asarray(action) if self.moves is None else 2.0 * self.moves[action]
        self.state = np.clip(self.state + 0.15 * push + self.noise * np.random.randn(2), -1, 1)
        distance = float(np.abs(self.state).sum())
        return self.state.astype(np.float32), -distance, self.ends and distance < 0.3, False, {"distance": distance}

    def render(self) -> Any:
        axis = np.linspace(-1.2, 1.2, 32)
        x, y = self.state
        spot = 255 * np.exp(-((x - axis) ** 2 + (y - axis[:, None]) ** 2) / 0.02)
        return np.repeat(spot.astype(np.uint8)[..., None], 3, axis=2)


def leftwards(env: Any, seed: int, force: float = 1.0) -> Any:
    """A policy: always to the left, and after three steps nothing."""
    left = [np.array([-force, 0], np.float32)] * 3
    return lambda observation, info: left.pop() if left else None


class Knowing(torch.nn.Module):
    """An encoder that reads the place from the image: the center of the spot, in [-1, 1], and nothing else."""

    def forward(self, windows: torch.Tensor, vectors: torch.Tensor | None = None) -> torch.Tensor:
        image = windows[:, -1].double() + 1e-6
        axis = torch.linspace(-1.2, 1.2, image.shape[-1], dtype=torch.float64)
        total = image.sum(dim=(1, 2))
        places = [(image.sum(dim=1) * axis).sum(dim=1) / total, (image.sum(dim=2) * axis).sum(dim=1) / total]
        return torch.nn.functional.pad(torch.stack(places, dim=1), (0, 6)).float()


class Moving(torch.nn.Module):
    """A predictor that knows the physics of one step of the point."""

    def forward(self, features: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        moved = features[..., :2]
        for push in actions.unflatten(-1, (-1, 2)).unbind(-2):
            moved = (moved + 0.3 * push).clamp(-1, 1)
        return torch.cat([moved, torch.zeros_like(features[..., 2:])], dim=-1)
