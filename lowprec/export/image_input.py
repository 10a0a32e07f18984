"""Images of 8-bit pixels as a model's input: normalization and quantization in one table for each channel."""

from __future__ import annotations

import numpy as np
import onnx
import torch

from lowprec.data.normalization import PIXEL_VALUES, Normalization
from lowprec.export.qdq import QdqGraph, codes_name, zero_point
from lowprec.integer.model import Step
from lowprec.numerics.fixed_point import quantize


def write_uint8_input(graph: QdqGraph, step: Step, normalization: Normalization, channels_last: bool) -> None:
    """The input's step for pixels: code = table[channel, pixel], so that no float operator remains.

    Raises:
        ValueError: mean and std are not of as many channels as the images.
    """
    name, grid = step.name, step.operator.output
    assert grid is not None
    channels = graph.shapes[name][1]
    if len(normalization.mean) != channels or len(normalization.std) != channels:
        raise ValueError(
            f"the normalization has {len(normalization.mean)} means and {len(normalization.std)} standard deviations, the "
            f"images have {channels} channels"
        )
    exponent = torch.tensor(grid.exponent, dtype=torch.int32)
    table = quantize(normalization.table(), exponent, grid.codes).view(-1) + zero_point(grid)
    graph.constant(f"{name}.table", table.numpy().astype(np.uint8))
    offsets = np.arange(channels, dtype=np.int32).reshape(1, -1, 1, 1) * PIXEL_VALUES
    images = graph.node("Transpose", ["images"], f"{name}.nchw", perm=[0, 3, 1, 2]) if channels_last else "images"
    entries = graph.node("Cast", [images], f"{name}.pixels", to=onnx.TensorProto.INT32)
    entries = graph.node("Add", [entries, graph.constant(f"{name}.offsets", offsets)], f"{name}.entries")
    graph.node("Gather", [f"{name}.table", entries], codes_name(name), f"{name}.lookup")
    graph.dequantize(name, grid)
