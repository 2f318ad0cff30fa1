"""Each term is what its formula says, and pulls where it should."""

import pytest
import torch

from jepa_lightning.regularizers import (
    CENTER_MOMENTUM,
    DEFAULT_WEIGHTS,
    NUM_PROJECTIONS,
    NUM_SUBSPACES,
    Regularizer,
    covariance_penalty,
    cross_correlation_penalties,
    curvature,
    gaussian_distance,
    random_directions,
    similarity_in_time,
    subspace_mask,
    variance_hinge,
)


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


def test_similarity_in_time_is_the_squared_step() -> None:
    steps = torch.tensor([[[0.0, 0.0], [1.0, 2.0], [1.0, 2.0]]])
    torch.testing.assert_close(similarity_in_time(steps), torch.tensor((1.0 + 4.0) / 4))
    assert similarity_in_time(steps[:, :1]) == 0


def test_cross_correlation_of_equal_views_leaves_redundancy() -> None:
    features = torch.randn(2000, 3)
    features[:, 2] = features[:, 1]  # a copy
    invariance, redundancy = cross_correlation_penalties(features, features)
    assert invariance < 1e-6
    assert redundancy == pytest.approx(2 / 3, abs=0.05), "two entries off the diagonal are 1, over D"
    scaled = cross_correlation_penalties(features, 7 * features + 3)
    torch.testing.assert_close(torch.stack(scaled), torch.stack([invariance, redundancy]), rtol=1e-3, atol=1e-4)
    unrelated, _ = cross_correlation_penalties(features, torch.randn(2000, 3))
    assert unrelated == pytest.approx(1, abs=0.1)


def test_gaussian_distance_is_lowest_for_a_standard_normal() -> None:
    torch.manual_seed(0)
    normal, lines = torch.randn(4000, 16), random_directions(16, step=0)
    torch.testing.assert_close(lines.norm(dim=0), torch.ones(lines.shape[1]))
    best = gaussian_distance(normal, lines)
    assert best < 1e-3
    # Of zeros: the integral of (1 - exp(-t^2 / 2))^2 exp(-t^2 / 2) over all t.
    exact = (2 * torch.pi) ** 0.5 * (1 - 2 / 2**0.5 + 1 / 3**0.5)
    assert gaussian_distance(torch.zeros(10, 16), lines).item() == pytest.approx(exact, rel=0.01)
    for other in (0.3 * normal, 3 * normal, normal + 1, normal[:, :1].expand(-1, 16)):
        assert gaussian_distance(other, lines) > 5 * best


def test_gaussian_distance_is_the_integral_over_the_whole_line() -> None:
    """By complex numbers and 17 knots, of embeddings that are not symmetric about zero."""
    features = torch.rand(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).square() * 8
    lines = random_directions(3, 0).double()
    knots = torch.linspace(-5, 5, 17, dtype=torch.float64)
    values = []
    for line in lines.T:
        characteristic = torch.exp(1j * knots[:, None] * (features @ line)).mean(dim=1)
        distance = (characteristic - torch.exp(-(knots**2) / 2)).abs() ** 2
        values.append(torch.trapezoid(distance * torch.exp(-(knots**2) / 2), knots))
    expected = torch.stack(values).mean().item()
    assert gaussian_distance(features.float(), lines.float()).item() == pytest.approx(expected, rel=1e-4)


def test_cross_correlation_by_hand() -> None:
    first = torch.tensor([[1.0, 0.0], [3.0, 1.0], [2.0, 11.0]])
    second = torch.tensor([[0.0, 2.0], [1.0, 0.0], [5.0, 1.0]])
    units = []
    for views in (first, second):
        centered = views - views.mean(dim=0)
        units.append(centered / (centered.square().mean(dim=0) + 1e-4).sqrt())
    c = torch.einsum("ni,nj->ij", *units) / 3
    invariance, redundancy = cross_correlation_penalties(first, second)
    assert invariance.item() == pytest.approx((((1 - c[0, 0]) ** 2 + (1 - c[1, 1]) ** 2) / 2).item(), rel=1e-5)
    assert redundancy.item() == pytest.approx(((c[0, 1] ** 2 + c[1, 0] ** 2) / 2).item(), rel=1e-5)
    # Embeddings below 0.01 are too small to be distinguished from noise, and are not blown up to a correlation of 1.
    assert cross_correlation_penalties(1e-3 * first, 1e-3 * first)[0] > 0.5
    assert cross_correlation_penalties(1e-1 * first, 1e-1 * first)[0] < 0.01


def test_the_shortest_sequences_that_have_a_bend_or_a_step() -> None:
    features = torch.tensor([[[0.0], [1.0], [4.0]]])
    assert curvature(features).item() == 4.0 and similarity_in_time(features[:, :2]).item() == 1.0
    assert curvature(features[:, :2]).shape == similarity_in_time(features[:, :1]).shape == ()


def test_weights_are_those_that_results_were_made_with() -> None:
    assert DEFAULT_WEIGHTS == {
        "variance_hinge": {"variance": 0.1},
        "vicreg": {"variance": 1.0, "covariance": 0.05, "curvature": 1.0, "temporal_similarity": 0.0},
        "barlow_twins": {"invariance": 1.0, "redundancy": 0.005},
        "sigreg": {"sigreg": 10.0},
        "subspace_sigreg": {"sigreg": 10.0},
        "dino_centering": {"centering": 1.0},
    }
    assert (CENTER_MOMENTUM, NUM_PROJECTIONS, NUM_SUBSPACES) == (0.9, 256, 8)
    assert random_directions(5, 0).shape == (5, 256)


@pytest.mark.parametrize(
    ("name", "weights", "times"),
    [
        ("vicreg", None, 3),
        ("vicreg", {"curvature": 0.0}, 1),
        ("vicreg", {"curvature": 0.0, "temporal_similarity": 0.5}, 2),
        ("vicreg", {"curvature": 0.5, "temporal_similarity": 0.5}, 3),
        ("barlow_twins", None, 2),
        ("variance_hinge", None, 1),
        ("sigreg", None, 1),
        ("subspace_sigreg", None, 1),
        ("dino_centering", None, 1),
    ],
)
def test_how_many_times_are_compared(name: str, weights: dict | None, times: int) -> None:
    assert Regularizer(name, 3, weights).needed_times == times


def test_terms_of_a_sequence_by_name() -> None:
    torch.manual_seed(0)
    features = torch.randn(6, 4, 3)
    flat, step = features.reshape(24, 3), 5
    _, terms = Regularizer("vicreg", 3)(features)
    assert set(terms) == {"variance", "covariance", "curvature", "temporal_similarity"}
    for name, expected in (
        ("variance", variance_hinge(flat)),
        ("covariance", covariance_penalty(flat)),
        ("curvature", curvature(features)),
        ("temporal_similarity", similarity_in_time(features)),
    ):
        torch.testing.assert_close(terms[name], expected)
    total, terms = Regularizer("barlow_twins", 3)(features)
    now, then = features[:, :3].reshape(18, 3), features[:, 1:].reshape(18, 3)
    invariance, redundancy = cross_correlation_penalties(now, then)
    assert list(terms) == ["invariance", "redundancy"]
    torch.testing.assert_close(torch.stack(list(terms.values())), torch.stack([invariance, redundancy]))
    torch.testing.assert_close(total, invariance + 0.005 * redundancy)
    total, terms = Regularizer("sigreg", 3)(features, step)
    torch.testing.assert_close(terms["sigreg"], gaussian_distance(flat, random_directions(3, step)))
    torch.testing.assert_close(total, 10 * terms["sigreg"])
    assert Regularizer("sigreg", 3)(features)[0] == Regularizer("sigreg", 3)(features, 0)[0] != total


def test_subspaces_are_frozen_orthogonal_and_share_no_coordinate() -> None:
    mask = subspace_mask(20)
    assert mask.shape == (20, 256) and torch.equal(mask.sum(dim=0).unique(), torch.tensor([2.0, 3.0]))
    assert torch.equal(mask[:, 3], mask[:, 11]) and torch.equal(mask[:, :8].sum(dim=1), torch.ones(20))
    assert torch.equal(subspace_mask(3)[:, :3], torch.eye(3))  # no more subspaces than dimensions
    regularizer = Regularizer("subspace_sigreg", 20)
    rotation = regularizer.rotation
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(20), atol=1e-5, rtol=0)
    assert rotation.abs().max() < 0.9  # no subspace of single coordinates
    features = torch.randn(64, 2, 20)
    assert regularizer(features, 0)[0] == regularizer(features)[0] != regularizer(features, 1)[0]
    assert torch.equal(rotation, Regularizer("subspace_sigreg", 20).rotation) and "rotation" in regularizer.state_dict()


def test_subspaces_leave_what_depends_across_them_and_see_what_lies_within() -> None:
    """Copies of a normal variable in different subspaces cost nothing; two in the same subspace do, and so does a scale."""
    torch.manual_seed(0)
    regularizer, normal = Regularizer("subspace_sigreg", 16), torch.randn(4000, 16)

    def cost(features: torch.Tensor) -> float:
        return regularizer((features @ regularizer.rotation.T)[:, None])[1]["sigreg"].item()

    across, within = normal.clone(), normal.clone()
    across[:, 15], within[:, 1] = normal[:, 0], normal[:, 0]
    assert cost(normal) < 1e-3 and cost(across) < 1e-3 and cost(within) > 3 * cost(normal) and cost(2 * normal) > 0.05
    assert Regularizer("sigreg", 16)((across @ regularizer.rotation.T)[:, None])[1]["sigreg"].item() > 1.5 * cost(across)


def test_knots_and_directions_are_where_the_embeddings_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the "meta" device, which no tensor of the CPU can be mixed with."""
    assert gaussian_distance(torch.zeros(4, 3, device="meta"), torch.zeros(3, 5, device="meta")).device.type == "meta"
    features, asked = torch.randn(4, 2, 3), []

    def directions(dim: int, step: int, device: torch.device) -> torch.Tensor:
        asked.append(device)
        return random_directions(dim, step)

    monkeypatch.setattr("jepa_lightning.regularizers.random_directions", directions)
    Regularizer("sigreg", 3)(features)
    assert asked == [features.device] and random_directions(3, 0, torch.device("cpu")).device.type == "cpu"


def test_the_centre_follows_the_mean_of_all_samples() -> None:
    regularizer = Regularizer("dino_centering", 2)
    assert regularizer.center.tolist() == [0.0, 0.0]
    features = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[1.0, 2.0], [3.0, 6.0]]], requires_grad=True)  # mean (2, 4)
    total, terms = regularizer(features)
    assert total.item() == terms["centering"].item() == 10.0
    torch.testing.assert_close(regularizer.center, torch.tensor([0.2, 0.4]))
    total, _ = regularizer(features)
    assert total.item() == pytest.approx((1.8**2 + 3.6**2) / 2)
    total.backward()
    torch.testing.assert_close(regularizer.center, torch.tensor([0.38, 0.76]))
    assert (features.grad > 0).all() and not regularizer.center.requires_grad


def test_random_directions_are_a_function_of_the_step() -> None:
    assert torch.equal(random_directions(5, 3), random_directions(5, 3))
    assert not torch.equal(random_directions(5, 3), random_directions(5, 4))


def test_dino_centering_is_satisfied_by_a_constant() -> None:
    """The reason why it cannot prevent a collapse, and the reason why it is here."""
    regularizer = Regularizer("dino_centering", 4)
    constant = torch.full((8, 2, 4), 3.0, requires_grad=True)
    values = [regularizer(constant)[0] for _ in range(60)]
    assert values[0] > 1 and values[-1] < 1e-3
    assert "center" in regularizer.state_dict()


@pytest.mark.parametrize("name", ["variance_hinge", "vicreg", "barlow_twins", "sigreg", "subspace_sigreg"])
def test_each_of_the_others_pulls_a_nearly_constant_batch_apart(name: str) -> None:
    torch.manual_seed(0)
    features = 1e-2 * torch.randn(32, 4, 6)
    features.requires_grad_()
    optimizer = torch.optim.Adam([features], lr=0.02)
    before = features.detach().flatten(0, 1).std(dim=0).mean()
    for step in range(150):
        optimizer.zero_grad()
        Regularizer(name, 6)(features, step)[0].backward()
        optimizer.step()
    after = features.detach().flatten(0, 1).std(dim=0).mean()
    assert after > 5 * before


def test_weights_add_the_terms_up() -> None:
    features = torch.randn(4, 5, 3)
    total, terms = Regularizer(
        "vicreg", 3, {"variance": 2.0, "covariance": 0.5, "curvature": 3.0, "temporal_similarity": 0.1}
    )(features)
    torch.testing.assert_close(
        total,
        2 * terms["variance"] + 0.5 * terms["covariance"] + 3 * terms["curvature"] + 0.1 * terms["temporal_similarity"],
    )
    total, terms = Regularizer("variance_hinge", 3)(features)
    torch.testing.assert_close(total, 0.1 * variance_hinge(features.flatten(0, 1)))
    assert set(terms) == {"variance"}


@pytest.mark.parametrize("name", DEFAULT_WEIGHTS)
def test_statistics_are_in_float32_under_autocast(name: str) -> None:
    features = torch.randn(4, 5, 3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = Regularizer(name, 3)(features)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, Regularizer(name, 3)(features.float())[0])


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        (
            "vicrag",
            None,
            "'vicrag': choose one of variance_hinge, vicreg, barlow_twins, sigreg, subspace_sigreg, dino_centering",
        ),
        ("variance_hinge", {"covariance": 1.0}, "'covariance': regularizer 'variance_hinge' has variance"),
        ("vicreg", {"variance": -1.0}, "variance=-1.0 must be >= 0"),
        ("vicreg", {"variance": float("nan")}, "variance=nan must be >= 0"),
    ],
)
def test_wrong_names_and_weights_are_refused(name: str, weights: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Regularizer(name, 3, weights)
