"""What is chosen for the optimizer, and the learning rate as a function of the steps that it takes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision

from jepa_lightning.optim import StepSchedule, fused_is_safe, gradient_norm


@pytest.mark.parametrize(
    ("device", "plugin", "clip", "fused"),
    [
        ("cuda", Precision(), None, True),
        ("cuda", Precision(), 1.0, True),
        ("cuda", HalfPrecision("bf16-true"), 1.0, True),
        ("cuda", MixedPrecision("bf16-mixed", "cuda"), None, True),
        ("cuda", MixedPrecision("bf16-mixed", "cuda"), 1.0, False),  # Lightning would refuse to clip
        ("cuda", MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")), None, False),
        ("cpu", Precision(), None, False),
        ("mps", Precision(), None, False),
    ],
)
def test_adam_is_fused_where_nobody_must_see_the_gradients_before_it(
    device: str, plugin: Any, clip: float | None, fused: bool
) -> None:
    strategy = SimpleNamespace(root_device=torch.device(device))
    trainer: Any = SimpleNamespace(strategy=strategy, precision_plugin=plugin, gradient_clip_val=clip)
    assert fused_is_safe(trainer) == fused


def test_norm_is_that_of_all_gradients() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    parameters[0].grad, parameters[2].grad = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, 2.0])
    assert gradient_norm(parameters).item() == 3.0


def schedule(value: float = 1.0) -> tuple[torch.optim.SGD, StepSchedule]:
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.SGD([parameter], lr=value)
    return optimizer, StepSchedule(optimizer, lambda step: 0.5**step)


def test_learning_rate_stays_where_no_step_was_taken() -> None:
    optimizer, rates = schedule()
    found = []
    for taken in (True, True, False, False, True):
        if taken:
            optimizer.step()
        rates.step()
        found.append(optimizer.param_groups[0]["lr"])
    assert found == [0.5, 0.25, 0.25, 0.25, 0.125]


def test_learning_rate_saved_between_a_step_and_its_own_is_made_up_for() -> None:
    optimizer, rates = schedule()
    optimizer.step()
    rates.step()
    optimizer.step()
    between = rates.state_dict()
    optimizer.step()  # as loading a sharded optimizer does
    again, loaded = schedule()
    again.load_state_dict(optimizer.state_dict())
    loaded.load_state_dict(between)
    assert again.param_groups[0]["lr"] == 0.25
    loaded.load_state_dict({name: value for name, value in between.items() if name != "stepped"})
    assert loaded.last_epoch == 1, "an old state is complete"
