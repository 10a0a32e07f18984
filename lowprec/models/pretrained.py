"""What images a model's pretrained weights expect."""

from typing import Any

import timm.data
import torchvision
from torch import nn

__all__ = ["pretrained_data_config"]


def pretrained_data_config(model: nn.Module) -> dict[str, Any]:
    """Input size, normalisation and resizing of the images that ``model``'s published weights were evaluated with.

    Args:
        model: a model of ``create_model``. timm's models carry this themselves; for torchvision's, the transforms of
            the default weights are read; any other model gets the usual values of ImageNet.

    Returns:
        ``input_size`` (C, H, W), ``mean`` and ``std`` (a float per channel, for pixels in 0..1), ``crop_pct`` (the
        share of the resized image's edge that the centre crop keeps) and ``interpolation`` (a name).
    """
    torchvision_name = getattr(model, "torchvision_name", None)
    if isinstance(torchvision_name, str):
        return _torchvision_config(torchvision_name)
    # With no pretrained_cfg on the model, timm answers with ImageNet's defaults.
    config = timm.data.resolve_data_config({}, model=model)
    return {key: config[key] for key in ("input_size", "mean", "std", "crop_pct", "interpolation")}


def _torchvision_config(name: str) -> dict[str, Any]:
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    return {
        "input_size": (3, crop, crop),
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "crop_pct": crop / resize,
        "interpolation": preset.interpolation.value,
    }
