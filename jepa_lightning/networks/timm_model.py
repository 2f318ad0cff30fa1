"""Image models of timm, frozen, to compare with: those that hand out the features of their blocks, which nearly all do.

Shapes: B batch, C channels, H W pixels, h w places of a map, D embedding dimension.
"""

import json
import os
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from datamodules.pixel_format import PixelFormat


class TimmModel(nn.Module):
    """A model with its weights from a folder, transformers and convolutional networks alike.

    Args:
        folder: Folder with config.json and the weights, as timm's `save_for_hf` writes it and as its models on the Hugging
            Face Hub are.

    Raises:
        ValueError: The folder cannot be read as one of timm's.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        try:
            self.model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
            about = resolve_model_data_config(self.model)
            channels, *size = about["input_size"]
            with torch.no_grad():
                *_, last = self.last_blocks(torch.zeros(1, channels, *size), 4)
        except Exception as error:  # whatever is damaged, unknown, or hands out no features of its blocks
            raise ValueError(f"{folder} cannot be read as a model of timm ({type(error).__name__}: {error}).") from error
        self.channels: int = channels
        self.image_size: tuple[int, int] = (size[0], size[1])
        self.pixels = PixelFormat(channels, mean=about["mean"], std=about["std"])
        self.dim = last.shape[2]

    def last_blocks(self, images: Tensor, count: int) -> list[Tensor]:
        """Features after each of the last blocks, or stages of a convolutional network, without class tokens.

        Args:
            images: Normalized images of the model's own size, (B, C, H, W).
            count: How many blocks, or as many as there are if those are fewer.

        Returns:
            (B, h w, D) each, the last one last; D and h w may differ from stage to stage.
        """
        count = min(count, len(self.model.feature_info))
        maps = self.model.forward_intermediates(images, indices=count, norm=True, output_fmt="NCHW", intermediates_only=True)
        return [of.flatten(2).transpose(1, 2) for of in maps]


def is_timm_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder says which of timm's models it holds."""
    config = Path(path) / "config.json"
    return config.is_file() and "architecture" in json.loads(config.read_text())
