"""An alarm for representations that lose their content while the loss looks well."""

import warnings
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class CollapseWarning(UserWarning):
    """The features are collapsing."""


class CollapseAlarm(Callback):
    """Read the feature statistics of each validation and say in words when they show a collapse.

    A JEPA can make its loss small by mapping every input to the same feature. None of these signs is proof of a good
    representation (only a probe is), but each is proof of a bad one.

    Args:
        min_feature_std: Least mean standard deviation of a feature over the validation set.
        min_rankme: Least RankMe, the effective number of dimensions in use.
        max_top_share: Greatest share of the total variance in a single direction.
        max_persistence_ratio: Greatest prediction error relative to that of predicting no change at all, at the
            farthest predicted step. Near 1 the predictor has learned only to copy.
        grace_steps: Optimizer steps before the first judgement: a fresh encoder has small features.
        action: "warn" goes on, "stop" ends training after the validation at which the alarm fired.

    Raises:
        ValueError: A negative `grace_steps`.
    """

    def __init__(
        self,
        min_feature_std: float = 0.1,
        min_rankme: float = 3.0,
        max_top_share: float = 0.9,
        max_persistence_ratio: float = 0.9,
        grace_steps: int = 200,
        action: Literal["warn", "stop"] = "warn",
    ) -> None:
        if grace_steps < 0:
            raise ValueError(f"grace_steps={grace_steps}: give a number of optimizer steps >= 0.")
        self.min_feature_std, self.min_rankme = min_feature_std, min_rankme
        self.max_top_share, self.max_persistence_ratio = max_top_share, max_persistence_ratio
        self.grace_steps, self.action = grace_steps, action
        self.alarms: list[str] = []

    def signs(self, metrics: dict[str, float]) -> list[str]:
        """What is wrong with these validation metrics, a sentence each; empty for a healthy representation."""
        # A comparison with NaN is False: write each so that NaN counts as a sign.
        checks = (
            (
                "val/feature_std",
                lambda value: value >= self.min_feature_std,
                f"the mean standard deviation of a feature is {{:.3g}} (healthy: above {self.min_feature_std}): all inputs "
                "look alike to the encoder",
            ),
            (
                "val/rankme",
                lambda value: value >= self.min_rankme,
                f"RankMe is {{:.2f}} (healthy: above {self.min_rankme}): the features vary in hardly any direction",
            ),
            (
                "val/top_share",
                lambda value: value <= self.max_top_share,
                f"{{:.0%}} of the variance lies in one direction (healthy: below {self.max_top_share:.0%})",
            ),
            (
                "val/persistence_ratio",
                lambda value: value <= self.max_persistence_ratio,
                f"the prediction error is {{:.2f}} times that of predicting no change (healthy: below "
                f"{self.max_persistence_ratio}): the predictor only copies",
            ),
        )
        return [
            sentence.format(metrics[name])
            for name, healthy, sentence in checks
            if name in metrics and not healthy(metrics[name])
        ]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not fitting or trainer.global_step < self.grace_steps:
            return
        signs = self.signs({name: float(value) for name, value in trainer.callback_metrics.items()})
        if not signs:
            return
        message = f"Collapse alarm at optimizer step {trainer.global_step}: " + "; ".join(signs) + "."
        self.alarms.append(message)
        if trainer.is_global_zero:
            warnings.warn(
                message + " Raise the weight of the regularizer (its std term first), or lower the learning rate. See "
                "'Troubleshooting' in the README.",
                CollapseWarning,
                stacklevel=2,
            )
        if self.action == "stop":
            trainer.should_stop = True
