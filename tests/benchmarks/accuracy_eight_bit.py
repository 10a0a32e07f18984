"""The 8-bit candidates of accuracy.py: NNCF's and torchao's quantization-aware training, each as its documentation says.

Both quantize the operands of residual adds. NNCF's model is judged as fake-quant model, torchao's as converted.
"""

from __future__ import annotations

import copy
import re

import torch
from accuracy_peer import Candidate, Quantized, Start, bits_per_weight, weighted_layers
from torch import Tensor, nn

from lowprec.training.evaluation import Predictor

BITS = 8


def _by_channel(model: nn.Module) -> float:
    """Bits per weight where each output channel has a scale."""
    layers = weighted_layers(model).values()
    return bits_per_weight((BITS, layer.weight.numel(), layer.weight.shape[0]) for layer in layers)


def nncf_model(start: Start) -> Quantized:
    """docs.openvino.ai, "Quantization-aware Training (QAT) with PyTorch": nncf.quantize, then training.

    Raises:
        RuntimeError: NNCF left a layer's weights as they were.
    """
    import nncf
    from nncf.torch.quantization.layers import BaseQuantizer

    batches = nncf.Dataset(start.calibration)
    model = nncf.quantize(copy.deepcopy(start.model), batches, subset_size=len(start.calibration))
    layers = len(weighted_layers(start.model))
    # Their second operand is the weight: "stage1/0/conv1/conv2d/0__1.0".
    quantizers = [name for name, module in model.named_modules() if isinstance(module, BaseQuantizer)]
    found = sum(re.search(r"/(conv2d|linear)/\d+__1\.0$", name) is not None for name in quantizers)
    if found != layers:
        raise RuntimeError(f"NNCF quantized the weights of {found} of {layers} layers")
    return Quantized(model, _by_channel(start.model))


class ExportedModel(nn.Module):
    """An exported model with the usual train and eval modes; ranges follow the activations in train mode alone."""

    def __init__(self, exported: nn.Module) -> None:
        super().__init__()
        self.exported = exported

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return self.exported(images)

    def train(self, mode: bool = True) -> ExportedModel:
        from torchao.quantization import pt2e

        # Not super().train, which exported models refuse.
        self.training = mode
        move = pt2e.move_exported_model_to_train if mode else pt2e.move_exported_model_to_eval
        move(self.exported)
        self.exported.apply(pt2e.enable_observer if mode else pt2e.disable_observer)
        return self


def torchao_model(start: Start) -> Quantized:
    """docs.pytorch.org/ao, "PyTorch 2 Export Quantization-Aware Training", with its quantizer for x86."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

    quantizer = x86_inductor_quantizer.X86InductorQuantizer()
    quantizer.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config(is_qat=True))
    batch = torch.export.Dim("batch", min=1)
    model = copy.deepcopy(start.model).train()
    exported = torch.export.export(model, (start.calibration[0][:2],), dynamic_shapes=({0: batch},), strict=True)
    return Quantized(ExportedModel(prepare_qat_pt2e(exported.module(), quantizer)), _by_channel(start.model))


def converted(model: nn.Module) -> Predictor:
    """torchao's model with integer weights between quantize and dequantize operators."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    assert isinstance(model, ExportedModel)
    return ExportedModel(convert_pt2e(copy.deepcopy(model.eval().exported)))


CANDIDATES = [
    Candidate("NNCF, 8-bit", nncf_model),
    Candidate("torchao, 8-bit", torchao_model, converted),
]
