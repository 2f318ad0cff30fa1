"""Each term is what its formula says, and pulls where it should."""

import pytest
import torch

from jepa_lightning.regularizers import Regularizer, covariance_penalty, curvature, variance_hinge


def test_variance_hinge_is_zero_from_a_standard_deviation_of_one() -> None:
    features = torch.tensor([[-2.0, -0.5], [2.0, 0.5]])  # std 2.83 and 0.707
    std = (torch.tensor(0.5) + 1e-4).sqrt()
    torch.testing.assert_close(variance_hinge(features), (1 - std) / 2)


def test_variance_hinge_still_pulls_a_collapsed_feature_apart() -> None:
    features = (1e-4 * torch.randn(100, 3)).requires_grad_()
    variance_hinge(features).backward()
    # Going down the gradient makes the spread larger: it points towards the mean.
    assert ((features.grad * (features - features.mean(0))).sum(0) < 0).all()


def test_covariance_is_the_sum_of_squared_off_diagonals_over_d() -> None:
    features = torch.randn(50, 6)
    covariance = torch.cov(features.T)
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    torch.testing.assert_close(covariance_penalty(features), off_diagonal.square().sum() / 6)
    torch.testing.assert_close(covariance_penalty(features + 100), covariance_penalty(features), rtol=1e-3, atol=1e-5)


def test_curvature_is_zero_on_straight_lines_and_counts_bends() -> None:
    times = torch.arange(5.0)
    straight = (times[:, None] * torch.randn(3))[None]
    assert curvature(straight) < 1e-10
    parabola = (times.square()[:, None] * torch.tensor([1.0, 2.0]))[None]  # second differences 2 and 4
    torch.testing.assert_close(curvature(parabola), torch.tensor((4.0 + 16.0) / 2))
    assert curvature(torch.randn(2, 2, 3)) == 0


def test_weights_add_the_terms_up() -> None:
    features = torch.randn(4, 5, 3)
    total, terms = Regularizer("vicreg", {"std": 2.0, "cov": 0.5, "curvature": 3.0})(features)
    torch.testing.assert_close(total, 2 * terms["std"] + 0.5 * terms["cov"] + 3 * terms["curvature"])
    total, terms = Regularizer("variance_hinge")(features)
    torch.testing.assert_close(total, 0.1 * variance_hinge(features.flatten(0, 1)))
    assert set(terms) == {"std"}


def test_statistics_are_in_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = Regularizer("vicreg")(torch.randn(4, 5, 3).bfloat16())
    assert total.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("vicrag", None, "'vicrag': choose one of variance_hinge, vicreg"),
        ("variance_hinge", {"cov": 1.0}, "'cov': regularizer 'variance_hinge' has std"),
        ("vicreg", {"std": -1.0}, "std=-1.0 must be >= 0"),
    ],
)
def test_wrong_names_and_weights_are_refused(name: str, weights: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Regularizer(name, weights)
