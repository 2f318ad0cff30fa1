"""What embeddings look like: their principal components."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from torch import Tensor

from jepa_lightning.figures import show, wants_figures


def components_figure(embeddings: Tensor, values: Tensor, angular: bool = True) -> Figure:
    """The first two principal components of embeddings (..., D), colored by a scalar of the state (...).

    Of an encoder that knows an angle they are a curve in the order of the angle; of a collapsed one, a dot.

    Args:
        embeddings: (..., D).
        values: (...).
        angular: Whether the values are angles in radians, which are wrapped.
    """
    points = embeddings.detach().double().flatten(0, -2).cpu().numpy()  # double: not what autocast would make of it
    centered = points - points.mean(axis=0)
    first, second = (centered @ np.linalg.svd(centered, full_matrices=False).Vh[:2].T).T
    figure = Figure(figsize=(5, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    colors = values.detach().float().cpu().flatten()
    settings: dict[str, Any] = {"cmap": "viridis"}
    if angular:
        colors = torch.remainder(colors + torch.pi, 2 * torch.pi) - torch.pi
        settings = {"cmap": "twilight", "vmin": -torch.pi, "vmax": torch.pi}
    drawn = axes.scatter(first, second, c=colors.numpy(), s=4, **settings)
    reach = max(1.0, abs(first).max(), abs(second).max())  # so that what has collapsed looks collapsed
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xlabel="first principal component", ylabel="second")
    figure.colorbar(drawn, label="angle (rad)" if angular else "first scalar of the state")
    return figure


def show_components(trainer: Trainer, embeddings: Tensor, values: Tensor, angular: bool = True) -> None:
    """Show `components_figure`, if there is a logger and the embeddings are finite."""
    if trainer.loggers and wants_figures(trainer) and not trainer.sanity_checking and bool(embeddings.isfinite().all()):
        name = "embeddings by angle" if angular else "embeddings by state"
        show(trainer, name, components_figure(embeddings, values, angular), trainer.global_step)
