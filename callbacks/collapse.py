"""An alarm for representations that lose their content while the loss looks well."""

import math
import warnings
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

COPIES_UP_TO = 1.1
"""Up to this persistence ratio a predictor that should do better copies; beyond it, it does worse than that."""

SCALE_TERMS = ("variance", "sigreg")
"""Terms of regularizers that keep embeddings from shrinking."""

SPREAD_TERMS = ("covariance", "redundancy", "sigreg")
"""Terms of regularizers that keep embeddings from varying together."""

SLOWNESS_TERMS = ("curvature", "temporal_similarity")
"""Terms of regularizers that slow embeddings down in time."""

CALMER = "lower model.learning_rate or set trainer.gradient_clip_val"

NO_REGULARIZER = {
    "vjepa2": ("only the slowness of the target encoder", ", or raise model.momentum"),
    "default": ("only inverse_dynamics", ""),
    "none": ("in model.target_mode=none nothing", ", or model.target_mode to vjepa2"),
}
"""By target mode: what keeps embeddings apart without a regularizer, and what else could. JEPAs of images have the first."""


class CollapseWarning(UserWarning):
    """The embeddings are collapsing."""


class CollapseAlarm(Callback):
    """Read the statistics of the embeddings at each validation and say in words when they show a collapse.

    A JEPA can make its loss small by mapping every input to the same embedding. None of these signs is proof of a good
    representation (only a probe is), but each is proof of a bad one.

    Args:
        min_feature_std: Minimum of the mean standard deviation of an embedding dimension over the validation set.
        min_rankme: Minimum RankMe, the effective number of dimensions in use.
        max_largest_eigenvalue_share: Maximum share of the total variance in a single direction.
        max_persistence_ratio: Maximum prediction error relative to that of predicting no change at all, at the
            farthest predicted step. Near 1 the predictor has learned only to copy; far above it, nothing yet.
        grace_steps: Number of optimizer steps before the first check: a fresh encoder has small embeddings.
        action: What an alarm does: "warn" goes on, "stop" ends training after the validation at which it fired.

    Raises:
        ValueError: A negative `grace_steps`.
    """

    def __init__(
        self,
        min_feature_std: float = 0.1,
        min_rankme: float = 3.0,
        max_largest_eigenvalue_share: float = 0.9,
        max_persistence_ratio: float = 0.9,
        grace_steps: int = 200,
        action: Literal["warn", "stop"] = "warn",
    ) -> None:
        if grace_steps < 0:
            raise ValueError(f"grace_steps={grace_steps}: give a number of optimizer steps >= 0.")
        self.min_feature_std, self.min_rankme = min_feature_std, min_rankme
        self.max_largest_eigenvalue_share, self.max_persistence_ratio = max_largest_eigenvalue_share, max_persistence_ratio
        self.grace_steps, self.action = grace_steps, action
        self.alarms: list[str] = []

    def signs(self, metrics: dict[str, float]) -> list[str]:
        """What is wrong with these validation metrics, a sentence each; empty for a healthy representation."""
        return list(self._signs(without_prefix(metrics)).values())

    def advice(self, metrics: dict[str, float], module: Any) -> list[str]:
        """What to try against these signs with this model, a sentence each.

        Args:
            metrics: Validation metrics by name.
            module: The model, with its `regularizer` (a `name`, and `weights` by term) or None for none, and what else it
                has of `target_mode` and `learning_rate`.
        """
        known = without_prefix(metrics)
        signs = self._signs(known)
        if any(math.isnan(known[name]) for name in signs.keys() - {"persistence_ratio"}):
            return [f"embeddings that are not finite: {CALMER}, or train in a wider precision"]
        found = []
        if "feature_std" in signs:
            found += self._against("embeddings from shrinking", SCALE_TERMS, module)
            if "rankme" in known and not {"rankme", "largest_eigenvalue_share"} & signs.keys():
                found.append(
                    f"they still vary in many directions (RankMe {known['rankme']:.1f}), so they are small rather than "
                    "alike: a probe that standardizes embeddings may find them sound"
                )
        if {"rankme", "largest_eigenvalue_share"} & signs.keys():
            found += self._against("embeddings from varying together", SPREAD_TERMS, module)
        if "persistence_ratio" in signs:
            found.append(self._against_bad_forecasts(known["persistence_ratio"], module))
        return list(dict.fromkeys(found))

    def _signs(self, known: dict[str, float]) -> dict[str, str]:
        """Name of a metric -> what is wrong with it."""
        ratio = known.get("persistence_ratio", 0.0)
        meaning = "the predictor only copies" if ratio <= COPIES_UP_TO else "the predictor does worse than a copy"
        # A comparison with NaN is False: write each so that NaN counts as a sign.
        checks = (
            (
                "feature_std",
                lambda value: value >= self.min_feature_std,
                f"the mean standard deviation of an embedding dimension is {{:.3g}} (healthy: above {self.min_feature_std})",
                "all inputs look alike to the encoder",
            ),
            (
                "rankme",
                lambda value: value >= self.min_rankme,
                f"RankMe is {{:.2f}} (healthy: above {self.min_rankme})",
                "the embeddings vary in hardly any direction",
            ),
            (
                "largest_eigenvalue_share",
                lambda value: value <= self.max_largest_eigenvalue_share,
                f"{{:.0%}} of the variance lies in one direction (healthy: below {self.max_largest_eigenvalue_share:.0%})",
                "the embeddings vary together",
            ),
            (
                "persistence_ratio",
                lambda value: value <= self.max_persistence_ratio,
                f"the prediction error is {{:.2f}} times that of predicting no change (healthy: below "
                f"{self.max_persistence_ratio})",
                meaning,
            ),
        )
        return {
            name: sentence.format(known[name]) + ("" if math.isnan(known[name]) else f": {reading}")
            for name, healthy, sentence, reading in checks
            if name in known and not healthy(known[name])
        }

    @staticmethod
    def _against(what: str, terms: tuple[str, ...], module: Any) -> list[str]:
        """How the model could keep embeddings from something: by a term of its regularizer, or by another one."""
        if getattr(module, "freeze_encoder", False):
            return ["model.freeze_encoder leaves the encoder of --init_from as it is: start from another one"]
        regularizer = getattr(module, "regularizer", None)
        if regularizer is None:
            nothing, remedy = NO_REGULARIZER[getattr(module, "target_mode", "vjepa2")]
            return [f"model.regularizer is null, and {nothing} keeps {what}: set model.regularizer to vicreg{remedy}"]
        for term in terms:
            if term in regularizer.weights:
                weight = regularizer.weights[term]
                change = "is 0: give it a weight" if weight == 0 else f"is {weight:g}: raise it"
                return [f"{term} in model.regularizer_weights keeps {what}, and {change}"]
        return [f"model.regularizer={regularizer.name} has no term that keeps {what}: choose vicreg"]

    @staticmethod
    def _against_bad_forecasts(ratio: float, module: Any) -> str:
        """What to do about a predictor that does not beat a copy."""
        if math.isnan(ratio):
            return f"a ratio of NaN means embeddings that never change, or forecasts that are not finite: {CALMER}"
        if ratio > COPIES_UP_TO:
            rate = getattr(module, "learning_rate", None)
            now = "" if rate is None else f" (now {rate:g})"
            return (
                "a predictor worse than a copy is not trained yet, or diverges: give it more steps, and if the ratio does "
                f"not fall, lower model.learning_rate{now}"
            )
        weights = getattr(getattr(module, "regularizer", None), "weights", {})
        slow = [f"{term} (now {weights[term]:g})" for term in SLOWNESS_TERMS if weights.get(term, 0) > 0]
        lower = f": lower {' and '.join(slow)} in model.regularizer_weights" if slow else ""
        return f"a predictor that copies needs more steps, or embeddings that change more from one time to the next{lower}"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not fitting or trainer.global_step < self.grace_steps:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        signs = self.signs(metrics)
        if not signs:
            return
        message = f"Collapse alarm at optimizer step {trainer.global_step}: " + "; ".join(signs) + "."
        self.alarms.append(message)
        if trainer.is_global_zero:
            advice = "; ".join(self.advice(metrics, pl_module))
            text = f"{message} What to try: {advice}. See docs/guides/collapse.md."
            warnings.warn(text, CollapseWarning, stacklevel=2)
        if self.action == "stop":
            trainer.should_stop = True


def without_prefix(metrics: dict[str, float]) -> dict[str, float]:
    """The validation metrics, without the "val/" before their names."""
    return {name.removeprefix("val/"): value for name, value in metrics.items() if name.startswith("val/")}
