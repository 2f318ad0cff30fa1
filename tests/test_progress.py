"""Progress where there is no terminal."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import small_data, small_model, trainer

from callbacks import ProgressLines


def test_lines_say_where_the_run_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, max_epochs=2, limit_val_batches=1.0, callbacks=[ProgressLines(every_seconds=0)])
    run.fit(small_model(), small_data(size=12, batch_size=4))
    lines = capsys.readouterr().out.splitlines()
    training = [line for line in lines if line.startswith("epoch")]
    assert len(training) == 6
    assert re.match(r"epoch 1, optimizer step 4 of 6, \S+ s a step, 0:00:0\d left: .*train/loss \d", training[3])
    validation = [line for line in lines if line.startswith("validated")]
    assert len(validation) == 2
    assert re.match(r"validated after optimizer step 3: .*val/loss \d.*val/persistence_ratio \d", validation[0])


def test_no_line_before_the_first_optimizer_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[ProgressLines(every_seconds=0)])
    run.fit(small_model(), small_data(size=16, batch_size=4))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 3 and "optimizer step 1 of 2" in lines[0]


class Clock:
    """A run of 1000 steps that begins at step 100, of 2.5 s each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 5000.0
        monkeypatch.setattr("callbacks.progress.time.monotonic", lambda: self.now)
        self.trainer = SimpleNamespace(
            global_step=100,
            current_epoch=3,
            estimated_stepping_batches=1000,
            is_global_zero=True,
            sanity_checking=False,
            progress_bar_metrics={"train/loss": 0.123456, "v_num": 7},
        )

    def step(self, lines: ProgressLines) -> None:
        self.now += 2.5
        self.trainer.global_step += 1
        lines.on_train_batch_end(self.trainer, None)


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_line_a_minute_tells_the_pace_of_this_run(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    clock, lines = Clock(monkeypatch), ProgressLines()
    clock.now += 777  # between the making and the start
    lines.on_train_start(clock.trainer, None)
    for _ in range(23):
        clock.step(lines)
    assert printed(capsys) == [], "not before a minute is over"
    clock.step(lines)
    start = "epoch 3, optimizer step 124 of 1000, 2.5 s a step, 0:36:30 left"  # 876 steps of 2.5 s
    assert printed(capsys) == [f"{start}: train/loss 0.1235, v_num 7"]
    for _ in range(23):
        clock.step(lines)
    assert printed(capsys) == []
    clock.trainer.progress_bar_metrics = {}
    clock.now += 47  # a break, of a second for each of 47 steps after the first
    clock.step(lines)
    assert printed(capsys) == ["epoch 3, optimizer step 148 of 1000, 3.5 s a step, 0:49:42 left"]


def test_the_first_step_in_which_networks_are_compiled_says_nothing_of_the_pace(
    monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    clock, lines = Clock(monkeypatch), ProgressLines()
    for start in (100, 500):  # a second fit, too
        clock.trainer.global_step = start
        lines.on_train_start(clock.trainer, None)
        clock.now += 90
        clock.step(lines)
        assert printed(capsys) == [f"epoch 3, optimizer step {start + 1} of 1000: train/loss 0.1235, v_num 7"]
        for _ in range(24):
            clock.step(lines)
        assert re.match(rf"epoch 3, optimizer step {start + 25} of 1000, 2.5 s a step, ", printed(capsys)[0])


def test_the_first_line_waits_for_its_time_and_for_a_step(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    clock, lines = Clock(monkeypatch), ProgressLines(every_seconds=0)
    lines.on_train_start(clock.trainer, None)
    lines.on_train_batch_end(clock.trainer, None)  # a fraction of a step, under accumulation
    assert printed(capsys) == []
    clock.step(lines)
    assert len(printed(capsys)) == 1


def test_other_processes_and_the_sanity_check_are_silent(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    clock, lines = Clock(monkeypatch), ProgressLines(every_seconds=0)
    lines.on_train_start(clock.trainer, None)
    clock.trainer.sanity_checking = True
    lines.on_validation_end(clock.trainer, None)
    clock.trainer.sanity_checking, clock.trainer.is_global_zero = False, False
    lines.on_validation_end(clock.trainer, None)
    clock.step(lines)
    assert printed(capsys) == []
    clock.trainer.is_global_zero = True
    lines.on_validation_end(clock.trainer, None)
    assert printed(capsys) == ["validated after optimizer step 101: train/loss 0.1235, v_num 7"]


def test_lines_are_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output into a file is buffered: a line that waits for 8 kB of others says nothing."""
    clock, lines, flushed = Clock(monkeypatch), ProgressLines(every_seconds=0), []
    monkeypatch.setattr("builtins.print", lambda *_, flush=False, **__: flushed.append(flush))
    lines.on_validation_end(clock.trainer, None)
    assert flushed == [True]


def test_a_terminal_has_its_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    trainer(tmp_path, max_epochs=1, callbacks=[ProgressLines(every_seconds=0)]).fit(small_model(), small_data())
    assert "optimizer step" not in capsys.readouterr().out


def test_negative_interval_is_refused() -> None:
    for value in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"every_seconds={value}"):
            ProgressLines(value)
    assert ProgressLines(0).every_seconds == 0 and ProgressLines().every_seconds == 60
