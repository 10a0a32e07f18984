"""Activation exponents and batch-norm correction from a few batches of unlabelled images.

One walk over the graph, layer after layer, each with the inputs that the quantized network before it really gives: first
the batch norm is corrected, then the exponent of the output is chosen, then the output is quantized and handed on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from lowprec.calibration.statistics import ChannelStatistics, ChannelSums, Inputs, correct_norm
from lowprec.calibration.walk import Walk
from lowprec.images import check_images, image_batches
from lowprec.layers import ActivationQuantizer, QuantizedLayer
from lowprec.prepare import expect_prepared, full_precision

# Of images calibrated at a time: 64 channels at a quarter of them, as behind a stem of stride 2, take 32 MiB, glibc's limit.
PIXELS = 1 << 19


@torch.no_grad()
def calibrate(qmodel: fx.GraphModule, batches: Iterable[Any], batch_norm_correction: bool = True) -> None:
    """Chooses the exponent of every activation tensor and corrects the batch norms of a prepared model, in place.

    batches: images [B, C, H, W], normalised as the model expects; of (images, labels) pairs the images are taken. A few
    hundred images do. With the recipe's calibrator. batch_norm_correction moves the running statistics by the difference
    that quantization makes (no re-estimation, which breaks networks whose statistics come from augmented images):
    mean' = mean + mean_q − mean_fp, var' = var · var_q / var_fp, with statistics of the same images.

    Raises:
        TypeError: a model that is not prepared, or batches that hold no float32 images.
        ValueError: no images, or of another number of channels; values that are infinite or NaN (the batch or the tensor is
            named); or a model calibrated already whose batch norms would be corrected twice.
    """
    images = calibration_images(qmodel, batches, "calibrate")
    if batch_norm_correction and is_calibrated(qmodel):
        raise ValueError(
            "the model is calibrated already and its batch norms would be corrected twice: prepare the full-precision "
            "model anew, or call calibrate(qmodel, batches, batch_norm_correction=False) to choose exponents alone"
        )
    images = [part for batch in images for part in _parts(batch)]
    was_training = qmodel.training
    qmodel.eval()
    try:
        reference = _reference_statistics(qmodel, images) if batch_norm_correction else {}
        _CalibrationWalk(qmodel, reference).run(images)
    finally:
        qmodel.train(was_training)


def calibration_images(qmodel: fx.GraphModule, batches: Iterable[Any], function: str) -> list[Tensor]:
    """The images of ``batches``, checked in the name of ``function``, on the model's device; errors as of ``calibrate``."""
    expect_prepared(qmodel, function)
    images = []
    for name, batch in image_batches(batches, function):
        check_images(batch, qmodel.meta["image_shape"], name, any_size=True)
        images.append(batch)
    if not images:
        raise ValueError(f"{function} got no images: give at least one batch [B, C, H, W]")
    device = next(qmodel.parameters()).device
    return [batch.to(device) for batch in images]


def _parts(batch: Tensor) -> tuple[Tensor, ...]:
    """A batch, on a CPU in parts whose tensors glibc takes from memory that it holds: larger ones are new pages each time."""
    if batch.device.type != "cpu":
        return (batch,)
    return batch.tensor_split(max(1, min(len(batch), -(-batch[:, 0].numel() // PIXELS))))


def is_calibrated(qmodel: fx.GraphModule) -> bool:
    """Whether any activation exponent has been chosen."""
    return any(module.calibrated for module in qmodel.modules() if isinstance(module, ActivationQuantizer))


class _CalibrationWalk(Walk):
    """Corrects the batch norms for which there are statistics, by the layer's name."""

    def __init__(self, qmodel: fx.GraphModule, reference: dict[str, ChannelStatistics]) -> None:
        super().__init__(qmodel)
        self.reference = reference

    def normalized(self, node: fx.Node, layer: QuantizedLayer, inputs: Inputs) -> list[Tensor]:
        if str(node.target) in self.reference:
            return correct_norm(layer, self.reference[str(node.target)], inputs)
        return super().normalized(node, layer, inputs)


def _reference_statistics(qmodel: fx.GraphModule, images: list[Tensor]) -> dict[str, ChannelStatistics]:
    """Statistics of what goes into each batch norm in full precision, by the layer's name."""
    sums: dict[str, ChannelSums] = {}
    handles = []
    for name, layer in qmodel.named_modules():
        if isinstance(layer, QuantizedLayer) and layer.norm is not None:
            sums[name] = ChannelSums()
            handles.append(layer.norm.register_forward_pre_hook(_recorder(layer, sums[name])))
    try:
        with full_precision(qmodel):
            for batch in images:
                _ChannelsLast(qmodel).run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: channel_sums.statistics() for name, channel_sums in sums.items()}


class _ChannelsLast(fx.Interpreter):
    """Computes on channels_last images, quicker on CPUs, but where the model moves numbers about: it may call view."""

    def run(self, *images: Any, **keywords: Any) -> Any:
        return super().run(*(batch.contiguous(memory_format=torch.channels_last) for batch in images), **keywords)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, *_contiguous(args, kwargs))

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_method(target, *_contiguous(args, kwargs))


def _contiguous(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return tree_map_only(Tensor, Tensor.contiguous, (args, kwargs))


def _recorder(layer: QuantizedLayer, sums: ChannelSums) -> Any:
    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums.add(layer.by_image(inputs[0]))

    return record
