"""The masked predictor, with a context that is repeated for each target block and with one that all blocks share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_ijepa
from test_ijepa import batch
from torch import Tensor

from jepa_lightning.masks import Masks, MultiBlock
from jepa_lightning.networks.masked_predictor import MaskedPredictor, PredictorContext, shared_context_mask


def predictor(context: PredictorContext, **changes: Any) -> MaskedPredictor:
    torch.manual_seed(0)
    made = MaskedPredictor((6, 6), 32, 48, 3, 4, context=context, **changes)
    with torch.no_grad():
        made.mask_token.normal_()  # large enough to matter
    return made


def drawn() -> tuple[Masks, Tensor]:
    masks = MultiBlock((6, 6)).draw(5, torch.Generator().manual_seed(1))
    return masks, torch.randn(5, masks.context.shape[1], 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("context", ["repeated", "shared"])
def test_each_block_is_predicted_as_if_it_were_alone(context: PredictorContext) -> None:
    network, (masks, features) = predictor(context), drawn()
    together = network(features, masks.context, masks.targets)
    assert together.shape == (*masks.targets.shape, 32)
    for number in range(masks.targets.shape[1]):
        alone = network(features, masks.context, masks.targets[:, number : number + 1])
        torch.testing.assert_close(together[:, number : number + 1], alone, rtol=1e-4, atol=1e-5)
    swapped = network(features, masks.context, masks.targets.flip(1))
    torch.testing.assert_close(swapped.flip(1), together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", ["repeated", "shared"])
def test_mask_tokens_attend_to_the_context_and_to_their_own_block(context: PredictorContext) -> None:
    network, (masks, features) = predictor(context), drawn()
    features.requires_grad_()
    network(features, masks.context, masks.targets)[1, 2, 0].sum().backward()
    assert features.grad is not None
    reached = features.grad.abs().sum(dim=2) > 0
    assert reached[1].all() and not reached[[0, 2, 3, 4]].any(), "all of its image's context, and no other image"
    positions = network.positions.clone().requires_grad_()
    network.positions = positions
    network(features.detach(), masks.context, masks.targets)[1, 2, 0].sum().backward()
    assert positions.grad is not None
    seen = set(torch.nonzero(positions.grad.abs().sum(dim=1)).flatten().tolist())
    assert seen == set(masks.context[1].tolist()) | set(masks.targets[1, 2].tolist())


def test_a_shared_context_does_not_see_what_is_predicted_and_a_repeated_one_does() -> None:
    (masks, features), found = drawn(), {}
    for context in ("repeated", "shared"):
        network, inside = predictor(context), []  # type: ignore[arg-type]
        network.blocks[-1].register_forward_hook(lambda _module, _inputs, tokens, inside=inside: inside.append(tokens))
        network(features, masks.context, masks.targets)
        visible = network.embed(features) + network.positions[masks.context]
        alone = network.blocks(visible)
        found[context] = (inside[0][-len(alone) :, : alone.shape[1]] - alone).abs().max()
        tokens = masks.context.shape[1] + (1 if context == "repeated" else 4) * masks.targets.shape[2]
        assert inside[0].shape[:2] == (20 if context == "repeated" else 5, tokens)
    assert found["shared"] < 1e-5 < 1e-2 < found["repeated"]


def test_who_attends_to_whom() -> None:
    assert shared_context_mask(2, 2, 2, torch.device("cpu")).int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 1],
        [1, 1, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("context", ["repeated", "shared"])
def test_recomputed_activations_give_the_same_gradients(context: PredictorContext) -> None:
    (masks, features), gradients = drawn(), []
    for checkpointing in (False, True):
        network = predictor(context, gradient_checkpointing=checkpointing)
        network(features, masks.context, masks.targets).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))  # type: ignore[arg-type]


def test_the_model_has_the_choice(tmp_path: Path) -> None:
    shared, repeated = (small_ijepa(predictor_context=context) for context in ("shared", "repeated"))
    shared.load_state_dict(repeated.state_dict())
    for jepa in (shared, repeated):
        torch.nn.init.normal_(jepa.predictor.mask_token)
    pairs = [jepa.eval().target_pairs(batch()) for jepa in (shared, repeated)]
    assert torch.equal(pairs[0].targets, pairs[1].targets)
    assert not torch.allclose(pairs[0].predictions, pairs[1].predictions)
    with pytest.raises(ValueError, match=r"predictor_context='both': choose one of repeated, shared\."):
        small_ijepa(predictor_context="both")
