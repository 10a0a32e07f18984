"""Ternary solvers: `exact` against brute force over all supports, the others against their definitions."""

import pytest
import torch
from torch import Tensor

from lowprec.numerics import solvers
from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.solvers import ClusterScales, check_finite, solve_ternary, ternary_codes

SOLVERS = ["exact", "rms", "paper", "twn"]
DISTRIBUTIONS = ["gaussian", "laplace", "cauchy", "integers", "equal", "sparse", "tiny", "huge"]


def sample(kind: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(DISTRIBUTIONS.index(kind))
    normal = torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    if kind == "laplace":
        return normal.sign() * -(1 - uniform).log()
    if kind == "cauchy":
        return torch.tan(3.1 * (uniform - 0.5))
    if kind == "integers":  # many ties
        return torch.randint(-3, 4, shape, generator=generator).float()
    if kind == "equal":
        return normal.sign() * 0.3
    if kind == "sparse":
        return normal * (uniform < 0.3)
    return normal * {"gaussian": 1.0, "tiny": 1e-8, "huge": 1e8}[kind]


def errors(weight: Tensor, scales: ClusterScales, layout: ClusterLayout) -> Tensor:
    """Squared error of each cluster, float64."""
    w_OGNP = layout.split(weight.double())
    codes = ternary_codes(layout.split(weight.float()), scales.threshold).double()
    return (w_OGNP - codes * scales.scale.double()).square().sum(layout.shared_axes).flatten()


def energies(weight: Tensor, layout: ClusterLayout) -> Tensor:
    return layout.split(weight.double()).square().sum(layout.shared_axes).flatten()


def least_errors(rows: Tensor) -> Tensor:
    """Σ w² − max over all supports T of (Σ_T |w|)² / |T|: the least error, at the best scale of each support."""
    width = rows.shape[1]
    masks = (torch.arange(1, 1 << width)[:, None] >> torch.arange(width)) & 1
    sums = rows.double().abs() @ masks.double().T
    return rows.double().square().sum(1) - (sums.square() / masks.sum(1)).amax(1)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("width", [1, 2, 3, 5, 9])
def test_exact_equals_brute_force(kind: str, width: int) -> None:
    rows = sample(kind, (1000, width))
    layout = ClusterLayout((1000, width), width)
    found = errors(rows, solve_ternary(rows, layout), layout)
    slack = 1e-12 * energies(rows, layout)  # the scale is a float32
    assert bool((found <= least_errors(rows) + slack).all())
    assert bool((found >= least_errors(rows) - slack).all())


@pytest.mark.parametrize("solver", ["rms", "paper", "twn"])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("layout_kind", ["kernel", "element"])
def test_no_solver_beats_exact(solver: str, kind: str, layout_kind: str) -> None:
    weight = sample(kind, (40, 10, 3, 3))
    layout = ClusterLayout((40, 10, 3, 3), 4, layout_kind)
    best = errors(weight, solve_ternary(weight, layout), layout)
    other = errors(weight, solve_ternary(weight, layout, solver), layout)
    energy = energies(weight, layout)
    assert bool((best <= other + 1e-12 * energy).all())
    assert bool((other <= energy * (1 + 1e-6)).all())  # never worse than all zeros


def test_exact_threshold_is_half_the_scale_and_scale_the_mean_of_the_support() -> None:
    weight = sample("gaussian", (50, 8, 3, 3))
    layout = ClusterLayout((50, 8, 3, 3), 4)
    scales = solve_ternary(weight, layout)
    assert torch.equal(scales.threshold, scales.scale / 2)
    w_OGNP = layout.split(weight)
    support = ternary_codes(w_OGNP, scales.threshold) != 0
    mean = (w_OGNP.abs() * support).double().sum((2, 3), keepdim=True) / support.sum((2, 3), keepdim=True)
    torch.testing.assert_close(scales.scale.double(), mean, rtol=1e-7, atol=0)


def test_rms_is_the_best_prefix_with_its_root_mean_square() -> None:
    rows = sample("laplace", (300, 9))
    layout = ClusterLayout((300, 9), 9)
    ordered = rows.double().abs().sort(1, descending=True).values
    least = torch.full((300,), torch.inf, dtype=torch.float64)
    for size in range(1, 10):
        scale = ordered[:, :size].square().mean(1, keepdim=True).sqrt()
        error = (ordered[:, :size] - scale).square().sum(1) + ordered[:, size:].square().sum(1)
        least = torch.minimum(least, error)
    torch.testing.assert_close(errors(rows, solve_ternary(rows, layout, "rms"), layout), least, rtol=1e-6, atol=0)


def test_twn_by_its_formula_in_clusters_that_are_not_full() -> None:
    weight = sample("gaussian", (20, 6, 3, 3))
    scales = solve_ternary(weight, ClusterLayout((20, 6, 3, 3), 4), "twn")
    for group, part in enumerate((weight[:, :4], weight[:, 4:])):
        magnitude = part.double().abs().flatten(1)
        threshold = 0.7 * magnitude.mean(1, keepdim=True)
        support = magnitude >= threshold
        expected = (magnitude * support).sum(1) / support.sum(1)
        torch.testing.assert_close(
            scales.threshold[:, group].flatten().double(), threshold.flatten(), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(scales.scale[:, group].flatten().double(), expected, rtol=1e-6, atol=0)


def paper_of_one_cluster(cluster: Tensor) -> tuple[float, float]:
    """Algorithms 1 and 2 of arXiv 1701.08978 for one cluster [N, P], step by step: scale and squared error."""

    def error(weights: Tensor, scale: float) -> float:
        kept = weights.abs() >= scale
        return float((weights.abs() - scale * kept).square().sum())

    def root_mean_squares(values: Tensor) -> list[float]:
        ordered = values.abs().sort(descending=True).values
        return [float(ordered[: t + 1].square().mean().sqrt()) for t in range(len(ordered))]

    scales = torch.tensor(
        [min(root_mean_squares(kernel), key=lambda scale: error(kernel, scale)) for kernel in cluster]
    ).double()
    best = min(root_mean_squares(scales), key=lambda scale: error(cluster, scale))
    return best, error(cluster, best)


@pytest.mark.parametrize("channels", [4, 6])
def test_paper_step_by_step(channels: int) -> None:
    weight = sample("gaussian", (15, channels, 3, 3))
    layout = ClusterLayout((15, channels, 3, 3), 4)
    scales = solve_ternary(weight, layout, "paper")
    expected = [paper_of_one_cluster(part.double().flatten(1)) for row in weight for part in row.split(4)]
    found = errors(weight, scales, layout)
    torch.testing.assert_close(found, torch.tensor([error for _, error in expected]).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        scales.scale.flatten().double(), torch.tensor([scale for scale, _ in expected]).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_clusters_get_scale_zero_and_codes_zero(solver: str) -> None:
    weight = sample("gaussian", (4, 8, 3, 3))
    weight[1] = 0
    weight[2, :4] = 0
    weight[3, :, 0, 0] = -0.0
    layout = ClusterLayout((4, 8, 3, 3), 4)
    scales = solve_ternary(weight, layout, solver)
    codes = layout.merge(ternary_codes(layout.split(weight), scales.threshold))
    assert bool(torch.isfinite(scales.scale).all())
    assert scales.scale[1].abs().sum() == 0
    assert scales.scale[2, 0] == 0
    assert scales.scale[2, 1] > 0
    assert codes[1].abs().sum() == 0
    assert codes[2, :4].abs().sum() == 0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e-8, 0.1, 0.7, 1e8, 1e20, 1e30])
def test_a_single_weight_is_kept(solver: str, magnitude: float) -> None:
    weight = sample("gaussian", (200, 3)).clamp(-3, 3) * magnitude
    layout = ClusterLayout((200, 3), 1)
    scales = solve_ternary(weight, layout, solver)
    codes = layout.merge(ternary_codes(layout.split(weight), scales.threshold))
    assert torch.equal(codes, weight.sign())
    torch.testing.assert_close(layout.merge(codes[:, :, None, None] * scales.scale), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_give_what_float32_gives(solver: str, dtype: torch.dtype) -> None:
    weight = sample("gaussian", (20, 6, 3, 3)).to(dtype)
    layout = ClusterLayout((20, 6, 3, 3), 4)
    scales = solve_ternary(weight, layout, solver)
    expected = solve_ternary(weight.float(), layout, solver)
    assert scales.scale.dtype == scales.threshold.dtype == torch.float32
    torch.testing.assert_close(scales.scale, expected.scale, rtol=1e-6, atol=0)
    codes = (ternary_codes(layout.split(weight.float()), part.threshold) for part in (scales, expected))
    assert torch.equal(*codes)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("block", [1, 100, 1000])
def test_blocks_do_not_change_the_result(solver: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sample("laplace", (12, 10, 3, 3))
    layout = ClusterLayout((12, 10, 3, 3), 4)
    whole = solve_ternary(weight, layout, solver)
    monkeypatch.setattr(solvers, "WEIGHTS_PER_BLOCK", block)
    parts = solve_ternary(weight, layout, solver)
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.threshold, parts.threshold)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_infinities_and_nan_name_the_layer(bad: float, dtype: torch.dtype) -> None:
    weight = torch.ones(3, 4, dtype=dtype)
    check_finite(weight, "layer1.conv1")
    weight[1, 2] = bad
    with pytest.raises(ValueError, match=r"layer layer1\.conv1: 1 of 12 weights are infinite or NaN"):
        check_finite(weight, "layer1.conv1")
    check_finite(weight.to("meta"), "shapes alone")
