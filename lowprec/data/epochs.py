"""The order and the randomness of an epoch: functions of (seed, epoch) alone.

No generator lives from one epoch to the next, so a run that resumes at the start of an epoch sees the same images in
the same order with the same crops, to the bit, whatever happened before, on however many workers.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DistributedSampler

__all__ = ["EpochSampler", "ShareSampler", "generator_of", "seed_of", "split_epoch"]


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed that differs wherever one of ``parts`` (purpose, seed, epoch, …) differs."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(*parts: str | int) -> torch.Generator:
    """A generator seeded by ``seed_of(*parts)``."""
    return torch.Generator().manual_seed(seed_of(*parts))


class EpochSampler(DistributedSampler):
    """Shuffled (epoch, index) pairs; the order depends on (seed, epoch) alone.

    The epoch travels with each index, so that the data set can draw the augmentation of that epoch, also in workers
    that live longer than one. Lightning calls ``set_epoch`` at the start of every epoch; other loops must do so. As a
    ``DistributedSampler`` it gives each rank its share, and Lightning leaves it in place.
    """

    def __init__(self, images: int, seed: int) -> None:
        rank, size = _rank_and_size()
        # The data set's length is all that is asked for.
        super().__init__(range(images), num_replicas=size, rank=rank, seed=seed)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        images = len(self.dataset)  # type: ignore[arg-type]
        order = torch.randperm(images, generator=generator_of("order", self.seed, self.epoch))
        # Every rank gets equally many: the first images come again at the end.
        order = order.repeat(-(-self.total_size // images))[: self.total_size]
        return iter([(self.epoch, index) for index in order[self.rank :: self.num_replicas].tolist()])


class ShareSampler(DistributedSampler):
    """This rank's share of the indices 0 to ``images`` - 1, in order: each index comes once over all ranks.

    Unlike ``DistributedSampler`` itself, which repeats indices until all shares are equally long. Being one, it is left
    in place by Lightning. A share is empty where there are fewer images than ranks.
    """

    def __init__(self, images: int) -> None:
        rank, size = _rank_and_size()
        super().__init__(range(images), num_replicas=size, rank=rank, shuffle=False)  # type: ignore[arg-type]

    def _share(self) -> range:
        return range(self.rank, len(self.dataset), self.num_replicas)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._share())

    def __iter__(self) -> Iterator[int]:
        return iter(self._share())


def _rank_and_size() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def split_epoch(indices: list[Any]) -> tuple[int, list[int]]:
    """The epoch and the image indices of a batch; plain indices (Lightning's ``overfit_batches``) are of epoch 0."""
    if isinstance(indices[0], tuple):
        return indices[0][0], [index for _, index in indices]
    return 0, indices
