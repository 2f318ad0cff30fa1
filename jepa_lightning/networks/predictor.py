"""Predictors of later features."""

from torch import Tensor, nn

from jepa_lightning.networks.mlp import mlp


class ResidualPredictor(nn.Module):
    """The features one frame later: z + f(LayerNorm(z)).

    The last layer of f starts at zero, so that an untrained predictor says "nothing changes" and its unrolled
    predictions stay finite at any horizon.

    Args:
        dim: D, width of the features.
        hidden_dim: Width of the two hidden layers.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.change = mlp(dim, (hidden_dim, hidden_dim), dim)
        for parameter in self.change[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return features + self.change(self.norm(features))
