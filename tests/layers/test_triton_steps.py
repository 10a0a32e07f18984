"""A training step on the Triton kernels is the one on PyTorch's operators: loss, gradients, scales and batch norms, ``==``."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from networks import images
from torch import Tensor, nn
from triton_interpreter import PLACES, operators_only, running

import lowprec
from lowprec.layers.saved_codes import saved_as_codes
from lowprec.models import create_model
from lowprec.numerics import triton_activations

BATCH = images(1, 2, (1, 12, 12))
LABELS = torch.arange(2)


def prepared(recipe: str, memory_format: torch.memory_format) -> nn.Module:
    """Weights on a grid, so that sums over clusters are exact in whatever order; they have moved since they were solved."""
    torch.manual_seed(0)
    model = create_model("cifar_resnet8", in_channels=1, num_classes=4, width=8).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2048).round_().div_(2048)
    qmodel = lowprec.prepare(model, recipe, BATCH[:2])
    lowprec.calibrate(qmodel, [BATCH])
    with torch.no_grad():
        for parameter in qmodel.parameters():
            if parameter.dim() > 1:
                parameter += torch.randint(-99, 99, parameter.shape) / 2048
    return qmodel.train().to(memory_format=memory_format)  # type: ignore[call-overload,no-any-return]


def step(qmodel: nn.Module, keep_codes: bool = False) -> list[Tensor]:
    """Loss, gradients and buffers."""
    device = next(qmodel.parameters()).device
    with saved_as_codes(qmodel, keep_codes):
        logits = qmodel(BATCH.to(device))
    loss = nn.functional.cross_entropy(logits, LABELS.to(device))
    loss.backward()
    gradients = [parameter.grad for parameter in qmodel.parameters()]
    return [loss.detach(), *[gradient for gradient in gradients if gradient is not None], *qmodel.buffers()]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("recipe", ["w2a8_n4", "w4a8_n4", "w2a8_n64", "w8a8"])
def test_a_step_is_that_of_operators(recipe: str, memory_format: torch.memory_format, place: str) -> None:
    qmodel = prepared(recipe, memory_format)
    with running(place) as device, torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        fused, plain = copy.deepcopy(qmodel).to(device), copy.deepcopy(qmodel).to(device)
        found = step(fused)
        with operators_only():
            wanted = step(plain)
    assert len(found) == len(wanted) > 30
    assert [place for place, (a, b) in enumerate(zip(found, wanted, strict=True)) if not torch.equal(a, b)] == []


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_step_that_keeps_codes_is_that_of_operators(
    bfloat16: bool, memory_format: torch.memory_format, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    qmodel = prepared("w2a8_n4", memory_format)
    written: list[str] = []
    with running(place) as device, torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        for name in ("write_codes", "write_values"):
            kernel = getattr(triton_activations, name)
            counted = partial(lambda name, kernel, *given: written.append(name) or kernel(*given), name, kernel)
            monkeypatch.setattr(triton_activations, name, counted)
        fused, plain = copy.deepcopy(qmodel).to(device), copy.deepcopy(qmodel).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            found = step(fused, keep_codes=True)
            with operators_only():
                wanted = step(plain)
        monkeypatch.undo()
    assert len(found) == len(wanted) > 30
    assert [place for place, (a, b) in enumerate(zip(found, wanted, strict=True)) if not torch.equal(a, b)] == []
    assert written.count("write_values") >= written.count("write_codes") > 5
