"""Environments of gymnasium as a world model meets them: frames of one size, actions in [-1, 1] or one-hot.

Shapes: H W pixels, C channels, A scalars of an action, V scalars of a vector, L scalars of a state.
"""

import copy
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.recordings.episode import RecordingInfo

IMAGE_KEYS = ("pixels", "image", "rgb")
"""Keys of a dictionary of observations under which an image is looked for."""


@dataclass(frozen=True)
class EnvironmentSettings:
    """Which environment, and how it is looked at.

    Args:
        id: Id of gymnasium, such as "Pendulum-v1"; with a module that registers it, "stable_worldmodel:swm/TwoRoom-v1"; or
            the import path of a class or function of your own that returns a `gymnasium.Env`, "my_package.my_module:MyEnv".
        arguments: Arguments of the environment.
        image_size: Height and width of the frames in pixels, one number if they are equal; None records no frames.
        action_repeat: How often an action is applied from one frame to the next. Rewards are added up.
        action_share: Share of the limits of a continuous action that is used, in (0, 1]: both limits are multiplied by it,
            when episodes are recorded, by whatever policy, and in planning. Gentle torques keep what moves fast within what
            frames can show.
        state: Names of what is kept as the state: keys of a dictionary of observations or of `info`, or attributes of the
            environment, dots between them ("data.qpos"). By default the observation, if it is a vector.
        reset_options: The `options` of `reset`.

    Raises:
        ValueError: A number out of its range.
    """

    id: str
    arguments: dict[str, Any] = field(default_factory=dict)
    image_size: int | tuple[int, int] | None = 64
    action_repeat: int = 1
    action_share: float = 1.0
    state: Sequence[str] = ()
    reset_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.action_repeat < 1:
            raise ValueError(f"action_repeat={self.action_repeat}: give an integer of at least 1.")
        if not 0 < self.action_share <= 1:
            raise ValueError(f"action_share={self.action_share}: give a share of the action limits in (0, 1].")
        sides = () if self.image_size is None else np.atleast_1d(self.image_size).tolist()
        if any(side < 1 for side in sides) or len(sides) > 2:
            raise ValueError(f"image_size={self.image_size}: give one positive number of pixels, or height and width.")

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold, and `EnvironmentSettings(**...)` takes."""
        return asdict(self) | {"state": list(self.state)}


def settings_of(info: RecordingInfo) -> EnvironmentSettings:
    """The environment that a recording was made in."""
    known = EnvironmentSettings.__dataclass_fields__.keys()
    return EnvironmentSettings(**{name: value for name, value in info.environment.items() if name in known})


class Step(NamedTuple):
    """What a step has led to."""

    reward: float
    terminated: bool
    """Whether the environment has ended the episode, at its goal or in a failure."""
    truncated: bool
    """Whether a limit of time has."""


def gymnasium() -> Any:
    """The package gymnasium. Raises a ValueError that says how to install it if it is missing."""
    try:
        return importlib.import_module("gymnasium")
    except ImportError as error:
        raise ValueError('Environments need gymnasium: pip install "jepa-lightning[env]".') from error


def make(settings: EnvironmentSettings) -> Any:
    """The `gymnasium.Env` of the settings, which renders into arrays.

    Raises:
        ValueError: It cannot be made; the message says what gymnasium said.
    """
    module, _, name = settings.id.rpartition(":")
    arguments = {"render_mode": "rgb_array"} | settings.arguments
    try:
        if module and hasattr(importlib.import_module(module), name):
            return getattr(importlib.import_module(module), name)(**arguments)
        # Episodes are as long as is asked for here, not as the environment's registration says.
        limits = {"max_episode_steps": -1, "disable_env_checker": True}
        return gymnasium().make(settings.id, **(limits | arguments))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"The environment {settings.id} cannot be made: {type(error).__name__}: {error}. Is the package that has it "
            "installed (extras env, mujoco, swm), and are its arguments right?"
        ) from error


class Environment:
    """One environment: reset, act, look.

    Args:
        settings: Which, and how it is looked at.
        env: One of gymnasium that there is already, instead of a new one.

    Raises:
        ValueError: It cannot be made, or its actions are neither discrete nor bounded.
    """

    def __init__(self, settings: EnvironmentSettings, env: Any = None) -> None:
        self.settings = settings
        self.env = make(settings) if env is None else env
        space = self.env.action_space
        spaces = gymnasium().spaces
        self.num_choices = int(space.n) if isinstance(space, spaces.Discrete) else 0
        self.low = self.high = np.zeros(0)
        if not self.num_choices:
            if not isinstance(space, spaces.Box) or not (np.isfinite(space.low) & np.isfinite(space.high)).all():
                raise ValueError(f"{settings.id} takes actions of {space}: only Discrete and bounded Box are known here.")
            low, high = (limit.astype(np.float64).ravel() for limit in (space.low, space.high))
            if settings.action_share != 1 and not ((low <= 0) & (high >= 0)).all():
                raise ValueError(
                    f"action_share={settings.action_share}: the actions of {settings.id}, from {low} to {high}, have no "
                    "zero to shrink towards; leave it out."
                )
            self.low, self.high = low * settings.action_share, high * settings.action_share
        elif settings.action_share != 1:
            raise ValueError(
                f"action_share={settings.action_share}: the actions of {settings.id} are discrete; leave it out."
            )
        self.observation: Any = None
        self.info: dict[str, Any] = {}

    @property
    def action_dim(self) -> int:
        """Number of scalars A of an action in [-1, 1], or of a one-hot vector."""
        return self.num_choices or len(self.low)

    def reset(self, seed: int) -> None:
        """Begin an episode; the same seed begins the same one."""
        self.observation, self.info = self.env.reset(seed=seed, options=self.settings.reset_options or None)

    def act(self, action: Any) -> Step:
        """Apply an action of the environment's own kind, `action_repeat` times or until the episode ends."""
        total = 0.0
        for _ in range(self.settings.action_repeat):
            self.observation, reward, terminated, truncated, self.info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return Step(total, bool(terminated), bool(truncated))

    def own_action(self, action: NDArray[Any]) -> Any:
        """The environment's own action from one in [-1, 1] or a one-hot vector, (A,)."""
        if self.num_choices:
            return int(np.argmax(action)) + int(self.env.action_space.start)
        scaled = (np.clip(action, -1, 1) + 1) / 2 * (self.high - self.low) + self.low
        return scaled.astype(self.env.action_space.dtype).reshape(self.env.action_space.shape)

    def within_limits(self, action: Any) -> Any:
        """An action of the environment's own kind, cut at the limits: what is recorded is what was applied."""
        if self.num_choices:
            return action
        shape = self.env.action_space.shape
        cut = np.clip(np.asarray(action, np.float64), self.low.reshape(shape), self.high.reshape(shape))
        return cut.astype(self.env.action_space.dtype)

    def frame(self) -> NDArray[np.uint8]:
        """What is seen now, (H, W, C): the observation if it is an image, else what is rendered."""
        image = self._observed_image()
        image = np.asarray(self.env.render()) if image is None else image
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise ValueError(f"{self.settings.id} renders {image.dtype} of shape {image.shape}: uint8 (H, W, C) is needed.")
        return resized(image if image.ndim == 3 else image[..., None], self.settings.image_size)

    def _observed_image(self) -> NDArray[Any] | None:
        seen = self.observation
        if isinstance(seen, dict):
            seen = next((seen[key] for key in IMAGE_KEYS if key in seen), None)
        return np.asarray(seen) if seen is not None and _is_image(seen) else None

    def vector(self) -> NDArray[np.float32] | None:
        """The observation if it is a vector, (V,); of a dictionary, all vectors in it, by name."""
        seen = self.observation
        values = [seen[key] for key in sorted(seen)] if isinstance(seen, dict) else [seen]
        numbers = [np.asarray(value) for value in values if not _is_image(value)]
        flat = [value.astype(np.float32).ravel() for value in numbers if value.dtype.kind in "biuf" and value.ndim < 3]
        return np.concatenate(flat) if flat else None

    def state(self) -> NDArray[np.float32] | None:
        """What is known of the world, (L,): see `EnvironmentSettings.state`."""
        if not self.settings.state:
            return self.vector()
        return np.concatenate([values for _, values in self._named_states()])

    def state_names(self) -> list[str]:
        """Names of the scalars of `state`, after a reset."""
        if self.settings.state:
            pairs = self._named_states()
        else:
            vector = self.vector()
            pairs = [] if vector is None else [("observation", vector)]
        return [name if len(values) == 1 else f"{name}.{k}" for name, values in pairs for k in range(len(values))]

    def _named_states(self) -> list[tuple[str, NDArray[np.float32]]]:
        return [(name, np.asarray(self._look_up(name), np.float32).ravel()) for name in self.settings.state]

    def _look_up(self, name: str) -> Any:
        observed = self.observation if isinstance(self.observation, dict) else {}
        for known in (self.info, observed):
            if name in known:
                return known[name]
        value: Any = self.env.unwrapped
        for attribute in name.split("."):
            if not hasattr(value, attribute):
                raise ValueError(
                    f"state={name!r}: {self.settings.id} has no such attribute, and its observation and info have "
                    f"{', '.join([*observed, *self.info]) or 'nothing'} by name."
                )
            value = getattr(value, attribute)
        return value() if callable(value) else value

    @property
    def can_be_set(self) -> bool:
        """Whether `snapshot` and `restore` work: an oracle can then try actions out."""
        env = self.env.unwrapped
        if _is_mujoco(env) or (hasattr(env, "get_state") and hasattr(env, "set_state")):
            return True
        # Gymnasium's classic environments keep their state in one vector. Of others, `state` may be an image.
        state = np.asarray(getattr(env, "state", None), dtype=object)
        return state.ndim == 1 and all(isinstance(value, float | np.floating) for value in state)

    def snapshot(self) -> Any:
        """The whole state of the simulator, for `restore`."""
        env = self.env.unwrapped
        if _is_mujoco(env):
            return env.data.qpos.copy(), env.data.qvel.copy()
        return copy.deepcopy(env.get_state() if hasattr(env, "get_state") else env.state)

    def restore(self, snapshot: Any) -> None:
        """Put the simulator back into a state; the observation is that of the next step."""
        env = self.env.unwrapped
        if _is_mujoco(env):
            env.set_state(*snapshot)
        elif hasattr(env, "set_state"):
            env.set_state(copy.deepcopy(snapshot))
        else:
            env.state = copy.deepcopy(snapshot)

    def try_out(self, snapshot: Any, actions: Iterable[NDArray[Any]]) -> NDArray[np.float32]:
        """The state that actions (A,) in [-1, 1] or one-hot would lead to from a snapshot, which is restored: (L,)."""
        self.restore(snapshot)
        seen = self.observation, self.info
        for action in actions:
            self.act(self.own_action(action))
        state = self.state()
        self.restore(snapshot)
        self.observation, self.info = seen
        if state is None:
            raise ValueError(f"{self.settings.id} has no state: name one with state.")
        return state

    def close(self) -> None:
        """Free what the environment holds."""
        self.env.close()


def _is_image(value: Any) -> bool:
    array = np.asarray(value)
    return array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3)))


def _is_mujoco(env: Any) -> bool:
    return hasattr(env, "set_state") and hasattr(getattr(env, "data", None), "qpos")


def resized(image: NDArray[np.uint8], size: int | tuple[int, int] | None) -> NDArray[np.uint8]:
    """An image (H, W, C) at another size, each pixel the mean of those that it covers; as it is without one."""
    if size is None:
        return image
    height, width = (size, size) if isinstance(size, int) else size
    if image.shape[:2] == (height, width):
        return image
    source = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    small = np.asarray(
        source.resize((width, height), Image.Resampling.BOX if height <= image.shape[0] else Image.Resampling.BILINEAR)
    )
    return small.reshape(height, width, image.shape[-1])
