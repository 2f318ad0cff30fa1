"""I-JEPA: predict the representations of hidden blocks of an image from those of a visible one (Assran et al. 2023).

Shapes: B batch, N patches, K kept patches, M target blocks, L patches of a block, D embedding dimension.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from callbacks.schedules import MomentumSchedule, late_rise
from datamodules.batches import ImageBatch, ViewBatch
from jepa_lightning.image_jepa import ImageJEPA
from jepa_lightning.jepa import TargetPairs
from jepa_lightning.masks import Masks, MultiBlock
from jepa_lightning.networks.masked_predictor import MaskedPredictor, PredictorContext
from jepa_lightning.networks.mlp import mlp
from jepa_lightning.networks.vit import layer_norm, repeated
from jepa_lightning.optim import leave_alone
from jepa_lightning.regularizers import RegularizerName
from jepa_lightning.sharding import is_sharded, shard


class IJEPA(ImageJEPA):
    """Self-supervised pretraining of a vision transformer by prediction in representation space.

    The context encoder sees the visible patches alone; the target encoder, its exponential moving average (EMA), sees the
    whole image, and its layer-normalized patch features are the targets at the hidden blocks (stop-gradient). As published
    that is all, and images are not augmented but by crops; `view_weight` adds a prediction across views.

    >>> import torch
    >>> model = IJEPA("vit_tiny_patch16_224", image_size=32, patch_size=8, encoder_depth=2, predictor_width=48)
    >>> model(torch.zeros(5, 3, 32, 32)).shape, model.encode(torch.zeros(5, 3, 32, 32)).shape
    (torch.Size([5, 192]), torch.Size([5, 16, 192]))

    Args:
        encoder: Name of a timm vision transformer, "vit_tiny_patch16_224" ... "vit_giant_patch14_224"; the sizes in it
            are overruled by the next two arguments.
        image_size: Height and width of the images in pixels, one number or two; as in the data.
        patch_size: Height and width of a patch in pixels; null for an eighth of the image's shorter side.
        encoder_depth: Number of blocks of the encoder; that of the named model by default.
        predictor_width: Token dimension of the predictor.
        predictor_depth: Number of blocks of the predictor. The paper takes 6 for ViT-B, 12 for L and H.
        predictor_heads: Number of attention heads of the predictor; that of the encoder by default.
        predictor_dropout: Dropout probability in the linear layers of the predictor.
        predictor_context: "repeated", as in the paper: the predictor computes the visible patches anew for each target
            block; or "shared": once for all blocks, without attention to them, which takes less time.
        loss: "smooth_l1" as the released code has it, or "squared_error" as the paper says.
        normalize_targets: Layer-normalize the target features, as the released code does.
        num_targets: Number of target blocks M per context.
        num_contexts: Number of contexts per image, each with target blocks of its own, which share one pass of the target
            encoder; 1 as in the paper. Batches of half as many images take as much memory with 2.
        target_scale: Area of a target block, minimum and maximum fraction of the image.
        more_target_scales: Further ranges of `target_scale`; each batch takes its blocks from one of all the ranges.
        final_target_scale: `target_scale` at the end of training, for a curriculum; constant by default.
        target_aspect: Height over width of a target block, minimum and maximum.
        context_scale: Area of the context block before it loses the targets, minimum and maximum fraction of the image.
        resampling_fraction: Fraction of images whose context block keeps too few patches, so that they also see patches
            outside of it.
        official_compat: Use masks with the flaws of the released code, and its count of optimizer steps from 1 in the
            schedules of learning rate and weight decay: for parity alone.
        gradient_checkpointing: Recompute activations in the backward pass: less memory for a third more time.
        compile_networks: Compile the three networks with torch.compile before training: minutes at the start, faster
            steps after. Left out, with a warning, where there is no compiler.
        learning_rate: Peak learning rate, reached at the end of the warm-up.
        start_learning_rate: Learning rate at the start of the warm-up; a hundredth of the peak by default.
        final_learning_rate: Learning rate at the end of the cosine decay.
        warmup_fraction: Fraction of all optimizer steps over which the learning rate rises, in [0, 1).
        weight_decay: Weight decay of kernels and matrices; biases, norms and the mask token have none.
        final_weight_decay: Weight decay at the last step, reached along a cosine; constant if None.
        momentum: EMA momentum of the first target update, in [0, 1].
        final_momentum: EMA momentum approached at the last step, in [momentum, 1].
        momentum_schedule: Shape of the schedule from `momentum` to `final_momentum`: "cosine", "linear" as in the paper,
            "constant", or "loss", which follows the prediction loss.
        regularizer: Anti-collapse regularizer on the context encoder's output, "variance_hinge" or "vicreg"; None as in
            the paper.
        regularizer_weights: Weight of each term of the regularizer; terms left out keep their default.
        channels: Number of channels of the images, as in the data: 1 for gray, 3 for color.
        margin: Width in patches of a frame around each target block that the context does not see; 0 as in the paper.
        view_weight: Weight of a second prediction, of the pooled embedding of another view of the image from that of the
            context; needs the pairs of `data.views`. 0 as in the paper.
        view_start_fraction: Fraction of the training, in [0, 0.9], after which that weight rises from 0, over a tenth of the
            training.

    Raises:
        ValueError: A value out of its range, named together with what is allowed.
    """

    def __init__(
        self,
        encoder: str = "vit_small_patch16_224",
        image_size: int | tuple[int, int] = 224,
        patch_size: int | None = 16,
        encoder_depth: int | None = None,
        predictor_width: int = 384,
        predictor_depth: int = 6,
        predictor_heads: int | None = None,
        predictor_dropout: float = 0.0,
        predictor_context: PredictorContext = "repeated",
        loss: Literal["smooth_l1", "squared_error"] = "smooth_l1",
        normalize_targets: bool = True,
        num_targets: int = 4,
        num_contexts: int = 1,
        target_scale: tuple[float, float] = (0.15, 0.2),
        final_target_scale: tuple[float, float] | None = None,
        more_target_scales: tuple[tuple[float, float], ...] = (),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        resampling_fraction: float = 0.1,
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
        momentum_schedule: MomentumSchedule = "cosine",
        regularizer: RegularizerName | None = None,
        regularizer_weights: dict[str, float] | None = None,
        channels: int = 3,
        margin: int = 0,
        view_weight: float = 0.0,
        view_start_fraction: float = 0.0,
    ) -> None:
        super().__init__(
            encoder=encoder,
            image_size=image_size,
            patch_size=patch_size,
            encoder_depth=encoder_depth,
            channels=channels,
            loss=loss,
            normalize_targets=normalize_targets,
            gradient_checkpointing=gradient_checkpointing,
            compile_networks=compile_networks,
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
            regularizer_weights=regularizer_weights,
        )
        self.save_hyperparameters()
        if num_contexts < 1:
            raise ValueError(f"model.num_contexts={num_contexts}: an image needs at least 1 context.")
        if not 0 <= view_weight < math.inf:
            raise ValueError(f"model.view_weight={view_weight}: choose a weight from 0.")
        if not 0 <= view_start_fraction <= 0.9:
            raise ValueError(
                f"model.view_start_fraction={view_start_fraction}: choose one in [0, 0.9]; the weight rises over a tenth of "
                "the training."
            )
        self.num_contexts = num_contexts
        self.view_weight, self.view_start_fraction = view_weight, view_start_fraction
        context_encoder = self.build_encoder()
        predictor = MaskedPredictor(
            context_encoder.grid,
            context_encoder.dim,
            predictor_width,
            predictor_depth,
            predictor_heads or context_encoder.num_heads,
            predictor_dropout,
            gradient_checkpointing,
            predictor_context,
        )
        dim = context_encoder.dim
        self.view_predictor = mlp(dim, (2 * dim,), dim) if view_weight else None
        self.set_networks(context_encoder, predictor, dim)
        self.masks = MultiBlock(
            context_encoder.grid,
            num_targets,
            target_scale,
            target_aspect,
            context_scale,
            resampling_fraction,
            final_target_scale,
            more_target_scales,
            official_compat,
            margin,
        )

    def setup(self, stage: str) -> None:
        """Compare with the data module before anything runs, and compile.

        Raises:
            ValueError: Data with one view of an image where two are learned from, two where one is, or two that are alike.
        """
        views = getattr(self.data, "views", None)
        if stage == "fit" and self.view_weight and getattr(self.data, "batch_type", None) is ImageBatch:
            raise ValueError(
                f"model.view_weight={self.view_weight} learns from pairs of views, and this data has none: give "
                "--data.views.geometric true, or --model.view_weight 0."
            )
        if stage == "fit" and self.view_weight and views is not None and not (views.geometric or views.color_changes):
            raise ValueError(
                f"model.view_weight={self.view_weight} with data.views that change neither place nor colors: both views are "
                "the same. Give --data.views.geometric true."
            )
        if stage == "fit" and not self.view_weight and views is not None:
            raise ValueError(
                "model.view_weight=0 learns from one view of an image, and data.views makes two: give --data.views null, or "
                "--model.view_weight 1."
            )
        super().setup(stage)

    def readable(self, stage: str) -> tuple[type, ...]:
        """Pairs of views where they are learned from; validation sees images as they are, which pairs bring along."""
        return (ImageBatch, ViewBatch) if stage != "fit" or self.view_weight else (ImageBatch,)

    def trained_networks(self) -> list[nn.Module]:
        return [*super().trained_networks(), *([] if self.view_predictor is None else [self.view_predictor])]

    def shard_networks(self, mesh: DeviceMesh, device: torch.device) -> None:
        super().shard_networks(mesh, device)
        if self.view_predictor is not None and not is_sharded(self.view_predictor):
            shard(self.view_predictor, mesh, device)

    def views(self, batch: ImageBatch | ViewBatch) -> tuple[Tensor, Tensor]:
        """An image, seen in part and whole: in training the sources of pairs, elsewhere the images as they are.

        What is seen whole has other colors than what is seen in part, if the batch has it recolored.
        """
        if isinstance(batch, ViewBatch) and batch.images is None:
            return batch.sources, batch.sources if batch.recolored is None else batch.recolored
        assert batch.images is not None
        return batch.images, batch.images

    def predict_hidden(self, context: Tensor, masks: Masks, batch: ImageBatch | ViewBatch | None) -> Tensor:
        return self.predictor(context, masks.context, masks.targets)

    def auxiliary_loss(self, batch: ImageBatch | ViewBatch, pairs: TargetPairs) -> Tensor:
        loss, weight = super().auxiliary_loss(batch, pairs), self.view_weight_now
        if weight:
            view_loss = self.view_loss(batch, pairs.features)
            self.log("train/view_loss", view_loss)
            return loss + weight * view_loss
        if self.view_predictor is not None:  # DDP waits for a gradient of each parameter
            loss = loss + 0 * self.view_predictor(pairs.features.new_zeros(1, self.embedding_dim)).sum()
        return loss

    @property
    def view_weight_now(self) -> float:
        """`view_weight` times how far it has risen at this step."""
        if not self.view_weight or self.training_steps is None:
            return 0.0
        return self.view_weight * late_rise(*self.training_steps, self.view_start_fraction)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.view_predictor is not None and not self.view_weight_now:
            leave_alone(optimizer, self.view_predictor.parameters())

    def view_loss(self, batch: Any, context: Tensor) -> Tensor:
        """Distance of the pooled embedding of the other view from what is predicted of it from a context, a scalar.

        Both views show one image at two places and in two colors: what can be predicted is what they share. Layer norm keeps
        the scale of the embeddings out of it.

        Args:
            batch: Pairs of views, of which `context` shows the sources.
            context: Patch embeddings of the context encoder, (R B, K, D), those of all images one after the other R times.

        Raises:
            ValueError: Images without a second view.
        """
        assert self.view_predictor is not None
        if not isinstance(batch, ViewBatch):
            raise ValueError(
                f"model.view_weight={self.view_weight} learns from pairs of views, a ViewBatch, and this is a "
                f"{type(batch).__name__}: set view_weight=0."
            )
        other = layer_norm(self.encode(batch.targets).float().mean(dim=1))  # (B, D)
        predicted = self.view_predictor(layer_norm(context.mean(dim=1)))  # (R B, D)
        return self.loss(predicted, repeated(other, len(predicted) // len(other)))
