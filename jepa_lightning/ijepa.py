"""I-JEPA: predict the features of hidden blocks of a picture from those of a visible one (Assran et al. 2023).

Shapes: B batch, N patches, K kept patches, M target blocks, L patches of a block, D width.
"""

from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from callbacks.schedules import ScheduleName, total_optimizer_steps
from datamodules.batches import ImageBatch
from datamodules.randomness import seeded_generator
from jepa_lightning.jepa import JEPA, TargetPairs
from jepa_lightning.losses import smooth_l1, squared_error
from jepa_lightning.masks import Masks, MultiBlock
from jepa_lightning.metrics import OnlineClassifiers
from jepa_lightning.networks.predictor import MaskedPredictor
from jepa_lightning.networks.vit import ViTEncoder, attend_plainly, take
from jepa_lightning.pictures import (
    feature_colours,
    mark_blocks,
    nearest_pictures,
    rows_figure,
    show_in_tensorboard,
    to_colours,
)
from jepa_lightning.regularizers import RegularizerName

SHOWN = 8
"""Pictures in a figure."""

SIZE_STREAM = 4
"""Use of the data's seed for the sizes of blocks; `datamodules.image_folder` has the smaller ones."""

LOSSES = {"smooth_l1": smooth_l1, "squared_error": squared_error}


class IJEPA(JEPA):
    """A vision transformer learns to fill in features: no labels, no augmentation that says what to ignore.

    The context encoder sees the visible patches alone; the target encoder sees the whole picture, and its features,
    layer-normalised, are the targets at the hidden blocks.

    Args:
        encoder: Name of a timm vision transformer, "vit_tiny_patch16_224" ... "vit_giant_patch14_224"; the sizes in it
            are overruled by the next two arguments.
        image_size: Height and width in pixels, one number or two; as in the data.
        patch_size: Height and width of a patch in pixels.
        encoder_depth: Number of the encoder's blocks; that of its name if left out.
        predictor_width: Width of the predictor.
        predictor_depth: Its number of blocks. The paper takes 6 for ViT-B, 12 for L and H.
        predictor_heads: Its heads; those of the encoder if left out.
        predictor_dropout: In its linear layers.
        loss: "smooth_l1" as the released code has it, or "squared_error" as the paper says.
        normalize_targets: Layer-normalise the target features, as the released code does.
        num_targets: M, target blocks per picture.
        target_scale: Area of a target block, least and greatest fraction of the picture.
        more_target_scales: Further ranges; each batch takes its blocks from one of them or from `target_scale`.
        final_target_scale: `target_scale` at the end of training, for a curriculum; the same if left out.
        target_aspect: Height over width of a target block, least and greatest.
        context_scale: Area of the context block before it loses the targets.
        context_quantile: Fraction of pictures that draw their masks again because too little context is left.
        official_compat: Masks with the flaws of the released code, and its count of optimizer steps from 1 in the
            schedules of learning rate and weight decay: for parity alone.
        gradient_checkpointing: Less memory for a third more time.
        compile_networks: Compile the three networks with torch.compile before training: minutes at the start, faster
            steps after.
        learning_rate: Peak of the schedule, at the end of the warm-up.
        start_learning_rate: Where the warm-up begins; a hundredth of the peak if left out.
        final_learning_rate: Where the cosine after it ends.
        warmup_fraction: Part of all optimizer steps over which the learning rate rises, in [0, 1).
        weight_decay: Of kernels and matrices; biases, norms and the mask token have none.
        final_weight_decay: Where a cosine takes the weight decay by the last step.
        momentum: Of the first target update, in [0, 1].
        final_momentum: What the momentum approaches at the last step, in [momentum, 1].
        momentum_schedule: Way from the one to the other; the paper's is linear.
        regularizer: None as in the paper, "variance_hinge" or "vicreg" on the context encoder's output.
        regularizer_weights: Weight of each of its terms.

    Raises:
        ValueError: A value out of its range, named together with what is allowed.
    """

    context_encoder: ViTEncoder
    target_encoder: ViTEncoder
    predictor: MaskedPredictor

    def __init__(
        self,
        encoder: str = "vit_small_patch16_224",
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        encoder_depth: int | None = None,
        predictor_width: int = 384,
        predictor_depth: int = 6,
        predictor_heads: int | None = None,
        predictor_dropout: float = 0.0,
        loss: Literal["smooth_l1", "squared_error"] = "smooth_l1",
        normalize_targets: bool = True,
        num_targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        final_target_scale: tuple[float, float] | None = None,
        more_target_scales: tuple[tuple[float, float], ...] = (),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        context_quantile: float = 0.1,
        official_compat: bool = False,
        gradient_checkpointing: bool = False,
        compile_networks: bool = False,
        learning_rate: float = 1e-3,
        start_learning_rate: float | None = None,
        final_learning_rate: float = 0.0,
        warmup_fraction: float = 0.05,
        weight_decay: float = 0.04,
        final_weight_decay: float | None = 0.4,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        momentum_schedule: ScheduleName = "cosine",
        regularizer: RegularizerName | None = None,
        regularizer_weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            start_learning_rate=start_learning_rate,
            final_learning_rate=final_learning_rate,
            schedule_offset=int(official_compat),
            warmup_fraction=warmup_fraction,
            weight_decay=weight_decay,
            final_weight_decay=final_weight_decay,
            momentum=momentum,
            final_momentum=final_momentum,
            momentum_schedule=momentum_schedule,
            regularizer=regularizer,
            # Patches have no order in which they could move along straight lines.
            regularizer_weights={"curvature": 0.0, **(regularizer_weights or {})}
            if regularizer == "vicreg"
            else regularizer_weights,
        )
        if loss not in LOSSES:
            raise ValueError(f"model.loss={loss!r}: choose one of {', '.join(LOSSES)}.")
        self.save_hyperparameters()
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.loss, self.compile_networks = LOSSES[loss], compile_networks
        self.normalize_targets = normalize_targets
        self.build_encoder = partial(
            ViTEncoder,
            encoder,
            self.image_size,
            patch_size,
            encoder_depth,
            gradient_checkpointing=gradient_checkpointing,
        )
        context_encoder = self.build_encoder()
        predictor = MaskedPredictor(
            context_encoder.grid,
            context_encoder.dim,
            predictor_width,
            predictor_depth,
            predictor_heads or context_encoder.num_heads,
            predictor_dropout,
            gradient_checkpointing,
        )
        self.set_networks(context_encoder, predictor, context_encoder.dim)
        self.masks = MultiBlock(
            context_encoder.grid,
            num_targets,
            target_scale,
            target_aspect,
            context_scale,
            context_quantile,
            final_target_scale,
            more_target_scales,
            official_compat,
        )
        self.error, self.mean_error = MeanMetric(), MeanMetric()
        self.classifiers = OnlineClassifiers()

    def setup(self, stage: str) -> None:
        """Compare with the data module before anything runs; choose the attention, and compile.

        Raises:
            ValueError: Pictures of another size than the encoder was built for, or masks that differ in shape between
                processes whose features are to be gathered.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        theirs = getattr(data, "image_size", self.image_size)
        if tuple(theirs) != self.image_size:
            raise ValueError(
                f"The model has image_size={self.image_size} but data.image_size={theirs}: set both to the same value."
            )
        if self.regularizer is not None and self.masks.official_compat and self.trainer.world_size > 1:
            raise ValueError(
                "model.official_compat=true cuts each process' contexts to another size, and model.regularizer needs those "
                "of all processes: leave one of the two out, or train on one device."
            )
        networks = (self.context_encoder, self.target_encoder, self.predictor)
        if self.trainer.strategy.root_device.type == "cpu":
            for network in networks:
                attend_plainly(network)
        if self.compile_networks and stage == "fit":
            for network in networks:
                network.compile(dynamic=True)  # in place: names in checkpoints stay

    @torch.no_grad()
    def encode(self, observations: Tensor) -> Tensor:
        """Patch features of the target encoder, without gradient: normalised images (B, C, H, W) -> (B, N, D).

        Average over N for the feature of the picture that the paper's probes read.
        """
        return self.target_encoder(observations)

    def target_pairs(self, batch: ImageBatch) -> TargetPairs:
        masks = self.draw_masks(batch)
        target_features = self.encode(batch.images)  # (B, N, D)
        features = target_features
        if self.normalize_targets:
            features = F.layer_norm(features, features.shape[-1:])
        targets = take(features, masks.targets.flatten(1)).unflatten(1, masks.targets.shape[1:])  # (B, M, L, D)
        context = self.context_encoder(batch.images, masks.context)  # (B, K, D)
        predictions = self.predictor(context, masks.context, masks.targets)  # (B, M, L, D)
        # In float32: what tells pictures apart is often smaller than the rounding of bfloat16.
        pooled = target_features.float().mean(dim=1, keepdim=True)  # (B, 1, D)
        return TargetPairs(predictions, targets, context, pooled)

    def draw_masks(self, batch: ImageBatch) -> Masks:
        """Masks of a batch, on its device: a function of the batch and, in training, of the optimizer step.

        In training the sizes of the blocks are drawn by step, so that all processes have masks of one shape, and follow
        the curriculum; elsewhere they are those of its end.
        """
        trainer = getattr(self, "_trainer", None)
        progress, sizes = 1.0, None
        if trainer is not None and trainer.training:
            progress = trainer.global_step / total_optimizer_steps(trainer)
            sizes = seeded_generator(batch.key[0], SIZE_STREAM, trainer.global_step)
        return self.masks.draw(len(batch.images), batch.generator(), progress, sizes).to(batch.images.device)

    def prediction_loss(self, pairs: TargetPairs) -> Tensor:
        return self.loss(pairs.predictions, pairs.targets)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Average-pooled features of the target encoder: (B, D)."""
        return self.encode(batch.images).float().mean(dim=1)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> TargetPairs:
        pairs = super().validation_step(batch, batch_idx)
        self.error.update((pairs.predictions - pairs.targets).square().mean())
        # The control: one and the same answer, the mean feature, for every patch of every picture.
        mean = pairs.targets.flatten(0, -2).mean(dim=0)
        self.mean_error.update((mean - pairs.targets).square().mean())
        if bool((batch.labels >= 0).all()):
            self.classifiers.update(pairs.target_features[:, 0], batch.labels)
        if batch_idx == 0 and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            self._show(batch, pairs)
        return pairs

    def _show(self, batch: ImageBatch, pairs: TargetPairs) -> None:
        """Pictures for TensorBoard: masks, what the features look like, and which pictures they hold for alike."""
        if not isinstance(self.logger, TensorBoardLogger):
            return
        grid = self.target_encoder.grid
        pictures = to_colours(batch.images)
        masks = self.draw_masks(batch)  # those of `target_pairs`
        visible = torch.zeros(len(pictures), grid[0] * grid[1], dtype=torch.bool, device=self.device)
        marked = [visible.scatter(1, indices, True)[:SHOWN] for indices in (masks.context, masks.targets.flatten(1))]
        colours = feature_colours(self.encode(batch.images[:SHOWN]), grid, self.image_size)
        shown = {
            "picture": pictures[:SHOWN],
            "masks": mark_blocks(pictures[:SHOWN], marked[0], marked[1], grid),
            "features": colours,
        }
        show_in_tensorboard(self.logger, "masks and features", rows_figure(shown), self.global_step)
        alike = rows_figure(nearest_pictures(pictures, pairs.target_features[:, 0], SHOWN))
        show_in_tensorboard(self.logger, "nearest pictures", alike, self.global_step)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("val/error_over_mean", self.error.compute() / self.mean_error.compute(), prog_bar=True)
        if self.classifiers.update_called and not self.trainer.sanity_checking:
            self.log_dict({f"val/{name}": value for name, value in self.classifiers.compute().items()}, prog_bar=True)
        for metric in (self.error, self.mean_error, self.classifiers):
            metric.reset()
