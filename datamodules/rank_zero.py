"""What one process finds out for all."""

from collections.abc import Callable
from typing import Any


def from_rank_zero(trainer: Any, make: Callable[[], Any]) -> Any:
    """What rank 0 makes, in all processes; an error there is raised in all of them, so that none waits for it.

    Args:
        trainer: Of the run; without one, this process makes it for itself.
        make: Makes what pickle can send.
    """
    if trainer is None:
        return make()
    made, error = None, None
    if trainer.is_global_zero:
        try:
            made = make()
        except Exception as caught:
            error = caught
    made, error = trainer.strategy.broadcast((made, error))
    if error is not None:
        raise error
    return made
