"""Names of a vision transformer's weights, as I-JEPA's release, timm, and Hugging Face have them.

I-JEPA's release and timm call the encoder's weights the same; Hugging Face has one layout in files and in transformers
up to 5.8, and another in memory later. Everything here maps dictionaries of tensors: no files, no modules.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]

WIDTHS = {
    192: ("vit_tiny_patch16_224", 3),
    384: ("vit_small_patch16_224", 6),
    768: ("vit_base_patch16_224", 12),
    1024: ("vit_large_patch16_224", 16),
    1280: ("vit_huge_patch14_224", 16),
    1408: ("vit_giant_patch14_224", 16),
    1664: ("vit_gigantic_patch14_224", 16),
}
"""Encoder width -> name in timm, and number of heads: no layout stores the latter with the weights."""

PREDICTOR = {"predictor_embed": "embed", "predictor_blocks": "blocks", "predictor_norm": "norm", "predictor_proj": "project"}
"""Modules of the predictor in the release -> in `networks.MaskedPredictor`; the mask token has one name in both."""

HUGGING_FACE_OUTSIDE = {
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
HUGGING_FACE_FILES = {
    "norm1": "layernorm_before",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""Within `encoder.layer.N`: what files on the hub hold, and transformers up to 5.8 in memory."""

HUGGING_FACE_MEMORY = HUGGING_FACE_FILES | {
    "attn.q": "attention.q_proj",
    "attn.k": "attention.k_proj",
    "attn.v": "attention.v_proj",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Within `layers.N`: transformers 5.23 in memory."""


class Architecture(NamedTuple):
    """What the shapes of an encoder's weights tell."""

    name: str
    """In timm."""

    num_heads: int
    depth: int
    patch_size: int
    num_patches: int
    channels: int


def read_architecture(encoder: State) -> Architecture:
    """The architecture of an encoder in timm's layout.

    Raises:
        ValueError: Weights that tell it are missing, or the width is that of no plain vision transformer.
    """
    needed = ("patch_embed.proj.weight", "pos_embed")
    absent = [name for name in needed if name not in encoder]
    if absent:
        raise ValueError(f"no {', '.join(absent)}: these are not the weights of an I-JEPA's vision transformer")
    width, channels, patch_size, _ = encoder["patch_embed.proj.weight"].shape
    if width not in WIDTHS:
        raise ValueError(f"width {width}: known are {', '.join(map(str, WIDTHS))}")
    depth = len({name.split(".")[1] for name in encoder if name.startswith("blocks.")})
    return Architecture(*WIDTHS[width], depth, patch_size, encoder["pos_embed"].shape[-2], channels)


def without_prefix(state: State, prefix: str) -> State:
    """Names without a prefix that all of them may have, such as DDP's "module."."""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def predictor_to_official(state: State) -> State:
    """From `networks.MaskedPredictor` to the release."""
    return _rename_heads(state, {ours: theirs for theirs, ours in PREDICTOR.items()})


def predictor_from_official(state: State) -> State:
    """From the release to `networks.MaskedPredictor`."""
    return _rename_heads(state, PREDICTOR)


def to_hugging_face(encoder: State) -> State:
    """From timm to Hugging Face, as files hold it; transformers from 4.47 on reads it."""
    found: State = {}
    for name, value in encoder.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if block is None:
            found |= _rename_heads({name: value}, HUGGING_FACE_OUTSIDE)
        elif block[2] == "attn.qkv":
            for part, rows in zip("qkv", value.chunk(3), strict=True):  # 3 D rows: queries, keys, values
                found[f"encoder.layer.{block[1]}.{HUGGING_FACE_FILES[f'attn.{part}']}.{block[3]}"] = rows.contiguous()
        else:
            found[f"encoder.layer.{block[1]}.{HUGGING_FACE_FILES[block[2]]}.{block[3]}"] = value
    return found


def from_hugging_face(state: State) -> State:
    """From Hugging Face, either layout, with or without a classifier around it, to timm.

    Names that belong to no encoder are kept as they are, for the caller to complain about; a classifier is left out.
    """
    state = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    state = without_prefix(state, "ijepa.")
    found: State = {}
    for name, value in state.items():
        block = re.fullmatch(r"(encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)", name)
        parts = HUGGING_FACE_MEMORY if block is not None and block[1] == "layers" else HUGGING_FACE_FILES
        ours = {theirs: part for part, theirs in parts.items()}
        if block is None:
            found |= _rename_heads({name: value}, {theirs: part for part, theirs in HUGGING_FACE_OUTSIDE.items()})
        elif block[3] not in ours:
            found[name] = value
        elif ours[block[3]] == "attn.q":
            rows = [state.get(name.replace(block[3], parts[f"attn.{part}"])) for part in "qkv"]
            present = [row for row in rows if row is not None]
            found[f"blocks.{block[2]}.attn.qkv.{block[4]}"] = torch.cat(present)
        elif ours[block[3]] not in ("attn.k", "attn.v"):
            found[f"blocks.{block[2]}.{ours[block[3]]}.{block[4]}"] = value
    return found


def is_hugging_face(names: Iterable[str]) -> bool:
    """Whether the names are in one of Hugging Face's layouts."""
    return any(name.removeprefix("ijepa.").startswith("embeddings.") for name in names)


def _rename_heads(state: State, names: dict[str, str]) -> State:
    """Replace the first words of names: {"norm": "layernorm"} makes "norm.bias" "layernorm.bias"."""
    found = {}
    for name, value in state.items():
        for old, new in names.items():
            if name == old or name.startswith(f"{old}."):
                name = new + name.removeprefix(old)
                break
        found[name] = value
    return found
