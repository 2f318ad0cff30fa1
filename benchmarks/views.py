"""Cost of IWM's pairs of views, compared with I-JEPA's pipeline and torchvision's bare transforms in the same run.

python benchmarks/views.py
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from ijepa import photographs, seconds
from torchvision.transforms import v2

from datamodules.image_datasets import TrainingImages, TrainingViews
from datamodules.image_files import Samples
from datamodules.views import SOLARIZE_THRESHOLD, ViewMaker, Views, blur_kernel

CROP = (0.3, 1.0)


def bench_views(side: int) -> None:
    """From 500-pixel JPEGs to pairs of views of `side` pixels, one core."""
    size, views = (side, side), Views()
    jitter = v2.RandomApply([v2.ColorJitter(*views.ranges)], views.jitter_probability)
    degrade = v2.Compose(
        [
            jitter,
            v2.RandomGrayscale(views.grayscale_probability),
            v2.RandomApply([v2.GaussianBlur(blur_kernel(torch.empty(size)), views.blur_sigma)], views.blur_probability),
            v2.RandomSolarize(SOLARIZE_THRESHOLD, views.solarize_probability),
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(Path(folder))
        samples = Samples(np.array([path.encode() for path in paths]), torch.zeros(len(paths), dtype=torch.int64))
        pairs = TrainingViews(samples, size, 0, ViewMaker(views, size, CROP, 0.5))
        plain = TrainingImages(samples, size, 0, CROP, 0.5)
        epoch, whole = iter(range(1_000)), range(len(paths))

        def ours() -> None:
            number = next(epoch)
            pairs.__getitems__([(number, index) for index in whole])

        def ijepa() -> None:
            number = next(epoch)
            plain.__getitems__([(number, index) for index in whole])

        def bare() -> None:
            for crop in crops:
                jitter(crop), degrade(crop)

        crops = plain.__getitems__([(0, index) for index in whole]).images
        # In turns, so that a busy machine slows all of them.
        found = np.array([[seconds(f, 1) for f in (ours, ijepa, bare)] for _ in range(7)]) / len(paths)
    mine, pipeline, transforms = 1e3 * np.median(found, axis=0)  # what is drawn differs from turn to turn
    print(
        f"views at {side} pixels: {mine:.2f} ms an image; I-JEPA's pipeline {pipeline:.2f} and torchvision's transforms "
        f"{transforms:.2f}: ratio {mine / (pipeline + transforms):.2f} to the sum (limit 1.5)"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for side in (32, 224):
        bench_views(side)
