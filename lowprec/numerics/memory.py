"""How a tensor's elements lie in memory, and whether that memory is somebody else's, too."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_dense(tensor: Tensor) -> bool:
    """Whether it fills a stretch of memory."""
    return tensor.is_contiguous() or is_channels_last(tensor)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the channels of a position lie side by side, [B, C, H, W], and not also in the usual order."""
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def in_memory_order(tensor: Tensor) -> Tensor:
    """All elements [N] as they lie in memory, without a copy; of one that is not dense, a copy in the usual order."""
    if not is_dense(tensor):
        return tensor.reshape(-1)
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


class Holders(NamedTuple):
    """How many hold a tensor in C++, in Python, and its storage."""

    tensor: int
    object: int
    storage: int


def holders(tensor: Tensor) -> Holders | None:
    """Of a tensor on the CPU; None where PyTorch cannot tell. To be called with a variable of the caller."""
    of_tensor = getattr(tensor, "_use_count", None)
    of_storage = getattr(torch._C, "_storage_Use_Count", None)
    if of_tensor is None or of_storage is None:
        return None
    return Holders(of_tensor(), sys.getrefcount(tensor), of_storage(tensor.untyped_storage()._cdata))


@cache
def holders_of_unshared() -> Holders | None:
    """What :func:`holders` says in a backward function of its gradient when nobody else holds it: found out by trying.

    A gradient that another branch of the graph, a hook, a view or the caller holds has one holder more. None where PyTorch
    cannot tell, or a debugger is at work, which holds what it likes.
    """
    if sys.gettrace() is not None or sys.getprofile() is not None:
        return None
    with torch.enable_grad():
        _Probe.apply(torch.zeros(2, requires_grad=True)).mul(2).sum().backward()
    return _Probe.found


class _Probe(torch.autograd.Function):
    """The identity, whose backward function counts who holds its gradient. Gradient: unchanged."""

    found: Holders | None = None

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _Probe.found = holders(gradient)
        return gradient
