"""Memory for the tensors of a training step on a CPU, which stays with the process from step to step.

An allocator for all purposes puts what waits for the backward pass between what is made and freed meanwhile, so that holes stay
open which nothing fits in: a third and more of a step's memory. Here the two kinds lie apart, and their pages are not new ones
in each step. What PyTorch's own operators give is not of this memory.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lowprec.numerics.memory import is_dense

# Bytes: of a block that tensors share, and the least that comes from here for a short time.
PIECE = 1 << 25
LEAST = 1 << 16
ALIGNMENT = 64
# How much larger memory may be than what passes needs: some of that stays, which nobody knows before.
LARGER = 3
# Placements after which memory that nobody has used since is given back: those of a few steps of a very large network.
PATIENCE = 20_000


class _Block:
    """A stretch of memory, how much of it is taken, and when some was last given to somebody, in placements."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.taken = self.used = 0
        self.alone = self._holders()

    def _holders(self) -> int:
        return sys.getrefcount(self.memory)

    def is_idle(self) -> bool:
        """Whether no tensor lies in it; each holds it."""
        return self._holders() == self.alone

    def has_room(self, size: int) -> bool:
        """Whether it has ``size`` bytes that nobody uses behind those that are taken."""
        if self.is_idle():
            self.taken = 0
        return self.taken + size <= self.size


class _Pool:
    """Blocks of memory. Of ``kept`` ones tensors take one part after the other, of ``passing`` ones all."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.placements = 0
        self.kept: list[_Block] = []
        self.passing: list[_Block] = []

    def keep(self, size: int) -> tuple[_Block, int]:
        """A block with ``size`` bytes that nobody uses, and where they begin."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        with self.lock:
            block = next((block for block in self.kept if block.has_room(size)), None)
            if block is None:
                block = _Block(max(PIECE, size))
                self.kept.insert(0, block)
            elif block is not self.kept[0]:
                # The next one will most likely fit there, too.
                self.kept.remove(block)
                self.kept.insert(0, block)
            first = block.taken
            block.taken += size
            self._note(block)
            return block, first

    def pass_on(self, size: int) -> tuple[_Block, int]:
        """The smallest idle block of ``size`` bytes or some more, and 0: where they begin."""
        with self.lock:
            sizes = range(size, LARGER * size + 1)
            fitting = (block for block in self.passing if block.size in sizes and block.is_idle())
            block = min(fitting, key=lambda block: block.size, default=None)
            if block is None:
                block = _Block(size)
                self.passing.append(block)
            self._note(block)
            return block, 0

    def _note(self, block: _Block) -> None:
        self.placements += 1
        block.used = self.placements
        if self.placements % PATIENCE == 0:
            self.release(self.placements - PATIENCE)

    def release(self, before: int | None = None) -> None:
        """Gives idle memory back to the system: what nobody has used since ``before``, or all."""
        with self.lock:
            for blocks in (self.kept, self.passing):
                old = [block for block in blocks if block.is_idle() and (before is None or block.used < before)]
                blocks[:] = [block for block in blocks if block not in old]


_pool = _Pool()


def kept_like(values: Tensor, dtype: torch.dtype | None = None, shape: Sequence[int] | None = None) -> Tensor:
    """An empty tensor for what waits for the backward pass or the optimizer, side by side with others of its kind.

    Of shape and strides of a dense tensor, or contiguous of ``shape``; ``dtype``: that of the values, or another. Elsewhere than
    on a CPU it is any new tensor.
    """
    return _place(_pool.keep, 1, values, dtype, shape)


def passing_like(values: Tensor, dtype: torch.dtype | None = None, shape: Sequence[int] | None = None) -> Tensor:
    """An empty tensor as :func:`kept_like`, for what only the next operators use: in memory that was another's just before."""
    return _place(_pool.pass_on, LEAST, values, dtype, shape)


def converted(values: Tensor, dtype: torch.dtype, empty_like: Callable[[Tensor, torch.dtype], Tensor]) -> Tensor:
    """``values`` in another dtype, or themselves; ``empty_like``: :func:`kept_like` or :func:`passing_like`."""
    return values if values.dtype == dtype else empty_like(values, dtype).copy_(values)


def release() -> None:
    """Gives back to the system what no tensor uses. The next step's pages are new ones then."""
    _pool.release()


def _place(
    find: Callable[[int], tuple[_Block, int]],
    least: int,
    values: Tensor,
    dtype: torch.dtype | None,
    shape: Sequence[int] | None,
) -> Tensor:
    dtype = values.dtype if dtype is None else dtype
    count = values.numel() if shape is None else math.prod(shape)
    size = count * dtype.itemsize
    flat = _found(find, size, dtype, count) if size >= least and _takes(values, shape) else None
    if flat is None:
        return torch.empty_like(values, dtype=dtype) if shape is None else values.new_empty(shape, dtype=dtype)
    if shape is None:
        shape, strides = values.shape, values.stride()
    else:
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    # Not a view: operators may write into it, and the memory is known as this tensor's alone.
    return torch.empty(0, dtype=dtype, device="cpu").set_(flat.untyped_storage(), 0, shape, strides)


def _takes(values: Tensor, shape: Sequence[int] | None) -> bool:
    """Whether such a tensor lies in this memory: what is compiled or traced makes up its own mind."""
    plain = values.device.type == "cpu" and type(values) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    return plain and sys.platform == "linux" and (shape is not None or is_dense(values))


def _found(find: Callable[[int], tuple[_Block, int]], size: int, dtype: torch.dtype, count: int) -> Tensor | None:
    """The elements of a place, or None where the system has no more memory, which PyTorch then says in its own words."""
    with _pool.lock:  # until a tensor holds the block, another thread would find it idle
        try:
            block, first = find(size)
        except OSError:
            return None
        return torch.frombuffer(block.memory, dtype=dtype, count=count, offset=first)
