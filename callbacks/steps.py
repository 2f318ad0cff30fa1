"""Callbacks that follow the optimizer: they count the steps that it really takes."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class StepFollower(Callback):
    """Count the optimizer steps that really happened, in `steps`, and call `on_step` once after each.

    It acts in `on_train_batch_end` and only when `trainer.global_step` has moved, so gradient accumulation causes no
    extra call, and a callback's hook runs before `ModelCheckpoint` writes the file (a module's would run after).
    `on_before_zero_grad`, often used for this, is one step late and misses the last step.

    `trainer.global_step` counts more than that: with `precision: 16-mixed`, the gradient scaler leaves out a step whose
    gradients are not finite, and Lightning counts it all the same. A hook on the optimizer itself does not run then, and
    says so without a wait for the device. (A fused optimizer decides on the device; see `JEPA.configure_optimizers`.)

    A checkpoint holds the count, and how far it has followed. A checkpoint that is written in the middle of a
    step, between the optimizer's and the end of the batch, as a signal's or an exception's handler may do, holds an
    optimizer that is one step ahead; `on_train_start` then makes up for it. A checkpoint without a count is taken to
    have followed each step.
    """

    steps = 0
    """Optimizer steps that happened and were followed."""

    _seen = 0  # trainer.global_step up to which was followed
    _stepped = False  # whether the optimizer has stepped since
    _known = False  # whether these belong to the trainer's present run
    _hooks: tuple[RemovableHandle, ...] = ()

    def on_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is due after an optimizer step; `steps` counts it already."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.global_step == 0:  # a trainer that has not trained: nothing is known until a checkpoint is loaded
            self._known = False

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "seen": self._seen, "stepped": self._stepped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self._seen, self._stepped = state_dict["steps"], state_dict["seen"], state_dict["stepped"]
        self._known = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._known:
            self.steps = self._seen = trainer.global_step  # training state is already restored here
            self._stepped = False
        self._known = True
        self._remove_hooks()
        self._hooks = tuple(optimizer.register_step_post_hook(self._note) for optimizer in trainer.optimizers)
        self._follow(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._follow(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hooks()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_hooks()

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self._seen:
            return
        self._seen, stepped, self._stepped = trainer.global_step, self._stepped, False
        if stepped:
            self.steps += 1
            self.on_step(trainer, pl_module)

    def _note(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()
