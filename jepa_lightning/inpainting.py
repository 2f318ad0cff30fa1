"""Scene completion: the embeddings of what is hidden, predicted from those of what is visible.

Shapes: B batch, N patches, K visible patches, D embedding dimension.
"""

from typing import Any

import torch
from torch import Tensor

from jepa_lightning.figures import to_colors
from jepa_lightning.masks import Masks


@torch.no_grad()
def inpaint(model: Any, images: Tensor, visible: Tensor, decoder: Any = None) -> Tensor:
    """See `jepa_lightning.image_jepa.ImageJEPA.complete`, whose arguments these are."""
    images, seen = model.prepared(images), visible.to(model.device).bool().flatten()
    rows, columns = model.target_encoder.grid
    if len(seen) != rows * columns or seen.all() or not seen.any():
        raise ValueError(
            f"A mask {tuple(visible.shape)} with {int(seen.sum())} visible patches: give {rows} x {columns} patches, of "
            "which some are visible and some hidden."
        )
    context = seen.nonzero()[:, 0].expand(len(images), -1)  # (B, K)
    hidden = (~seen).nonzero()[:, 0].expand(len(images), 1, -1)  # (B, 1, N - K)
    embeddings = model.context_encoder(images, context)
    predicted = model.predict_hidden(embeddings, Masks(context, hidden), None)[:, 0]
    found = torch.zeros(len(images), len(seen), embeddings.shape[-1], device=images.device)
    found[:, seen], found[:, ~seen] = model.to_target_space(embeddings).float(), predicted.float()
    if decoder is None:
        return found
    theirs, ours = decoder.encoder.state_dict(), model.target_encoder.state_dict()
    if theirs.keys() != ours.keys() or not all(torch.equal(theirs[name], ours[name]) for name in ours):
        raise ValueError("The decoder was fitted on another model than this one: fit a CompletionProbe on this checkpoint.")
    return to_colors(decoder.decode(found), model.pixels)
