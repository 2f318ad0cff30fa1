"""What the state probe fits on, and what it only chooses by."""

from pathlib import Path

import pytest
import torch
from conftest import small_data, small_model, trainer

from datamodules.physics import state_labels
from jepa_lightning.probes import StateProbe
from jepa_lightning.probes.ridge import LinearReadout, MLPReadout


def test_regressions_are_fitted_on_training_trajectories_and_the_penalty_chosen_on_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.fit(small_model(), small_data())
    run.save_checkpoint(tmp_path / "jepa.ckpt")
    probe = StateProbe(str(tmp_path / "jepa.ckpt"), hidden_dim=4, num_steps=2, control_steps=2)
    seen: dict[str, list] = {"linear": [], "mlp": []}
    for kind, regression in (("linear", LinearReadout), ("mlp", MLPReadout)):
        fit = regression.fit

        def record(self, *arguments, kind=kind, fit=fit):
            seen[kind].append([value for value in arguments if isinstance(value, torch.Tensor)])
            return fit(self, *arguments)

        monkeypatch.setattr(regression, "fit", record)
    data = small_data(clip_length=10)  # whole trajectories: the clips are what `trajectories` holds
    trainer(tmp_path, max_epochs=1, limit_val_batches=1.0).fit(probe, data)

    train, val = (data.observe(data.trajectories(split)) for split in ("train", "val"))
    for place, name in enumerate(probe.encoders):
        features = {split: probe.features(batch)[name].flatten(0, 1) for split, batch in (("train", train), ("val", val))}
        labels = {split: state_labels(batch.states).flatten(0, 1) for split, batch in (("train", train), ("val", val))}
        fit_on, answers, chosen_by, chosen_answers = seen["linear"][place]
        for given, expected in ((fit_on, features["train"]), (answers, labels["train"])):
            assert same_rows(given, expected), f"{name} is fitted on something else than the training trajectories"
        for given, expected in ((chosen_by, features["val"]), (chosen_answers, labels["val"])):
            assert same_rows(given, expected), f"the penalty of {name} is chosen on something else than validation"
        assert torch.equal(seen["mlp"][place][0], fit_on) and torch.equal(seen["mlp"][place][1], answers)


def same_rows(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """The same rows in any order."""
    ordered = [rows[rows[:, 0].argsort()] for rows in (mine, theirs)]
    return mine.shape == theirs.shape and torch.allclose(*ordered, atol=1e-4)
