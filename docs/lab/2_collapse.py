# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. Collapse: when a small loss is bad news
#
# A JEPA chooses its own targets, and so it can cheat: if every image has the same embedding, predicting it is easy, and
# the loss is nearly zero. This is called collapse. You train the same network twice from the same start, once with an
# anti-collapse regularizer (VICReg) and once without, and compare the two runs by their loss and by their embeddings.
#
# **Set-up** as in notebook 1: `python -m pip install -e .` in the folder of the repository (Windows: `py -m pip install
# -e .`); on Colab, clone the repository, install it in a first cell and restart the session. `accelerator="cpu"` is right
# on a Mac, too.

# %%
import logging
import os
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import numpy as np
import torch

from callbacks import CollapseAlarm
from jepa_lightning import DoublePendulum, PendulumJEPA

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore")  # the alarm's warning is printed below

FAST = os.environ.get("LAB_FAST") == "1"  # the repository's tests run this file in seconds, and learn nothing
EPOCHS, SIZE, VAL_SIZE = (2, 128, 64) if FAST else (6, 4_000, 600)
FOLDER = Path("runs/lab")  # figures are written there, too
FOLDER.mkdir(parents=True, exist_ok=True)


# %% [markdown]
# ## One run
# Everything but the regularizer is the same in both runs: the initial weights, the data, their order. The callback keeps
# what is measured at each validation, on trajectories that are never trained on.


# %%
class Keep(pl.Callback):
    """Keep the metrics of each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append(metrics | {"step": trainer.global_step})
        loss, std = metrics["loss"], metrics["feature_std"]
        print(f"  step {trainer.global_step:4d}: prediction loss {loss:.2g}, standard deviation {std:.2g}", flush=True)


def train(regularizer: str | None) -> tuple[PendulumJEPA, list[dict[str, float]], CollapseAlarm]:
    """Train a model, and return it with its metrics and the alarm that watched over it."""
    pl.seed_everything(0, verbose=False)
    model = PendulumJEPA(horizon=6, final_momentum=0.998, regularizer=regularizer)
    keep, alarm, began = Keep(), CollapseAlarm(), time.monotonic()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        gradient_clip_val=5.0,
        callbacks=[keep, alarm],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    print(f"regularizer: {regularizer}")
    trainer.validate(model, data, verbose=False)  # the random start
    trainer.fit(model, data)
    print(f"  {time.monotonic() - began:.0f} s")
    return model, keep.rows, alarm


data = DoublePendulum(size=SIZE, val_size=VAL_SIZE, clip_length=10)
healthy, healthy_rows, healthy_alarm = train("vicreg")
broken, broken_rows, broken_alarm = train(None)

# %% [markdown]
# ## Which run would you keep?
# By the loss alone, the choice is easy. Look at the other lines before you choose.
#
# * *Standard deviation*: how far embeddings are apart, averaged over their 64 dimensions.
# * *RankMe*: in how many directions they vary, between 1 and 64.
# * *Persistence ratio*: the error of the forecast 6 frames ahead, over the error of "nothing changes". Below 1 the predictor
#   is better than that; it has no unit, and shrinking embeddings do not help.
# * *Linear R2*: how well a linear map reads the state from standardized embeddings, as in notebook 1.

# %%
LINES = {
    "loss": "prediction loss",
    "feature_std": "standard deviation",
    "rankme": "RankMe",
    "persistence_ratio": "persistence ratio",
    "linear_r2_sin_theta1": "linear R2, upper arm (sine)",
    "linear_r2_sin_theta2": "linear R2, lower arm (sine)",
}
columns = {"random start": healthy_rows[0], "with VICReg": healthy_rows[-1], "without": broken_rows[-1]}
print(f"{'':28s}" + "".join(f"{title:>14s}" for title in columns))
for name, title in LINES.items():
    print(f"{title:28s}" + "".join(f"{row[name]:14.3g}" for row in columns.values()))
ratio = healthy_rows[-1]["loss"] / broken_rows[-1]["loss"]
print(f"The loss without a regularizer is {ratio:,.0f} times smaller.")

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
panels = (("loss", "prediction loss"), ("feature_std", "standard deviation"), ("persistence_ratio", "persistence ratio"))
for axis, (name, title) in zip(axes, panels, strict=True):
    for label, rows, color in (("with VICReg", healthy_rows, "tab:blue"), ("without", broken_rows, "tab:red")):
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], marker=".", label=label, color=color)
    axis.set(title=title, xlabel="optimizer step", yscale="log")
axes[2].axhline(1, color="gray", linestyle=":", label="no change predicted")
axes[2].legend()
figure.savefig(FOLDER / "collapse_curves.png")
plt.show()

# %% [markdown]
# ## The same scale for both
# Two principal components of the embeddings of the same held-out windows, colored by the angle of the upper arm. Both
# panels have the same axes.

# %%
clips = data.observe(data.trajectories("val"))
windows, angles = clips.observations[:, :1], clips.states[:, 0, 0]


def two_components(model: PendulumJEPA) -> torch.Tensor:
    """The two principal components of the windows' embeddings: (N, 2)."""
    embeddings = model.encode(windows)[:, 0]
    centered = embeddings - embeddings.mean(dim=0)
    return centered @ torch.linalg.svd(centered, full_matrices=False).Vh[:2].T


def in_full(number: float) -> str:
    """Two digits that count, and all zeros in front of them."""
    return np.format_float_positional(number, precision=2, fractional=False, trim="-")


points = {"with VICReg": two_components(healthy), "without a regularizer": two_components(broken)}
losses = {"with VICReg": healthy_rows[-1]["loss"], "without a regularizer": broken_rows[-1]["loss"]}
limit = 1.08 * max(float(drawn.abs().max()) for drawn in points.values())
degrees = torch.atan2(angles.sin(), angles.cos()).rad2deg()
figure, axes = plt.subplots(1, 2, figsize=(10, 5), dpi=100, layout="constrained", sharex=True, sharey=True)
for axis, (name, drawn) in zip(axes, points.items(), strict=True):
    dots = axis.scatter(*drawn.T, c=degrees, cmap="hsv", vmin=-180, vmax=180, s=14)
    axis.set_title(f"{name}\nprediction loss {in_full(losses[name])}", fontsize=14)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="first principal component")
axes[0].set_ylabel("second principal component")
if not FAST:
    text = f"all {len(angles)} images\nare in this dot"
    arrow = {"arrowstyle": "->", "shrinkB": 6}
    axes[1].annotate(text, (0, 0), (0.3 * limit, 0.45 * limit), arrowprops=arrow, fontsize=12)
figure.colorbar(dots, ax=axes, label="angle of the upper arm (degrees)", ticks=[-180, -90, 0, 90, 180], shrink=0.85)
figure.savefig(FOLDER / "collapse.png")
plt.show()

# %% [markdown]
# ## What the alarm says
# `CollapseAlarm` is attached to every training here. It reads the statistics at each validation, and speaks when one of them
# is proof of a bad representation.

# %%
for name, model, rows, alarm in (
    ("with VICReg", healthy, healthy_rows, healthy_alarm),
    ("without", broken, broken_rows, broken_alarm),
):
    print(f"{name}: {len(alarm.alarms)} alarms")
    if alarm.alarms:
        print(f"  {alarm.alarms[-1]}")
        for sentence in alarm.advice({f"val/{key}": value for key, value in rows[-1].items()}, model):
            print(f"  What to try: {sentence}.")

# %% [markdown]
# ## Questions
# 1. The loss of the run with the regularizer *rises* at first. Is it getting worse?
# 2. Why does the persistence ratio notice what the loss does not?
# 3. RankMe hardly tells the two runs apart, and a linear map reads the arms even from the dot. Is that run fine after all?
# 4. The target encoder follows slowly and gets no gradient; in other settings that alone prevents a collapse. What happens
#    here with a slower target: `PendulumJEPA(..., momentum=0.999, final_momentum=1.0)` without a regularizer? Try it.
# 5. You would like to choose the best of ten checkpoints without labels. Which number do you take?
#
# <details><summary>Answers</summary>
#
# 1. No. At the start all embeddings are close to each other, so that every prediction is nearly right. As the regularizer
#    spreads them, the same relative error is a larger absolute one. Losses can be compared between runs only if the targets
#    are the same, and here each run makes its own.
# 2. It is a ratio of two errors in the same space: both shrink with the embeddings. A predictor that is only as good as
#    predicting no change has a ratio of 1, however small its loss; in a collapsed run the ratio can even be far above 1.
# 3. Both standardize, and so look at the dot through a magnifying glass: RankMe asks how many directions are used, not how
#    far, and the linear map may multiply by any number. What the encoder learned in its first steps is still there, very
#    small. But whoever uses the embeddings as they are, as the predictor does, gets nothing: its forecasts are worse than
#    predicting no change. So look at the scale, at the directions and at the forecast; each alone can look well.
# 4. Compare the standard deviation: a slower target delays the shrinking, and whether that suffices depends on the data and
#    on the length of the training. It is no guarantee, which is why the regularizer is on by default here.
# 5. Not the loss. Take one that shrinking and flattening both make worse: `val/guarded_error`, the share of the embedding
#    space that is not both used and predicted. With a few labels, take the accuracy of a probe.
#
# </details>
