"""The guarantees of every JEPA of images, I-JEPA and IWM alike: EMA, resume, processes, alarm, checkpoints."""

import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import FAMILIES, parameters_equal, run_script, small_ijepa, small_images, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_ema import Shadow

import jepa_lightning.action_monitor
import jepa_lightning.image_jepa
import jepa_lightning.mean_reciprocal_rank
from callbacks import CollapseAlarm, CollapseWarning
from jepa_lightning.compiling import compiles
from jepa_lightning.image_jepa import ImageJEPA
from jepa_lightning.masks import Masks
from jepa_lightning.weights.checkpoints import load_jepa


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str):
    """Makes the family's smallest model."""
    return FAMILIES[family][0]


@pytest.fixture
def data(family: str):
    """Makes its data, of some images."""
    return FAMILIES[family][1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it, nobody else
def test_compiled_networks_train_to_the_same_weights(
    model, data, tmp_path: Path, image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, and run by torch itself: a test needs no C++ compiler. Masks of several shapes among the steps."""
    monkeypatch.setattr(jepa_lightning.image_jepa, "compiles", lambda device: True)
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend="eager", **options))
    monkeypatch.setattr(jepa_lightning.action_monitor, "WATCHED", 1)
    monkeypatch.setattr(jepa_lightning.mean_reciprocal_rank, "BANK_SIZE", 16)
    results, losses = [], []
    for compiled in (False, True):
        jepa = model(image_size=32, compile_networks=compiled, momentum=0.9)
        run = trainer(tmp_path, max_epochs=2, limit_val_batches=1)
        run.fit(jepa, data(image_root, image_size=32))
        results.append(jepa.state_dict())
        losses.append(run.callback_metrics["val/loss"])
    assert results[0].keys() == results[1].keys(), "names in checkpoints stay"
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)


def test_training_goes_on_where_nothing_can_be_compiled(
    tmp_path: Path, image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(function):
        raise RuntimeError("\nNo working C++ compiler found\nin many lines")

    monkeypatch.setattr(torch, "compile", missing)
    jepa = small_ijepa(compile_networks=True)
    run = trainer(tmp_path, max_steps=1)
    with pytest.warns(UserWarning, match=r"does not work here \(No working C\+\+ compiler found\): training goes on"):
        run.fit(jepa, small_images(image_root))
    assert run.global_step == 1 and jepa.context_encoder._compiled_call_impl is None


def test_what_can_be_compiled_is(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="eager"))
    assert compiles(torch.device("cpu"))
    assert not [warning for warning in recwarn.list if "compile_networks" in str(warning.message)]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"max_epochs": 2}, 12), ({"max_epochs": 2, "accumulate_grad_batches": 4}, 4), ({"max_steps": 7}, 7)],
)
def test_ema_equals_an_average_by_hand(model, data, tmp_path: Path, image_root: Path, settings: dict, steps: int) -> None:
    jepa, shadow = model(momentum=0.9), Shadow(steps)
    trainer(tmp_path, callbacks=[shadow], **settings).fit(jepa, data(image_root))
    shadow.check(jepa, steps)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # more than this machine has cores
@pytest.mark.parametrize("num_workers", [0, 2, 4])
def test_cut_and_resumed_equals_uncut(model, data, tmp_path: Path, image_root: Path, num_workers: int) -> None:
    """Crops and masks included; cut in the second epoch, after batch 3 of 6."""

    def run(**settings):
        jepa = model(momentum=0.9)
        module = data(image_root, num_workers=num_workers, flip=0.5)
        save = ModelCheckpoint(tmp_path / "cut", filename="{step}", every_n_train_steps=9, save_top_k=-1)
        fit = {key: settings.pop(key) for key in ("ckpt_path",) if key in settings}
        run = trainer(tmp_path, enable_checkpointing=True, max_epochs=3, callbacks=[save], **settings)
        run.fit(jepa, module, **fit)
        return jepa

    whole = run()
    resumed = run(ckpt_path=tmp_path / "cut" / "step=9.ckpt")
    assert parameters_equal(whole, resumed)


SCRIPT = """
import sys
from pathlib import Path
import torch
import jepa_lightning.action_monitor
from conftest import FAMILIES
from test_image_jepa import fit_on

out, root = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
jepa_lightning.action_monitor.WATCHED = 1
for family in FAMILIES:
    jepa, run = fit_on(2, family, out, root)
    # And with masks of their own, whose sizes the processes must agree on.
    other, _ = fit_on(2, family, out, root, own_masks=True)
    torch.save([jepa.state_dict(), dict(run.callback_metrics), other.state_dict()], out / f"{family}{run.global_rank}.pt")
"""


def fit_on(devices: int, family: str, out: Path, root: Path, own_masks: bool = False) -> tuple[ImageJEPA, pl.Trainer]:
    """Two epochs of batches of 4 images, over so many processes."""
    model, data = FAMILIES[family]
    jepa = model(momentum=0.9, regularizer="vicreg", image_size=32 if own_masks else 16)
    if not own_masks:
        # One process draws masks for four images and each of two for two: give all of them the same.
        jepa.masks.draw = lambda count, *_: Masks(
            torch.tensor([[0, 1, 2, 5]]).expand(count, -1), torch.tensor([[[8, 9], [10, 11]]]).expand(count, -1, -1)
        )
    strategy = "ddp" if devices > 1 else "auto"
    run = trainer(out, devices=devices, strategy=strategy, max_epochs=2, limit_val_batches=0 if own_masks else 1.0)
    run.fit(jepa, data(root, batch_size=4 // devices, image_size=jepa.image_size[0], crop_scale=(1, 1)))
    return jepa, run


def test_two_processes_equal_one_on_the_same_global_batch(
    tmp_path: Path, image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jepa_lightning.action_monitor, "WATCHED", 1)
    run_script(SCRIPT, tmp_path / "two", str(image_root))
    for family in FAMILIES:
        jepa, run = fit_on(1, family, tmp_path, image_root)
        weights, figures = jepa.state_dict(), run.callback_metrics
        (first, figures0, own0), (second, figures1, own1) = (
            torch.load(tmp_path / "two" / f"{family}{rank}.pt", weights_only=True) for rank in range(2)
        )
        for name, value in first.items():
            assert torch.equal(value, second[name]), f"{family}: ranks disagree on {name}"
            # Adam makes steps of 1e-3 out of gradients that are rounding errors: few weights differ, by a fraction of one.
            torch.testing.assert_close(
                value, weights[name], rtol=1e-3, atol=4e-4, msg=lambda m, n=f"{family}, {name}": f"{n}: {m}"
            )
        for name, value in own0.items():
            assert torch.equal(value, own1[name]), f"{family}, masks of their own: ranks disagree on {name}"
        for name in ("val/loss", "val/feature_std", "val/rankme", "train/regularizer_variance"):
            assert figures0[name].item() == pytest.approx(figures[name].item(), rel=1e-3), f"{family}, {name}"
            assert figures1[name].item() == pytest.approx(figures0[name].item(), rel=1e-6), f"{family}, {name}"


def test_alarm_fires_on_a_constant_encoder_and_is_silent_otherwise(model, data, tmp_path: Path, image_root: Path) -> None:
    settings = {
        "max_epochs": 1,
        "limit_val_batches": 1.0,
        "callbacks": [CollapseAlarm(grace_steps=0, min_rankme=1.0, max_largest_eigenvalue_share=1.0)],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        trainer(tmp_path, **settings).fit(model(learning_rate=1e-5), data(image_root))
    jepa = model(learning_rate=1e-9)
    for encoder in (jepa.context_encoder, jepa.target_encoder):
        torch.nn.init.zeros_(encoder.vit.norm.weight)
    with pytest.warns(CollapseWarning, match="all inputs look alike"):
        trainer(tmp_path, **settings).fit(jepa, data(image_root))


def test_saved_and_loaded(model, data, tmp_path: Path, image_root: Path) -> None:
    run = trainer(tmp_path, max_steps=1, enable_checkpointing=True)
    jepa = model()
    run.fit(jepa, data(image_root))
    run.save_checkpoint(tmp_path / "jepa.ckpt")
    loaded = load_jepa(tmp_path / "jepa.ckpt")
    assert parameters_equal(loaded.target_encoder, jepa.target_encoder)
    assert type(loaded) is type(jepa) and loaded.encode(torch.randn(3, 3, 16, 16)).shape == (3, 16, 192)


def test_images_of_another_size_are_refused(model, data, tmp_path: Path, image_root: Path) -> None:
    with pytest.raises(ValueError, match=r"image_size=\(16, 16\) but data.image_size=\(32, 32\)"):
        trainer(tmp_path, max_steps=1).fit(model(), data(image_root, image_size=32))


def test_all_in_bfloat16_learns_and_is_measured_in_wider_numbers(model, data, tmp_path: Path, image_root: Path) -> None:
    jepa = model()
    run = trainer(tmp_path, max_steps=1, precision="bf16-true", limit_val_batches=1.0, check_val_every_n_epoch=None,
                  val_check_interval=1)  # fmt: skip
    run.fit(jepa, data(image_root))
    assert jepa.context_encoder.vit.norm.weight.dtype == torch.bfloat16
    assert jepa.target_statistics.outer.dtype == torch.float64
    assert jepa.monitor.error.mean_value.dtype == torch.float32
    assert all(
        torch.isfinite(value) for name, value in run.callback_metrics.items() if "mrr" not in name and "r2" not in name
    )
    assert run.callback_metrics["val/feature_std"] > 0
