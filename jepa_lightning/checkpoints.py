"""Models out of checkpoints, with clear errors.

Weights from elsewhere come in, and ours go out:

    python -m jepa_lightning.checkpoints import IN1K-vit.h.14-300e.pth.tar runs/vith14.ckpt
    python -m jepa_lightning.checkpoints export runs/ijepa_cifar10/checkpoints/last.ckpt encoder.safetensors
"""

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from callbacks.checkpointing import is_local
from jepa_lightning import layouts
from jepa_lightning.ijepa import IJEPA
from jepa_lightning.jepa import JEPA
from jepa_lightning.layouts import State
from jepa_lightning.picture_jepa import PictureJEPA
from jepa_lightning.storage import FORMAT_VERSION, AtomicCheckpointIO, class_name, read_file, read_url

ModuleType = TypeVar("ModuleType", bound=LightningModule)

SHARDED = "meta.pt"
"""File of a sharded checkpoint's folder that is written last, and holds all that is not a tensor."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint's content, read without running any code in it (weights_only).

    Args:
        path: Of a file, of the folder of a sharded checkpoint (all but its weights is read), or a URL.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, damaged, or no Lightning checkpoint.
    """
    if not is_local(path):
        checkpoint = read_url(str(path))
    elif Path(path).is_dir():
        if not (Path(path) / SHARDED).is_file():
            raise ValueError(f"{path} is a folder without {SHARDED}: not a checkpoint, or one that was not finished.")
        checkpoint = {"state_dict": {}, "optimizer_states": []} | read_file(Path(path) / SHARDED)
    elif Path(path).is_file():
        checkpoint = read_file(Path(path))
    else:
        raise FileNotFoundError(f"No checkpoint at {path}. Train first, or give the path of an existing .ckpt file.")
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or "hyper_parameters" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of this application: it has no state_dict with hyper_parameters.")
    if (version := checkpoint.get("format_version", 0)) > FORMAT_VERSION:
        raise ValueError(f"{path} has format {version}, and this version reads up to {FORMAT_VERSION}: update it.")
    return checkpoint


def load_jepa(path: str | os.PathLike[str]) -> JEPA:
    """The JEPA in a checkpoint, on the CPU, in evaluation mode.

    Args:
        path: Written by `jepa-lightning fit`, whichever family the model is of. With `DESCRIBED` behind the path of a
            probe, the JEPA that it was fitted on as it was built, whose weights come with the probe.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, or holds something other than a JEPA.
    """
    if str(path).endswith(DESCRIBED):
        described = read_checkpoint(str(path).removesuffix(DESCRIBED))[RECORD]
        jepa = _known(path, described["class"], JEPA)(**described["hyper_parameters"])  # type: ignore[type-abstract]
        jepa.on_load_checkpoint(described)
        jepa.built_with = described["hyper_parameters"]
        return jepa.eval()
    return _load(path, read_checkpoint(path), JEPA)  # type: ignore[type-abstract]


def load_probe(path: str | os.PathLike[str], kind: type[ModuleType]) -> ModuleType:
    """A fitted probe of the given class, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, or holds something else.
    """
    return _load(path, read_checkpoint(path), kind)


RECORD, DESCRIBED = "jepa", "#jepa"
"""Key in a probe's checkpoint under which its JEPA is described, so that the JEPA's own file may be gone; and what stands
behind the probe's path to name that description."""


def record(jepa: JEPA) -> dict[str, Any]:
    """What a JEPA can be built from again, without its weights."""
    trained_on = getattr(jepa, "trained_on", None)
    # Not its hparams: in the command line, what is built inside of a probe is given the probe's.
    described = {"class": class_name(type(jepa)), "hyper_parameters": jepa.built_with}
    return described | {"trained_on": trained_on or {}, "views": trained_on}  # the keys of the two families


def _load(path: str | os.PathLike[str], checkpoint: dict[str, Any], kind: type[ModuleType]) -> ModuleType:
    if not checkpoint["state_dict"]:
        raise ValueError(
            f"{path} is sharded: make one file of it with "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {path}`."
        )
    found = _known(path, checkpoint.get("class"), kind)
    # Not by load_from_checkpoint, which would import whatever "_instantiator" names.
    arguments = {name: value for name, value in checkpoint["hyper_parameters"].items() if not name.startswith("_")}
    if RECORD in checkpoint and not os.path.exists(arguments["checkpoint"]):
        arguments["checkpoint"] = f"{path}{DESCRIBED}"
    try:
        model = found(**arguments)
        if isinstance(model, JEPA):
            model.built_with = arguments
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit this version of {found.__name__}: {reason}") from error
    return model.eval()


def _known(path: str | os.PathLike[str], name: str | None, kind: type[ModuleType]) -> type[ModuleType]:
    """The class of that name, if it is imported already and derived from `kind`: a file never chooses what to import."""
    known = {class_name(cls): cls for cls in _family(kind)}
    known |= {cls.__name__: cls for cls in known.values() if cls.__module__.startswith("jepa_lightning.")}  # older files
    if name not in known:
        ours = name is None or name.removeprefix("jepa_lightning.") != name
        holds = "a model of unknown class" if name is None else name.rsplit(".", 1)[-1] if ours else name
        hint = "" if ours else " If that is a class of your own, import it first."
        raise ValueError(f"{path} holds {holds}, not a {kind.__name__}.{hint}")
    return known[name]


def _family(kind: type[ModuleType]) -> list[type[ModuleType]]:
    """A class and everything derived from it."""
    return [kind, *(cls for child in kind.__subclasses__() for cls in _family(child))]


def load_official(path: str | os.PathLike[str], image_size: tuple[int, int] | None = None) -> IJEPA:
    """An I-JEPA with the weights of a released checkpoint: context encoder, predictor and target encoder.

    Args:
        path: A .pth.tar of facebookresearch/ijepa.
        image_size: H and W in pixels; the square that the number of patches makes if left out.

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
    encoder, target, predictor = (layouts.without_prefix(checkpoint[part], "module.") for part in parts)
    return _assemble(path, encoder, target, layouts.predictor_from_official(predictor), image_size)


def load_encoder(path: str | os.PathLike[str], image_size: tuple[int, int] | None = None) -> IJEPA:
    """An I-JEPA whose encoders both have weights in the layout of timm or Hugging Face; its predictor is untrained.

    Args:
        path: A .safetensors, .bin or .pth file, or a folder with model.safetensors as Hugging Face writes it.
        image_size: H and W in pixels; the square that the number of patches makes if left out.

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
    encoder = layouts.from_hugging_face(state) if layouts.is_hugging_face(state) else state
    jepa = _assemble(path, encoder, encoder, None, image_size)
    heads = json.loads(config.read_text()).get("num_attention_heads") if config.is_file() else None
    if heads is not None and heads != jepa.target_encoder.num_heads:
        raise ValueError(f"{config} says {heads} heads; {jepa.hparams.encoder} has {jepa.target_encoder.num_heads}.")
    return jepa


def _assemble(
    path: Path, encoder: State, target: State, predictor: State | None, image_size: tuple[int, int] | None
) -> IJEPA:
    """Build the I-JEPA that the weights belong to, and fill it."""
    try:
        found = layouts.read_architecture(encoder)
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
    jepa = IJEPA(found.name, image_size, found.patch_size, found.depth, **sizes)
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


def import_weights(source: str, destination: str, image_size: tuple[int, int] | None = None) -> None:
    """Make a checkpoint of this application, for probes, of weights from elsewhere.

    Args:
        source: A .pth.tar of the released I-JEPA, or an encoder in timm's or Hugging Face's layout.
        destination: The .ckpt to write.
        image_size: H and W in pixels, where the patches make no square.
    """
    official = Path(source).is_file() and not source.endswith(".safetensors") and "target_encoder" in read_file(Path(source))
    jepa = load_official(source, image_size) if official else load_encoder(source, image_size)
    if not official:
        print(f"{source} has one encoder and no predictor: both encoders get it, the predictor is untrained.")
    trainer = Trainer(accelerator="cpu", logger=False, plugins=[AtomicCheckpointIO()], enable_progress_bar=False)
    trainer.strategy.connect(jepa)
    trainer.save_checkpoint(destination, weights_only=True)
    print(f"{destination}: {jepa.hparams.encoder}, {jepa.hparams.encoder_depth} blocks, pictures of {jepa.image_size}.")


def export_weights(
    checkpoint: str,
    destination: str,
    layout: Literal["official", "timm", "huggingface", "safetensors"] = "safetensors",
    encoder: Literal["target", "context"] = "target",
) -> None:
    """Write the weights of an I-JEPA, or of an IWM's encoder, for other programs.

    Args:
        checkpoint: Written by `fit`.
        destination: The file to write; with layout huggingface, the folder.
        layout: "official" is a .pth.tar with both encoders and the predictor; "timm" a dictionary written by
            torch.save; "safetensors" the same in that format, with the architecture as metadata; "huggingface" a folder
            for transformers' IJepaModel, with the preprocessing of I-JEPA.
        encoder: Which one to export; the paper evaluates the target encoder. Official has both.
    """
    jepa = load_jepa(checkpoint)
    if not isinstance(jepa, PictureJEPA) or (layout == "official" and not isinstance(jepa, IJEPA)):
        raise ValueError(
            f"{checkpoint} holds a {type(jepa).__name__}: an IJEPA has all layouts, an IWM's encoder all but the official."
        )
    networks = {"target": jepa.target_encoder, "context": jepa.context_encoder}
    states = {name: {"pos_embed": net.positions[None].clone(), **net.vit.state_dict()} for name, net in networks.items()}
    path = Path(destination)
    (path if layout == "huggingface" else path.parent).mkdir(parents=True, exist_ok=True)
    vit = jepa.target_encoder
    if layout == "official":
        block: Any = jepa.predictor.blocks[0]
        heads = block.attn.num_heads
        if heads != vit.num_heads:
            raise ValueError(
                f"{checkpoint}: the predictor has {heads} heads and the encoder {vit.num_heads}; the official layout has "
                "room for one number."
            )
        predictor = layouts.predictor_to_official(jepa.predictor.state_dict())
        predictor["predictor_pos_embed"] = jepa.predictor.positions[None].clone()
        parts = {"encoder": states["context"], "target_encoder": states["target"], "predictor": predictor}
        # The names under which distributed training wraps them, which the released loader expects.
        wrapped: dict[str, Any] = {part: {f"module.{k}": v for k, v in state.items()} for part, state in parts.items()}
        torch.save(wrapped | {"epoch": 0}, path)
    elif layout == "timm":
        torch.save(states[encoder], path)
    elif layout == "safetensors":
        about = {"encoder": str(jepa.hparams.encoder), "depth": str(len(vit.vit.blocks)), "layout": "timm"}
        about |= {"image_size": f"{jepa.image_size[0]},{jepa.image_size[1]}", "patch_size": str(jepa.hparams.patch_size)}
        save_file(states[encoder], path, metadata=about)
    else:
        save_file(layouts.to_hugging_face(states[encoder]), path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(_hugging_face_config(jepa), indent=2) + "\n")
        (path / "preprocessor_config.json").write_text(json.dumps(_hugging_face_preprocessing(jepa), indent=2) + "\n")
    print(f"{path}: {encoder} encoder, layout {layout}.")


def _hugging_face_config(jepa: PictureJEPA) -> dict[str, Any]:
    """What transformers' IJepaConfig must say."""
    encoder = jepa.target_encoder
    height, width = jepa.image_size
    return {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": encoder.dim,
        "num_hidden_layers": len(encoder.vit.blocks),
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": encoder.vit.blocks[0].mlp.fc1.out_features,
        "image_size": height if height == width else [height, width],
        "patch_size": jepa.hparams.patch_size,
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
    }


def _hugging_face_preprocessing(jepa: PictureJEPA) -> dict[str, Any]:
    """What transformers' ViTImageProcessor must do: its own defaults are not the mean and deviation of I-JEPA."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": jepa.image_size[0], "width": jepa.image_size[1]},
        "image_mean": list(IMAGENET_DEFAULT_MEAN),
        "image_std": list(IMAGENET_DEFAULT_STD),
    }


def main(args: list[str] | None = None) -> None:
    """The command line of this file."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # which devices there are is of no interest here
    try:
        auto_cli({"import": import_weights, "export": export_weights}, args=args, as_positional=True)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
