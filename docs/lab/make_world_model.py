"""Write what planning needs of a training run into a small file: the weights, and how to build the networks.

python docs/lab/make_world_model.py runs/lab/world_model docs/lab/world_model.ckpt
"""

import sys

import torch

from jepa_lightning import load
from jepa_lightning.weights.checkpoints import read_checkpoint

KEPT = ("class", "format_version", "hyper_parameters", "state_dict", "trained_on", "pytorch-lightning_version")


def main(run: str, destination: str) -> None:
    """Copy the weights of a run's last checkpoint, and leave out the state of its training."""
    checkpoint = read_checkpoint(run)
    small = {name: checkpoint[name] for name in KEPT}
    small["hyper_parameters"] = {k: v for k, v in small["hyper_parameters"].items() if not k.startswith("_")}
    small["state_dict"] = {name: weights.clone() for name, weights in checkpoint["state_dict"].items()}
    torch.save(small, destination)
    print(f"{destination}: {type(load(destination)).__name__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
