"""Where data sets come from, and what is said when they cannot be had."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

__all__ = ["DataError", "cache_folder", "download"]

# A machine whose network swallows packets answers within this time, not after minutes.
CONNECTION_TIMEOUT_SECONDS = 20.0

Downloaded = TypeVar("Downloaded")


class DataError(RuntimeError):
    """A data set is missing, damaged or laid out wrongly; the message names the file and what to do."""

    def __str__(self) -> str:
        # A loading process hands its error on as text, with the traceback of that process before it.
        return super().__str__().rpartition(f"{__name__}.{type(self).__name__}: ")[2].rstrip()


def cache_folder() -> Path:
    """Where downloads are kept: ``$XDG_CACHE_HOME/lowprec`` or ``~/.cache/lowprec``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowprec"


def download(fetch: Callable[[], Downloaded], what: str, instead: str) -> Downloaded:
    """Call ``fetch``, which reads files and downloads those that are missing.

    Raises:
        DataError: the download failed; the message says ``what`` is missing and what to do ``instead``.
    """
    try:
        with _connection_timeout():
            return fetch()
    except (OSError, RuntimeError) as error:
        raise DataError(f"{what} and could not be downloaded ({error}).\n{instead}") from error


@contextmanager
def _connection_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECTION_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
