"""Multilayer perceptrons."""

from torch import nn


def mlp(input_dim: int, hidden_dims: tuple[int, ...], output_dim: int, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with SiLU, and dropout if asked for, between them: (..., input_dim) -> (..., output_dim)."""
    layers: list[nn.Module] = []
    for hidden_dim in hidden_dims:
        layers += [nn.Linear(input_dim, hidden_dim), nn.SiLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        input_dim = hidden_dim
    return nn.Sequential(*layers, nn.Linear(input_dim, output_dim))
