"""What a training step launches on a GPU, moves through its memory and holds there at its peak, counted without one.

    python tests/benchmarks/step_traffic.py [MODEL ...] [--recipe w2a8_n4] [--batch 64] [--side 224]

The forward and the backward pass run on tensors without data ("meta" ones), all in bfloat16; each operator of PyTorch's that is
no view counts as one launch that reads its tensors and writes its results, which is what its kernels do at the least. "operators"
is lowprec without kernels of its own, "kernels" with those that it has for GPUs (Triton's), each of which is one launch, "codes
kept" these with trainer.keep_codes:

    an activation    forward: values, and an addend, read, values written, a bit an element; backward: gradient and bit, gradient
    codes kept       made: values read, codes written; used: codes read, values written
    a weight         its scales' step: the weight read; its values: the weight read, values written

The peak is the most that tensors take at a time, without an allocator's rounding and holes: weights, their gradients, what is
kept for the backward pass and what is in hand. The optimizer, which is the same, is left out of all; so are workspaces of
products, caches, and the time of a launch. Nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Iterable, Iterator
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
from lowprec.layers.saved_codes import saved_as_codes
from lowprec.models import create_model
from lowprec.numerics import straight_through

KINDS = ("plain", "operators", "kernels", "codes kept")
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


class Memory:
    """Bytes of the tensors that are there, and the most that there were."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self.held = self.peak = 0
        self._known: set[int] = set()
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """A tensor whose memory may be that of one that is there."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, address: int, size: int) -> None:
        self._known.remove(address)
        self.held -= size


class Counter(TorchDispatchMode):
    """Within it, operators are counted, and the memory of their results."""

    def __init__(self, traffic: Traffic, memory: Memory | None = None) -> None:
        super().__init__()
        self.traffic, self.memory = traffic, memory

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        name = function.overloadpacket.__name__
        # What is copied to, or given as out, is written alone; what else is changed in place is read as well.
        out = {argument.name for argument in function._schema.arguments if argument.is_out}
        given = arguments[1:] if name == "copy_" else arguments
        named = [value for key, value in (keywords or {}).items() if key not in out]
        read = [leaf for leaf in tree_leaves((given, named)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if self.memory is not None:
            for tensor in written:
                self.memory.add(tensor)
        memory = {tensor.untyped_storage()._cdata for tensor in read}
        is_view = not function._schema.is_mutable and any(t.untyped_storage()._cdata in memory for t in written)
        if written and not is_view and name not in NOTHING:
            self.traffic.add(*read, *written)
        return result


@contextmanager
def counted_kernels(traffic: Traffic) -> Iterator[None]:
    """Within it, stand-ins count what lowprec's kernels would do."""
    from lowprec.numerics import triton_activations, triton_weights

    def runs_triton(tensor: Tensor) -> bool:
        # Mock's own stand-ins would keep what they are called with.
        return True

    def quantize_activation(
        values: Tensor, addend: Tensor | None, exponent: Tensor, ends: Any, activation: str, out: Tensor, masked: bool
    ) -> Tensor | None:
        mask = torch.empty(-(-values.numel() // 8) if masked else 0, dtype=torch.uint8, device=values.device)
        traffic.add(values, *(() if addend is None else (addend,)), exponent, out, mask)
        return mask if masked else None

    def quantize_weight(
        weight: Tensor, scale: Tensor, threshold: Tensor | None, layout: Any, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        quantized = torch.empty_like(weight, dtype=dtype)
        exponent = torch.empty(len(weight), dtype=torch.int32, device=weight.device)
        traffic.add(weight, scale, *(() if threshold is None else (threshold,)), quantized, exponent)
        return quantized, exponent

    def quantize_eight_bit(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        quantized = torch.empty_like(weight, dtype=dtype)
        exponent = torch.empty(len(weight), dtype=torch.int32, device=weight.device)
        # An output channel is read three times, the last two from a cache.
        traffic.add(weight, quantized, exponent)
        return quantized, exponent

    def descend(weight: Tensor, scale: Tensor, threshold: Tensor | None, layout: Any) -> None:
        traffic.add(weight, scale, scale, *(() if threshold is None else (threshold,)))

    def gradient_within(gradient: Tensor, mask: Tensor, out: Tensor) -> None:
        traffic.add(gradient, mask, out)

    def write(source: Tensor, exponent: Tensor, offset: int, out: Tensor) -> None:
        traffic.add(source, exponent, out)

    with (
        mock.patch.multiple(
            triton_activations, quantize_activation=quantize_activation, gradient_within=gradient_within
        ),
        mock.patch.multiple(triton_activations, write_codes=write, write_values=write),
        mock.patch.multiple(
            triton_weights, quantize_weight=quantize_weight, quantize_eight_bit=quantize_eight_bit, descend=descend
        ),
        mock.patch.object(straight_through, "runs_triton", runs_triton),
        mock.patch.object(weights, "runs_triton", runs_triton),
    ):
        yield


def step_traffic(model: nn.Module, images: Tensor, kernels: bool, keep_codes: bool = False) -> tuple[Traffic, int]:
    """Of a forward and backward pass of a model and images on "meta", and the bytes of its peak.

    kernels: whether lowprec uses its own; keep_codes: as trainer.keep_codes. A prepared model's quantizers need some exponent.
    The second step is counted: what happens once is not.
    """
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    # Blocks are for a CPU's caches.
    with mock.patch.object(straight_through, "BLOCK", ENDLESS), mock.patch.object(weights, "BLOCK", ENDLESS):
        for _ in range(2):
            model.train().zero_grad()
            traffic, memory = Traffic(), Memory((images, *model.parameters(), *model.buffers()))
            with counted_kernels(traffic) if kernels else nullcontext(), Counter(traffic, memory):
                with saved_as_codes(model, keep_codes):
                    logits = model(images)
                nn.functional.cross_entropy(logits, labels).backward()
                del logits
    return traffic, memory.peak


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
    lines = [f"{name}, {batch} images of {side}, bfloat16: launches, bytes moved and peak memory to plain"]
    plain: tuple[Traffic, int] | None = None
    for kind in KINDS:
        torch.manual_seed(0)
        model = create_model(name).eval()
        if kind != "plain":
            model = lowprec.prepare(model, recipe, torch.zeros(2, 3, side, side))
        own = kind in ("kernels", "codes kept")
        found, peak = step_traffic(without_data(model), images, own, kind == "codes kept")
        plain = plain or (found, peak)
        title = kind if kind == "plain" else f"lowprec {recipe}, {kind}"
        lines.append(
            f"{title:30} {found.launches / plain[0].launches:7.2f}x {found.launches:6} "
            f"{found.bytes / plain[0].bytes:7.2f}x {found.bytes / 1e9:8.2f} GB {peak / plain[1]:7.2f}x {peak / 1e9:7.2f} GB"
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
