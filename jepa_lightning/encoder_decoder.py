"""Baselines that learn in pixel space: the networks of a dynamics JEPA, trained by the images that they predict.

Shapes: B batch, T windows in time, S starts, H horizon, D embedding dimension, A scalars of an action; a window is
(history * C, h, w).
"""

from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from datamodules.batches import ClipBatch
from jepa_lightning.dynamics import DynamicsJEPA
from jepa_lightning.dynamics_checks import TargetMode, as_pair, check_batch
from jepa_lightning.jepa import TargetPairs
from jepa_lightning.losses import squared_error
from jepa_lightning.networks.decoders import LatentDecoder
from jepa_lightning.networks.predictor import ResidualPredictor
from jepa_lightning.regularizers import RegularizerName
from jepa_lightning.rollouts import later_features, next_actions
from jepa_lightning.wide import WideMean

Feedback = Literal["pixels", "latent"]


def decoded(decoder: nn.Module, features: Tensor) -> Tensor:
    """Windows from embeddings: (..., D) -> (..., history * C, h, w)."""
    return decoder(features.flatten(0, -2)).unflatten(0, features.shape[:-1])


class FeedbackPredictor(ResidualPredictor):
    """A residual predictor whose embedding may take the way through an image before it is handed on.

    Its parameters are those of `ResidualPredictor` under the same names, with either feedback: decoder and encoder belong
    to the model, which would otherwise hold, optimize and save them twice.
    """

    _through: tuple[nn.Module, nn.Module] | None = None  # in a tuple, torch does not register modules

    def go_through_pixels(self, decoder: nn.Module, encoder: nn.Module) -> None:
        """From now on decode each predicted embedding, and encode what was decoded."""
        self._through = (decoder, encoder)

    def before_feedback(self, features: Tensor, actions: Tensor | None = None) -> Tensor:
        """The predicted embedding as it is, which the decoder reads: as `forward`."""
        return super().forward(features, actions)

    def feed_back(self, images: Tensor) -> Tensor:
        """Decoded windows, encoded for the next step: (..., history * C, h, w) -> (..., D)."""
        assert self._through is not None
        return self._through[1](images.flatten(0, -4)).unflatten(0, images.shape[:-3])

    def forward(self, features: Tensor, actions: Tensor | None = None) -> Tensor:
        """(..., D), and (..., A) if conditioned on actions -> (..., D), from which the next step is predicted."""
        predicted = self.before_feedback(features, actions)
        return predicted if self._through is None else self.feed_back(decoded(self._through[0], predicted))


class DecodedPairs(TargetPairs):
    """Pairs in embedding space, which nothing is trained by here, and what they look like."""

    images: Tensor
    """(B, S, H, history * C, h, w): decoded windows 1 ... H steps after each start, with gradient."""

    true_images: Tensor
    """The same as observed."""

    start_error: Tensor
    """Squared error of the decoded windows of the starts themselves, with gradient: a scalar."""

    still_error: Tensor
    """Squared error of persistence, the window of the start, H steps ahead: a scalar."""


class EncoderDecoder(DynamicsJEPA):
    """A world model that is trained by the squared error of the images it decodes, and by nothing in embedding space.

    Encoder and predictor are those of a `DynamicsJEPA`, so that all that differs is what they learn from: windows decoded
    1 ... H steps ahead, weighted as `step_decay` says, and with the same weight as these together the decoded windows of
    the starts. There is no EMA, the target encoder is a copy after every step. Whatever takes a `DynamicsJEPA` takes this
    model, and plans in its embedding space.

    >>> model = EncoderDecoder(image_size=32, latent_dim=16, action_dim=2, decoder_width=32)
    >>> features = model.encode(torch.zeros(3, 1, 3, 32, 32))[:, 0]
    >>> model.forecast_images(features, 4, torch.zeros(3, 4, 2)).shape
    torch.Size([3, 4, 3, 32, 32])

    Args:
        feedback: What a step of a roll-out starts from. "latent": the embedding predicted before, as a JEPA does it.
            "pixels": that embedding decoded to a window and encoded again, in training and whenever it predicts.
        decoder_width: Token dimension of the decoder, a multiple of 32; see `networks.decoders.LatentDecoder`.
        decoder_depth: Number of layers of the decoder.
        regularizer: As in `DynamicsJEPA`, but nothing by default: embeddings from which images are decoded do not collapse.
        target_mode: "none", the one that there is: nothing aims at an embedding.
        arguments: Those of `DynamicsJEPA`.

    Raises:
        ValueError: A value out of its range, observations other than pixels, or images that patches of 8 pixels do not tile.
    """

    decoder: LatentDecoder
    predictor: FeedbackPredictor

    def __init__(
        self,
        feedback: Feedback = "latent",
        decoder_width: int = 64,
        decoder_depth: int = 2,
        regularizer: RegularizerName | None = None,
        target_mode: TargetMode = "none",
        **arguments: Any,
    ) -> None:
        if feedback not in get_args(Feedback):
            raise ValueError(f"model.feedback={feedback!r}: choose one of {', '.join(get_args(Feedback))}.")
        if decoder_width < 32 or decoder_width % 32:
            raise ValueError(f"model.decoder_width={decoder_width}: give a multiple of 32, the width of an attention head.")
        if decoder_depth < 1:
            raise ValueError(f"model.decoder_depth={decoder_depth}: give an integer of at least 1.")
        if target_mode != "none":
            raise ValueError(
                f"model.target_mode={target_mode!r}: an EncoderDecoder aims at no embeddings; leave it at 'none'."
            )
        if (observation := arguments.get("observation", "pixels")) != "pixels":
            raise ValueError(f"model.observation={observation!r}: an EncoderDecoder predicts images; set it to 'pixels'.")
        if (predictor := arguments.get("predictor", "residual")) != "residual":
            raise ValueError(
                f"model.predictor={predictor!r}: an EncoderDecoder takes one step at a time; set it to 'residual'."
            )
        super().__init__(regularizer=regularizer, target_mode=target_mode, **arguments)
        self.feedback = feedback
        shape = as_pair(self.image_size), self.channels * self.history
        self.decoder = LatentDecoder(self.latent_dim, *shape, decoder_width, decoder_depth)
        if feedback == "pixels":
            self.predictor.go_through_pixels(self.decoder, self.context_encoder)
        self.pixel_errors = nn.ModuleDict({name: WideMean() for name in ("last", "last_still")})

    def build_predictor(self) -> nn.Module:
        return FeedbackPredictor(self.latent_dim, *self._predictor)

    def trained_networks(self) -> list[nn.Module]:
        return [*super().trained_networks(), self.decoder]

    @property
    def best_metric(self) -> tuple[str, Literal["min", "max"]]:
        """The error of what is decoded, which no collapse of the embeddings makes small."""
        return "val/pixel_loss", "min"

    def on_fit_start(self) -> None:
        way = "decoded and encoded again" if self.feedback == "pixels" else "predicted"
        rank_zero_info(
            f"feedback {self.feedback} rolls out from embeddings as {way}; decoded images alone are learned from."
        )

    def decode(self, features: Tensor) -> Tensor:
        """Windows from embeddings of the encoder or the predictor: (..., D) -> (..., history * C, h, w), not clamped."""
        return decoded(self.decoder, features)

    def roll_out(self, features: Tensor, horizon: int, actions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `forecast`, together with the decoded windows: (..., H, D) and (..., H, history * C, h, w)."""
        if self.feedback == "latent":
            forecasts = self.forecast(features, horizon, actions)
            return forecasts, self.decode(forecasts)
        steps, images = [], []
        for step in range(horizon):
            predicted = self.predictor.before_feedback(features, None if actions is None else actions[..., step, :])
            images.append(self.decode(predicted))
            features = self.predictor.feed_back(images[-1])
            steps.append(features)
        return torch.stack(steps, dim=-2), torch.stack(images, dim=-4)

    @torch.no_grad()
    def forecast_images(self, features: Tensor, horizon: int, actions: Tensor | None = None) -> Tensor:
        """Windows 1 ... H steps ahead of embeddings: (..., D), and (..., H, A) -> (..., H, history * C, h, w).

        Not the same as `decode` of `forecast` with feedback "pixels", whose embeddings are those of the decoded images: they
        would be decoded a second time.
        """
        return self.roll_out(features, horizon, actions)[1]

    def target_pairs(self, batch: ClipBatch) -> DecodedPairs:
        check_batch(self, batch)
        windows, horizon = batch.observations, self.horizon
        context = self.encode_windows(self.context_encoder, windows)  # (B, T, D)
        target = context.detach()
        starts = context[:, :-horizon]  # (B, S, D)
        forecasts, images = self.roll_out(starts, horizon, next_actions(batch.actions, horizon))
        pairs = DecodedPairs(forecasts, later_features(target, horizon), context, target)
        pairs.images = images
        pairs.true_images = windows.unfold(1, horizon + 1, 1).movedim(-1, 2)[:, :, 1:]
        pairs.start_error = nn.functional.mse_loss(self.decode(starts), windows[:, :-horizon])
        pairs.still_error = nn.functional.mse_loss(windows[:, :-horizon], windows[:, horizon:])
        return pairs

    def prediction_loss(self, pairs: TargetPairs) -> Tensor:
        """Squared error of decoded windows: of the steps, near ones first (see `step_decay`), and of the starts."""
        assert isinstance(pairs, DecodedPairs)
        return squared_error(pairs.images.flatten(3), pairs.true_images.flatten(3), self.step_weights) + pairs.start_error

    def last_error(self, pairs: DecodedPairs) -> Tensor:
        """Squared error of the windows decoded H steps ahead: a scalar."""
        return nn.functional.mse_loss(pairs.images[:, :, -1], pairs.true_images[:, :, -1])

    def auxiliary_loss(self, batch: ClipBatch, pairs: TargetPairs) -> Tensor:
        assert isinstance(pairs, DecodedPairs)
        self.log_dict({"train/pixel_loss": self.last_error(pairs), "train/reconstruction_loss": pairs.start_error})
        return super().auxiliary_loss(batch, pairs)

    def validation_step(self, batch: Any, batch_idx: int) -> TargetPairs:
        pairs = super().validation_step(batch, batch_idx)
        assert isinstance(pairs, DecodedPairs)
        self.pixel_errors["last"].update(self.last_error(pairs))
        self.pixel_errors["last_still"].update(pairs.still_error)
        return TargetPairs(*pairs)  # without the images: Lightning keeps it for a while

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        error, still = (self.pixel_errors[name].compute() for name in ("last", "last_still"))
        self.log("val/pixel_loss", error, prog_bar=True)
        self.log("val/pixel_ratio", error / still)
        for metric in self.pixel_errors.values():
            metric.reset()
