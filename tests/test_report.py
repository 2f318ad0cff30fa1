"""Reports: every figure in its own row and column, and files that programs and people can read."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jepa_lightning.probes.dynamics.planning_report import action_figures, planning_table
from jepa_lightning.probes.report import ROWS, markdown_table, save_accuracies, save_report, write_report


@pytest.fixture(autouse=True)
def command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "test", "--config", "a file.yaml"])


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def forecaster(number: int) -> dict:
    """Figures of one forecaster, no two alike: `number` is the digit before the point."""
    return {
        "probe": {"linear_r2": {"omega1": number + 0.1111}, "mlp_r2": {"omega2": number + 0.1222}},
        "rollout": {"ratio_to_persistence": {"8": number + 0.1333}},
        "vpt_frames": number + 20.4,
        "vpt_frames_mean": number + 30.14,
        "vpt_frames_standard_error": number + 0.26,
        "vpt_frames_at_0.2": number + 40.4,
        "decoder": {"iou": {"16": number + 0.1444}, "mse": number + 0.123456, "mse_over_mean_image": number + 0.1555},
        "energy_error": {"30": number + 0.1666},
        "rankme": number + 50.16,
    }


COLUMNS = ("jepa", "random_encoder", "pca", "persistence", "constant_velocity")


def pendulum_report() -> dict:
    return forecaster(1) | {
        "baselines": {name: forecaster(number) for number, name in enumerate(COLUMNS[1:], start=2)},
        "test_set": {"trajectories": 11, "windows": 22, "forecast_start": 8},
        "seconds": {"training": 33.4, "report": 1.0},
        "control_steps": 44,
    }


def test_each_figure_stands_in_its_row_under_its_forecaster() -> None:
    header, rule, *rows = cells(markdown_table(pendulum_report()))
    assert header == ["figure", "JEPA", "random encoder", "PCA", "persistence", "constant velocity"]
    assert rule == [":--", "--:", "--:", "--:", "--:", "--:"]
    expected = {
        "linear R2 of omega1": "{}.111",
        "MLP R2 of omega2": "{}.122",
        "embedding error / persistence, 8 frames ahead": "{}.133",
        "valid-prediction time, median frames (capped at 100)": "2{}",
        "valid-prediction time, mean": "3{}.1",
        "its standard error": "{}.3",
        "valid-prediction time at the stricter 0.2, median": "4{}",
        "IoU of decoded image, 16 frames ahead": "{}.144",
        "squared error of decoded image": "{}.12346",
        "the same over that of the mean image": "{}.155",
        "energy error, 30 frames ahead (median, of energy above rest)": "{}.167",
        "RankMe, effective dimensions": "5{}.2",
    }
    assert len(ROWS) == len(expected)
    for row, (title, value) in zip(rows, expected.items(), strict=True):
        number = [value.format(column) for column in range(1, 6)]
        assert row[0] == title
        for found, wanted in zip(row[1:], number, strict=True):
            assert abs(float(found) - float(wanted)) < 0.0011 and len(found) == len(wanted), title


def test_rows_are_those_of_the_jepa_and_missing_figures_are_dashes() -> None:
    report = pendulum_report()
    report["baselines"] = {
        "random_encoder": {"probe": {"linear_r2": {"omega1": 0.5}}, "rankme": 2.0},
        "persistence": {"probe": {}, "vpt_frames": 0.0},
    }
    del report["decoder"], report["energy_error"], report["vpt_frames"]
    report["probe"] = {"linear_r2": {"omega1": 0.9, "omega2": -0.25}}
    rows = {row[0]: row[1:] for row in cells(markdown_table(report))[2:]}
    assert rows["linear R2 of omega1"] == ["0.900", "0.500", "-"]
    assert rows["linear R2 of omega2"] == ["-0.250", "-", "-"]
    assert rows["RankMe, effective dimensions"] == ["51.2", "2.0", "-"]
    assert not any("IoU" in title or "MLP" in title or "energy" in title or "median frames" in title for title in rows)


def test_a_report_is_json_and_markdown_with_the_command_and_lists_what_lies_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "deep" / "run"
    directory.mkdir(parents=True)
    for name in ("film.mp4", "figure.png", "weights.ckpt"):
        (directory / name).touch()
    report = {"a": float("nan"), "b": [1.5, float("inf"), {"c": -float("inf")}], "d": (2, "x"), "e": {"f": None, "g": 3.0}}
    save_report(directory, report, "Title", "Notes.", "| table |")
    text = (directory / "report.json").read_text()
    command = "python -m jepa_lightning test --config 'a file.yaml'"
    assert json.loads(text) == {
        "a": None,
        "b": [1.5, None, {"c": None}],
        "d": [2, "x"],
        "e": {"f": None, "g": 3.0},
        "command": command,
    }
    assert "NaN" not in text and text.startswith('{\n  "a"') and text.endswith("}\n")
    assert (directory / "report.md").read_text() == f"# Title\n\nNotes.\n\n| table |\n\nMade by `{command}`.\n"
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["", "| table |", ""]
    assert printed[3:] == [str(directory / name) for name in ("figure.png", "film.mp4", "report.json", "report.md")]
    save_report(tmp_path / "not" / "there" / "yet", {}, "Title", "Notes.", "| table |")  # made, and made only once
    save_report(tmp_path / "not" / "there" / "yet", {}, "Title", "Notes.", "| table |")


class SomeProbe(SimpleNamespace):
    """What `save_accuracies` reads of a probe."""

    names = {"model": "the model", "baseline": "its baseline"}  # noqa: RUF012


def some_probe(directory: Path, first: bool = True) -> SomeProbe:
    trainer = SimpleNamespace(is_global_zero=first, default_root_dir=str(directory))
    return SomeProbe(trainer=trainer, checkpoint="jepa.ckpt", image_size=(16, 24))


ACCURACIES = {
    "baseline": {"accuracy": 0.25, "standard_error": 0.0625, "learning_rate": 0.01, "weight_decay": 5e-4},
    "model": {"accuracy": 0.9876, "standard_error": 0.01, "learning_rate": 0.1, "weight_decay": 0.0},
}


def test_accuracies_stand_next_to_their_names_with_what_was_chosen(tmp_path: Path) -> None:
    save_accuracies(some_probe(tmp_path), ACCURACIES, "on 7 images")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.pop("command")
    expected = {"probe": "SomeProbe", "accuracy": ACCURACIES, "judged": "on 7 images", "checkpoint": "jepa.ckpt"}
    assert report == expected | {"image_size": [16, 24]}
    title, _, notes, _, *table = (tmp_path / "report.md").read_text().splitlines()
    assert (title, notes) == ("# SomeProbe", "Of `jepa.ckpt`, on 7 images. Images of 16 x 24 pixels.")
    assert table[:4] == [
        "| features | accuracy | standard error | learning rate | weight decay |",
        "| :-- | --: | --: | --: | --: |",
        "| the model | 0.988 | 0.010 | 0.1 | 0 |",
        "| its baseline | 0.250 | 0.062 | 0.01 | 0.0005 |",
    ]


def test_accuracies_without_settings_have_no_columns_for_them_and_one_process_writes(tmp_path: Path) -> None:
    plain = {name: {key: figures[key] for key in ("accuracy", "standard_error")} for name, figures in ACCURACIES.items()}
    save_accuracies(some_probe(tmp_path, first=False), plain, "on 7 images")
    assert not list(tmp_path.iterdir()), "the others leave it to the first"
    save_accuracies(some_probe(tmp_path), plain, "on 7 images")
    assert (
        "| features | accuracy | standard error |\n| :-- | --: | --: |\n| the model |"
        in (tmp_path / "report.md").read_text()
    )


@pytest.mark.parametrize(("training", "sentence"), [(33.4, " The JEPA was trained for 33 s."), (None, "")])
def test_the_report_of_a_pendulum_says_what_it_was_made_of(tmp_path: Path, training: float | None, sentence: str) -> None:
    report = pendulum_report()
    report["seconds"]["training"] = training
    write_report(tmp_path, report)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith(
        "# Report\n\nHeld-out trajectories: 11 of 22 windows each; forecasts start at window 8."
        + sentence
        + " Probes, decoders"
    )
    assert "for 44 steps of 256 roll-outs" in text and markdown_table(report) in text
    assert json.loads((tmp_path / "report.json").read_text())["vpt_frames"] == 21.4


def test_what_actions_are_worth() -> None:
    errors = {
        "true": torch.tensor([1.0, 2.0, 4.0]),
        "shuffled": torch.tensor([4.0, 10.0, 5.0]),
        "zero": torch.tensor([3.0, 6.0, 7.0]),
        "still": torch.tensor([2.0, 16.0, 8.0]),
    }
    assert action_figures(errors) == {
        "steps": 3,
        "shuffled_over_true": 1.25,  # at the last step
        "zero_over_true": 1.75,
        "true_over_shuffled": {"1": 0.25, "2": pytest.approx(0.2), "3": pytest.approx(0.8)},
        "true_over_persistence": {"1": 0.5, "2": 0.125, "3": 0.5},
    }


PLANNERS = {
    "success": "world model, receding horizon (a new plan at each window)",
    "one_plan": "world model, open loop (the first plan to its end)",
    "zero_torque": "zero torque",
    "random_torque": "random torque",
    "oracle": "oracle (known physics), open loop",
    "noisy_oracle": "oracle, open loop, from a noisy state (0.05 rad, 0.5 rad/s)",
    "noisy_oracle_replanning": "the same, receding horizon",
}


def test_each_planner_has_its_row_and_no_other() -> None:
    """Of every planner another rate: what is called an oracle was one."""
    names = list(PLANNERS)
    rates = {name: 0.11 * (place + 1) for place, name in enumerate(names)}
    swing = {
        "episodes": 9,
        "goal": (0.0, 1.5),
        "standard_error": 0.05,
        "zero_torque": 0.01,
        "random_torque": 0.02,
        "median_highest": 1.25,
        "median_nearest": 0.75,
    }
    ahead = {str(k): k / 100 for k in (1, 2, 5, 10)}
    report = {
        "planning": rates
        | {
            "standard_error": 0.031,
            "standard_errors": {name: 0.01 * place for place, name in enumerate(names) if name != "success"},
            "at_radius": {name: {"0.15": rate / 2, "0.25": rate, "0.5": rate + 0.1} for name, rate in rates.items()},
            "swing_up": 0.66,
            "swing_up_details": swing,
        },
        "actions": {"true_over_persistence": ahead, "true_over_shuffled": {key: 2 * value for key, value in ahead.items()}},
    }
    first, second, third = planning_table(report).split("\n\n")
    header, rule, *rows = cells(first)
    assert header == ["reaching a goal", "success (standard error)", "within 0.15 m", "within 0.25 m", "within 0.5 m"]
    assert rule == [":--", "--:", "--:", "--:", "--:"]
    for place, (row, name) in enumerate(zip(rows, names, strict=True)):
        rate, error = rates[name], 0.031 if name == "success" else 0.01 * place
        radii = [f"{rate / 2:.2f}", f"{rate:.2f}", f"{rate + 0.1:.2f}"]
        assert row == [PLANNERS[name], f"{rate:.2f} ({error:.2f})", *radii]
    header, rule, row = cells(second)
    assert header[0] == "tip to (0, 1.5) m, from hanging" and header[1:4] == ["success", "zero torque", "random torque"]
    assert header[4:] == ["median of the highest tip, m", "median of its minimum distance, m"]
    assert rule == [":--", *["--:"] * 5]
    assert row == ["9 episodes", "0.66 (0.05)", "0.01", "0.02", "1.25", "0.75"]
    assert cells(third) == [
        ["error of embeddings, steps ahead", "1", "2", "5", "10"],
        [":--", "--:", "--:", "--:", "--:"],
        ["under the true actions, over persistence", "0.010", "0.020", "0.050", "0.100"],
        ["under the true actions, over that under another trajectory's", "0.020", "0.040", "0.100", "0.200"],
    ]
