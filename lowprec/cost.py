"""What a model costs: multiply-accumulates, multiplications, bits and bytes, from shapes alone.

The axis of arXiv 1701.08978: a ternary cluster needs additions and one multiplication by its scale, so of its MACs all but
one become 8-bit accumulations.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx, nn

from lowprec.images import check_images, other_sizes_refused
from lowprec.layers import QuantizedBatchNorm2d, QuantizedLayer, QuantizedLookup, QuantizedMatmul
from lowprec.numerics.packing import packed_layout, stored_bits
from lowprec.prepare import expect_prepared, full_precision

# safetensors' names of the dtypes in a packed file, and the file's fixed parts: length field and metadata.
_DTYPE_NAMES = {torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32"}
_FILE_METADATA = {"format": "lowprec", "version": "2", "checksum": "00000000"}
# The compressed graph of a packed file, measured on ResNets of 8 to 101 layers (tests/test_cost.py holds it to 3 %).
GRAPH_BYTES, GRAPH_BYTES_PER_STEP = 390, 11


@dataclass(frozen=True)
class LayerCost:
    """One layer, for one image.

    bits: of its weights, 32 if it is not quantized. weight_storage_bits: codes, mantissas and exponents. multiplications:
    one a cluster, plane and output position for ternary weights, else one a MAC. planes: of ternary weights, 1 or 2.
    """

    name: str
    weight_shape: tuple[int, ...]
    bits: int
    cluster_size: int
    macs: int
    multiplications: int
    weights: int
    weight_storage_bits: int
    planes: int = 1

    @property
    def multiplications_replaced(self) -> float:
        """Share of the MACs' multiplications that became additions."""
        return 1 - self.multiplications / self.macs

    @property
    def weight_bits(self) -> float:
        """Bits per weight, scales included."""
        return self.weight_storage_bits / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Costs:
    """Per layer and in total, for one image. fp32_bytes: the full-precision parameters and statistics."""

    layers: list[LayerCost]
    fp32_bytes: int
    packed_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of convolutions, linear layers and products of activation tensors."""
        return sum(layer.macs for layer in self.layers)

    @property
    def multiplications_replaced(self) -> float:
        """Share of all multiplications that became 8-bit accumulations."""
        return 1 - sum(layer.multiplications for layer in self.layers) / self.macs

    @property
    def weight_bits(self) -> float:
        """Bits per weight over all layers, scales included."""
        return sum(layer.weight_storage_bits for layer in self.layers) / sum(layer.weights for layer in self.layers)

    @property
    def integer_mac_share(self) -> float:
        """Share of MACs in integers: of layers with quantized weights, and of products of quantized tensors."""
        return sum(layer.macs for layer in self.layers if layer.bits < 32) / self.macs

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        heads = f"{'layer':{width}}  {'weight':>18}  {'bits':>4}  {'N':>4}  {'MACs':>13}  {'replaced':>8}  {'bits/weight':>11}"
        rows = [
            f"{layer.name:{width}}  {'x'.join(map(str, layer.weight_shape)):>18}  "
            f"{'2+2' if layer.planes == 2 else layer.bits:>4}  {layer.cluster_size:>4}  "
            f"{layer.macs:>13,}  {layer.multiplications_replaced:>8.1%}  {layer.weight_bits:>11.2f}"
            for layer in self.layers
        ]
        total = (
            f"{self.macs:,} MACs, {self.multiplications_replaced:.1%} of multiplications replaced, "
            f"{self.weight_bits:.2f} bits per weight, {self.packed_bytes:,} bytes packed, {self.fp32_bytes:,} in FP32"
        )
        return "\n".join([heads, *rows, total])


def cost(qmodel: fx.GraphModule, example_inputs: Tensor) -> Costs:
    """Costs of a prepared model on images of the shape of ``example_inputs`` [B, C, H, W]; no value is read.

    The model may lie on the meta device; its state does not change.

    Raises:
        TypeError: a model that is not prepared, or ``example_inputs`` that are no tensor. ValueError: another shape.
    """
    expect_prepared(qmodel, "cost")
    if not isinstance(example_inputs, Tensor):
        raise TypeError(
            f"example_inputs must be one tensor of images [B, C, H, W], not {type(example_inputs).__name__}"
        )
    check_images(example_inputs.to("meta", torch.float32), qmodel.meta["image_shape"], "example_inputs", any_size=True)
    meta_model = copy.deepcopy(qmodel).to("meta").eval()
    layers: list[LayerCost] = []

    def record(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            product = isinstance(module, QuantizedMatmul)
            layers.append(_product_cost(name, inputs[0], output) if product else _layer_cost(name, module, output))

        return hook

    for name, module in meta_model.named_modules():
        multiplies = isinstance(module, QuantizedLayer | QuantizedMatmul | nn.Conv2d | nn.Linear)
        if multiplies and not isinstance(module, QuantizedBatchNorm2d):
            module.register_forward_hook(record(name))
    shape = qmodel.meta["image_shape"]
    with full_precision(meta_model), torch.no_grad(), other_sizes_refused(example_inputs, shape):
        meta_model(torch.empty(1, *example_inputs.shape[1:], device="meta"))
    return Costs(layers, _full_precision_bytes(qmodel), _packed_bytes(qmodel))


def _layer_cost(name: str, module: nn.Module, output: Tensor) -> LayerCost:
    weight = module.weight
    assert isinstance(weight, Tensor)
    positions = output[0].numel() // len(weight)
    macs = positions * weight.numel()
    multiplications, bits, planes, cluster_size = macs, 32, 1, 1
    storage_bits = 32 * weight.numel()
    if isinstance(module, QuantizedLayer):
        bits, planes = module.scheme.bits, module.scheme.planes
        layout = module.weight_quantizer.layout
        tensors = packed_layout(bits, layout, planes)
        scales = sum(8 * prod(tensors[key][1]) for key in ("mantissas", "exponents") if key in tensors)
        storage_bits = stored_bits(bits, planes) * weight.numel() + scales
        if bits != 8:
            cluster_size = layout.members
        if bits == 2:
            multiplications = positions * layout.clusters * planes
    shape = tuple(weight.shape)
    return LayerCost(name, shape, bits, cluster_size, macs, multiplications, weight.numel(), storage_bits, planes)


def _product_cost(name: str, left: Tensor, output: Tensor) -> LayerCost:
    """A product of two activation tensors, as attention has them: 8 bits, no weights."""
    macs = output[0].numel() * left.shape[-1]
    return LayerCost(name, (), 8, 1, macs, macs, 0, 0)


def _full_precision_bytes(qmodel: nn.Module) -> int:
    parameters = sum(parameter.numel() for parameter in qmodel.parameters())
    statistics = [
        buffer.numel()
        for module in qmodel.modules()
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    return 4 * (parameters + sum(statistics))


def _packed_bytes(qmodel: fx.GraphModule) -> int:
    """Bytes of the packed file: each tensor, its entry in the safetensors header, and the graph."""
    steps = sum(1 for node in qmodel.graph.nodes if node.op == "call_module")
    graph_bytes = GRAPH_BYTES + GRAPH_BYTES_PER_STEP * steps
    header: dict[str, object] = {"__metadata__": _FILE_METADATA}
    offset = 0

    def add(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        nonlocal offset
        size = prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size

    for name, module in qmodel.named_modules():
        if isinstance(module, QuantizedLayer):
            scheme, layout = module.scheme, module.weight_quantizer.layout
            for key, (dtype, shape) in packed_layout(scheme.bits, layout, scheme.planes).items():
                add(f"{name}.{key}", dtype, shape)
        elif isinstance(module, QuantizedLookup):
            add(f"{name}.table", torch.int16, module.table_shape)
    add("graph", torch.uint8, (graph_bytes,))
    return 8 + len(json.dumps(header, separators=(",", ":"))) + offset
