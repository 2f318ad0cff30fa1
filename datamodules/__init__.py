"""Data modules and what they are made of. Nothing here knows of the models."""

from datamodules.batches import ImageBatch, PendulumBatch, ViewBatch
from datamodules.image_folder import ImageFolder
from datamodules.pendulum import DoublePendulum
from datamodules.shapes import Shapes
from datamodules.tasks import Tasks
from datamodules.transformations import Views

__all__ = ["DoublePendulum", "ImageBatch", "ImageFolder", "PendulumBatch", "Shapes", "Tasks", "ViewBatch", "Views"]
