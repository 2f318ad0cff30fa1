"""Speed of I-JEPA's masks, input pipeline and training step, compared with plain references in the same run.

    python benchmarks/ijepa.py [--full]

`--full` measures the training step of ViT-S/16 at 224 pixels with 32 images on a CPU, not 4.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

from callbacks.ema import update_average
from datamodules.decoding import read_image
from datamodules.image_datasets import TrainingImages
from datamodules.image_files import Samples
from datamodules.pixel_format import IMAGENET_MEAN, IMAGENET_STD
from datamodules.preprocessing import normalize
from jepa_lightning.losses import smooth_l1
from jepa_lightning.masks import MultiBlock
from jepa_lightning.networks.masked_predictor import MaskedPredictor
from jepa_lightning.networks.vit import ViTEncoder, take
from jepa_lightning.optim import parameter_groups

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """The minimum time of several calls; the first call warms up and does not count."""
    function()
    times = []
    for _ in range(repeats):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def bench_masks() -> None:
    """14 x 14 patches, 128 images, one thread."""
    generator = torch.Generator().manual_seed(0)
    unbiased, released = MultiBlock((14, 14)), MultiBlock((14, 14), official_compat=True)
    for scale in range(200):  # calibrate all sizes
        unbiased.draw(8, torch.Generator().manual_seed(scale))
    ours = seconds(lambda: unbiased.draw(128, generator), 200) / 128
    truncated = seconds(lambda: released.draw(128, generator), 200) / 128
    print(f"masks, 14 x 14, 128 images: {1e3 * ours:.4f} ms an image (limit 0.05)")
    print(f"  with the flaws of the released code: {1e3 * truncated:.4f} ms (the released code itself takes about 1 ms)")


def photographs(folder: Path, count: int = 32) -> list[str]:
    """JPEGs of 500 x 375 pixels with the spectrum of photographs, about 115 kB each."""
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.fftfreq(500)[None])
    frequency[0, 0] = 1
    paths = []
    for number in range(count):
        spectrum = np.fft.fft2(random.standard_normal((3, 375, 500))) / frequency**1.1
        pixels = np.fft.ifft2(spectrum).real
        pixels = 120 + 55 * (pixels - pixels.mean()) / pixels.std()
        paths.append(str(folder / f"{number}.jpg"))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(paths[-1], quality=90)
    return paths


def bench_input() -> None:
    """From JPEG files to training crops of 224 pixels, one core."""
    plain = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.3, 1.0)),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(Path(folder))
        samples = Samples(np.array([path.encode() for path in paths]), torch.zeros(len(paths), dtype=torch.int64))
        images = TrainingImages(samples, (224, 224), 0, (0.3, 1.0), 0.0)
        epoch = iter(range(1_000))
        whole = range(len(paths))

        def ours() -> None:
            number = next(epoch)
            images.__getitems__([(number, index) for index in whole])

        def ours_to_float() -> None:
            number = next(epoch)
            normalize(images.__getitems__([(number, index) for index in whole]).images)

        def reference() -> None:
            torch.stack([plain(Image.open(path).convert("RGB")) for path in paths])

        def decode() -> None:
            for path in paths:
                read_image(path)

        # In turns, so that a busy machine slows all of them.
        arms = (ours, ours_to_float, reference, decode)
        found = np.array([[seconds(f, 1) for f in arms] for _ in range(7)]) / len(paths)
    mine, mine_to_float, theirs, floor = found.min(axis=0)
    print(
        f"input, 500-pixel JPEGs: {1 / mine:.0f} images a second and core; PIL with torchvision v1 transforms "
        f"{1 / theirs:.0f}: ratio {theirs / mine:.2f} (limit 1.5)\n"
        f"  were the device's part, normalized floats, done by the same core: ratio {theirs / mine_to_float:.2f}\n"
        f"  decoding alone, the floor: {1 / floor:.0f}; it is {floor / mine:.0%} of our time"
    )


class ExplicitAttention(nn.Module):
    """Attention as in a textbook: a softmax over all pairs, in full."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = attention.qkv, attention.proj, attention.num_heads

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **_: object) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        batch, count, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / (dim // self.num_heads) ** 0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, count, dim))


def training_step(reference: bool, batch: int) -> tuple[Callable[[], None], int]:
    """One step of ViT-S/16 at 224 pixels, and its matrix products' floating-point operations."""
    torch.manual_seed(0)
    encoder = ViTEncoder("vit_small_patch16_224", (224, 224), 16)
    predictor = MaskedPredictor(encoder.grid, encoder.dim, 384, 6, 6)
    target = copy.deepcopy(encoder).requires_grad_(False).eval()
    masks = MultiBlock(encoder.grid)
    generator = torch.Generator().manual_seed(0)
    drawn = masks.draw(batch, generator).to(DEVICE)
    for network in (encoder, predictor, target):
        network.to(DEVICE)
        if reference:
            for block in [module for module in network.modules() if hasattr(module, "attn")]:
                block.attn = ExplicitAttention(block.attn)
    groups = parameter_groups([encoder, predictor], 0.04)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, **({"foreach": False} if reference else {}))
    images = torch.randn(batch, 3, 224, 224, device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            with torch.no_grad():
                features = target(images)
            targets = take(F.layer_norm(features.float(), features.shape[-1:]), drawn.targets.flatten(1))
            predicted = predictor(encoder(images, drawn.context), drawn.context, drawn.targets)
            loss = smooth_l1(predicted.float(), targets.unflatten(1, drawn.targets.shape[1:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if reference:
            with torch.no_grad():
                for mine, theirs in zip(target.parameters(), encoder.parameters(), strict=True):
                    mine.mul_(0.996).add_(0.004 * theirs)
        else:
            update_average(target, encoder, 0.996)

    def products(network: nn.Module, tokens: int, width: int, depth: int) -> int:
        weights = sum(p.numel() for p in network.parameters() if p.ndim == 2)
        return 2 * tokens * weights + 4 * depth * tokens**2 * width

    kept, length = drawn.context.shape[1], drawn.targets.shape[2]
    forward = products(encoder, kept, encoder.dim, 12) + 4 * products(predictor, kept + length, 384, 6)
    return step, batch * (3 * forward + products(target, 196, encoder.dim, 12))


def bench_step(batch: int) -> None:
    """A training step with and without what we do for speed, in turns."""
    steps = [training_step(reference, batch) for reference in (False, True)]
    repeats = 10 if DEVICE.type == "cuda" else 3
    found = np.array([[seconds(step, 1) for step, _ in steps] for _ in range(repeats)])
    (ours, theirs), operations = found.min(axis=0), steps[0][1]
    print(
        f"training step, ViT-S/16 at 224, {batch} images, bfloat16, {DEVICE.type}: {batch / ours:.1f} images a second, "
        f"plain reference {batch / theirs:.1f}: ratio {theirs / ours:.2f}"
    )
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        steps[0][0]()
        print(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB (reference's networks included)")
    size = 4096 if DEVICE.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    peak = 2 * size**3 / seconds(lambda: matrix @ matrix, 10)
    print(
        f"  {operations / ours / 1e12:.3f} TFLOP/s in matrix products, {operations / ours / peak:.0%} of the "
        f"{peak / 1e12:.2f} that a product of {size} x {size} matrices reaches: that is the floor"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="32 images per training step on a CPU, not 4")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench_masks()
    bench_input()
    bench_step(128 if DEVICE.type == "cuda" else 32 if arguments.full else 4)
