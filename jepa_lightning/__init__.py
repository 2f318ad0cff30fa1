"""Train, validate, probe and show joint-embedding predictive architectures (JEPA)."""

from jepa_lightning.ijepa import IJEPA
from jepa_lightning.iwm import IWM
from jepa_lightning.jepa import JEPA
from jepa_lightning.pendulum import PendulumJEPA

__all__ = ["IJEPA", "IWM", "JEPA", "PendulumJEPA"]
