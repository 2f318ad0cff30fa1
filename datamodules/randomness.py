"""Random numbers as a function of what they are for, so that a run can be cut, resumed and spread over processes."""

import torch
from numpy.random import SeedSequence


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of `key` (say seed, epoch, rank) and of nothing else."""
    # A hash of the key, so that neighbouring seeds share no stream.
    return torch.Generator().manual_seed(int(SeedSequence(key).generate_state(1, "uint64")[0] >> 1))
