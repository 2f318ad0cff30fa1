"""Weights go out, for timm, Hugging Face and the released I-JEPA."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from datamodules.preprocessing import CENTER_CROP
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
        destination: Path of the folder to write for timm and huggingface, of the file for the others.
        layout: "timm" is a folder that timm.create_model("local-dir:FOLDER", pretrained=True) loads, also for other image
            sizes and as features_only; "huggingface" one for transformers' IJepaModel; both say how to preprocess.
            "official" is a .pth.tar with both encoders and the predictor, "safetensors" the encoder's weights alone, by
            timm's names, with the architecture as metadata.
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
    (path if layout in ("timm", "huggingface") else path.parent).mkdir(parents=True, exist_ok=True)
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
        save_file(states[encoder], path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(_timm_config(jepa), indent=2) + "\n")
    elif layout == "safetensors":
        about = {"encoder": str(jepa.hparams.encoder), "depth": str(len(vit.vit.blocks)), "layout": "timm"}
        about["pixels"] = json.dumps(jepa.pixels.to_dict())
        about |= {
            "image_size": f"{jepa.image_size[0]},{jepa.image_size[1]}",
            "patch_size": str(jepa.target_encoder.patch_size),
        }
        save_file(states[encoder], path, metadata=about)
    else:
        save_file(formats.to_hugging_face(states[encoder]), path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(_hugging_face_config(jepa), indent=2) + "\n")
        (path / "preprocessor_config.json").write_text(json.dumps(_hugging_face_preprocessing(jepa), indent=2) + "\n")
    print(f"{path}: {encoder} encoder, layout {layout}.")
    if layout == "timm":
        print(f'Load it with timm.create_model("local-dir:{path}", pretrained=True).')


def _timm_config(jepa: ImageJEPA) -> dict[str, Any]:
    """What timm must know to build the encoder, pooled by the average over its patches after the last norm."""
    encoder, (height, width) = jepa.target_encoder, jepa.image_size
    return {
        "architecture": str(jepa.hparams.encoder),
        "pixels": jepa.pixels.to_dict(),
        "num_classes": 0,
        "num_features": encoder.dim,
        "global_pool": "avg",
        "model_args": {
            "img_size": [height, width],
            "patch_size": encoder.patch_size,
            "in_chans": jepa.channels,
            "depth": len(encoder.vit.blocks),
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
        },
        "pretrained_cfg": {
            "tag": "jepa",
            "input_size": [jepa.channels, height, width],
            "fixed_input_size": False,
            "mean": list(jepa.pixels.mean),
            "std": list(jepa.pixels.std),
            "interpolation": "bilinear",
            "crop_pct": CENTER_CROP,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _hugging_face_config(jepa: ImageJEPA) -> dict[str, Any]:
    """What transformers' IJepaConfig must say."""
    encoder = jepa.target_encoder
    height, width = jepa.image_size
    return {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "pixels": jepa.pixels.to_dict(),
        "hidden_size": encoder.dim,
        "num_hidden_layers": len(encoder.vit.blocks),
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": encoder.vit.blocks[0].mlp.fc1.out_features,
        "image_size": height if height == width else [height, width],
        "patch_size": encoder.patch_size,
        "num_channels": jepa.channels,
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
    }


def _hugging_face_preprocessing(jepa: ImageJEPA) -> dict[str, Any]:
    """What transformers' ViTImageProcessor must do: its defaults are another mean and standard deviation."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": jepa.image_size[0], "width": jepa.image_size[1]},
        "image_mean": list(jepa.pixels.mean),
        "image_std": list(jepa.pixels.std),
    }
