"""Lightning callbacks, usable with any module that has a context encoder and a target encoder."""

from callbacks.checkpointing import BestCheckpoint, LastCheckpoint
from callbacks.collapse import CollapseAlarm, CollapseWarning
from callbacks.ema import EMAUpdate
from callbacks.embeddings import EmbeddingWriter
from callbacks.error_log import ErrorLog
from callbacks.preemption import Interrupted, Preemption
from callbacks.progress import ProgressLines
from callbacks.startup import StartUp
from callbacks.stopwatch import Stopwatch
from callbacks.weight_decay import WeightDecaySchedule

__all__ = [
    "BestCheckpoint",
    "CollapseAlarm",
    "CollapseWarning",
    "EMAUpdate",
    "EmbeddingWriter",
    "ErrorLog",
    "Interrupted",
    "LastCheckpoint",
    "Preemption",
    "ProgressLines",
    "StartUp",
    "Stopwatch",
    "WeightDecaySchedule",
]
