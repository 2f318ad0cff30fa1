"""Wrong invocations: one sentence each, an exit code that is not 0, nothing imported and nothing overwritten."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, write_images

from jepa_lightning.cli import main

PENDULUM = [
    "--config", str(ROOT / "configs" / "pendulum" / "coordinates.yaml"), "--model.encoder_widths", "[8]",
    "--model.latent_dim", "4", "--model.predictor_width", "8", "--model.horizon", "4",
    "--data.size", "32", "--data.val_size", "4", "--data.batch_size", "8",
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1",
]  # fmt: skip
SMALL_VIT = [
    "--model.encoder_depth=1", "--model.image_size=16", "--model.patch_size=4", "--model.predictor_width=24",
    "--model.predictor_depth=1",
]  # fmt: skip
IJEPA = ["--model", "IJEPA", *SMALL_VIT, "--model.encoder=vit_tiny_patch16_224"]
IWM = ["--model", "IWM", *SMALL_VIT, "--model.encoder=vit_tiny_patch16_224"]
IMAGES = ["--data", "ImageFolder", "--data.image_size=16", "--data.batch_size=2", "--data.num_workers=0"]
CPU = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]


def evil(path: Path, checkpoint: dict[str, Any]) -> None:
    """A checkpoint that names a class of its own choosing: importing `evil_module` leaves a file behind."""
    (path.parent / "evil_module.py").write_text(f"open({str(path.parent / 'was_here')!r}, 'w')\nclass Model: pass\n")
    checkpoint["hyper_parameters"] = {"_class_path": "evil_module.Model", "_instantiator": "evil_module.Model"}
    torch.save(checkpoint, path)


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a pendulum, and files next to it that are not what they seem."""
    root = tmp_path_factory.mktemp("mistakes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jepa-lightning"])
        main(["fit", *PENDULUM, "--trainer.default_root_dir", str(root / "run"), "--trainer.log_every_n_steps", "1"])
    good = torch.load(root / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    (root / "text.ckpt").write_text("no checkpoint")
    (root / "empty.ckpt").write_text("")
    (root / "folder.ckpt").mkdir()
    torch.save({"model": good["state_dict"]}, root / "foreign.ckpt")
    torch.save(good | {"format_version": 99}, root / "later.ckpt")
    torch.save({name: value for name, value in good.items() if name != "optimizer_states"}, root / "weights.ckpt")
    torch.save(good | {"class": "my_project.Model"}, root / "unknown_class.ckpt")
    hparams = good["hyper_parameters"]
    torch.save(good | {"hyper_parameters": hparams | {"_class_path": "jepa_lightning.IJEPA"}}, root / "other_class.ckpt")
    evil(root / "evil.ckpt", dict(good))
    torch.save(object, root / "code.ckpt")
    (root / "broken.yaml").write_text("model: [unclosed")
    (root / "list.yaml").write_text("- model\n")
    write_images(root / "images" / "ant", 6)
    write_images(root / "images" / "bee", 6)
    (root / "no_images" / "ant").mkdir(parents=True)
    return root


def images(*extra: str) -> list[str]:
    return [*IJEPA, *IMAGES, "--data.root", "{root}/images", *CPU, *extra]


MISTAKES = {
    # What was misspelt, and what may have been meant.
    "model key": ([*PENDULUM, "--model.horizn", "3"], "did you mean horizon?"),
    "data key": ([*PENDULUM, "--data.sise", "3"], "did you mean size?"),
    "trainer key": ([*PENDULUM, "--trainer.strtegy", "ddp"], "did you mean trainer.strategy?"),
    "top-level key": ([*PENDULUM, "--ckpt_pth", "last"], "did you mean ckpt_path?"),
    "model class": ([*PENDULUM, "--model", "PendulumJEPAA"], "did you mean PendulumJEPA?"),
    "data class": ([*PENDULUM, "--data", "DoublePendulm"], "did you mean DoublePendulum?"),
    "logger class": ([*PENDULUM, "--trainer.logger", "CSVLoger"], "did you mean CSVLogger?"),
    "callback class": ([*PENDULUM, "--trainer.callbacks+=LastChekpoint"], "did you mean LastCheckpoint?"),
    "callback key": (
        [*PENDULUM, "--trainer.callbacks+=CollapseAlarm", "--trainer.callbacks.grase_steps=3"],
        "grase_steps",
    ),
    # Configurations.
    "no such config": ([*PENDULUM, "--config", "nowhere/x.yaml"], "nowhere/x.yaml"),
    "broken YAML": (["--config", "{root}/broken.yaml"], "broken.yaml"),
    "YAML of a list": (["--config", "{root}/list.yaml"], "list.yaml"),
    "no model": (CPU, "model"),
    # Models and data that do not fit.
    "IJEPA on a pendulum": ([*IJEPA, "--data", "DoublePendulum", *CPU], "set data to ImageFolder or SyntheticImages"),
    "IWM on a pendulum": ([*IWM, "--data", "DoublePendulum", *CPU], "with data.views.strength=default"),
    "IWM without views": ([*IWM, *IMAGES, "--data.root", "{root}/images", *CPU], "with data.views.strength=default"),
    "pendulum on images": (
        ["--model", "PendulumJEPA", *IMAGES, "--data.root", "{root}/images", *CPU],
        "set data to DoublePendulum",
    ),
    "probe of a pendulum": (
        ["--model", "LinearProbe", "--model.checkpoint", "{root}/run/checkpoints/last.ckpt", *IMAGES,
         "--data.root", "{root}/images", *CPU],
        "holds a PendulumJEPA",
    ),
    "images of another size": (images("--data.image_size", "32"), "data.image_size=(32, 32)"),
    "no folder": ([*IJEPA, *IMAGES, "--data.root", "{root}/nowhere", *CPU], "There is no folder"),
    "no images": ([*IJEPA, *IMAGES, "--data.root", "{root}/no_images", *CPU], "holds no image"),
    "list that leads out": (images("--data.file_list", "{root}/text.ckpt"), "text.ckpt"),
    "batch too large": (images("--data.batch_size", "64"), "do not fill one batch of batch_size=64"),
    "no prefetching": (images("--data.prefetch_factor", "0"), "data.prefetch_factor=0"),
    "negative timeout": (images("--data.timeout", "-1"), "data.timeout=-1"),
    "encoder of another kind": (images("--model.encoder", "resnet50"), "no vision transformer of timm"),
    # Loggers, strategies, precisions, devices.
    "FSDP1": ([*PENDULUM, "--trainer.strategy", "fsdp"], "fsdp"),
    "DeepSpeed": ([*PENDULUM, "--trainer.strategy", "deepspeed_stage_3"], "eepspeed"),
    "sharded pendulum": (
        [*PENDULUM, "--trainer.strategy", "fsdp2"],
        "choose ddp",
    ),
    "unknown strategy": ([*PENDULUM, "--trainer.strategy", "ddq"], "ddq"),
    "unknown precision": ([*PENDULUM, "--trainer.precision", "17"], "17"),
    "no GPU": ([*PENDULUM, "--trainer.accelerator", "cuda"], "CUDAAccelerator"),
    "no devices": ([*PENDULUM, "--trainer.devices", "0"], "devices"),
    # Callbacks.
    "checkpoint every 0 steps": (
        [*PENDULUM, "--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_train_steps=0"],
        "every_n_train_steps=0",
    ),
    "checkpoint every 0 minutes": (
        [*PENDULUM, "--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_minutes=0"],
        "every_minutes=0",
    ),
    # Checkpoints.
    "nothing to go on from": ([*PENDULUM, "--ckpt_path", "last"], "--ckpt_path auto"),
    "text": ([*PENDULUM, "--ckpt_path", "{root}/text.ckpt"], "cannot be read as a checkpoint"),
    "empty file": ([*PENDULUM, "--ckpt_path", "{root}/empty.ckpt"], "cannot be read as a checkpoint"),
    "pickled code": ([*PENDULUM, "--ckpt_path", "{root}/code.ckpt"], "cannot be read as a checkpoint"),
    "folder": ([*PENDULUM, "--ckpt_path", "{root}/folder.ckpt"], "not a checkpoint, or one that was not finished"),
    "foreign checkpoint": ([*PENDULUM, "--ckpt_path", "{root}/foreign.ckpt"], "no checkpoint of this application"),
    "later format": ([*PENDULUM, "--ckpt_path", "{root}/later.ckpt"], "has format 99"),
    "weights alone": ([*PENDULUM, "--ckpt_path", "{root}/weights.ckpt"], "holds weights alone"),
    "other class": ([*PENDULUM, "--ckpt_path", "{root}/other_class.ckpt"], "holds a jepa_lightning.IJEPA"),
    "evil class": ([*PENDULUM, "--ckpt_path", "{root}/evil.ckpt"], "holds a evil_module.Model"),
    "URL of nothing": ([*PENDULUM, "--ckpt_path", "memory://nothing.ckpt"], "No checkpoint at memory://nothing.ckpt"),
    "unknown protocol": ([*PENDULUM, "--ckpt_path", "gopher://x/last.ckpt"], "gopher"),
    "root of an unknown protocol": ([*PENDULUM, "--trainer.default_root_dir", "gopher://x"], "gopher"),
    "another batch size": (
        [*PENDULUM, "--ckpt_path", "{root}/run/checkpoints/last.ckpt", "--data.batch_size", "4"],
        "was on 8 samples, and now it would be on 4",
    ),
    "other accumulation": (
        [*PENDULUM, "--ckpt_path", "{root}/run/checkpoints/last.ckpt", "--trainer.accumulate_grad_batches", "2"],
        "was on 8 samples, and now it would be on 16",
    ),
    "other physics": (
        [*PENDULUM, "--ckpt_path", "{root}/run/checkpoints/last.ckpt", "--data.gravity", "1.6", "--trainer.max_epochs", "2"],
        "gravity",
    ),
    "probe of an unknown class": (
        ["--model", "DecoderProbe", "--model.checkpoint", "{root}/unknown_class.ckpt", "--data", "DoublePendulum", *CPU],
        "import it first",
    ),
}  # fmt: skip


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(
    name: str, run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = MISTAKES[name]
    arguments = [argument.format(root=run_directory) if "{root}" in argument else argument for argument in arguments]
    if "--trainer.default_root_dir" not in arguments:
        arguments = [*arguments, "--trainer.default_root_dir", str(tmp_path / "new")]
    monkeypatch.syspath_prepend(run_directory)  # where evil_module is
    before = files(run_directory)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *arguments])
    assert stopped.value.code not in (0, None)
    error = capsys.readouterr().err
    sentence = error[error.index("error: ") :]
    assert message in sentence, sentence
    assert "Traceback" not in error and len(sentence.splitlines()) <= 6, sentence
    assert files(run_directory) == before, "nothing is overwritten, and nothing evil was here"
    assert not list(tmp_path.rglob("*.ckpt"))


def test_barebones_runs(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="self.log"):
        main(["fit", *PENDULUM, "--trainer.default_root_dir", str(tmp_path), "--trainer.barebones", "true"])
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("events*"))


def test_a_wrong_subcommand_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fti"])
    assert "did you mean fit?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["callbacks", "datamodules"])
def test_a_foreign_package_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("")
    for command in (["-m", "jepa_lightning", "fit"], ["-c", "import jepa_lightning"]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert f"needs its own package '{name}', and Python finds {tmp_path / name}.py" in last
        assert "Traceback" not in done.stderr or command[0] == "-c"
