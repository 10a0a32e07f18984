"""Packed codes: every field where it belongs, in as few bytes as the bits say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowprec.numerics.clusters import ClusterLayout
from lowprec.numerics.packing import pack_codes, packed_layout, unpack_codes

LIMITS = {2: (-1, 1), 4: (-7, 7), 8: (-128, 127)}


@given(st.data())
def test_unpacking_gives_the_packed_codes(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([2, 4, 8]))
    shape = data.draw(st.sampled_from([(1,), (3, 1), (5, 3, 3, 3), (4, 2, 1, 1), (7, 13)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    low, high = LIMITS[bits]
    codes = torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-codes.numel() * bits // 8),)
    assert torch.equal(unpack_codes(packed, bits, shape), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (2, [-1, 0, 1, -1], [0b00_10_01_00]),
        (2, [1, 1, 1, 1, 1], [0b10_10_10_10, 0b00_00_00_10]),
        (4, [-7, 7], [0xF1]),
        (4, [0, 0, -1], [0x88, 0x07]),
        (8, [-128, -1, 127], [0x80, 0xFF, 0x7F]),
    ],
)
def test_bytes_computed_by_hand(bits: int, codes: list[int], expected: list[int]) -> None:
    assert pack_codes(torch.tensor(codes, dtype=torch.int8), bits).tolist() == expected


def test_layout_of_a_layer() -> None:
    layout = ClusterLayout((6, 10, 3, 3), 4, "kernel")
    assert packed_layout(2, layout) == {
        "codes": (torch.uint8, (135,)),
        "exponents": (torch.int8, (6,)),
        "bias": (torch.int32, (6,)),
        "mantissas": (torch.int8, (6, 3, 1, 1)),
    }
    assert packed_layout(4, ClusterLayout((6, 10, 3, 3), 4, "element"))["mantissas"] == (torch.int8, (6, 3, 1, 9))
    assert "mantissas" not in packed_layout(8, layout)
    assert packed_layout(2, layout, planes=2) == {
        "codes": (torch.uint8, (270,)),
        "exponents": (torch.int8, (6,)),
        "bias": (torch.int32, (6,)),
        "mantissas": (torch.int8, (2, 6, 3, 1, 1)),
    }
    assert packed_layout(2, ClusterLayout((3, 3), 4, "kernel"))["codes"] == (torch.uint8, (3,))
