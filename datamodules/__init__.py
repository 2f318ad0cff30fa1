"""Data modules and what they are made of. Nothing here knows of the models."""

from datamodules.batches import ClipBatch, ImageBatch, SegmentationBatch, ViewBatch
from datamodules.collecting import Collect
from datamodules.double_pendulum import DoublePendulum
from datamodules.hugging_face import HuggingFaceImages
from datamodules.image_folder import ImageFolder
from datamodules.multi_task import MultiTask
from datamodules.segmentation_folder import SegmentationFolder
from datamodules.synthetic_images import SyntheticImages
from datamodules.trajectories import Trajectories
from datamodules.views import Views

__all__ = [
    "ClipBatch",
    "Collect",
    "DoublePendulum",
    "HuggingFaceImages",
    "ImageBatch",
    "ImageFolder",
    "MultiTask",
    "SegmentationBatch",
    "SegmentationFolder",
    "SyntheticImages",
    "Trajectories",
    "ViewBatch",
    "Views",
]
