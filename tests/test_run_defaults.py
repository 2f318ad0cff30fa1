"""What a command is completed with: configurations by name, the data of a probed run, what a checkpoint's run has kept."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import small_ijepa, trainer

from jepa_lightning.run_defaults import default_run_directory, options, with_data_of_the_run, with_the_run
from jepa_lightning.weights.runs import checkpoint_of, data_of, run_directory

DATA = {"class_path": "datamodules.ImageFolder", "init_args": {"image_size": 32, "root": "somewhere"}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory, with blanks and letters of other alphabets in its name."""
    root = tmp_path / "a run é"
    made = trainer(root)
    made.strategy.connect(small_ijepa())
    made.save_checkpoint(root / "checkpoints" / "last.ckpt")
    (root / "config.yaml").write_text(yaml.safe_dump({"data": DATA, "model": {"class_path": "jepa_lightning.IJEPA"}}))
    return root


def config(root: Path, name: str, **content: object) -> str:
    (root / name).write_text(yaml.safe_dump(content))
    return str(root / name)


def test_options_are_read_in_both_spellings() -> None:
    assert list(options(["fit", "--a", "1", "--b.c=2=3", "-c", "x"])) == [("--a", "1"), ("--b.c", "2=3"), ("-c", "x")]


def test_a_run_is_known_by_its_directory_and_by_its_checkpoint(run: Path) -> None:
    last = run / "checkpoints" / "last.ckpt"
    assert run_directory(run) == run_directory(last) == run and data_of(last) == DATA
    assert checkpoint_of(run) == last and checkpoint_of(last) == last and checkpoint_of("memory://x") == "memory://x"
    assert run_directory(run.parent) is None and run_directory("memory://x") is None and data_of(run.parent) is None


def test_a_probe_inherits_the_data_of_the_run_that_it_reads(run: Path, tmp_path: Path) -> None:
    probe = config(tmp_path, "probe.yaml", model={"class_path": "KNNProbe"}, data={"init_args": {"batch_size": 2}})
    inherited = ["--data", json.dumps(DATA)]
    for flag in (["--model.checkpoint", str(run)], [f"--model.init_args.checkpoint={run}"]):
        assert with_data_of_the_run(["test", "--config", probe, *flag]) == ["test", *inherited, "--config", probe, *flag]
    named = config(tmp_path, "named.yaml", model={"init_args": {"checkpoint": str(run)}}, data={"init_args": {"seed": 1}})
    assert with_data_of_the_run(["fit", "--config", named])[1:3] == inherited
    other = ["--model.checkpoint", str(run), "--data", "SyntheticImages"]
    assert with_data_of_the_run(["test", *other]) == ["test", *other], "data that is chosen first"
    assert with_data_of_the_run(["test", "--config", probe, *other])[1:3] == inherited, "another class may still follow"
    whole = config(tmp_path, "whole.yaml", model={"class_path": "KNNProbe"}, data=DATA)
    arguments = ["test", "--config", whole, "--model.checkpoint", str(run)]
    assert with_data_of_the_run(arguments) == arguments
    assert with_data_of_the_run(["fit", "--config", probe]) == ["fit", "--config", probe], "nothing is probed"


def test_data_that_is_not_known_must_be_chosen(tmp_path: Path) -> None:
    probe = config(tmp_path, "probe.yaml", data={"init_args": {"batch_size": 2}})
    arguments = ["test", "--config", probe, "--model.checkpoint", str(tmp_path / "alone.ckpt")]
    with pytest.raises(ValueError, match=r"data of .*alone.ckpt is not known.*choose a class with --data"):
        with_data_of_the_run(arguments)
    chosen = [*arguments, "--data", "ImageFolder"]
    assert with_data_of_the_run(chosen) == ["test", "--data", "ImageFolder", *chosen[1:]]


def test_a_file_that_is_no_yaml_is_left_to_the_parser(tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text("a: [")
    arguments = ["fit", "--config", str(tmp_path / "odd.yaml")]
    assert with_data_of_the_run(arguments) == arguments


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_checkpoint_brings_the_configuration_of_its_run(run: Path, command: str) -> None:
    given = ["--ckpt_path", str(run), "--data.root", "x"]
    kept = ["--config", str(run / "config.yaml"), f"--trainer.default_root_dir={run}"]
    assert with_the_run([command, *given]) == [command, *kept, *given], "where the run lies now"
    assert with_the_run([command, *given, "--model.momentum=1"]) == [command, *kept, *given, "--model.momentum=1"]
    for more in (["--config", "mine.yaml"], ["--model", "IJEPA"], ["-c", "mine.yaml"], ["--model.class_path=IJEPA"]):
        assert with_the_run([command, *given, *more]) == [command, *given, *more]
    assert with_the_run([command, "--ckpt_path", "last"]) == [command, "--ckpt_path", "last"]
    assert with_the_run([command]) == [command]
    assert with_the_run(["fit", *given]) == ["fit", *given], "training goes on with its own configuration"


def test_a_checkpoint_alone_says_its_class_and_size(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.ckpt"
    (run / "checkpoints" / "last.ckpt").rename(alone)
    given = ["--ckpt_path", str(alone)]
    model = ["--model", "jepa_lightning.ijepa.IJEPA"]
    assert with_the_run(["validate", *given]) == ["validate", *model, *given]
    found = with_the_run(["predict", *given, "--data.root", "x"])
    assert found == ["predict", *model, "--data", "ImageFolder", "--data.image_size=[16, 16]", *given, "--data.root", "x"]
    content = torch.load(alone, weights_only=True)
    content["class"] = "evil.Model"
    torch.save(content, alone)
    assert with_the_run(["validate", *given]) == ["validate", *given], "a file never chooses what is imported"


def test_a_probe_is_written_into_the_directory_of_its_jepa(run: Path) -> None:
    def model(kind: str, **arguments: str) -> object:
        return SimpleNamespace(class_path=f"jepa_lightning.{kind}", get=lambda name, default: arguments or default)

    assert default_run_directory(model("probes.KNNProbe", checkpoint=str(run))) == run / "knn"
    assert default_run_directory(model("probes.LinearProbe", checkpoint=f"{run}/checkpoints/last.ckpt")) == run / "linear"
    assert default_run_directory(model("probes.KNNProbe", checkpoint="gone.ckpt")) == Path("runs/KNNProbe")
    assert default_run_directory(model("IJEPA")) == Path("runs/IJEPA")
