"""Predictor fine-tuning of an IWM: three arms, one task or several."""

import json
from pathlib import Path

import pytest
import torch
from conftest import parameters_equal, small_images, small_recipe_iwm, small_views, trainer, write_images
from test_iwm import batch, checkpoint  # noqa: F401

from datamodules import MultiTask
from datamodules.loop_progress import Progress
from jepa_lightning.probes import EquivarianceProbe, PredictorFineTuning


@pytest.mark.parametrize("end_to_end", [False, True])
def test_predictor_tuning_trains_three_arms(tmp_path: Path, image_root: Path, checkpoint: Path, end_to_end: bool) -> None:
    probe = PredictorFineTuning(str(checkpoint), 2, end_to_end=end_to_end)
    before = {name: [p.clone() for p in arm.parameters()] for name, arm in probe.arms.items()}
    assert parameters_equal(probe.arms["pretrained"].predictor, probe.predictor)
    assert not parameters_equal(probe.arms["random"].predictor, probe.predictor)
    encoder = [p.clone() for p in probe.encoder.parameters()]
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0)
    run.fit(probe, small_images(image_root))
    for name, arm in probe.arms.items():
        assert all(not torch.equal(p, old) for p, old in zip(arm.parameters(), before[name], strict=True)), name
    assert all(torch.equal(p, old) for p, old in zip(probe.encoder.parameters(), encoder, strict=True))
    copies = [p for name in probe.encoders for p in probe.encoders[name].parameters()]
    assert len(copies) == (3 * len(encoder) if end_to_end else 0)
    assert not any(torch.equal(p, old) for p, old in zip(copies, 3 * encoder if end_to_end else [], strict=True))
    rates = {group["name"]: group["initial_lr"] for group in run.optimizers[0].param_groups}
    assert rates["pretrained_predictor_decay"] == pytest.approx(1e-4) and rates["random_decay"] == pytest.approx(1e-3)
    trained = sum(p.numel() for group in run.optimizers[0].param_groups for p in group["params"])
    assert trained == sum(p.numel() for part in (probe.arms, probe.encoders) for p in part.parameters())
    trainer(tmp_path).test(probe, small_images(image_root), verbose=False)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["accuracy"]) == {"pretrained", "random", "attentive"}


def test_a_predictor_of_visible_patches_is_tuned_at_their_tokens(tmp_path: Path, image_root: Path) -> None:
    run = trainer(tmp_path, max_steps=2)
    run.fit(small_recipe_iwm(), small_views(image_root))
    run.save_checkpoint(tmp_path / "iwm.ckpt")
    probe, given = PredictorFineTuning(str(tmp_path / "iwm.ckpt"), {"letters": 3, "insects": 2}), []
    features = probe.encoder(batch().images)
    for arm in ("pretrained", "random"):
        predictor = probe.arms[arm].predictor
        predictor.blocks[0].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
        before, task = probe.arms[arm](features, "letters"), probe.arms[arm].tokens["letters_token"]
        assert before.shape == (3, 3) and given.pop().shape[1] == 1 + 16, "a token of the task, and one of each patch"
        with torch.no_grad():
            task += torch.arange(24.0)
        assert not torch.equal(probe.arms[arm](features, "letters"), before)
    trainer(tmp_path).test(
        EquivarianceProbe(str(tmp_path / "iwm.ckpt"), num_images=2), small_views(image_root), verbose=False
    )


def test_one_predictor_learns_several_tasks(tmp_path: Path, image_root: Path, checkpoint: Path) -> None:
    for name in "xyz":
        write_images(tmp_path / "other" / name, 5, size=(16, 16), hue=ord(name))
    data = MultiTask({"insects": small_images(image_root), "letters": small_images(tmp_path / "other")})
    probe = PredictorFineTuning(str(checkpoint), {"letters": 3, "insects": 2})  # the order does not matter
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0)
    run.fit(probe, data)
    assert run.global_step == 6, "as long as the larger one"
    for arm in ("pretrained", "random"):
        tokens = probe.arms[arm].tokens
        assert set(tokens) == {"insects_token", "letters_token"}
    images = batch().images
    features = probe.encoder(images)
    insects, letters = (probe.arms["random"](features, task) for task in ("insects", "letters"))
    assert insects.shape == (3, 2) and letters.shape == (3, 3)
    before = probe.arms["random"](features, "letters")
    with torch.no_grad():
        probe.arms["random"].tokens["letters_token"] += torch.arange(24.0)  # a constant would be lost in the norm
    assert not torch.equal(probe.arms["random"](features, "letters"), before), "the predictor sees the task"
    assert torch.equal(probe.arms["random"](features, "insects"), insects)
    trainer(tmp_path).test(probe, data, verbose=False)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["accuracy"]) == {f"{arm}_{task}" for arm in probe.titles for task in ("insects", "letters")}
    assert report["judged"] == "on 3, 6 held-out images"
    with pytest.raises(ValueError, match="model.num_classes={'insects': 2, 'letters': 4} but the data has"):
        trainer(tmp_path).test(PredictorFineTuning(str(checkpoint), {"insects": 2, "letters": 4}), data)
    with pytest.raises(ValueError, match="give two or more"):
        MultiTask({"insects": small_images(image_root)})
    with pytest.raises(ValueError, match="images of one size"):
        MultiTask({"insects": small_images(image_root), "letters": small_images(image_root, image_size=32)})
    with pytest.raises(ValueError, match="'v1.5' is no name for a task"):
        MultiTask({"v1.5": small_images(image_root), "letters": small_images(image_root)})
    with pytest.raises(ValueError, match="labels, not views"):
        MultiTask({"insects": small_images(image_root), "letters": small_views(image_root)})


def tasks(image_root: Path, other: Path) -> MultiTask:
    data = MultiTask({"insects": small_images(image_root), "letters": small_images(other)})
    data.setup("fit")
    return data


def test_a_shorter_task_starts_again_with_other_crops_and_is_resumed(tmp_path: Path, image_root: Path) -> None:
    for name in "xyz":
        write_images(tmp_path / name, 5, hue=ord(name))

    def epoch(data: MultiTask) -> list[dict]:
        return [batch for batch, _, _ in iter(data.train_dataloader())]

    whole = epoch(tasks(image_root, tmp_path))
    assert len(whole) == 6 and len({batch["letters"].key for batch in whole}) == 6
    first, second = whole[:3], whole[3:]
    assert not any(torch.equal(a["letters"].images, b["letters"].images) for a in first for b in second)
    for cut in (2, 3, 5):
        resumed = tasks(image_root, tmp_path)
        resumed.resumed = Progress(0, cut)
        for uncut, again in zip(whole[cut:], epoch(resumed), strict=False):
            for name in ("insects", "letters"):
                assert uncut[name].key == again[name].key
                assert torch.equal(uncut[name].images, again[name].images), f"{name}, cut after {cut}"
