"""Packing codes of 2, 4 and 8 bits into bytes, and the layout of a layer's tensors in a packed file."""

from __future__ import annotations

from math import ceil, prod

import torch
from torch import Tensor

from lowprec.numerics.clusters import ClusterLayout

# Added to codes before packing, so that fields are unsigned: ternary 0 … 2 in 2 bits, 4-bit 1 … 15.
CODE_OFFSET = {2: 1, 4: 8}


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """int8 codes of any shape -> uint8 [⌈n · bits / 8⌉], the first code in the lowest bits; 8-bit codes as they are."""
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.view(torch.uint8)
    per_byte = 8 // bits
    fields = (flat + CODE_OFFSET[bits]).to(torch.uint8)
    fields = torch.nn.functional.pad(fields, (0, -len(fields) % per_byte)).view(-1, per_byte)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (fields << shifts).sum(1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack_codes`: int8 codes of that shape."""
    if bits == 8:
        return packed.view(torch.int8).reshape(shape)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    fields = (packed.view(-1, 1) >> shifts) & ((1 << bits) - 1)
    return (fields.reshape(-1)[: prod(shape)].to(torch.int8) - CODE_OFFSET[bits]).reshape(shape)


def stored_bits(bits: int, planes: int = 1) -> int:
    """Bits of a stored code. Two ternary planes, -4 … 4, take as many as their digits: 2 each."""
    return bits * planes


def packed_layout(bits: int, layout: ClusterLayout, planes: int = 1) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of each tensor that a packed file holds for one layer; all that its weights and bias need."""
    output_channels = layout.weight_shape[0]
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "codes": (torch.uint8, (ceil(prod(layout.weight_shape) * stored_bits(bits, planes) / 8),)),
        "exponents": (torch.int8, (output_channels,)),
        "bias": (torch.int32, (output_channels,)),
    }
    if bits != 8:
        tensors["mantissas"] = (torch.int8, layout.scale_shape if planes == 1 else (planes, *layout.scale_shape))
    return tensors
