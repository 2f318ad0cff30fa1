"""Gradients that are not finite reach neither weights nor files."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import small_data, small_ijepa, small_images, small_model, trainer
from lightning.pytorch import Callback

from callbacks import LastCheckpoint
from jepa_lightning.finite import FiniteGuard, NonFiniteError, check_weights, decides_on_gpu


class Poison(Callback):
    """Put a number into one gradient of one step, after the backward pass; the loss knows nothing of it."""

    def __init__(self, value: float, step: int) -> None:
        self.value, self.step = value, step
        self.weights: list[torch.Tensor] = []

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self.step:
            self.weights = [parameter.detach().clone() for parameter in pl_module.parameters()]
            next(pl_module.context_encoder.parameters()).grad.view(-1)[0] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("family", ["pendulum", "ijepa"])
def test_training_stops_before_the_step(
    tmp_path: Path, image_root: Path, value: float, clip: float | None, family: str
) -> None:
    model, data = (small_model(), small_data()) if family == "pendulum" else (small_ijepa(), small_images(image_root))
    poison = Poison(value, 4)
    run = trainer(
        tmp_path, max_steps=10, gradient_clip_val=clip, callbacks=[poison, LastCheckpoint(every_n_train_steps=1)],
        enable_checkpointing=True,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"not finite at optimizer step 4.*last.ckpt is good"):
        run.fit(model, data)
    assert all(torch.equal(now, before) for now, before in zip(model.parameters(), poison.weights, strict=True))
    for name, step in (("last", 4), ("last-1", 3), ("last-2", 2)):
        saved = torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert saved["global_step"] == step
        assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_a_loss_that_is_not_finite_is_found_by_its_gradients(tmp_path: Path) -> None:
    class Broken(type(small_model())):
        def prediction_loss(self, pairs: Any) -> torch.Tensor:
            return super().prediction_loss(pairs) * (float("nan") if self.global_step == 2 else 1.0)

    model = small_model()
    model.__class__ = Broken
    with pytest.raises(NonFiniteError, match="at optimizer step 2"):
        trainer(tmp_path, max_steps=5).fit(model, small_data())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = small_model()
    run = trainer(tmp_path, max_steps=1, enable_checkpointing=True, callbacks=[LastCheckpoint()])
    run.fit(model, small_data())
    before = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    with torch.no_grad():
        next(model.predictor.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteError, match="this checkpoint is not written"):
        run.save_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == before


def test_weights_are_looked_at_one_and_all() -> None:
    check_weights([torch.ones(3), torch.zeros(2, 2)], 5)
    with pytest.raises(NonFiniteError, match="after optimizer step 5"):
        check_weights([torch.ones(3), torch.tensor([0.0, float("nan")])], 5)


class OnGPU(FiniteGuard):
    """The guard as it works for a fused optimizer on a GPU, whose step is decided by its `found_inf`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr("jepa_lightning.finite.decides_on_gpu", lambda optimizer: True)


def test_a_finding_stays_and_is_raised_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    guard, optimizer = OnGPU(monkeypatch), torch.optim.AdamW([torch.zeros(1)])
    guard.raise_if_found()
    found = []
    for step, norm in enumerate((1.0, 0.0, float("nan"), 1.0, float("inf"), 2.0)):
        guard.check(torch.tensor(norm), optimizer, step)
        found.append(optimizer.found_inf.item())
    assert found == [0, 0, 1, 1, 1, 1], "no step after the first bad one"
    with pytest.raises(NonFiniteError, match="at optimizer step 2;"):
        guard.raise_if_found()


def test_the_first_of_all_steps_is_named_though_later_ones_are_bad_too(monkeypatch: pytest.MonkeyPatch) -> None:
    guard, optimizer = OnGPU(monkeypatch), torch.optim.AdamW([torch.zeros(1)])
    for step in range(3):
        guard.check(torch.tensor(float("nan")), optimizer, step)
    with pytest.raises(NonFiniteError, match="at optimizer step 0;"):
        guard.raise_if_found()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_gpu_decides_for_its_own_kernel_alone(fused: bool, device: str) -> None:
    class Parameter:
        """A parameter as far as it is looked at."""

    Parameter.device = torch.device(device)
    optimizer = SimpleNamespace(param_groups=[{"params": [Parameter()], "fused": fused}])
    assert decides_on_gpu(optimizer) is (fused and device == "cuda")


def test_a_fused_optimizer_leaves_out_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fused AdamW has the same protocol on a CPU."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, guard = torch.optim.AdamW([parameter], lr=0.1, fused=True), OnGPU(monkeypatch)
    moved = []
    for step, value in enumerate((1.0, float("nan"), 1.0)):
        parameter.grad = torch.full((3,), value)
        before = parameter.detach().clone()
        guard.check(torch.nn.utils.get_total_norm([parameter.grad]), optimizer, step)
        optimizer.step()
        moved.append(not torch.equal(before, parameter))
    assert moved == [True, False, False] and parameter.isfinite().all()
