"""What one process knows and all act on in the same step; with real processes in test_ddp.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from callbacks.agreement import Agreement


def test_a_process_on_its_own_agrees_with_itself_at_once() -> None:
    agree = Agreement(SimpleNamespace(world_size=1))
    assert agree.alone and [agree(number) for number in (0, 3, 0)] == [0, 3, 0]


class Work:
    """An exchange that takes its time: the other process' number is there once it has been waited for."""

    def __init__(self, mine: torch.Tensor, other: int) -> None:
        self.mine, self.other = mine, other

    def wait(self) -> None:
        self.mine.clamp_(min=self.other)


def test_several_get_the_maximum_one_call_later(monkeypatch: pytest.MonkeyPatch) -> None:
    others, given, groups = iter([0, 15, 2, 0]), [], []

    def new_group(backend: str) -> str:
        groups.append(backend)
        return "the group"

    def all_reduce(tensor: torch.Tensor, operation: Any, group: Any, async_op: bool) -> Work:
        assert operation == distributed.ReduceOp.MAX and group == "the group" and async_op, "and nobody waits here"
        given.append(int(tensor))
        return Work(tensor, next(others))

    monkeypatch.setattr(distributed, "new_group", new_group)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    agree = Agreement(SimpleNamespace(world_size=2))
    assert groups == ["gloo"] and not agree.alone
    assert [agree(number) for number in (1, 0, 9, 0)] == [0, 1, 15, 9]
    assert given == [1, 0, 9, 0]
