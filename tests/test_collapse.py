"""The alarm fires on planted collapses and is silent on a healthy run."""

import warnings
from pathlib import Path

import pytest
import torch
from conftest import small_data, small_model, trainer

from callbacks import CollapseAlarm, CollapseWarning

HEALTHY = {"val/feature_std": 1.0, "val/rankme": 20.0, "val/top_share": 0.2, "val/persistence_ratio": 0.1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"val/feature_std": 0.05}, "standard deviation of a feature is 0.05"),
        ({"val/rankme": 1.5}, "RankMe is 1.50"),
        ({"val/top_share": 0.95}, "95% of the variance"),
        ({"val/persistence_ratio": 1.0}, "the predictor only copies"),
        ({"val/rankme": float("nan")}, "RankMe is nan"),
    ],
)
def test_each_sign_is_named(change: dict, words: str) -> None:
    (sign,) = CollapseAlarm().signs(HEALTHY | change)
    assert words in sign
    assert CollapseAlarm().signs(HEALTHY) == []


def fit(tmp_path: Path, alarm: CollapseAlarm, **model) -> None:
    data = small_data(size=200, val_size=16, sequence_length=12, clip_length=12, batch_size=20)
    run = trainer(tmp_path, max_epochs=50, limit_val_batches=1.0, callbacks=[alarm], check_val_every_n_epoch=10)
    run.fit(small_model(latent_dim=16, predictor_width=32, encoder_widths=(64,), learning_rate=3e-3, **model), data)


def test_silent_on_a_healthy_run_and_fires_when_the_regularizer_is_off(tmp_path: Path) -> None:
    healthy, collapsed = CollapseAlarm(grace_steps=250), CollapseAlarm(grace_steps=250, action="stop")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        fit(tmp_path, healthy, regularizer_weights={"cov": 0.1})  # at its default it takes more than these 500 steps
    assert healthy.alarms == []
    with pytest.warns(CollapseWarning, match="Collapse alarm at optimizer step"):
        fit(tmp_path, collapsed, momentum=0.9, regularizer_weights={"std": 0.0, "cov": 0.0, "curvature": 1.0})
    assert len(collapsed.alarms) == 1, "action='stop' ends the run at the first alarm"


def test_fires_on_a_constant_encoder(tmp_path: Path) -> None:
    model = small_model()
    for encoder in (model.context_encoder, model.target_encoder):
        torch.nn.init.zeros_(encoder[-1].weight)
    run = trainer(
        tmp_path, max_steps=1, limit_val_batches=1.0, callbacks=[CollapseAlarm(grace_steps=0)], val_check_interval=1
    )
    with pytest.warns(CollapseWarning, match="all inputs look alike"):
        run.fit(model, small_data())


def test_every_jepa_has_an_alarm_and_a_users_own_takes_its_place(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.fit(small_model(), small_data())
    assert sum(isinstance(callback, CollapseAlarm) for callback in run.callbacks) == 1
    mine = CollapseAlarm(min_rankme=7.0)
    run = trainer(tmp_path, max_steps=1, callbacks=[mine])
    run.fit(small_model(), small_data())
    assert [callback for callback in run.callbacks if isinstance(callback, CollapseAlarm)] == [mine]
