"""Max pooling in training: PyTorch's values and gradients, with less kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowprec
from lowprec.layers import QuantizedMaxPool2d

POOLS = [
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d(2),
    nn.MaxPool2d((3, 2), (1, 2), (1, 0), ceil_mode=True),
    nn.MaxPool2d(3, 1, 1, dilation=(1, 2)),
]
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
FORMATS = (torch.contiguous_format, torch.channels_last)


def with_ties(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """Few values, so that the first of several largest ones has to be found again."""
    values = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0))
    return values.to(dtype).contiguous(memory_format=memory_format).requires_grad_()


def step(pool: nn.Module, values: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Result, gradient, and what was kept for the latter."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    values.grad = None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = pool(values)
    weights = torch.arange(result.numel(), dtype=result.dtype, device=result.device).remainder_(17).view(result.shape)
    (result * weights).sum().backward()
    assert values.grad is not None
    return result, values.grad, kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_values_and_gradients_are_pytorchs(
    pool: nn.MaxPool2d, dtype: torch.dtype, memory_format: torch.memory_format, device: str
) -> None:
    values = with_ties((2, 5, 13, 10), dtype, memory_format).detach().to(device).requires_grad_()
    result, gradient, _ = step(pool, values)
    found, found_gradient, kept = step(QuantizedMaxPool2d.of(pool), values)
    assert torch.equal(found, result)
    assert found.stride() == result.stride()
    assert torch.equal(found_gradient, gradient)
    assert [tensor.dtype for tensor in kept] == [torch.int16]
    assert kept[0].shape == result.shape


@pytest.mark.parametrize(("shape", "kept"), [((1, 1, 128, 256), torch.int16), ((1, 1, 128, 257), torch.int32)])
def test_every_place_fits(shape: tuple[int, ...], kept: torch.dtype) -> None:
    """The maximum is the image's last pixel."""
    values = torch.arange(shape[2] * shape[3], dtype=torch.float32).view(shape).requires_grad_()
    pool = nn.MaxPool2d(shape[2:])
    _, gradient, _ = step(pool, values)
    _, found, (tensor,) = step(QuantizedMaxPool2d.of(pool), values)
    assert tensor.dtype == kept
    assert torch.equal(found, gradient)


def test_a_prepared_model_pools_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), POOLS[2], nn.Flatten(), nn.Linear(4 * 6 * 3, 2)).eval()
    batch = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    qmodel = lowprec.prepare(model, "w2a8_n4", batch)
    (pool,) = (module for module in qmodel.modules() if isinstance(module, nn.MaxPool2d))
    assert isinstance(pool, QuantizedMaxPool2d)
    assert str(pool) == str(POOLS[2]).replace("MaxPool2d", "QuantizedMaxPool2d")


@pytest.mark.parametrize("shape", [(2, 5, 13, 10), (5, 13, 10)])
def test_where_no_gradient_is_wanted_or_code_is_compiled_it_is_pytorchs(shape: tuple[int, ...]) -> None:
    values = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).float()
    pool = QuantizedMaxPool2d.of(POOLS[0])
    assert not pool(values).requires_grad
    assert torch.equal(pool(values), POOLS[0](values))
    values.requires_grad_()
    with torch.no_grad():
        assert torch.equal(pool(values), POOLS[0](values))
    wanted = step(POOLS[0], values)[:2]
    for found in (step(pool, values), step(torch.compile(pool, backend="aot_eager", fullgraph=True), values)):
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
