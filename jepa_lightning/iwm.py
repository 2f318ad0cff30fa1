"""IWM: action-conditioned prediction of an image's features after a known transformation (Garrido et al. 2024).

Shapes: B batch, N patches, K kept patches, L hidden patches, D embedding dimension, A scalars of an action.
"""

from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from callbacks.schedules import MomentumSchedule
from datamodules.batches import ImageBatch, ViewBatch
from datamodules.rng import WHOLE_STREAM, seeded_generator
from datamodules.views import COLORS, Views
from jepa_lightning.action_monitor import ActionMonitor
from jepa_lightning.image_jepa import ImageJEPA
from jepa_lightning.jepa import TargetPairs
from jepa_lightning.masks import Masks, MultiBlock
from jepa_lightning.networks.masked_predictor import Conditioning, WorldModel
from jepa_lightning.regularizers import RegularizerName


class IWM(ImageJEPA):
    """An image world model: predict in representation space what a transformation does to an image.

    The context encoder sees the visible patches of a source view; the predictor, conditioned on the action that leads to
    the target view, predicts the target encoder's layer-normalized features of that view at all patches that were hidden,
    with `predict_visible` at the others, too.
    The data module makes the views: `data.views`. The predictor can be fine-tuned afterwards, see `PredictorFineTuning`.

    >>> model = IWM("vit_tiny_patch16_224", 32, 8, encoder_depth=2, predictor_width=48, predictor_depth=2)
    >>> patches = model.context_encoder(torch.zeros(1, 3, 32, 32))
    >>> brighter = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0]])
    >>> model.apply_actions(patches, brighter).shape
    torch.Size([1, 16, 192])

    Args:
        encoder: Name of a timm vision transformer; the sizes in it are overruled by the next two arguments.
        image_size: Height and width of the images in pixels, one number or two; as in the data.
        patch_size: Height and width of a patch in pixels; null for an eighth of the image's shorter side.
        encoder_depth: Number of blocks of the encoder; that of the named model by default.
        conditioning: How the predictor is conditioned on the action: "feature" joins it to each token at which it predicts,
            "sequence" makes a token of each scalar, "adaptive_norm" scales and shifts the predictor's norms by it, "none"
            leaves it out.
        action_dim: Number of scalars of an action: 7, or 12 with `data.views.geometric`.
        predictor_width: Token dimension of the predictor. The paper's sizes for ViT-B are 12 blocks of 384 ("invariant")
            and 18 of 384 ("equivariant").
        predictor_depth: Number of blocks of the predictor.
        predictor_heads: Number of attention heads of the predictor; that of the encoder by default.
        predictor_dropout: Dropout probability in the linear layers of the predictor.
        loss: "squared_error" as in the paper, or "smooth_l1".
        normalize_targets: Layer-normalize the target features, as I-JEPA does; the paper does not say.
        num_targets: Number of rectangles whose union is hidden.
        target_scale: Area of a rectangle, minimum and maximum fraction of the image.
        target_aspect: Height over width of a rectangle, minimum and maximum; I-JEPA's, the paper does not say.
        resampling_fraction: Fraction of images whose rectangles leave too few patches visible, and are then resampled to
            overlap.
        predict_visible: In training, predict visible patches, too, each at its own token, where the paper predicts hidden
            ones alone: what becomes of visible ones depends on the action alone.
        whole_fraction: Fraction of the training steps, in [0, 1], in which nothing is hidden: all patches of the source view
            are seen and all of the target view predicted, which is what `apply_actions` does afterwards. 0 as in the paper.
            With 1, validation hides nothing either.
        freeze_encoder: Train the predictor alone, on an encoder that is trained already (`--init_from`), as V-JEPA 2-AC
            does: the target encoder of that training encodes both views.
        gradient_checkpointing: Recompute activations in the backward pass: less memory for a third more time.
        compile_networks: Compile the three networks with torch.compile before training.
        learning_rate: Peak learning rate, reached at the end of the warm-up.
        start_learning_rate: Learning rate at the start of the warm-up; a hundredth of the peak by default.
        final_learning_rate: Learning rate at the end of the cosine decay.
        warmup_fraction: Fraction of all optimizer steps over which the learning rate rises, in [0, 1).
        weight_decay: Weight decay of kernels and matrices; biases, norms and tokens have none.
        final_weight_decay: Weight decay at the last step, reached along a cosine; constant if None.
        momentum: EMA momentum of the first target update, in [0, 1].
        final_momentum: EMA momentum approached at the last step, in [momentum, 1].
        momentum_schedule: Shape of the schedule from `momentum` to `final_momentum`: "cosine", "linear", "constant", or
            "loss", which follows the prediction loss.
        regularizer: Anti-collapse regularizer on the context encoder's output, "variance_hinge" or "vicreg"; None as in
            the paper.
        regularizer_weights: Weight of each term of the regularizer; terms left out keep their default.

    Raises:
        ValueError: A value out of its range, named together with what is allowed.
    """

    predictor: WorldModel
    batch_type = ViewBatch
    trained_on: dict[str, Any] | None = None
    """The settings of the views that it was trained on, if it comes from a checkpoint."""

    def __init__(
        self,
        encoder: str = "vit_base_patch16_224",
        image_size: int | tuple[int, int] = 224,
        patch_size: int | None = 16,
        encoder_depth: int | None = None,
        conditioning: Conditioning = "feature",
        action_dim: int = len(COLORS),
        predictor_width: int = 384,
        predictor_depth: int = 18,
        predictor_heads: int | None = None,
        predictor_dropout: float = 0.0,
        loss: Literal["smooth_l1", "squared_error"] = "squared_error",
        normalize_targets: bool = True,
        num_targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        resampling_fraction: float = 0.1,
        predict_visible: bool = False,
        whole_fraction: float = 0.0,
        freeze_encoder: bool = False,
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
    ) -> None:
        super().__init__(
            encoder=encoder,
            image_size=image_size,
            patch_size=patch_size,
            encoder_depth=encoder_depth,
            channels=3,
            loss=loss,
            normalize_targets=normalize_targets,
            gradient_checkpointing=gradient_checkpointing,
            compile_networks=compile_networks,
            learning_rate=learning_rate,
            start_learning_rate=start_learning_rate,
            final_learning_rate=final_learning_rate,
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
        if action_dim < len(COLORS):
            raise ValueError(f"model.action_dim={action_dim}: an action has {len(COLORS)} scalars, or 12 with geometry.")
        if not 0 <= whole_fraction <= 1:
            raise ValueError(f"model.whole_fraction={whole_fraction}: choose a fraction of the steps in [0, 1].")
        if freeze_encoder and regularizer is not None:
            raise ValueError(
                f"model.regularizer={regularizer!r} keeps an encoder from collapsing, and model.freeze_encoder trains none: "
                "set model.regularizer and model.regularizer_weights to null."
            )
        context_encoder = self.build_encoder()
        self.build_predictor = partial(
            WorldModel,
            context_encoder.grid,
            context_encoder.dim,
            action_dim,
            conditioning,
            predictor_width,
            predictor_depth,
            predictor_heads or context_encoder.num_heads,
            predictor_dropout,
            gradient_checkpointing,
            predict_visible,
        )
        self.set_networks(context_encoder, self.build_predictor(), context_encoder.dim)
        self.num_patches = context_encoder.grid[0] * context_encoder.grid[1]
        self.context_encoder.requires_grad_(not freeze_encoder)
        self.predict_visible, self.whole_fraction, self.freeze_encoder = predict_visible, whole_fraction, freeze_encoder
        # No context block: everything outside of the rectangles may be seen.
        self.masks = MultiBlock(
            context_encoder.grid, num_targets, target_scale, target_aspect, (1.0, 1.0), resampling_fraction
        )
        self.action_monitor = ActionMonitor(context_encoder.dim, action_dim)

    def setup(self, stage: str) -> None:
        """Compare with the data module before anything runs.

        Raises:
            ValueError: Data without views, of other channels, or with actions of another length.
        """
        pixels = getattr(self.data, "pixels", None)
        if stage != "predict" and pixels is not None and pixels.channels != 3:
            raise ValueError(f"An IWM is of color images, and data.channels={pixels.channels}: train an IJEPA on them.")
        super().setup(stage)
        if stage != "predict":
            self.check_views(self.data)
        if self.freeze_encoder:  # the average of both then stays what it is
            self.context_encoder.load_state_dict(self.target_encoder.state_dict())

    @property
    def best_metric(self) -> tuple[str, Literal["min", "max"]]:
        """That of the predictions where the encoder, and so what a classifier makes of it, stays as it is."""
        return super(ImageJEPA, self).best_metric if self.freeze_encoder else super().best_metric

    def check_views(self, data: Any) -> None:
        """Compare with a data module, if there is one.

        Raises:
            ValueError: Data without views, with actions of another length, or with some that mean something else.
        """
        if data is None:
            return
        if getattr(data, "views", None) is None:
            raise ValueError("An IWM works on pairs of views, and this data has none: set data.views.strength=default.")
        names = data.views.action_names
        if len(names) != self.predictor.action_dim:
            raise ValueError(
                f"model.action_dim={self.predictor.action_dim} but the data's actions have {len(names)} scalars "
                f"({', '.join(names)}): set it to {len(names)}."
            )
        self._check_source(data.views)

    def _check_source(self, views: Views | None) -> None:
        """Refuse pairs whose actions lead from another kind of source than those that it knows."""
        if self.trained_on and views is not None and views.source_from != self.trained_on["source_from"]:
            raise ValueError(
                f"This IWM was trained with data.views.source_from={self.trained_on['source_from']}, and its actions mean "
                f"something else with {views.source_from}: set it to that."
            )

    def views(self, batch: ViewBatch) -> tuple[Tensor, Tensor]:
        return batch.sources, batch.targets

    def draw_masks(self, batch: Any) -> Masks:
        """As for I-JEPA, but with all that is hidden as one target: (B, K) and (B, 1, N - K).

        In training the visible patches come first among the targets with `predict_visible`, (B, 1, N). Where nothing is
        hidden, context and target are all patches, (B, N) and (B, 1, N).
        """
        if self._hides_nothing(batch):
            everywhere = torch.arange(self.num_patches, device=batch.labels.device).expand(len(batch.labels), -1)
            return Masks(everywhere, everywhere[:, None])
        masks = super().draw_masks(batch)
        targets = masks.hidden(self.num_patches)
        if self.training_steps is not None and self.predict_visible:
            targets = torch.cat([masks.context, targets], dim=1)
        return Masks(masks.context, targets[:, None])

    def _hides_nothing(self, batch: ViewBatch) -> bool:
        """Whether this is one of the `whole_fraction` of the training steps, which are the same in all processes."""
        if self.training_steps is None:
            return self.whole_fraction == 1
        drawn = torch.rand((), generator=seeded_generator(batch.key[0], WHOLE_STREAM, self.training_steps[0]))
        return bool(drawn < self.whole_fraction)

    def predict_hidden(self, context: Tensor, masks: Masks, batch: ViewBatch | None) -> Tensor:
        actions = None if batch is None else batch.actions  # None is the zero action, no change
        targets, with_context = masks.targets, self.predict_visible and masks.targets.shape[2] == self.num_patches
        if with_context:  # it comes first, see `draw_masks`
            targets = targets[:, :, context.shape[1] :]
        return self.predictor(context, masks.context, targets, actions, with_context=with_context)

    def as_batch(self, batch: Any, batch_idx: int) -> Any:
        if not isinstance(batch, ImageBatch | ViewBatch):
            raise ValueError(
                f"An IWM learns from pairs of views and the actions between them, not from a {type(batch).__name__}: use "
                "ImageFolder(..., views=Views())."
            )
        return batch

    def encode_targets(self, images: Tensor) -> Tensor:
        """Features of the target encoder in the space of the predictions: normalized (B, 3, H, W) -> (B, N, D)."""
        return self.to_target_space(self.encode(images))

    def complete(self, images: Tensor, visible: Tensor, decoder: Any = None) -> Tensor:
        self.check_completes()
        return super().complete(images, visible, decoder)

    def check_completes(self) -> None:
        """Refuse to predict what is hidden where nothing was in training.

        Raises:
            ValueError: It was trained with `whole_fraction` 1.
        """
        if self.whole_fraction == 1:
            raise ValueError(
                "This IWM was trained with nothing hidden (model.whole_fraction=1) and completes nothing: take one "
                "that had something hidden, such as with model.whole_fraction=0.75."
            )

    def apply_actions(self, features: Tensor, actions: Tensor | None = None) -> Tensor:
        """Predicted features of all patches after an action.

        Args:
            features: Features of all patches of the images from the context encoder, (B, N, D).
            actions: Actions, (B, A), or their colors alone, (B, 7); no change by default.

        Returns:
            (B, N, D).

        Raises:
            ValueError: Actions of another length.
        """
        if actions is not None and actions.shape[1] not in (len(COLORS), self.predictor.action_dim):
            raise ValueError(f"Actions of {actions.shape[1]} scalars for a model of {self.predictor.action_dim}.")
        if actions is not None:
            actions = actions.to(self.predictor.positions.dtype)
            actions = F.pad(actions, (0, self.predictor.action_dim - actions.shape[1]))
        return self.predictor.predict_all(features, actions)

    def image_features(self, batch: ViewBatch, pairs: TargetPairs) -> Tensor:
        assert batch.images is not None
        return self.encode(batch.images).float().mean(dim=1)

    def validation_step(self, batch: Any, batch_idx: int) -> TargetPairs:
        batch = self.as_batch(batch, batch_idx)
        pairs = super().validation_step(batch, batch_idx)
        source, target = self.encode(batch.sources).float().mean(dim=1), pairs.target_features[:, 0]
        self.action_monitor.update(source, target, batch.actions)
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.action_monitor.rank(self, batch)
        return pairs

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.trainer.sanity_checking:
            self.action_monitor.reset()
            return
        names = self.trainer.datamodule.views.action_names
        for name, value in self.action_monitor.compute(names).items():
            self.log(f"val/{name}", value, prog_bar=name == "mrr")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        data: Any = getattr(self._trainer, "datamodule", None)
        checkpoint["views"] = asdict(data.views) if getattr(data, "views", None) is not None else self.trained_on

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.trained_on = checkpoint.get("views")
        self._check_source(getattr(self.data, "views", None))  # `setup`, before, did not know yet
