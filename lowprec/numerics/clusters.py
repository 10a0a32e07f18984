"""Cluster layouts: which weights of a convolution or linear layer share one scale.

Shapes: a weight is [O, I, *kernel] (I: input channels per group; a linear layer has no kernel axes). Split into clusters
it is w_OGNP: O output channels, G clusters along the input channels, N members, P kernel positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor
from torch.nn import functional

# Neighbours in memory that fill vector registers.
LONG_RUN = 16


@dataclass(frozen=True)
class ClusterLayout:
    """The clusters of one weight tensor.

    weight_shape: [O, I, *kernel]. cluster_size: N adjacent input channels. kind: ``kernel`` – N whole kernels share a
    scale (arXiv 1701.08978); ``element`` – the N weights at one kernel position do (arXiv 1705.01462). The last cluster
    is smaller where N does not divide I. With one input channel per group (depthwise) a cluster is the kernel in both.
    """

    weight_shape: tuple[int, ...]
    cluster_size: int
    kind: str = "kernel"

    @property
    def members(self) -> int:
        """N: input channels of a full cluster, at most all of them."""
        return min(self.cluster_size, self.weight_shape[1])

    @property
    def groups(self) -> int:
        """G: clusters along the input channels."""
        return ceil(self.weight_shape[1] / self.members)

    @property
    def positions(self) -> int:
        """P: positions of the kernel; 1 for a linear layer."""
        return prod(self.weight_shape[2:])

    @property
    def shares_positions(self) -> bool:
        """Whether all kernel positions of a cluster share its scale."""
        return self.kind == "kernel" or self.weight_shape[1] == 1

    @property
    def scale_shape(self) -> tuple[int, int, int, int]:
        """Shape of the scales, which broadcasts against w_OGNP: [O, G, 1, 1], or [O, G, 1, P] in layout ``element``."""
        return (self.weight_shape[0], self.groups, 1, 1 if self.shares_positions else self.positions)

    @property
    def shared_axes(self) -> tuple[int, ...]:
        """The axes of w_OGNP along which a cluster lies."""
        return (2, 3) if self.shares_positions else (2,)

    @property
    def weights_per_cluster(self) -> int:
        """Weights of a full cluster: N·P, or N in layout ``element``."""
        return self.members * (self.positions if self.shares_positions else 1)

    @property
    def clusters(self) -> int:
        """Number of scales of the whole weight tensor."""
        return prod(self.scale_shape)

    def split(self, weight: Tensor) -> Tensor:
        """[O, I, *kernel] -> w_OGNP, the last cluster filled up with zeros; a view where N divides I."""
        w_OIP = weight.reshape(weight.shape[0], weight.shape[1], self.positions)
        missing = self.groups * self.members - weight.shape[1]
        if missing:
            w_OIP = functional.pad(w_OIP, (0, 0, 0, missing))
        return w_OIP.reshape(weight.shape[0], self.groups, self.members, self.positions)

    def split_for_arithmetic(self, weight: Tensor) -> Tensor:
        """As :meth:`split`; where a cluster's members lie in short runs, a copy in which clusters lie side by side.

        Sums over a handful of members, and products with one scale, are several times quicker for many clusters at once.
        """
        w_OGNP = self.split(weight)
        run = self.members * (self.positions if w_OGNP.stride(3) == 1 else 1)
        if run >= LONG_RUN:
            return w_OGNP
        return w_OGNP.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)

    def merge(self, w_OGNP: Tensor) -> Tensor:
        """The inverse of :meth:`split`: w_OGNP -> [O, I, *kernel]."""
        w_OIP = w_OGNP.reshape(w_OGNP.shape[0], self.groups * self.members, self.positions)
        return w_OIP[:, : self.weight_shape[1]].reshape(-1, *self.weight_shape[1:])

    def merge_into(self, w_OGNP: Tensor, weight: Tensor) -> None:
        """Writes what :meth:`merge` gives into ``weight`` [o, I, *kernel], of all output channels or of some."""
        if self.groups * self.members == self.weight_shape[1]:
            self.split(weight).copy_(w_OGNP)
        else:
            weight.copy_(self.merge(w_OGNP))

    def members_of_clusters(self, device: torch.device | str = "cpu") -> Tensor:
        """Input channels in each cluster [G], int64: N, and what is left in the last."""
        counts = torch.full((self.groups,), self.members, dtype=torch.int64, device=device)
        counts[-1] = self.weight_shape[1] - (self.groups - 1) * self.members
        return counts

    def rows(self, w_OGNP: Tensor) -> Tensor:
        """w_OGNP -> one row a cluster, w_CNP [C, N, P] with P = 1 in layout ``element``."""
        if self.shares_positions:
            return w_OGNP.reshape(-1, self.members, self.positions)
        return w_OGNP.permute(0, 1, 3, 2).reshape(-1, self.members, 1)

    def members_of_rows(self, device: torch.device | str = "cpu") -> Tensor:
        """Input channels in each row of :meth:`rows`, [C], int64."""
        output_channels, groups, _, positions = self.scale_shape
        counts = self.members_of_clusters(device).view(1, groups, 1).expand(output_channels, groups, positions)
        return counts.reshape(-1)


def with_positions(weight: Tensor) -> Tensor:
    """[O, I, *kernel] -> [O, I, P], without a gradient; a view where the kernel's axes lie one behind the other."""
    return weight.detach().flatten(2) if weight.dim() > 2 else weight.detach().unsqueeze(2)
