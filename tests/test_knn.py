"""The k-NN probe shares its training images out over the processes, and gives the figures of one."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here, run_script, small_ijepa, small_images, trainer, write_images

import jepa_lightning.probes.images.memory_bank
from jepa_lightning.classifiers import directions, vote
from jepa_lightning.probes import KNNProbe
from jepa_lightning.probes.images.memory_bank import MemoryBank
from jepa_lightning.probes.images.training_features import share_of


def members(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings that say little of their classes, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return 3 + labels[:, None] * 0.3 + torch.randn(count, 6, generator=generator), labels


@pytest.mark.parametrize("neighbors", [1, 5, 50])
def test_one_process_votes_as_without_shares(neighbors: int) -> None:
    features, labels = members(20, 0)
    queries, _ = members(9, 1)
    memory_bank = MemoryBank(30)
    for rows in (slice(0, 0), slice(0, 7), slice(7, 8), slice(8, 20)):
        memory_bank.add(features[rows], labels[rows])
    assert memory_bank.close() == 20
    mean = features.mean(dim=0)
    torch.testing.assert_close(memory_bank.mean, mean)
    expected = vote(directions(features, mean), labels, directions(queries, mean), neighbors, 0.07)
    assert torch.equal(memory_bank.vote(queries, neighbors, 0.07), expected)
    assert memory_bank.vote(queries[:0], neighbors, 0.07).shape == (0,)


CASES = {1: 0.07, 5: 0.07, 50: 1.0}
"""Neighbors and temperatures: at the last, those that a share of fewer does not have would weigh as much as others."""


class Processes:
    """What the memory bank uses of torch.distributed, among threads. (Among real processes further below.)"""

    def __init__(self, count: int) -> None:
        self.meeting, self.sent, self.me = threading.Barrier(count, timeout=60), [None] * count, threading.local()

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What a function of the rank returns in each of them."""

        def started(rank: int) -> Any:
            self.me.rank = rank
            try:
                return work(rank)
            except BaseException:
                self.meeting.abort()  # nobody waits for this one
                raise

        with ThreadPoolExecutor(len(self.sent)) as pool:
            return list(pool.map(started, range(len(self.sent))))

    def exchange(self, mine: torch.Tensor) -> list[torch.Tensor]:
        self.sent[self.me.rank] = mine.clone()
        self.meeting.wait()
        theirs = list(self.sent)
        assert len({tensor.shape for tensor in theirs}) == 1 and len({tensor.dtype for tensor in theirs}) == 1
        self.meeting.wait()
        return theirs

    def all_reduce(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.stack(self.exchange(tensor)).sum(dim=0))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        tensor.copy_(self.exchange(tensor)[source])

    def all_gather(self, places: list[torch.Tensor], mine: torch.Tensor) -> None:
        for place, theirs in zip(places, self.exchange(mine), strict=True):
            place.copy_(theirs)


def test_three_processes_with_uneven_shares_vote_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of 7, 7 and 6 of 20 images, 5, 0 and 7 queries, and more neighbors asked for than a share has."""
    processes = Processes(3)
    monkeypatch.setattr(jepa_lightning.probes.images.memory_bank, "distributed", processes)
    monkeypatch.setattr(jepa_lightning.probes.images.memory_bank, "QUERY_ROWS", 3)
    features, labels = members(20, 0)
    queries = members(12, 1)[0]

    def work(rank: int) -> tuple[int, int, torch.Tensor, dict]:
        memory_bank = MemoryBank(7, rank, 3)
        for row in range(rank, 20, 3):
            memory_bank.add(features[row : row + 1], labels[row : row + 1])
        count, mine = memory_bank.close(), queries[slice(*((0, 5), (5, 5), (5, 12))[rank])]
        return (
            count,
            memory_bank.count,
            memory_bank.mean,
            {k: memory_bank.vote(mine, k, temperature) for k, temperature in CASES.items()},
        )

    found = processes.run(work)
    memory_bank = MemoryBank(20)
    memory_bank.add(features, labels)
    memory_bank.close()
    assert [(total, own) for total, own, _, _ in found] == [(20, 7), (20, 7), (20, 6)]
    for neighbors, temperature in CASES.items():
        votes = torch.cat([votes[neighbors] for _, _, _, votes in found])
        assert torch.equal(votes, memory_bank.vote(queries, neighbors, temperature)), f"{neighbors} neighbors"
        assert len(votes.unique()) > 1
    for _, _, mean, _ in found:
        torch.testing.assert_close(mean, memory_bank.mean)


def test_shares_are_all_images_once_each(image_root: Path) -> None:
    data = small_images(image_root)
    data.setup("test")
    loader = data.plain_train_dataloader()
    whole = torch.cat([batch.images for batch in loader])
    shares = [torch.cat([batch.images for batch in share_of(loader, rank, 5)]) for rank in range(5)]
    assert [len(share) for share in shares] == [5, 5, 5, 5, 4]
    for rank, share in enumerate(shares):
        assert torch.equal(share, whole[rank::5])
    assert len(share_of(loader, 23, 24)) == 1
    with pytest.raises(ValueError, match="24 training images leave some of 25 processes without any"):
        share_of(loader, 0, 25)


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """Two classes of 19 images that nothing tells apart: a guess is right half of the time."""
    for name in ("ant", "bee"):
        write_images(tmp_path / "noise" / name, 19, hue=0 if name == "ant" else 3)
    return tmp_path / "noise"


@pytest.fixture
def checkpoint(tmp_path: Path, noise: Path) -> str:
    run = trainer(tmp_path, max_steps=1, enable_checkpointing=True)
    run.fit(small_ijepa(), small_images(noise))
    run.save_checkpoint(tmp_path / "ijepa.ckpt")
    return str(tmp_path / "ijepa.ckpt")


PROBE = """
import sys
from conftest import small_images, trainer
from jepa_lightning.probes import KNNProbe
import torch

torch.set_num_threads(1)
out, devices, checkpoint, root = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
run = trainer(out, devices=devices, strategy="ddp" if devices > 1 else "auto")
probe = KNNProbe(checkpoint, num_classes=2, num_neighbors=5)
run.test(probe, small_images(root, batch_size=2, val_fraction=0.24), verbose=False)
"""


def test_two_processes_report_what_one_reports(tmp_path: Path, noise: Path, checkpoint: str) -> None:
    """15 + 15 images in the memory bank and 4 + 4 held out, in uneven batches."""
    run_here(PROBE, tmp_path / "one", "1", checkpoint, str(noise))
    run_script(PROBE, tmp_path / "two", "2", checkpoint, str(noise))
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    for report in (one, two):
        report.pop("command")
    assert one == two
    assert any(0 < figures["accuracy"] < 1 for figures in one["accuracy"].values()), "there is something to get wrong"


def test_encoded_in_bfloat16_and_compared_in_float32(tmp_path: Path, image_root: Path, checkpoint: str) -> None:
    run = trainer(tmp_path, precision="bf16-mixed")
    run.test(KNNProbe(checkpoint, num_classes=2), small_images(image_root), verbose=False)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["accuracy"]["pixels"]["accuracy"] == 1


def test_without_baselines_the_embeddings_alone_are_evaluated(
    tmp_path: Path, image_root: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []
    monkeypatch.setattr(MemoryBank, "close", lambda self, close=MemoryBank.close: closed.append(1) or close(self))

    def test(**arguments: Any) -> dict:
        run = trainer(tmp_path)
        run.test(KNNProbe(checkpoint, num_classes=2, **arguments), small_images(image_root), verbose=False)
        return json.loads((tmp_path / "report.json").read_text())["accuracy"]

    alone = test(baselines=False)
    assert set(alone) == {"features"} and len(closed) == 1
    assert alone["features"] == test()["features"] and len(closed) == 4
    assert alone["features"]["num_neighbors"] == 20
    assert "untrained" not in dict(KNNProbe(checkpoint, num_classes=2, baselines=False).named_children())
