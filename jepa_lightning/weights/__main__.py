"""Weights in and out.

python -m jepa_lightning.weights import IN1K-vit.h.14-300e.pth.tar runs/vith14.ckpt
python -m jepa_lightning.weights export runs/ijepa_cifar10/checkpoints/last.ckpt encoder.safetensors
"""

import logging
import sys

from jsonargparse import auto_cli

from jepa_lightning.weights.exporting import export_weights
from jepa_lightning.weights.importing import import_weights


def main(args: list[str] | None = None) -> None:
    """The command line of this file."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # which devices there are is of no interest here
    try:
        auto_cli({"import": import_weights, "export": export_weights}, args=args, as_positional=True)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
