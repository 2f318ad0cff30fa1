"""Random numbers as a function of what they are for, so that a run can be cut, resumed and spread over processes."""

import torch
from numpy.random import SeedSequence

SPLIT_STREAM, SUBSET_STREAM, CROP_STREAM, HELD_OUT_STREAM = range(4)
BLOCK_SIZE_STREAM, VIEW_STREAM, BANK_STREAM, WHOLE_STREAM = range(4, 8)
"""What the seed of a data set of images is used for: the second element of the key."""


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of `key` (say seed, epoch, rank) and of nothing else."""
    # A hash of the key, so that neighboring seeds share no stream.
    return torch.Generator().manual_seed(int(SeedSequence(key).generate_state(1, "uint64")[0] >> 1))
