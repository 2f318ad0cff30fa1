"""Weights go out, for timm, Hugging Face and the released I-JEPA."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from jepa_lightning.ijepa import IJEPA
from jepa_lightning.image_jepa import ImageJEPA
from jepa_lightning.weights import formats
from jepa_lightning.weights.checkpoints import load_jepa


def export_weights(
    checkpoint: str,
    destination: str,
    layout: Literal["official", "timm", "huggingface", "safetensors"] = "safetensors",
    encoder: Literal["target", "context"] = "target",
) -> None:
    """Write the weights of an I-JEPA, or of an IWM's encoder, for other programs.

    Args:
        checkpoint: Path of a checkpoint written by `fit`.
        destination: Path of the file to write; with layout huggingface, of the folder.
        layout: "official" is a .pth.tar with both encoders and the predictor; "timm" a dictionary written by
            torch.save; "safetensors" the same in that format, with the architecture as metadata; "huggingface" a folder
            for transformers' IJepaModel, with the preprocessing of I-JEPA.
        encoder: Which encoder to export; the paper evaluates the target encoder. Official has both.
    """
    jepa = load_jepa(checkpoint)
    if not isinstance(jepa, ImageJEPA) or (layout == "official" and not isinstance(jepa, IJEPA)):
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
        predictor = formats.predictor_to_official(jepa.predictor.state_dict())
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
        save_file(formats.to_hugging_face(states[encoder]), path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(_hugging_face_config(jepa), indent=2) + "\n")
        (path / "preprocessor_config.json").write_text(json.dumps(_hugging_face_preprocessing(jepa), indent=2) + "\n")
    print(f"{path}: {encoder} encoder, layout {layout}.")


def _hugging_face_config(jepa: ImageJEPA) -> dict[str, Any]:
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


def _hugging_face_preprocessing(jepa: ImageJEPA) -> dict[str, Any]:
    """What transformers' ViTImageProcessor must do: its defaults are not the mean and standard deviation of I-JEPA."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": jepa.image_size[0], "width": jepa.image_size[1]},
        "image_mean": list(IMAGENET_DEFAULT_MEAN),
        "image_std": list(IMAGENET_DEFAULT_STD),
    }
