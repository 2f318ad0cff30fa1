"""What evaluations of a world model share: the model, frozen, and something small that is fitted on it."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from callbacks.schedules import total_optimizer_steps
from jepa_lightning.dynamics import DynamicsJEPA
from jepa_lightning.dynamics_checks import check_observations
from jepa_lightning.optim import parameter_groups, warmup_cosine_schedule
from jepa_lightning.signature import sign
from jepa_lightning.weights.checkpoints import RECORD, load_jepa, record

SCALED_ON = 256
"""Training clips from which mean and standard deviation of embeddings are taken."""


def world_model(checkpoint: str, reader: str) -> DynamicsJEPA:
    """The frozen world model of a checkpoint, in eval mode.

    Args:
        checkpoint: Its path.
        reader: Who reads it, for messages.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no dynamics JEPA, or one without actions.
    """
    jepa = load_jepa(checkpoint)
    if not isinstance(jepa, DynamicsJEPA):
        raise ValueError(f"{checkpoint} holds a {type(jepa).__name__}; {reader} reads a DynamicsJEPA or PendulumJEPA.")
    if not jepa.action_dim:
        raise ValueError(
            f"{checkpoint} holds a {type(jepa).__name__} without actions, and {reader} needs them: train one on data with "
            "actions, as configs/pendulum/actuated.yaml does with data.torque_limits."
        )
    return jepa.requires_grad_(False).eval()


def check_same(first: nn.Module, second: nn.Module, message: str) -> None:
    """Raise a ValueError with a message unless two modules have the same weights."""
    mine, theirs = first.state_dict(), second.state_dict()
    if mine.keys() != theirs.keys() or not all(torch.equal(mine[name], theirs[name]) for name in mine):
        raise ValueError(message)


class WorldModelProbe(LightningModule):
    """Freeze a world model and fit a network on its embeddings, by AdamW with a warm-up and a cosine.

    Args:
        checkpoint: Path of the checkpoint of a dynamics JEPA with actions, written by `fit`.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay of matrices.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no world model with actions, or an argument is out of its range.
    """

    best_metric = ("val/loss", "min")  # of a network that sees the truth, unlike a JEPA's

    def __init__(self, checkpoint: str, learning_rate: float, weight_decay: float) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise ValueError(f"model.learning_rate={learning_rate}: must be positive.")
        self.checkpoint, self.learning_rate, self.weight_decay = checkpoint, learning_rate, weight_decay
        self.jepa = world_model(checkpoint, type(self).__name__)

    def train(self, mode: bool = True) -> "WorldModelProbe":
        """Switch to training mode, all but the frozen networks."""
        super().train(mode)
        self.jepa.eval()
        return self

    def setup(self, stage: str) -> None:
        """Raise a ValueError if the data is not what the JEPA was trained on."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is not None:
            check_observations(self.jepa, data)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over what is not frozen."""
        optimizer = torch.optim.AdamW(parameter_groups([self], self.weight_decay), lr=self.learning_rate)
        schedule = warmup_cosine_schedule(optimizer, total_optimizer_steps(self.trainer), 0.05)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        sign(self, checkpoint)
        checkpoint[RECORD] = record(self.jepa)
