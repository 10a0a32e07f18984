"""Runs the package's Triton kernels without a GPU: in Triton's interpreter, on tensors of the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from lowprec.layers import lookup, tensor_core_product, weights
from lowprec.numerics import (
    native_norms,
    straight_through,
    triton_activations,
    triton_arithmetic,
    triton_products,
    triton_weights,
    weight_integers,
)

# In the order in which they use each other.
MODULES = (triton_arithmetic, triton_activations, triton_products, triton_weights)
USERS = (straight_through, weights, tensor_core_product)
# Where Triton's kernels run: the interpreter anywhere, and a GPU where there is one.
PLACES = ["interpreter", *([pytest.param("gpu", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@contextmanager
def running(place: str) -> Iterator[str]:
    """The device whose tensors the kernels take within it."""
    if place in ("gpu", "native"):
        yield "cuda" if place == "gpu" else "cpu"
        return
    with interpreted():
        yield "cpu"


@contextmanager
def _unchanged_language() -> Iterator[None]:
    """The interpreter leaves functions of its own behind in Triton's modules: afterwards they are as they were."""
    owners = (tl, tl.core, tl.standard, tl.math, tl.core.tensor, tl.core.dtype, tl.core.constexpr)
    before = [dict(vars(owner)) for owner in owners]
    try:
        yield
    finally:
        for owner, contents in zip(owners, before, strict=True):
            for name, value in contents.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)


@contextmanager
def interpreted() -> Iterator[None]:
    """Within it, the package's own kernels take tensors of the CPU too."""

    def everywhere(tensor: Tensor) -> bool:
        return True

    def nowhere(tensor: Tensor) -> bool:
        return False

    with _unchanged_language(), pytest.MonkeyPatch.context() as patch:
        # Read where a kernel is defined.
        patch.setenv("TRITON_INTERPRET", "1")
        # Triton's own functions were defined when torch imported them.
        for module in (tl, tl.standard, tl.core, tl.math):
            for name, function in list(vars(module).items()):
                if isinstance(function, JITFunction):
                    patch.setattr(module, name, InterpretedFunction(function.fn))
        for module in MODULES:
            importlib.reload(module)
        for user in USERS:
            patch.setattr(user, "runs_triton", everywhere)
        patch.setattr(native_norms, "runs_native", nowhere)
        patch.setattr(tensor_core_product, "multiplies", lambda device: True)
        try:
            yield
        finally:
            patch.undo()
            for module in MODULES:
                importlib.reload(module)


@contextmanager
def operators_only() -> Iterator[None]:
    """Within it, no kernel of the package's is used, neither Triton's nor one in C."""

    def nowhere(tensor: Tensor) -> bool:
        return False

    with pytest.MonkeyPatch.context() as patch:
        for user in USERS:
            patch.setattr(user, "runs_triton", nowhere)
        for user in (straight_through, native_norms, weights, lookup, weight_integers):
            patch.setattr(user, "runs_native", nowhere)
        yield
