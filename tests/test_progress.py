"""Progress where there is no terminal."""

import re
from pathlib import Path

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


def test_a_terminal_has_its_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    trainer(tmp_path, max_epochs=1, callbacks=[ProgressLines(every_seconds=0)]).fit(small_model(), small_data())
    assert "optimizer step" not in capsys.readouterr().out


def test_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="every_seconds=-1"):
        ProgressLines(-1)
