"""Batches of other people's data sets: tensors, pairs, dictionaries."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_data, small_ijepa, small_iwm, small_model, trainer
from test_python_face import pixels
from torch.utils.data import DataLoader, TensorDataset

from datamodules.batches import as_clip_batch, as_image_batch
from datamodules.preprocessing import normalize

LABELS = torch.arange(24) % 2


def rows(as_dictionary: bool, *tensors: torch.Tensor, names: tuple[str, ...] = ("image", "label")) -> Any:
    if not as_dictionary:
        return TensorDataset(*tensors)
    return [dict(zip(names, row, strict=False)) for row in zip(*tensors, strict=True)]


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("as_dictionary", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_ijepa_learns_from_any_loader(tmp_path: Path, labeled: bool, as_dictionary: bool, dtype: torch.dtype) -> None:
    images = pixels(24) if dtype == torch.uint8 else normalize(pixels(24))
    tensors = (images, LABELS) if labeled else (images,)
    loader = DataLoader(rows(as_dictionary, *tensors), batch_size=6)
    run, model = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0, limit_train_batches=1.0), small_ijepa()
    run.fit(model, loader, loader)
    assert run.global_step == 4
    assert ("val/knn_accuracy" in run.callback_metrics) is labeled
    assert torch.cat(run.predict(model, loader)).shape == (24, 192)


def test_masks_differ_between_batches_of_any_loader(tmp_path: Path) -> None:
    model, drawn = small_ijepa(), []
    draw = model.draw_masks
    model.draw_masks = lambda batch: drawn.append(draw(batch)) or drawn[-1]
    trainer(tmp_path, max_epochs=2, limit_train_batches=1.0).fit(model, DataLoader(TensorDataset(pixels(24)), batch_size=6))
    assert len(drawn) == 8 and len({masks.targets.numpy().tobytes() for masks in drawn}) == 8


@pytest.mark.parametrize("as_dictionary", [True, False])
def test_a_world_model_learns_from_any_loader(tmp_path: Path, as_dictionary: bool) -> None:
    windows, actions = torch.randint(0, 256, (24, 6, 2, 16, 16)).to(torch.uint8), torch.rand(24, 5, 2)
    model = small_model(observation="pixels", image_size=16, encoder="mlp", action_dim=2, horizon=2, encoder_widths=(8,))
    loader = DataLoader(rows(as_dictionary, windows, actions, names=("pixels", "action")), batch_size=6)
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0, limit_train_batches=1.0)
    run.fit(model, loader, loader)
    assert run.global_step == 4 and 0 < run.callback_metrics["val/persistence_ratio"]
    assert not any("linear_r2" in name for name in run.callback_metrics), "there are no states to read"


@pytest.mark.parametrize(
    ("model", "batch", "said"),
    [
        (small_ijepa, {"x": 1}, r"the names x: give images \(B, 3, H, W\)"),
        (small_ijepa, ["a", "b"], "a str: give images"),
        (small_iwm, torch.zeros(2, 3, 16, 16), "An IWM learns from pairs of views .* ImageFolder"),
        (small_model, {"x": 1}, r"the names x: give observations of windows \(B, T, ...\)"),
    ],
)
def test_batches_that_cannot_be_read_are_explained(model: Any, batch: Any, said: str, tmp_path: Path) -> None:
    made = model()
    made._trainer = trainer(tmp_path)
    with pytest.raises(ValueError, match=said):
        made.as_batch(batch, 0)


def test_states_and_further_parts_of_a_batch() -> None:
    windows, states = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    assert as_clip_batch({"observation": windows, "states": states}).states is states
    assert as_clip_batch((windows, None)).actions is None
    images, labels = torch.zeros(2, 3, 4, 4), torch.tensor([1, 0], dtype=torch.int32)
    batch = as_image_batch((images, labels, ["names"]), (1, 2))
    assert batch.images is images and batch.labels.tolist() == [1, 0] and batch.labels.dtype == torch.int64
    assert as_image_batch(images, (0,)).images is images and as_clip_batch(windows).observations is windows
    assert batch.key == (1, 2) and as_image_batch([images], (0,)).labels.tolist() == [-1, -1]
    assert as_image_batch((images, ["a", "b"]), (0,)).labels.tolist() == [-1, -1], "labels that are no numbers"


def test_actions_are_one_for_each_step() -> None:
    windows = torch.zeros(2, 4, 3)
    assert as_clip_batch((windows, torch.arange(8.0).view(2, 4, 1))).actions[0].flatten().tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="2 actions with 4 windows"):
        as_clip_batch((windows, torch.zeros(2, 2, 1)))
    model = small_model(action_dim=2)
    window = small_data().observe(small_data().trajectories("val")[:, :3]).observations[:, 0]
    for actions in (None, torch.zeros(len(window), 2, 2), torch.zeros(len(window), 3, 1)):
        with pytest.raises(ValueError, match=r"give some of shape \(\d+, 3, 2\)"):
            model.rollout(window, 3, actions)
    with pytest.raises(ValueError, match="this model knows no actions"):
        small_model().rollout(window, 3, torch.zeros(len(window), 3, 2))
    uint8 = torch.randint(0, 256, (2, 1, 2, 16, 16)).to(torch.uint8)
    seeing = small_model(observation="pixels", image_size=16, encoder="mlp", encoder_widths=(8,))
    assert torch.equal(seeing(uint8), seeing(uint8 / 255))


def test_labels_are_an_integer_for_each_image() -> None:
    for labels in (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 3, 4, 4)):
        with pytest.raises(ValueError, match="give an integer for each, or no labels"):
            as_image_batch((torch.zeros(2, 3, 4, 4), labels), (0,))
