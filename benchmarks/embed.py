"""Images per second of `predict`, which writes embeddings, next to a bare loop over the encoder; both in two processes.

    python benchmarks/embed.py [--size 20000] [--rounds 3]

Synthetic images of 32 pixels, an encoder of six blocks (ViT-Ti, patches of 4 pixels). The bare loop decodes the same files
by the same loader, encodes them and keeps the averages in memory: it has no Trainer and writes nothing. Timed is the loop
in each case, in turns; start-up is left out of both. Then what was written is checked: every path once, in order.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

BARE = """
import sys, time
from pathlib import Path
import torch
from torch import multiprocessing
from torch.utils.data import DataLoader, Subset
from benchmarks_embed import data, model
from datamodules.image_datasets import NumberedImages
from datamodules.preprocessing import normalize
from datamodules.resumable import already_collated

def work(rank, folder, start, seconds):
    torch.set_num_threads(1)
    images = data(folder)
    images.setup("predict")
    files = NumberedImages(images.predict_files, (32, 32), 0)
    loader = DataLoader(Subset(files, range(rank, len(files), 2)), batch_size=64, collate_fn=already_collated)
    encoder, found = model().target_encoder.eval(), []
    start.wait()
    began = time.monotonic()
    with torch.inference_mode():
        for batch in loader:
            found.append(encoder(normalize(batch.images)).mean(dim=1))
    seconds[rank] = time.monotonic() - began

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    start, seconds = context.Barrier(2), context.Array("d", 2)
    jobs = [context.Process(target=work, args=(rank, sys.argv[1], start, seconds)) for rank in (0, 1)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    print("seconds", max(seconds))
"""

PREDICT = """
import sys, time
import torch
from lightning.pytorch import Callback, Trainer
from benchmarks_embed import data, model
from callbacks import EmbeddingWriter

class Clock(Callback):
    def on_predict_start(self, trainer, module):
        trainer.strategy.barrier()
        self.began = time.monotonic()

    def on_predict_end(self, trainer, module):
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            print("seconds", time.monotonic() - self.began)

torch.set_num_threads(1)
run = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", logger=False, default_root_dir=sys.argv[2], enable_progress_bar=False,
    callbacks=[EmbeddingWriter(projector=False), Clock()],
)
run.predict(model(), data(sys.argv[1]), return_predictions=False)
"""

SHARED = """
import torch
from jepa_lightning import IJEPA, ImageFolder

def model():
    torch.manual_seed(0)
    return IJEPA("vit_tiny_patch16_224", 32, 4, encoder_depth=6, predictor_width=96, predictor_depth=4)

def data(folder):
    return ImageFolder(folder, image_size=32, batch_size=64, num_workers=0)
"""


def seconds(script: Path, *arguments: str) -> float:
    """What a script prints behind "seconds"."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{script.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.rsplit("seconds ", 1)[1].split()[0])


def main() -> None:
    """Measure in turns, then check what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=20_000, help="how many images")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    arguments = parser.parse_args()
    from jepa_lightning import SyntheticImages

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name, text in (("bare", BARE), ("predict", PREDICT), ("benchmarks_embed", SHARED)):
            (root / f"{name}.py").write_text(text)
        began = time.monotonic()
        SyntheticImages(str(root / "images"), size=arguments.size).prepare_data()
        print(f"{arguments.size} images drawn in {time.monotonic() - began:.0f} s", flush=True)
        ratios = []
        for number in range(arguments.rounds):
            bare = seconds(root / "bare.py", str(root / "images"))
            ours = seconds(root / "predict.py", str(root / "images"), str(root / "run"))
            ratios.append(bare / ours)
            print(
                f"round {number + 1}: bare loop {arguments.size / bare:.0f}, predict {arguments.size / ours:.0f} images a "
                f"second, ratio {ratios[-1]:.3f}",
                flush=True,
            )
        print(f"median ratio {statistics.median(ratios):.3f} (at least 0.95 is aimed at)")
        with (root / "run" / "predict" / "images" / "index.csv").open(newline="") as file:
            paths = [row["path"] for row in csv.DictReader(file)]
        expected = sorted(map(str, (root / "images").rglob("*.png")))
        print(f"{len(paths)} rows; every path once, in order: {paths == expected}")


if __name__ == "__main__":
    main()
