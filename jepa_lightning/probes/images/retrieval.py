"""Retrieval: which of the other held-out images are nearest to one, and are they of its class?

Shapes: I images, Q queries, D embedding dimension, h w pixels.
"""

import matplotlib.patches
import torch
from matplotlib.figure import Figure
from torch import Tensor

from jepa_lightning.classifiers import QUERY_ROWS, directions

QUERIES, NEIGHBORS = 6, 8
"""Rows of the gallery, and images in a row next to the query."""


def similarities(embeddings: Tensor, queries: slice) -> Tensor:
    """Cosine similarity, measured from the mean, of some images to all, (I, D) -> (Q, I); to itself minus infinity."""
    unit = directions(embeddings, embeddings.mean(dim=0))
    found = unit[queries] @ unit.T
    itself = torch.arange(len(found), device=found.device)
    found[itself, itself + queries.start] = -torch.inf
    return found


def average_precisions(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Average precision of ranking all other images by their similarity to each, those of its class being relevant.

    Args:
        embeddings: Of all images, (I, D).
        labels: Their classes, (I,).

    Returns:
        (Q,), of those images whose class has another one.
    """
    found = []
    for start in range(0, len(labels), QUERY_ROWS):
        similar = similarities(embeddings, slice(start, start + QUERY_ROWS))
        order = similar.argsort(dim=1, descending=True)[:, :-1]  # the last one is the query itself
        # Not by torchmetrics, which counts an image whose similarity is negative as not relevant.
        relevant = labels[order] == labels[start : start + len(order), None]  # (Q, I - 1)
        precision = relevant.cumsum(dim=1) / torch.arange(1, order.shape[1] + 1, device=order.device)
        sums = relevant.sum(dim=1)
        found.append(((precision * relevant).sum(dim=1) / sums)[sums > 0])
    return torch.cat(found)


def gallery(images: Tensor, embeddings: Tensor, labels: Tensor) -> Figure:
    """Some images, each with those nearest to it; framed in green where the class is the same, in red where not.

    Args:
        images: (I, C, h, w) in [0, 1]; of other than three channels the first is shown.
        embeddings: (I, D).
        labels: (I,); -1 without classes, and then nothing is framed.
    """
    rows, columns = min(QUERIES, len(images)), min(NEIGHBORS, len(images) - 1)
    nearest = similarities(embeddings, slice(0, rows)).topk(columns, dim=1).indices
    figure = Figure(figsize=(1 + columns, 0.3 + rows), dpi=100, layout="constrained")
    axes = figure.subplots(rows, 1 + columns, squeeze=False)
    for row in range(rows):
        for column, place in enumerate([row, *nearest[row].tolist()]):
            axis, image = axes[row, column], images[place]
            shown = image.permute(1, 2, 0) if len(image) == 3 else image[0]
            axis.imshow(shown.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
            if row == 0:
                axis.set_title("query" if column == 0 else str(column), fontsize="small")
            if column and labels[row] >= 0:
                color = "green" if labels[place] == labels[row] else "red"
                frame = matplotlib.patches.Rectangle(
                    (0, 0), 1, 1, transform=axis.transAxes, fill=False, edgecolor=color, linewidth=3
                )
                axis.add_patch(frame)
    return figure
