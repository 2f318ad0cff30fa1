"""Do the arguments of a dynamics JEPA make sense, and do it and its data fit? Said before anything runs."""

from typing import Any, Literal, get_args

from torch import Tensor

from datamodules.batches import ClipBatch, check_batches
from jepa_lightning.networks.predictor import PredictorName

TargetMode = Literal["default", "vjepa2", "none"]
Observation = Literal["pixels", "vectors", "both"]

SIZES = ("observation", "image_size", "channels", "history", "vector_dim", "action_dim", "num_choices")
"""What a model and its data agree on, under the same names."""

MODES = {
    "default": "predicts from the target encoder's embeddings to the target encoder's: the prediction loss trains "
    "the predictor alone and sends no gradient to the encoder, which the auxiliary losses shape",
    "vjepa2": "predicts from the context encoder's embeddings to the target encoder's",
    "none": "predicts from the context encoder's embeddings to its own, detached; the target encoder is its copy after "
    "every step, and momentum is not used",
}
"""Target mode -> what it does, for the log."""


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a size that may be one number."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def sizes_of(data: Any) -> dict[str, Any]:
    """What a data module says of its observations and actions, by the names of a model's arguments; nothing if of images."""
    if getattr(data, "batch_type", ClipBatch) is not ClipBatch:
        return {}  # `check_observations` says what is wrong
    return {name: getattr(data, name) for name in SIZES if getattr(data, name, None) is not None}


def check_arguments(given: dict[str, Any]) -> None:
    """Refuse values that a `DynamicsJEPA` cannot have.

    Args:
        given: Its arguments, by name.

    Raises:
        ValueError: A value out of its range, named together with what is allowed.
    """
    for name in ("latent_dim", "predictor_width", "horizon", "history", "channels", "action_width"):
        if given[name] < 1:
            raise ValueError(f"model.{name}={given[name]}: give an integer of at least 1.")
    choices = {"observation": Observation, "target_mode": TargetMode, "predictor": PredictorName}
    for name, allowed in ((name, get_args(choice)) for name, choice in choices.items()):
        if given[name] not in allowed:
            raise ValueError(f"model.{name}={given[name]!r}: choose one of {', '.join(allowed)}.")
    if given["predictor"] == "prefix" and given["predictor_width"] % 32:
        raise ValueError(
            f"model.predictor_width={given['predictor_width']} with predictor='prefix': give a multiple of 32, the width of "
            "an attention head."
        )
    if not 0 <= given["predictor_dropout"] < 1:
        raise ValueError(f"model.predictor_dropout={given['predictor_dropout']}: choose a fraction of the units in [0, 1).")
    if min(as_pair(given["image_size"])) < 1:
        raise ValueError(f"model.image_size={given['image_size']}: give positive numbers of pixels, height and width.")
    if given["observation"] != "pixels" and given["vector_dim"] < 1:
        raise ValueError(
            f"model.vector_dim={given['vector_dim']} with observation={given['observation']!r}: give the number of scalars "
            "of a vector."
        )
    inverse_dynamics, action_dim, num_choices = (given[name] for name in ("inverse_dynamics", "action_dim", "num_choices"))
    if num_choices < 0 or num_choices == 1 or (num_choices and (action_dim % num_choices or not action_dim)):
        raise ValueError(
            f"model.num_choices={num_choices} with action_dim={action_dim}: 0 for continuous actions, or at least 2 "
            "choices, of which action_dim is a multiple."
        )
    if action_dim < 0 or not inverse_dynamics >= 0:
        raise ValueError(f"model.action_dim={action_dim}, inverse_dynamics={inverse_dynamics}: neither may be negative.")
    if inverse_dynamics and not action_dim:
        raise ValueError(f"model.inverse_dynamics={inverse_dynamics} needs actions to predict: set model.action_dim.")
    if given["target_mode"] == "default" and given["regularizer"] is None and not inverse_dynamics:
        raise ValueError(
            "model.target_mode='default' without a regularizer or inverse_dynamics: nothing would train the encoder, "
            "because the prediction loss sends it no gradient. Choose another mode, or an auxiliary loss."
        )
    if not given["step_decay"] >= 0:
        raise ValueError(f"model.step_decay={given['step_decay']}: must be >= 0; 0 weighs all steps of the horizon alike.")


def check_actions(actions: Tensor | None, expected: tuple[int, int, int]) -> None:
    """Compare actions with what a model takes: (B, K, A), or none if A is 0.

    Raises:
        ValueError: They have another shape, are missing, or are not wanted.
    """
    given = None if actions is None else tuple(actions.shape)
    if given != (expected if expected[-1] else None):
        wanted = f"of shape {expected} (batch, steps, scalars)" if expected[-1] else "none: this model knows no actions"
        raise ValueError(f"Actions of shape {given}: give some {wanted}." if given else f"No actions: give some {wanted}.")


def check_batch(jepa: Any, batch: ClipBatch) -> None:
    """Compare a batch with the horizon and the actions of a model that is to learn from it.

    Args:
        jepa: A `DynamicsJEPA`.
        batch: The batch, which may come from any data set.

    Raises:
        ValueError: Its clips are too short, or it has other actions.
    """
    windows, horizon = batch.observations, jepa.horizon
    if windows.shape[1] <= horizon:
        raise ValueError(
            f"model.horizon={horizon} needs clips of more than {horizon} windows; the batch has {windows.shape[1]}."
        )
    if (0 if batch.actions is None else batch.actions.shape[-1]) != jepa.action_dim:
        given = "none" if batch.actions is None else f"some of {batch.actions.shape[-1]} scalars"
        raise ValueError(f"model.action_dim={jepa.action_dim} needs actions of that many scalars; the batch has {given}.")


def check_clips(jepa: Any, data: Any) -> None:
    """Compare the length of clips with the horizon, and with the losses that compare windows.

    Args:
        jepa: A `DynamicsJEPA`.
        data: Its data module.

    Raises:
        ValueError: The clips are too short.
    """
    clip_length, stride = getattr(data, "clip_length", None), getattr(data, "stride", 1)
    lengthen = "data.windows" if hasattr(data, "windows") else "data.sequence_length and data.clip_length"
    if clip_length is not None and jepa.history + jepa.horizon * stride > clip_length:
        raise ValueError(
            f"model.horizon={jepa.horizon} steps from a window of history={jepa.history} frames do not fit into "
            f"data.clip_length={clip_length} frames: lower the horizon to at most "
            f"{(clip_length - jepa.history) // stride} or lengthen {lengthen}."
        )
    needed = {"inverse_dynamics": 2} if jepa.inverse_dynamics else {}
    if jepa.regularizer is not None:
        needed[f"regularizer {jepa.regularizer.name!r}"] = jepa.regularizer.needed_times
    for name, times in needed.items():
        seen = times if clip_length is None else (clip_length - jepa.history) // stride + 1 - jepa.unseen_windows
        if seen < times:
            raise ValueError(
                f"model.{name} compares {times} windows, and of a clip of {clip_length} frames the context encoder sees "
                f"{seen}: lengthen {lengthen} by {(times - seen) * stride} frames, lower model.horizon, or set the "
                "weight of what compares them to 0 (curvature needs 3; temporal_similarity, inverse_dynamics and "
                "barlow_twins 2)."
            )


def check_observations(jepa: Any, data: Any) -> None:
    """Compare observations and actions with those that the networks were built for, and the physics with that trained on.

    Args:
        jepa: A `DynamicsJEPA`.
        data: Its data module, or one of the same kind.

    Raises:
        ValueError: They differ.
    """
    check_batches(jepa, data, ClipBatch)
    theirs = getattr(data, "action_dim", jepa.action_dim)
    if jepa.action_dim != theirs:
        raise ValueError(
            f"model.action_dim={jepa.action_dim}, but the data's actions have {theirs} scalars: {jepa.mend_actions(theirs)}."
        )
    unused = () if jepa.sees_pixels else ("image_size", "channels")
    for name in SIZES:
        mine, theirs = getattr(jepa, name), getattr(data, name, None)
        if theirs is None or name in unused:
            continue
        if as_pair(mine) != as_pair(theirs) if name == "image_size" else mine != theirs:
            raise ValueError(f"The model has {name}={mine} but data.{name}={theirs}: set both to the same value.")
    dynamics = getattr(data, "dynamics", {})
    for name, value in jepa.trained_on.items():
        theirs = dynamics.get(name, value)
        if theirs != value:
            raise ValueError(f"The model was trained on data.{name}={value}, and now data.{name}={theirs}: set it to that.")
