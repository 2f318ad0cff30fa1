"""Intersection over union (IoU) of classes of pixels, image by image, so that errors over images are known.

Shapes: B batch, C classes, H W pixels, I images.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from datamodules.batches import VOID

RESAMPLES = 1000
"""Bootstrap samples of the images that standard errors are taken over."""


class ImageConfusions(Metric):
    """Confusion matrix of each image, so that errors over images are known: `compute` gives (I, C, C), rows the truth."""

    full_state_update = False
    matrices: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("matrices", [], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, masks: Tensor) -> None:
        """Add class indices of all pixels, predicted and true, (B, H, W) each; true ones may be `VOID`."""
        for found, truth in zip(predicted, masks, strict=True):
            matrix = multiclass_confusion_matrix(found, truth, self.num_classes, ignore_index=VOID)
            self.matrices.append(matrix[None])

    def compute(self) -> Tensor:
        """(I, C, C), int64."""
        matrices: Any = self.matrices  # a tensor after the processes have been put together
        return matrices if isinstance(matrices, Tensor) else torch.cat(matrices)


def intersection_over_union(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, (..., C, C) -> (..., C); NaN for a class neither there nor predicted."""
    confusion = confusion.double()
    both = confusion.diagonal(dim1=-2, dim2=-1)
    return both / (confusion.sum(dim=-1) + confusion.sum(dim=-2) - both)


def mean_iou(confusion: Tensor) -> Tensor:
    """Mean over the classes that are there or predicted: (..., C, C) -> (...)."""
    return intersection_over_union(confusion).nanmean(dim=-1)


def bootstrapped(confusions: Tensor) -> Tensor:
    """Mean IoU of `RESAMPLES` random draws of as many images, the same for all that are compared: (I, C, C) -> (R,)."""
    count = len(confusions)
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(RESAMPLES, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
    resampled = weights @ confusions.cpu().double().flatten(1)  # (R, C * C)
    return mean_iou(resampled.unflatten(1, confusions.shape[1:]))
