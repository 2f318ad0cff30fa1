"""What a resumed run reads, what it says about what has changed, and which checkpoint it goes on from."""

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import small_data, small_iwm, small_model, small_views, trainer
from faults import same
from lightning.pytorch import Callback

from callbacks import LastCheckpoint
from datamodules import Views
from datamodules.loop_progress import Progress, put
from datamodules.resumable import EpochBatches
from jepa_lightning.probes import DecoderProbe
from jepa_lightning.weights.checkpoints import load_jepa, load_probe, read_checkpoint


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
