"""What a validation on images watches: how well hidden patches are predicted, what pooled embeddings know, and figures.

Shapes: B batch, M target blocks, L patches of a block, D embedding dimension.
"""

from typing import Any

import torch
from torch import Tensor, nn

from jepa_lightning.classifiers import OnlineClassifiers
from jepa_lightning.figures import feature_colors, mark_blocks, nearest_images, rows_figure, show, to_colors
from jepa_lightning.masks import Masks
from jepa_lightning.metrics import ErrorOverMean, guarded_error
from jepa_lightning.wide import WideMean

SHOWN = 8
"""Images in a figure."""


class ImageMonitor(nn.Module):
    """Figures of a validation, from the predictions of its batches.

    Args:
        dim: Embedding dimension D.
        num_places: Number of patches of an image.
    """

    def __init__(self, dim: int, num_places: int) -> None:
        super().__init__()
        self.dim = dim
        self.error, self.mean_error = WideMean(), WideMean()
        self.over_places = ErrorOverMean(dim, num_places)
        self.classifiers = OnlineClassifiers()

    def update(self, predictions: Tensor, targets: Tensor, places: Tensor, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            predictions: Of the hidden patches, (B, M, L, D).
            targets: What they should be, (B, M, L, D).
            places: Indices of the hidden patches, (B, M, L).
            features: Pooled embeddings of the images, (B, D).
            labels: Their classes, (B,); -1 without, which are not classified.
        """
        self.error.update((predictions - targets).square().mean())
        # The baseline: one and the same answer, the mean feature, for every patch of every image.
        mean = targets.flatten(0, -2).mean(dim=0)
        self.mean_error.update((mean - targets).square().mean())
        # And a stronger one, which knows the place of each patch.
        self.over_places.update(predictions, targets, places)
        # Also where none is left: processes must agree on what there is to be gathered.
        self.classifiers.update(features[labels >= 0], labels[labels >= 0])

    def compute(self, rankme: Tensor, classify: bool) -> dict[str, Tensor]:
        """Scalars by name; the next validation starts anew.

        Args:
            rankme: RankMe of the target encoder's embeddings.
            classify: Whether to classify, where there are labels.
        """
        ratio = self.over_places.compute()
        found = {
            "normalized_error": self.error.compute() / self.mean_error.compute(),
            "position_normalized_error": ratio,
            "guarded_error": guarded_error(ratio, rankme, self.dim),
        }
        if classify and self.classifiers.update_called:
            found |= self.classifiers.compute()
        for metric in (self.error, self.mean_error, self.over_places, self.classifiers):
            metric.reset()
        return found


def show_images(jepa: Any, seen: Tensor, whole: Tensor, images: Tensor, masks: Masks, features: Tensor) -> None:
    """Figures: masks, principal components of the patch features, and nearest neighbors among the images.

    Args:
        jepa: An I-JEPA or IWM in training.
        seen: What the context encoder sees a subset of, (B, C, H, W).
        whole: What the target encoder sees, (B, C, H, W).
        images: As they are, (B, C, H, W).
        masks: Of these images.
        features: Their pooled embeddings, (B, D).
    """
    grid = jepa.target_encoder.grid
    visible = torch.zeros(len(seen), grid[0] * grid[1], dtype=torch.bool, device=seen.device)
    marked = [visible.scatter(1, indices, True)[:SHOWN] for indices in (masks.context, masks.targets.flatten(1))]
    shown = {
        "image": to_colors(whole[:SHOWN], jepa.pixels),
        "masks": mark_blocks(to_colors(seen[:SHOWN], jepa.pixels), marked[0], marked[1], grid),
        "features": feature_colors(jepa.encode(whole[:SHOWN]), grid, jepa.image_size),
    }
    show(jepa.trainer, "masks and features", rows_figure(shown), jepa.global_step)
    alike = rows_figure(nearest_images(to_colors(images, jepa.pixels), features, SHOWN))
    show(jepa.trainer, "nearest images", alike, jepa.global_step)
