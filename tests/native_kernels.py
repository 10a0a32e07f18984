"""Marks of tests that need the kernels in C."""

from __future__ import annotations

import pytest

from lowprec.numerics.native.library import is_built

needs_compiler = pytest.mark.skipif(not is_built(), reason="no C compiler, or no AVX2")
NATIVE = pytest.param("native", marks=needs_compiler)
