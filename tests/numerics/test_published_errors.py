"""The relative squared errors of the ternary solvers that the documentation states, within the sampling error."""

import pytest
import torch
from torch import Tensor

from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.solvers import solve_ternary, ternary_codes


def sample(distribution: str, clusters: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    if distribution == "gaussian":
        return torch.randn(clusters, width, generator=generator)
    signs = torch.randint(0, 2, (clusters, width), generator=generator) * 2 - 1
    return signs * -(1 - torch.rand(clusters, width, generator=generator)).log()


@pytest.mark.parametrize(
    ("distribution", "width", "solver", "expected"),
    [
        ("gaussian", 36, "exact", 0.179),
        ("gaussian", 36, "rms", 0.183),
        ("gaussian", 36, "paper", 0.324),
        ("gaussian", 36, "twn", 0.183),
        ("gaussian", 4, "exact", 0.100),
        ("gaussian", 4, "rms", 0.102),
        ("gaussian", 4, "paper", 0.216),
        ("gaussian", 4, "twn", 0.114),
        ("laplace", 576, "exact", 0.263),
        ("laplace", 576, "rms", 0.273),
        ("laplace", 576, "paper", 0.407),
        ("laplace", 576, "twn", 0.281),
    ],
)
def test_relative_squared_error(distribution: str, width: int, solver: str, expected: float) -> None:
    """One kernel of that many weights; Σ error / Σ w² over the clusters, to the three digits that are stated."""
    clusters = 400_000 // width
    weight = sample(distribution, clusters, width)[:, None]
    layout = ClusterLayout((clusters, 1, width), 1)
    scales = solve_ternary(weight, layout, solver)
    w_OGNP = layout.split(weight)
    residual = w_OGNP - ternary_codes(w_OGNP, scales.threshold) * scales.scale
    error = residual.double().square().sum((1, 2, 3))
    energy = w_OGNP.double().square().sum((1, 2, 3))
    found = float(error.sum() / energy.sum())
    # Standard error of a ratio of two means.
    sampling = float((error - found * energy).std() / energy.mean() / clusters**0.5)
    assert abs(found - expected) <= 0.0005 + 4 * sampling
