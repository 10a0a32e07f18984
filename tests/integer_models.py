"""Small integer models for tests of exporters, made by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowprec.integer.model import IntegerModel, Step
from lowprec.integer.operators import Grid, IntegerConv2d, IntegerInput, IntegerLinear, IntegerOperator
from lowprec.numerics.effective_codes import MANTISSA_LIMIT

GEOMETRY: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
LARGEST_CODE = {2: 1, 4: 7}


def operator_alone(operator: IntegerOperator, source: Grid, shape: tuple[int, int, int]) -> IntegerModel:
    """The operator behind the input's quantizer."""
    steps = [Step("input", (), IntegerInput(source)), Step("operator", ("input",), operator)]
    return IntegerModel(steps, shape)


def pointwise(codes: Tensor, mantissas: Tensor, bits: int, cluster_size: int) -> IntegerConv2d:
    """A 1×1 convolution that gives logits: codes [O, I], mantissas [O, G], both int8."""
    exponents, bias = torch.arange(len(codes)) % 5 - 9, torch.arange(len(codes)) - 3
    return IntegerConv2d(
        codes[:, :, None, None],
        mantissas[:, :, None, None],
        exponents.to(torch.int8),
        bias.to(torch.int32),
        bits,
        cluster_size,
        "kernel",
        Grid(0, 0, 255),
        None,
        flatten=True,
        **GEOMETRY,
    )


def every_product(bits: int) -> tuple[IntegerModel, Tensor]:
    """Weights of every code and mantissa there is, and images that take each of them out alone: 4-bit ones hold all ties."""
    largest, limit = LARGEST_CODE[bits], MANTISSA_LIMIT[bits]
    codes, mantissas = torch.arange(-largest, largest + 1), torch.arange(-limit, limit + 1)
    weight = codes.expand(len(mantissas), -1).to(torch.int8).contiguous()
    layer = pointwise(weight, mantissas.to(torch.int8).view(-1, 1), bits, len(codes))
    images = torch.eye(len(codes)).view(len(codes), -1, 1, 1)
    return operator_alone(layer, layer.input, (len(codes), 1, 1)), images


def over_last_axis(bits: int) -> tuple[IntegerModel, Tensor]:
    """A linear layer [B, 2, 3, 10] -> [B, 2, 3, 7] with a last cluster of two weights, and a batch of four for it."""
    generator = torch.Generator().manual_seed(bits)

    def drawn(limit: int, *shape: int) -> Tensor:
        return torch.randint(-limit, limit + 1, shape, generator=generator)

    layer = IntegerLinear(
        drawn(LARGEST_CODE[bits], 7, 10).to(torch.int8),
        drawn(MANTISSA_LIMIT[bits], 7, 3, 1, 1).to(torch.int8),
        drawn(1, 7).to(torch.int8),
        drawn(900, 7).to(torch.int32),
        bits,
        4,
        "kernel",
        Grid(0, -128, 127),
        Grid(9, -128, 127),
    )
    return operator_alone(layer, layer.input, (2, 3, 10)), drawn(128, 4, 2, 3, 10).float()
