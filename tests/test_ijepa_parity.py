"""The same weights and masks as the released I-JEPA code give the same numbers.

The numbers were recorded by running facebookresearch/ijepa at 52c1ae9 in float32 on a CPU: its encoder (24-pixel images,
4-pixel patches, width 192, depth 2, 3 heads), its predictor (width 48, depth 2), its loss, one step of AdamW (1e-3, weight
decay 0.04 but for biases and vectors), its momentum update at 0.996, and its schedules. Weights and images are the
formulas below.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import small_ijepa
from torch import nn
from torch.nn import functional as F

from callbacks.ema import update_average
from datamodules import ImageBatch
from jepa_lightning import IJEPA
from jepa_lightning.losses import smooth_l1
from jepa_lightning.masks import Masks
from jepa_lightning.networks.vit import take
from jepa_lightning.optim import parameter_groups

CONTEXT = torch.tensor([[0, 1, 2, 6, 7, 8, 30], [3, 4, 5, 9, 10, 11, 35]])
TARGETS = torch.tensor([[[14, 15, 20, 21], [26, 27, 32, 33]], [[12, 13, 18, 19], [24, 25, 30, 31]]])

# fmt: off
RECORDED_CONTEXT = [
    -0.769737, -1.506376, 0.066102, 0.841384, 0.515945, -0.429929, 0.228914, -0.133825, -0.710804, -0.537869,
    1.230855, 1.354061, 0.267934, -0.030942, 1.077511, 0.576435, -0.915188, -1.326634, 0.615539, 1.29146, -1.776569,
    -0.92308, 1.054685, 1.429275,
]
RECORDED_TARGET_FEATURES = [
    -0.770459, -1.505593, 0.064286, 0.84382, -0.589285, -0.411354, 1.237393, 1.236669, 0.538304, -0.227216, 0.471483,
    -0.006915, 0.296965, -0.882077, -0.155193, -0.120923, -0.965606, -1.441982, 0.352226, 1.122207, -0.265833,
    -0.142715, 1.276216, 1.016389,
]
RECORDED_PREDICTIONS = [
    0.242912, 0.086102, -0.139462, 0.227807, 0.086067, -0.124382, 0.170095, 0.049984, -0.092598, 0.082, 0.060197,
    0.002836, 0.463842, 0.073059, -0.369764, 0.343225, 0.056431, -0.261095, 0.378822, 0.037907, -0.310002, 0.18328,
    0.028586, -0.121157,
]
RECORDED_TARGETS = [
    1.074018, -0.718499, -1.477326, 0.646209, -0.127231, -1.335618, -0.112486, -0.706729, -0.277476, -0.508567,
    -0.987823, -0.789375, -0.964241, -0.794362, -0.366712, 0.212313, -1.053849, -0.918764, -0.264102, 0.555487,
    -0.035988, 0.035623, 0.173373, 0.141289,
]
RECORDED_LOSS, RECORDED_GRADIENT_NORM = 0.4504404366016388, 0.30896005034446716
STEPPED_ATTENTION = [
    -0.023885, -0.0309, -0.037042, -0.034615, -0.040164, -0.044581, -0.042898, -0.046589, -0.048969, -0.048149,
    -0.049724, -0.049898, -0.049336, -0.049599, -0.047872, -0.049084, -0.045172, -0.040684,
]
STEPPED_PATCHES = [-0.040481, -0.012214, 0.013414, 0.040518, 0.048946, 0.040363]
STEPPED_PROJECTION = [
    -0.045837, -0.024735, 0.039346, -0.014292, -0.050246, 0.000824, 0.026886, -0.036296, -0.037085, 0.048851,
    0.004024, -0.048024,
]
RECORDED_AVERAGE = [-0.017436, -0.025027, -0.031922, -0.045757, -0.04849, -0.049844, -0.04634, -0.042538, -0.037546]
# Optimizer step -> learning rate, weight decay, momentum: 1500 steps, 200 of them warm-up from 2e-4 to 1e-3, final 1e-6,
# weight decay 0.04 to 0.4, momentum from 0.996.
RECORDED_SCHEDULES = {
    0: (0.000204, 0.04000039478403167, 0.996),
    1: (0.000208, 0.040001579134395227, 0.9960026666666667),
    99: (0.0006, 0.04393343186791493, 0.996264),
    198: (0.000996, 0.055408842287612003, 0.996528),
    199: (0.001, 0.05556181762433182, 0.9965306666666667),
    200: (0.0009999985414600595, 0.05571551426736948, 0.9965333333333334),
    849: (0.0005005, 0.25742410434719665, 0.998264),
    1498: (1.0014585399405601e-06, 0.3999996052159683, 0.9999946666666667),
    1499: (1e-06, 0.4, 0.9999973333333333),
}
# fmt: on


def wave(name: str, shape: torch.Size) -> torch.Tensor:
    """Weights of a parameter as a function of its name."""
    phase = sum(ord(letter) * place for place, letter in enumerate(name, start=1))
    values = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + phase) * 0.05
    if "norm" in name and name.endswith("weight"):
        values = values + 1
    return values.reshape(shape).float()


@pytest.fixture
def jepa() -> IJEPA:
    jepa = IJEPA("vit_tiny_patch16_224", 24, 4, encoder_depth=2, predictor_width=48, predictor_depth=2)
    with torch.no_grad():
        for network in (jepa.context_encoder.vit, jepa.target_encoder.vit, jepa.predictor):
            for name, parameter in network.named_parameters():
                parameter.copy_(wave(name, parameter.shape))
    return jepa


def images() -> torch.Tensor:
    return torch.sin(torch.arange(2 * 3 * 24 * 24, dtype=torch.float64) * 0.37).reshape(2, 3, 24, 24).float()


def agree(values: torch.Tensor, recorded: list[float]) -> None:
    torch.testing.assert_close(values.detach().flatten(), torch.tensor(recorded), rtol=0, atol=1e-5)


def test_features_predictions_targets_and_loss(jepa: IJEPA) -> None:
    features = jepa.context_encoder(images(), CONTEXT)
    agree(features[:, ::3, ::60], RECORDED_CONTEXT)
    target_features = jepa.encode(images())
    agree(target_features[:, ::12, ::60], RECORDED_TARGET_FEATURES)
    predictions = jepa.predictor(features, CONTEXT, TARGETS)
    agree(predictions[:, :, ::3, ::80], RECORDED_PREDICTIONS)
    targets = take(F.layer_norm(target_features, (192,)), TARGETS.flatten(1)).unflatten(1, (2, 4))
    agree(targets[:, :, ::3, ::80], RECORDED_TARGETS)
    assert smooth_l1(predictions, targets).item() == pytest.approx(RECORDED_LOSS, abs=1e-6)


def test_one_step_of_training_gives_the_same_weights_and_average(jepa: IJEPA) -> None:
    # The pairs as the module itself makes them, on the recorded masks.
    jepa.masks.draw = lambda *_: Masks(CONTEXT, TARGETS)
    labels = torch.full((len(images()),), -1)
    pairs = jepa.target_pairs(ImageBatch(images(), labels, (0, 0, 0)))
    optimizer = torch.optim.AdamW(parameter_groups([jepa.context_encoder, jepa.predictor], 0.04), lr=1e-3)
    jepa.prediction_loss(pairs).backward()
    trained = [p for network in (jepa.context_encoder, jepa.predictor) for p in network.parameters()]
    norm = nn.utils.get_total_norm([p.grad for p in trained])
    assert norm.item() == pytest.approx(RECORDED_GRADIENT_NORM, rel=1e-5)
    optimizer.step()
    vit = jepa.context_encoder.vit
    agree(vit.blocks[1].attn.qkv.weight[::100, ::90], STEPPED_ATTENTION)
    agree(vit.patch_embed.proj.weight[::80, 1, ::2, 2], STEPPED_PATCHES)
    agree(jepa.predictor.project.weight[::60, ::20], STEPPED_PROJECTION)
    update_average(jepa.target_encoder, jepa.context_encoder, 0.996)
    agree(jepa.target_encoder.vit.blocks[1].mlp.fc1.weight[::300, ::90], RECORDED_AVERAGE)


def test_schedules_agree_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    jepa = small_ijepa(
        **{"start_learning_rate": 2e-4, "learning_rate": 1e-3, "final_learning_rate": 1e-6, "warmup_fraction": 200 / 1500},
        **{"weight_decay": 0.04, "final_weight_decay": 0.4, "momentum": 0.996, "momentum_schedule": "linear"},
        official_compat=True,
        image_size=32,
    )
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    run = SimpleNamespace(
        estimated_stepping_batches=1500, global_step=0, strategy=strategy, precision_plugin=None, gradient_clip_val=None
    )
    jepa._trainer = run
    configured = jepa.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    run.optimizers = [optimizer]
    jepa._weight_decay_schedule.on_train_start(run, jepa)
    for step in range(1500):
        jepa._weight_decay_schedule.steps = step
        jepa._weight_decay_schedule.on_train_batch_start(run, jepa, None, step)
        if step in RECORDED_SCHEDULES:
            decay, no_decay = optimizer.param_groups
            found = (decay["lr"], decay["weight_decay"], jepa._ema.momentum(step, 1500))
            assert found == pytest.approx(RECORDED_SCHEDULES[step], rel=1e-9)
            assert no_decay["weight_decay"] == 0 and no_decay["lr"] == decay["lr"]
        optimizer.step()
        schedule.step()
