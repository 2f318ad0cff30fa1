"""Metrics whose sums stay as wide as they were declared, whatever the networks are rounded to."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric


class WideMetric(Metric):
    """A metric whose states follow its module to a device, but not to a narrower dtype.

    `precision: bf16-true` converts a whole module, and a sum of ones in bfloat16 never exceeds 256. torchmetrics guards
    its states against `half()`, but not against `to(dtype)`, which Lightning calls.
    """

    def reset(self) -> None:
        """Start anew, with states that may be changed later: Lightning validates in inference mode, and trains after it."""
        with torch.inference_mode(False):
            super().reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)


class WideMean(WideMetric, MeanMetric):
    """A mean of numbers, in float32 or wider."""
