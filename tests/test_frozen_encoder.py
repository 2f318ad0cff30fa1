"""A predictor that learns on an encoder that is trained already, and stands still."""

import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import parameters_equal, run_script, small_ijepa, small_images, small_recipe_iwm, small_views, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import jepa_lightning.action_monitor
import jepa_lightning.mean_reciprocal_rank
from callbacks import CollapseAlarm
from datamodules.views import Views
from jepa_lightning import IWM
from jepa_lightning.cli import main
from jepa_lightning.figures import mark_blocks
from jepa_lightning.probes import CompletionProbe, EquivarianceProbe
from jepa_lightning.sharding import FSDP2Strategy
from jepa_lightning.weights.loading import load, start_from


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> Path:
    """A checkpoint whose context and target encoder differ."""
    root = tmp_path_factory.mktemp("trained")
    run = trainer(root, max_steps=4)
    run.fit(small_recipe_iwm(momentum=0.9, regularizer="vicreg"), small_views(image_root))
    run.save_checkpoint(root / "last.ckpt")
    return root / "last.ckpt"


def frozen(checkpoint: Path, **changes) -> IWM:
    jepa = small_recipe_iwm(**({"freeze_encoder": True, "whole_fraction": 1.0, "momentum": 0.9} | changes))
    start_from(jepa, checkpoint)
    return jepa


@pytest.fixture(autouse=True)
def few_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jepa_lightning.action_monitor, "WATCHED", 1)
    monkeypatch.setattr(jepa_lightning.mean_reciprocal_rank, "BANK_SIZE", 16)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_predictor_alone_learns(trained: Path, tmp_path: Path, image_root: Path, precision: str) -> None:
    before, jepa = load(trained), frozen(trained, weight_decay=0.5)
    assert not parameters_equal(before.context_encoder, before.target_encoder)
    run = trainer(tmp_path, max_epochs=2, limit_val_batches=1.0, precision=precision)
    run.fit(jepa, small_views(image_root))
    (optimizer,) = run.optimizers
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in jepa.predictor.parameters()}
    run.save_checkpoint(tmp_path / "last.ckpt")
    after = load(tmp_path / "last.ckpt")
    exact = {"rtol": 0, "atol": 0} if precision == "32-true" else {"rtol": 2**-8, "atol": 1e-8}
    for encoder in (after.context_encoder, after.target_encoder):
        for name, weights in before.target_encoder.state_dict().items():
            torch.testing.assert_close(encoder.state_dict()[name].float(), weights, **exact)
    same = [
        name for name, weights in before.predictor.named_parameters() if weights.equal(after.predictor.state_dict()[name])
    ]
    # Nothing is hidden, so nothing is predicted at mask tokens. (Rounding alone changes those.)
    assert same == (["mask_token"] if precision == "32-true" else [])
    assert {"val/mrr", "val/loss", "val/knn_accuracy"} <= set(run.callback_metrics)


def test_without_it_both_encoders_begin_where_they_were(trained: Path, tmp_path: Path, image_root: Path) -> None:
    before, jepa = load(trained), small_recipe_iwm()
    start_from(jepa, trained)
    found = []

    class Look(Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            encoders = ("context_encoder", "target_encoder")
            found.extend(parameters_equal(getattr(module, name), getattr(before, name)) for name in encoders)

    trainer(tmp_path, max_steps=1, callbacks=[Look()]).fit(jepa, small_views(image_root))
    assert found == [True, True]


def test_nothing_is_hidden_in_validation_either(trained: Path, tmp_path: Path, image_root: Path) -> None:
    jepa, data = frozen(trained), small_views(image_root)
    run = trainer(tmp_path, limit_val_batches=1.0)
    run.validate(jepa, data, verbose=False)
    errors, count = 0.0, 0
    for batch in data.val_dataloader():
        pair = data.on_after_batch_transfer(batch, 0)
        predicted = jepa.apply_actions(jepa.target_encoder(pair.sources), pair.actions)
        errors += (predicted - jepa.encode_targets(pair.targets)).square().mean().item() * len(pair.labels)
        count += len(pair.labels)
    assert run.callback_metrics["val/loss"].item() == pytest.approx(errors / count, rel=1e-4)


def test_what_never_saw_anything_hidden_completes_nothing(trained: Path, tmp_path: Path, image_root: Path) -> None:
    images, visible = torch.zeros(1, 3, 16, 16), torch.arange(16) < 8
    with pytest.raises(
        ValueError, match="trained with nothing hidden .*whole_fraction=1.* take one that had something hidden"
    ):
        frozen(trained).complete(images, visible)
    assert frozen(trained, whole_fraction=0.75).complete(images, visible).shape == (1, 16, 192)
    for fraction in (1.0, 0.75):
        run = trainer(tmp_path, max_steps=1)
        run.fit(frozen(trained, whole_fraction=fraction), small_views(image_root))
        run.save_checkpoint(tmp_path / f"{fraction}.ckpt")
    with pytest.raises(ValueError, match="completes nothing"):
        CompletionProbe(tmp_path / "1.0.ckpt")
    CompletionProbe(tmp_path / "0.75.ckpt")


def test_actions_that_mean_something_else_are_refused(trained: Path, tmp_path: Path, image_root: Path) -> None:
    other = small_views(image_root, views=Views(source_from="target"))
    with pytest.raises(ValueError, match=r"trained with data.views.source_from=shared.* with target: set it to that"):
        trainer(tmp_path, max_steps=1).fit(frozen(trained), other)
    with pytest.raises(ValueError, match=r"trained with data.views.source_from=shared"):
        trainer(tmp_path).test(EquivarianceProbe(str(trained), num_images=2), other, verbose=False)
    with pytest.warns(UserWarning, match="The predictor of .* is of another kind or size: this one starts untrained"):
        untrained = frozen(trained, predictor_depth=2)
    trainer(tmp_path, max_steps=1).fit(untrained, other)  # it knows no actions yet


def test_the_best_checkpoint_is_that_of_the_predictions(image_root: Path, tmp_path: Path) -> None:
    for changes, expected in (({}, ("val/knn_accuracy", "max")), ({"freeze_encoder": True}, ("val/guarded_error", "min"))):
        jepa, run = small_recipe_iwm(**changes), trainer(tmp_path)
        run.datamodule, jepa.trainer = small_views(image_root), run
        run.datamodule.setup("fit")
        assert jepa.best_metric == expected


def test_cut_and_resumed_equals_uncut(trained: Path, tmp_path: Path, image_root: Path) -> None:
    def fit(checkpoint: Path | None) -> IWM:
        # A new process knows nothing of the weights that the first one began with.
        jepa = (
            frozen(trained)
            if checkpoint is None
            else small_recipe_iwm(freeze_encoder=True, whole_fraction=1.0, momentum=0.9)
        )
        save = ModelCheckpoint(tmp_path / "cut", filename="{step}", every_n_train_steps=9, save_top_k=-1)
        run = trainer(tmp_path, enable_checkpointing=True, max_epochs=3, callbacks=[save])
        run.fit(jepa, small_views(image_root), ckpt_path=checkpoint, weights_only=True)
        return jepa

    whole = fit(None)
    assert parameters_equal(whole, fit(tmp_path / "cut" / "step=9.ckpt"))


def fit_on(devices: int, strategy: str, out: Path, root: Path, checkpoint: Path) -> tuple[IWM, pl.Trainer]:
    """Two epochs of batches of 4 images, over so many processes."""
    sharded = FSDP2Strategy(save_distributed_checkpoint=False)
    run = trainer(out, devices=devices, strategy=sharded if strategy == "fsdp2" else strategy, max_epochs=2)
    jepa = frozen(checkpoint)
    run.fit(jepa, small_views(root, batch_size=4 // devices, crop_scale=(1, 1)))
    return jepa, run


SCRIPT = """
import sys
from pathlib import Path
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from test_frozen_encoder import fit_on

out, root, checkpoint = map(Path, sys.argv[1:])
torch.set_num_threads(1)
for strategy in ("ddp", "fsdp2"):
    jepa, run = fit_on(2, strategy, out, root, checkpoint)
    weights = get_model_state_dict(jepa, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if run.is_global_zero:
        torch.save(weights, out / f"{strategy}.pt")
"""


def test_two_processes_equal_one_on_the_same_global_batch(trained: Path, tmp_path: Path, image_root: Path) -> None:
    run_script(SCRIPT, tmp_path / "two", str(image_root), str(trained))
    alone, _ = fit_on(1, "auto", tmp_path, image_root, trained)
    for strategy in ("ddp", "fsdp2"):
        weights = torch.load(tmp_path / "two" / f"{strategy}.pt", weights_only=True)
        for name, value in alone.state_dict().items():
            exact = {"rtol": 1e-3, "atol": 4e-4} if name.startswith("predictor") else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(weights[name], value, **exact, msg=lambda m, n=name, s=strategy: f"{s}, {n}: {m}")


def test_an_i_jepa_gets_a_predictor_of_actions(tmp_path: Path, image_root: Path) -> None:
    jepa = small_ijepa()
    trainer(tmp_path, max_steps=1).fit(jepa, small_images(image_root))
    jepa.trainer.save_checkpoint(tmp_path / "ijepa.ckpt")
    with pytest.warns(
        UserWarning, match="The predictor of .*ijepa.ckpt is of another kind or size: this one starts untrained"
    ):
        model = frozen(tmp_path / "ijepa.ckpt")
    untrained = {name: weights.clone() for name, weights in model.predictor.state_dict().items()}
    trainer(tmp_path, max_steps=2).fit(model, small_views(image_root))
    assert parameters_equal(model.target_encoder, jepa.target_encoder)
    assert any(not weights.equal(untrained[name]) for name, weights in model.predictor.state_dict().items())


def test_the_alarm_knows_that_the_encoder_stays_as_it_is(trained: Path) -> None:
    advice = CollapseAlarm._against("embeddings from shrinking", ("variance",), frozen(trained))
    assert advice == ["model.freeze_encoder leaves the encoder of --init_from as it is: start from another one"]


def test_a_completion_probe_is_read_when_the_file_of_its_jepa_is_gone(
    trained: Path, tmp_path: Path, image_root: Path
) -> None:
    jepa = tmp_path / "jepa.ckpt"
    shutil.copy(trained, jepa)
    probe, run = CompletionProbe(str(jepa), width=64, depth=1), trainer(tmp_path, max_steps=1)
    run.fit(probe, small_images(image_root))
    run.save_checkpoint(tmp_path / "probe.ckpt")
    jepa.unlink()
    again = load(tmp_path / "probe.ckpt")
    assert parameters_equal(again.context_encoder, probe.context_encoder)


def test_what_is_seen_is_shown_as_it_is() -> None:
    image, everything = torch.rand(1, 3, 8, 8), torch.ones(1, 4, dtype=torch.bool)
    assert mark_blocks(image, everything, everything, (2, 2)).equal(image)


def test_there_must_be_an_encoder_that_is_trained(tmp_path: Path, image_root: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="model.regularizer='vicreg' keeps an encoder from collapsing.*to null"):
        small_recipe_iwm(freeze_encoder=True, regularizer="vicreg")
    sizes = ["--model.encoder=vit_tiny_patch16_224", "--model.image_size=16", "--model.patch_size=4", "--data.image_size=16"]
    with pytest.raises(SystemExit):
        main(
            [
                *("fit", "--model=IWM", "--data=ImageFolder", f"--data.root={image_root}", "--data.views.strength=default"),
                *(
                    *sizes,
                    "--model.freeze_encoder=true",
                    f"--trainer.default_root_dir={tmp_path}",
                    "--trainer.accelerator=cpu",
                ),
            ]
        )
    assert "error: model.freeze_encoder=true trains the predictor of an encoder that is trained" in capsys.readouterr().err
