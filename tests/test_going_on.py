"""What a resumed run reads, what it says about what has changed, and which checkpoint it goes on from."""

import copy
import errno
import os
import signal
import subprocess
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import small_data, small_iwm, small_model, small_views, trainer
from faults import same
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from callbacks import Interrupted, LastCheckpoint, Preemption
from callbacks.checkpointing import checkpoints_to_resume, keep_previous
from datamodules import Views
from datamodules.loop_progress import Progress, put
from datamodules.resumable import EpochBatches
from jepa_lightning.cli import newest_checkpoint
from jepa_lightning.probes import DecoderProbe
from jepa_lightning.weights.checkpoints import load_jepa, load_probe, read_checkpoint
from jepa_lightning.weights.io import AtomicCheckpointIO


class Seen(Callback):
    """The first angle of each trajectory of each batch."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch.states[:, 0, 0].tolist())


def fit(root: Path, steps: int, path: Path | None = None, data: Any = None, **changes: Any) -> tuple[pl.Trainer, list]:
    """Train for so many steps, with a last.ckpt at each."""
    seen = Seen()
    settings = {"enable_checkpointing": True, "max_steps": steps, "max_epochs": 10} | changes
    run = trainer(root, callbacks=[seen, LastCheckpoint(every_n_train_steps=1)], **settings)
    run.fit(small_model(), data or small_data(), ckpt_path=path)
    return run, seen.batches


def last(root: Path) -> Path:
    return root / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("limit", [1.0, 4, 0.5])
def test_the_batches_of_a_limited_epoch_go_on(tmp_path: Path, limit: float) -> None:
    _, whole = fit(tmp_path / "whole", 14, limit_train_batches=limit)
    for cut in (2, 3, 4, 6, 8):
        fit(tmp_path / str(cut), cut, limit_train_batches=limit)
        _, rest = fit(tmp_path / str(cut), 14, last(tmp_path / str(cut)), limit_train_batches=limit)
        assert rest == whole[cut:], f"cut after {cut} of {limit}"


def test_other_accumulation_of_the_same_step_goes_on_at_the_same_sample(tmp_path: Path) -> None:
    _, whole = fit(tmp_path / "whole", 3, accumulate_grad_batches=2)
    fit(tmp_path / "cut", 1, accumulate_grad_batches=2)
    _, rest = fit(tmp_path / "cut", 3, last(tmp_path / "cut"), data=small_data(batch_size=8))
    assert [sorted(batch) for batch in rest] == [sorted(whole[2] + whole[3]), sorted(whole[4] + whole[5])]


def test_another_number_of_samples_a_step_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    for changes, now in (({"data": small_data(batch_size=8)}, 8), ({"accumulate_grad_batches": 3}, 12)):
        with pytest.raises(ValueError, match=f"was on 4 samples, and now it would be on {now} .*product is 4"):
            fit(tmp_path, 4, last(tmp_path), **changes)


@pytest.mark.parametrize(
    ("changes", "said", "length"), [({"seed": 5}, "seed was 0 and is 5", 6), ({"size": 28}, "size was 24 and is 28", 7)]
)
def test_other_samples_are_said_and_the_epoch_starts_anew(tmp_path: Path, changes: dict, said: str, length: int) -> None:
    fit(tmp_path, 8)  # two batches of the second epoch
    with pytest.warns(UserWarning, match=rf"data\.{said}.*the epoch under way starts anew"):
        _, batches = fit(tmp_path, 9, last(tmp_path), data=small_data(**changes))
    _, uncut = fit(tmp_path / "uncut", length + 1, data=small_data(**changes))
    assert batches == uncut[length:]


@pytest.mark.parametrize("limit", [2, 3, 4])
def test_an_epoch_that_became_shorter_than_what_was_read_of_it_is_over(tmp_path: Path, limit: int) -> None:
    _, whole = fit(tmp_path / "whole", 12)
    fit(tmp_path, 4)
    run, rest = fit(tmp_path, 4 + limit + 1, last(tmp_path), limit_train_batches=limit)
    assert rest[:limit] == whole[6 : 6 + limit] and len(rest) == limit + 1, "the second epoch, and one of the third"
    assert run.current_epoch == 3, "as many have begun"


def test_progress_is_put_as_lightning_has_it_at_the_end_of_a_batch(tmp_path: Path) -> None:
    fit(tmp_path, 8, accumulate_grad_batches=1)
    written = torch.load(last(tmp_path), weights_only=True)["loops"]
    changed = copy.deepcopy(written)
    put(changed, Progress(1, 2), 1)
    assert changed == written


def test_the_same_samples_are_not_a_matter_for_words(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    with warnings.catch_warnings(record=True) as said:
        fit(tmp_path, 4, last(tmp_path))
    assert not any("other samples" in str(warning.message) for warning in said)


def test_a_checkpoint_of_an_earlier_version_starts_its_epoch_anew(tmp_path: Path) -> None:
    fit(tmp_path, 8)
    checkpoint = torch.load(last(tmp_path), weights_only=True)
    checkpoint["DoublePendulum"] = {"taken": 2}
    del checkpoint["format_version"], checkpoint["planned_steps"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.warns(UserWarning, match="does not count samples: the epoch under way starts anew"):
        _, batches = fit(tmp_path, 9, tmp_path / "old.ckpt")
    assert batches == fit(tmp_path / "uncut", 7)[1][6:]


def test_views_whose_actions_mean_something_else_are_refused(tmp_path: Path, image_root: Path) -> None:
    def run(views: Views, path: Path | None = None) -> None:
        callbacks = [LastCheckpoint(every_n_train_steps=1)]
        made = trainer(tmp_path, max_steps=4 if path else 2, callbacks=callbacks, enable_checkpointing=True)
        made.fit(small_iwm(), small_views(image_root, views=views), ckpt_path=path)

    run(Views())
    with pytest.raises(ValueError, match=r"trained with data.views.source_from=shared"):
        run(Views(source_from="target"), last(tmp_path))
    with pytest.warns(UserWarning, match=r"data.views was .*is no longer the run that was cut"):
        run(Views(strength="strong"), last(tmp_path))


def test_a_run_of_another_length_says_so(tmp_path: Path) -> None:
    fit(tmp_path, 4)
    with pytest.warns(UserWarning, match="was to take 4 optimizer steps, and now 8.* at step 4 "):
        fit(tmp_path, 8, last(tmp_path))


def test_validating_a_checkpoint_leaves_the_next_training_alone(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    data, seen = small_data(), Seen()
    trainer(tmp_path, limit_val_batches=1).validate(small_model(), data, ckpt_path=last(tmp_path), verbose=False)
    trainer(tmp_path, max_steps=3, callbacks=[seen]).fit(small_model(), data)
    assert seen.batches == fit(tmp_path / "other", 3)[1]


def test_overfitted_batches_are_the_same_in_each_epoch(tmp_path: Path) -> None:
    _, batches = fit(tmp_path, 6, overfit_batches=2)
    assert batches[:2] == batches[2:4] == batches[4:] and batches[0] != batches[1]
    sampler = EpochBatches(24, 4, 0)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1]


# Which checkpoint there is.


def test_the_last_three_checkpoints_are_there(tmp_path: Path) -> None:
    fit(tmp_path, 5)
    steps = {path.name: read_checkpoint(path)["global_step"] for path in (tmp_path / "checkpoints").iterdir()}
    assert steps == {"last.ckpt": 5, "last-1.ckpt": 4, "last-2.ckpt": 3}
    assert [Path(path).name for path in checkpoints_to_resume(tmp_path)] == ["last.ckpt", "last-1.ckpt", "last-2.ckpt"]


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_taken(tmp_path: Path) -> None:
    fit(tmp_path, 3)
    content = last(tmp_path).read_bytes()
    last(tmp_path).write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"last.ckpt cannot be read .*The one before it is taken"):
        found = newest_checkpoint(str(tmp_path))
    assert found is not None and read_checkpoint(found)["global_step"] == 2


def test_the_newest_of_all_checkpoints_is_taken(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    assert newest_checkpoint(str(tmp_path / "nowhere")) is None
    later = tmp_path / "hpc_ckpt_3.ckpt"
    later.write_bytes(last(tmp_path).read_bytes())
    (tmp_path / "hpc_ckpt_x.ckpt").write_text("not one of them")
    os.utime(later, ns=(later.stat().st_mtime_ns + 10**10,) * 2)
    assert newest_checkpoint(str(tmp_path)) == str(later)


class SecondProcess(SingleDeviceStrategy):
    """As if this were the second of two processes."""

    is_global_zero = False


@pytest.mark.parametrize("remote", [True, False])
def test_files_of_this_disk_are_kept_by_the_first_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    kept: list[Path] = []
    monkeypatch.setattr("callbacks.checkpointing.keep_previous", kept.append)
    fit(tmp_path, 2)
    assert kept == [last(tmp_path)] * 2
    root = {"default_root_dir": f"memory://{tmp_path.name}-kept"} if remote else {"strategy": SecondProcess()}
    fit(tmp_path / "other", 2, **root, plugins=[AtomicCheckpointIO()])
    assert len(kept) == 2


def test_a_failed_write_does_not_push_out_good_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for content in ("1", "2", "3"):
        keep_previous(folder / "last.ckpt")
        (folder / "new").write_text(content)
        (folder / "new").replace(folder / "last.ckpt")
    for _ in range(3):
        keep_previous(folder / "last.ckpt")  # and nothing is written after it
    found = {path.name: path.read_text() for path in folder.iterdir()}
    assert found["last.ckpt"] == "3" and set(found.values()) >= {"2", "3"}


class FullDisk(AtomicCheckpointIO):
    """A disk that is full between two steps."""

    def __init__(self, first: int, end: int, code: int = errno.ENOSPC) -> None:
        self.full, self.code = range(first, end), code

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if checkpoint["global_step"] in self.full:
            raise OSError(self.code, os.strerror(self.code))
        super().save_checkpoint(checkpoint, path, storage_options)


def test_a_disk_that_is_full_for_a_while_costs_the_checkpoints_of_that_while(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"last.ckpt could not be written \(No space left on device\). Training goes on"):
        run, _ = fit(tmp_path, 6, plugins=[FullDisk(3, 5)])
    assert run.global_step == 6
    names = ("last.ckpt", "last-1.ckpt", "last-2.ckpt")
    assert [read_checkpoint(tmp_path / "checkpoints" / name)["global_step"] for name in names] == [6, 5, 2]


def test_a_writer_in_the_background_is_waited_for_at_the_end(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"could not be written"):
        run, _ = fit(tmp_path, 6, plugins=[AsyncCheckpointIO(FullDisk(2, 4))])
    assert run.global_step == 6 and read_checkpoint(last(tmp_path))["global_step"] == 6
    with pytest.raises(OSError, match="No space left"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path / "end", 4, plugins=[AsyncCheckpointIO(FullDisk(4, 9))])
    assert read_checkpoint(last(tmp_path / "end"))["global_step"] == 3


def test_a_run_whose_end_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), pytest.warns(UserWarning, match="could not be written"):
        fit(tmp_path, 4, plugins=[FullDisk(4, 9)])
    assert read_checkpoint(last(tmp_path))["global_step"] == 3


def test_an_error_that_no_patience_mends_ends_training(tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        fit(tmp_path, 4, plugins=[FullDisk(2, 9, errno.EACCES)])


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("callbacks.checkpointing.time.monotonic", lambda: clock[0])

    class Tick(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock[0] += 20

    class Slow(AtomicCheckpointIO):
        steps: list[int] = []  # noqa: RUF012

        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            super().save_checkpoint(checkpoint, path, storage_options)
            self.steps.append(checkpoint["global_step"])
            clock[0] += 0 if len(self.steps) < 2 else 8  # of a file that takes 8 seconds, each 160 seconds

    callbacks = [Tick(), LastCheckpoint(every_minutes=0.9)]
    run = trainer(tmp_path, callbacks=callbacks, plugins=[Slow()], max_steps=20, enable_checkpointing=True)
    run.fit(small_model(), small_data())
    assert Slow.steps == [3, 6, 14, 20]


def test_asynchronous_writing_and_urls(tmp_path: Path) -> None:
    fit(tmp_path, 3, plugins=[AsyncCheckpointIO(AtomicCheckpointIO())])
    assert read_checkpoint(last(tmp_path))["global_step"] == 3
    root = f"memory://{tmp_path.name}"
    run, _ = fit(Path("unused"), 3, plugins=[AtomicCheckpointIO()], default_root_dir=root)
    (found,) = checkpoints_to_resume(root)
    assert found.startswith("memory://") and found.endswith(f"{tmp_path.name}/checkpoints/last.ckpt")
    again = read_checkpoint(f"{root}/checkpoints/last.ckpt")
    assert same(again["state_dict"], dict(run.lightning_module.state_dict()))
    with pytest.raises(FileNotFoundError, match="No checkpoint at memory://"):
        read_checkpoint(f"{root}/checkpoints/first.ckpt")


# Signals.


class Signal(Callback):
    """A signal to this process in the middle of a step, after the gradients and before the optimizer."""

    def __init__(self, number: int, step: int, hook: str = "on_before_optimizer_step") -> None:
        def called(run: pl.Trainer, *_: Any) -> None:
            if run.global_step == step and not run.sanity_checking:
                os.kill(os.getpid(), number)

        setattr(self, hook, called)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)]
)  # fmt: skip
def test_a_signal_ends_the_step_saves_and_says_so_by_its_code(tmp_path: Path, number: int, code: int) -> None:
    before, preemption = signal.getsignal(number), Preemption()
    run = trainer(
        tmp_path, max_steps=9, enable_checkpointing=True, callbacks=[Signal(number, 3), LastCheckpoint(), preemption]
    )
    with pytest.raises(Interrupted) as stopped:
        run.fit(small_model(), small_data())
    assert stopped.value.code == code
    assert read_checkpoint(last(tmp_path))["global_step"] == 4, "the step that was under way is in it"
    assert signal.getsignal(number) == before
    with pytest.raises(Interrupted):  # a signal after the end of the run is not noted for a later step
        preemption._note(number, None)


def test_a_validation_is_left_at_its_next_batch(tmp_path: Path) -> None:
    callbacks = [Signal(signal.SIGTERM, 6, "on_validation_batch_start"), Preemption()]
    run = trainer(tmp_path, max_steps=9, enable_checkpointing=True, callbacks=callbacks, limit_val_batches=1.0)
    with pytest.raises(Interrupted):
        run.fit(small_model(), small_data(val_size=16))
    assert (
        read_checkpoint(last(tmp_path))["global_step"] == 6
        and run.fit_loop.epoch_loop.val_loop.batch_progress.current.ready == 1
    )


def test_a_second_ctrl_c_ends_without_saving(tmp_path: Path) -> None:
    callbacks = [Signal(signal.SIGINT, 3), Signal(signal.SIGINT, 3, "on_before_zero_grad"), Preemption()]
    run = trainer(tmp_path, max_steps=9, enable_checkpointing=True, callbacks=callbacks)
    with pytest.raises(Interrupted):
        run.fit(small_model(), small_data())
    assert not (tmp_path / "checkpoints").exists()


class SignalInSanityCheck(Callback):
    """SIGTERM before training has begun."""

    def on_validation_batch_start(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_before_training_there_is_nothing_to_save(tmp_path: Path) -> None:
    callbacks = [Preemption(), SignalInSanityCheck()]
    settings = {"limit_val_batches": 1, "num_sanity_val_steps": 1, "callbacks": callbacks, "enable_checkpointing": True}
    run = trainer(tmp_path, max_steps=9, **settings)
    with pytest.raises(Interrupted) as stopped:
        run.fit(small_model(), small_data())
    assert stopped.value.code == 143 and not (tmp_path / "checkpoints").exists()


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A job of one process: what scontrol is asked. (With a real program in benchmarks/faults.py.)"""
    asked: list[list[str]] = []

    def run(command: list[str], text: bool = False, **_: Any) -> subprocess.CompletedProcess:
        asked.append(command)
        code, said = (1, b"no such job\n") if os.environ.get("SCONTROL_FAILS") else (0, b"")
        return subprocess.CompletedProcess(command, code, "", said.decode() if text else said)

    monkeypatch.setattr("callbacks.preemption.subprocess.run", run)
    for name, value in {"JOB_ID": "7", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "x"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return asked


def requeued(root: Path, number: int, step: int, path: Path | None = None, **slurm: Any) -> int:
    """The exit code of a job that is signalled in a step."""
    callbacks = [Signal(number, step), LastCheckpoint(), Preemption()]
    settings = {"max_steps": 9, "enable_checkpointing": True, "callbacks": callbacks, "plugins": [SLURMEnvironment(**slurm)]}
    with pytest.raises(Interrupted) as stopped:
        trainer(root, **settings).fit(small_model(), small_data(), ckpt_path=path)
    return stopped.value.code


def test_a_requeued_job_goes_on_from_its_newest_checkpoint(
    tmp_path: Path, slurm: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert requeued(tmp_path, signal.SIGUSR1, 2) == 138
    assert slurm == [["scontrol", "requeue", "7"]]
    first = tmp_path / "hpc_ckpt_1.ckpt"
    assert read_checkpoint(first)["global_step"] == 3 and not (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert f"SIGUSR1: saved {first} at optimizer step 3; go on with --ckpt_path last." in capsys.readouterr().out
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeued(tmp_path, signal.SIGUSR1, 4, first) == 138
    assert slurm[1:] == [["scontrol", "requeue", "5_2"]]
    assert [path.name for path in tmp_path.glob("hpc*")] == ["hpc_ckpt_2.ckpt"]
    assert requeued(tmp_path, signal.SIGTERM, 6, tmp_path / "hpc_ckpt_2.ckpt") == 143, "SIGTERM is no reason to requeue"
    assert len(slurm) == 2 and read_checkpoint(last(tmp_path))["global_step"] == 7
    fit(tmp_path, 9, last(tmp_path))
    assert not list(tmp_path.glob("hpc*")), "a finished run leaves nothing from which its directory would go on"


def test_the_signal_of_a_job_is_its_own_and_requeueing_can_be_declined(tmp_path: Path, slurm: list) -> None:
    for number, settings in (
        (signal.SIGUSR1, {"auto_requeue": False}),
        (signal.SIGUSR1, {"requeue_signal": signal.SIGUSR2}),
    ):
        assert requeued(tmp_path, number, 2, **settings) == 138
        assert not slurm and not list(tmp_path.glob("hpc*")) and read_checkpoint(last(tmp_path))["global_step"] == 3
    assert requeued(tmp_path, signal.SIGUSR2, 2, requeue_signal=signal.SIGUSR2) == 128 + signal.SIGUSR2
    assert len(slurm) == 1 and (tmp_path / "hpc_ckpt_1.ckpt").exists()
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)


def test_a_job_that_cannot_be_requeued_says_so(
    tmp_path: Path, slurm: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SCONTROL_FAILS", "1")
    assert requeued(tmp_path, signal.SIGUSR1, 2) == 138 and len(slurm) == 1
    assert "scontrol requeue 7 failed: no such job. Start the job again by hand." in capsys.readouterr().err


def test_a_run_without_a_last_checkpoint_of_its_own_still_saves_one(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=9, enable_checkpointing=True, callbacks=[Signal(signal.SIGTERM, 3), Preemption()])
    with pytest.raises(Interrupted):
        run.fit(small_model(), small_data())
    assert read_checkpoint(last(tmp_path))["global_step"] == 4


def test_nothing_is_written_twice_for_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callbacks = [Signal(signal.SIGTERM, 3), LastCheckpoint(every_n_train_steps=2), Preemption()]
    run = trainer(tmp_path, max_steps=9, enable_checkpointing=True, callbacks=callbacks)
    with pytest.raises(Interrupted):
        run.fit(small_model(), small_data())
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last-1.ckpt", "last.ckpt"], "of steps 2 and 4: the signal found step 4 written"


def test_a_trial_of_one_batch_writes_nothing(tmp_path: Path) -> None:
    trainer(tmp_path, fast_dev_run=True, callbacks=[LastCheckpoint()], enable_checkpointing=True).fit(
        small_model(), small_data()
    )
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("arguments", [{"every_n_train_steps": 0}, {"every_minutes": 0.0}, {"every_minutes": -1.0}])
def test_intervals_that_are_none_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}={next(iter(arguments.values()))}"):
        LastCheckpoint(**arguments)


# What checkpoints know.


def test_a_probe_is_read_when_the_file_of_its_jepa_is_gone(tmp_path: Path) -> None:
    fit(tmp_path / "jepa", 2)
    jepa = tmp_path / "jepa" / "checkpoints" / "last.ckpt"
    probe = DecoderProbe(str(jepa))
    run = trainer(tmp_path, max_steps=1)
    run.fit(probe, small_data())
    run.save_checkpoint(tmp_path / "probe.ckpt")
    expected = load_probe(tmp_path / "probe.ckpt", DecoderProbe).state_dict()
    jepa.unlink()
    again = load_probe(tmp_path / "probe.ckpt", DecoderProbe)
    assert same(dict(again.state_dict()), dict(expected))
    assert same(
        dict(again.jepa.state_dict()), {k.removeprefix("jepa."): v for k, v in expected.items() if k.startswith("jepa.")}
    )
    assert again.jepa.trained_on["gravity"] == 9.81


def test_a_class_of_ones_own_is_not_taken_for_ours(tmp_path: Path) -> None:
    class PendulumJEPA(type(small_model())):
        pass

    torch.manual_seed(0)
    model = small_model()
    model.__class__ = PendulumJEPA
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, small_data())
    run.save_checkpoint(tmp_path / "own.ckpt")
    found = load_jepa(tmp_path / "own.ckpt")
    assert type(found) is PendulumJEPA
    checkpoint = read_checkpoint(tmp_path / "own.ckpt")
    assert checkpoint["class"].endswith("<locals>.PendulumJEPA") and checkpoint["format_version"] == 1
    assert checkpoint["DoublePendulum"]["order"] == {"size": 24, "sequence_length": 10, "clip_length": 8, "seed": 0}
