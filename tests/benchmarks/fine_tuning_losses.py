"""Methods of fine-tuning that add a term to the loss; see fine_tuning_methods.py."""

from __future__ import annotations

import copy
import math
from typing import Any

import lightning.pytorch as lightning
import torch
from fine_tuning_methods import Method, Setting, by_callback
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lowprec.layers import QuantizedAdd, quantized_layers
from lowprec.prepare import full_precision
from lowprec.training.module import Classification


class _Penalty(Callback):
    """Adds a term to the loss of each step."""

    def term(self, module: Classification, images: Tensor) -> Tensor:
        raise NotImplementedError

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        original = pl_module.training_step

        def training_step(batch: Any, batch_idx: int) -> Tensor:
            loss = original(batch, batch_idx)
            return loss + self.term(pl_module, batch[0])  # type: ignore[arg-type]

        pl_module.training_step = training_step  # type: ignore[method-assign]


class _Dampening(_Penalty):
    def __init__(self, strength: float) -> None:
        self.strength = strength

    def term(self, module: Classification, images: Tensor) -> Tensor:
        step = module.trainer.global_step / max(1, module.trainer.estimated_stepping_batches)
        share = 0.5 * (1 - math.cos(math.pi * step))  # from nothing to all, as in the paper
        terms = []
        for _, layer in quantized_layers(module.model):
            if layer.scheme.bits != 8:
                quantizer = layer.weight_quantizer
                with torch.no_grad():
                    largest = quantizer.scale * (1 if layer.scheme.bits == 2 else 7)
                    codes = quantizer.layout.split(quantizer.codes(layer.weight)) * quantizer.scale
                w_OGNP = quantizer.layout.split(layer.weight)
                terms.append((w_OGNP.clamp(-largest, largest) - codes).square().sum())
        return self.strength * share * torch.stack(terms).sum()


def dampening(strength: float) -> Method:
    """The loss holds strength · Σ (w − ŵ)² within the codes' range (Nagel et al., arXiv 2203.11086)."""
    return by_callback(lambda setting: _Dampening(strength))


class _Features(_Penalty):
    def __init__(self, setting: Setting, weight: float) -> None:
        self.weight = weight
        self.teacher = copy.deepcopy(setting.original).eval()
        self.names = [name for name, layer in setting.qmodel.named_modules() if isinstance(layer, QuantizedAdd)]
        self.student_features: dict[str, Tensor] = {}
        self.teacher_features: dict[str, Tensor] = {}
        for model, found in ((setting.qmodel, self.student_features), (self.teacher, self.teacher_features)):
            for name in self.names:
                model.get_submodule(name).register_forward_hook(self._kept(found, name))

    @staticmethod
    def _kept(found: dict[str, Tensor], name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[name] = output

        return hook

    def term(self, module: Classification, images: Tensor) -> Tensor:
        with torch.no_grad(), full_precision(self.teacher):
            self.teacher(images)
        errors = [
            (self.student_features[name] - wanted).square().mean() / wanted.var()
            for name, wanted in self.teacher_features.items()
        ]
        return self.weight * torch.stack(errors).mean()


def feature_distillation(weight: float) -> Method:
    """The loss holds the error of each residual sum, over the variance of the full-precision one, their mean · weight."""
    return by_callback(lambda setting: _Features(setting, weight))
