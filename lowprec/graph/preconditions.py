"""What ``prepare`` asks of a model and of its example images, before it traces anything."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lowprec.graph.planning import UnsupportedModelError
from lowprec.numerics.solvers import check_finite

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def check_model(model: object) -> None:
    """That ``model`` is a plain float32 module whose parameters are finite (on the meta device, of any value).

    Raises:
        TypeError: no module. UnsupportedModelError: compiled, scripted, wrapped for several devices, or not float32.
        ValueError: a parameter or a buffer that is infinite or NaN.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare expects a full-precision torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        place = f"its module {name}" if name else "the model"
        if hasattr(module, "_orig_mod"):
            raise UnsupportedModelError(f"{place} is compiled by torch.compile: prepare the original, model._orig_mod")
        if isinstance(module, _WRAPPERS):
            raise UnsupportedModelError(
                f"{place} is wrapped in {type(module).__name__}: prepare the original, model.module"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(f"{place} is TorchScript: prepare the original model that it was made of")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise UnsupportedModelError(f"{name} has no shape yet: run the model once before it is prepared")
        if not tensor.is_floating_point():
            continue
        if tensor.dtype != torch.float32:
            raise UnsupportedModelError(f"{name} is {_name(tensor.dtype)}, not float32: call model.float() first")
        check_finite(tensor, name)


def check_example_inputs(example_inputs: object, model: nn.Module) -> None:
    """That they are float32 images [B, C, H, W], finite, on the model's device.

    Raises:
        TypeError: not one tensor, or not of float32. ValueError: another shape, values or device.
    """
    if not isinstance(example_inputs, Tensor):
        raise TypeError(
            f"example_inputs must be one tensor of images [B, C, H, W], not {type(example_inputs).__name__}"
        )
    if example_inputs.dim() != 4 or not example_inputs.numel():
        raise ValueError(
            f"example_inputs must have the shape [B, C, H, W] with B at least 1, not {list(example_inputs.shape)}"
        )
    if example_inputs.dtype != torch.float32:
        advice = "call .float()" if example_inputs.is_floating_point() else "give normalised images, not pixels"
        raise TypeError(f"example_inputs must be float32, not {_name(example_inputs.dtype)}: {advice}")
    if not example_inputs.is_meta and not bool(torch.isfinite(example_inputs).all()):
        raise ValueError("example_inputs hold infinite or NaN values")
    devices = {parameter.device.type for parameter in model.parameters()} - {example_inputs.device.type}
    if devices:
        raise ValueError(
            f"example_inputs are on {example_inputs.device.type}, the model on {', '.join(sorted(devices))}: move one of them"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
