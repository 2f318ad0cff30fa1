"""How far Lightning's training loop has come, in batches whose optimizer step has happened, and how to put it there.

Lightning counts batches, and saves the counts as they are when a checkpoint is written: in the middle of a step, of a group
of accumulated batches or of a validation they describe a state in which weights and counts disagree. Here there is one
answer for every moment, the last optimizer step: gradients that were accumulated since are not in a checkpoint.
"""

from typing import Any, NamedTuple

from lightning.pytorch import Trainer


class Progress(NamedTuple):
    """A place between two optimizer steps."""

    epoch: int
    """Epochs that were finished."""

    batches: int
    """Batches per process of the epoch under way whose optimizer step has happened; 0 between two epochs."""


def progress(trainer: Trainer, resumed: Progress) -> Progress:
    """Where training is.

    Args:
        trainer: Trainer of the run.
        resumed: Place from which the run was resumed.
    """
    epochs = trainer.fit_loop.epoch_progress.current
    epoch = epochs.processed
    if epochs.started == epoch:
        return Progress(epoch, 0)
    steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.current.completed
    # The last group of an epoch may be a short one.
    batches = min(steps * trainer.accumulate_grad_batches, trainer.num_training_batches)
    if epoch == resumed.epoch:  # of another number of accumulated batches, perhaps
        batches = max(batches, resumed.batches)
    return Progress(epoch + 1, 0) if batches == trainer.num_training_batches else Progress(epoch, int(batches))


def put(loops: dict[str, Any], place: Progress, accumulated: int) -> None:
    """Make a checkpoint's "loops" say that training is at a place, as if it had been saved right after the last batch.

    Args:
        loops: The "loops" of a checkpoint; changed in place.
        place: Place at which training goes on.
        accumulated: Number of batches per optimizer step.
    """
    fit = loops["fit_loop"]
    epoch, batches = place
    begun = epoch + (batches > 0)
    for kind in ("total", "current"):
        fit["epoch_progress"][kind] = {"ready": begun, "started": begun, "processed": epoch, "completed": epoch}
    seen = fit["epoch_loop.batch_progress"]
    before = seen["total"]["ready"] - seen["current"]["ready"]
    for kind, count in (("total", before + batches), ("current", batches)):
        completed = count - (batches > 0)  # what runs at the end of the last batch has saved it
        seen[kind] = {"ready": count, "started": count, "processed": count, "completed": completed}
    seen["is_last_batch"] = False
    steps = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    steps["current"] = {"ready": batches // accumulated, "completed": batches // accumulated}
    nothing = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    fit["epoch_loop.val_loop.batch_progress"] = {"total": nothing, "current": dict(nothing), "is_last_batch": False}
