"""A JEPA of what moves: predict the embeddings of later windows from that of one, conditioned on the actions.

Shapes: B batch, T windows in time, S starts, H horizon, D embedding dimension, A scalars of an action, V scalars of a
vector.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional

from callbacks.schedules import MomentumSchedule
from datamodules.batches import ClipBatch
from jepa_lightning.dynamics_checks import (
    MODES,
    Observation,
    TargetMode,
    as_pair,
    check_arguments,
    check_batch,
)
from jepa_lightning.embedding_figures import show_components
from jepa_lightning.jepa import TargetPairs
from jepa_lightning.latent_dynamics import LatentDynamics
from jepa_lightning.losses import squared_error, step_weights
from jepa_lightning.metrics import RidgeR2, guarded_error
from jepa_lightning.networks.encoders import EncoderName, observation_encoder
from jepa_lightning.networks.mlp import mlp
from jepa_lightning.networks.predictor import PredictorName, PrefixPredictor, ResidualPredictor
from jepa_lightning.regularizers import RegularizerName
from jepa_lightning.rollouts import ForecastErrors, later_features, next_actions


class DynamicsJEPA(LatentDynamics):
    """Encode a few frames, predict the embeddings of later ones by rolling out a residual predictor in latent space.

    Every window of a clip that has `horizon` successors is a start, so one clip trains several roll-outs. The predictor is
    conditioned on the action of each step, if there are actions: a world model, which can be planned with.

    >>> model = DynamicsJEPA(image_size=32, latent_dim=16, action_dim=2)
    >>> images, goals = torch.zeros(3, 3, 32, 32), torch.zeros(3, 3, 32, 32)
    >>> model.rollout(images, steps=4, actions=torch.zeros(3, 4, 2)).shape
    torch.Size([3, 4, 16])
    >>> model.plan(images, goals, horizon=4).shape
    torch.Size([3, 4, 2])

    What the data says (`observation`, `image_size`, `channels`, `history`, `vector_dim`, `action_dim`, `num_choices`) need
    not be repeated: the command line fills in what is not given, and so does `DynamicsJEPA.for_data`.

    Args:
        observation: Kind of observations: "pixels"; "vectors" of scalars; or "both", images and what is known of the body
            that acts (proprioception).
        image_size: Height and width of the images in pixels, one number if they are equal; as in the data.
        channels: Number of channels, 1 for gray, 3 for RGB; as in the data.
        history: Number of frames per window; as in the data.
        vector_dim: Number of scalars of a frame's vector, V; as in the data. Not used for pixels alone.
        latent_dim: Embedding dimension D.
        encoder: Encoder of the images, "cnn", "mlp" or "vit", see `jepa_lightning.networks.encoders`; by default "cnn" for
            pixels and "mlp" for vectors.
        encoder_widths: Channels of the convolutions, widths of the hidden layers, or the width of each block of a "vit"; by
            default 16, 32 and 64 channels, two layers of 512, or four blocks of 96.
        predictor: "residual", a step from the one before, by two hidden layers; or "prefix", all steps of the horizon from
            the first embedding and the actions since, by a causal transformer of two blocks.
        predictor_width: Width of the predictor's hidden layers; of the tokens of a "prefix" predictor, for which 128 gives
            about as many parameters (0.4 million) as 512 gives a "residual" one, and 512 gives 6 million.
        predictor_dropout: Dropout probability after each hidden layer of the predictor, or in its blocks, in [0, 1). With
            dropout a resumed run is not the uncut one bit for bit.
        action_dim: Number of scalars of an action, A; 0 for what moves on its own. As in the data.
        num_choices: Number of choices of a discrete action, each a one-hot vector among the A scalars; 0 if actions are
            continuous. As in the data.
        action_width: Width of the linear embedding of an action; a "prefix" predictor takes `predictor_width`.
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
        momentum_schedule: Shape of the schedule from `momentum` to `final_momentum`: "cosine", "linear", "constant", or
            "loss", which follows the prediction loss.
        regularizer: Anti-collapse regularizer, see `jepa_lightning.regularizers.Regularizer`; None for nothing.
        regularizer_weights: Weight of each term of the regularizer; terms left out keep their default.

    Raises:
        ValueError: A value out of its range, named together with what is allowed.
    """

    angular_state = False
    """Whether the first scalar of a state is an angle in radians, for the figure of the embeddings."""

    step_weights: Tensor

    def __init__(
        self,
        observation: Observation = "pixels",
        image_size: int | tuple[int, int] = 64,
        channels: int = 3,
        history: int = 1,
        vector_dim: int = 0,
        latent_dim: int = 64,
        encoder: EncoderName | None = None,
        encoder_widths: tuple[int, ...] | None = None,
        predictor: PredictorName = "residual",
        predictor_width: int = 512,
        predictor_dropout: float = 0.0,
        action_dim: int = 0,
        num_choices: int = 0,
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
        momentum_schedule: MomentumSchedule = "cosine",
        regularizer: RegularizerName | None = "vicreg",
        regularizer_weights: dict[str, float] | None = None,
    ) -> None:
        check_arguments(locals())
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
        self.observation, self.channels, self.history = observation, channels, history
        self.image_size = image_size if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.vector_dim, self.num_choices = vector_dim, num_choices
        self.latent_dim, self.horizon, self.target_mode = latent_dim, horizon, target_mode
        self._encoder = (encoder, None if encoder_widths is None else tuple(encoder_widths))
        self.action_dim, self.trained_on = action_dim, {}
        self._predictor = (predictor_width, action_dim, action_width, predictor_dropout)
        self._predictor_name: PredictorName = predictor
        self.set_networks(self.build_encoder(), self.build_predictor(), latent_dim)
        self.register_buffer("step_weights", step_weights(horizon, step_decay), persistent=False)
        self.probe: RidgeR2 | None = None  # made when states are seen: their number is the data's
        self.inverse_dynamics = inverse_dynamics
        self.inverse_dynamics_model = mlp(2 * latent_dim, (predictor_width,), action_dim) if inverse_dynamics else None
        self.forecast_errors = ForecastErrors(action_dim > 0, latent_dim)

    def build_encoder(self) -> nn.Module:
        """A freshly initialized encoder: (N, window) and, where both are observed, (N, vectors) -> (N, D)."""
        image = (self.channels * self.history, *as_pair(self.image_size)) if self.sees_pixels else None
        vectors = None if self.observation == "pixels" else self.vector_dim * self.history
        return observation_encoder(*self._encoder, image, vectors, self.latent_dim)

    def build_predictor(self) -> nn.Module:
        """A freshly initialized predictor: (..., D), and (..., A) if action-conditioned -> (..., D)."""
        width, action_dim, action_width, dropout = self._predictor
        if self._predictor_name == "prefix":
            return PrefixPredictor(self.latent_dim, width, action_dim, self.horizon, dropout=dropout)
        return ResidualPredictor(self.latent_dim, width, action_dim, action_width, dropout)

    def trained_networks(self) -> list[nn.Module]:
        return [*super().trained_networks(), *([] if self.inverse_dynamics_model is None else [self.inverse_dynamics_model])]

    @property
    def unseen_windows(self) -> int:
        """Windows at the end of a clip that the context encoder does not see."""
        return self.horizon if self.target_mode == "vjepa2" else 0

    def labels(self, states: Tensor) -> Tensor:
        """What the linear probe of the validation regresses, from states (B, T, L): (B, T, L)."""
        return states

    def label_names(self, count: int) -> Sequence[str]:
        """Names of the labels: those of the data, or their numbers."""
        names = getattr(getattr(self.trainer, "datamodule", None), "state_names", ())
        return names if len(names) == count else [str(number) for number in range(count)]

    def on_fit_start(self) -> None:
        rank_zero_info(f"target_mode {self.target_mode} {MODES[self.target_mode]}.")

    def target_pairs(self, batch: ClipBatch) -> TargetPairs:
        windows, horizon = batch.observations, self.horizon
        check_batch(self, batch)
        seen = slice(windows.shape[1] - self.unseen_windows)
        vectors = None if batch.vectors is None else batch.vectors[:, seen]
        context = self.encode_windows(self.context_encoder, windows[:, seen], vectors)  # (B, S or T, D)
        target = context.detach() if self.target_mode == "none" else self.encode_batch(batch)  # (B, T, D)
        starts = (target if self.target_mode == "default" else context)[:, : windows.shape[1] - horizon]  # (B, S, D)
        predictions = self.forecast(starts, horizon, next_actions(batch.actions, horizon))  # (B, S, H, D)
        return TargetPairs(predictions, later_features(target, horizon), context, target)

    def auxiliary_loss(self, batch: ClipBatch, pairs: TargetPairs) -> Tensor:
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

    def validation_step(self, batch: Any, batch_idx: int) -> TargetPairs:
        batch = self.as_batch(batch, batch_idx)
        pairs = super().validation_step(batch, batch_idx)
        # Evaluated from target embeddings to target embeddings, as every later use of the model goes.
        starts, actions = pairs.target_features[:, : -self.horizon], next_actions(batch.actions, self.horizon)
        self.forecast_errors.update(lambda z, a: self.forecast(z, self.horizon, a), starts, pairs.targets, actions)
        if batch.states is None:
            return pairs
        if batch_idx == 0:
            show_components(self.trainer, pairs.target_features, batch.states[..., 0], self.angular_state)
        labels = self.labels(batch.states)
        if self.probe is None:
            self.probe = RidgeR2(self.latent_dim, labels.shape[-1]).to(self.device)
        for fit in (True, False):  # every other trajectory fits the probe, the rest evaluate it
            rows: Any = slice(0 if fit else 1, None, 2)
            if batch.episodes is not None:  # clips of one trajectory stay together: they have too much in common
                rows = batch.episodes % 2 == (0 if fit else 1)
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
        if self.probe is None:
            return
        if self.probe.update_called and not self.trainer.sanity_checking:
            scores = self.probe.compute()
            names = self.label_names(len(scores))
            self.log_dict({f"val/linear_r2_{name}": score for name, score in zip(names, scores, strict=True)})
        self.probe.reset()
