"""timm's vision transformers, made to see a subset of the patches.

Shapes: B batch, C channels, H W pixels, N patches, K kept patches, D embedding dimension.
"""

import copy
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import Attention, build_sincos2d_pos_embed, resample_abs_pos_embed, use_fused_attn
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """Tokens at some places: (B, N, D) and (B, K) -> (B, K, D)."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def layer_norm(features: Tensor) -> Tensor:
    """Features (..., D) with mean 0 and variance 1 over D."""
    return F.layer_norm(features, features.shape[-1:])


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed two-dimensional sine and cosine positions, laid out like those of the released I-JEPA weights: (N, D).

    Args:
        grid: Number of patches per column and per row.
        dim: Dimension D of the position embeddings, divisible by 4.

    Raises:
        ValueError: D not divisible by 4.
    """
    if dim % 4:
        raise ValueError(f"Positions of width {dim}: sine-cosine tables need a width divisible by 4.")
    table = build_sincos2d_pos_embed(list(grid), dim, interleave_sin_cos=True)
    rows, columns = table.chunk(2, dim=1)  # timm puts the other axis first
    return torch.cat([columns, rows], dim=1)


def attend_by_device(network: nn.Module) -> None:
    """Let timm's attention multiply matrices itself on a CPU, where torch's fused kernel is slower, and fuse elsewhere.

    The kernel's backward pass in bfloat16 takes some ten times as long there (torch 2.13, AVX-512; benchmarks/ijepa.py).
    Chosen in each call, by where its input is: networks move between devices.
    """
    for module in network.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(_choose_attention)


def _choose_attention(attention: Any, inputs: tuple[Tensor, ...]) -> None:
    attention.fused_attn = inputs[0].device.type != "cpu" and use_fused_attn()


def blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a network, first to last."""
    return [module for module in network.modules() if isinstance(module, Block)]


def repeated(values: Tensor, count: int) -> Tensor:
    """All of a batch, `count` times one after the other: (B, ...) -> (count B, ...)."""
    return values if count == 1 else torch.cat([values] * count)


class ViTEncoder(nn.Module):
    """A vision transformer of timm without class token and head, with fixed sine-cosine positions.

    Args:
        name: Name of the timm model: "vit_tiny_patch16_224" ... "vit_giant_patch14_224". Sizes of image and patch in the
            name are overruled by those below.
        image_size: Height and width H, W of the images in pixels.
        patch_size: Height and width of a patch in pixels.
        depth: Number of blocks; that of the named model by default.
        channels: Number of channels C of the images.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them: less memory, a third
            more time.

    Raises:
        ValueError: No such model, one that is no plain vision transformer, or patches that do not tile the image.
    """

    def __init__(
        self,
        name: str,
        image_size: tuple[int, int],
        patch_size: int,
        depth: int | None = None,
        channels: int = 3,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if any(size < patch_size or size % patch_size for size in image_size):
            raise ValueError(f"image_size={image_size} is not a multiple of patch_size={patch_size}: change one of them.")
        if not timm.is_model(name) or not name.startswith("vit_"):
            known = ", ".join(timm.list_models("vit_*_patch16_224")[:40])
            raise ValueError(f"{name!r} is no vision transformer of timm {timm.__version__}. Some that are: {known}.")
        options: dict[str, Any] = {} if depth is None else {"depth": depth}
        vit = timm.create_model(
            name,
            img_size=image_size,
            patch_size=patch_size,
            in_chans=channels,
            class_token=False,
            reg_tokens=0,
            global_pool="",
            num_classes=0,
            pos_embed="none",
            fix_init=True,  # divides the output layers of block l by sqrt(2 l), as the released I-JEPA means to
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            **options,
        )
        if not isinstance(vit, VisionTransformer):
            raise ValueError(f"{name!r} is not timm's plain VisionTransformer, whose patches can be left out.")
        self.vit = vit
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.dim, self.patch_size = vit.embed_dim, patch_size
        attention: Any = vit.blocks[0].attn
        self.num_heads: int = attention.num_heads
        self.gradient_checkpointing = gradient_checkpointing
        self.register_buffer("positions", sincos_positions(self.grid, self.dim), persistent=False)
        self.grid_of_training = self.grid
        attend_by_device(self)

    positions: Tensor

    def resized(self, image_size: tuple[int, int]) -> "ViTEncoder":
        """The same encoder for images of another size, whose table of positions is stretched to them.

        Args:
            image_size: Height and width H, W in pixels.

        Raises:
            ValueError: Patches do not tile the image.
        """
        if any(size < self.patch_size or size % self.patch_size for size in image_size):
            raise ValueError(f"Images of {image_size} pixels are no multiple of patch_size={self.patch_size}: resize them.")
        other = copy.deepcopy(self)
        other.grid = (image_size[0] // self.patch_size, image_size[1] // self.patch_size)
        other.vit.patch_embed.set_input_size(img_size=image_size)
        # Always from those of training: to go back to their size is to have them again.
        table = sincos_positions(self.grid_of_training, self.dim).to(self.positions)
        other.positions = resample_abs_pos_embed(
            table[None], list(other.grid), list(self.grid_of_training), num_prefix_tokens=0
        )[0]
        return other

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Features of all patches, or of those kept.

        Args:
            images: Normalized images, (B, C, H, W).
            keep: Raster indices of the patches to see, (B, K); the others cost nothing. All patches by default.

        Returns:
            (B, N, D) or (B, K, D).

        Raises:
            ValueError: Images of integers, which are not normalized.
        """
        tokens = self._embed(images, keep)
        if self.gradient_checkpointing and self.training:
            tokens = checkpoint_seq(self.vit.blocks, tokens)
        else:
            tokens = self.vit.blocks(tokens)
        return self.vit.norm(tokens)

    def _embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens before the first block: (B, N, D), or (B, K, D) of those kept."""
        if not images.is_floating_point():  # pixels of 0 to 255 would pass, and give features of nothing
            raise ValueError(f"Images of {images.dtype}: an encoder takes normalized images. model.encode normalizes uint8.")
        images = images.to(self.positions.dtype)  # normalized in float32, whatever the network is rounded to
        tokens = self.vit.patch_embed(images) + self.positions
        return self.vit.norm_pre(tokens if keep is None else take(tokens, keep))

    def last_blocks(self, images: Tensor, count: int) -> list[Tensor]:
        """Features after each of the last blocks, the final norm applied to all: `count` tensors (B, N, D), last one last.

        (The paper does not say whether its features of earlier blocks pass the final norm.)
        """
        tokens, found = self._embed(images), []
        for number, block in enumerate(self.vit.blocks):
            tokens = block(tokens)
            if number >= len(self.vit.blocks) - count:
                found.append(self.vit.norm(tokens))
        return found
