"""Encoders of windows, by name."""

import pytest
import torch
from conftest import small_driven_model
from test_modes import awake, batch

from jepa_lightning.networks.decoders import LatentDecoder
from jepa_lightning.optim import parameter_groups


@pytest.mark.parametrize(
    ("encoder", "widths", "observation"),
    [
        ("cnn", (4, 8), "pixels"),
        ("mlp", (16,), "pixels"),
        ("vit", (32, 32), "pixels"),
        ("mlp", (16,), "coordinates"),
    ],
)
def test_every_encoder_reads_windows(encoder: str, widths: tuple[int, ...], observation: str) -> None:
    model = awake(encoder=encoder, encoder_widths=widths, observation=observation, image_size=32)
    pairs = model.target_pairs(batch(observation=observation, image_size=32))
    assert pairs.features.shape == (3, 3, 8)
    model.prediction_loss(pairs).backward()
    learned = [p for p in model.context_encoder.parameters() if p.requires_grad]
    assert learned and all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)


def test_dropout_acts_in_training_alone() -> None:
    model = awake(predictor_dropout=0.5).train()
    features, actions = torch.randn(4, 8), torch.randn(4, 2)
    assert not torch.equal(model.predictor(features, actions), model.predictor(features, actions))
    model.eval()
    assert torch.equal(model.predictor(features, actions), model.predictor(features, actions))


def test_position_tables_have_no_weight_decay() -> None:
    model = small_driven_model(encoder="vit", encoder_widths=(32,), observation="pixels", image_size=32)
    decay, free = parameter_groups(model.trained_networks(), 0.1)
    held = {id(p) for group in (decay, free) for p in group["params"]}
    positions = model.context_encoder.pos_embed
    assert id(positions) not in held and not positions.requires_grad
    decoder = LatentDecoder(8, (16, 16), 1, width=32, depth=2)
    assert id(decoder.query_token) in {id(p) for p in parameter_groups([decoder], 0.1)[1]["params"]}
    assert not torch.equal(decoder.layers[0].linear1.weight, decoder.layers[1].linear1.weight)
