"""What is chosen for a user who does not say it: the device, the run directory, and what a run has kept."""

import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from datamodules.batches import ImageBatch, ViewBatch
from jepa_lightning import probes
from jepa_lightning.dynamics import DynamicsJEPA
from jepa_lightning.dynamics_checks import sizes_of
from jepa_lightning.image_jepa import ImageJEPA
from jepa_lightning.jepa import JEPA
from jepa_lightning.weights.checkpoints import read_checkpoint
from jepa_lightning.weights.io import AtomicCheckpointIO
from jepa_lightning.weights.runs import data_of, run_directory


def accelerator(asked: str) -> str:
    """What to compute on: as asked, but on a Mac the CPU unless its GPU is asked for."""
    if asked == "auto" and not torch.cuda.is_available() and torch.backends.mps.is_available():
        rank_zero_info(
            "This Mac's CPU computes: on its GPU (MPS) nothing was tested. Choose it with --trainer.accelerator mps."
        )
        return "cpu"
    return asked


def default_run_directory(model: Any) -> Path:
    """Where a run is written if nobody says so: runs/CLASS, and for a probe a folder in the run directory of its JEPA."""
    kind = model.class_path.rsplit(".", 1)[-1]
    checkpoint = model.get("init_args", {}).get("checkpoint")
    probed = run_directory(checkpoint) if checkpoint else None
    if probed is None:
        return Path("runs") / kind
    modules = {cls.__name__: cls.__module__.rsplit(".", 1)[-1] for cls in vars(probes).values() if isinstance(cls, type)}
    return probed / modules.get(kind, kind)


def config_file(name: str) -> str:
    """The file of a configuration: a path as it is, or the name of one that comes with the program, "ijepa/cifar10_cpu".

    Raises:
        ArgumentError: There is neither; the names are listed.
    """
    if not name or Path(name).is_file():
        return name
    package = Path(__file__).parent
    root = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    file = root / Path(name.removeprefix("configs/")).with_suffix(".yaml")
    if file.is_file():
        return str(file)
    known = sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))
    raise ArgumentError(None, f"There is no configuration {name}: give a file, or one of {', '.join(known)}.")


def with_config_files(args: list[str]) -> list[str]:
    """Arguments with the file in the place of each name of a configuration."""
    found = list(args)
    for place, argument in enumerate(args):
        if argument in ("-c", "--config") and place + 1 < len(args):
            found[place + 1] = config_file(args[place + 1])
        elif argument.startswith("--config="):
            found[place] = f"--config={config_file(argument.removeprefix('--config='))}"
    return found


def with_the_run(args: list[str]) -> list[str]:
    """Arguments completed by what a run has kept.

    For a probe that is the data of its JEPA's run, see `with_data_of_the_run`; for validate, test and predict on a
    checkpoint, where no configuration is given, that of the checkpoint's run.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, or the data to be read is not known.
    """
    named = dict(options(args))
    path, chosen = named.get("--ckpt_path"), named.keys() & {"-c", "--config", "--model", "--model.class_path"}
    if args[:1] not in (["validate"], ["test"], ["predict"]) or chosen:
        return with_data_of_the_run(args)
    if path in (None, "last"):
        return args
    assert path is not None
    directory = run_directory(path)
    if directory is not None:
        # Where the run lies now, which may not be where it was made.
        return [args[0], "--config", str(directory / "config.yaml"), f"--trainer.default_root_dir={directory}", *args[1:]]
    checkpoint = read_checkpoint(path)
    model = checkpoint["hyper_parameters"].get("_class_path") or checkpoint.get("class", "")
    found = ["--model", model] if model.startswith("jepa_lightning.") else []  # a file never chooses what is imported
    size = checkpoint["hyper_parameters"].get("image_size")
    if "--data" not in named and "--data.root" in named and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        found += ["--data", "ImageFolder", f"--data.image_size=[{height}, {width}]"]
    return [args[0], *found, *args[1:]]


def with_data_of_the_run(args: list[str]) -> list[str]:
    """Arguments of a probe, with the data module of the run that it reads in front, which all others may change.

    Args:
        args: As they were given; they stay so where they do not say what is probed, or choose a class of data first.

    Raises:
        ValueError: The run's data is not known, and none is chosen.
    """
    checkpoint: str | None = None
    sections: list[dict[str, Any]] = []  # what is said of data, in order
    for name, value in options(args):
        content: Any = {}
        if name in ("-c", "--config") and Path(value).is_file():
            try:
                content = yaml.safe_load(Path(value).read_text())
            except yaml.YAMLError:
                return args  # the parser says what is wrong with it
        elif name in ("--model.checkpoint", "--model.init_args.checkpoint"):
            content = {"model": {"init_args": {"checkpoint": value}}}
        elif name in ("--data", "--data.class_path"):
            content = {"data": {"class_path": value}}
        if isinstance(content, dict):
            model, data = content.get("model"), content.get("data")
            given = model.get("init_args") if isinstance(model, dict) else None
            checkpoint = (given.get("checkpoint") if isinstance(given, dict) else None) or checkpoint
            sections += [data] if isinstance(data, dict) else []
    chosen = [section["class_path"] for section in sections if "class_path" in section]
    if checkpoint is None or not sections or "class_path" in sections[0]:
        return args
    data = data_of(checkpoint)
    if data is not None:
        return [args[0], "--data", json.dumps(data), *args[1:]]
    if not chosen:
        raise ValueError(
            f"The data of {checkpoint} is not known, since no config.yaml of its run lies next to it: choose a class with "
            "--data, such as --data ImageFolder --data.root FOLDER --data.image_size 32."
        )
    return [args[0], "--data", chosen[0], *args[1:]]


def options(args: list[str]) -> Iterator[tuple[str, str]]:
    """Names and values of --name=value and --name value, in order."""
    for name, following in zip(args, [*args[1:], ""], strict=True):
        if name.startswith("-"):
            yield tuple(name.split("=", 1)) if "=" in name else (name, following)  # type: ignore[misc]


def model_built_for_data(section: Any) -> type[JEPA] | None:
    """The class of a configuration's model, if that takes its sizes from its data, and there is some."""
    if section.get("model") is None or section.get("data") is None:
        return None
    found = class_named(section.model.class_path)
    return found if issubclass(found, DynamicsJEPA | ImageJEPA) else None


def class_named(path: str) -> Any:
    """A class by the path of its module and its name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def arguments_of_checkpoint(hparams: dict[str, Any], model: Any) -> dict[str, Any]:
    """Arguments of a checkpoint's model; those that came after it have their defaults, whatever a configuration says.

    Args:
        hparams: What the checkpoint has of them.
        model: The configuration's section of the model.
    """
    stored = {name: value for name, value in hparams.items() if name not in ("_class_path", "_instantiator")}
    kind = class_named(model.class_path) if model.get("class_path") else None
    if kind is None or not issubclass(kind, JEPA):  # probes leave out of a checkpoint what may differ from test to test
        return stored
    known = inspect.signature(kind).parameters
    later = [name for name in vars(model.get("init_args", Namespace())) if name in known and name not in stored]
    return {name: known[name].default for name in later if known[name].default is not inspect.Parameter.empty} | stored


def sizes_for(model: type[JEPA], data: Any) -> dict[str, Any]:
    """What a data module says of its observations, by the names of a model's arguments; nothing if they do not fit."""
    if issubclass(model, DynamicsJEPA):
        return sizes_of(data)
    if getattr(data, "batch_type", None) not in (ImageBatch, ViewBatch):
        return {}
    found = {
        "image_size": getattr(data, "image_size", None),
        "channels": getattr(getattr(data, "pixels", None), "channels", None),
    }
    known = inspect.signature(model).parameters
    return {name: value for name, value in found.items() if value is not None and name in known}


def is_overruled(asked: Any, loaded: Any) -> bool:
    """Whether a value that was asked for, or any that it consists of, is another one than what is loaded."""
    if isinstance(asked, Namespace) and isinstance(loaded, Namespace):
        return any(is_overruled(value, loaded.get(name, value)) for name, value in vars(asked).items())
    return asked is not None and asked != loaded


def requeued(root: str) -> bool:
    """Whether a batch system has started this job again after its signal had it saved."""
    return SLURMEnvironment.detect() and any(Path(root).glob("hpc_ckpt_*.ckpt"))


def with_atomic_writing(plugins: list[Any]) -> list[Any]:
    """Plugins with our writer of checkpoints among them, inside of Lightning's asynchronous one if that is asked for."""
    given = [plugin for plugin in plugins if isinstance(plugin, CheckpointIO)]
    for plugin in given:
        if isinstance(plugin, AsyncCheckpointIO) and plugin.checkpoint_io is None:
            plugin.checkpoint_io = AtomicCheckpointIO()
    return plugins if given else [*plugins, AtomicCheckpointIO()]


def as_list(value: Any) -> list[Any]:
    """None, one thing or a list of things, as a list."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def check_writable(directory: Path) -> None:
    """Make the run directory.

    Raises:
        ValueError: It cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have been first
    except OSError as error:
        raise ValueError(
            f"The run directory {directory} cannot be written to ({error.strerror}): choose another with "
            "--trainer.default_root_dir."
        ) from error
