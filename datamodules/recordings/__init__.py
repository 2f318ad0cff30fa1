"""Recorded episodes: what one is, and reading and writing them in several formats."""

from datamodules.recordings.episode import Episode, Recording, RecordingInfo
from datamodules.recordings.npz_folder import write_episode, write_info
from datamodules.recordings.reading import read

__all__ = ["Episode", "Recording", "RecordingInfo", "read", "write_episode", "write_info"]
