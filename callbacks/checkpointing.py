"""Two files of every run: the best checkpoint and the last."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Keep `best.ckpt`, the checkpoint of the least validation loss.

    For a JEPA that loss is measured against targets that move, so "best" is a guess; probe `last.ckpt`.

    Args:
        monitor: Name of the metric to be least.
    """

    def __init__(self, monitor: str = "val/loss") -> None:
        super().__init__(filename="best", monitor=monitor, mode="min", enable_version_counter=False)


class LastCheckpoint(ModelCheckpoint):
    """Keep `last.ckpt`, written every so many optimizer steps and at the end of training: resume with --ckpt_path last.

    Args:
        every_n_train_steps: Optimizer steps between two writes; what a kill can cost.
    """

    def __init__(self, every_n_train_steps: int = 200) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps={every_n_train_steps}: give a number of optimizer steps of at least 1.")
        super().__init__(filename="last", every_n_train_steps=every_n_train_steps, enable_version_counter=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not trainer.fast_dev_run:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
