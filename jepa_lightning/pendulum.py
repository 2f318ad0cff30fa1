"""The dynamics JEPA of the double pendulum: its coordinates, and the labels that its states are evaluated by."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from datamodules.physics import LABELS, state_labels
from jepa_lightning.dynamics import DynamicsJEPA

COORDINATES = 4
"""Scalars of a frame of coordinates: x1, y1, x2, y2 of the bobs."""


class PendulumJEPA(DynamicsJEPA):
    """A `DynamicsJEPA` of the double pendulum, free or actuated (torque-controlled).

    Its linear probes regress sine and cosine of both angles, and both angular velocities.

    >>> import torch
    >>> model = PendulumJEPA(image_size=32, latent_dim=16)
    >>> model.rollout(torch.zeros(3, 2, 32, 32), steps=4).shape  # two frames each
    torch.Size([3, 4, 16])

    Args:
        observation: Kind of observations, "pixels" or "coordinates" of the two bobs.
        channels: Number of channels, 1 for gray, 3 for RGB; as in the data.
        history: Number of frames per window; as in the data. Two are the fewest that contain a velocity.
        arguments: Those of `DynamicsJEPA`.
    """

    angular_state = True
    image_size: int  # its images are square

    def __init__(
        self,
        observation: Literal["pixels", "coordinates"] = "pixels",
        channels: int = 1,
        history: int = 2,
        **arguments: Any,
    ) -> None:
        if observation not in ("pixels", "coordinates"):
            raise ValueError(f"model.observation={observation!r}: choose one of pixels, coordinates.")
        vectors = observation == "coordinates"
        arguments |= {"observation": "vectors" if vectors else "pixels", "vector_dim": COORDINATES if vectors else 0}
        super().__init__(channels=channels, history=history, **arguments)
        self.observation = observation
        self.save_hyperparameters({"observation": observation})  # not that of the base class

    def labels(self, states: Tensor) -> Tensor:
        return state_labels(states)

    def label_names(self, count: int) -> Sequence[str]:
        return LABELS

    def mend_actions(self, theirs: int) -> str:
        limits = "to match" if theirs else "to the limits of two torques"
        return f"{super().mend_actions(theirs)}, or data.torque_limits {limits}"
