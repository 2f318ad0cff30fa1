"""What a run waits for besides its steps: the start of an epoch, and the writing of a checkpoint.

    python benchmarks/overhead.py                      # 12 workers, 1 GB
    python benchmarks/overhead.py --workers 4 --gigabytes 0.2

* Start of an epoch: until its first batch is there, with workers that live as long as the run, compared with workers that
  are started anew for each epoch, as it was before.
* Writing: how long training waits for a checkpoint of random weights, with our writer, with the same inside of Lightning's
  AsyncCheckpointIO, and with Lightning's own writer as the reference; in turns. The disk counts, and so does what else it
  does.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO

from datamodules import SyntheticImages
from jepa_lightning.weights.io import AtomicCheckpointIO

ROUNDS = 5


def epoch_starts(root: Path, workers: int) -> dict[str, list[float]]:
    """Seconds until the first batch of later epochs, by kind of workers."""
    data = SyntheticImages(str(root / "shapes"), size=2_000, num_workers=workers, batch_size=32)
    data.prepare_data()
    data.setup("fit")
    found: dict[str, list[float]] = {}
    for name, persistent in (("live on", True), ("started anew", False)) * ROUNDS:
        loader = data.make_train_loader()
        settings = data.loader_settings() | {"persistent_workers": persistent}
        loader = type(loader)(loader.loader.dataset, loader.sampler, **settings)
        next(iter(loader))  # the first epoch's workers are started either way
        list(loader)
        began = time.perf_counter()
        next(iter(loader))
        found.setdefault(name, []).append(time.perf_counter() - began)
        loader.shut_down()
    return found


def write_times(root: Path, gigabytes: float) -> dict[str, list[float]]:
    """Seconds that training waits for a checkpoint, by writer, and for the end of the asynchronous one's work."""
    tensors = {str(number): torch.rand(int(gigabytes * 2**28 / 16)) for number in range(16)}
    checkpoint: dict[str, Any] = {"state_dict": tensors, "global_step": 1}
    writers: dict[str, Callable[[], Any]] = {
        "ours": AtomicCheckpointIO,
        "ours, asynchronous": lambda: AsyncCheckpointIO(AtomicCheckpointIO()),
        "Lightning's": TorchCheckpointIO,
    }
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, make in writers.items():
            writer = make()
            began = time.perf_counter()
            writer.save_checkpoint(checkpoint, str(root / "last.ckpt"))
            found.setdefault(name, []).append(time.perf_counter() - began)
            writer.teardown()
            if isinstance(writer, AsyncCheckpointIO):
                found.setdefault(f"{name}, until it is written", []).append(time.perf_counter() - began)
    return found


def table(title: str, found: dict[str, list[float]], first: str) -> None:
    """Medians and ratios, taken round by round."""
    print(f"\n| {title} | median s (minimum, maximum) | over {first} |\n| :-- | --: | --: |")
    for name, seconds in found.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, found[first], strict=True))
        print(f"| {name} | {statistics.median(seconds):.3f} ({min(seconds):.3f}, {max(seconds):.3f}) | {ratio:.2f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as name:
        table(f"start of an epoch, {options.workers} workers", epoch_starts(Path(name), options.workers), "live on")
        table(f"a checkpoint of {options.gigabytes:g} GB", write_times(Path(name), options.gigabytes), "ours")


if __name__ == "__main__":
    main()
