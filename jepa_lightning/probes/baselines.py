"""Baselines that a trained encoder must beat: random initialization, and principal components.

Shapes: N samples, D embedding dimension.
"""

import torch
from torch import Tensor, nn

BASELINE_SEED = 12345
"""Seed of the initialization of networks that are never trained."""


class RandomEncoder(nn.Module):
    """The random-initialization baseline: the trained encoder's network as initialized, scaled to unit variance.

    Args:
        encoder: Freshly initialized encoder, (N, ...) -> (N, D).
        dim: Embedding dimension D.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, encoder: nn.Module, dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, inputs: Tensor) -> None:
        """Learn nothing but the mean and the overall scale of the output on (N, ...) inputs."""
        features = self.encoder(inputs)
        self.mean.copy_(features.mean(dim=0))
        self.scale.copy_(features.std(dim=0).square().mean().sqrt())

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, ...) -> (N, D)."""
        return (self.encoder(inputs) - self.mean) / self.scale


class PCA(nn.Module):
    """The first D principal components of the flattened input, scaled to unit variance on average.

    Args:
        input_size: Number of input values per sample.
        dim: Embedding dimension D; components beyond `input_size` are zero.
    """

    mean: Tensor
    components: Tensor

    def __init__(self, input_size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(input_size))
        self.register_buffer("components", torch.zeros(input_size, dim))

    @torch.no_grad()
    def fit(self, inputs: Tensor) -> None:
        """Find the components of (N, ...) inputs by a randomized singular value decomposition (seeded)."""
        flat = inputs.flatten(1)
        rank = min(self.components.shape[1], *flat.shape)
        mean = flat.mean(dim=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, singular, directions = torch.pca_lowrank(flat, q=rank, center=True, niter=4)
        scale = (singular.square().sum() / len(flat) / rank).sqrt()
        self.mean.copy_(mean)
        self.components.zero_()
        self.components[:, :rank] = directions / scale

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, ...) -> (N, D)."""
        return (inputs.flatten(1) - self.mean) @ self.components
