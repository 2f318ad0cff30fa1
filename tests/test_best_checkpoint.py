"""best.ckpt is that of the best figure, which is the model's choice unless the user has one."""

import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import small_data, small_model, trainer

from callbacks import BestCheckpoint
from jepa_lightning.weights.checkpoints import read_checkpoint

FIGURES = (0.5, 0.2, 0.9, 0.4)


def fit(
    root: Path, best: BestCheckpoint, metric: Any = ("val/figure", "min"), figures: tuple = FIGURES, **changes: Any
) -> Any:
    """An epoch of 6 steps for each figure, which is logged by its validation, and what last.ckpt says of best.ckpt."""

    class Model(type(small_model())):
        best_metric = metric

        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            self.log("val/figure", figures[min(self.current_epoch, len(figures) - 1)])
            self.log("val/other", -figures[min(self.current_epoch, len(figures) - 1)])

    model = small_model()
    model.__class__ = Model
    settings = {"max_epochs": len(figures), "limit_val_batches": 1, "callbacks": [best], "enable_checkpointing": True}
    run = trainer(root, **(settings | changes))
    run.fit(model, small_data())
    return run


def step(root: Path) -> int:
    return read_checkpoint(root / "checkpoints" / "best.ckpt")["global_step"]


@pytest.mark.parametrize(
    ("best", "metric", "expected"),
    [
        ({}, ("val/figure", "min"), 12),
        ({}, ("val/figure", "max"), 18),
        ({"mode": "max"}, ("val/figure", "min"), 18),
        ({"monitor": "val/other"}, ("val/figure", "max"), 18),  # the lowest of the negative figures
        ({"monitor": "val/other", "mode": "max"}, ("val/figure", "max"), 12),
    ],
)
def test_which_is_best(tmp_path: Path, best: dict, metric: tuple, expected: int) -> None:
    fit(tmp_path, BestCheckpoint(**best), metric)
    assert step(tmp_path) == expected
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best.ckpt"], "one file, under one name"


def test_a_figure_that_is_no_number_is_never_best(tmp_path: Path) -> None:
    fit(tmp_path, BestCheckpoint(), figures=(float("nan"), 0.7, float("nan")))
    assert step(tmp_path) == 12


@pytest.mark.parametrize("metric", [(None, "min"), ("val/absent", "min")])
def test_without_a_figure_there_is_no_best(tmp_path: Path, metric: tuple) -> None:
    fit(tmp_path, BestCheckpoint(), metric)
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()


def test_a_model_that_names_none_has_no_best(tmp_path: Path) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    best = BestCheckpoint()
    run = trainer(tmp_path, max_steps=1, limit_val_batches=1, callbacks=[best], enable_checkpointing=True)
    run.fit(BoringModel())
    assert best.monitor is None and not list(tmp_path.rglob("*.ckpt"))


def test_it_is_in_the_run_directory_unless_set_otherwise(tmp_path: Path) -> None:
    best = BestCheckpoint()
    best.dirpath = str(tmp_path / "elsewhere")
    fit(tmp_path / "run", best)
    assert (tmp_path / "elsewhere" / "best.ckpt").exists() and not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (("val/figure", "max"), "best.ckpt: that of the maximum val/figure; last.ckpt is the one to evaluate."),
        ((None, "min"), "best.ckpt: there will be none; last.ckpt is the one to evaluate."),
    ],
)
def test_what_best_means_is_said_once(tmp_path: Path, metric: tuple, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run = fit(tmp_path, BestCheckpoint(), metric, figures=(0.5,))
        run.validate(run.lightning_module, small_data(), verbose=False)
    assert [record.message for record in caplog.records].count(said) == 1
