"""One function that reads whatever holds a model."""

import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn

from jepa_lightning.image_jepa import ImageJEPA
from jepa_lightning.iwm import IWM
from jepa_lightning.jepa import JEPA
from jepa_lightning.weights.checkpoints import DESCRIBED, load_any, load_jepa
from jepa_lightning.weights.importing import is_official, load_encoder, load_official
from jepa_lightning.weights.runs import LAST


def load(path: str | os.PathLike[str], image_size: tuple[int, int] | None = None) -> LightningModule:
    """A trained model, on the CPU, in evaluation mode, whoever has written it.

    >>> model = load("runs/ijepa_cifar10_cpu")  # doctest: +SKIP
    >>> embeddings = model(model.transform(image)[None])  # doctest: +SKIP

    Args:
        path: A run directory or a checkpoint of this application (a JEPA, or a probe with its JEPA), a .pth.tar of the
            released I-JEPA, a folder of timm's or Hugging Face's layout, or a file of an encoder's weights.
        image_size: Height and width in pixels for weights from elsewhere; the square that the number of patches makes by
            default.

    Returns:
        A `JEPA`, or a probe. Of weights of an encoder alone, an `IJEPA` whose predictor is not trained.

    Raises:
        FileNotFoundError: There is nothing at that path.
        ValueError: It cannot be read, or holds something else.
    """
    place = Path(path)
    if str(path).endswith(DESCRIBED):
        return load_jepa(path)
    if place.is_dir() and (place / "config.json").is_file() and not (place / LAST).exists():
        return load_encoder(place, image_size)
    if place.is_file() and place.suffix != ".ckpt":
        return load_official(place, image_size) if is_official(place) else load_encoder(place, image_size)
    return load_any(path)


def is_whole(path: str | os.PathLike[str]) -> bool:
    """Whether weights are those of a whole JEPA, not of an encoder alone."""
    place = Path(path)
    if place.is_dir():
        return not (place / "config.json").is_file() or (place / LAST).exists()
    return place.suffix == ".ckpt" or is_official(place)


def start_from(model: JEPA, path: str | os.PathLike[str]) -> None:
    """Give a new model the weights of another one, to train on from there with a schedule of its own.

    Both encoders are taken over, so the first target is that of the model that is loaded; the predictor too, if there is a
    trained one of the same sizes. Of an encoder alone, context and target encoder both get its weights.

    Args:
        model: Just built, of the encoder's architecture; the size of its images may differ, since positions are fixed.
        path: As for `load`.

    Raises:
        FileNotFoundError: There is nothing at that path.
        ValueError: It cannot be read, or does not fit.
    """
    if not isinstance(model, JEPA):
        raise ValueError(f"A {type(model).__name__} reads its JEPA from model.checkpoint, and starts from no other weights.")
    source = load(path)
    if not isinstance(source, JEPA):
        raise ValueError(f"{path} holds a {type(source).__name__}: training can start from a JEPA or an encoder alone.")
    if isinstance(source, ImageJEPA) and isinstance(model, ImageJEPA):
        model.known_pixels = source.known_pixels  # the encoder knows images that were normalized like this
    parts = ["context_encoder", "target_encoder", *(["predictor"] if is_whole(path) else [])]
    # Of encoder-decoders, and of an I-JEPA that predicts views.
    more = ("decoder", "view_predictor")
    parts += [part for part in more if all(getattr(of, part, None) is not None for of in (source, model))]
    for part in parts:
        theirs, ours = source.get_submodule(part).state_dict(), model.get_submodule(part).state_dict()
        odd = [name for name in ours.keys() | theirs.keys() if name not in ours or name not in theirs]
        odd += [name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape]
        if odd and part == "predictor":
            rank_zero_warn(f"The predictor of {path} is of another kind or size: this one starts untrained.")
            continue
        if odd:
            raise ValueError(
                f"{path} does not fit this {type(model).__name__}: {len(odd)} weights of the {part} are missing or have "
                f"another shape, such as {min(odd)}. Its arguments are " + json.dumps(_arguments(source), default=str)
            )
        model.get_submodule(part).load_state_dict(theirs)
        if part == "predictor" and isinstance(source, IWM) and isinstance(model, IWM):
            model.trained_on = source.trained_on  # it knows these actions


def _arguments(model: JEPA) -> dict[str, Any]:
    """What a model was built with; the size of its patches also where that was left open."""
    found = {name: value for name, value in model.hparams.items() if not name.startswith("_")}
    return found | {"patch_size": model.target_encoder.patch_size} if isinstance(model, ImageJEPA) else found
