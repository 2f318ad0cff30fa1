"""Train, validate, probe and show joint-embedding predictive architectures (JEPA)."""

import sys
from importlib.util import find_spec
from pathlib import Path

for _name in ("callbacks", "datamodules"):  # ours, and names that other projects use, too
    _spec = find_spec(_name)
    if _spec is None or _spec.origin is None or Path(_spec.origin).parents[1] != Path(__file__).parents[1]:
        _found = "none" if _spec is None else _spec.origin or "a folder of that name"
        _text = (
            f"jepa_lightning needs its own package {_name!r}, and Python finds {_found}: rename that file or folder, or "
            "start from a directory without it."
        )
        raise SystemExit(f"error: {_text}") if sys.argv[:1] == ["-m"] else ImportError(_text)

from datamodules import DoublePendulum, ImageFolder, SyntheticImages, Trajectories, Views  # noqa: E402
from jepa_lightning.dynamics import DynamicsJEPA  # noqa: E402
from jepa_lightning.encoder_decoder import EncoderDecoder  # noqa: E402
from jepa_lightning.ijepa import IJEPA  # noqa: E402
from jepa_lightning.iwm import IWM  # noqa: E402
from jepa_lightning.jepa import JEPA, TargetPairs  # noqa: E402
from jepa_lightning.pendulum import PendulumJEPA  # noqa: E402
from jepa_lightning.planner import Planner  # noqa: E402
from jepa_lightning.probes import AttentiveProbe as _  # noqa: E402, F401  (so that `load` knows the probes)
from jepa_lightning.weights.loading import load, start_from  # noqa: E402

__all__ = [
    "IJEPA",
    "IWM",
    "JEPA",
    "DoublePendulum",
    "DynamicsJEPA",
    "EncoderDecoder",
    "ImageFolder",
    "PendulumJEPA",
    "Planner",
    "SyntheticImages",
    "TargetPairs",
    "Trajectories",
    "Views",
    "load",
    "start_from",
]
