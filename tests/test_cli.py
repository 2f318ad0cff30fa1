"""The command line: defaults, resume, and one clear message for each mistake."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

from jepa_lightning import PendulumJEPA
from jepa_lightning.cli import main
from jepa_lightning.jepa import TargetPairs
from jepa_lightning.weights.checkpoints import read_checkpoint
from jepa_lightning.weights.io import AtomicCheckpointIO

SMALL = [
    "--config", str(ROOT / "configs" / "pendulum" / "coordinates.yaml"),
    "--model.encoder_widths", "[8]", "--model.latent_dim", "4", "--model.predictor_width", "8", "--model.horizon", "4",
    "--data.size", "32", "--data.val_size", "4", "--data.batch_size", "8",
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1",
]  # fmt: skip


def fit(root: Path, *extra: str) -> None:
    main(["fit", *SMALL, "--trainer.default_root_dir", str(root), *extra])


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--model.horizn", "3"], "'horizn' is not accepted", 2),
        (["--data.sise", "3"], "'sise' is not accepted", 2),
        (["--trainr.max_steps", "3"], "--trainr.max_steps", 2),
        (["--model.horizon", "many"], "many", 2),
        (["--config", "nowhere.yaml"], "nowhere.yaml", 2),
        (["--data.size", "0"], "data.size=0", 1),
        (["--model.horizon", "40"], "model.horizon=40", 1),
        (["--model.regularizer", "vicrag"], "vicrag", 2),
        (["--model.regularizer_weights", '{"kov": 1}'], "'kov'", 1),
        (["--model.observation", "pixels", "--data.observation", "pixels", "--data.image_size", "16",
          "--model.image_size", "16", "--model.encoder_widths", "[4,4,4]"], "model.image_size=16 is too small", 1),
        (["--ckpt_path", "nowhere.ckpt"], "No checkpoint at nowhere.ckpt", 1),
        (["--trainer.max_epochs", "-1"], "trainer.max_epochs or trainer.max_steps", 1),
    ],
)  # fmt: skip
def test_a_mistake_is_named_in_one_message(
    arguments: list[str], message: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path, *arguments)
    assert stopped.value.code == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error and len(error[error.index("error:") :].splitlines()) <= 6


def test_a_run_directory_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match="1"):
        fit(tmp_path / "file" / "run")
    assert "cannot be written to" in capsys.readouterr().err


def test_truncated_checkpoint_is_named_before_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fit(tmp_path)
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="1"):
        fit(tmp_path, "--ckpt_path", str(path))
    assert "last.ckpt cannot be read" in capsys.readouterr().err


def test_defaults_of_a_run(tmp_path: Path) -> None:
    fit(tmp_path, "--trainer.log_every_n_steps", "1")
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4 and checkpoint["class"] == "jepa_lightning.pendulum.PendulumJEPA"
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"context_encoder", "target_encoder", "predictor"}
    assert checkpoint["callbacks"]["Stopwatch"]["seconds"] > 0
    assert (tmp_path / "checkpoints" / "best.ckpt").exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"val/rankme", "val/linear_r2_omega2", "lr-AdamW/decay", "lr-AdamW/decay-weight_decay"} <= scalars


def test_checkpoints_of_a_run_are_written_so_that_a_kill_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, save = [], AtomicCheckpointIO.save_checkpoint

    def record(self: AtomicCheckpointIO, checkpoint: dict, path: str, storage_options: object = None) -> None:
        written.append(Path(path).name)
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", record)
    fit(tmp_path)
    assert set(written) >= {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"best.ckpt", "last.ckpt"}


def test_second_run_writes_the_same_files(tmp_path: Path) -> None:
    fit(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*exists and is not empty.*")  # which is what is tried here
        fit(tmp_path, "--trainer.max_epochs", "2")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last-1.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8


def test_overruled_model_arguments_are_said(tmp_path: Path) -> None:
    fit(tmp_path)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.warns(UserWarning, match=r"model\.learning_rate=0\.5 is overruled by 0\.00"):
        main(["validate", *SMALL, "--trainer.default_root_dir", str(tmp_path), "--ckpt_path", last,
              "--model.learning_rate", "0.5"])  # fmt: skip


def test_last_takes_over_the_arguments_of_the_last_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path)
    with pytest.warns(UserWarning, match=r"model\.latent_dim=6 is overruled by 4"):
        fit(tmp_path, "--ckpt_path", "last", "--model.latent_dim", "6", "--trainer.max_epochs", "2")
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8


def test_an_argument_that_came_after_a_checkpoint_has_its_default(tmp_path: Path, image_root: Path) -> None:
    """And not the value that a configuration gives it: the checkpoint has no weights for that."""
    common = [f"--trainer.default_root_dir={tmp_path}", f"--data.root={image_root}", "--data.num_workers=0"]
    common += ["--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false", "--data.batch_size=4"]
    small = ["--model.encoder_depth=1", "--model.predictor_depth=1", "--model.compile_networks=false"]
    once = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--model.view_weight=0", "--data.views=null"]
    main(["fit", "--config", "ijepa/folder", *common, *small, *once])
    last = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    for name in ("view_weight", "view_start_fraction"):
        del checkpoint["hyper_parameters"][name]
    torch.save(checkpoint, last)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        main(["validate", "--config", "ijepa/folder", *common, "--ckpt_path=last"])
    assert [w for w in said if "model.view_weight=1.0 is overruled by 0.0 from the checkpoint" in str(w.message)]


def test_a_run_without_a_directory_goes_to_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = [*SMALL, "--trainer.default_root_dir", "null"]
    main(["fit", *small])
    assert (tmp_path / "runs" / "PendulumJEPA" / "checkpoints" / "last.ckpt").exists()


def test_a_users_callback_takes_the_place_of_the_default(tmp_path: Path) -> None:
    fit(tmp_path, "--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_train_steps=3")
    steps = [
        torch.load(tmp_path / "checkpoints" / f"{name}.ckpt", weights_only=True)["global_step"]
        for name in ("last-1", "last")
    ]
    assert steps == [3, 4]


def test_a_later_stage_leaves_the_training_config_alone(tmp_path: Path) -> None:
    fit(tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    main(["validate", *SMALL, "--trainer.default_root_dir", str(tmp_path), "--data.seed", "3"])
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_run_that_cannot_go_on_leaves_the_training_config_alone(tmp_path: Path) -> None:
    fit(tmp_path)
    before, last = (tmp_path / "config.yaml").read_text(), tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["state_dict"].popitem()
    torch.save(checkpoint, last)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        fit(tmp_path, "--data.seed", "3", "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert (tmp_path / "config.yaml").read_text() == before


def test_checkpoints_can_be_turned_off_and_plugins_and_one_callback_given(tmp_path: Path) -> None:
    fit(tmp_path, "--trainer.enable_checkpointing", "false", "--trainer.callbacks", "CollapseAlarm",
        "--trainer.plugins", "lightning.pytorch.plugins.environments.LightningEnvironment")  # fmt: skip
    assert not (tmp_path / "checkpoints").exists()


def test_overlay_changes_only_what_it_names(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model:\n  init_args:\n    horizon: 3\n")
    fit(tmp_path, "--config", str(overlay), "--model.latent_dim", "6")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["init_args"]
    assert saved["horizon"] == 3 and saved["latent_dim"] == 6 and saved["encoder_widths"] == [8]


def test_help_and_module_entry_point() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jepa_lightning", "fit", "--model.help", "PendulumJEPA"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "--model.horizon" in done.stdout and "prediction steps H" in done.stdout


def test_a_run_with_another_logger_goes_on(tmp_path: Path) -> None:
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "logs")]
    fit(tmp_path, *logger)
    fit(tmp_path, *logger, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
    assert list((tmp_path / "logs").rglob("metrics.csv")) and not list((tmp_path / "logs").rglob("*.ckpt"))


def test_auto_begins_where_there_is_nothing_and_goes_on_where_there_is(tmp_path: Path) -> None:
    for epochs in ("1", "2"):
        fit(tmp_path, "--ckpt_path", "auto", "--trainer.max_epochs", epochs)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8


@pytest.mark.parametrize("step", [0, 2])
def test_an_error_in_training_leaves_its_traceback(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = PendulumJEPA.prediction_loss

    def wrong(self: PendulumJEPA, pairs: TargetPairs) -> torch.Tensor:
        if self.global_step == step and self.training:
            raise ValueError("a value that nobody expected")
        return right(self, pairs)

    monkeypatch.setattr(PendulumJEPA, "prediction_loss", wrong)
    with pytest.raises(SystemExit, match="1"):
        fit(tmp_path)
    said = capsys.readouterr().err
    assert "error: a value that nobody expected" in said and f"The traceback is in {tmp_path / 'error.log'}" in said
    log = (tmp_path / "error.log").read_text()
    assert "in wrong" in log and f"optimizer step {step}" in log and f"torch {torch.__version__}" in log


def test_a_mistake_before_training_leaves_no_log(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="1"):
        fit(tmp_path, "--model.horizon", "40")
    assert not (tmp_path / "error.log").exists()


def test_best_is_by_the_guarded_error(tmp_path: Path) -> None:
    fit(tmp_path)
    saved = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["callbacks"]
    (state,) = [state for name, state in saved.items() if name.startswith("BestCheckpoint")]
    assert state["monitor"] == "val/guarded_error"


def test_checkpoints_at_a_url_and_in_the_background(tmp_path: Path) -> None:
    root = f"memory://{tmp_path.name}"
    settings = ["--trainer.logger", "false", "--trainer.plugins", "AsyncCheckpointIO", "--trainer.default_root_dir", root]
    for epochs in ("1", "2"):
        main(["fit", *SMALL, *settings, "--ckpt_path", "auto", "--trainer.max_epochs", epochs])
    assert read_checkpoint(f"{root}/checkpoints/last.ckpt")["global_step"] == 8
    assert not Path("memory:").exists()


def test_a_probe_is_validated_when_the_file_of_its_jepa_is_gone(tmp_path: Path) -> None:
    fit(tmp_path)
    jepa = tmp_path / "checkpoints" / "last.ckpt"
    data = ["--data", "DoublePendulum", "--data.observation", "coordinates", "--data.size", "32", "--data.val_size", "4"]
    probe = ["--model", "DecoderProbe", "--model.checkpoint", str(jepa), *data, "--data.batch_size", "8"]
    probe += ["--trainer.default_root_dir", str(tmp_path / "probe"), "--trainer.accelerator", "cpu"]
    probe += ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    main(["fit", *probe])
    jepa.unlink()
    main(["validate", *probe, "--ckpt_path", "last"])
    with pytest.raises(SystemExit):
        main(["validate", *probe])


def test_help_says_what_is_ours_before_the_trainer(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: jepa-lightning COMMAND --config NAME")
    assert text.index("--model CONFIG") < text.index("--data CONFIG") < text.index("--trainer CONFIG")
