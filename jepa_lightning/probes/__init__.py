"""Evaluation of the frozen encoder (the second-phase module): probes, decoders, fine-tuning and planning."""

from jepa_lightning.probes.dynamics.decoder import DecoderProbe
from jepa_lightning.probes.dynamics.forecast import ForecastProbe
from jepa_lightning.probes.dynamics.goals import GoalProbe
from jepa_lightning.probes.dynamics.image_decoder import ImageDecoder
from jepa_lightning.probes.dynamics.inverse import InverseModel
from jepa_lightning.probes.dynamics.planning import PlanningProbe
from jepa_lightning.probes.dynamics.reward import RewardProbe
from jepa_lightning.probes.dynamics.state import StateProbe
from jepa_lightning.probes.images.attentive import AttentiveProbe
from jepa_lightning.probes.images.comparison import ComparisonProbe
from jepa_lightning.probes.images.completion import CompletionProbe
from jepa_lightning.probes.images.equivariance import EquivarianceProbe
from jepa_lightning.probes.images.finetuning import FineTuning
from jepa_lightning.probes.images.knn import KNNProbe
from jepa_lightning.probes.images.linear import LinearProbe
from jepa_lightning.probes.images.predictor_finetuning import PredictorFineTuning
from jepa_lightning.probes.images.ridge import RidgeProbe
from jepa_lightning.probes.images.segmentation import SegmentationProbe

__all__ = [
    "AttentiveProbe",
    "ComparisonProbe",
    "CompletionProbe",
    "DecoderProbe",
    "EquivarianceProbe",
    "FineTuning",
    "ForecastProbe",
    "GoalProbe",
    "ImageDecoder",
    "InverseModel",
    "KNNProbe",
    "LinearProbe",
    "PlanningProbe",
    "PredictorFineTuning",
    "RewardProbe",
    "RidgeProbe",
    "SegmentationProbe",
    "StateProbe",
]
