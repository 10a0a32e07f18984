"""Brevitas' candidates of accuracy.py: its stock ternary weights, and the 2-bit narrow-range ones that its maintainers advise.

The advice: github.com/Xilinx/brevitas/issues/283 ("go for int quantization with bit_width=2 and narrow_range=True. It ends
up being ternary"). It comes in two forms: with Brevitas' default scale, the largest weight of the tensor, and with the best
that Brevitas has for a checkpoint, a scale for each channel that starts at the least squared error and is learned.
"""

from __future__ import annotations

from functools import partial

from accuracy_peer import END_BITS, Candidate, Quantized, Start, Weighted, bits_per_weight, rounded, run_calibration
from torch import nn

NARROW = {"weight_bit_width": 2, "weight_narrow_range": True}


def _layer(weight_quantizer: str, options: dict[str, object], operator: Weighted, is_end: bool) -> nn.Module:
    import brevitas.nn
    from brevitas import quant

    if is_end:
        weight_quantizer, options = "Int8WeightPerChannelFloat", {"weight_bit_width": END_BITS}
    settings = {
        "bias": operator.bias is not None,
        "weight_quant": getattr(quant, weight_quantizer),
        **options,
    }
    if isinstance(operator, nn.Linear):
        layer = brevitas.nn.QuantLinear(operator.in_features, operator.out_features, **settings)
    else:
        geometry = {key: getattr(operator, key) for key in ("stride", "padding", "dilation", "groups")}
        layer = brevitas.nn.QuantConv2d(
            operator.in_channels, operator.out_channels, operator.kernel_size, **geometry, **settings
        )
    layer.load_state_dict(operator.state_dict(), strict=False)
    # Scales that start from the weights start from these ones, not from the random ones that were there before.
    layer.weight_quant.init_tensor_quant()
    return layer


def _activation(signed: bool) -> nn.Module:
    import brevitas.nn
    from brevitas import quant

    return brevitas.nn.QuantIdentity(quant.Int8ActPerTensorFloat if signed else quant.Uint8ActPerTensorFloat)


def _weight_bits(model: nn.Module) -> float:
    from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer

    layers = [module for module in model.modules() if isinstance(module, QuantWeightBiasInputOutputLayer)]
    return bits_per_weight(
        (int(layer.weight_quant.bit_width()), layer.weight.numel(), layer.weight_quant.scale().numel())
        for layer in layers
    )


def quantized(weight_quantizer: str, options: dict[str, object], start: Start) -> Quantized:
    """The model with Brevitas' layers, its activations' scales calibrated as Brevitas does it: a percentile, then learned."""
    from brevitas.graph.calibrate import calibration_mode

    model = rounded(start.model, partial(_layer, weight_quantizer, options), _activation)
    with calibration_mode(model):
        run_calibration(model, start.calibration)
    return Quantized(model, _weight_bits(model))


CANDIDATES = [
    Candidate("Brevitas, stock ternary", partial(quantized, "SignedTernaryWeightPerTensorConst", {})),
    Candidate("Brevitas, 2-bit narrow, default scale", partial(quantized, "Int8WeightPerTensorFloat", NARROW)),
    Candidate("Brevitas, 2-bit narrow, learned scales", partial(quantized, "Int8WeightPerChannelFloatMSE", NARROW)),
]
