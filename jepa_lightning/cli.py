"""The command line: one LightningCLI over every module and data module.

    python -m jepa_lightning {fit,validate,test,predict} --config configs/NAME.yaml [--any.key value]

A class may be named without its package (`class_path: PendulumJEPA`), because the packages are imported here.
"""

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import ArgsType, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

import callbacks  # noqa: F401  (short class names)
import datamodules  # noqa: F401  (short class names)
from callbacks import (
    BestCheckpoint,
    EmbeddingWriter,
    ErrorLog,
    LastCheckpoint,
    Preemption,
    ProgressLines,
    StartUp,
    Stopwatch,
)
from callbacks.checkpointing import checkpoint_folder, checkpoints_to_resume, is_local
from callbacks.startup import quiet
from jepa_lightning import cpu, probes  # noqa: F401  (short class names)
from jepa_lightning.collect_command import run_collect
from jepa_lightning.finite import NonFiniteError
from jepa_lightning.messages import DESCRIPTION, USAGE, readable, with_file_name
from jepa_lightning.run_defaults import (
    accelerator,
    arguments_of_checkpoint,
    as_list,
    check_writable,
    default_run_directory,
    is_overruled,
    model_built_for_data,
    options,
    requeued,
    sizes_for,
    with_atomic_writing,
    with_config_files,
    with_the_run,
)
from jepa_lightning.weights.checkpoints import DESCRIBED, read_checkpoint
from jepa_lightning.weights.loading import start_from
from jepa_lightning.weights.runs import checkpoint_of

TRACEBACK_VARIABLE = "JEPA_TRACEBACK"


class JEPACommandLine(LightningCLI):
    """LightningCLI with this application's defaults: where a run is written, what is monitored, what is saved.

    `--ckpt_path last` is the newest checkpoint of the run that can be read, an error without one; "auto" then begins anew.
    """

    config: Any

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument(
            "--init_from",
            type=str | None,
            help="Weights that a new training starts from: a run directory, a checkpoint, or a folder of timm's or Hugging "
            "Face's layout. (--ckpt_path goes on with a training that was cut.)",
        )

        # In the help, what is ours comes before the Trainer's forty arguments.
        parser._action_groups.sort(key=lambda group: "every aspect of training" in (group.title or ""))

    def before_fit(self) -> None:
        """Take over weights, unless the run goes on from a checkpoint of its own.

        Raises:
            ValueError: There are no weights where the encoder is not to be trained.
        """
        section = self._section()
        if getattr(self.model, "freeze_encoder", False) and section.init_from is None and section.get("ckpt_path") is None:
            raise ValueError(
                "model.freeze_encoder=true trains the predictor of an encoder that is trained already: give --init_from RUN."
            )
        self._take_weights()

    def _take_weights(self) -> None:
        section = self._section()
        if section.init_from is not None and section.get("ckpt_path") is not None:
            rank_zero_info(f"--init_from is of no account: the run goes on from {section.ckpt_path}.")
        elif section.init_from is not None:
            start_from(self.model, section.init_from)
            rank_zero_info(f"Starting from the weights of {section.init_from}.")

    before_validate = before_test = _take_weights

    def before_predict(self) -> None:
        """Take over weights, and refuse to write embeddings of random ones.

        Raises:
            ValueError: There are no weights.
        """
        section = self._section()
        if section.get("ckpt_path") is None and section.init_from is None:
            raise ValueError("predict needs trained weights: give --ckpt_path RUN, or --init_from SOURCE.")
        self._take_weights()

    def parse_arguments(self, parser: Any, args: ArgsType) -> None:
        given = with_the_run(with_config_files(sys.argv[1:] if args is None else [str(argument) for argument in args]))
        self.config = parser.parse_args(given)
        section = self._section()
        if section.trainer.get("default_root_dir") is None:
            section.trainer.default_root_dir = str(default_run_directory(section.model))
        if self.config.subcommand == "predict" and section.get("return_predictions") is None:
            section.return_predictions = False  # they are written, not kept in memory
        named = {name.replace(".init_args", "") for name, _ in options(given)}
        if "--data.root" in named and "--data.download" not in named and section.data.init_args.get("download"):
            section.data.init_args.download = None  # never into a folder that was named, perhaps with a misspelling
        self._asked_model = parser.parse_args(given, defaults=False)[self.config.subcommand].get("model")
        fit = self.config.get("subcommand") == "fit"
        asked = section.get("ckpt_path")
        asked = "last" if asked is None and fit and requeued(section.trainer.default_root_dir) else asked
        if asked in ("last", "auto"):
            section.ckpt_path = newest_checkpoint(section.trainer.default_root_dir)
            if section.ckpt_path is None and asked == "last":
                raise FileNotFoundError(
                    f"There is no checkpoint in {checkpoint_folder(section.trainer.default_root_dir)} to go on from: check "
                    "--trainer.default_root_dir, or begin at the start with --ckpt_path auto."
                )
            if section.ckpt_path is None:
                rank_zero_info(f"There is no checkpoint in {section.trainer.default_root_dir} yet: training starts.")
        if section.get("ckpt_path") not in (None, "best", "hpc", "registry"):
            section.ckpt_path = str(checkpoint_of(section.ckpt_path))
            self._check_checkpoint(section, fit)

    def _check_checkpoint(self, section: Any, fit: bool) -> None:
        """Read a checkpoint for its errors, before Lightning's, and before anything that it names is imported.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It cannot be read, is of another class than the configuration, or has nothing to go on with.
        """
        checkpoint = read_checkpoint(section.ckpt_path)
        if fit and "optimizer_states" not in checkpoint:
            raise ValueError(
                f"{section.ckpt_path} holds weights alone, as an import does: probes can read it, but there is no "
                "training in it to go on with."
            )
        threads = checkpoint.get("threads", torch.get_num_threads())
        if fit and threads != torch.get_num_threads() and cpu.THREADS_VARIABLE not in os.environ:
            rank_zero_info(f"{threads} thread(s), as in the run that goes on: sums depend on their number.")
            torch.set_num_threads(threads)
        hparams = checkpoint["hyper_parameters"]
        theirs, ours = hparams.get("_class_path"), section.get("model", {}).get("class_path")
        if theirs is not None and theirs != ours:
            raise ValueError(
                f"{section.ckpt_path} holds a {theirs}, and the configuration says {ours or 'nothing'}: give the --config "
                "of its run."
            )
        model = {"class_path": ours, "dict_kwargs": arguments_of_checkpoint(hparams, section.get("model", Namespace()))}
        self.config = self.parser.parse_object({self.config.subcommand: {"model": model}}, self.config)

    def _parse_ckpt_path(self) -> None: ...  # `_check_checkpoint` has taken over the model's arguments

    def _section(self) -> Any:
        """The configuration of the chosen subcommand."""
        return self.config[self.config.subcommand] if "subcommand" in self.config else self.config

    def before_instantiate_classes(self) -> None:
        section = self._section()
        # A checkpoint's model arguments replace those of the command line and the YAML (Lightning issue 20801).
        if self._asked_model is not None and section.get("ckpt_path"):
            asked = vars(self._asked_model.get("init_args", Namespace()))
            loaded = vars(section.model.get("init_args", {}))
            differing = [name for name in asked if is_overruled(asked[name], loaded.get(name, asked[name]))]
            for name in differing:
                warnings.warn(
                    f"model.{name}={asked[name]} is overruled by {loaded[name]} from the checkpoint {section.ckpt_path}: "
                    "a resumed model keeps its arguments.",
                    stacklevel=2,
                )
        arguments = section.get("model", {}).get("init_args", {})
        if section.get("ckpt_path") and arguments.get("checkpoint") and not os.path.exists(arguments["checkpoint"]):
            arguments["checkpoint"] = f"{section.ckpt_path}{DESCRIBED}"

    def instantiate_classes(self) -> None:
        """Build the model of a training for its data: sizes that were not given are those of the data."""
        section, asked = self._section(), self._asked_model
        data = None
        model = None if asked is None or section.get("ckpt_path") is not None else model_built_for_data(section)
        if model is not None:
            data = self._parser(self.config.subcommand).instantiate_classes(Namespace(data=section.data)).data
            given = vars(asked.get("init_args", Namespace()))
            section.model.init_args.update(Namespace(**{k: v for k, v in sizes_for(model, data).items() if k not in given}))
            self.__dict__.pop("config_dump", None)  # Lightning's copy for checkpoints, made with the data
        super().instantiate_classes()
        if data is not None:
            self.datamodule = data  # which may have read much already

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        section = self._section()
        root = section.trainer.default_root_dir
        if is_local(root):
            check_writable(Path(root))
        trainer = self.config_init[self.config.subcommand].trainer
        if trainer.barebones:  # Lightning's measure of its own overhead: nothing in addition to it
            kwargs |= {"logger": False, "log_every_n_steps": 0}
            return super().instantiate_trainer(**kwargs)
        kwargs.setdefault("accelerator", accelerator(trainer.accelerator))
        if section.trainer.get("enable_model_summary") is None:
            kwargs.setdefault("enable_model_summary", False)  # `StartUp` says it in a line
        if section.trainer.get("logger") in (None, True):
            kwargs.setdefault("logger", TensorBoardLogger(root, name="", version="", default_hp_metric=False))
        defaults: list[Callback] = [Stopwatch(), ProgressLines(), ErrorLog(), StartUp()]
        if trainer.enable_checkpointing is not False:
            defaults += [BestCheckpoint(), LastCheckpoint(), Preemption()]
        if self.config.subcommand == "predict":
            defaults.append(EmbeddingWriter())
        if trainer.logger is not False:
            defaults.append(LearningRateMonitor("step", log_weight_decay=True))
        given = {type(callback) for callback in as_list(trainer.callbacks)}
        self.trainer_defaults["callbacks"] = [callback for callback in defaults if type(callback) not in given]
        kwargs.setdefault("plugins", with_atomic_writing(as_list(trainer.plugins)))
        return super().instantiate_trainer(**kwargs)


def newest_checkpoint(root: str) -> str | None:
    """The newest checkpoint of a run directory that can be read; a warning names those that cannot.

    Args:
        root: Path or URL.
    """
    for path in checkpoints_to_resume(root):
        try:
            read_checkpoint(path)
        except ValueError as error:
            warnings.warn(f"{error} The one before it is taken.", stacklevel=2)
        else:
            return path
    return None


class SaveFitConfig(SaveConfigCallback):
    """Keep config.yaml of the training: a later test into the same directory leaves it alone, and so does a failed start."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


USER_ERRORS = (ValueError, OSError, MisconfigurationException, NonFiniteError)


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
    warnings.filterwarnings("ignore", "The dirpath has changed")  # a report is written next to the probes it tests
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")  # Lightning 2.6.6 on torch 2.15
    quiet()
    if args is None:  # a program of its own, not a call from one
        cpu.keep_freed_memory()
        cpu.choose_threads()
    given = sys.argv[1:] if args is None else [str(argument) for argument in args]
    try:
        if given[:1] == ["collect"]:
            run_collect(given[1:])
            return
        JEPACommandLine(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveFitConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={name: {"exit_on_error": False, "usage": USAGE} for name in LightningCLI.subcommands()}
            | {"exit_on_error": False, "prog": "jepa-lightning", "description": DESCRIPTION},
            trainer_defaults={"log_every_n_steps": 20},
            args=args,
        )
        if args is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # torch asks for it before the interpreter ends
    except (ArgumentError, *USER_ERRORS) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        text = with_file_name(readable(error, USER_ERRORS), given)
        where = " ".join(getattr(error, "__notes__", [f"{TRACEBACK_VARIABLE}=1 shows where it was raised"]))
        print(f"error: {text}\n({where})", file=sys.stderr)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
    except SIGTERMException:  # Lightning's own answer, which says 0
        sys.exit(128 + signal.SIGTERM)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):  # Lightning exits with 1
            sys.exit(128 + signal.SIGINT)
        raise
