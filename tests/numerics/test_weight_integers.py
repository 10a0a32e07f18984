"""Weights and the integers that they are multiples of give each other, in C and by operators."""

from __future__ import annotations

import pytest
import torch
from native_kernels import NATIVE

from lowprec.numerics import weight_integers
from lowprec.numerics.fixed_point import MAXIMUM_EXPONENT, MINIMUM_EXPONENT
from lowprec.numerics.weight_integers import integers_of_weight, weight_of_integers

SHAPES = [(7, 5, 3, 3), (300, 260), (1, 64, 1, 1), (64, 1, 3, 3), (3, 0)]


@pytest.fixture(params=["operators", NATIVE])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "operators":
        monkeypatch.setattr(weight_integers, "runs_native", lambda tensor: False)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back(
    shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype, place: str
) -> None:
    """All integers, and the first and last exponents."""
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    if len(shape) == 4:
        integers = integers.contiguous(memory_format=memory_format)
    exponent = torch.randint(-12, 3, shape[:1], generator=generator, dtype=torch.int32)
    exponent[0], exponent[-1] = MINIMUM_EXPONENT, MAXIMUM_EXPONENT
    wanted = (integers.double() * 2.0 ** exponent.double().view(-1, *[1] * (len(shape) - 1))).to(dtype)
    weight = weight_of_integers(integers, exponent, dtype)
    assert weight.dtype == dtype
    assert weight.stride() == integers.stride()
    assert torch.equal(weight, wanted)
    found = integers_of_weight(weight, exponent)
    assert found.dtype == torch.int8
    assert found.stride() == weight.stride()
    assert torch.equal(found, integers)


def test_weights_with_gaps_or_output_channels_inside(place: str) -> None:
    integers = torch.arange(-60, 60, dtype=torch.int8).view(6, 20)
    exponent = torch.tensor([-3, 2], dtype=torch.int32)
    for part in (integers[:2, 3:9], integers.t()[:2], integers[::3]):
        weight = weight_of_integers(part, exponent, torch.float32)
        assert torch.equal(weight, part * torch.tensor([[0.125], [4.0]]))
        assert torch.equal(integers_of_weight(weight, exponent), part)
        spread = torch.stack([weight, -weight], dim=-1)[..., 0]
        assert torch.equal(integers_of_weight(spread, exponent), part)
