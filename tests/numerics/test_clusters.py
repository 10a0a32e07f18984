"""Cluster layouts: every weight in exactly one cluster, for every shape of layer, divisible or not."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.numerics.clusters import ClusterLayout

SHAPES = [(3, 4), (3, 7), (2, 5, 3), (4, 6, 3, 3), (4, 5, 1, 1), (6, 1, 3, 3), (2, 3, 5, 2), (1, 1)]


@pytest.mark.parametrize("kind", ["kernel", "element"])
@pytest.mark.parametrize("size", [1, 2, 4, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_clusters_are_adjacent_input_channels(shape: tuple[int, ...], size: int, kind: str) -> None:
    """Against the definition, weight by weight: which of them share a scale."""
    layout = ClusterLayout(shape, size, kind)
    labels = torch.arange(layout.clusters).reshape(layout.scale_shape)
    spread = torch.zeros_like(layout.split(torch.zeros(shape)), dtype=torch.int64) + labels
    found = layout.merge(spread).reshape(shape[0], shape[1], -1)

    def key(output: int, channel: int, position: int) -> tuple[int, ...]:
        shared = kind == "kernel" or shape[1] == 1
        return (output, channel // size) if shared else (output, channel // size, position)

    by_label: dict[int, set[tuple[int, ...]]] = {}
    for output, rows in enumerate(found.tolist()):
        for channel, row in enumerate(rows):
            for position, label in enumerate(row):
                by_label.setdefault(label, set()).add(key(output, channel, position))
    assert all(len(keys) == 1 for keys in by_label.values())
    assert len({next(iter(keys)) for keys in by_label.values()}) == len(by_label) == layout.clusters


@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=4),
    st.integers(1, 9),
    st.sampled_from(["kernel", "element"]),
)
@settings(max_examples=100, deadline=None)
def test_split_and_merge_are_inverse(shape: list[int], size: int, kind: str) -> None:
    layout = ClusterLayout(tuple(shape), size, kind)
    weight = torch.arange(1.0, prod(shape) + 1).reshape(shape)
    split = layout.split(weight)
    assert split.shape == (shape[0], layout.groups, layout.members, layout.positions)
    assert torch.equal(layout.merge(split), weight)
    assert float(split.sum()) == float(weight.sum())  # what fills up the last cluster is zero
    rows = layout.rows(split)
    assert rows.shape[0] == layout.clusters == layout.members_of_rows().numel()
    assert rows.shape[1] * rows.shape[2] == layout.weights_per_cluster
    held = layout.members_of_rows() * rows.shape[2]
    assert torch.equal((rows != 0).sum((1, 2)), held)
    assert torch.equal(layout.members_of_clusters().sum(), torch.tensor(shape[1]))
    # A row's scale, put at the row's place in scale_shape, is the scale that its weights are multiplied by.
    largest = rows.amax((1, 2))
    by_row = largest.reshape(shape[0], layout.groups, 1, layout.scale_shape[3])
    assert torch.equal(by_row, split.amax(layout.shared_axes, keepdim=True))


def test_numbers_of_a_convolution() -> None:
    kernel = ClusterLayout((8, 10, 3, 3), 4, "kernel")
    element = ClusterLayout((8, 10, 3, 3), 4, "element")
    assert (kernel.members, kernel.groups, kernel.positions) == (4, 3, 9)
    assert (kernel.clusters, kernel.weights_per_cluster, kernel.scale_shape) == (24, 36, (8, 3, 1, 1))
    assert (element.clusters, element.weights_per_cluster, element.scale_shape) == (216, 4, (8, 3, 1, 9))
    assert kernel.members_of_clusters().tolist() == [4, 4, 2]


@pytest.mark.parametrize("kind", ["kernel", "element"])
def test_depthwise_cluster_is_the_kernel(kind: str) -> None:
    layout = ClusterLayout((6, 1, 3, 3), 4, kind)
    assert (layout.clusters, layout.weights_per_cluster, layout.scale_shape) == (6, 9, (6, 1, 1, 1))
