"""Train, validate, probe and show joint-embedding predictive architectures (JEPA)."""

from jepa_lightning.jepa import JEPA
from jepa_lightning.pendulum import PendulumJEPA

__all__ = ["JEPA", "PendulumJEPA"]
