"""The second phase: freeze what was learned and ask what is in it."""

from jepa_lightning.probes.attention import AttentiveProbe
from jepa_lightning.probes.classification import LinearProbe
from jepa_lightning.probes.completion import CompletionProbe
from jepa_lightning.probes.decoder import DecoderProbe
from jepa_lightning.probes.equivariance import EquivarianceProbe
from jepa_lightning.probes.finetuning import FineTuning
from jepa_lightning.probes.neighbours import NeighbourProbe
from jepa_lightning.probes.planning import PlanningProbe
from jepa_lightning.probes.predictor_tuning import PredictorTuning
from jepa_lightning.probes.state import StateProbe
from jepa_lightning.probes.state_decoder import StateDecoder

__all__ = [
    "AttentiveProbe",
    "CompletionProbe",
    "DecoderProbe",
    "EquivarianceProbe",
    "FineTuning",
    "LinearProbe",
    "NeighbourProbe",
    "PlanningProbe",
    "PredictorTuning",
    "StateDecoder",
    "StateProbe",
]
