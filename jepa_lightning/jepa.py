"""What every joint-embedding predictive architecture here shares: networks, loss, optimizer, callbacks and monitoring.

Shapes: B batch, T times, N samples, D embedding dimension.
"""

import copy
from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from callbacks.collapse import CollapseAlarm
from callbacks.ema import EMAUpdate
from callbacks.schedules import MomentumSchedule, total_optimizer_steps
from callbacks.weight_decay import WeightDecaySchedule
from jepa_lightning.finite import FiniteGuard, check_weights
from jepa_lightning.losses import squared_error
from jepa_lightning.metrics import FeatureStatistics
from jepa_lightning.optim import fused_is_safe, gradient_norm, parameter_groups, warmup_cosine_schedule
from jepa_lightning.regularizers import Regularizer, RegularizerName
from jepa_lightning.sharding import check_strategy
from jepa_lightning.signature import sign


class TargetPairs(NamedTuple):
    """Predictions and targets of one batch."""

    predictions: Tensor
    """(..., D), with gradient."""

    targets: Tensor
    """(..., D), from the target encoder, without gradient."""

    features: Tensor
    """(B, S, D) output of the context encoder, with gradient, for the regularizer."""

    target_features: Tensor
    """(B, T, D) output of the target encoder."""


class JEPA(LightningModule, ABC):
    """Predict, in embedding space, what the context does not show.

    A subclass builds its networks, hands them to `set_networks` and implements `target_pairs`. The rest is here: the
    target encoder is an exponential moving average (EMA) of the context encoder without gradient (stop-gradient), which
    `callbacks.EMAUpdate` moves once per optimizer step; AdamW with a warm-up and a cosine; optional cosine weight decay;
    statistics of the embeddings at validation and a collapse alarm that reads them.

    Args:
        learning_rate: Peak learning rate, reached at the end of the warm-up.
        warmup_fraction: Fraction of all optimizer steps over which the learning rate rises, in [0, 1).
        weight_decay: Weight decay of kernels and matrices; biases and norms have none.
        final_weight_decay: Weight decay at the last step, reached along a cosine; `weight_decay` if None.
        momentum: EMA momentum of the first target update, in [0, 1].
        final_momentum: EMA momentum approached at the last step, in [momentum, 1].
        momentum_schedule: Shape of the schedule from `momentum` to `final_momentum`: "cosine", "linear", "constant", or
            "loss", which follows the prediction loss.
        regularizer: Anti-collapse regularizer, see `jepa_lightning.regularizers`; with None, the EMA and the stop-gradient
            alone prevent collapse, as in I-JEPA.
        regularizer_weights: Weight of each term of the regularizer, see `jepa_lightning.regularizers`.
        start_learning_rate: Learning rate at the start of the warm-up; a hundredth of the peak by default.
        final_learning_rate: Learning rate at the end of the cosine decay.
        schedule_offset: 1 where learning rate and weight decay count optimizer steps from 1, as the released I-JEPA does.

    Raises:
        ValueError: A value out of its range, named together with what is allowed.
    """

    context_encoder: nn.Module
    target_encoder: nn.Module
    predictor: nn.Module

    built_with: dict[str, Any]
    """Arguments of a model that comes from a checkpoint."""

    step_loss: Tensor
    """Prediction loss of the last training batch, a scalar."""

    _planned_steps: int | None = None  # optimizer steps over which the schedules are laid

    def __init__(
        self,
        *,
        learning_rate: float = 1e-3,
        warmup_fraction: float = 0.05,
        weight_decay: float = 0.04,
        final_weight_decay: float | None = None,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        momentum_schedule: MomentumSchedule = "cosine",
        regularizer: RegularizerName | None = None,
        regularizer_weights: dict[str, float] | None = None,
        start_learning_rate: float | None = None,
        final_learning_rate: float = 0.0,
        schedule_offset: int = 0,
    ) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise ValueError(f"model.learning_rate={learning_rate}: must be positive.")
        start = 0.01 * learning_rate if start_learning_rate is None else start_learning_rate
        for name, value in (("start_learning_rate", start), ("final_learning_rate", final_learning_rate)):
            if not 0 <= value <= learning_rate:
                raise ValueError(f"model.{name}={value}: choose a value from 0 to learning_rate={learning_rate}.")
        if not 0 <= warmup_fraction < 1:
            raise ValueError(f"model.warmup_fraction={warmup_fraction}: choose a fraction of the training in [0, 1).")
        self.learning_rate, self.warmup_fraction = learning_rate, warmup_fraction
        self._schedule = {"start": start / learning_rate, "end": final_learning_rate / learning_rate}
        self._schedule_offset = schedule_offset
        self.weight_decay = weight_decay
        self.final_weight_decay = weight_decay if final_weight_decay is None else final_weight_decay
        self._finite = FiniteGuard()
        self._ema = EMAUpdate(momentum, final_momentum, momentum_schedule)
        self._weight_decay_schedule = WeightDecaySchedule(self.weight_decay, self.final_weight_decay, schedule_offset)
        if regularizer is None and regularizer_weights:
            raise ValueError(f"model.regularizer_weights={regularizer_weights} without a model.regularizer to weigh.")
        self._regularizer_arguments = (regularizer, regularizer_weights)

    def set_networks(self, context_encoder: nn.Module, predictor: nn.Module, dim: int) -> None:
        """Take the networks and make the target encoder, a frozen copy of the context encoder as initialized.

        Args:
            context_encoder: Encoder that returns embeddings of dimension D.
            predictor: Network that maps embeddings to embeddings.
            dim: Embedding dimension D.
        """
        self.context_encoder = context_encoder
        self.predictor = predictor
        self.embedding_dim = dim
        self.target_encoder = copy.deepcopy(context_encoder).requires_grad_(False).eval()
        name, weights = self._regularizer_arguments
        self.regularizer = None if name is None else Regularizer(name, dim, weights)
        self.target_statistics = FeatureStatistics(dim)
        self.context_statistics = FeatureStatistics(dim)

    @property
    def best_metric(self) -> tuple[str, Literal["min", "max"]]:
        """The metric of a validation that `callbacks.BestCheckpoint` goes by, and whether lower or higher is better.

        Not the loss, which a collapse makes small. See `jepa_lightning.metrics.guarded_error`.
        """
        return "val/guarded_error", "min"

    def trained_networks(self) -> list[nn.Module]:
        """Networks whose parameters the optimizer updates."""
        return [self.context_encoder, self.predictor]

    @abstractmethod
    def target_pairs(self, batch: Any) -> TargetPairs:
        """Predictions and their targets, for one batch."""

    @abstractmethod
    def encode(self, observations: Tensor) -> Tensor:
        """Embeddings of the target encoder, without gradient: what probes and users take."""

    def prediction_loss(self, pairs: TargetPairs) -> Tensor:
        """Distance of the predictions from the targets: a scalar, the mean squared error unless a subclass overrides it."""
        return squared_error(pairs.predictions, pairs.targets)

    def train(self, mode: bool = True) -> "JEPA":
        """Switch to training mode, all but the target encoder: no dropout in the targets."""
        super().train(mode)
        self.target_encoder.eval()
        return self

    def as_batch(self, batch: Any, batch_idx: int) -> Any:
        """A batch as `target_pairs` takes it; a subclass may take what other data sets hand out, too."""
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self.as_batch(batch, batch_idx)
        pairs = self.target_pairs(batch)
        prediction = self.prediction_loss(pairs)
        self.step_loss = prediction.detach()
        loss = prediction + self.auxiliary_loss(batch, pairs)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/prediction_loss", prediction)
        return loss

    def auxiliary_loss(self, batch: Any, pairs: TargetPairs) -> Tensor:
        """What is added to the prediction loss, a scalar: the anti-collapse regularizer, and what a subclass adds."""
        if self.regularizer is None:
            return pairs.predictions.new_zeros(())
        penalty, terms = self.regularizer(self.gather(pairs.features), self.trainer.global_step)
        self.log_dict({f"train/regularizer_{name}": term for name, term in terms.items()})
        return penalty

    def gather(self, features: Tensor) -> Tensor:
        """Features of all processes, in rank order, with gradient: (B, T, D) -> (B * processes, T, D).

        Each process then holds the statistics of the global batch. The backward pass adds up the gradients of all
        processes' losses, DDP averages over the processes, and what remains is the gradient of a single process.
        """
        if self.trainer.world_size == 1:
            return features
        gathered = self.all_gather(features, sync_grads=True)  # (processes, B, T, D)
        return gathered.flatten(0, 1)

    def validation_step(self, batch: Any, batch_idx: int) -> TargetPairs:
        batch = self.as_batch(batch, batch_idx)
        pairs = self.target_pairs(batch)
        size = len(pairs.predictions)  # Lightning's guess is misled by numbers that are not per sample
        self.log("val/loss", self.prediction_loss(pairs), sync_dist=True, prog_bar=True, batch_size=size)
        self.target_statistics.update(pairs.target_features)
        self.context_statistics.update(pairs.features)
        return pairs

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{name}": value for name, value in self.target_statistics.compute().items()})
        self.log_dict({f"val/context_{name}": value for name, value in self.context_statistics.compute().items()})
        self.target_statistics.reset()
        self.context_statistics.reset()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        every = self.trainer.log_every_n_steps  # when Lightning writes its logs; 0 if it writes none
        logging = every > 0 and (self.trainer.global_step + 1) % every == 0
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # else that leaves out what is not finite
            norm = gradient_norm(p for group in optimizer.param_groups for p in group["params"])
            self._finite.check(norm, optimizer, self.trainer.global_step)
            if logging:
                self._finite.raise_if_found()
        if logging:
            for name, module in (("encoder", self.context_encoder), ("predictor", self.predictor)):
                self.log(f"train/gradient_norm_{name}", gradient_norm(module.parameters()))

    def configure_model(self) -> None:
        """Shard the networks if the strategy asks for it, before anything is wrapped.

        Raises:
            ValueError: A strategy under which the target encoder could not follow, or networks that are not to be sharded.
        """
        if self._trainer is None:  # read from a file, to be used on its own
            return
        strategy = self.trainer.strategy
        check_strategy(strategy)
        if isinstance(strategy, ModelParallelStrategy):
            self.shard_networks(strategy.device_mesh["data_parallel"], strategy.root_device)

    def shard_networks(self, mesh: DeviceMesh, device: torch.device) -> None:
        """Shard the networks over the processes of a mesh, context and target encoder alike."""
        raise ValueError(
            f"trainer.strategy=fsdp2: a {type(self).__name__} is small enough for every device and is not "
            "sharded; choose ddp."
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = parameter_groups(self.trained_networks(), self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, fused=fused_is_safe(self.trainer))
        total = total_optimizer_steps(self.trainer)
        schedule = warmup_cosine_schedule(
            optimizer, total, self.warmup_fraction, **self._schedule, offset=self._schedule_offset
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._finite.raise_if_found()
        check_weights(self.parameters(), checkpoint["global_step"])
        sign(self, checkpoint)
        checkpoint["planned_steps"] = self._planned_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._planned_steps = checkpoint.get("planned_steps")

    def on_train_start(self) -> None:
        """Check that the processes are at one step; warn if a run has another length than it was begun with.

        Raises:
            ValueError: The processes have gone on from different checkpoints.
        """
        steps = self.all_gather(torch.tensor(self.trainer.global_step, device=self.device)).view(-1).tolist()
        if len(set(steps)) > 1:
            raise ValueError(
                f"The processes go on at different optimizer steps, {steps}: each found a checkpoint of its own. Put "
                "trainer.default_root_dir on a file system that all nodes share."
            )
        before, now = self._planned_steps, total_optimizer_steps(self.trainer)
        if before is not None and before != now and self.trainer.global_step > 0:
            rank_zero_warn(
                f"This run was to take {before} optimizer steps, and now {now}: learning rate, weight decay, momentum and "
                f"all else that is scheduled leave their old curves at step {self.trainer.global_step} and go on where the "
                "new ones are."
            )
        self._planned_steps = now

    def configure_callbacks(self) -> list[Callback]:
        """EMA and schedules, which no run may lack, and the alarm unless the Trainer has its own."""
        callbacks: list[Callback] = [self._ema, self._weight_decay_schedule]
        if not any(isinstance(callback, CollapseAlarm) for callback in self.trainer.callbacks):
            callbacks.append(CollapseAlarm())
        return callbacks
