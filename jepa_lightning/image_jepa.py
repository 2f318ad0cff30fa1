"""What I-JEPA and IWM share: vision transformers that see a subset of the patches, and masks.

Shapes: B batch, C channels, N patches, K kept patches, M target blocks, L patches of a block, D embedding dimension.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from callbacks.schedules import total_optimizer_steps
from datamodules.batches import ImageBatch, ViewBatch, as_image_batch, batch_generator, check_batches
from datamodules.pixel_format import agree
from datamodules.preprocessing import ImageTransform, prepared
from datamodules.rng import BLOCK_SIZE_STREAM, seeded_generator
from jepa_lightning.compiling import compiles
from jepa_lightning.figures import wants_figures
from jepa_lightning.image_monitor import ImageMonitor, show_images
from jepa_lightning.inpainting import inpaint
from jepa_lightning.jepa import JEPA, TargetPairs
from jepa_lightning.losses import smooth_l1, squared_error
from jepa_lightning.masks import Masks, MultiBlock
from jepa_lightning.networks.masked_predictor import MaskedPredictor
from jepa_lightning.networks.vit import ViTEncoder, blocks, layer_norm, repeated, take
from jepa_lightning.sees_images import SeesImages
from jepa_lightning.sharding import check_even_batches, is_sharded, shard

ROWS = 8
"""Patches along the shorter side of an image where no size of a patch is given."""

LOSSES = {"smooth_l1": smooth_l1, "squared_error": squared_error}


class ImageJEPA(SeesImages, JEPA, ABC):
    """Predict patch features of an image's hidden patches.

    A subclass builds its predictor and masks and implements `target_pairs`. See `IJEPA` for the arguments.

    Raises:
        ValueError: A value out of its range, named together with what is allowed.
    """

    context_encoder: ViTEncoder
    target_encoder: ViTEncoder
    predictor: MaskedPredictor
    masks: MultiBlock
    batch_type: type = ImageBatch
    predict_patches = False
    """What its batches are, and whether `predict` gives the embeddings of all patches."""

    num_contexts = 1
    """Contexts of an image in training, R: they share the pass of the target encoder."""

    def __init__(
        self,
        *,
        encoder: str,
        image_size: int | tuple[int, int],
        patch_size: int | None,
        encoder_depth: int | None,
        channels: int,
        loss: str,
        normalize_targets: bool,
        gradient_checkpointing: bool,
        compile_networks: bool,
        **training: Any,
    ) -> None:
        if training["regularizer"] == "vicreg":
            # Patches have no order in which they could move along straight lines.
            training["regularizer_weights"] = {"curvature": 0.0, **(training["regularizer_weights"] or {})}
        if training["regularizer"] == "barlow_twins":
            raise ValueError("model.regularizer='barlow_twins' compares two times of a sequence, and an image has one.")
        super().__init__(**training)
        if loss not in LOSSES:
            raise ValueError(f"model.loss={loss!r}: choose one of {', '.join(LOSSES)}.")
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        if patch_size is None:
            patch_size = max(1, min(self.image_size) // ROWS)
            if any(side % patch_size for side in self.image_size):
                raise ValueError(
                    f"model.image_size={self.image_size}: patches of an eighth of the shorter side, {patch_size} pixels, do "
                    "not tile it. Choose a multiple of 8 for the shorter side and one of an eighth of that for the longer, "
                    "or give model.patch_size."
                )
        self.loss, self.compile_networks = LOSSES[loss], compile_networks
        self.normalize_targets, self.channels = normalize_targets, channels
        self.build_encoder = partial(
            ViTEncoder,
            encoder,
            self.image_size,
            patch_size,
            encoder_depth,
            channels,
            gradient_checkpointing=gradient_checkpointing,
        )

    def set_networks(self, context_encoder: nn.Module, predictor: nn.Module, dim: int) -> None:
        super().set_networks(context_encoder, predictor, dim)
        rows, columns = self.target_encoder.grid
        self.monitor = ImageMonitor(dim, rows * columns)

    @property
    def best_metric(self) -> tuple[str, Literal["min", "max"]]:
        """With classes, the k-NN accuracy: the checkpoint is then chosen by labels, and by nothing else."""
        labeled = getattr(self.data, "num_classes", 0)
        return ("val/knn_accuracy", "max") if labeled else super().best_metric

    def setup(self, stage: str) -> None:
        """Compare with the data module before anything runs, and compile.

        Raises:
            ValueError: Images of another size than the encoder's, or masks that differ in shape between processes.
        """
        data = self.data
        if stage != "predict":
            check_batches(self, data, *self.readable(stage))
        theirs = tuple(getattr(data, "image_size", self.image_size))
        if theirs != self.image_size:
            raise ValueError(
                f"The model has image_size={self.image_size} but data.image_size={theirs}: set both to the same value."
            )
        self.known_pixels = agree(self.known_pixels, self.channels, data)
        if self.regularizer is not None and self.masks.official_compat and self.trainer.world_size > 1:
            raise ValueError(
                "model.official_compat=true cuts each process' contexts to another size, and model.regularizer needs those "
                "of all processes: leave one of the two out, or train on one device."
            )
        networks = (self.context_encoder, self.target_encoder, self.predictor)
        if self.compile_networks and stage == "fit" and compiles(self.trainer.strategy.root_device):
            sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
            # In place: names in checkpoints stay. Gathering of shards is not compiled, so there the blocks are, one by one.
            for module in (block for network in networks for block in blocks(network)) if sharded else networks:
                module.compile(dynamic=True)

    def readable(self, stage: str) -> tuple[type, ...]:
        """Types of batches that it can be trained or validated on."""
        return (self.batch_type,)

    @property
    def training_steps(self) -> tuple[int, int] | None:
        """Optimizer steps that are done, and how many there will be; None if it is not trained just now."""
        trainer = getattr(self, "_trainer", None)
        if trainer is None or not trainer.training:
            return None
        return trainer.global_step, total_optimizer_steps(trainer)

    def shard_networks(self, mesh: DeviceMesh, device: torch.device) -> None:
        """Shard the networks over the processes of a mesh, context and target encoder alike."""
        if is_sharded(self.context_encoder):
            return
        if isinstance(self.trainer.precision_plugin, HalfPrecision):
            raise ValueError(
                f"trainer.precision={self.trainer.precision} with ModelParallelStrategy: the float32 average is kept in the "
                "target encoder itself, whose shards are small; choose bf16-mixed."
            )
        for encoder in (self.context_encoder, self.target_encoder):
            shard(encoder, mesh, device, methods=["last_blocks"])
        shard(self.predictor, mesh, device)

    def on_validation_start(self) -> None:
        self._check_even(self.trainer.num_val_batches)

    def on_predict_start(self) -> None:
        self._check_even(self.trainer.num_predict_batches)

    def _check_even(self, batches: Sequence[int | float]) -> None:
        if is_sharded(self.target_encoder):
            if math.isinf(sum(batches)):
                raise ValueError(
                    "Sharded networks need as many held-out batches in each process, and a stream does not say how many it "
                    "has: set trainer.limit_val_batches, or leave data.streaming off."
                )
            check_even_batches(int(sum(batches)), self.device)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of images, averages over their patches: (B, C, H, W), see `encode` -> (B, D) in float32."""
        return self.encode(images).float().mean(dim=1)

    @torch.no_grad()
    def encode(self, observations: Tensor) -> Tensor:
        """Patch embeddings (B, N, D) of the target encoder, without gradient.

        Args:
            observations: Images (B, C, H, W), normalized as `transform` does, or uint8.

        Raises:
            ValueError: Images of another size or kind.
        """
        return self.target_encoder(self.prepared(observations))

    @property
    def transform(self) -> ImageTransform:
        """Makes a normalized tensor (C, H, W) of a PIL image, or of a uint8 tensor of any size."""
        return ImageTransform(self.image_size, self.pixels)

    def prepared(self, images: Tensor) -> Tensor:
        """Images as the networks take them: normalized if they are uint8, and an error if they are of another size."""
        return prepared(images, self.image_size, self.target_encoder.positions.dtype, self.pixels)

    @torch.no_grad()
    def complete(self, images: Tensor, visible: Tensor, decoder: Any = None) -> Tensor:
        """Inpaint (scene completion): predict the embeddings of what is hidden from those of what is visible.

        Args:
            images: (B, C, H, W), normalized or uint8.
            visible: Which of the N patches are seen, bool, (N,) in raster order or as a grid (rows, columns).
            decoder: A fitted `CompletionProbe` of this model, which makes images of embeddings; none by default.

        Returns:
            Embeddings (B, N, D) in the space of the predictions; with a decoder images (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: Masks of another size, or with nothing visible or nothing hidden.
        """
        return inpaint(self, images, visible, decoder)

    def as_batch(self, batch: Any, batch_idx: int) -> Any:
        """An `ImageBatch`: of images, of (images, labels) or of a dictionary with one of the names of `IMAGE_NAMES`."""
        if isinstance(batch, ImageBatch | ViewBatch):
            return batch
        trainer, seed = self.trainer, torch.initial_seed() % 2**31
        opened = as_image_batch(batch, (seed, trainer.current_epoch * trainer.training, trainer.global_rank, batch_idx))
        return opened._replace(images=self.prepared(opened.images))

    @abstractmethod
    def views(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images that the context encoder sees a subset of, and that the target encoder sees whole: (B, C, H, W) each."""

    @abstractmethod
    def predict_hidden(self, context: Tensor, masks: Masks, batch: Any) -> Tensor:
        """Predicted features of the target blocks, given those of the context: (B, K, D) -> (B, M, L, D)."""

    def to_target_space(self, features: Tensor) -> Tensor:
        """Features of the target encoder as prediction targets: layer-normalized if `normalize_targets`, (..., D)."""
        return layer_norm(features) if self.normalize_targets else features

    def target_pairs(self, batch: Any) -> TargetPairs:
        seen, whole = self.views(batch)
        masks = self.draw_masks(batch)
        contexts = len(masks.context) // len(seen)  # R
        target_features = self.encode(whole)  # (B, N, D)
        hidden = take(repeated(self.to_target_space(target_features), contexts), masks.targets.flatten(1))
        targets = hidden.unflatten(1, masks.targets.shape[1:])  # (R B, M, L, D)
        context = self.context_encoder(repeated(seen, contexts), masks.context)  # (R B, K, D)
        predictions = self.predict_hidden(context, masks, batch)  # (R B, M, L, D)
        # In float32: what distinguishes images is often smaller than the rounding of bfloat16.
        pooled = target_features.float().mean(dim=1, keepdim=True)  # (B, 1, D)
        return TargetPairs(predictions, targets, context, pooled)

    def draw_masks(self, batch: ImageBatch | ViewBatch) -> Masks:
        """Masks of a batch, on its device: a function of the batch and, in training, of the optimizer step.

        In training there are `num_contexts` for each image, those of all images one after the other. The sizes of the blocks
        are drawn by step, so that all processes have masks of one shape, and follow the curriculum; elsewhere they are those
        of its end.
        """
        progress, sizes, contexts = 1.0, None, 1
        if self.training_steps is not None:
            step, total = self.training_steps
            progress, contexts = step / total, self.num_contexts
            sizes = seeded_generator(batch.key[0], BLOCK_SIZE_STREAM, step)
        count = contexts * len(batch.labels)
        return self.masks.draw(count, batch_generator(batch), progress, sizes).to(batch.labels.device)

    def prediction_loss(self, pairs: TargetPairs) -> Tensor:
        return self.loss(pairs.predictions, pairs.targets)

    def image_features(self, batch: Any, pairs: TargetPairs) -> Tensor:
        """Pooled embeddings of the images as they are, for the classifiers: (B, D)."""
        return pairs.target_features[:, 0]

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Average-pooled embeddings of the target encoder, (B, D); those of the patches, (B, N, D), if asked for."""
        patches = self.encode(self.as_batch(batch, batch_idx).images).float()
        return patches if self.predict_patches else patches.mean(dim=1)

    def validation_step(self, batch: Any, batch_idx: int) -> TargetPairs:
        batch = self.as_batch(batch, batch_idx)
        pairs, masks = super().validation_step(batch, batch_idx), self.draw_masks(batch)  # those of `target_pairs`
        features = self.image_features(batch, pairs)
        self.monitor.update(pairs.predictions, pairs.targets, masks.targets, features, batch.labels)
        # Sharded networks compute in all processes or in none, whoever needs the figure.
        shows = wants_figures(self.trainer) or is_sharded(self.target_encoder)
        if batch_idx == 0 and shows and not self.trainer.sanity_checking:
            show_images(self, *self.views(batch), batch.images, masks, features)
        return pairs

    def on_validation_epoch_end(self) -> None:
        rankme, checking = self.target_statistics.compute()["rankme"], self.trainer.sanity_checking
        super().on_validation_epoch_end()
        figures = self.monitor.compute(rankme, classify=not checking)
        shown = ("normalized_error", "knn_accuracy", "linear_accuracy")
        for name, value in figures.items():
            self.log(f"val/{name}", value, prog_bar=name in shown)
