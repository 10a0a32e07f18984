"""The fast backend of the integer executor: the same codes on oneDNN's integer kernels."""

from __future__ import annotations

from lowprec.integer.fast.model import FastModel

__all__ = ["FastModel"]
