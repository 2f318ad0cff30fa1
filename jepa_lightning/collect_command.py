"""The command `collect`: record episodes of an environment."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from datamodules.collecting import Collect, collect
from jepa_lightning.run_defaults import config_file

DESCRIPTION = """Record episodes of an environment into a folder of .npz files, from which `data: Trajectories` reads.

`--config` takes the configuration of a training that says data.root and data.collect, such as worlds/tworoom; every argument
can be given, or changed, here. What was cut goes on where it was."""


def run_collect(args: list[str]) -> None:
    """Run the command.

    Args:
        args: Its arguments.

    Raises:
        ArgumentError: They cannot be parsed.
        ValueError: They make no sense, or the environment cannot be made.
    """
    parser = ArgumentParser(prog="jepa-lightning collect", description=DESCRIPTION, exit_on_error=False)
    parser.add_argument("--config", type=str | None, help="Configuration of a training, by its path or name.")
    parser.add_argument("--root", type=str | None, help="Folder of the recording.")
    parser.add_class_arguments(Collect)
    for place, argument in enumerate(args):
        name, _, value = argument.partition("=")
        if name == "--config":
            parser.set_defaults(**_defaults(config_file(value or " ".join(args[place + 1 : place + 2]))))
    given = parser.parse_args(args)
    if given.root is None:
        raise ValueError("Give the folder of the recording: --root FOLDER.")
    settings = parser.instantiate_classes(given)
    collect(Collect(**{name: getattr(settings, name) for name in Collect.__dataclass_fields__}), given.root)
    print(f"{given.episodes} episodes are in {given.root}.")


def _defaults(path: str) -> dict[str, Any]:
    """Root and settings in the data section of a configuration, by the names of this command's arguments.

    Raises:
        ValueError: It has no data.collect.
    """
    content = yaml.safe_load(Path(path).read_text())
    data = (content.get("data") or {}).get("init_args") or {}
    if "collect" not in data:
        raise ValueError(f"{path} has no data.collect: it says nothing of how its data is recorded.")
    return {"root": data.get("root"), **_flat(data["collect"])}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names; what dictionaries of arguments hold stays together."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        nested = isinstance(value, dict) and name == "environment"
        found |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found
