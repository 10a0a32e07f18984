"""Kernels of weights, Triton's and those in C, give what PyTorch's operators give: scales, exponents and values, ``==``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from native_kernels import NATIVE
from torch import Tensor
from triton_interpreter import PLACES, operators_only, running

from lowprec.layers.weights import WeightQuantizer
from lowprec.numerics import triton_weights
from lowprec.numerics.clusters import ClusterLayout
from lowprec.recipe import WeightScheme

FORMATS = (torch.contiguous_format, torch.channels_last)
SHAPES = [(6, 16, 3, 3), (5, 7, 3, 3), (4, 64, 1, 1), (8, 130), (12, 1, 5, 5), (3, 20, 1, 3), (2, 300, 3, 3)]
# A matrix has no channels that could be last.
WEIGHTS = [(shape, layout) for shape in SHAPES for layout in FORMATS[: 2 if len(shape) == 4 else 1]]


@pytest.fixture(params=[*PLACES, NATIVE], scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the kernels run."""
    with running(request.param) as device:
        yield device


def moved_by_operators(
    quantizer: WeightQuantizer, weight: Tensor, moved: Tensor
) -> tuple[WeightQuantizer, Tensor, Tensor]:
    """The quantizer after one step, and the values and exponents it then gives."""
    with operators_only():
        quantizer.solve(weight, "layer")
        quantizer.descend(moved)
        return (quantizer, *quantizer.with_exponents(moved))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("layout", ["kernel", "element"])
@pytest.mark.parametrize("cluster_size", [1, 4, 64, 1000])
@pytest.mark.parametrize(("shape", "memory_format"), WEIGHTS, ids=str)
def test_a_step_and_its_values_are_those_of_operators(
    shape: tuple[int, ...],
    cluster_size: int,
    layout: str,
    bits: int,
    memory_format: torch.memory_format,
    device: str,
) -> None:
    """Weights on a grid, whose sums are exact in whatever order; among them clusters of zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-2000, 2000, shape, generator=generator) / 2048
    weight *= torch.rand(shape, generator=generator) < 0.9
    weight[0] = 0
    weight = weight.contiguous(memory_format=memory_format)
    moved = weight + torch.randint(-200, 200, shape, generator=generator) / 2048 * (weight != 0)
    scheme = WeightScheme(bits=bits, cluster_size=cluster_size, layout=layout)
    reference, values, exponents = moved_by_operators(WeightQuantizer(shape, scheme), weight, moved)

    quantizer = WeightQuantizer(shape, scheme)
    quantizer.solve(weight, "layer")
    # A module that is laid out channels_last takes its scales along.
    quantizer.to(device, memory_format=memory_format if len(shape) == 4 else torch.preserve_format)
    quantizer.descend(moved.to(device))
    for (name, buffer), expected in zip(quantizer.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer.cpu(), expected), name
    found, found_exponents = quantizer.with_exponents(moved.to(device))
    assert found.stride() == values.stride()
    assert torch.equal(found.cpu(), values)
    assert torch.equal(found_exponents.cpu(), exponents)
    with torch.autocast(device, torch.bfloat16):
        rounded = quantizer(moved.to(device))
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.cpu().float(), values)  # every bit of them


@pytest.mark.parametrize(("shape", "memory_format"), WEIGHTS, ids=str)
def test_8_bit_weights_are_those_of_operators(
    shape: tuple[int, ...], memory_format: torch.memory_format, device: str
) -> None:
    """Channels of all magnitudes, of zeros, and of one large weight among small ones, which is worth clipping."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-2000, 2000, shape, generator=generator) / 2048
    weight *= 2.0 ** torch.randint(-20, 5, (len(weight), *[1] * (len(shape) - 1)), generator=generator)
    weight[0] = 0
    weight[1].view(-1)[0] = 40 * weight[1].abs().max()
    weight = weight.contiguous(memory_format=memory_format)
    quantizer = WeightQuantizer(shape, WeightScheme(bits=8))
    with operators_only():
        values, exponents = quantizer.with_exponents(weight)
    found, found_exponents = quantizer.with_exponents(weight.to(device))
    assert found.stride() == values.stride()
    assert torch.equal(found_exponents.cpu(), exponents)
    assert torch.equal(found.cpu(), values)
    with torch.autocast(device, torch.bfloat16):
        rounded = quantizer(weight.to(device))
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.cpu().float(), values)  # every bit of them


def test_8_bit_weights_that_are_not_dense(device: str) -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))[:, 3:12]
    quantizer = WeightQuantizer((6, 9), WeightScheme(bits=8))
    with operators_only():
        values, exponents = quantizer.with_exponents(weight)
    found, found_exponents = quantizer.with_exponents(weight.to(device))
    assert torch.equal(found.cpu(), values)
    assert torch.equal(found_exponents.cpu(), exponents)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("cluster_size", [4, 64])
@pytest.mark.parametrize("bits", [2, 4])
def test_sums_of_any_weights_are_the_same_in_whatever_order(
    bits: int, cluster_size: int, memory_format: torch.memory_format, device: str
) -> None:
    weight = torch.randn(16, 64, 3, 3, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=memory_format
    )
    scheme = WeightScheme(bits=bits, cluster_size=cluster_size)
    reference, values, exponents = moved_by_operators(WeightQuantizer(tuple(weight.shape), scheme), weight, weight)
    quantizer = WeightQuantizer(tuple(weight.shape), scheme)
    quantizer.solve(weight, "layer")
    quantizer.to(device).descend(weight.to(device))
    assert torch.equal(quantizer.scale.cpu(), reference.scale)
    found, found_exponents = quantizer.with_exponents(weight.to(device))
    assert torch.equal(found.cpu(), values)
    assert torch.equal(found_exponents.cpu(), exponents)


def test_what_the_kernels_do_not_take_goes_to_operators(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two planes, and clusters that no program holds."""
    assert triton_weights.fits(ClusterLayout((4, 910, 3, 3), 910))
    assert not triton_weights.fits(ClusterLayout((4, 911, 3, 3), 911))
    for kernel in ("descend", "quantize_weight"):
        monkeypatch.delattr(triton_weights, kernel)
    weight = torch.randn(4, 911, 3, 3, generator=torch.Generator().manual_seed(0), device="cpu")
    for scheme in (WeightScheme(planes=2), WeightScheme(cluster_size=911)):
        quantizer = WeightQuantizer(tuple(weight.shape), scheme)
        quantizer.solve(weight, "layer")
        quantizer.to(device).descend(weight.to(device))
        assert quantizer.with_exponents(weight.to(device))[0].shape == weight.shape


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("channels", [8, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_nan_is_not_lost(bits: int, channels: int, memory_format: torch.memory_format, device: str) -> None:
    """A training that diverges has to be seen to."""
    shape = (3, channels, 3, 3)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
    quantizer = WeightQuantizer(shape, WeightScheme(bits=bits, cluster_size=4))
    quantizer.solve(weight, "layer")
    quantizer.to(device)
    weight[1, 5, 2, 0] = torch.nan
    quantizer.descend(weight.to(device))
    values = quantizer.with_exponents(weight.to(device))[0].cpu()
    assert values[1, 5, 2, 0].isnan()
    assert values[[0, 2]].isfinite().all()
