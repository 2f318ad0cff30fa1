"""The command line: one LightningCLI over every module and data module.

    python -m jepa_lightning {fit,validate,test,predict} --config configs/NAME.yaml [--any.key value]

A class may be named without its package (`class_path: PendulumJEPA`), because the packages are imported here.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import ArgsType, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import callbacks  # noqa: F401  (short class names)
import datamodules  # noqa: F401  (short class names)
from callbacks import BestCheckpoint, LastCheckpoint, ProgressLines, Stopwatch
from jepa_lightning import probes  # noqa: F401  (short class names)
from jepa_lightning.checkpoints import read_checkpoint
from jepa_lightning.losses import NonFiniteLossError
from jepa_lightning.storage import AtomicCheckpointIO

TRACEBACK_VARIABLE = "JEPA_TRACEBACK"


class JEPACommandLine(LightningCLI):
    """LightningCLI with this application's defaults: where a run is written, what is monitored, what is saved."""

    def parse_arguments(self, parser: Any, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        section = self._section()
        if section.trainer.get("default_root_dir") is None:
            section.trainer.default_root_dir = str(Path("runs") / section.model.class_path.rsplit(".", 1)[-1])
        self._asked_model = section.get("model")
        last = Path(section.trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if section.get("ckpt_path") == "last" and last.is_file():
            section.ckpt_path = str(last)  # so that its model arguments are taken over, as those of any other path
        elif section.get("ckpt_path") == "last" and self.config.get("subcommand") == "fit":
            section.ckpt_path = None
            rank_zero_info(f"There is no {last} to go on from: training starts at the beginning.")
        if section.get("ckpt_path") not in (None, "last", "best", "hpc", "registry"):
            checkpoint = read_checkpoint(section.ckpt_path)  # for its errors, before Lightning's
            if self.config.get("subcommand") == "fit" and "optimizer_states" not in checkpoint:
                raise ValueError(
                    f"{section.ckpt_path} holds weights alone, as an import does: probes can read it, but there is no "
                    "training in it to go on with."
                )

    def _section(self) -> Any:
        """The configuration of the chosen subcommand."""
        return self.config[self.config.subcommand] if "subcommand" in self.config else self.config

    def before_instantiate_classes(self) -> None:
        section = self._section()
        # A checkpoint's model arguments replace those of the command line and the YAML (Lightning issue 20801).
        if self._asked_model is not None and section.get("ckpt_path"):
            asked = vars(self._asked_model.get("init_args", {}))
            loaded = vars(section.model.get("init_args", {}))
            differing = [name for name in asked if name in loaded and asked[name] != loaded[name]]
            for name in differing:
                warnings.warn(
                    f"model.{name}={asked[name]} is overruled by {loaded[name]} from the checkpoint {section.ckpt_path}: "
                    "a resumed model keeps its arguments.",
                    stacklevel=2,
                )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        section = self._section()
        root = Path(section.trainer.default_root_dir)
        check_writable(root)
        if section.trainer.get("logger") in (None, True):
            kwargs.setdefault("logger", TensorBoardLogger(root, name="", version="", default_hp_metric=False))
        trainer = self.config_init[self.config.subcommand].trainer
        defaults: list[Callback] = [Stopwatch(), ProgressLines()]
        if trainer.enable_checkpointing is not False:
            defaults += [BestCheckpoint(), LastCheckpoint()]
        if trainer.logger is not False:
            defaults.append(LearningRateMonitor("step", log_weight_decay=True))
        given = {type(callback) for callback in as_list(trainer.callbacks)}
        self.trainer_defaults["callbacks"] = [callback for callback in defaults if type(callback) not in given]
        kwargs.setdefault("plugins", [*as_list(trainer.plugins), AtomicCheckpointIO()])
        return super().instantiate_trainer(**kwargs)


def as_list(value: Any) -> list[Any]:
    """None, one thing or a list of things, as a list."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


class SaveFitConfig(SaveConfigCallback):
    """Keep config.yaml of the training: a later test into the same directory leaves it alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


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


USER_ERRORS = (ValueError, OSError, MisconfigurationException, NonFiniteLossError)

# What jsonargparse adds to an error about a value that may be a class or nothing. Between these stand the reason and, if
# it is short, "Given value: ...".
NOISE = (
    *("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Problem with given"),
    *("Given value type", "Given value: NestedArg", "Given value: Namespace", "Given value: {"),
)


def readable(error: BaseException) -> str:
    """The message of what a user can mend, without the wrapping that says which types were tried."""
    while str(error).startswith(NOISE[0]) and isinstance(error.__cause__, USER_ERRORS):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [
        line.removeprefix("- ") for line in lines if line and not line.startswith(NOISE) and not line[2:].startswith(NOISE)
    ]
    return "\n  ".join(kept)


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: Arguments instead of those of the process, as a list of strings.

    Raises:
        SystemExit: With one message for what a user can mend: code 2 for arguments that cannot be parsed, 1 for the rest.
            The environment variable JEPA_TRACEBACK asks for the traceback instead.
    """
    # The target encoder and the networks under a probe are in eval mode on purpose, and StateProbe has no optimizer.
    warnings.filterwarnings("ignore", "`LightningModule.configure_optimizers` returned `None`")
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")
    warnings.filterwarnings("ignore", "The dirpath has changed")  # a report is written beside the probes it tests
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")  # Lightning 2.6.6 on torch 2.15
    try:
        JEPACommandLine(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveFitConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={name: {"exit_on_error": False} for name in LightningCLI.subcommands()} | {"exit_on_error": False},
            trainer_defaults={"log_every_n_steps": 20},
            args=args,
        )
    except (ArgumentError, *USER_ERRORS) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"error: {readable(error)}\n({TRACEBACK_VARIABLE}=1 shows where it was raised)", file=sys.stderr)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
