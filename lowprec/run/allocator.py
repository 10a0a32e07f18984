"""Memory that is freed on a CPU stays with the process, until it is given back."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

from lowprec.numerics import pools

# glibc's names and numbers, of malloc.h. Whoever sets one of these has thought about it.
VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Makes glibc's allocator keep large tensors' memory for the next ones; returns whether it does.

    By default each goes back to the system when it is freed, and comes as pages of zeros that are faulted in one by one,
    which costs as much as many a pass over it. Peak memory may be higher. Does nothing with another C library, or where the
    environment tunes the allocator itself.
    """
    mallopt = _function("mallopt")
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def give_back_freed_memory() -> None:
    """Returns to the system what is held and nobody uses: once, between stages that need different memory.

    That of training steps (:mod:`lowprec.numerics.pools`) and of glibc's allocator, of the latter nothing where
    :func:`keep_freed_memory` does nothing. What is allocated next is faulted in again.
    """
    pools.release()
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    """One of glibc's, or None with another C library, or where the environment tunes the allocator itself."""
    if sys.platform != "linux" or any(variable in os.environ for variable in VARIABLES):
        return None
    return getattr(ctypes.CDLL(None), name, None)
