"""What the probes of images share: a frozen I-JEPA or IWM, and the random-initialization baseline.

Shapes: B batch, N patches, H W pixels, D embedding dimension.
"""

from abc import ABC
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.batches import ImageBatch, check_batches
from datamodules.pixel_format import agree
from jepa_lightning.image_jepa import ImageJEPA
from jepa_lightning.networks.vit import ViTEncoder
from jepa_lightning.probes.baselines import BASELINE_SEED
from jepa_lightning.sees_images import SeesImages
from jepa_lightning.signature import sign
from jepa_lightning.weights.checkpoints import RECORD, record
from jepa_lightning.weights.loading import load


class ImageProbe(SeesImages, ABC):
    """Freeze an I-JEPA or IWM and fit a probe on its patch features, compared with the random-initialization baseline.

    Args:
        checkpoint: Path of a run directory or checkpoint of an I-JEPA or IWM, or of weights in the layout of the released
            I-JEPA, of timm or of Hugging Face.
        encoder: Which encoder's features are read, "target" as in the paper, or "context".
        num_classes: Number of classes of the data, by task if there are several; None for a probe that needs no labels.
        baselines: Whether to evaluate the random-initialization baseline, and whatever else a subclass compares with.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no such model, or an argument is out of its range.
    """

    names: dict[str, str]
    """Kind of features -> its title in the report; without baselines, those of the JEPA alone."""

    own: tuple[str, ...] = ()
    """Of the kinds of features, those of the JEPA; the others are baselines."""

    untrained: ViTEncoder
    """There with baselines alone."""

    def __init__(
        self,
        checkpoint: str,
        encoder: Literal["target", "context"],
        num_classes: int | dict[str, int] | None,
        baselines: bool = True,
    ) -> None:
        super().__init__()
        if num_classes is not None and min([num_classes] if isinstance(num_classes, int) else num_classes.values()) < 2:
            raise ValueError(f"model.num_classes={num_classes}: a classifier needs at least 2 classes.")
        if encoder not in ("target", "context"):
            raise ValueError(f"model.encoder={encoder!r}: choose 'target' or 'context'.")
        jepa = load(checkpoint)
        if not isinstance(jepa, ImageJEPA):
            raise ValueError(f"{checkpoint} holds a {type(jepa).__name__}; this probe reads an IJEPA or IWM.")
        self.checkpoint, self.num_classes, self.image_size = checkpoint, num_classes, jepa.image_size
        self.record, self.known_pixels, self.channels = record(jepa), jepa.known_pixels, jepa.channels
        self.encoder = jepa.target_encoder if encoder == "target" else jepa.context_encoder
        self.baselines = baselines
        if baselines:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(BASELINE_SEED)
                self.untrained = jepa.build_encoder()
        else:
            self.names = {name: self.names[name] for name in self.own}
        self.take(jepa)
        self._frozen = [name for name, _ in self.named_children()]
        for network in self.children():
            network.requires_grad_(False).eval()
        self.register_buffer("fitted", torch.tensor(False))

    def set_size(self, image_size: tuple[int, int]) -> None:
        """Make the encoders take images of another size; what is fitted on them stays. For subclasses to extend.

        Raises:
            ValueError: Patches do not tile the image.
        """
        self.image_size = (image_size[0], image_size[1])
        self.encoder = self.encoder.resized(self.image_size)
        if self.baselines:
            self.untrained = self.untrained.resized(self.image_size)

    def set_classes(self, num_classes: int | dict[str, int]) -> None:
        """Build what depends on the number of classes, and note it for the checkpoint; for subclasses to extend."""
        self.num_classes = num_classes
        self.hparams["num_classes"] = num_classes

    def take(self, jepa: ImageJEPA) -> None:
        """Keep more of the model than one encoder, frozen like it; nothing unless a subclass needs it.

        Raises:
            ValueError: The model is not one that the subclass can read.
        """

    fitted: Tensor
    best_metric = ("val/loss", "min")  # of a classifier on labels, unlike a JEPA's
    needs_fit = True
    """Whether `test` makes sense only after `fit`."""

    needs_labels = True
    several_tasks = False

    batch_type: type = ImageBatch
    """What its batches are."""

    any_size = True
    """Whether its images may be of another size than in pre-training: where an encoder alone is read, its positions are
    stretched; a predictor knows one grid."""

    def train(self, mode: bool = True) -> "ImageProbe":
        """Switch to training mode, all but the frozen networks."""
        super().train(mode)
        for name in self._frozen:
            self.get_submodule(name).eval()
        return self

    def setup(self, stage: str) -> None:
        """Compare with the data module, and choose the attention.

        Raises:
            ValueError: Other classes than the probe was built for or none at all, or images of a size that it cannot read.
        """
        data = self.data
        check_batches(self, data, self.batch_type)
        theirs = tuple(getattr(data, "image_size", self.image_size))
        if theirs != self.image_size:
            if not self.any_size:
                raise ValueError(
                    f"The JEPA was trained on images of {self.image_size} pixels, and data.image_size={theirs}: "
                    f"{type(self).__name__} reads its predictor, which takes no other size."
                )
            rank_zero_info(f"The encoder knows images of {self.image_size} pixels; its positions are stretched to {theirs}.")
            self.set_size(theirs)
        classes = getattr(data, "num_classes", self.num_classes)
        if self.needs_labels:
            self._check_classes(data, classes)
        if self.needs_labels and self.num_classes is None:
            self.set_classes(classes)  # type: ignore[arg-type]
        elif self.needs_labels and classes != self.num_classes:
            raise ValueError(f"model.num_classes={self.num_classes} but the data has {classes} classes: set it to that.")
        self.known_pixels = agree(self.known_pixels, self.channels, data)

    def _check_classes(self, data: Any, classes: Any) -> None:
        """Raise a ValueError if there are too few classes, or several tasks for a probe of one."""
        name, numbers = type(self).__name__, classes.values() if isinstance(classes, dict) else [classes]
        if classes is None:
            raise ValueError("model.num_classes is not given, and the data does not say how many classes there are.")
        if isinstance(classes, dict) and not self.several_tasks:
            raise ValueError(f"{name} learns one task, and the data has {', '.join(classes)}: choose one folder.")
        if 0 in numbers:
            raise ValueError(f"{getattr(data, 'root', 'The data')} has no folders of classes, and {name} needs labels.")
        if min(numbers) < 2:
            raise ValueError(f"The data has one class alone, and {name} is to tell classes apart.")
        if without := getattr(data, "num_unlabeled", 0):
            raise ValueError(
                f"{without} images of {data.root} have no class, and {name} needs that of each: leave them out."
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.fitted.fill_(True)

    def on_test_start(self) -> None:
        """Refuse to evaluate what was never fitted.

        Raises:
            ValueError: The weights are random.
        """
        if self.needs_fit and not self.fitted:
            raise ValueError(
                f"This {type(self).__name__} was never fitted: run `fit` first, and give `test` its checkpoint with "
                "--ckpt_path."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        sign(self, checkpoint)
        checkpoint[RECORD] = self.record
        checkpoint["image_size"] = list(self.image_size)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        size = tuple(checkpoint.get("image_size", self.image_size))
        if self.data is None and size != self.image_size:
            self.set_size(size)
        elif size != self.image_size:
            rank_zero_warn(
                f"This probe was fitted on images of {size} pixels and reads {self.image_size} now: data.image_size chooses."
            )
