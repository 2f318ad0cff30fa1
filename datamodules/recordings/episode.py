"""What a recorded episode is, whatever file it comes from.

Shapes: T steps, H W pixels, C channels, A scalars of an action, V scalars of a vector, L scalars of a state.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Episode(NamedTuple):
    """T steps, and the T + 1 frames around them: action t leads from frame t to frame t + 1."""

    name: str
    """Name of the episode, for messages."""

    actions: NDArray[Any]
    """(T, A) floats in the environment's units, or (T,) integers of discrete actions."""

    frames: NDArray[np.uint8] | None = None
    """(T + 1, H, W, C), RGB or gray; None if only vectors were recorded."""

    vectors: NDArray[np.float32] | None = None
    """(T + 1, V): observations that are no images, such as joint angles; None if only images were recorded."""

    states: NDArray[np.float32] | None = None
    """(T + 1, L): what is known of the world, for probes and for the success of planning; never learned from."""

    rewards: NDArray[np.float32] | None = None
    """(T,): reward of each step."""

    seed: int | None = None
    """Seed that the environment was reset with: the same seed and actions lead through the same states."""


@dataclass(frozen=True)
class RecordingInfo:
    """What holds for all episodes of a recording; what is None is found out from the data.

    Args:
        action_low: Lower limit of each scalar of an action.
        action_high: Upper limit of each scalar of an action.
        num_choices: Number of choices of a discrete action; 0 for continuous actions.
        state_names: Name of each scalar of a state.
        environment: Where it was recorded: "id", "arguments" of `gymnasium.make`, "image_size", "action_repeat" and more;
            see `datamodules.environments`. Empty if that is not known.
    """

    action_low: Sequence[float] | None = None
    action_high: Sequence[float] | None = None
    num_choices: int | None = None
    state_names: Sequence[str] = ()
    environment: dict[str, Any] = field(default_factory=dict)


class Recording(Protocol):
    """Episodes that are read one at a time."""

    info: RecordingInfo
    names: list[str]
    """Names of the episodes, in order."""

    def episode(self, number: int) -> Episode:
        """Read an episode.

        Raises:
            ValueError: It cannot be read; the message names it.
        """
