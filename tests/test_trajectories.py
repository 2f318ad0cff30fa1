"""Clips of recorded episodes: nothing crosses an end, and windows, actions and states belong together."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import trainer

from datamodules import Trajectories
from datamodules.clips import Clip
from datamodules.recordings import Episode, RecordingInfo, write_episode, write_info


def write(root: Path, lengths: tuple[int, ...] = (12, 9, 15, 8, 20, 11), **changes: Any) -> Path:
    """Episodes whose frames, actions and states say which episode and which frame they are."""
    for number, length in enumerate(lengths):
        t = np.arange(length)
        frames = np.zeros((length, 4, 6, 3), np.uint8)
        frames[..., 0], frames[..., 1], frames[..., 2] = number, t[:, None, None], 255
        arrays: dict[str, Any] = {
            "actions": np.stack([number + 0.0 * t[1:], t[:-1]], axis=1),
            "frames": frames,
            "states": np.stack([number + 0.0 * t, t], axis=1).astype(np.float32),
            "vectors": np.stack([100 + t, 200 + t, t * 0], axis=1).astype(np.float32),
            "rewards": t[:-1].astype(np.float32),
        } | {name: value(number, length) for name, value in changes.items()}
        write_episode(root, Episode(f"e{number}.npz", **arrays))
    write_info(root, RecordingInfo(action_low=[-2, 0], action_high=[10, 40], state_names=["episode", "frame"]))
    return root


def data(root: Path, **changes: Any) -> Trajectories:
    return Trajectories(**({"root": str(root), "windows": 3, "batch_size": 2} | changes))


@pytest.mark.parametrize(("history", "stride"), [(1, 1), (2, 1), (3, 2), (2, 2), (1, 3), (2, 5)])
def test_windows_actions_states_and_rewards_belong_together(tmp_path: Path, history: int, stride: int) -> None:
    module = data(write(tmp_path, (30, 29, 28, 31)), history=history, stride=stride, observation="both")
    batch = module.first_clips(100, torch.device("cpu"))
    episodes, newest = batch.states[..., 0], batch.states[..., 1]  # (B, T)
    assert (episodes == episodes[:, :1]).all(), "a clip crosses an end"
    assert torch.equal(newest.diff(dim=1), torch.full_like(newest[:, 1:], stride))
    seen = (batch.observations * 255).round().unflatten(2, (history, 3))  # (B, T, history, C, H, W)
    assert batch.observations.dtype == torch.float32 and seen.shape[-2:] == (4, 6)
    assert torch.equal(seen[:, :, :, 0, 0, 0], episodes[..., None].expand(-1, -1, history))
    frames = newest[..., None] - torch.arange(history - 1, -1, -1)  # oldest first
    assert torch.equal(seen[:, :, :, 1, 2, 3], frames)
    assert torch.equal(batch.vectors.unflatten(2, (history, 3))[..., 0], 100 + frames)
    between = newest[:, :-1, None] + torch.arange(stride)  # frames at which the actions of a step are applied
    actions = batch.actions.unflatten(2, (stride, 2))
    torch.testing.assert_close(actions[..., 1], between / 20 - 1)
    torch.testing.assert_close(actions[..., 0], ((episodes[:, :1, None] - 4) / 6).expand_as(between))
    torch.testing.assert_close(batch.rewards, between.sum(dim=-1))
    assert module.action_dim == 2 * stride and module.image_size == (4, 6) and module.vector_dim == 3


def test_a_clip_is_a_function_of_seed_epoch_and_index_and_any_start_occurs(tmp_path: Path) -> None:
    module = data(write(tmp_path))
    clips = module._clips("train")
    first = clips.__getitems__([(0, 0), (0, 1)])
    again = module._clips("train").__getitems__([(0, 1)])
    assert torch.equal(first.numbers[1], again.numbers[0]) and torch.equal(first.frames[1], again.frames[0])
    for epoch in range(20):  # whatever else is random
        torch.manual_seed(epoch)
        items = [(epoch, index) for index in range(len(clips))]
        one, other = (made.__getitems__(items) for made in (clips, module._clips("train")))
        assert torch.equal(one.numbers, other.numbers)
    found: dict[tuple[float, float], int] = {}
    for epoch, index in itertools.product(range(400), range(len(clips))):
        state = clips.__getitems__([(epoch, index)]).numbers.view(torch.float32)[0, 0, module.store.column("states")]
        key = (float(state[0]), float(state[1]))
        found[key] = found.get(key, 0) + 1
    lengths = {0: 12, 1: 9, 2: 15, 3: 8, 4: 20, 5: 11}
    expected = {(float(e), float(s)) for e in module.episodes("train") for s in range(lengths[e] - 3 + 1)}
    assert found.keys() == expected
    assert max(found.values()) < 2 * min(found.values()), "some starts are preferred"


def test_held_out_clips_follow_one_another_and_no_episode_is_in_two_splits(tmp_path: Path) -> None:
    module = data(write(tmp_path))
    splits = {split: module.episodes(split) for split in ("train", "val", "test")}
    assert sorted(itertools.chain(*splits.values())) == list(range(6))
    lengths = {0: 12, 1: 9, 2: 15, 3: 8, 4: 20, 5: 11}
    (batch,) = [module.observe(clip) for clip in data(tmp_path, batch_size=64).val_dataloader()]
    assert set(batch.states[:, 0, 0].long().tolist()) == set(splits["val"])
    (episode,) = splits["val"]
    assert batch.states[:, 0, 1].tolist() == [float(s) for s in range(0, lengths[episode] - 2, 3)]


def test_neighbors_among_held_out_clips_are_of_different_episodes(tmp_path: Path) -> None:
    module = data(write(tmp_path, (12, 12, 12, 20, 12, 12, 12)), val_fraction=0.4)
    (batch,) = [module.observe(clip) for clip in data(tmp_path, batch_size=64, val_fraction=0.4).val_dataloader()]
    names = batch.states[:, 0, 0].long()
    places = {episode: place for place, episode in enumerate(module.episodes("val"))}
    assert batch.episodes.tolist() == [places[episode] for episode in names.tolist()]
    assert len(places) == 3 and (names[:12].diff() != 0).all()
    many = data(write(tmp_path / "many", (60,) * 20), val_fraction=0.4)
    clips = many._clips("val").__getitems__([(0, index) for index in range(8 * 20)])
    assert clips.episodes.tolist() == 20 * list(range(8)), "round by round, the episodes of each in their order"


def test_episodes_that_are_added_leave_the_others_in_their_order(tmp_path: Path) -> None:
    before = data(write(tmp_path / "few"), val_fraction=0.17, test_fraction=0.17)
    after = data(write(tmp_path / "more", (12, 9, 15, 8, 20, 11, 9)), val_fraction=0.17, test_fraction=0.17)
    held_out = {before.store.names[e] for split in ("val", "test") for e in before.episodes(split)}
    now = {after.store.names[e] for split in ("val", "test") for e in after.episodes(split)}
    assert len(held_out) == 2 and len(held_out & now) >= 1 and len(now) == 2


def bad_actions(number: int, length: int) -> Any:
    values = np.zeros((length - 1, 2))
    values[3] = np.nan if number == 1 else 0
    return values


def other_size(number: int, length: int) -> Any:
    return np.zeros((length, 4, 6 if number != 2 else 8, 3), np.uint8)


def few_states(number: int, length: int) -> Any:
    return np.zeros((length - (2 if number == 0 else 0), 2), np.float32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"actions": bad_actions}, "1 of 6 episodes are left out: e1.npz has actions that are not finite"),
        ({"frames": other_size}, r"e2.npz has frames of shape \(4, 8, 3\) each, and e0.npz of \(4, 6, 3\)"),
        ({"states": few_states}, "e0.npz has 10 states with 12 frames"),
        ({"actions": lambda n, length: np.zeros((length - (4 if n == 3 else 1), 2))}, "e3.npz has 4 actions with 8 frames"),
    ],
)
def test_what_cannot_be_used_is_left_out_in_one_sentence(tmp_path: Path, changes: Any, said: str) -> None:
    module = data(write(tmp_path, **changes))
    with pytest.warns(UserWarning, match=said):
        assert len(module.store.names) == 5


def test_a_damaged_file_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "e4.npz").write_bytes((tmp_path / "e4.npz").read_bytes()[:100])
    with pytest.warns(UserWarning, match="e4.npz cannot be read"):
        assert data(tmp_path).store.names == ["e0.npz", "e1.npz", "e2.npz", "e3.npz", "e5.npz"]
    for file in tmp_path.glob("*.npz"):
        file.write_bytes(b"no")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="None of 6 episodes can be used"):
        _ = data(tmp_path).store


def test_a_last_action_that_leads_nowhere_is_not_used(tmp_path: Path) -> None:
    module = data(
        write(tmp_path, actions=lambda n, length: np.full((length, 2), [4.0, 20.0]) * (np.arange(length)[:, None] > 0))
    )
    table = module.store.table[module.store.episode(0), module.store.column("actions")]
    assert table[0].tolist() == pytest.approx([-2 / 3, -1]) and table[1].tolist() == [0, 0] and table[-1].tolist() == [0, 0]
    assert len(table) == 12


def test_short_episodes_are_said_and_clips_that_fit_nowhere_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    module = data(write(tmp_path, (4, 12, 12, 12, 4, 12)), windows=8)
    said: list[str] = []
    monkeypatch.setattr("datamodules.trajectories.rank_zero_info", said.append)
    clips = module._clips("train")
    short = [e for e in module.episodes("train") if e in (0, 4)]
    assert f"{len(short)} of 4 train episodes are shorter than a clip of 8 frames" in said[0]
    assert not set(clips.starts.tolist()) & set(range(4))
    with pytest.raises(ValueError, match="No train episode has the 40 frames of a clip"):
        data(tmp_path, windows=40)._clips("train")


def test_discrete_actions_are_one_hot_and_their_number_is_found(tmp_path: Path) -> None:
    write(tmp_path, actions=lambda n, length: np.arange(length - 1) % 4)
    (tmp_path / "recording.json").unlink()
    module = data(tmp_path, stride=2, history=1)
    batch = module.first_clips(4, torch.device("cpu"))
    assert module.num_choices == 4 and module.action_dim == 8
    first = batch.states[:, 0, 1].long()
    assert torch.equal(batch.actions[:, 0, :4].argmax(-1), first % 4)
    assert torch.equal(batch.actions[:, 0, 4:].argmax(-1), (first + 1) % 4)
    assert torch.equal(batch.actions.unflatten(2, (2, 4)).sum(-1), torch.ones(len(first), 2, 2))


def test_limits_are_found_where_nothing_says_them(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "recording.json").unlink()
    module = data(tmp_path)
    assert module.store.info.action_low == [0, 0] and module.store.info.action_high == [5, 18]
    assert module.state_names == ["state.0", "state.1"]


@pytest.mark.parametrize("channels", [1, 3])
def test_mapped_frames_are_those_in_memory_and_are_read_once(tmp_path: Path, channels: int, monkeypatch: Any) -> None:
    root = write(tmp_path / "recording")
    inside, mapped = data(root, channels=channels), data(root, channels=channels, max_gigabytes=0)
    assert torch.equal(inside.store.frames, mapped.store.frames) and torch.equal(inside.store.table, mapped.store.table)
    assert inside.store.names == mapped.store.names and inside.store.ends.tolist() == mapped.store.ends.tolist()
    assert inside.store.frames.shape[1] == channels
    monkeypatch.setattr(
        "datamodules.recordings.npz_folder.NpzFolder.episode", lambda self, number: pytest.fail("read again")
    )
    monkeypatch.setattr("datamodules.trajectories.estimated_gigabytes", lambda *_: 1.0)
    again = data(root, channels=channels, max_gigabytes=0)
    assert torch.equal(again.store.frames, mapped.store.frames) and again.store.info == mapped.store.info


def test_frames_are_resized_and_gray_is_the_luma(tmp_path: Path) -> None:
    module = data(write(tmp_path), image_size=(2, 3), channels=1)
    frame = module.store.frames[int(module.store.starts[5]) + 7]
    assert frame.shape == (1, 2, 3) and module.image_size == (2, 3)
    assert frame.unique().item() == round(0.299 * 5 + 0.587 * 7 + 0.114 * 255)


def test_what_is_not_recorded_has_no_width(tmp_path: Path) -> None:
    absent = {name: lambda *_: None for name in ("states", "vectors", "rewards")}
    store = data(write(tmp_path, **absent)).store
    assert store.widths == {"actions": 2, "vectors": 0, "states": 0, "rewards": 0} and store.table.shape[1] == 2


def test_vectors_alone_need_no_frames(tmp_path: Path) -> None:
    module = data(write(tmp_path, frames=lambda n, length: None), observation="vectors", history=2)
    batch = module.first_clips(3, torch.device("cpu"))
    assert batch.observations.shape[1:] == (3, 6) and batch.vectors is None and module.image_size is None
    with pytest.warns(UserWarning, match="has no frames"), pytest.raises(ValueError, match="None of 6"):
        _ = data(tmp_path).store


def test_choices_that_are_not_there_are_refused(tmp_path: Path) -> None:
    write(tmp_path, actions=lambda n, length: np.arange(length - 1) % 4)
    write_info(tmp_path, RecordingInfo(num_choices=3))
    with pytest.raises(ValueError, match="An action is 3, and recording.json says num_choices=3"):
        _ = data(tmp_path).store
    write(tmp_path / "n", actions=lambda n, length: np.arange(length - 1) % 3 - (n == 2))
    with pytest.warns(UserWarning, match="e2.npz has the action -1: discrete actions are numbered from 0"):
        assert len(data(tmp_path / "n").store.names) == 5


def test_rewards_may_have_a_column(tmp_path: Path) -> None:
    module = data(write(tmp_path, rewards=lambda n, length: np.arange(length - 1, dtype=np.float32)[:, None]))
    assert module.first_clips(1, torch.device("cpu")).rewards.shape == (1, 2)
    write(tmp_path / "w", rewards=lambda n, length: np.zeros((length - 1, 1 + (n == 1)), np.float32))
    with pytest.warns(UserWarning, match=r"e1.npz has rewards of shape \(8, 2\): one number for each step"):
        assert len(data(tmp_path / "w").store.names) == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"windows": 1}, "data.windows=1: at least 2"),
        ({"history": 0}, "data.history=0"),
        ({"channels": 2}, "data.channels=2"),
        ({"val_fraction": 0.6}, "data.val_fraction=0.6"),
        ({"observation": "sound"}, "data.observation='sound'"),
        ({"max_gigabytes": -1}, "max_gigabytes=-1"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, changes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        data(tmp_path, **changes)


def test_too_few_episodes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 2 episodes"):
        data(write(tmp_path, (9, 9))).episodes("train")


def test_half_precision_rounds_what_networks_see_and_nothing_else(tmp_path: Path) -> None:
    module = data(write(tmp_path))
    module.trainer = trainer(tmp_path, precision="bf16-true")
    clip: Clip = module._clips("train").__getitems__([(0, 0), (0, 1)])
    moved = module.trainer.precision_plugin.convert_input(clip)
    batch = module.on_after_batch_transfer(moved, 0)
    exact = module.observe(clip)
    assert batch.observations.dtype == batch.actions.dtype == torch.bfloat16
    assert torch.equal(batch.states, exact.states) and torch.equal(batch.rewards, exact.rewards)
