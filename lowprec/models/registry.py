"""Models by name: ``cifar_resnet20`` and the like are ours, any other bare name is timm's or else torchvision's."""

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

import timm
import torchvision
from torch import nn

from lowprec.models import cifar_mobilenet, cifar_resnet
from lowprec.models.checkpoint import CheckpointError

__all__ = ["create_model", "list_models"]

OWN_MODELS: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet8": cifar_resnet.resnet8,
    "cifar_resnet20": cifar_resnet.resnet20,
    "cifar_resnet32": cifar_resnet.resnet32,
    "cifar_resnet56": cifar_resnet.resnet56,
    "cifar_mobilenetv2": cifar_mobilenet.CifarMobileNetV2,
}
TIMM = "timm:"
TORCHVISION = "torchvision:"
# These return extra outputs in train mode unless told not to.
TORCHVISION_WITH_AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")


def create_model(
    name: str, *, num_classes: int | None = None, in_channels: int = 3, pretrained: bool = False, **arguments: Any
) -> nn.Module:
    """Build a classification model: float images [B, in_channels, H, W] -> logits [B, num_classes].

    Args:
        name: ``cifar_resnet8`` … ``cifar_resnet56``, ``cifar_mobilenetv2``, a timm name (``resnet50.a1_in1k``, tag
            optional) or a torchvision name; ``timm:NAME`` and ``torchvision:NAME`` force one of the two where both have it.
        num_classes: number of logits; None keeps the model's own (1000 for most, 10 for ours).
        in_channels: channels of the images.
        pretrained: load the name's own published weights (from the network or the library's cache).
        arguments: handed to the model's constructor as they are.

    Raises:
        ValueError: unknown name (the closest ones are shown), unknown or impossible argument.
        CheckpointError: the pretrained weights do not exist or cannot be fetched.
    """
    library, bare_name = _resolve(name)
    if library == TIMM:
        return _create_timm(bare_name, num_classes, in_channels, pretrained, arguments)
    if library == TORCHVISION:
        return _create_torchvision(bare_name, num_classes, in_channels, pretrained, arguments)
    if pretrained:
        raise CheckpointError(
            f"{name} has no published weights: give model.checkpoint=PATH instead of model.pretrained=true, "
            "or leave both out to train it first"
        )
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    return _construct(name, OWN_MODELS[bare_name], {"in_channels": in_channels, **arguments})


def list_models(wildcard: str = "*") -> list[str]:
    """Names that ``create_model`` takes and that match ``wildcard`` (``*`` any text, ``?`` one character).

    A torchvision name that timm has too is listed with its prefix, so each name stands for one model.
    """
    timm_names = timm.list_models()
    known = set(timm_names)
    torchvision_names = [TORCHVISION + name if name in known else name for name in _torchvision_names()]
    names = [*OWN_MODELS, *timm_names, *torchvision_names]
    return [name for name in names if fnmatch.fnmatchcase(name, wildcard)]


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)  # the classification models alone


def _resolve(name: str) -> tuple[str, str]:
    """The library's prefix ("" for our own) and the name within it."""
    if name in OWN_MODELS:
        return "", name
    bare_name = name.removeprefix(TIMM)
    if not name.startswith(TORCHVISION) and timm.is_model(bare_name):
        return TIMM, bare_name
    bare_name = name.removeprefix(TORCHVISION)
    if not name.startswith(TIMM) and bare_name in _torchvision_names():
        return TORCHVISION, bare_name
    candidates = list_models()
    if name.startswith(TORCHVISION):
        candidates = [TORCHVISION + candidate for candidate in _torchvision_names()]
    elif name.startswith(TIMM):
        candidates = [TIMM + candidate for candidate in timm.list_models()]
    closest = difflib.get_close_matches(name, candidates, n=5, cutoff=0.5)
    suggestion = f"the closest names are {', '.join(closest)}" if closest else "no known name is close to it"
    raise ValueError(
        f"unknown model {name!r}: {suggestion}; lowprec.models.list_models('*resnet*') lists names by wildcard"
    )


def _create_timm(
    name: str, num_classes: int | None, in_channels: int, pretrained: bool, arguments: dict[str, Any]
) -> nn.Module:
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    try:
        return _construct(
            name,
            timm.create_model,
            {"model_name": name, "in_chans": in_channels, "pretrained": pretrained, **arguments},
        )
    except (RuntimeError, OSError) as error:
        if "Invalid pretrained tag" in str(error):
            raise ValueError(f"{error} Its tags: {', '.join(_tags(name)) or 'none'}") from error
        if pretrained:
            raise _weights_unavailable(f"timm:{name}", error) from error
        raise


def _tags(name: str) -> list[str]:
    architecture = name.split(".")[0]
    return [tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{architecture}.*")]


def _create_torchvision(
    name: str, num_classes: int | None, in_channels: int, pretrained: bool, arguments: dict[str, Any]
) -> nn.Module:
    if in_channels != 3:
        raise ValueError(
            f"torchvision:{name} takes images of 3 channels, not {in_channels}: use a model of timm or one of ours (cifar_*)"
        )
    weights = torchvision.models.get_model_weights(name).DEFAULT
    pretrained_classes = len(weights.meta["categories"])
    if pretrained and num_classes not in (None, pretrained_classes):
        raise ValueError(
            f"the pretrained weights of torchvision:{name} have {pretrained_classes} classes, not {num_classes}: "
            "give model.checkpoint=PATH of a model trained on your classes, or use a model of timm"
        )
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if name in TORCHVISION_WITH_AUXILIARY_OUTPUTS:
        arguments = {"aux_logits": False, **arguments}
        if not pretrained:
            arguments = {"init_weights": True, **arguments}  # what torchvision does by default, without its warning
    arguments["weights"] = weights if pretrained else None
    try:
        model = _construct(f"torchvision:{name}", torchvision.models.get_model_builder(name), arguments)
    except (RuntimeError, OSError) as error:
        if pretrained:
            raise _weights_unavailable(f"torchvision:{name} ({weights})", error) from error
        raise
    # timm's models say themselves what images they expect; pretrained_data_config reads this from torchvision's.
    model.torchvision_name = name  # type: ignore[assignment]
    return model


def _construct(name: str, constructor: Callable[..., nn.Module], arguments: dict[str, Any]) -> nn.Module:
    """Call ``constructor``; an argument that it does not know or cannot use becomes an error that names the model."""
    try:
        return constructor(**arguments)
    except (TypeError, AssertionError, ArithmeticError) as error:
        if "unexpected keyword argument" not in str(error):
            raise ValueError(f"model {name} cannot be built with {arguments}: {error}") from error
        parameters = inspect.signature(constructor).parameters.values()
        named = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        # A constructor that passes **kwargs on does not tell their names.
        open_ended = len(named) < len(parameters)
        valid = "" if open_ended else f"; it takes {', '.join(named)}"
        raise ValueError(f"model {name} has no such argument: {error}{valid}") from error


def _weights_unavailable(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the pretrained weights of {name} could not be had ({type(error).__name__}: {error}). "
        "Without a network connection, give the file itself: model.checkpoint=PATH (and model.pretrained=false)"
    )
