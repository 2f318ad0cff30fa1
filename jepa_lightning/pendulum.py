"""A JEPA of the double pendulum: predict the features of later windows from those of one window.

Shapes: B batch, T windows in time, S starts, H horizon, D width.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from callbacks.schedules import ScheduleName
from datamodules.batches import PendulumBatch
from jepa_lightning.jepa import JEPA, TargetPairs
from jepa_lightning.losses import squared_error, step_weights
from jepa_lightning.metrics import RidgeProbe
from jepa_lightning.networks.conv import ConvEncoder
from jepa_lightning.networks.mlp import mlp
from jepa_lightning.networks.predictor import ResidualPredictor
from jepa_lightning.regularizers import RegularizerName

LABELS = ("sin_theta1", "cos_theta1", "sin_theta2", "cos_theta2", "omega1", "omega2")


def state_labels(states: Tensor) -> Tensor:
    """What probes read out: sine and cosine of both angles, and both angular velocities, (..., 4) -> (..., 6)."""
    theta1, theta2, omega1, omega2 = states.unbind(-1)
    return torch.stack([theta1.sin(), theta1.cos(), theta2.sin(), theta2.cos(), omega1, omega2], dim=-1)


def unroll(predictor: nn.Module, features: Tensor, horizon: int) -> Tensor:
    """Apply the predictor to its own output, again and again.

    Args:
        predictor: Features one frame later, (..., D) -> (..., D).
        features: (..., D) to start from.
        horizon: H steps.

    Returns:
        (..., H, D), the features 1 ... H frames later.
    """
    steps = []
    for _ in range(horizon):
        features = predictor(features)
        steps.append(features)
    return torch.stack(steps, dim=-2)


def later_features(features: Tensor, horizon: int) -> Tensor:
    """For every start that has H successors, these successors: (B, T, D) -> (B, T - H, H, D)."""
    return features.unfold(1, horizon + 1, 1)[..., 1:].transpose(2, 3)  # unfold: (B, T - H, D, H + 1)


class PendulumJEPA(JEPA):
    """Encode two frames, predict the features of the next ones by unrolling a residual predictor.

    Every window of a clip that has `horizon` successors is a start, so one clip trains several roll-outs. The context
    encoder sees the starts alone, and the regularizer acts on its features of all of them; targets are the features that
    the EMA encoder gives the later windows.

    Args:
        observation: "pixels" for a convolutional encoder, "coordinates" for an MLP.
        image_size: Height and width of the pictures; as in the data. With coordinates, of those in the report.
        channels: 1 for grey, 3 for RGB; as in the data.
        history: Frames per window; as in the data.
        latent_dim: D, width of the features.
        encoder_widths: Channels of the convolutions (pixels) or widths of the hidden layers (coordinates).
        predictor_width: Width of the predictor's two hidden layers.
        horizon: H, prediction steps in the loss.
        step_decay: Step k of the horizon weighs k ** -step_decay in the loss, >= 0. At 0 all weigh alike, and the error of
            the far steps, many times that of the first, is nearly all that is learned from.
        learning_rate: Peak of the schedule, at the end of the warm-up.
        warmup_fraction: Part of all optimizer steps over which the learning rate rises, in [0, 1).
        weight_decay: Of kernels and matrices; biases and norms have none.
        final_weight_decay: Where a cosine takes the weight decay by the last step; `weight_decay` if left out.
        momentum: Of the first target update, in [0, 1].
        final_momentum: What the momentum approaches at the last step, in [momentum, 1].
        momentum_schedule: Way from the one to the other.
        regularizer: What keeps the features apart: "variance_hinge" or "vicreg".
        regularizer_weights: Weight of each of its terms: std for the hinge; std, cov and curvature for VICReg.

    Raises:
        ValueError: A value out of its range, named together with what is allowed.
    """

    step_weights: Tensor

    def __init__(
        self,
        observation: Literal["pixels", "coordinates"] = "pixels",
        image_size: int = 64,
        channels: int = 1,
        history: int = 2,
        latent_dim: int = 64,
        encoder_widths: tuple[int, ...] = (16, 32, 64),
        predictor_width: int = 512,
        horizon: int = 8,
        step_decay: float = 1.0,
        learning_rate: float = 4e-3,
        warmup_fraction: float = 0.03,
        weight_decay: float = 1e-4,
        final_weight_decay: float | None = None,
        momentum: float = 0.99,
        final_momentum: float = 1.0,
        momentum_schedule: ScheduleName = "cosine",
        regularizer: RegularizerName = "vicreg",
        regularizer_weights: dict[str, float] | None = None,
    ) -> None:
        self.check_sizes(
            latent_dim=latent_dim, predictor_width=predictor_width, horizon=horizon, history=history, channels=channels
        )
        if not step_decay >= 0:
            raise ValueError(f"model.step_decay={step_decay}: must be >= 0; 0 weighs all steps of the horizon alike.")
        super().__init__(
            learning_rate=learning_rate,
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
        self.observation, self.image_size, self.channels, self.history = observation, image_size, channels, history
        self.latent_dim, self.horizon, self.predictor_width = latent_dim, horizon, predictor_width
        self.encoder_widths = tuple(encoder_widths)
        self.set_networks(self.build_encoder(), self.build_predictor(), latent_dim)
        self.register_buffer("step_weights", step_weights(horizon, step_decay), persistent=False)
        self.probe = RidgeProbe(latent_dim, len(LABELS))
        self.error_over_steps = nn.ModuleDict(
            {name: MeanMetric() for name in ("first", "last", "first_still", "last_still")}
        )

    @staticmethod
    def check_sizes(**sizes: int) -> None:
        """Raise a ValueError for a size below 1."""
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"model.{name}={value}: give a whole number of at least 1.")

    def build_encoder(self) -> nn.Module:
        """A freshly initialised encoder: (N, window) -> (N, D)."""
        if self.observation == "pixels":
            return ConvEncoder(self.image_size, self.channels * self.history, self.encoder_widths, self.latent_dim)
        if self.observation == "coordinates":
            return mlp(4 * self.history, self.encoder_widths, self.latent_dim)
        raise ValueError(f"model.observation={self.observation!r}: choose 'pixels' or 'coordinates'.")

    def build_predictor(self) -> nn.Module:
        """A freshly initialised predictor: (..., D) -> (..., D)."""
        return ResidualPredictor(self.latent_dim, self.predictor_width)

    def setup(self, stage: str) -> None:
        """Compare with the data module before anything runs.

        Raises:
            ValueError: A horizon longer than the clips, or observations that the encoder was not built for.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        self.check_data(data)
        clip_length = getattr(data, "clip_length", None)
        if clip_length is not None and self.history + self.horizon > clip_length:
            raise ValueError(
                f"model.horizon={self.horizon} steps from a window of history={self.history} frames do not fit into "
                f"data.clip_length={clip_length} frames: lower the horizon to at most {clip_length - self.history} or "
                "lengthen data.sequence_length and data.clip_length."
            )

    def check_data(self, data: Any) -> None:
        """Raise a ValueError if a data module gives observations that the encoder was not built for."""
        names = ["observation", "history"] + (["image_size", "channels"] if self.observation == "pixels" else [])
        for name in names:
            mine, theirs = getattr(self, name), getattr(data, name, None)
            if theirs is not None and mine != theirs:
                raise ValueError(f"The model has {name}={mine} but data.{name}={theirs}: set both to the same value.")

    def encode_windows(self, encoder: nn.Module, windows: Tensor) -> Tensor:
        """Apply an encoder at all times: (B, T, ...) -> (B, T, D)."""
        return encoder(windows.flatten(0, 1)).unflatten(0, windows.shape[:2])

    @torch.no_grad()
    def encode(self, observations: Tensor) -> Tensor:
        """Features of the target encoder, without gradient: windows (B, T, ...) -> (B, T, D)."""
        return self.encode_windows(self.target_encoder, observations)

    def forecast(self, features: Tensor, horizon: int) -> Tensor:
        """Predicted features 1 ... H frames later: (..., D) -> (..., H, D)."""
        return unroll(self.predictor, features, horizon)

    def target_pairs(self, batch: PendulumBatch) -> TargetPairs:
        if batch.observations.shape[1] <= self.horizon:
            raise ValueError(
                f"model.horizon={self.horizon} needs clips of more than {self.horizon} windows; the batch has "
                f"{batch.observations.shape[1]}."
            )
        context = self.encode_windows(self.context_encoder, batch.observations[:, : -self.horizon])  # (B, S, D)
        target = self.encode(batch.observations)  # (B, T, D)
        predictions = self.forecast(context, self.horizon)  # (B, S, H, D)
        return TargetPairs(predictions, later_features(target, self.horizon), context, target)

    def prediction_loss(self, pairs: TargetPairs) -> Tensor:
        """Squared error, near steps first: see `step_decay`."""
        return squared_error(pairs.predictions, pairs.targets, self.step_weights)

    def predict_step(self, batch: PendulumBatch, batch_idx: int) -> Tensor:
        """Features of the target encoder: (B, T, D)."""
        return self.encode(batch.observations)

    def validation_step(self, batch: PendulumBatch, batch_idx: int) -> TargetPairs:
        pairs = super().validation_step(batch, batch_idx)
        # Judged from target features to target features, as every later use of the model goes. "Still": nothing moves.
        start = pairs.target_features[:, : -self.horizon]  # (B, S, D)
        forecast = self.forecast(start, self.horizon)
        for name, step in (("first", 0), ("last", -1)):
            goal = pairs.targets[:, :, step]
            self.error_over_steps[name].update((forecast[:, :, step] - goal).square().mean())
            self.error_over_steps[f"{name}_still"].update((start - goal).square().mean())
        labels = state_labels(batch.states)
        for fit in (True, False):  # every other trajectory fits the probe, the rest judge it
            rows = slice(0 if fit else 1, None, 2)
            self.probe.update(pairs.target_features[rows].flatten(0, 1), labels[rows].flatten(0, 1), fit=fit)
        return pairs

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        errors = {name: metric.compute() for name, metric in self.error_over_steps.items()}
        self.log("val/persistence_ratio_first", errors["first"] / errors["first_still"])
        self.log("val/persistence_ratio", errors["last"] / errors["last_still"], prog_bar=True)
        if not self.trainer.sanity_checking:
            scores = dict(zip(LABELS, self.probe.compute(), strict=True))
            self.log_dict({f"val/linear_r2_{name}": score for name, score in scores.items()})
        for metric in (*self.error_over_steps.values(), self.probe):
            metric.reset()
