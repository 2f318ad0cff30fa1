"""Weights from elsewhere come in: those of the released I-JEPA, of timm and of Hugging Face."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from safetensors import safe_open
from torch import nn

from datamodules.pixel_format import PixelFormat
from jepa_lightning.ijepa import IJEPA
from jepa_lightning.weights import formats
from jepa_lightning.weights.formats import State
from jepa_lightning.weights.io import AtomicCheckpointIO, read_file


def load_official(path: str | os.PathLike[str], image_size: tuple[int, int] | None = None) -> IJEPA:
    """An I-JEPA with the weights of a released checkpoint: context encoder, predictor and target encoder.

    Args:
        path: Path of a .pth.tar of facebookresearch/ijepa.
        image_size: Height and width in pixels; the square that the number of patches makes by default.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, lacks one of the three, or has weights that do not match; they are listed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}.")
    checkpoint = read_file(path)
    parts = ("encoder", "target_encoder", "predictor")
    absent = [part for part in parts if part not in checkpoint]
    if absent:
        raise ValueError(f"{path} is no checkpoint of the released I-JEPA: it has no {', '.join(absent)}.")
    encoder, target, predictor = (formats.without_prefix(checkpoint[part], "module.") for part in parts)
    return _assemble(path, encoder, target, formats.predictor_from_official(predictor), image_size)


def load_encoder(path: str | os.PathLike[str], image_size: tuple[int, int] | None = None) -> IJEPA:
    """An I-JEPA whose encoders both have weights in the layout of timm or Hugging Face; its predictor is untrained.

    Args:
        path: Path of a .safetensors, .bin or .pth file, or of a folder with model.safetensors as Hugging Face writes it.
        image_size: Height and width in pixels; the square that the number of patches makes by default.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or has weights that do not match; they are listed.
    """
    path = Path(path)
    config = path / "config.json"
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"No weights at {path}.")
    state = read_file(path)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no dictionary of weights.")
    encoder = formats.from_hugging_face(state) if formats.is_hugging_face(state) else state
    jepa = _assemble(path, encoder, encoder, None, image_size)
    about = json.loads(config.read_text()) if config.is_file() else {}
    about = about if isinstance(about, dict) else {}
    pixels = about.get("pixels") or _metadata(path).get("pixels")
    if pixels is not None:  # of our own exports
        jepa.known_pixels = PixelFormat.from_dict(json.loads(pixels) if isinstance(pixels, str) else pixels)
    heads = about.get("num_attention_heads")
    if heads is not None and heads != jepa.target_encoder.num_heads:
        raise ValueError(f"{config} says {heads} heads; {jepa.hparams.encoder} has {jepa.target_encoder.num_heads}.")
    return jepa


def _metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing of other files."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _assemble(
    path: Path, encoder: State, target: State, predictor: State | None, image_size: tuple[int, int] | None
) -> IJEPA:
    """Build the I-JEPA that the weights belong to, and fill it."""
    try:
        found = formats.read_architecture(encoder)
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error
    if image_size is None:
        side = math.isqrt(found.num_patches)
        if side * side != found.num_patches:
            raise ValueError(f"{path} is of {found.num_patches} patches, which make no square: give image_size=(H, W).")
        image_size = (side * found.patch_size, side * found.patch_size)
    sizes: dict[str, Any] = {}
    if predictor is not None and "embed.weight" in predictor:
        sizes["predictor_width"] = len(predictor["embed.weight"])
        sizes["predictor_depth"] = len({name.split(".")[1] for name in predictor if name.startswith("blocks.")})
    jepa = IJEPA(found.name, image_size, found.patch_size, found.depth, channels=found.channels, **sizes)
    jepa.built_with = {name: value for name, value in jepa.hparams.items() if not name.startswith("_")}
    wrong = _fill(jepa.context_encoder.vit, encoder, jepa.context_encoder.positions, "pos_embed", "encoder")
    wrong += _fill(jepa.target_encoder.vit, target, jepa.target_encoder.positions, "pos_embed", "target_encoder")
    if predictor is not None:
        wrong += _fill(jepa.predictor, predictor, jepa.predictor.positions, "predictor_pos_embed", "predictor")
    if wrong:
        raise ValueError(f"{path} does not match {found.name} of {found.depth} blocks:\n  " + "\n  ".join(wrong))
    return jepa.eval()


def _fill(network: nn.Module, state: State, positions: torch.Tensor, table: str, part: str) -> list[str]:
    """Copy weights into a network, unless something does not match: then say what."""
    expected, given = network.state_dict(), dict(state)
    theirs = given.pop(table, None)
    wrong = [f"{part}: {name} is missing" for name in expected.keys() - given.keys()]
    wrong += [f"{part}: {name} is not known" for name in given.keys() - expected.keys()]
    wrong += [
        f"{part}: {name} has shape {tuple(given[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected.keys() & given.keys()
        if given[name].shape != expected[name].shape
    ]
    if theirs is None or theirs.squeeze(0).shape != positions.shape:
        shape = "missing" if theirs is None else f"of shape {tuple(theirs.shape)}, not {(1, *positions.shape)}"
        wrong.append(f"{part}: {table} is {shape}")
    elif not torch.allclose(theirs.squeeze(0).float(), positions, atol=1e-3):  # half precision may have rounded them
        wrong.append(f"{part}: {table} is not I-JEPA's table of sines and cosines")
    if not wrong:
        network.load_state_dict(given)
    return sorted(wrong)


def is_official(path: Path) -> bool:
    """Whether a file holds a whole I-JEPA as it was released, not an encoder alone."""
    content = None if path.suffix == ".safetensors" else read_file(path)
    return isinstance(content, dict) and "target_encoder" in content


def import_weights(source: str, destination: str, image_size: tuple[int, int] | None = None) -> None:
    """Make a checkpoint of this application, for probes, of weights from elsewhere.

    Args:
        source: Path of a .pth.tar of the released I-JEPA, or of an encoder in timm's or Hugging Face's layout.
        destination: Path of the .ckpt to write.
        image_size: Height and width in pixels; needed where the patches make no square.
    """
    official = Path(source).is_file() and is_official(Path(source))
    jepa = load_official(source, image_size) if official else load_encoder(source, image_size)
    if not official:
        print(f"{source} has one encoder and no predictor: both encoders get it, the predictor is untrained.")
    trainer = Trainer(accelerator="cpu", logger=False, plugins=[AtomicCheckpointIO()], enable_progress_bar=False)
    trainer.strategy.connect(jepa)
    trainer.save_checkpoint(destination, weights_only=True)
    print(f"{destination}: {jepa.hparams.encoder}, {jepa.hparams.encoder_depth} blocks, images of {jepa.image_size}.")
