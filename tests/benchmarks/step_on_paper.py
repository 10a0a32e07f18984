"""What a training step would take on a GPU, on paper: bytes and multiplications of each layer, against a device's two limits.

    python tests/benchmarks/step_on_paper.py [MODEL ...] [--batch 128] [--side 224] [--terabytes 3.35] [--bf16 989] [--int8 1979]

Nothing is measured: shapes are the model's (timm's or torchvision's; convolutions with batch norms), the limits are given, by
default those of NVIDIA's data sheet of the H100 SXM, without sparsity: terabytes a second of its memory, 10^12 operations a
second in bf16 and in int8. Each kernel takes max(bytes / bandwidth, operations / rate), and all is fused that can be. With I,
O and W elements of a product's input, output and weight, in bytes:

    forward    product 2·I + 2·W + 2·O; batch norm's statistics 2·O; batch norm, activation, quantization 2·O + 2·O
    backward   batch norm's sums 4·O; its gradient 4·O + 2·O; ∂L/∂x 2·O + 2·W + 2·I; ∂L/∂w 2·O + 2·I + 4·W
    weights    4·W read, 2·W written; optimizer 20·W

lowprec adds the mask of what was clipped, O/8, to the last three passes of batch norm, and reads weights once more, for their
scales. Integer products (dense ones) take codes, a byte each, for I and W in the forward pass and for I in ∂L/∂w, and what
gives them I writes bytes. Left out, as it is the same for all: residual sums, pooling, the loss. So ratios are a bound for
perfect kernels, not a prediction. "kept" is what products and batch norms keep for the backward pass.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowprec.models import create_model

MASK = 1 / 8


@dataclass(frozen=True)
class Device:
    """Bytes a second, and operations a second in bf16 and int8."""

    bandwidth: float
    bf16: float
    int8: float

    def seconds(self, size: float, operations: float = 0.0, integers: bool = False) -> float:
        return max(size / self.bandwidth, operations / (self.int8 if integers else self.bf16))


@dataclass(frozen=True)
class Product:
    """A convolution or linear layer: elements, for a batch but for the weight's. dense: of one group. first: takes images."""

    inputs: int
    outputs: int
    weights: int
    macs: int
    dense: bool
    first: bool


@dataclass(frozen=True)
class Kind:
    """How a model is trained."""

    name: str
    quantized: bool = False
    integers: bool = False


KINDS = (
    Kind("plain bf16"),
    Kind("lowprec, bf16 products", quantized=True),
    Kind("lowprec, integer products", quantized=True, integers=True),
)


@dataclass(frozen=True)
class Shapes:
    """Of a model for a batch: its products; elements that batch norms take, and of all tensors that products take.

    coded: of those that dense products take, which may be kept as bytes; written: the same without the images.
    """

    products: list[Product]
    normalized: int
    inputs: int
    coded: int
    written: int

    @classmethod
    def of(cls, model: nn.Module, batch: int, side: int) -> Shapes:
        """By one forward pass of an image."""
        products: list[Product] = []
        normalized = 0
        # Tensors are held, so that no two of them have one address.
        taken: dict[int, tuple[Tensor, Product]] = {}

        def note(layer: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            nonlocal normalized
            (values,) = arguments
            if isinstance(layer, nn.BatchNorm2d):
                normalized += batch * output.numel()
                return
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            weight = layer.weight
            product = Product(
                inputs=batch * values.numel(),
                outputs=batch * output.numel(),
                weights=weight.numel(),
                macs=batch * output.numel() * weight[0].numel(),
                dense=isinstance(layer, nn.Linear) or layer.groups == 1,
                first=not products,
            )
            products.append(product)
            taken.setdefault(values.data_ptr(), (values, product))

        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                layer.register_forward_hook(note)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, side, side))
        tensors = [product for _, product in taken.values()]
        return cls(
            products,
            normalized,
            inputs=sum(tensor.inputs for tensor in tensors),
            coded=sum(tensor.inputs for tensor in tensors if tensor.dense),
            written=sum(tensor.inputs for tensor in tensors if tensor.dense and not tensor.first),
        )


def step_seconds(shapes: Shapes, kind: Kind, device: Device) -> float:
    """Of a whole step: see the text above."""
    mask = MASK if kind.quantized else 0.0
    # Statistics, normalization, the backward pass's sums and gradient.
    seconds = sum(device.seconds(size * shapes.normalized) for size in (2, 4 + mask, 4 + mask, 6 + mask))
    if kind.integers:
        seconds -= device.seconds(shapes.written)
    for product in shapes.products:
        integers = kind.integers and product.dense
        byte = 1 if integers else 2
        inputs, outputs, weights = product.inputs, product.outputs, product.weights
        seconds += device.seconds(byte * (inputs + weights) + 2 * outputs, 2 * product.macs, integers)
        if not product.first:
            seconds += device.seconds(2 * (outputs + weights + inputs), 2 * product.macs)
        seconds += device.seconds(2 * outputs + byte * inputs + 4 * weights, 2 * product.macs)
        seconds += device.seconds((4 + byte + 20 + (4 if kind.quantized else 0)) * weights)
    return seconds


def kept_bytes(shapes: Shapes, kind: Kind) -> float:
    """Kept for the backward pass: inputs of products, inputs of normalizations, masks."""
    saved = shapes.coded if kind.integers else 0
    return 2 * shapes.inputs - saved + (2 + (MASK if kind.quantized else 0)) * shapes.normalized


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["resnet50"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    for name, default in (("terabytes", 3.35), ("bf16", 989.0), ("int8", 1979.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    given = parser.parse_args(arguments)
    device = Device(given.terabytes * 1e12, given.bf16 * 1e12, given.int8 * 1e12)
    print(
        f"on paper: {given.terabytes:g} TB/s, {given.bf16:g} and {given.int8:g} · 10^12 operations/s in bf16 and int8"
    )
    for name in given.models:
        shapes = Shapes.of(create_model(name), given.batch, given.side)
        plain_seconds, plain_kept = step_seconds(shapes, KINDS[0], device), kept_bytes(shapes, KINDS[0])
        print(f"\n{name}, {given.batch} images of {given.side}: step, and kept for the backward pass")
        for kind in KINDS:
            seconds, kept = step_seconds(shapes, kind, device), kept_bytes(shapes, kind)
            print(
                f"{kind.name:26} {seconds / plain_seconds:5.2f}x {1000 * seconds:7.1f} ms  "
                f"{kept / plain_kept:5.2f}x {kept / 2**30:6.2f} GiB"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
