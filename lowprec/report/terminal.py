"""Where a run speaks."""

from __future__ import annotations

import sys

from rich.console import Console


def create_console() -> Console:
    """The terminal, or a plain stream 120 characters wide where there is none; nothing but tables is cut into lines."""
    return Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True, highlight=False)
