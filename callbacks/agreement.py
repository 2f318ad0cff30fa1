"""What one process knows and all of them must act on in the same step."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import distributed


class Agreement:
    """The maximum of the processes' numbers, known to all of them one call later.

    Each call starts an exchange over the network that the next call reads, so no process waits for the slowest one, and no
    GPU takes part. A process on its own has its answer at once.

    Args:
        trainer: Trainer of the run. All processes make their agreements in the same order.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.alone = trainer.world_size == 1
        self._asked: tuple[torch.Tensor, Any] | None = None
        if not self.alone:
            self._group: Any = distributed.new_group(backend="gloo")  # on the CPU, also where the gradients are not

    def __call__(self, number: int) -> int:
        """Give one's own number, and get the maximum of those that were given in the call before; 0 in the first call."""
        if self.alone:
            return number
        answer = 0
        if self._asked is not None:
            maximum, exchange = self._asked
            exchange.wait()
            answer = int(maximum)
        mine = torch.tensor(number)
        work: Any = distributed.all_reduce(mine, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._asked = (mine, work)
        return answer
