"""Parameter groups, and the learning rate of every optimizer step."""

import math

import pytest
import torch
from torch import nn

from jepa_lightning.networks.masked_predictor import MaskedPredictor
from jepa_lightning.optim import parameter_groups, warmup_cosine_schedule


class Everything(nn.Module):
    """A parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(()))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_matrices_and_kernels_decay_and_biases_norms_scalars_and_tokens_do_not() -> None:
    model, second = Everything(), nn.Linear(2, 2)
    decay, no_decay = parameter_groups([model, second], 0.3)
    assert (decay["name"], decay["weight_decay"]) == ("decay", 0.3)
    assert (no_decay["name"], no_decay["weight_decay"]) == ("no_decay", 0.0)

    def same(found: list, expected: list) -> bool:
        return [id(parameter) for parameter in found] == [id(parameter) for parameter in expected]

    names = dict(model.named_parameters())
    assert same(decay["params"], [model.linear.weight, model.conv.weight, second.weight])
    free = [name for name in names if name.endswith(("bias", "scale", "norm.weight", "mask_token")) and "frozen" not in name]
    assert same(sorted(no_decay["params"], key=id), sorted([*(names[name] for name in free), second.bias], key=id))


def test_no_bias_norm_or_token_of_a_real_predictor_decays() -> None:
    predictor = MaskedPredictor((4, 4), 24, width=24, depth=1, num_heads=2)
    decay, _ = parameter_groups([predictor], 0.1)
    decaying = {id(parameter) for parameter in decay["params"]}
    for name, parameter in predictor.named_parameters():
        if name.endswith("bias") or "norm" in name or "token" in name:
            assert id(parameter) not in decaying, name
        elif parameter.requires_grad:
            assert id(parameter) in decaying, name


def rates(steps: int, **settings) -> list[float]:
    """The learning rate of each optimizer step, with a peak of 2."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine_schedule(optimizer, **settings)
    assert schedule["interval"] == "step", "Lightning's default moves it once per epoch"
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule["scheduler"].step()
    return found


def cosine(part: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * part))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # The peak comes at step warmup_fraction * total, and one step after the last the rate would be `end`.
        ({"warmup_fraction": 0.5, "start": 0.0}, [0, 0.5, 1, 1.5, 2, 2 * cosine(1 / 4), 1, 2 * cosine(3 / 4)]),
        ({"warmup_fraction": 0.25}, [0.02, 1.01, *(2 * cosine(k / 6) for k in range(6))]),
        ({"warmup_fraction": 0.24}, [0.02, *(2 * cosine(k / 7) for k in range(7))]),  # a fraction of a step is none
        ({"warmup_fraction": 0.0, "end": 0.5}, [2 * (0.5 + 0.5 * cosine(k / 8)) for k in range(8)]),
        ({"warmup_fraction": 0.0, "offset": 1}, [2 * cosine(k / 8) for k in range(1, 9)]),
    ],
)
def test_learning_rate_of_each_step(settings: dict, expected: list[float]) -> None:
    assert rates(8, total_steps=8, **settings) == pytest.approx(expected, abs=1e-12)
