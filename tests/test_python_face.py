"""The package as it is used from Python: load, embeddings, completion, roll-outs, plans, and other people's batches."""

import doctest
import importlib
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import apart, small_data, small_ijepa, small_images, small_iwm, small_model, trainer
from PIL import Image
from safetensors.torch import save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, TensorDataset

import jepa_lightning
from datamodules.preprocessing import center, denormalize, normalize
from jepa_lightning import IJEPA, JEPA, Planner, TargetPairs, load, start_from
from jepa_lightning.masks import Masks
from jepa_lightning.probes import CompletionProbe, KNNProbe
from jepa_lightning.weights.loading import is_whole


def saved(model: Any, root: Path) -> Path:
    run = trainer(root)
    run.strategy.connect(model)
    run.save_checkpoint(root / "checkpoints" / "last.ckpt")
    return root


def pixels(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_a_model_gives_embeddings_of_uint8_and_of_normalized_images(tmp_path: Path) -> None:
    jepa = small_ijepa()
    apart(jepa)
    model = load(saved(jepa, tmp_path))
    patches = model.encode(pixels())
    assert patches.shape == (3, 16, 192) and torch.equal(patches, model.target_encoder(normalize(pixels())))
    assert torch.equal(model(pixels()), patches.mean(dim=1)) and torch.equal(model(normalize(pixels())), model(pixels()))
    assert not model.training and not model(pixels()).requires_grad
    with pytest.raises(ValueError, match="Images of torch.uint8: an encoder takes normalized images. model.encode"):
        model.target_encoder(pixels())


def test_the_transform_is_that_of_validation(tmp_path: Path, image_root: Path) -> None:
    data = small_images(image_root)
    data.setup("test")
    path = data._samples["val"].paths[0].decode()
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    transform = small_ijepa().transform
    with Image.open(path) as image:
        torch.testing.assert_close(transform(image), batch.images[0], atol=0.02, rtol=0)  # another JPEG decoder
    assert transform(Image.new("L", (31, 77))).shape == (3, 16, 16)
    assert transform(torch.zeros(3, 90, 20, dtype=torch.uint8)).shape == (3, 16, 16)
    for odd, said in ((torch.zeros(3, 8, 8), "torch.float32"), (torch.zeros(1, 8, 8, dtype=torch.uint8), r"\(1, 8, 8\)")):
        with pytest.raises(ValueError, match=f"{said}.*give a path, a PIL image, or a uint8 tensor"):
            transform(odd)
    torch.testing.assert_close(transform(path), batch.images[0])


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(2, 3, 20, 16), r"\(2, 3, 20, 16\): this model takes \(B, 3, 16, 16\). model.transform"),
        (torch.zeros(3, 16, 16), r"\(3, 16, 16\): this model takes"),
        (torch.zeros(2, 1, 16, 16), r"\(2, 1, 16, 16\): this model takes"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "torch.int64: give uint8"),
    ],
)
def test_images_that_do_not_fit_are_refused(images: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small_ijepa()(images)


@pytest.mark.parametrize("make", [small_ijepa, small_iwm])
def test_what_is_hidden_is_predicted_from_what_is_visible(make: Any) -> None:
    model = make().eval()
    visible = torch.ones(4, 4, dtype=torch.bool)
    visible[1:3, 1:3] = False
    found = model.complete(pixels(), visible)
    context = visible.flatten().nonzero()[:, 0].expand(3, -1)
    hidden = torch.tensor([5, 6, 9, 10]).expand(3, 1, -1)
    with torch.no_grad():
        seen = model.context_encoder(normalize(pixels()), context)
        predicted = model.predict_hidden(seen, Masks(context, hidden), None)[:, 0]
    assert torch.equal(found[:, ~visible.flatten()], predicted)
    assert torch.equal(found[:, visible.flatten()], model.to_target_space(seen))
    changed = pixels()
    changed[:, :, 4:12, 4:12] = 0
    assert torch.equal(model.complete(changed, visible), found), "what is hidden does not count"
    for mask in (torch.ones(16), torch.zeros(4, 4), torch.ones(5)):
        with pytest.raises(ValueError, match="give 4 x 4 patches"):
            model.complete(pixels(), mask)


def test_completed_images_are_decoded(tmp_path: Path) -> None:
    jepa = small_ijepa()
    apart(jepa)
    model = load(saved(jepa, tmp_path))
    decoder = CompletionProbe(str(tmp_path), width=64, depth=1)
    decoder.fitted.fill_(True)
    saved(decoder, tmp_path / "completion")
    decoder = load(tmp_path / "completion")
    assert isinstance(decoder, CompletionProbe)
    images = model.complete(pixels(), torch.arange(16) < 12, decoder)
    assert images.shape == (3, 3, 16, 16) and images.min() >= 0 and images.max() <= 1


def test_load_knows_runs_files_and_probes(tmp_path: Path) -> None:
    model = small_model()
    saved(model, tmp_path)
    for path in (tmp_path, tmp_path / "checkpoints" / "last.ckpt"):
        found = load(path)
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))
    saved(small_ijepa(), tmp_path / "ijepa")
    saved(KNNProbe(str(tmp_path / "ijepa")), tmp_path / "ijepa" / "knn")
    assert isinstance(load(tmp_path / "ijepa" / "knn"), KNNProbe)
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not a checkpoint"):
        load(tmp_path / "empty")


def test_rollouts_and_plans_of_a_world_model() -> None:
    model = small_model(action_dim=2).eval()
    windows = small_data().observe(small_data().trajectories("val")[:, :6]).observations  # (B, T, ...)
    actions = torch.rand(len(windows), 3, 2)
    rolled = model.rollout(windows[:, 0], 3, actions)
    with torch.no_grad():
        embedding = model.target_encoder(windows[:, 0])
        for step in range(3):
            embedding = model.predictor(embedding, actions[:, step])
            torch.testing.assert_close(rolled[:, step], embedding)
    planner = Planner(num_samples=32, num_iterations=4, num_elites=4)
    plan = model.plan(windows[:, 0], windows[:, 3], 3, planner)
    assert plan.shape == (len(windows), 3, 2) and plan.abs().max() <= 1
    assert torch.equal(plan, model.plan(windows[:, 0], windows[:, 3], 3, planner)), "the same seed, the same plan"
    goal = model(windows[:, 3:4])[:, 0]

    def distance(chosen: torch.Tensor) -> torch.Tensor:
        return (model.rollout(windows[:, 0], 3, chosen)[:, -1] - goal).square().mean(dim=-1)

    assert (distance(plan) <= distance(torch.zeros_like(plan))).all()
    with pytest.raises(ValueError, match="knows no actions"):
        small_model().plan(windows[:, 0], windows[:, 3])


def test_a_new_model_is_fifteen_lines(tmp_path: Path) -> None:
    class Toy(JEPA):
        """Predict the embedding of a noisy vector's clean version."""

        def __init__(self) -> None:
            super().__init__(regularizer="variance_hinge")
            self.set_networks(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), dim=8)

        def encode(self, observations: torch.Tensor) -> torch.Tensor:
            return self.target_encoder(observations)

        def target_pairs(self, batch: Any) -> TargetPairs:
            (clean,) = batch
            seen, target = self.context_encoder(clean + 0.1 * torch.randn_like(clean)), self.encode(clean)
            return TargetPairs(self.predictor(seen), target, seen[:, None], target[:, None])

    model, loader = Toy(), DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=8)
    before = model.target_encoder.weight.clone()
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=1.0, limit_val_batches=1.0)
    run.fit(model, loader, loader)
    assert run.global_step == 4 and "val/rankme" in run.callback_metrics
    assert not torch.equal(model.target_encoder.weight, before)


def test_training_starts_from_a_model(tmp_path: Path, image_root: Path) -> None:
    """The loss of the first step is that of the model that is loaded."""
    trained = small_ijepa()
    apart(trained)
    source = saved(trained, tmp_path / "source")
    model = small_ijepa(learning_rate=1e-9)
    start_from(model, source)
    losses = []
    for jepa in (model, load(source)):
        run = trainer(tmp_path, max_steps=1)
        run.fit(jepa, small_images(image_root))
        losses.append(run.callback_metrics["train/loss"])
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"does not fit this IJEPA: .*weights of the context_encoder .*Its arguments are"):
        start_from(small_ijepa(encoder_depth=2), source)
    with pytest.raises(ValueError, match="holds a KNNProbe: training can start from a JEPA"):
        start_from(model, saved(KNNProbe(str(source)), tmp_path / "knn"))


def test_other_image_sizes_start_from_the_same_weights(tmp_path: Path) -> None:
    source = saved(small_ijepa(), tmp_path)
    larger = small_ijepa(image_size=32)
    start_from(larger, source)
    assert larger(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 192)


def modules() -> list[str]:
    found = []
    for package in ("jepa_lightning", "datamodules", "callbacks"):
        root = importlib.import_module(package)
        names = (module.name for module in pkgutil.walk_packages(root.__path__, f"{package}."))
        found += [package, *(name for name in names if not name.endswith("__main__"))]
    return found


def test_examples_in_docstrings_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tried = 0
    for name in modules():
        results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
        assert results.failed == 0, name
        tried += results.attempted
    assert tried >= 5


def test_every_public_name_has_a_docstring_with_an_example() -> None:
    for name in set(jepa_lightning.__all__) - {"TargetPairs", "JEPA", "start_from"}:
        assert ">>>" in (getattr(jepa_lightning, name).__doc__ or ""), name
    assert isinstance(IJEPA, type)


def test_normalization_is_that_of_imagenet() -> None:
    for value in (0, 100, 255):
        image = torch.full((1, 3, 2, 2), value, dtype=torch.uint8)
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        torch.testing.assert_close(normalize(image)[0], (value / 255 - mean).div(std).expand(3, 2, 2))
        assert torch.equal(denormalize(normalize(image)), image)
    assert (
        denormalize(torch.full((1, 3, 1, 1), 99.0)).max() == 255 and denormalize(torch.full((1, 3, 1, 1), -99.0)).max() == 0
    )


def test_images_of_one_right_side_are_still_cut() -> None:
    assert center(torch.zeros(3, 40, 16, dtype=torch.uint8), (16, 16)).shape == (3, 16, 16)
    assert center(torch.zeros(3, 16, 40, dtype=torch.uint8), (16, 16)).shape == (3, 16, 16)
    with pytest.raises(ValueError, match="ndarray: give a path, a PIL image"):
        small_ijepa().transform(np.zeros((16, 40, 3), np.uint8))  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        small_ijepa().transform("a.png")


def test_weights_of_images_that_are_not_square_are_given_their_size(tmp_path: Path) -> None:
    model = small_ijepa(image_size=(16, 32))
    state = {"pos_embed": model.target_encoder.positions[None].clone(), **model.target_encoder.vit.state_dict()}
    torch.save(state, tmp_path / "encoder.pth")
    save_file(state, tmp_path / "encoder.safetensors")
    for name in ("encoder.pth", "encoder.safetensors"):
        assert load(tmp_path / name, (16, 32)).image_size == (16, 32)
        assert not is_whole(tmp_path / name)
        with pytest.raises(ValueError, match="which make no square"):
            load(tmp_path / name)
    saved(small_ijepa(), tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{}")  # of somebody else's
    assert is_whole(tmp_path / "run") and is_whole(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert isinstance(load(tmp_path / "run"), IJEPA)


def test_completion_in_bfloat16_and_with_the_decoder_of_another_model(tmp_path: Path) -> None:
    model, visible = small_ijepa(), torch.arange(16) < 9
    with torch.autocast("cpu", torch.bfloat16):
        assert model.complete(pixels(), visible).dtype == torch.float32
    assert small_ijepa().bfloat16().complete(pixels(), visible).dtype == torch.float32
    for name in ("one", "two"):
        jepa = small_ijepa()
        apart(jepa)
        jepa.target_encoder.vit.norm.bias.data.add_(len(name) + (name == "two"))
        saved(jepa, tmp_path / name)
    decoder = CompletionProbe(str(tmp_path / "one"), width=64, depth=1)
    with pytest.raises(ValueError, match="fitted on another model"):
        load(tmp_path / "two").complete(pixels(), visible, decoder)


def test_another_predictor_starts_untrained_and_a_probe_from_nothing_else(tmp_path: Path) -> None:
    source = saved(small_ijepa(), tmp_path)
    model = small_ijepa(predictor_depth=2)
    with pytest.warns(UserWarning, match="of another kind or size: this one starts untrained"):
        start_from(model, source)
    assert torch.equal(model(pixels()), load(source)(pixels()))
    with pytest.raises(ValueError, match="A KNNProbe reads its JEPA from model.checkpoint"):
        start_from(KNNProbe(str(source)), source)
    torch.save(torch.zeros(3), tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="holds no dictionary of weights"):
        load(tmp_path / "odd.pth")


def test_training_goes_on_after_a_validation(tmp_path: Path) -> None:
    """Metrics that were reset in inference mode can be changed outside of it."""
    run, model, data = trainer(tmp_path, max_steps=6, limit_val_batches=1.0), small_model(), small_data()
    run.validate(model, data, verbose=False)
    run.fit(model, data)
    assert run.global_step == 6
