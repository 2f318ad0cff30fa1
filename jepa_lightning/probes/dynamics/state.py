"""Evaluation of the pendulum's JEPA: regress the state from frozen embeddings, and evaluate forecasts by it.

Shapes: B batch, N trajectories, T windows, H horizon, D embedding dimension, L labels.
"""

from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from datamodules.batches import ClipBatch
from datamodules.physics import LABELS, state_labels
from jepa_lightning.metrics import r2_score
from jepa_lightning.probes.dynamics.base import PendulumProbe
from jepa_lightning.probes.dynamics.decoder import load_decoder
from jepa_lightning.probes.dynamics.evaluation import evaluate
from jepa_lightning.probes.dynamics.world_model_probe import check_same
from jepa_lightning.probes.ridge import LinearReadout, MLPReadout, fit_predictor
from jepa_lightning.rollouts import unroll


class StateProbe(PendulumProbe):
    """Ridge and MLP probes of sine and cosine of both angles, and of both angular velocities, on frozen embeddings.

    `fit` makes one pass over the training trajectories (so set `trainer.max_epochs: 1`) to collect embeddings, then
    solves the ridge regressions, trains the MLPs and, for the baselines, a predictor like the JEPA's own. `test` evaluates
    all of it on held-out trajectories, also the same probes, not refitted, on predicted embeddings, and writes
    report.json, report.md and, with a decoder, forecast.mp4.

    Args:
        checkpoint: Path of the checkpoint of a pendulum JEPA, written by `fit`.
        decoder: Path of the checkpoint of a `DecoderProbe` on the same JEPA, for the report's images; none by default.
        encoder: Which encoder's embeddings are read, "target" or "context".
        hidden_dim: Width of the MLP's two hidden layers.
        num_steps: Number of optimizer steps of each MLP.
        control_steps: Number of optimizer steps of the predictor of each baseline.
        learning_rate: Peak learning rate of the MLPs; that of the baselines' predictors is a third of it.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no pendulum JEPA, or an argument is out of its range.
    """

    def __init__(
        self,
        checkpoint: str,
        decoder: str | None = None,
        encoder: Literal["target", "context"] = "target",
        hidden_dim: int = 128,
        num_steps: int = 1500,
        control_steps: int = 600,
        learning_rate: float = 3e-3,
    ) -> None:
        super().__init__(checkpoint, encoder)
        self.save_hyperparameters()
        if self.jepa.action_dim:
            raise ValueError(
                f"{checkpoint} holds a model of an actuated pendulum, and StateProbe evaluates forecasts of a free one. Its "
                "linear probes stand in the validation, and PlanningProbe (configs/probes/planning.yaml) evaluates "
                "what it predicts."
            )
        for name, value in (("hidden_dim", hidden_dim), ("num_steps", num_steps), ("control_steps", control_steps)):
            if value < 1:
                raise ValueError(f"model.{name}={value}: give an integer of at least 1.")
        self.automatic_optimization = False  # one pass to collect embeddings, then closed forms and short loops
        self.checkpoint, self.num_steps, self.control_steps = checkpoint, num_steps, control_steps
        self.learning_rate = learning_rate
        self.decoder = None if decoder is None else load_decoder(decoder).requires_grad_(False)
        if decoder is not None:
            self._check_decoder(decoder)
        dim = self.jepa.latent_dim
        self.linear = nn.ModuleDict({name: LinearReadout(dim, len(LABELS)) for name in self.encoders})
        self.mlp = nn.ModuleDict({name: MLPReadout(dim, len(LABELS), hidden_dim) for name in self.encoders})
        baselines = [name for name in self.encoders if name != "jepa"]
        self.predictors = nn.ModuleDict({name: self.jepa.build_predictor() for name in baselines})
        self._collected: dict[str, list[Tensor]] = {}

    def _check_decoder(self, path: str) -> None:
        """Raise a ValueError if the decoder reads the embeddings of another network than this probe."""
        assert self.decoder is not None
        message = f"model.decoder={path} decodes another encoder than that of {self.checkpoint}: fit it anew."
        check_same(self.encoders["jepa"], self.decoder.encoders["jepa"], message)

    def on_fit_start(self) -> None:
        if self.decoder is None:
            super().on_fit_start()
            return
        for name in ("random_encoder", "pca"):  # the very baselines that the decoders were trained on
            self.encoders[name].load_state_dict(self.decoder.encoders[name].state_dict())

    def setup(self, stage: str) -> None:
        """Compare with the data module.

        Raises:
            ValueError: As for every probe, and windows that are several frames apart.
        """
        super().setup(stage)
        stride = getattr(getattr(self.trainer, "datamodule", None), "stride", 1)
        if stride != 1:
            raise ValueError(f"data.stride={stride}: the report counts in frames, so StateProbe needs a stride of 1.")

    def configure_optimizers(self) -> None:
        return None

    def forecast(self, features: Tensor, horizon: int, name: str = "jepa") -> Tensor:
        """Predicted embeddings of one encoder 1 ... H frames later: (..., D) -> (..., H, D)."""
        return unroll(self.jepa.predictor if name == "jepa" else self.predictors[name], features, horizon)

    def training_step(self, batch: ClipBatch, batch_idx: int) -> None:
        self._collect("train", batch)

    def validation_step(self, batch: ClipBatch, batch_idx: int) -> None:
        self._collect("val", batch)

    def test_step(self, batch: ClipBatch, batch_idx: int) -> None:
        self._collect("test", batch)

    def _collect(self, split: str, batch: ClipBatch) -> None:
        assert batch.states is not None
        for name, value in (self.features(batch) | {"states": batch.states}).items():
            self._collected.setdefault(f"{split}/{name}", []).append(value)

    def _take(self, split: str) -> dict[str, Tensor]:
        """Everything collected from a split, and forget it: name -> (N, T, ...)."""
        names = [key for key in self._collected if key.startswith(f"{split}/")]
        return {key.removeprefix(f"{split}/"): torch.cat(self._collected.pop(key)) for key in names}

    def on_train_start(self) -> None:
        if self.trainer.world_size > 1:
            raise ValueError("StateProbe fits in closed form in one process: set --trainer.devices 1.")
        self._take("train"), self._take("val")  # the sanity check's

    def on_train_epoch_end(self) -> None:
        train, val = self._take("train"), self._take("val")
        if not val:
            raise ValueError("StateProbe chooses its ridge penalty on validation data: set trainer.limit_val_batches > 0.")
        labels, val_labels = (state_labels(split["states"]).flatten(0, 1) for split in (train, val))
        for name in self.encoders:
            features, val_features = train[name].flatten(0, 1), val[name].flatten(0, 1)
            rank_zero_info(f"Fitting the probes of {name} on {len(features)} windows")
            ridge = self.linear[name].fit(features, labels, val_features, val_labels)
            self.mlp[name].fit(features, labels, self.num_steps, self.learning_rate)
            for kind, regressor in (("linear", self.linear[name]), ("mlp", self.mlp[name])):
                with torch.no_grad():
                    scores = r2_score(regressor(val_features), val_labels)
                self.log_dict({f"val/{kind}_r2_{name}_{k}": s for k, s in zip(LABELS, scores, strict=True)})
            self.log(f"val/ridge_{name}", ridge)
            if name in self.predictors:
                horizon = min(self.jepa.horizon, train[name].shape[1] - 1)
                fit_predictor(
                    self.predictors[name], unroll, train[name], horizon, self.control_steps, self.learning_rate / 3
                )

    def on_test_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            raise ValueError("The report is made in one process: set --trainer.devices 1.")
        evaluate(self, self._take("test"))
