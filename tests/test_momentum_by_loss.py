"""The momentum that follows the prediction loss: its values, and that a run that was cut goes on with them."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import parameters_equal, run_script, small_data, small_model, trainer
from lightning.pytorch import Callback
from test_cut_anywhere import SaveAt

from callbacks import EMAUpdate
from callbacks.ema import SMOOTHED_STEPS, update_average

CHANGES: dict[str, Any] = {"momentum": 0.5, "final_momentum": 0.9, "momentum_schedule": "loss"}


class Losses(Callback):
    """The losses of the steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/prediction_loss"]))


@pytest.fixture
def momenta(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The momenta of all updates."""
    seen: list[float] = []

    def watched(target: Any, context: Any, momentum: float, average: Any = None) -> None:
        seen.append(momentum)
        update_average(target, context, momentum, average)

    monkeypatch.setattr("callbacks.ema.update_average", watched)
    return seen


def expected(losses: list[float]) -> list[float]:
    found, smoothed, largest = [], losses[0], 0.0
    for loss in losses:
        smoothed += (loss - smoothed) / SMOOTHED_STEPS
        largest = max(largest, smoothed)
        found.append(0.9 - 0.4 * smoothed / largest)
    return found


def test_momentum_is_least_at_the_largest_loss_and_rises_as_it_falls(tmp_path: Path, momenta: list[float]) -> None:
    seen = Losses()
    run = trainer(tmp_path, max_epochs=4, callbacks=[seen])
    run.fit(small_model(**CHANGES, learning_rate=1e-2), small_data())
    assert len(momenta) == 24 and momenta[0] == pytest.approx(0.5)
    assert momenta == pytest.approx(expected(seen.losses), abs=1e-6)
    ema = EMAUpdate(0.5, 0.9, "loss")
    ema._smoothed, ema._largest = 0.25, 1.0
    assert ema.momentum(7, 10) == pytest.approx(0.8), "whatever the step"
    assert EMAUpdate(0.5, 0.9, "loss").momentum(0, 1) == pytest.approx(0.9), "before there was a loss"


@pytest.mark.parametrize("hook", ["on_before_zero_grad", "on_train_batch_end", "on_before_optimizer_step"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_was_cut_goes_on_with_its_losses(tmp_path: Path, hook: str, accumulate: int) -> None:
    def run(name: str, callbacks: list[Callback], path: Path | None = None) -> Any:
        settings: dict[str, Any] = {"max_epochs": 3, "accumulate_grad_batches": accumulate, "callbacks": callbacks}
        fitted = trainer(tmp_path / name, **settings)
        model = small_model(**CHANGES, learning_rate=1e-2)
        fitted.fit(model, small_data(), ckpt_path=path)
        return model

    whole = run("whole", [SaveAt(hook, 5, tmp_path / "cut.ckpt")])
    assert parameters_equal(whole.target_encoder, run("rest", [], tmp_path / "cut.ckpt").target_encoder)


def test_a_second_run_starts_anew(tmp_path: Path, momenta: list[float]) -> None:
    model = small_model(**CHANGES)
    trainer(tmp_path, max_epochs=1).fit(model, small_data())
    seen = Losses()
    trainer(tmp_path, max_epochs=1, callbacks=[seen]).fit(model, small_data())
    assert momenta[6:] == pytest.approx(expected(seen.losses), abs=1e-6)


TWO = """
import sys
from pathlib import Path
import torch
from conftest import small_data, small_model, trainer

out = Path(sys.argv[1])
model = small_model(momentum=0.5, final_momentum=0.9, momentum_schedule="loss", learning_rate=1e-2)
run = trainer(out, max_epochs=2, devices=2, strategy="ddp")
run.fit(model, small_data(batch_size=4))
if run.is_global_zero:
    torch.save([p.detach() for p in model.target_encoder.parameters()], out / "weights.pt")
"""


def test_two_processes_follow_the_mean_of_their_losses(tmp_path: Path) -> None:
    run_script(TWO, tmp_path / "two")
    model = small_model(**CHANGES, learning_rate=1e-2)
    trainer(tmp_path, max_epochs=2).fit(model, small_data(batch_size=8))
    two = torch.load(tmp_path / "two" / "weights.pt", weights_only=True)
    for first, second in zip([p.detach() for p in model.target_encoder.parameters()], two, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
