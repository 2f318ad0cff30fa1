"""A checkpoint written at any moment, by whomever, is one that a run goes on from bit for bit."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import small_data, small_model, trainer
from faults import same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback

HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_epoch_start",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
)


class SaveAt(Callback):
    """Write a checkpoint when a hook is called for the n-th time, as a signal's handler might."""

    def __init__(self, hook: str, count: int, path: Path) -> None:
        def called(run: pl.Trainer, *_: Any, **__: Any) -> None:
            self.count += 1
            if self.count == count:
                run.save_checkpoint(path)

        self.count = 0
        setattr(self, hook, called)


def run(root: Path, callbacks: list[Callback], changes: dict[str, Any], path: Path | None = None) -> dict[str, Any]:
    """Two epochs of six batches, to the end; what is left is in the last checkpoint."""
    arguments = {"max_epochs": 2, "limit_val_batches": 2, "enable_checkpointing": True, "callbacks": callbacks}
    fitted = trainer(root, **arguments | changes)
    fitted.fit(small_model(momentum=0.9), small_data(val_size=8), ckpt_path=path)
    fitted.save_checkpoint(root / "end.ckpt")
    return torch.load(root / "end.ckpt", weights_only=True)


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert same(first[part], second[part]), part


@given(
    hook=st.sampled_from(HOOKS),
    count=st.integers(1, 12),
    accumulate=st.sampled_from([1, 3, 4]),
    interval=st.sampled_from([1.0, 0.34]),
    limit=st.sampled_from([1.0, 5]),
)
@settings(deadline=None, derandomize=True, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_checkpoint_of_any_moment_goes_on(
    tmp_path_factory: pytest.TempPathFactory, hook: str, count: int, accumulate: int, interval: float, limit: float
) -> None:
    root = tmp_path_factory.mktemp("cut")
    changes = {"accumulate_grad_batches": accumulate, "val_check_interval": interval, "limit_train_batches": limit}
    whole = run(root, [SaveAt(hook, count, root / "cut.ckpt")], changes)
    if not (root / "cut.ckpt").exists():
        return  # the hook was not called so often
    if torch.load(root / "cut.ckpt", weights_only=True)["global_step"] < whole["global_step"]:  # something is left to do
        assert_same(whole, run(root, [], changes, root / "cut.ckpt"))
