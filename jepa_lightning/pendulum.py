"""A JEPA of the double pendulum: predict the embeddings of later windows from that of one, conditioned on the actions.

Shapes: B batch, T windows in time, S starts, H horizon, D embedding dimension, A scalars of an action.
"""

from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional

from callbacks.schedules import ScheduleName
from datamodules.batches import PendulumBatch, check_batches
from datamodules.physics import LABELS, state_labels
from jepa_lightning.jepa import JEPA, TargetPairs
from jepa_lightning.losses import squared_error, step_weights
from jepa_lightning.metrics import RidgeProbe, guarded_error
from jepa_lightning.networks.encoders import EncoderName, window_encoder
from jepa_lightning.networks.mlp import mlp
from jepa_lightning.networks.predictor import ResidualPredictor
from jepa_lightning.regularizers import RegularizerName
from jepa_lightning.rollouts import ForecastErrors, later_features, next_actions, unroll

TargetMode = Literal["default", "vjepa2", "none"]

MODES = {
    "default": "predicts from the target encoder's embeddings to the target encoder's: the prediction loss trains "
    "the predictor alone and sends no gradient to the encoder, which the auxiliary losses shape",
    "vjepa2": "predicts from the context encoder's embeddings to the target encoder's",
    "none": "predicts from the context encoder's embeddings to its own, detached; the target encoder is its copy after "
    "every step, and momentum is not used",
}


class PendulumJEPA(JEPA):
    """Encode a few frames, predict the embeddings of later ones by rolling out a residual predictor in latent space.

    Every window of a clip that has `horizon` successors is a start, so one clip trains several roll-outs. For an actuated
    (torque-controlled) pendulum, the predictor is conditioned on the action of each step.

    Args:
        observation: Kind of observations, "pixels" or "coordinates".
        image_size: Height and width of the images in pixels; as in the data. With coordinates, of those in the report.
        channels: Number of channels, 1 for gray, 3 for RGB; as in the data.
        history: Number of frames per window; as in the data.
        latent_dim: Embedding dimension D.
        encoder: "cnn", "mlp" or "vit", see `jepa_lightning.networks.encoders`; by default "cnn" for pixels and "mlp" for
            coordinates.
        encoder_widths: Channels of the convolutions, widths of the hidden layers, or the width of each block of a "vit"; by
            default 16, 32 and 64 channels, two layers of 512, or four blocks of 96.
        predictor_width: Width of the predictor's two hidden layers.
        predictor_dropout: Dropout probability after each hidden layer of the predictor, in [0, 1). With dropout a resumed
            run is not the uncut one bit for bit.
        action_dim: Number of scalars of an action, A: 2 for an actuated pendulum, 0 for a free one.
        action_width: Width of the linear embedding of an action.
        target_mode: Where predictions start and what they aim at. "vjepa2": from the context encoder's embeddings of each
            start to the target encoder's of the later windows; the regularizer sees the starts. "default": from the target
            encoder's embeddings to the target encoder's, so that the prediction loss sends **no gradient to the encoder**,
            which the auxiliary losses on the context encoder's embeddings of all windows shape alone. "none": from the
            context encoder's embeddings to its own with a stop-gradient, without EMA: the target encoder is a copy.
        inverse_dynamics: Weight of the loss of the inverse dynamics model (IDM), >= 0: the error of the action between two
            consecutive windows, from their embeddings (context encoder, a hidden layer of `predictor_width`).
        horizon: Number of prediction steps H in the loss.
        step_decay: Exponent of the loss weights of the steps, >= 0: step k weighs k ** -step_decay. At 0 all weigh alike,
            and the error of the far steps, many times that of the first, is nearly all that is learned from.
        learning_rate: Peak learning rate, reached at the end of the warm-up.
        warmup_fraction: Fraction of all optimizer steps over which the learning rate rises, in [0, 1).
        weight_decay: Weight decay of kernels and matrices; biases and norms have none.
        final_weight_decay: Weight decay at the last step, reached along a cosine; `weight_decay` if None.
        momentum: EMA momentum of the first target update, in [0, 1]. Not used with `target_mode` "none".
        final_momentum: EMA momentum approached at the last step, in [momentum, 1].
        momentum_schedule: Shape of the schedule from `momentum` to `final_momentum`.
        regularizer: Anti-collapse regularizer, see `jepa_lightning.regularizers.Regularizer`; None for nothing.
        regularizer_weights: Weight of each term of the regularizer; terms left out keep their default.

    Raises:
        ValueError: A value out of its range, named together with what is allowed.
    """

    step_weights: Tensor
    trained_on: dict[str, Any]
    """`dynamics` of the data that it was trained on, if it comes from a checkpoint."""

    def __init__(
        self,
        observation: Literal["pixels", "coordinates"] = "pixels",
        image_size: int = 64,
        channels: int = 1,
        history: int = 2,
        latent_dim: int = 64,
        encoder: EncoderName | None = None,
        encoder_widths: tuple[int, ...] | None = None,
        predictor_width: int = 512,
        predictor_dropout: float = 0.0,
        action_dim: int = 0,
        action_width: int = 32,
        target_mode: TargetMode = "vjepa2",
        inverse_dynamics: float = 0.0,
        horizon: int = 8,
        step_decay: float = 1.0,
        learning_rate: float = 4e-3,
        warmup_fraction: float = 0.03,
        weight_decay: float = 1e-4,
        final_weight_decay: float | None = None,
        momentum: float = 0.99,
        final_momentum: float = 1.0,
        momentum_schedule: ScheduleName = "cosine",
        regularizer: RegularizerName | None = "vicreg",
        regularizer_weights: dict[str, float] | None = None,
    ) -> None:
        sizes = {
            "latent_dim": latent_dim,
            "predictor_width": predictor_width,
            "horizon": horizon,
            "history": history,
            "channels": channels,
            "action_width": action_width,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"model.{name}={value}: give an integer of at least 1.")
        if observation not in ("pixels", "coordinates"):
            raise ValueError(f"model.observation={observation!r}: choose 'pixels' or 'coordinates'.")
        if target_mode not in MODES:
            raise ValueError(f"model.target_mode={target_mode!r}: choose one of {', '.join(get_args(TargetMode))}.")
        if not 0 <= predictor_dropout < 1:
            raise ValueError(f"model.predictor_dropout={predictor_dropout}: choose a fraction of the units in [0, 1).")
        if action_dim < 0 or not inverse_dynamics >= 0:
            raise ValueError(f"model.action_dim={action_dim}, inverse_dynamics={inverse_dynamics}: neither may be negative.")
        if inverse_dynamics and not action_dim:
            raise ValueError(f"model.inverse_dynamics={inverse_dynamics} needs actions to predict: set model.action_dim.")
        if target_mode == "default" and regularizer is None and not inverse_dynamics:
            raise ValueError(
                "model.target_mode='default' without a regularizer or inverse_dynamics: nothing would train the encoder, "
                "because the prediction loss sends it no gradient. Choose another mode, or an auxiliary loss."
            )
        if not step_decay >= 0:
            raise ValueError(f"model.step_decay={step_decay}: must be >= 0; 0 weighs all steps of the horizon alike.")
        super().__init__(
            learning_rate=learning_rate,
            warmup_fraction=warmup_fraction,
            weight_decay=weight_decay,
            final_weight_decay=final_weight_decay,
            momentum=0.0 if target_mode == "none" else momentum,
            final_momentum=0.0 if target_mode == "none" else final_momentum,
            momentum_schedule=momentum_schedule,
            regularizer=regularizer,
            regularizer_weights=regularizer_weights,
        )
        self.save_hyperparameters()
        self.observation, self.image_size, self.channels, self.history = observation, image_size, channels, history
        self.latent_dim, self.horizon, self.target_mode = latent_dim, horizon, target_mode
        self.encoder_name = encoder or ("cnn" if observation == "pixels" else "mlp")
        self.encoder_widths = None if encoder_widths is None else tuple(encoder_widths)
        self.action_dim, self.trained_on = action_dim, {}
        self._predictor = (predictor_width, action_dim, action_width, predictor_dropout)
        self.set_networks(self.build_encoder(), self.build_predictor(), latent_dim)
        self.register_buffer("step_weights", step_weights(horizon, step_decay), persistent=False)
        self.probe = RidgeProbe(latent_dim, len(LABELS))
        self.inverse_dynamics = inverse_dynamics
        self.inverse_dynamics_model = mlp(2 * latent_dim, (predictor_width,), action_dim) if inverse_dynamics else None
        self.forecast_errors = ForecastErrors(action_dim > 0, latent_dim)

    def build_encoder(self) -> nn.Module:
        """A freshly initialized encoder: (N, window) -> (N, D)."""
        pixels = self.observation == "pixels"
        frame = (self.channels * self.history, self.image_size, self.image_size) if pixels else (4 * self.history,)
        return window_encoder(self.encoder_name, frame, self.encoder_widths, self.latent_dim)

    def build_predictor(self) -> nn.Module:
        """A freshly initialized predictor: (..., D), and (..., A) if action-conditioned -> (..., D)."""
        return ResidualPredictor(self.latent_dim, *self._predictor)

    def trained_networks(self) -> list[nn.Module]:
        return [*super().trained_networks(), *([] if self.inverse_dynamics_model is None else [self.inverse_dynamics_model])]

    def setup(self, stage: str) -> None:
        """Compare with the data module before anything runs.

        Raises:
            ValueError: Clips too short for the horizon or for a loss that compares windows, or observations or actions that
                the networks were not built for.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        self.check_data(data)
        clip_length, stride = getattr(data, "clip_length", None), getattr(data, "stride", 1)
        if clip_length is not None and self.history + self.horizon * stride > clip_length:
            raise ValueError(
                f"model.horizon={self.horizon} steps from a window of history={self.history} frames do not fit into "
                f"data.clip_length={clip_length} frames: lower the horizon to at most "
                f"{(clip_length - self.history) // stride} or lengthen data.sequence_length and data.clip_length."
            )
        needed = {"inverse_dynamics": 2} if self.inverse_dynamics else {}
        if self.regularizer is not None:
            needed[f"regularizer {self.regularizer.name!r}"] = self.regularizer.needed_times
        for name, times in needed.items():
            seen = times if clip_length is None else (clip_length - self.history) // stride + 1 - self._unseen
            if seen < times:
                raise ValueError(
                    f"model.{name} compares {times} windows, and of a clip of {clip_length} frames the context encoder sees "
                    f"{seen}: lengthen data.clip_length by {(times - seen) * stride}, lower model.horizon, or set the "
                    "weight of what compares them (curvature needs 3; sim, inverse_dynamics and barlow_twins 2) to 0."
                )

    @property
    def _unseen(self) -> int:
        """Windows at the end of a clip that the context encoder does not see."""
        return self.horizon if self.target_mode == "vjepa2" else 0

    def check_data(self, data: Any) -> None:
        """Raise a ValueError if a data module gives observations or actions that the networks were not built for."""
        check_batches(self, data, PendulumBatch)
        theirs = getattr(data, "action_dim", self.action_dim)
        if self.action_dim != theirs:
            raise ValueError(
                f"model.action_dim={self.action_dim}, but the data's actions have {theirs} scalars: set model.action_dim to "
                f"{theirs}, or data.torque_limits {'to the limits of two torques' if not theirs else 'to match'}."
            )
        names = ["observation", "history"] + (["image_size", "channels"] if self.observation == "pixels" else [])
        for name in names:
            mine, theirs = getattr(self, name), getattr(data, name, None)
            if theirs is not None and mine != theirs:
                raise ValueError(f"The model has {name}={mine} but data.{name}={theirs}: set both to the same value.")
        dynamics = getattr(data, "dynamics", {})
        for name, value in self.trained_on.items():
            theirs = dynamics.get(name, value)
            if theirs != value:
                raise ValueError(
                    f"The model was trained on data.{name}={value}, and now data.{name}={theirs}: set it to that."
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        data: Any = getattr(self._trainer, "datamodule", None)
        checkpoint["trained_on"] = getattr(data, "dynamics", self.trained_on)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.trained_on = checkpoint.get("trained_on", {})
        data: Any = getattr(self._trainer, "datamodule", None)
        if data is not None:  # Lightning calls `setup` before it reads the checkpoint
            self.check_data(data)

    def encode_windows(self, encoder: nn.Module, windows: Tensor) -> Tensor:
        """Apply an encoder at all times: (B, T, ...) -> (B, T, D)."""
        if windows.ndim == 5:  # windows overlap, and are copied once, in the order that convolutions want
            flat = windows.movedim(2, -1).flatten(0, 1).movedim(-1, 1)  # (B * T, history * C, S, S)
        else:
            flat = windows.flatten(0, 1)
        return encoder(flat).unflatten(0, windows.shape[:2])

    @torch.no_grad()
    def encode(self, observations: Tensor) -> Tensor:
        """Features of the target encoder, without gradient: windows (B, T, ...) -> (B, T, D)."""
        return self.encode_windows(self.target_encoder, observations)

    def forecast(self, features: Tensor, horizon: int, actions: Tensor | None = None) -> Tensor:
        """Embeddings rolled out 1 ... H steps: (..., D), and actions (..., H, A) if action-conditioned -> (..., H, D)."""
        return unroll(self.predictor, features, horizon, actions)

    def on_fit_start(self) -> None:
        rank_zero_info(f"target_mode {self.target_mode} {MODES[self.target_mode]}.")

    def target_pairs(self, batch: PendulumBatch) -> TargetPairs:
        windows, horizon = batch.observations, self.horizon
        if windows.shape[1] <= horizon:
            raise ValueError(
                f"model.horizon={horizon} needs clips of more than {horizon} windows; the batch has {windows.shape[1]}."
            )
        if (0 if batch.actions is None else batch.actions.shape[-1]) != self.action_dim:
            given = "none" if batch.actions is None else f"some of {batch.actions.shape[-1]} scalars"
            raise ValueError(
                f"model.action_dim={self.action_dim} needs actions of that many scalars; the batch has {given}."
            )
        seen = windows[:, : windows.shape[1] - self._unseen]
        context = self.encode_windows(self.context_encoder, seen)  # (B, S or T, D)
        target = context.detach() if self.target_mode == "none" else self.encode(windows)  # (B, T, D)
        starts = (target if self.target_mode == "default" else context)[:, : windows.shape[1] - horizon]  # (B, S, D)
        predictions = self.forecast(starts, horizon, next_actions(batch.actions, horizon))  # (B, S, H, D)
        return TargetPairs(predictions, later_features(target, horizon), context, target)

    def auxiliary_loss(self, batch: PendulumBatch, pairs: TargetPairs) -> Tensor:
        """The anti-collapse regularizer, and the loss of the inverse dynamics model."""
        loss = super().auxiliary_loss(batch, pairs)
        if self.inverse_dynamics_model is not None:
            assert batch.actions is not None
            around = torch.cat([pairs.features[:, :-1], pairs.features[:, 1:]], dim=-1)  # (B, S - 1, 2 D)
            error = functional.mse_loss(self.inverse_dynamics_model(around), batch.actions[:, : around.shape[1]])
            self.log("train/inverse_dynamics", error)
            loss = loss + self.inverse_dynamics * error
        return loss

    def prediction_loss(self, pairs: TargetPairs) -> Tensor:
        """Squared error, near steps first: see `step_decay`."""
        return squared_error(pairs.predictions, pairs.targets, self.step_weights)

    def predict_step(self, batch: PendulumBatch, batch_idx: int) -> Tensor:
        """Features of the target encoder: (B, T, D)."""
        return self.encode(batch.observations)

    def validation_step(self, batch: PendulumBatch, batch_idx: int) -> TargetPairs:
        pairs = super().validation_step(batch, batch_idx)
        # Evaluated from target embeddings to target embeddings, as every later use of the model goes.
        starts, actions = pairs.target_features[:, : -self.horizon], next_actions(batch.actions, self.horizon)
        self.forecast_errors.update(lambda z, a: self.forecast(z, self.horizon, a), starts, pairs.targets, actions)
        labels = state_labels(batch.states)
        for fit in (True, False):  # every other trajectory fits the probe, the rest evaluate it
            rows = slice(0 if fit else 1, None, 2)
            self.probe.update(pairs.target_features[rows].flatten(0, 1), labels[rows].flatten(0, 1), fit=fit)
        return pairs

    def on_validation_epoch_end(self) -> None:
        rankme = self.target_statistics.compute()["rankme"]
        super().on_validation_epoch_end()
        ratios = self.forecast_errors.compute()
        for name, ratio in ratios.items():
            self.log(f"val/{name}", ratio, prog_bar=name == "persistence_ratio")
        # The stronger of the two baselines: persistence predicts embeddings that hardly change, their mean predicts noise.
        ratio = torch.maximum(ratios["persistence_ratio"], ratios["normalized_error"])
        self.log("val/guarded_error", guarded_error(ratio, rankme, self.latent_dim))
        if not self.trainer.sanity_checking:
            scores = dict(zip(LABELS, self.probe.compute(), strict=True))
            self.log_dict({f"val/linear_r2_{name}": score for name, score in scores.items()})
        self.probe.reset()
