"""Data modules and what they are made of. Nothing here knows of the models."""

from datamodules.batches import PendulumBatch
from datamodules.pendulum import DoublePendulum

__all__ = ["DoublePendulum", "PendulumBatch"]
