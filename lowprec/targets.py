"""Where a file is to be written: looked at before the work that it takes to make it."""

from __future__ import annotations

import errno
from pathlib import Path


def writable_path(path: str | Path) -> Path:
    """``path``, if a file can have this name.

    Raises:
        IsADirectoryError: it is a folder. FileNotFoundError: its folder does not exist.
    """
    given = Path(path)
    if given.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder; give the name of a file in it", str(path))
    if not given.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"there is no folder {given.parent} to write to; make it first", str(path)
        )
    return given
