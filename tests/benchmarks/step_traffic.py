"""What a training step launches on a GPU and moves through its memory, counted without one.

    python tests/benchmarks/step_traffic.py [MODEL ...] [--recipe w2a8_n4] [--batch 64] [--side 224]

The forward and the backward pass run on tensors without data ("meta" ones), all in bfloat16; each operator of PyTorch's that is
no view counts as one launch that reads its tensors and writes its results, which is what its kernels do at the least. "operators"
is lowprec without kernels of its own, "kernels" with those that it has for GPUs (Triton's), each of which is one launch:

    an activation    forward: values, and an addend, read, values written, a bit an element; backward: gradient and bit, gradient
    a weight         its scales' step: the weight read; its values: the weight read, values in float32 written

The optimizer is left out: it is the same. Nothing is measured; caches, and time to launch, are not in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowprec
from lowprec.layers import ActivationQuantizer, weights
from lowprec.models import create_model
from lowprec.numerics import straight_through

KINDS = ("plain", "operators", "kernels")
# What allocates or looks at memory, and launches nothing; views are told by their results.
NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "is_same_size", "_unsafe_view")
ENDLESS = 1 << 60


@dataclass
class Traffic:
    """Launches, and bytes read and written."""

    launches: int = 0
    bytes: int = 0

    def add(self, *tensors: Tensor) -> None:
        """A launch that reads or writes each of these once."""
        self.launches += 1
        self.bytes += sum(tensor.nbytes for tensor in tensors)


class Counter(TorchDispatchMode):
    """Within it, operators are counted."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        name = function.overloadpacket.__name__
        # What is copied to is written alone; what else is changed in place is read as well.
        given = arguments[1:] if name == "copy_" else arguments
        read = [leaf for leaf in tree_leaves((given, keywords)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        memory = {tensor.untyped_storage()._cdata for tensor in read}
        is_view = not function._schema.is_mutable and any(t.untyped_storage()._cdata in memory for t in written)
        if written and not is_view and name not in NOTHING:
            self.traffic.add(*read, *written)
        return result


@contextmanager
def counted_kernels(traffic: Traffic) -> Iterator[None]:
    """Within it, stand-ins count what lowprec's kernels would do."""
    from lowprec.numerics import triton_activations, triton_weights

    def quantize_activation(
        values: Tensor, addend: Tensor | None, exponent: Tensor, ends: Any, activation: str, out: Tensor, masked: bool
    ) -> Tensor | None:
        mask = torch.empty(-(-values.numel() // 8) if masked else 0, dtype=torch.uint8, device=values.device)
        traffic.add(values, *(() if addend is None else (addend,)), exponent, out, mask)
        return mask if masked else None

    def quantize_weight(weight: Tensor, scale: Tensor, threshold: Tensor | None, layout: Any) -> tuple[Tensor, Tensor]:
        quantized = torch.empty_like(weight, dtype=torch.float32)
        exponent = torch.empty(len(weight), dtype=torch.int32, device=weight.device)
        traffic.add(weight, scale, *(() if threshold is None else (threshold,)), quantized, exponent)
        return quantized, exponent

    def quantize_eight_bit(weight: Tensor) -> tuple[Tensor, Tensor]:
        quantized = torch.empty_like(weight, dtype=torch.float32)
        exponent = torch.empty(len(weight), dtype=torch.int32, device=weight.device)
        # An output channel is read three times, the last two from a cache.
        traffic.add(weight, quantized, exponent)
        return quantized, exponent

    def descend(weight: Tensor, scale: Tensor, threshold: Tensor | None, layout: Any) -> None:
        traffic.add(weight, scale, scale, *(() if threshold is None else (threshold,)))

    def gradient_within(gradient: Tensor, mask: Tensor, out: Tensor) -> None:
        traffic.add(gradient, mask, out)

    with (
        mock.patch.multiple(
            triton_activations, quantize_activation=quantize_activation, gradient_within=gradient_within
        ),
        mock.patch.multiple(
            triton_weights, quantize_weight=quantize_weight, quantize_eight_bit=quantize_eight_bit, descend=descend
        ),
        mock.patch.object(straight_through, "runs_triton", return_value=True),
        mock.patch.object(weights, "runs_triton", return_value=True),
    ):
        yield


def step_traffic(model: nn.Module, images: Tensor, kernels: bool) -> Traffic:
    """Of a forward and backward pass of a model and images on "meta"; kernels: whether lowprec uses its own.

    A prepared model's quantizers need some exponent. The second step is counted: what happens once is not.
    """
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    # Blocks are for a CPU's caches.
    with mock.patch.object(straight_through, "BLOCK", ENDLESS), mock.patch.object(weights, "BLOCK", ENDLESS):
        for _ in range(2):
            traffic = Traffic()
            model.train().zero_grad()
            with counted_kernels(traffic) if kernels else nullcontext(), Counter(traffic):
                nn.functional.cross_entropy(model(images), labels).backward()
    return traffic


def without_data(model: nn.Module) -> nn.Module:
    """The model on "meta": weights and batch norms in bfloat16, cluster scales in float32."""
    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.set_exponent(0)
    for module in model.to("meta").modules():
        if not isinstance(module, weights.WeightQuantizer):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.bfloat16()
    return model


def table(name: str, recipe: str, batch: int, side: int) -> str:
    """A line for each way to train the model."""
    images = torch.zeros(batch, 3, side, side, dtype=torch.bfloat16, device="meta")
    lines = [f"{name}, {batch} images of {side}, bfloat16: launches and bytes to plain"]
    plain = None
    for kind in KINDS:
        torch.manual_seed(0)
        model = create_model(name).eval()
        if kind != "plain":
            model = lowprec.prepare(model, recipe, torch.zeros(2, 3, side, side))
        found = step_traffic(without_data(model), images, kind == "kernels")
        plain = plain or found
        title = kind if kind == "plain" else f"lowprec {recipe}, {kind}"
        lines.append(
            f"{title:30} {found.launches / plain.launches:7.2f}x {found.launches:6} "
            f"{found.bytes / plain.bytes:7.2f}x {found.bytes / 1e9:8.2f} GB"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="*", default=["resnet18", "resnet50", "mobilenetv2_100"])
    parser.add_argument("--recipe", default="w2a8_n4")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=224)
    given = parser.parse_args(arguments)
    for name in given.models:
        print(table(name, given.recipe, given.batch, given.side), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
