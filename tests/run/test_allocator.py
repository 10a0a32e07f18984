"""Freed memory stays with the process, page faults of a real one are counted, and goes back when it is told to."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from lowprec.numerics import pools
from lowprec.run.allocator import VARIABLES, give_back_freed_memory

FAULTS = """
import ctypes, resource, sys
from lowprec.run.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray(size)  # zeroed by the allocator, as large tensors are written to
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(1 << 26)
print(kept, faults(1 << 26))
"""


def page_faults(mode: str, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", FAULTS, mode]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_large_blocks_are_not_faulted_in_again() -> None:
    kept, after = page_faults("keep")
    assert kept == "True"
    _, before = page_faults("as it is")
    # A block of 64 MiB has 32 huge or 16,384 small pages.
    assert before >= 20 * 32
    assert after < before / 20


@pytest.mark.parametrize("variable", VARIABLES)
def test_an_allocator_that_the_user_tuned_is_left_alone(variable: str) -> None:
    assert page_faults("keep", **{variable: "1000000"})[0] == "False"


GIVEN_BACK = """
from pathlib import Path
from lowprec.run.allocator import give_back_freed_memory, keep_freed_memory
keep_freed_memory()

def resident():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) // 1024

blocks = [bytearray(1 << 16) for _ in range(3200)]  # 200 MiB
last = bytearray(1 << 16)  # in use, above them
blocks.clear()
before = resident()
give_back_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library has no malloc_trim")
def test_holes_are_given_back() -> None:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], env=clean, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such memory elsewhere")
def test_idle_memory_of_training_steps_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pools._Pool()
    monkeypatch.setattr(pools, "_pool", pool)
    held = pools.kept_like(torch.empty(1 << 20))
    pools.passing_like(held)
    give_back_freed_memory()
    assert (len(pool.kept), len(pool.passing)) == (1, 0)
