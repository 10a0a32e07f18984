"""A test file once more, in a process whose kernels know no more than AVX2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LIMITS = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
PROGRAM = """
import pytest, sys, torch
from lowprec.numerics import kernels
assert "AVX2" in torch.backends.cpu.get_cpu_capability(), torch.backends.cpu.get_cpu_capability()
assert not kernels.convolves_exactly("dense", 128), "pairs of products do not saturate here"
assert kernels.convolves_exactly("dense", 64)
sys.exit(pytest.main(["-q", "-p", "no:xdist", "-o", "addopts=", "-m", "not slow", sys.argv[1]]))
"""


def assert_passes_with_avx2(file: str) -> None:
    """All tests of ``file`` that are not slow pass there."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", PROGRAM, file]
    environment = {**os.environ, **LIMITS, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
