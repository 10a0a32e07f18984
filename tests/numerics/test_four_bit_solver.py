"""4-bit and 8-bit scales against dense scans."""

import pytest
import torch
from torch import Tensor

from lowprec.numerics import solvers
from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.fixed_point import SIGNED_8_BIT, dequantize, exponent_for, quantize
from lowprec.numerics.solvers import eight_bit_codes, four_bit_codes, solve_eight_bit, solve_four_bit


def sample(kind: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(len(kind))
    normal = torch.randn(shape, generator=generator)
    if kind == "laplace":
        return normal.sign() * -(1 - torch.rand(shape, generator=generator)).log()
    if kind == "cauchy":
        return normal / torch.randn(shape, generator=generator).abs()
    return normal


def errors(rows: Tensor, scale: Tensor) -> Tensor:
    codes = (rows / scale).round().clamp(-7, 7)
    return (rows - codes * scale).square().sum(1)


def least_errors(rows: Tensor) -> Tensor:
    """Over a dense scan of scales from 0.05 to 2 times the one that fits, each refined by least squares."""
    fitting = rows.abs().amax(1, keepdim=True) / 7
    least = torch.full(rows.shape[:1], torch.inf, dtype=torch.float64)
    for share in torch.linspace(0.05, 2, 200):
        codes = (rows / (fitting * share)).round().clamp(-7, 7)
        scale = (rows * codes).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True).clamp(min=1)
        scale = torch.where(scale > 0, scale, fitting)
        least = torch.minimum(least, errors(rows, scale))
    return least


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "cauchy"])
@pytest.mark.parametrize("width", [2, 4, 9, 36, 144, 576])
def test_close_to_a_dense_scan_and_never_worse_than_the_maximum(kind: str, width: int) -> None:
    rows = sample(kind, (80, width))
    scale = solve_four_bit(rows, ClusterLayout((80, width), width)).reshape(-1, 1).double()
    found, wide = errors(rows.double(), scale), rows.double()
    assert float(found.sum()) <= 1.01 * float(least_errors(wide).sum()) + 1e-12 * float(wide.square().sum())
    by_maximum = errors(wide, wide.abs().amax(1, keepdim=True) / 7)
    assert bool((found <= by_maximum + 1e-9 * wide.square().sum(1)).all())


@pytest.mark.parametrize("magnitude", [1e-30, 1e-25, 1e-8, 1.0, 1e20, 1e30])
def test_any_magnitude(magnitude: float) -> None:
    rows = sample("gaussian", (50, 36))
    layout = ClusterLayout((50, 36), 36)
    scale = solve_four_bit(rows * magnitude, layout)
    torch.testing.assert_close(scale / magnitude, solve_four_bit(rows, layout), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_give_what_float32_gives(dtype: torch.dtype) -> None:
    weight = sample("gaussian", (10, 6, 3, 3)).to(dtype)
    layout = ClusterLayout((10, 6, 3, 3), 4)
    assert torch.equal(solve_four_bit(weight, layout), solve_four_bit(weight.float(), layout))


@pytest.mark.parametrize("kind", ["kernel", "element"])
def test_clusters_that_are_not_full_and_zero_clusters(kind: str) -> None:
    weight = sample("gaussian", (5, 6, 3, 3))
    weight[2, :4] = 0
    layout = ClusterLayout((5, 6, 3, 3), 4, kind)
    scale = solve_four_bit(weight, layout)
    assert bool((scale[2, 0] == 0).all())
    assert bool((four_bit_codes(layout.split(weight), scale)[2, 0] == 0).all())
    # The last cluster, of two channels, is solved as if it stood alone.
    alone = solve_four_bit(weight[:, 4:].contiguous(), ClusterLayout((5, 2, 3, 3), 4, kind))
    torch.testing.assert_close(scale[:, 1:], alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("block", [100, 1000])
def test_blocks_do_not_change_the_result(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sample("laplace", (12, 10, 3, 3))
    layout = ClusterLayout((12, 10, 3, 3), 4)
    whole = solve_four_bit(weight, layout)
    monkeypatch.setattr(solvers, "WEIGHTS_PER_BLOCK", block)
    torch.testing.assert_close(solve_four_bit(weight, layout), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "cauchy"])
@pytest.mark.parametrize("width", [1, 9, 147, 1024])
def test_eight_bit_exponent_is_the_best_power_of_two(kind: str, width: int) -> None:
    rows = sample(kind, (100, width))
    fitting = exponent_for(rows.abs().amax(1), 127)
    candidates = torch.stack([fitting + offset for offset in range(3, -13, -1)])
    restored = [dequantize(quantize(rows, e[:, None], SIGNED_8_BIT), e[:, None]) for e in candidates]
    scanned = torch.stack([(part.double() - rows).square().sum(1) for part in restored])
    exponent = solve_eight_bit(rows)
    assert exponent.dtype == torch.int32
    found = (dequantize(eight_bit_codes(rows, exponent), exponent[:, None]).double() - rows).square().sum(1)
    assert bool((found <= scanned.amin(0) * (1 + 1e-5)).all())


def test_eight_bit_zero_channel() -> None:
    weight = torch.zeros(2, 3, 1, 1)
    weight[1] = 0.5
    exponent = solve_eight_bit(weight)
    codes = eight_bit_codes(weight, exponent)
    assert bool((codes[0] == 0).all())
    assert torch.equal(dequantize(codes, exponent.view(-1, 1, 1, 1)), weight)
