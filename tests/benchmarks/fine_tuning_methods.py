"""Methods of fine-tuning that fine_tuning.py compares and that the product does not have: they were not worth it.

A method is a context manager: within it, training is done in its way, by the callbacks that it hands out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from lowprec.layers import ActivationQuantizer, quantized_layers
from lowprec.layers.activations import activate
from lowprec.layers.weights import WeightQuantizer
from lowprec.numerics.straight_through import straight_through_weight

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Setting:
    """What a method works on. original: the prepared model before calibration; images: training images, [B, C, H, W] each."""

    qmodel: fx.GraphModule
    original: fx.GraphModule
    images: list[Tensor]


Method = Callable[[Setting], AbstractContextManager[list[Callback]]]


@contextmanager
def plain(setting: Setting) -> Iterator[list[Callback]]:
    """As the product does it."""
    yield []


def by_callback(create: Callable[[Setting], Callback]) -> Method:
    """The method that is one callback."""

    @contextmanager
    def method(setting: Setting) -> Iterator[list[Callback]]:
        yield [create(setting)]

    return method


def following(follow: Callable[[WeightQuantizer, Tensor], None]) -> Method:
    """Scales follow the weights by another policy than the descent step."""

    @contextmanager
    def method(setting: Setting) -> Iterator[list[Callback]]:
        with patch.object(WeightQuantizer, "descend", follow):
            yield []

    return method


def resolved_every(steps: int) -> Method:
    """All scales are found anew every ``steps`` training steps."""

    def follow(quantizer: WeightQuantizer, weight: Tensor) -> None:
        count = getattr(quantizer, "_steps", 0)
        if count % steps == 0:
            quantizer.solve(weight, "")
        quantizer._steps = count + 1  # type: ignore[assignment]

    return following(follow)


@contextmanager
def learned_scales(setting: Setting) -> Iterator[list[Callback]]:
    """Scales are parameters with the gradient of LSQ (Esser et al., arXiv 1902.08153), one for each cluster.

    ∂ŵ/∂s = code − w/s inside the codes' range, code outside, times 1/√(weights of a cluster · largest code).
    """
    for _, layer in quantized_layers(setting.qmodel):
        quantizer = layer.weight_quantizer
        if layer.scheme.bits != 8:
            scale = quantizer.scale
            del quantizer.scale
            quantizer.scale = nn.Parameter(scale)

    def follow(quantizer: WeightQuantizer, weight: Tensor) -> None:
        if quantizer.scheme.bits == 2:
            scale = quantizer.scale.detach()
            quantizer.threshold.copy_(torch.where(scale > 0, scale / 2, torch.inf))

    original = WeightQuantizer.with_exponents

    def with_exponents(quantizer: WeightQuantizer, weight: Tensor) -> tuple[Tensor, Tensor]:
        quantized, exponent = original(quantizer, weight)
        if quantizer.scheme.bits == 8:
            return quantized, exponent
        limit = 1 if quantizer.scheme.bits == 2 else 7
        with torch.no_grad():
            w_OGNP = quantizer.layout.split(weight.detach().float())
            codes = quantizer.layout.split(quantizer.codes(weight))
            ratio = torch.where(quantizer.scale > 0, w_OGNP / quantizer.scale, 0.0)
            slope = torch.where(ratio.abs() <= limit, codes - ratio, codes)
            slope = slope / math.sqrt(quantizer.layout.weights_per_cluster * limit)
        learned = quantizer.scale - quantizer.scale.detach()
        return quantized + quantizer.layout.merge(slope * learned), exponent

    with (
        patch.object(WeightQuantizer, "descend", follow),
        patch.object(WeightQuantizer, "with_exponents", with_exponents),
    ):
        yield []


@contextmanager
def unrounded_scales(setting: Setting) -> Iterator[list[Callback]]:
    """Training multiplies scale · code; the rounding of scales to mantissas comes with the integer model alone."""
    original = WeightQuantizer.with_exponents

    def with_exponents(quantizer: WeightQuantizer, weight: Tensor) -> tuple[Tensor, Tensor]:
        rounded, exponent = original(quantizer, weight)
        if quantizer.scheme.bits == 8:
            return rounded, exponent
        with torch.no_grad():
            codes = quantizer.layout.split(quantizer.codes(weight))
            quantized = quantizer.layout.merge(codes * quantizer.scale)
        return straight_through_weight(weight, quantized), exponent  # which float kernels have no use for

    with patch.object(WeightQuantizer, "with_exponents", with_exponents):
        yield []


class _Freezing(Callback):
    """Weights whose codes change often stay what they are on average."""

    def __init__(self, frequency: float, momentum: float = 0.02) -> None:
        self.frequency, self.momentum = frequency, momentum
        self.codes: dict[str, Tensor] = {}
        self.flips: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}
        self.frozen: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        share = trainer.global_step / max(1, trainer.estimated_stepping_batches)
        limit = 1 - (1 - self.frequency) * share  # fewer and fewer flips are let through
        for name, layer in quantized_layers(pl_module.model):  # type: ignore[arg-type]
            if layer.scheme.bits == 8:
                continue
            codes = layer.weight_codes()
            if name not in self.codes:
                self.flips[name] = torch.zeros_like(layer.weight)
                self.average[name] = layer.weight.clone()
                self.frozen[name] = torch.zeros_like(codes, dtype=torch.bool)
            else:
                self.flips[name].lerp_((codes != self.codes[name]).float(), self.momentum)
            self.average[name].lerp_(layer.weight, self.momentum)
            self.frozen[name] |= self.flips[name] > limit
            layer.weight.copy_(torch.where(self.frozen[name], self.average[name], layer.weight))
            self.codes[name] = codes


def freezing(frequency: float) -> Method:
    """Latent weights whose codes flip in more than that share of late steps are fixed at their average (the same paper)."""
    return by_callback(lambda setting: _Freezing(frequency))


class _Average(Callback):
    """Validation, and so the best weights, are those of an exponential moving average."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        for name, value in pl_module.model.state_dict().items():
            if name not in self.average or not value.is_floating_point():
                self.average[name] = value.clone()
            else:
                self.average[name].lerp_(value.nan_to_num(posinf=torch.finfo(value.dtype).max), 1 - self.decay)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.trained = {name: value.clone() for name, value in pl_module.model.state_dict().items()}
        pl_module.model.load_state_dict(self.average)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if self.trained:
            pl_module.model.load_state_dict(self.trained)


def averaging(decay: float) -> Method:
    """An exponential moving average of weights, scales and statistics is validated and kept."""
    return by_callback(lambda setting: _Average(decay))


class _FrozenNorms(Callback):
    def __init__(self, share: float) -> None:
        self.share = share

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step >= self.share * trainer.estimated_stepping_batches:
            for module in pl_module.model.modules():
                if isinstance(module, NORMS):
                    module.eval()


def frozen_norms(share: float) -> Method:
    """After that share of all steps, batch norms use and keep their running statistics."""
    return by_callback(lambda setting: _FrozenNorms(share))


class _Reestimation(Callback):
    def __init__(self, images: list[Tensor]) -> None:
        self.images = images

    @torch.no_grad()
    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        norms = [module for module in pl_module.model.modules() if isinstance(module, NORMS)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = None  # a plain mean over batches
            norm.reset_running_stats()
        pl_module.model.train()
        with patch.object(WeightQuantizer, "descend", lambda quantizer, weight: None):
            for batch in self.images:
                pl_module.model(batch)
        pl_module.model.eval()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


# Before each validation, running statistics are taken anew from the calibration images.
reestimated_norms: Method = by_callback(lambda setting: _Reestimation(setting.images))


class _LayerByLayer(Callback):
    def __init__(self, share: float) -> None:
        self.share = share

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        layers = [layer for _, layer in quantized_layers(pl_module.model)]
        done = trainer.global_step / max(1.0, self.share * trainer.estimated_stepping_batches)
        for index, layer in enumerate(layers):
            layer.quantizing = index <= done * len(layers)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        for _, layer in quantized_layers(pl_module.model):
            layer.quantizing = True


def layer_by_layer(share: float) -> Method:
    """Weights are quantized one layer after the other, all of them after that share of the steps."""
    return by_callback(lambda setting: _LayerByLayer(share))


class _LearnedExponent(torch.autograd.Function):
    """y = clamp(round(x / s)) · s with s = 2^round(e). Gradient to e: s·ln 2·(code − x/s) in the range, s·ln 2·code outside."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, exponent: Tensor, low: int, high: int) -> Tensor:
        scale = torch.exp2(exponent.round())
        ratio = values / scale
        unclamped = ratio.round()
        codes = unclamped.clamp(low, high)
        ctx.save_for_backward(ratio, codes, scale)
        return codes * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ratio, codes, scale = ctx.saved_tensors
        inside = ratio.round() == codes
        slope = torch.where(inside, codes - ratio, codes) * scale * math.log(2)
        return gradient * inside, (gradient * slope).sum(), None, None


def learned_exponents(rate: float) -> Method:
    """Exponents of activations are learned by Adam, straight through their rounding (Jain et al., TQT, arXiv 1903.08066)."""

    @contextmanager
    def method(setting: Setting) -> Iterator[list[Callback]]:
        learned: dict[ActivationQuantizer, nn.Parameter] = {}
        for module in setting.qmodel.modules():
            if isinstance(module, ActivationQuantizer):
                learned[module] = nn.Parameter(module.exponent.float())
        optimizer = torch.optim.Adam(learned.values(), lr=rate)
        original = ActivationQuantizer.forward

        def forward(
            quantizer: ActivationQuantizer,
            values: Tensor,
            activation: str = "",
            overwrite: bool = False,
            *,
            norm: nn.Module | None = None,
            addend: Tensor | None = None,
        ) -> Tensor:
            values = values if norm is None else norm(values)
            values = activate(values if addend is None else values + addend, activation)
            if not quantizer.training or quantizer not in learned:
                return original(quantizer, values)
            return _LearnedExponent.apply(values, learned[quantizer], quantizer.codes.low, quantizer.codes.high)

        class Step(Callback):
            def on_train_batch_end(self, *_: Any) -> None:
                optimizer.step()
                optimizer.zero_grad()
                for quantizer, exponent in learned.items():
                    quantizer.exponent.copy_(exponent.detach().round())

        with patch.object(ActivationQuantizer, "forward", forward):
            yield [Step()]

    return method


def together(*methods: Method) -> Method:
    """Several methods at once, none of which may replace the same function."""

    @contextmanager
    def method(setting: Setting) -> Iterator[list[Callback]]:
        if not methods:
            yield []
            return
        with methods[0](setting) as first, together(*methods[1:])(setting) as rest:
            yield [*first, *rest]

    return method
