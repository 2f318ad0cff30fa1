"""Training stops at gradients that are not finite, before they reach weights or files."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class NonFiniteError(RuntimeError):
    """A gradient, or a weight that was about to be saved, is NaN or infinite."""


class FiniteGuard:
    """Look at the norm of all gradients before each optimizer step.

    On a CPU, and where the gradients are sharded, a norm that is not finite ends training at once. On a GPU to look at it
    would mean to wait for it: there the norm is handed to the fused optimizer, which leaves out this step and, since the
    finding stays, all that follow, and training ends when somebody asks (`raise_if_found`): where figures are logged, and
    before anything is saved. Either way the weights are those of the last good step.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None  # the first optimizer step with a gradient that is not finite; -1 before

    def check(self, norm: Tensor, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Look at the gradients of all trained parameters.

        Args:
            norm: Norm of the gradients of all trained parameters, a scalar; the same in all processes.
            optimizer: Optimizer that is about to step.
            step: Number of the optimizer step, counted from 0.

        Raises:
            NonFiniteError: A gradient is not finite, and could be looked at without a wait.
        """
        if not decides_on_gpu(optimizer):
            if not torch.isfinite(norm):
                raise NonFiniteError(message(step))
            return
        if self._first is None:
            self._first = torch.full_like(norm, -1.0)
        self._first = torch.where((self._first < 0) & ~torch.isfinite(norm), float(step), self._first)
        # The protocol between torch's GradScaler and its fused optimizers: 1 leaves out the step.
        optimizer.found_inf = (self._first >= 0).float()  # type: ignore[attr-defined]

    def raise_if_found(self) -> None:
        """Wait for the device and end training if a gradient was not finite.

        Raises:
            NonFiniteError: One was, and all steps since have been left out.
        """
        if self._first is not None and (step := int(self._first)) >= 0:
            raise NonFiniteError(message(step))


def decides_on_gpu(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's own kernel can leave out a step: fused, on a GPU, and of parameters that are not sharded."""
    group = optimizer.param_groups[0]
    first = group["params"][0]
    return bool(group.get("fused")) and first.device.type == "cuda" and not isinstance(first, DTensor)


def message(step: int) -> str:
    """What to do about it."""
    return (
        f"A gradient is not finite at optimizer step {step}; training stopped before the weights took part in it, and "
        "last.ckpt is good. Lower model.learning_rate, set trainer.gradient_clip_val, or train in a wider precision, then "
        "resume with --ckpt_path last."
    )


def check_weights(parameters: Iterable[Tensor], step: int) -> None:
    """Refuse weights that are not finite.

    Raises:
        NonFiniteError: They are not, so the file that would hold them is not written.
    """
    norm = torch.nn.utils.get_total_norm([parameter.detach() for parameter in parameters])
    if not torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm):
        raise NonFiniteError(f"A weight is not finite after optimizer step {step}: this checkpoint is not written.")
