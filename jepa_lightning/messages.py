"""What a user can mend, in as few words as it takes."""

import difflib
import inspect
import re
from collections.abc import Iterable, Iterator

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

DESCRIPTION = "Train, evaluate and use joint-embedding predictive architectures (JEPA)."

USAGE = """jepa-lightning COMMAND --config NAME [--config OVERLAY] [--any.key value]

NAME is a file, or one of this program's such as ijepa/cifar10_cpu. --model.help IJEPA and --data.help ImageFolder explain
each argument of a class, --print_config shows what would be run."""

# What jsonargparse adds to an error about a value that may be a class or nothing. Between these stand the reason and, if
# it is short, "Given value: ...".
NOISE = (
    *("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Problem with given"),
    *("Given value type", "Given value: NestedArg", "Given value: Namespace", "Given value: {"),
)


def readable(error: BaseException, causes: tuple[type[BaseException], ...]) -> str:
    """The message of what a user can mend, without the wrapping that says which types were tried.

    Args:
        error: Error as it was raised.
        causes: Types of error that say what a user can mend, where they stand behind a wrapping.

    Returns:
        A line or a few, with what may have been meant where a name is not known.
    """
    while str(error).startswith(NOISE[0]) and isinstance(error.__cause__, causes):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [
        line.removeprefix("- ") for line in lines if line and not line.startswith(NOISE) and not line[2:].startswith(NOISE)
    ]
    text = "\n  ".join(kept)
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        key = re.search(r'Parser key "([^"]+)"', text)
        where = f"{key[1]}: " if key else ""
        return f"{where}there is no class {found[1]}{meant(found[1], class_names())}"
    if found := re.search(r"unrecognized arguments: --([\w.]+)", text):
        return f"there is no argument --{found[1]}{meant(found[1], argument_names())}"
    if found := re.search(r"Option '(\w+)' is not accepted", text):
        return text + meant(found[1], {name.rsplit(".", 1)[-1] for name in argument_names()})
    if found := re.search(r"invalid choice: '(\w+)' \(choose from (.*)\)", text):
        return text + meant(found[1], re.findall(r"'(\w+)'", found[2]))
    return text


def with_file_name(text: str, arguments: list[str]) -> str:
    """A message about a configuration, with the name of the last file that was given: it is mostly the one."""
    files = [arguments[place + 1] for place, argument in enumerate(arguments[:-1]) if argument in ("-c", "--config")]
    if not files:
        return text
    return text.replace("<unicode string>", files[-1]).replace("Unexpected config:", f"Unexpected config {files[-1]}:")


def meant(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the known one that is most like it, if any is."""
    found = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f": did you mean {found[0]}?" if found else "."


def class_names() -> set[str]:
    """Names of the models, data modules, callbacks and loggers that are imported."""
    return {cls.__name__ for base in (LightningModule, LightningDataModule, Callback, Logger) for cls in children(base)}


def argument_names() -> set[str]:
    """Names of the command line's arguments."""
    owners = {"model": LightningModule, "data": LightningDataModule}
    names = {"config", "ckpt_path", "seed_everything", *(f"trainer.{name}" for name in arguments(Trainer))}
    return names | {f"{key}.{name}" for key, base in owners.items() for cls in children(base) for name in arguments(cls)}


def children(base: type) -> Iterator[type]:
    """All classes that are derived from one."""
    cls: type
    for cls in base.__subclasses__():
        yield cls
        yield from children(cls)


def arguments(cls: type) -> list[str]:
    """Names of a constructor's arguments."""
    return [name for name in inspect.signature(cls).parameters if name not in ("self", "args", "kwargs")]
