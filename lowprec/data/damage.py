"""The photographs of a training that cannot be decoded: counted, named, and no more than allowed."""

import logging
import multiprocessing
from collections.abc import Callable

from lowprec.data.sources import DataError

__all__ = ["DamagedImages"]

LISTED = 10
UNUSED = -1

logger = logging.getLogger(__name__)


class DamagedImages:
    """The images that could not be decoded, each counted once, over all processes that load for this one.

    Args:
        limit: how many there may be.
        name: where the image of an index lies.
    """

    def __init__(self, limit: int, name: Callable[[int], str]) -> None:
        self.limit = limit
        self.name = name
        # Shared with the loading processes; the one more is that which goes beyond the limit.
        self._indices = multiprocessing.Array("q", [UNUSED] * (limit + 1))

    @property
    def indices(self) -> list[int]:
        """In the order in which they were found."""
        return [index for index in self._indices[:] if index != UNUSED]

    def add(self, index: int, reason: str) -> None:
        """Count the image, and warn of it the first time.

        Raises:
            DataError: there are more than the limit; the message lists the first of them.
        """
        with self._indices.get_lock():
            found = self.indices
            if index in found:
                return
            if len(found) <= self.limit:
                self._indices[len(found)] = index
                found.append(index)
        if len(found) > self.limit:
            listed = [f"  {self.name(damaged)}" for damaged in found[:LISTED]]
            listed += ["  …"] if len(found) > LISTED else []
            raise DataError(
                f"more than data.max_corrupted={self.limit} training images cannot be decoded (the last one: {reason}); "
                "replace or delete them, or raise data.max_corrupted:\n" + "\n".join(listed)
            )
        logger.warning(
            "%s cannot be decoded (%s): another image takes its place (%d of at most data.max_corrupted=%d)",
            self.name(index),
            reason,
            len(found),
            self.limit,
        )
