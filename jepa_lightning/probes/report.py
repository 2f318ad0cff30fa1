"""The report of a run: figures next to those of their baselines, as JSON for programs and as a table for people."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

COLUMNS = {
    "jepa": "JEPA",
    "random_encoder": "random encoder",
    "pca": "PCA",
    "persistence": "persistence",
    "constant_velocity": "constant velocity",
}

# (key in the JSON, name in the table, digits); a "*" stands for every key at its place.
ROWS = (
    (("probe", "linear_r2", "*"), "linear R2 of {}", 3),
    (("probe", "mlp_r2", "*"), "MLP R2 of {}", 3),
    (("rollout", "ratio_to_persistence", "*"), "embedding error / persistence, {} frames ahead", 3),
    (("vpt_frames",), "valid-prediction time, median frames (capped at 100)", 0),
    (("vpt_frames_mean",), "valid-prediction time, mean", 1),
    (("vpt_frames_standard_error",), "its standard error", 1),
    (("vpt_frames_at_0.2",), "valid-prediction time at the stricter 0.2, median", 0),
    (("decoder", "iou", "*"), "IoU of decoded image, {} frames ahead", 3),
    (("decoder", "mse"), "squared error of decoded image", 5),
    (("decoder", "mse_over_mean_image"), "the same over that of the mean image", 3),
    (("energy_error", "*"), "energy error, {} frames ahead (median, of energy above rest)", 3),
    (("rankme",), "RankMe, effective dimensions", 1),
)


def save_report(
    directory: Path, report: dict[str, Any], title: str, notes: str, table: str, module: str = "jepa_lightning"
) -> None:
    """Write report.json and report.md with the command that made them, and print the table and what lies there.

    Args:
        directory: Run directory.
        report: Figures for report.json.
        title: Title of report.md.
        notes: Paragraph above the table.
        table: Table in Markdown.
        module: Module that was run.
    """
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    directory.mkdir(parents=True, exist_ok=True)
    content = json.dumps(_without_nan(report | {"command": command}), indent=2, allow_nan=False)
    (directory / "report.json").write_text(content + "\n")
    (directory / "report.md").write_text(f"# {title}\n\n{notes}\n\n{table}\n\nMade by `{command}`.\n")
    print(f"\n{table}\n")
    for path in sorted(directory.iterdir()):
        if path.suffix in (".gif", ".json", ".md", ".mp4", ".png"):
            print(path)


def _without_nan(value: Any) -> Any:
    """A report with null where a figure is not finite: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_accuracies(probe: Any, figures: dict[str, dict[str, float]], evaluated: str) -> None:
    """The report of a classifier: accuracies on the JEPA's embeddings and on baselines, written by the first process.

    Args:
        probe: Probe with a trainer, its `checkpoint`, `image_size`, and `names`: kind of features -> title of its row.
        figures: Kind of features -> "accuracy", "standard_error", and what was chosen.
        evaluated: What the accuracies were taken on.
    """
    if not probe.trainer.is_global_zero:
        return
    name, checkpoint, directory = type(probe).__name__, probe.checkpoint, Path(probe.trainer.default_root_dir)
    settings = [key for key in next(iter(figures.values())) if key not in ("accuracy", "standard_error")]
    header = ["features", "accuracy", "standard error", *(setting.replace("_", " ") for setting in settings)]
    rows = [
        [title, *(f"{figures[kind][key]:.3f}" for key in ("accuracy", "standard_error"))]
        + [f"{figures[kind][key]:g}" for key in settings]
        for kind, title in probe.names.items()
    ]
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    height, width = probe.image_size
    report = {"probe": name, "accuracy": figures, "judged": evaluated, "checkpoint": checkpoint}
    notes = f"Of `{checkpoint}`, {evaluated}. Images of {height} x {width} pixels."
    save_report(directory, report | {"image_size": [height, width]}, name, notes, table)


def write_report(directory: Path, report: dict[str, Any]) -> None:
    """Write the report of a pendulum JEPA, and print its table.

    Args:
        directory: Run directory.
        report: Figures of the JEPA at the top, of the baselines under "baselines".
    """
    test_set, seconds = report["test_set"], report["seconds"]
    trained = "" if seconds["training"] is None else f" The JEPA was trained for {seconds['training']:.0f} s."
    notes = (
        f"Held-out trajectories: {test_set['trajectories']} of {test_set['windows']} windows each; forecasts start at "
        f"window {test_set['forecast_start']}.{trained} Probes, decoders and the baselines' predictors were fitted on "
        "training trajectories; a baseline's predictor is of the JEPA's kind, trained on its frozen embeddings for "
        f"{report['control_steps']} steps of 256 roll-outs. Constant velocity starts from the true state."
    )
    save_report(directory, report, "Report", notes, markdown_table(report))


def markdown_table(report: dict[str, Any]) -> str:
    """One row per figure, one column per forecaster; a dash where a figure means nothing."""
    columns = {"jepa": report} | report["baselines"]
    header = ["figure", *(COLUMNS[name] for name in columns)]
    lines = ["| " + " | ".join(header) + " |", "| :-- |" + " --: |" * len(columns)]
    for path, title, digits in ROWS:
        found = {name: _look_up(figures, path) for name, figures in columns.items()}
        for key in found["jepa"]:
            values = [found[name].get(key) for name in columns]
            cells = ["-" if value is None else f"{value:.{digits}f}" for value in values]
            lines.append("| " + " | ".join([title.format(key), *cells]) + " |")
    return "\n".join(lines)


def _look_up(figures: dict[str, Any], path: tuple[str, ...]) -> dict[str, float]:
    """The numbers at `path`, by the key that the "*" met ("" without one); empty where the path leads nowhere."""
    value: Any = figures
    for part in path:
        if part == "*":
            return dict(value)
        if part not in value:
            return {}
        value = value[part]
    return {"": value}
