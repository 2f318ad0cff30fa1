"""The alarm fires on planted collapses and is silent on a healthy run."""

import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import small_data, small_model, trainer

from callbacks import CollapseAlarm, CollapseWarning
from jepa_lightning.regularizers import Regularizer

NAN = float("nan")

HEALTHY = {"val/feature_std": 1.0, "val/rankme": 20.0, "val/largest_eigenvalue_share": 0.2, "val/persistence_ratio": 0.1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"val/feature_std": 0.05},
            "standard deviation of an embedding dimension is 0.05 (healthy: above 0.1): all inputs look alike",
        ),
        ({"val/rankme": 1.5}, "RankMe is 1.50 (healthy: above 3.0): the embeddings vary in hardly any direction"),
        (
            {"val/largest_eigenvalue_share": 0.95},
            "95% of the variance lies in one direction (healthy: below 90%): the embeddings vary together",
        ),
        ({"val/persistence_ratio": 1.0}, "1.00 times that of predicting no change (healthy: below 0.9): the predictor only"),
        ({"val/persistence_ratio": 1.1}, "the predictor only copies"),
        (
            {"val/persistence_ratio": 34.0},
            "34.00 times that of predicting no change (healthy: below 0.9): the predictor does",
        ),
        ({"val/feature_std": NAN}, "standard deviation of an embedding dimension is nan (healthy: above 0.1)"),
        ({"val/rankme": NAN}, "RankMe is nan (healthy: above 3.0)"),
        ({"val/largest_eigenvalue_share": NAN}, "nan% of the variance lies in one direction"),
        ({"val/persistence_ratio": NAN}, "nan times that of predicting no change"),
    ],
)
def test_each_sign_is_named(change: dict, words: str) -> None:
    (sign,) = CollapseAlarm().signs(HEALTHY | change)
    assert words in sign
    if any(math.isnan(value) for value in change.values()):
        assert "alike" not in sign and "copies" not in sign and "worse" not in sign


def test_healthy_figures_and_those_at_the_limits_are_no_signs() -> None:
    limits = {"val/feature_std": 0.1, "val/rankme": 3.0, "val/largest_eigenvalue_share": 0.9, "val/persistence_ratio": 0.9}
    for metrics in (HEALTHY, limits, {}, {"train/rankme": 1.0, "rankme": 1.0}):
        assert CollapseAlarm().signs(metrics) == []
        assert CollapseAlarm().advice(metrics, SimpleNamespace()) == []


def model(name: str | None, mode: str = "vjepa2", **weights: float) -> SimpleNamespace:
    """What advice asks of a pendulum JEPA."""
    regularizer = None if name is None else Regularizer(name, 4, weights)
    return SimpleNamespace(regularizer=regularizer, target_mode=mode, learning_rate=0.004)


SMALL, FLAT, ONE_SIDED = {"val/feature_std": 0.01}, {"val/rankme": 1.2}, {"val/largest_eigenvalue_share": 0.99}
ALL_THREE = SMALL | FLAT | ONE_SIDED


@pytest.mark.parametrize(
    ("change", "module", "expected"),
    [
        # A term that can be raised is named with its weight.
        (
            SMALL | FLAT,
            model("vicreg"),
            [
                "variance in model.regularizer_weights keeps embeddings from shrinking, and is 1: raise it",
                "covariance in model.regularizer_weights keeps embeddings from varying together, and is 0.05",
            ],
        ),
        (
            SMALL | FLAT,
            model("vicreg", variance=0.0, covariance=0.0),
            [
                "variance in model.regularizer_weights keeps embeddings from shrinking, and is 0: give it a weight",
                "and is 0: give it a weight",
            ],
        ),
        (
            SMALL | FLAT,
            model("variance_hinge"),
            ["and is 0.1: raise it", "model.regularizer=variance_hinge has no term that keeps embeddings from varying"],
        ),
        (
            SMALL | FLAT,
            model("barlow_twins"),
            [
                "model.regularizer=barlow_twins has no term that keeps embeddings from shrinking",
                "redundancy in model.regularizer_weights keeps embeddings from varying together",
            ],
        ),
        (
            FLAT,
            model("sigreg"),
            ["sigreg in model.regularizer_weights keeps embeddings from varying together, and is 10: raise"],
        ),
        (
            SMALL | FLAT,
            model("dino_centering"),
            [
                "model.regularizer=dino_centering has no term that keeps embeddings from shrinking: choose vicreg",
                "dino_centering has no term that keeps embeddings from varying",
            ],
        ),
        # One that is not there is not.
        (
            FLAT,
            model(None),
            [
                "model.regularizer is null, and only the slowness of the target encoder keeps embeddings from "
                "varying together: set model.regularizer to vicreg, or raise model.momentum"
            ],
        ),
        (FLAT, SimpleNamespace(regularizer=None), ["set model.regularizer to vicreg, or raise model.momentum"]),
        (FLAT, SimpleNamespace(), ["set model.regularizer to vicreg, or raise model.momentum"]),
        (
            SMALL | FLAT,
            model(None, "none"),
            [
                "in model.target_mode=none nothing keeps embeddings from shrinking: set "
                "model.regularizer to vicreg, or model.target_mode to vjepa2",
                "varying together",
            ],
        ),
        (
            FLAT,
            model(None, "default"),
            ["only inverse_dynamics keeps embeddings from varying together: set model.regularizer to"],
        ),
        # Both signs of a low rank are one case.
        (FLAT | ONE_SIDED, model("vicreg"), ["covariance in model.regularizer_weights"]),
        (ONE_SIDED, model("vicreg"), ["covariance in model.regularizer_weights"]),
        (
            ALL_THREE,
            model("sigreg"),
            [
                "sigreg in model.regularizer_weights keeps embeddings from shrinking",
                "sigreg in model.regularizer_weights keeps embeddings from varying together",
            ],
        ),
        # Small embeddings of a sound rank are small, not alike.
        (
            SMALL,
            model("vicreg"),
            ["variance in model.regularizer_weights", "still vary in many directions (RankMe 20.0), so they are"],
        ),
        # A copy, and what is worse than one.
        (
            {"val/persistence_ratio": 0.95},
            model("vicreg"),
            [
                "a predictor that copies needs more steps, or embeddings that change "
                "more from one time to the next: lower curvature (now 1) in"
            ],
        ),
        (
            {"val/persistence_ratio": 0.95},
            model("vicreg", temporal_similarity=0.5),
            ["lower curvature (now 1) and temporal_similarity (now 0.5) in model"],
        ),
        ({"val/persistence_ratio": 1.1}, model("sigreg"), ["that change more from one time to the next"]),
        ({"val/persistence_ratio": 1.0}, model("sigreg"), ["that change more from one time to the next"]),
        ({"val/persistence_ratio": 1.0}, model(None), ["that change more from one time to the next"]),
        (
            {"val/persistence_ratio": 34.0},
            model("vicreg"),
            [
                "not trained yet, or diverges: give it more steps, and if the ratio "
                "does not fall, lower model.learning_rate (now 0.004)"
            ],
        ),
        ({"val/persistence_ratio": 34.0}, SimpleNamespace(), ["lower model.learning_rate"]),
        # NaN.
        (
            {"val/rankme": NAN, "val/feature_std": 0.01},
            model("vicreg"),
            ["embeddings that are not finite: lower model.learning"],
        ),
        (
            {"val/persistence_ratio": NAN},
            model("vicreg"),
            ["a ratio of NaN means embeddings that never change, or forecasts"],
        ),
        (
            FLAT | {"val/persistence_ratio": NAN},
            model("vicreg"),
            ["covariance in model.regularizer_weights", "a ratio of NaN means"],
        ),
    ],
)
def test_advice_fits_the_model(change: dict, module: SimpleNamespace, expected: list[str]) -> None:
    advice = CollapseAlarm().advice(HEALTHY | change, module)
    assert len(advice) == len(expected), advice
    for sentence, words in zip(advice, expected, strict=True):
        assert words in sentence
    if module.__dict__.get("regularizer") is None:
        assert not any("regularizer_weights" in sentence for sentence in advice), "there is no weight to raise"


def fit(tmp_path: Path, alarm: CollapseAlarm, **model) -> None:
    data = small_data(size=200, val_size=16, sequence_length=12, clip_length=12, batch_size=20)
    run = trainer(tmp_path, max_epochs=50, limit_val_batches=1.0, callbacks=[alarm], check_val_every_n_epoch=10)
    run.fit(small_model(latent_dim=16, predictor_width=32, encoder_widths=(64,), learning_rate=3e-3, **model), data)


def test_silent_on_a_healthy_run_and_fires_when_the_regularizer_is_off(tmp_path: Path) -> None:
    healthy, collapsed = CollapseAlarm(grace_steps=250), CollapseAlarm(grace_steps=250, action="stop")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        fit(tmp_path, healthy, regularizer_weights={"covariance": 0.1})  # at its default it takes more than these 500 steps
    assert healthy.alarms == []
    with pytest.warns(CollapseWarning, match="Collapse alarm at optimizer step"):
        fit(tmp_path, collapsed, momentum=0.9, regularizer_weights={"variance": 0.0, "covariance": 0.0, "curvature": 1.0})
    assert len(collapsed.alarms) == 1, "action='stop' ends the run at the first alarm"


def test_the_warning_gives_the_advice_for_the_model_that_runs(tmp_path: Path) -> None:
    alarm = CollapseAlarm(grace_steps=0, min_rankme=8.1)
    run = trainer(tmp_path, max_steps=1, limit_val_batches=1.0, callbacks=[alarm], val_check_interval=1)
    words = (
        "RankMe is .* What to try: .*sigreg in model.regularizer_weights keeps embeddings from varying together, and is 2"
    )
    with pytest.warns(CollapseWarning, match=words):
        run.fit(small_model(regularizer="sigreg", regularizer_weights={"sigreg": 2.0}), small_data())


def test_neither_sanity_checks_nor_plain_validation_nor_a_fresh_encoder_set_it_off(tmp_path: Path) -> None:
    alarm = CollapseAlarm(grace_steps=7, min_rankme=8.1)
    settings = {"limit_val_batches": 1.0, "callbacks": [alarm], "num_sanity_val_steps": 2}
    run = trainer(tmp_path, max_steps=6, **settings)
    run.fit(small_model(), small_data())
    run.validate(small_model(), small_data(), verbose=False)
    assert run.global_step == 6 and alarm.alarms == []
    fresh = CollapseAlarm(grace_steps=0, min_rankme=8.1)
    trainer(tmp_path, max_steps=3, **(settings | {"callbacks": [fresh]})).fit(small_model(), small_data())
    assert fresh.alarms == [], "the sanity check is no validation"
    alarm.grace_steps = 6
    with pytest.warns(CollapseWarning):
        trainer(tmp_path, max_steps=12, **settings).fit(small_model(), small_data())
    assert [f"step {step}:" in message for step, message in zip((6, 12), alarm.alarms, strict=True)] == [True, True]


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
