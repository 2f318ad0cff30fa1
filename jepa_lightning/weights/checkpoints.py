"""Models out of checkpoints, with clear errors."""

import os
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

from callbacks.checkpointing import is_local
from jepa_lightning.jepa import JEPA
from jepa_lightning.signature import FORMAT_VERSION, class_name
from jepa_lightning.weights.io import read_file, read_url
from jepa_lightning.weights.runs import checkpoint_of

ModuleType = TypeVar("ModuleType", bound=LightningModule)

SHARDED = "meta.pt"
"""File of a sharded checkpoint's folder that is written last, and holds all that is not a tensor."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint's content, read without running any code in it (weights_only).

    Args:
        path: A file, the folder of a sharded checkpoint (of which all but the weights is read), a run directory (whose
            checkpoints/last.ckpt is read), or a URL.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, damaged, or no Lightning checkpoint.
    """
    path = checkpoint_of(path)
    if not is_local(path):
        checkpoint = read_url(str(path))
    elif Path(path).is_dir():
        if not (Path(path) / SHARDED).is_file():
            raise ValueError(f"{path} is a folder without {SHARDED}: not a checkpoint, or one that was not finished.")
        checkpoint = {"state_dict": {}, "optimizer_states": []} | read_file(Path(path) / SHARDED)
    elif Path(path).is_file():
        checkpoint = read_file(Path(path))
    else:
        raise FileNotFoundError(f"No checkpoint at {path}. Train first, or give the path of an existing .ckpt file.")
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or "hyper_parameters" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of this application: it has no state_dict with hyper_parameters.")
    if (version := checkpoint.get("format_version", 0)) > FORMAT_VERSION:
        raise ValueError(f"{path} has format {version}, and this version reads up to {FORMAT_VERSION}: update it.")
    return checkpoint


def load_jepa(path: str | os.PathLike[str]) -> JEPA:
    """The JEPA in a checkpoint, on the CPU, in evaluation mode.

    Args:
        path: Path of a checkpoint written by `jepa-lightning fit`, whichever family the model is of. With `DESCRIBED` behind
            the path of a probe, the JEPA that it was fitted on as it was built, whose weights come with the probe.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, or holds something other than a JEPA.
    """
    if str(path).endswith(DESCRIBED):
        described = read_checkpoint(str(path).removesuffix(DESCRIBED))[RECORD]
        jepa = _known(path, described["class"], JEPA)(**described["hyper_parameters"])  # type: ignore[type-abstract]
        jepa.on_load_checkpoint(described)
        jepa.built_with = described["hyper_parameters"]
        return jepa.eval()
    return _load(path, read_checkpoint(path), JEPA)  # type: ignore[type-abstract]


def load_any(path: str | os.PathLike[str]) -> LightningModule:
    """The JEPA or the probe in a checkpoint, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, or holds something else.
    """
    return _load(path, read_checkpoint(path), LightningModule)


def load_probe(path: str | os.PathLike[str], kind: type[ModuleType]) -> ModuleType:
    """A fitted probe of the given class, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, or holds something else.
    """
    return _load(path, read_checkpoint(path), kind)


RECORD, DESCRIBED = "jepa", "#jepa"
"""Key in a probe's checkpoint under which its JEPA is described, so that the JEPA's own file may be gone; and what stands
behind the probe's path to name that description."""


def record(jepa: JEPA) -> dict[str, Any]:
    """What a JEPA can be built from again, without its weights."""
    trained_on = getattr(jepa, "trained_on", None)
    # Not its hparams: in the command line, what is built inside of a probe is given the probe's.
    described = {"class": class_name(type(jepa)), "hyper_parameters": jepa.built_with}
    known = getattr(jepa, "known_pixels", None)
    described |= {} if known is None else {"pixels": known.to_dict()}
    return described | {"trained_on": trained_on or {}, "views": trained_on}  # the keys of the two families


def _load(path: str | os.PathLike[str], checkpoint: dict[str, Any], kind: type[ModuleType]) -> ModuleType:
    if not checkpoint["state_dict"]:
        raise ValueError(
            f"{path} is sharded: make one file of it with "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {path}`."
        )
    found = _known(path, checkpoint.get("class"), kind)
    # Not by load_from_checkpoint, which would import whatever "_instantiator" names.
    arguments = {name: value for name, value in checkpoint["hyper_parameters"].items() if not name.startswith("_")}
    if RECORD in checkpoint and not os.path.exists(arguments["checkpoint"]):
        arguments["checkpoint"] = f"{path}{DESCRIBED}"
    try:
        model = found(**arguments)
        if isinstance(model, JEPA):
            model.built_with = arguments
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit this version of {found.__name__}: {reason}") from error
    return model.eval()


def _known(path: str | os.PathLike[str], name: str | None, kind: type[ModuleType]) -> type[ModuleType]:
    """The class of that name, if it is imported already and derived from `kind`: a file never chooses what to import."""
    known = {class_name(cls): cls for cls in _family(kind)}
    known |= {cls.__name__: cls for cls in known.values() if cls.__module__.startswith("jepa_lightning.")}  # older files
    if name not in known:
        ours = name is None or name.removeprefix("jepa_lightning.") != name
        holds = "a model of unknown class" if name is None else name.rsplit(".", 1)[-1] if ours else name
        hint = "" if ours else " If that is a class of your own, import it first."
        raise ValueError(f"{path} holds {holds}, not a {kind.__name__}.{hint}")
    return known[name]


def _family(kind: type[ModuleType]) -> list[type[ModuleType]]:
    """A class and everything derived from it."""
    return [kind, *(cls for child in kind.__subclasses__() for cls in _family(child))]
