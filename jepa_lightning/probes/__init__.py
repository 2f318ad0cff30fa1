"""The second phase: freeze what was learned and ask what is in it."""

from jepa_lightning.probes.classification import LinearProbe
from jepa_lightning.probes.decoder import DecoderProbe
from jepa_lightning.probes.state import StateProbe

__all__ = ["DecoderProbe", "LinearProbe", "StateProbe"]
