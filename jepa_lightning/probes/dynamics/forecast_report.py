"""Figures and table of a `ForecastProbe`.

Shapes: K steps ahead, C channels, H W pixels.
"""

from typing import Any

import torch
from torch import Tensor

TITLES = {
    "true": "squared error, true actions",
    "shuffled": "squared error, actions of another clip",
    "persistence": "squared error of persistence, the last true frame",
    "mean_image": "squared error of the mean image",
    "true_over_persistence": "true actions / persistence",
    "shuffled_over_true": "another clip's actions / true actions",
}
"""Figure per step -> what it is."""

SIMILARITIES = {
    "true": "structural similarity, true actions",
    "shuffled": "structural similarity, actions of another clip",
    "persistence": "structural similarity of persistence",
}


class ForecastSums:
    """Sums over clips of squared errors at each step, in float64 on the CPU.

    The mean image is that of all true frames which were forecast, at all steps: no constant image has a lower error.
    """

    def __init__(self) -> None:
        self.errors: dict[str, Tensor] = {}  # kind -> (K,), summed over clips
        self.counts: dict[str, int] = {}
        self.clips = 0
        self._images: Tensor | None = None  # (K, C, H, W), summed over clips
        self._squares: Tensor | None = None  # (K,): mean square of the frames, summed over clips

    def add(self, kind: str, images: Tensor, truth: Tensor) -> None:
        """Add the error of images (B, K, C, H, W) of one kind, against the truth."""
        error = (images - truth).float().square().mean(dim=(2, 3, 4)).cpu().double().sum(dim=0)
        self.errors[kind] = self.errors.get(kind, torch.zeros_like(error)) + error
        self.counts[kind] = self.counts.get(kind, 0) + len(truth)

    def add_truth(self, truth: Tensor) -> None:
        """Add true frames (B, K, C, H, W), for the mean image."""
        frames = truth.cpu().double()
        images, squares = frames.sum(dim=0), frames.square().mean(dim=(2, 3, 4)).sum(dim=0)
        self._images = images if self._images is None else self._images + images
        self._squares = squares if self._squares is None else self._squares + squares
        self.clips += len(truth)

    def means(self) -> dict[str, Tensor]:
        """Mean squared error by kind: (K,)."""
        assert self._images is not None and self._squares is not None
        mean = self._images.sum(dim=0) / (self.clips * len(self._images))  # (C, H, W)
        crossed = (self._images * mean).mean(dim=(1, 2, 3))
        around = self._squares / self.clips - 2 * crossed / self.clips + mean.square().mean()
        return {kind: error / self.counts[kind] for kind, error in self.errors.items()} | {"mean_image": around}


def shown_steps(steps: int) -> list[int]:
    """Steps at which ratios are reported: 1, 2, 4 and the last."""
    return sorted({step for step in (1, 2, 4) if step < steps} | {steps})


def forecast_figures(means: dict[str, Tensor]) -> dict[str, Any]:
    """Errors at all steps and ratios at some, from mean squared errors (K,) by kind."""
    steps = shown_steps(len(means["true"]))
    pairs = {"true_over_persistence": ("true", "persistence"), "shuffled_over_true": ("shuffled", "true")}
    ratios = {
        name: {str(step): (means[above][step - 1] / means[below][step - 1]).item() for step in steps}
        for name, (above, below) in pairs.items()
        if above in means
    }
    return {"squared_error": {kind: error.tolist() for kind, error in means.items() if kind != "start"}, **ratios}


def forecast_table(report: dict[str, Any]) -> str:
    """The figures at some steps in Markdown."""
    steps = shown_steps(report["steps"])
    lines = ["| steps ahead | 0 | " + " | ".join(map(str, steps)) + " |", "| :-- |" + " --: |" * (len(steps) + 1)]

    def row(title: str, start: str, values: list[str]) -> str:
        return "| " + " | ".join([title, start, *values]) + " |"

    for name, title in TITLES.items():
        if name in report["squared_error"]:
            errors = report["squared_error"][name]
            start = f"{report['reconstruction_error']:.5f}" if name == "true" else "-"
            lines.append(row(title, start, [f"{errors[step - 1]:.5f}" for step in steps]))
        elif name in report:
            lines.append(row(title, "-", [f"{report[name][str(step)]:.3f}" for step in steps]))
    for name, title in SIMILARITIES.items():
        if name in report["structural_similarity"]:
            found = report["structural_similarity"][name]
            start = f"{report['reconstruction_similarity']:.3f}" if name == "true" else "-"
            lines.append(row(title, start, [f"{found[str(step)]:.3f}" for step in steps]))
    return "\n".join(lines)
