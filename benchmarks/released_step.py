"""Time of an I-JEPA training step, next to that of the released code (facebookresearch/ijepa), in turns in one process.

    python benchmarks/released_step.py CHECKOUT [--image_size 32 --patch_size 4 --encoder vit_tiny --depth 6 ...]

CHECKOUT is a clone of github.com/facebookresearch/ijepa, whose networks and mask collator are imported from there. Both
sides draw their masks, encode, predict, go back, take a step of AdamW, and update the average; images are the same noise.
Printed are the median of the ratios, released over ours, and how many tokens each side's networks look at. With
`--num_contexts 2 --compile`, as configs/ijepa/folder.yaml has it, our side takes half as many images with two contexts each:
as many contexts and target blocks a step as the released code.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from callbacks.ema import update_average
from datamodules.batches import ImageBatch
from jepa_lightning import IJEPA
from jepa_lightning.optim import parameter_groups

Step = Callable[[], dict[str, float]]
"""Takes a training step, and says how many tokens its networks looked at."""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkout")
parser.add_argument("--encoder", default="vit_small", choices=("vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"))
parser.add_argument("--depth", type=int, help="Blocks of the encoder; those of the named one by default.")
parser.add_argument("--image_size", type=int, default=224)
parser.add_argument("--patch_size", type=int, default=16)
parser.add_argument("--predictor_width", type=int, default=384)
parser.add_argument("--predictor_depth", type=int, default=6)
parser.add_argument("--predictor_context", default="repeated")
parser.add_argument("--masks", default="ours", choices=("ours", "released"), help="Which masks our side draws.")
parser.add_argument("--num_contexts", type=int, default=1, help="Contexts of an image on our side; divides the batch size.")
parser.add_argument("--compile", action="store_true", help="Compile the networks of our side.")
parser.add_argument("--batch_size", type=int, default=16, help="Contexts of a step.")
parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
parser.add_argument("--turns", type=int, default=15)
parser.add_argument("--threads", type=int, default=1)


def autocast(given: argparse.Namespace, device: torch.device) -> Any:
    """Lower precision, if it is asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bfloat16")


def counted(context: Any, target: Any, predictor: Any) -> dict[str, float]:
    """How many tokens the first blocks of three networks are given, kept up to date."""
    tokens: dict[str, float] = {}
    for name, network in (("context", context), ("target", target), ("predictor", predictor)):

        def note(_module: Any, inputs: tuple[Tensor, ...], name: str = name) -> None:
            tokens[name] = inputs[0][..., 0].numel()

        network[0].register_forward_pre_hook(note)
    return tokens


def ours(given: argparse.Namespace, images: Tensor) -> Step:
    """A step as `fit` takes it, without the trainer."""
    device = images.device
    jepa = IJEPA(
        f"{given.encoder}_patch{14 if given.encoder == 'vit_huge' else 16}_224",
        image_size=given.image_size,
        patch_size=given.patch_size,
        encoder_depth=given.depth,
        predictor_width=given.predictor_width,
        predictor_depth=given.predictor_depth,
        predictor_context=given.predictor_context,
        num_contexts=given.num_contexts,
        official_compat=given.masks == "released",
    ).to(device)
    networks = (jepa.context_encoder, jepa.predictor)
    optimizer = torch.optim.AdamW(parameter_groups(networks, 0.05), lr=1e-3)
    tokens = counted(jepa.context_encoder.vit.blocks, jepa.target_encoder.vit.blocks, jepa.predictor.blocks)
    if given.compile:
        for network in (jepa.context_encoder, jepa.target_encoder, jepa.predictor):
            network.compile(dynamic=True)
    # Several contexts are for training alone: what the masks ask of a trainer.
    jepa._trainer = SimpleNamespace(training=True, global_step=0, estimated_stepping_batches=10**9)  # type: ignore[assignment]
    number = iter(range(10**9))
    images = images[: len(images) // given.num_contexts]
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)

    def step() -> dict[str, float]:
        with autocast(given, device):
            jepa._trainer.global_step = next(number)
            loss = jepa.prediction_loss(jepa.target_pairs(ImageBatch(images, labels, (0, 0, jepa._trainer.global_step))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_average(jepa.target_encoder, jepa.context_encoder, 0.996)
        return dict(tokens)

    return step


def released(given: argparse.Namespace, images: Tensor) -> Step:
    """A step of the released code's networks on its collator's masks."""
    sys.path.insert(0, given.checkout)
    from src.masks.multiblock import MaskCollator  # type: ignore[import-not-found]
    from src.masks.utils import apply_masks  # type: ignore[import-not-found]
    from src.models import vision_transformer as models  # type: ignore[import-not-found]

    device = images.device
    depth = {} if given.depth is None else {"depth": given.depth}
    sizes = {"img_size": [given.image_size], "patch_size": given.patch_size}
    if depth:  # its functions fix the depth
        width, heads = {"vit_tiny": (192, 3), "vit_small": (384, 6)}[given.encoder]
        encoder = models.VisionTransformer(**sizes, **depth, embed_dim=width, num_heads=heads, mlp_ratio=4, qkv_bias=True)
    else:
        encoder = getattr(models, given.encoder)(**sizes)
    predictor = models.vit_predictor(
        num_patches=encoder.patch_embed.num_patches,
        embed_dim=encoder.embed_dim,
        predictor_embed_dim=given.predictor_width,
        depth=given.predictor_depth,
        num_heads=encoder.num_heads,
    )
    encoder, predictor = encoder.to(device), predictor.to(device)
    target = copy.deepcopy(encoder).requires_grad_(False)
    collator = MaskCollator(
        input_size=given.image_size,
        patch_size=given.patch_size,
        enc_mask_scale=(0.85, 1.0),
        pred_mask_scale=(0.15, 0.2),
        aspect_ratio=(0.75, 1.5),
        nenc=1,
        npred=4,
        min_keep=min(10, (given.image_size // given.patch_size) ** 2 // 8),
    )
    optimizer = torch.optim.AdamW(parameter_groups((encoder, predictor), 0.05), lr=1e-3)
    tokens = counted(encoder.blocks, target.blocks, predictor.predictor_blocks)

    def step() -> dict[str, float]:
        _, seen, hidden = collator([torch.zeros(1)] * len(images))
        seen, hidden = [m.to(device) for m in seen], [m.to(device) for m in hidden]
        with autocast(given, device):
            with torch.no_grad():
                features = target(images)
                targets = apply_masks(F.layer_norm(features, features.shape[-1:]), hidden)
            loss = F.smooth_l1_loss(predictor(encoder(images, seen), seen, hidden), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for online, average in zip(encoder.parameters(), target.parameters(), strict=True):
                average.data.mul_(0.996).add_(0.004 * online.detach().data)
        return dict(tokens)

    return step


def main() -> None:
    """Measure and print."""
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.randn(given.batch_size, 3, given.image_size, given.image_size, device=device)
    steps = {"ours": ours(given, images), "released": released(given, images)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    tokens: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    warm_up = 5 if given.compile else 1
    for turn in range(warm_up + given.turns):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            seen = step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - began)
                tokens[name].append({network: count / given.batch_size for network, count in seen.items()})
    ratio = statistics.median(theirs / mine for mine, theirs in zip(seconds["ours"], seconds["released"], strict=True))
    for name, found in tokens.items():
        counts = ", ".join(f"{key} {statistics.mean(turn[key] for turn in found):.1f}" for key in found[0])
        print(f"{name}: {statistics.median(seconds[name]):.3f} s a step; tokens a context: {counts}")
    print(f"released / ours: {ratio:.2f}")


if __name__ == "__main__":
    main()
