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
# # 1. Learn: angles out of pixels, without labels
#
# A joint-embedding predictive architecture (JEPA) is trained to predict, and not in pixels: it encodes what it sees now,
# and predicts the *embedding* of what comes later. Nobody says what an embedding should contain. Here you train one for a
# few minutes on images of a swinging double pendulum, and watch its embeddings arrange themselves by something that it was
# never shown as a number: the angle of the upper arm.
#
# **Set-up.** In the folder of the repository, once: `python -m pip install -e .` (Windows: `py -m pip install -e .`). On
# Colab: clone the repository in a first cell, install it in the same way, and restart the session. Everything runs on the
# processor: the networks are so small that `accelerator="cpu"` is the right choice on a Mac, too.

# %%
import logging
import os
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import torch

from jepa_lightning import DoublePendulum, PendulumJEPA

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore")  # of Lightning, about logs and workers that are not needed here

FAST = os.environ.get("LAB_FAST") == "1"  # the repository's tests run this file in seconds, and learn nothing
EPOCHS, SIZE, VAL_SIZE = (1, 128, 64) if FAST else (8, 10_000, 1_000)
FOLDER = Path("runs/lab")  # figures are written there, too
FOLDER.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The data
# Trajectories are simulated and drawn on the fly. One observation, a *window*, is two consecutive images: one image shows
# where the arms are, two show how fast they turn. The angles are kept for us, to look behind the scenes; the model gets
# the images alone.

# %%
data = DoublePendulum(size=SIZE, val_size=VAL_SIZE, clip_length=10)
clips = data.observe(data.trajectories("val"))  # never trained on
windows, angles = clips.observations[:, :1], clips.states[:, 0, 0]  # the first window of each, the angle of its upper arm
print("windows:", tuple(windows.shape), "(trajectories, 1, 2 images, height, width)")

figure, axes = plt.subplots(1, 8, figsize=(12, 1.9), layout="constrained")
for time_step, axis in enumerate(axes):
    axis.imshow(clips.observations[0, 3 * time_step, -1], cmap="gray")
    axis.set(xticks=[], yticks=[], title=f"frame {1 + 3 * time_step}")
figure.savefig(FOLDER / "frames.png")
plt.show()


# %% [markdown]
# ## Two ways to look at embeddings
# An embedding has 64 numbers, so we draw its two principal components, the two directions in which embeddings vary most,
# and color each point by the angle. And because eyes are easily pleased, a number: take each point and the one nearest to
# it in the drawing; how far are their angles apart? If the drawing knew nothing of the angle, the median would be 90
# degrees.


# %%
def two_components(embeddings: torch.Tensor) -> torch.Tensor:
    """The two principal components of embeddings: (N, 64) -> (N, 2)."""
    centered = embeddings - embeddings.mean(dim=0)
    return centered @ torch.linalg.svd(centered, full_matrices=False).Vh[:2].T


def angle_gap(points: torch.Tensor) -> float:
    """The median difference in angle between each point and the one nearest to it, in degrees."""
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    gap = angles - angles[distance.argmin(dim=1)]
    return torch.atan2(gap.sin(), gap.cos()).abs().median().rad2deg().item()


def draw(axis: plt.Axes, points: torch.Tensor, title: str) -> None:
    """Draw points (N, 2), colored by the angle."""
    degrees = torch.atan2(angles.sin(), angles.cos()).rad2deg()
    axis.scatter(*points.T, c=degrees, cmap="hsv", vmin=-180, vmax=180, s=5)
    axis.set(title=title, xticks=[], yticks=[])
    axis.axis("equal")


# %% [markdown]
# ## The model, and a callback that watches
# `PendulumJEPA` holds an encoder (three convolutions), a predictor (a small network that maps an embedding to the one a
# frame later, and is applied again and again) and a target encoder, which follows the encoder slowly and provides what is
# to be predicted. A regularizer keeps embeddings apart; why, is the subject of notebook 2. The callback encodes the same
# windows at some steps of the training.


# %%
class Watch(pl.Callback):
    """Keep two principal components of the same windows at some optimizer steps."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        super().__init__()
        self.steps, self.seen, self.began = steps, {}, time.monotonic()

    def look(self, step: int, model: PendulumJEPA) -> None:
        """Encode, keep, and print a line."""
        self.seen[step] = two_components(model.encode(windows)[:, 0])
        seconds = time.monotonic() - self.began
        print(f"step {step:5d}, {seconds:4.0f} s: nearest point {angle_gap(self.seen[step]):3.0f} degrees away", flush=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(0, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        last = trainer.global_step == trainer.estimated_stepping_batches
        if trainer.global_step in self.steps or last:
            self.look(trainer.global_step, pl_module)


pl.seed_everything(0, verbose=False)
model = PendulumJEPA(horizon=6, final_momentum=0.998)
watch = Watch(steps=(25, 50, 100, 200, 400, 800))
trainer = pl.Trainer(
    accelerator="cpu",
    max_epochs=EPOCHS,
    gradient_clip_val=5.0,
    callbacks=[watch],
    check_val_every_n_epoch=EPOCHS,
    num_sanity_val_steps=0,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)

# %% [markdown]
# ## Train
# First the random encoder is evaluated, as the baseline; then training starts. A line is printed at each look; there is
# time for question 1.

# %%
before = trainer.validate(model, data, verbose=False)[0]
trainer.fit(model, data)
after = {name: float(value) for name, value in trainer.callback_metrics.items()}

# %%
steps = sorted(watch.seen)
figure, axes = plt.subplots(1, len(steps), figsize=(2.2 * len(steps), 2.5), layout="constrained", squeeze=False)
for step, axis in zip(steps, axes[0], strict=True):
    draw(axis, watch.seen[step], "random encoder" if step == 0 else f"step {step}")
figure.savefig(FOLDER / "learn_steps.png")
plt.show()

# %% [markdown]
# The scale of each panel is its own. From a cloud, in which colors overlap, the embeddings open into a ring in the order of
# the colors. Later the ring loses its shape in this drawing, which shows less of the angle again: other directions of the
# 64 are in use now, for what else there is to know, the lower arm and the velocities. The table below looks at all of them.

# %%
clearest = min(steps, key=lambda step: angle_gap(watch.seen[step]))
figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
for step, axis in zip((0, clearest, steps[-1]), axes, strict=True):
    name = "random encoder" if step == 0 else f"JEPA after {step} steps"
    draw(axis, watch.seen[step], f"{name}\nnearest point {angle_gap(watch.seen[step]):.0f} degrees away")
bar = figure.colorbar(axes[1].collections[0], ax=axes, label="angle of the upper arm (degrees)")
bar.set_ticks([-180, -90, 0, 90, 180])
figure.savefig(FOLDER / "learn.png")
plt.show()

# %% [markdown]
# ## Can a linear map read the state?
# The figures below are R2 of a linear map from the 64 numbers of an embedding to the state, fitted on every other
# trajectory and evaluated on the rest: 1 is perfect, 0 is no better than the mean.

# %%
print(f"{'R2 of a linear map':20s} {'random encoder':>15s} {'JEPA':>6s}")
for name in ("sin_theta1", "cos_theta1", "sin_theta2", "cos_theta2", "omega1", "omega2"):
    print(f"{name:20s} {before[f'val/linear_r2_{name}']:15.2f} {after[f'val/linear_r2_{name}']:6.2f}")
print(f"forecast 6 frames ahead: error {after['val/persistence_ratio']:.2f} times that of predicting no change")

# %% [markdown]
# ## Questions
# 1. Nobody gave the model an angle. Why is it in the embeddings at all?
# 2. Why is the early drawing a closed ring and not a line?
# 3. The angle of the upper arm comes first, the lower arm later, the velocities last (compare the table after one epoch
#    and after all of them: change `EPOCHS`). Why in this order?
# 4. A random encoder does better than nothing in the table. Where does it get that from, and what follows for claims about
#    what a network "has learned"?
# 5. Two principal components show two of 64 directions. Name something that the drawing cannot show.
#
# <details><summary>Answers</summary>
#
# 1. To predict the embedding of later images one must know where the arms are and how they move; the state is the one
#    thing from which the later images follow. The regularizer asks that embeddings differ from each other, the prediction
#    that they differ in what can be predicted: together, that is the state.
# 2. Because angles are a ring: 180 and -180 degrees are the same image. An encoder that maps similar images to similar
#    embeddings keeps the two ends together.
# 3. The upper arm moves the most pixels in the same way in all images, since it hangs on a fixed pivot. The lower arm hangs
#    on a moving point, and velocities are small differences between two images.
# 4. Convolutions with random weights still map similar images to similar outputs, and 64 random measurements of an image
#    tell much about a single rod. So a probe's result means little until a random encoder with the same probe stands next
#    to it.
# 5. Everything in the other 62 directions, for example the lower arm and the velocities. A fold in the drawing need not be
#    one in 64 dimensions, and points that coincide in the drawing may be far apart.
#
# </details>
