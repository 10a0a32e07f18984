"""Products of codes on tensor cores are the exact ones, rounded once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton_interpreter import PLACES, running

from lowprec.numerics.triton_products import multiply_codes


@pytest.fixture(params=PLACES, scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the kernel runs."""
    with running(request.param) as device:
        yield device


def exact(values: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Σ q·c in integers, in float32, times powers of two; the bias added in float32; in ``dtype``."""
    product = values.double() @ weight.double().T
    total = product.float()
    return (total if bias is None else total + bias).to(dtype)


@pytest.mark.parametrize("shape", [(128, 64, 128), (1, 1, 1), (130, 70, 30), (17, 300, 129)], ids=str)
@pytest.mark.parametrize("offset", [0, 128])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_exact(
    dtype: torch.dtype, biased: bool, offset: int, shape: tuple[int, int, int], device: str
) -> None:
    """Codes of the whole range, signed and unsigned; exponents of each output; sizes that fill no block."""
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(offset - 128, offset + 128, (rows, inputs), generator=generator)
    codes[0, 0] = offset + 127
    integers = torch.randint(-128, 128, (outputs, inputs), generator=generator)
    exponents = torch.randint(-20, 5, (outputs,), generator=generator, dtype=torch.int32)
    values = (codes * 2.0**-7).to(dtype)
    weight = integers * 2.0 ** exponents[:, None]
    bias = torch.randn(outputs, generator=generator) if biased else None
    exponent = torch.tensor(-7, dtype=torch.int32)
    given = [None if tensor is None else tensor.to(device) for tensor in (values, weight, bias, exponent, exponents)]
    given[1] = weight.to(device, dtype)
    found = torch.empty(rows, outputs, dtype=dtype, device=device)
    multiply_codes(*given, offset, found)  # type: ignore[arg-type]
    assert torch.equal(found.cpu(), exact(values, weight, bias, dtype))


def test_rows_may_lie_anywhere(device: str) -> None:
    """A channels-last image is a matrix of its positions; a transposed one is read as it lies."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (40, 24), generator=generator).float()
    weight = torch.randint(-64, 65, (24, 8), generator=generator).float()
    zero, zeros = torch.tensor(0, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    transposed = values.T.contiguous().T
    assert transposed.stride() == (1, 40)
    found = torch.empty(40, 8, device=device)
    multiply_codes(transposed.to(device), weight.T.to(device), None, zero.to(device), zeros.to(device), 128, found)
    assert torch.equal(found.cpu(), values @ weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_spoils_its_row_or_column(dtype: torch.dtype, device: str) -> None:
    """Codes are integers, which have no NaN: a training that diverges has to be seen to."""
    values, weight = torch.ones(5, 70, dtype=dtype), torch.ones(3, 70, dtype=dtype)
    values[1, 69], weight[2, 0] = torch.nan, torch.nan
    zero, zeros = torch.tensor(0, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    out = torch.empty(5, 3, dtype=dtype, device=device)
    given = [tensor.to(device) for tensor in (values, weight, zero, zeros)]
    multiply_codes(given[0], given[1], None, given[2], given[3], 128, out)
    wanted = torch.full((5, 3), 70.0, dtype=dtype)
    wanted[1], wanted[:, 2] = torch.nan, torch.nan
    torch.testing.assert_close(out.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


def test_no_rows(device: str) -> None:
    nothing, weight = torch.zeros(0, 4, device=device), torch.zeros(3, 4, device=device)
    zeros = torch.zeros(3, dtype=torch.int32, device=device)
    out = torch.empty(0, 3, device=device)
    multiply_codes(nothing, weight, None, zeros[0], zeros, 0, out)
    assert out.shape == (0, 3)
