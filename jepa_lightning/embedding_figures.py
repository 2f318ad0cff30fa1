"""What embeddings look like: their principal components."""

import numpy as np
import torch
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from torch import Tensor

from jepa_lightning.figures import show, wants_figures


def components_figure(embeddings: Tensor, angles: Tensor) -> Figure:
    """The first two principal components of embeddings (..., D), colored by angles (...) in radians.

    Of an encoder that knows the angle they are a curve in the order of the angle; of a collapsed one, a dot.
    """
    points = embeddings.detach().double().flatten(0, -2).cpu().numpy()  # double: not what autocast would make of it
    centered = points - points.mean(axis=0)
    first, second = (centered @ np.linalg.svd(centered, full_matrices=False).Vh[:2].T).T
    figure = Figure(figsize=(5, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    wrapped = torch.remainder(angles.detach().float().cpu().flatten() + torch.pi, 2 * torch.pi) - torch.pi
    drawn = axes.scatter(first, second, c=wrapped.numpy(), cmap="twilight", vmin=-torch.pi, vmax=torch.pi, s=4)
    reach = max(1.0, abs(first).max(), abs(second).max())  # so that what has collapsed looks collapsed
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xlabel="first principal component", ylabel="second")
    figure.colorbar(drawn, label="angle (rad)")
    return figure


def show_components(trainer: Trainer, embeddings: Tensor, angles: Tensor) -> None:
    """Show `components_figure` under "embeddings by angle", if there is a logger and the embeddings are finite."""
    if trainer.loggers and wants_figures(trainer) and not trainer.sanity_checking and bool(embeddings.isfinite().all()):
        show(trainer, "embeddings by angle", components_figure(embeddings, angles), trainer.global_step)
