"""Networks that are sharded over the processes: FSDP2 through Lightning's ModelParallelStrategy.

Under DDP every process holds all parameters, their gradients, the EMA and the optimizer's two moments. Sharded, each holds
its share of them, and gathers the parameters of one block at a time while the block computes.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from callbacks.checkpointing import remove
from jepa_lightning.networks.vit import blocks

SUPPORTED = "one device, any variant of ddp, and, for networks that are to be sharded, fsdp2"


class FSDP2Strategy(ModelParallelStrategy):
    """`--trainer.strategy fsdp2`: Lightning's ModelParallelStrategy over the data alone, on all devices of all nodes.

    A checkpoint is a folder, in which each process writes its shards. It is written next to the destination and renamed, so
    that a folder under its final name is complete.

    Args:
        settings: Further arguments of ModelParallelStrategy, such as `save_distributed_checkpoint`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(tensor_parallel_size=1, **settings)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        destination = Path(self.broadcast(filepath))
        partial = destination.with_name(destination.name + ".part")
        if self.is_global_zero:
            remove(partial)  # of a run that was killed
        self.barrier()
        super().save_checkpoint(checkpoint, partial, storage_options)
        self.barrier()
        if self.is_global_zero:
            remove(destination)
            partial.rename(destination)
        self.barrier()


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Shards networks over all devices, see docs of PyTorch FSDP2.")


def check_strategy(strategy: Strategy) -> None:
    """Refuse what would leave the EMA behind: it is taken parameter by parameter, which other engines flatten or hide.

    Raises:
        ValueError: A strategy that is not supported, or tensor parallelism.
    """
    if isinstance(strategy, ModelParallelStrategy):
        data, tensor = (strategy.device_mesh[name].size() for name in ("data_parallel", "tensor_parallel"))
        if tensor != 1:
            raise ValueError(
                f"trainer.strategy: ModelParallelStrategy with data_parallel_size={data} and tensor_parallel_size={tensor}, "
                f"but networks are sharded over data alone: set data_parallel_size={data * tensor} and "
                "tensor_parallel_size=1."
            )
    elif not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"trainer.strategy={type(strategy).__name__} is not supported, because the target encoder could not follow the "
            f"context encoder: choose {SUPPORTED}."
        )


def shard(network: nn.Module, mesh: DeviceMesh, device: torch.device, methods: Iterable[str] = ()) -> None:
    """Shard a network in place, each transformer block on its own and then the rest, with the weights of the first process.

    Networks of one shape are sharded alike. Parameters become `DTensor`s, whose names and global shapes stay.

    Args:
        network: Network on any device.
        mesh: One-dimensional mesh of the processes.
        device: Device of this process.
        methods: Names of methods other than `forward` that use the network's parameters.
    """
    for unit in [*blocks(network), network]:
        take_from_first_process(unit, device)
        # Whatever computes next, parameters return to their shards: a target encoder has no backward pass to do it.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(network, method)


@torch.no_grad()
def take_from_first_process(module: nn.Module, device: torch.device) -> None:
    """Move a module to the device, with the values that the first process has: others may have drawn their own.

    What is sharded already is left out.
    """
    module.to(device)
    sharded = {id(part) for unit in module.modules() if isinstance(unit, FSDPModule) for part in unit.parameters()}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in sharded:
            torch.distributed.broadcast(tensor, src=0)


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` has been at work."""
    return isinstance(network, FSDPModule)


def check_even_batches(count: int, device: torch.device) -> None:
    """Compare with the other processes: whoever has one batch more would wait forever for the others' shards.

    Args:
        count: Number of held-out batches of this process.
        device: Device of this process.

    Raises:
        ValueError: Numbers that differ.
    """
    ends = torch.tensor([count, -count], device=device)
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
    most, fewest = int(ends[0]), -int(ends[1])
    if most != fewest:
        raise ValueError(
            f"The held-out samples make {most} batches in one process and {fewest} in another, and sharded networks need as "
            "many in all: change data.batch_size or the number of held-out samples by one."
        )
