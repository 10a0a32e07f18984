"""Strict loading of the usual checkpoint files into a full-precision model, and atomic saving."""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lowprec.tensor_files import write_safetensors

__all__ = ["CheckpointError", "check_published_head", "checkpoint_metadata", "load_checkpoint", "save_checkpoint"]

# Where training scripts put the weights in the dictionary that they save, in order of preference.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "module", "state_dict_ema", "model_ema", "ema")
# What stands before the model's own names; Lightning's checkpoints have the name of the module's attribute.
PREFIXES = ("", "model.", "net.", "network.", "module.", "backbone.", "student.")
COMPILED = "_orig_mod."
SHOWN_DIFFERENCES = 10


class CheckpointError(RuntimeError):
    """A checkpoint cannot be had, cannot be read, or does not fit the model; the message says what to do."""


def load_checkpoint(model: nn.Module, path: str | Path, *, head: str = "strict") -> None:
    """Load the weights in ``path`` into ``model``, in place; every tensor must be there and have the right shape.

    With ``head="new"`` the classifier (the layer of the last matrix) stays as it is in ``model``, whatever the checkpoint
    holds of it: that is how weights of other classes are loaded.

    Reads ``.safetensors`` and everything ``torch.save`` writes (never unpickling code): a bare state dict, one under a
    usual key (``state_dict``, ``model``, ``model_state_dict``, ``model_ema``, …), with the prefixes of DDP
    (``module.``), of torch.compile (``_orig_mod.``) and of the attribute that holds the model in a LightningModule
    (``model.``, ``net.``, …). What else a Lightning checkpoint holds (a teacher, metrics) is left out.

    Raises:
        CheckpointError: no such file, a damaged one, one that only unpickling code could read, or one whose names or
            shapes differ from the model's: the message lists them.
    """
    path = Path(path)
    content = _read(path)
    state = _unwrap(content, path)
    model = getattr(model, "_orig_mod", model)  # a compiled model's own names, without its prefix
    wanted = model.state_dict()
    from_lightning = "pytorch-lightning_version" in content
    state = _without_prefixes(state, wanted, drop_others=from_lightning)
    for key in wanted.keys() - state.keys():
        if key.endswith("num_batches_tracked"):  # files older than PyTorch 0.4.1 lack this counter of training steps
            state[key] = torch.zeros_like(wanted[key])
    if head == "new":
        fresh = _classifier(model).rpartition(".")[0] + "."
        state = {key: tensor for key, tensor in state.items() if not key.startswith(fresh)}
        state |= {key: tensor for key, tensor in wanted.items() if key.startswith(fresh)}
    mismatch = _describe_mismatch(model, wanted, state)
    if mismatch:
        raise CheckpointError(f"the checkpoint {path} does not fit the model\n{mismatch}")
    model.load_state_dict(state, strict=True)


def check_published_head(model: nn.Module, num_classes: int, *, head: str) -> None:
    """Refuse published weights of another number of classes, whose classifier timm leaves out, unless ``head`` is "new".

    Raises:
        CheckpointError: the numbers differ.
    """
    published = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes", num_classes)
    if head == "strict" and published != num_classes:
        raise CheckpointError(
            f"the published weights have {published} classes, the data has {num_classes}: load everything but the "
            "classifier, which then starts afresh, with model.head=new"
        )


def save_checkpoint(model: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write ``model``'s state dict and ``metadata`` (texts) to the safetensors file ``path``.

    The file appears whole or not at all: it is written under another name in the same folder (made if missing), synced
    to the disk, and renamed. torch.compile's ``_orig_mod.`` is taken out of the names.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Cloned, because safetensors refuses tensors that share memory (tied weights).
    state = {
        key.replace(COMPILED, ""): tensor.detach().cpu().contiguous().clone()
        for key, tensor in model.state_dict().items()
    }
    write_safetensors(path, state, metadata)


def checkpoint_metadata(path: str | Path) -> dict[str, str]:
    """The texts that ``save_checkpoint`` stored with the weights.

    Raises:
        CheckpointError: no such file, or not a whole safetensors file.
    """
    path = Path(path)
    _require_file(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise _damaged(path, error) from error


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"the checkpoint {path} is a folder: give the path of a file in it")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}: check the path (the working directory is {Path.cwd()})")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    size = path.stat().st_size
    return CheckpointError(
        f"the checkpoint {path} is damaged, truncated or no checkpoint at all ({size} bytes; {type(error).__name__}: "
        f"{str(error).splitlines()[0] if str(error) else 'unexpected end'}): copy or download it again"
    )


def _read(path: Path) -> Mapping[str, Any]:
    _require_file(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise _damaged(path, error) from error
    try:
        # timm and torchvision store their command line, a plain Namespace, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if refused is None:
            raise _damaged(path, error) from error
        raise CheckpointError(
            f"the checkpoint {path} is not weights alone: it holds a pickled {refused[1]} (a whole module?), and "
            "reading that can run any code. If you trust its origin, make a file of weights once with\n"
            f"  content = torch.load({str(path)!r}, weights_only=False)\n"
            "  torch.save(content.state_dict(), 'weights.pt')  # or content['state_dict']\n"
            "and give model.checkpoint=weights.pt"
        ) from None
    except Exception as error:  # whatever the unpickler stumbles over in a damaged file: EOFError, KeyError, …
        raise _damaged(path, error) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"the checkpoint {path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _unwrap(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors inside the dictionaries of a training script."""
    for key in WRAPPERS:
        if isinstance(content.get(key), Mapping):
            return _unwrap(content[key], path)
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        keys = ", ".join(str(key) for key in list(content)[:SHOWN_DIFFERENCES]) or "none"
        raise CheckpointError(
            f"the checkpoint {path} holds no tensors where they are looked for (its keys: {keys}): "
            f"save the state dict itself, or put it under one of {', '.join(WRAPPERS)}"
        )
    return state


def _without_prefixes(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], drop_others: bool
) -> dict[str, Tensor]:
    """``state`` under the model's own names: of the known prefixes, the one that matches most names is taken away."""
    state = {key.replace(COMPILED, ""): tensor for key, tensor in state.items()}
    prefixes = [first + second for first in ("", "module.") for second in PREFIXES]
    best = max(prefixes, key=lambda prefix: sum(prefix + key in state for key in wanted))
    stripped: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.startswith(best):
            stripped[key.removeprefix(best)] = tensor
        elif not drop_others:
            stripped[key] = tensor
    return stripped


def _describe_mismatch(model: nn.Module, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """One line per kind of difference, empty where there is none."""
    differing = {
        key: (tuple(state[key].shape), tuple(tensor.shape))
        for key, tensor in wanted.items()
        if key in state and state[key].shape != tensor.shape
    }
    lines = [
        _listing("missing in the checkpoint", [key for key in wanted if key not in state]),
        _listing("unexpected in the checkpoint", [key for key in state if key not in wanted]),
        _listing("of another shape", [f"{key} ({ours[0]}, model {ours[1]})" for key, ours in differing.items()]),
        _class_count_hint(model, differing),
    ]
    return "\n".join(line for line in lines if line)


def _listing(title: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:SHOWN_DIFFERENCES])
    return f"  {len(names)} {title}: {shown}{', …' if len(names) > SHOWN_DIFFERENCES else ''}"


def _class_count_hint(model: nn.Module, differing: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    """A hint where the classifier (the last matrix) differs in its number of outputs alone."""
    classifier = _classifier(model)
    if classifier not in differing:
        return ""
    theirs, ours = differing[classifier]
    if theirs[1:] != ours[1:]:
        return ""
    return (
        f"  the classifier {classifier} of the checkpoint has {theirs[0]} classes, the model has {ours[0]}: "
        "check data.num_classes (or the data set) against the checkpoint's, or load everything but the classifier, which "
        "then starts afresh, with model.head=new"
    )


def _classifier(model: nn.Module) -> str:
    """The name of the last matrix, "" if there is none."""
    matrices = [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]
    return matrices[-1] if matrices else ""
