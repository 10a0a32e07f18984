"""How much a training step does, in operator calls and in bytes that they write: a change that doubles the work is seen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from native_kernels import needs_compiler
from networks import awkward, images
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowprec
from lowprec.layers import weights
from lowprec.models.cifar_resnet import CifarResNet
from lowprec.numerics import native_norms, straight_through

BATCH = images(1, 32, (1, 28, 28))
LAYERS = 10
# What only says where a tensor's memory is.
MEMORY = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::set_")


class Work(TorchDispatchMode):
    """Counts calls of operators that compute, and the bytes of results and of memory for kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        given = {leaf.data_ptr() for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        is_view = any(leaf.data_ptr() in given for leaf in results) and not function._schema.is_mutable
        if not is_view:
            self.calls += function._schema.name not in MEMORY
            # Of an operator that writes where it is told to, the memory has been counted.
            told = any(argument.is_out for argument in function._schema.arguments)
            self.bytes += 0 if told else sum(leaf.nbytes for leaf in results)
        return result


def work(model: nn.Module) -> Work:
    """Of the second step, so that nothing is counted that happens once."""
    model.train()
    for _ in range(2):
        counted = Work()
        with counted:
            nn.functional.cross_entropy(model(BATCH), torch.arange(len(BATCH)) % 10).backward()
        model.zero_grad()
    return counted


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return awkward(CifarResNet(8, num_classes=10, in_channels=1, width=16), seed=3, dead_channels=False)


@pytest.mark.parametrize(
    ("recipe", "calls", "written"), [("w2a8_n4", 99, 2.17), ("w4a8_n4", 95, 2.18), ("w8a8", 108, 2.24)]
)
def test_a_step_on_operators_does_no_more_than_it_did(
    recipe: str, calls: int, written: float, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits lie a tenth above what was counted. calls: a layer, above the plain step's; written: bytes to the plain step's."""
    for user in (straight_through, native_norms, weights):
        monkeypatch.setattr(user, "runs_native", lambda tensor: False)
    check(recipe, calls, written, model)


@needs_compiler
@pytest.mark.parametrize("recipe", ["w2a8_n4", "w4a8_n4", "w8a8"])
def test_a_step_on_kernels_does_no_more_than_it_did(recipe: str, model: nn.Module) -> None:
    """What the kernels write, in memory that is there, is not counted."""
    check(recipe, calls=0.3, written=0.9, model=model)


def check(recipe: str, calls: int, written: float, model: nn.Module) -> None:
    qmodel = lowprec.prepare(model, recipe, BATCH[:2])
    lowprec.calibrate(qmodel, [BATCH])
    plain, quantized = work(copy.deepcopy(model)), work(qmodel)
    assert plain.calls > 77
    assert (quantized.calls - plain.calls) / LAYERS < calls
    assert quantized.bytes / plain.bytes < written
