"""Whether torch.compile works here, found out before a run depends on it."""

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor


def _trial(values: Tensor) -> Tensor:
    return values.sin() + 1


def compiles(device: torch.device) -> bool:
    """Whether a small function can be compiled; if not, a warning says why, and the run goes on without.

    On a CPU torch.compile needs a C++ compiler and the headers of Python, on a GPU Triton and a C compiler.
    """
    try:
        torch.compile(_trial)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, of its absence, of a header that is missing
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        rank_zero_warn(
            f"model.compile_networks=true is left out, since torch.compile does not work here ({first}): training goes on, "
            "a little more slowly. It needs a compiler such as g++, and the headers of Python."
        )
        return False
    return True
