"""All processes of a training hold the same model: asserted at every validation, tensor by tensor."""

from __future__ import annotations

import hashlib

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lowprec.training import processes
from lowprec.training.batch_norm import average_statistics


class DesynchronizedError(RuntimeError):
    """The processes of a training do not hold the same weights, scales, exponents or statistics any more."""


class EqualModels(Callback):
    """Before each validation: batch norm's statistics are averaged over processes, and then every tensor is compared."""

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        average_statistics(pl_module)
        assert_equal_models(pl_module)


def assert_equal_models(model: nn.Module) -> None:
    """Compares all parameters and buffers of ``model`` (weights, exponents, scales, statistics) over processes.

    Raises:
        DesynchronizedError: in all of them; the first tensor that differs, and where, is named.
    """
    if processes.size() == 1:
        return
    everywhere = processes.gathered(fingerprints(model))
    for name, print_of_main in everywhere[0].items():
        different = [rank for rank, prints in enumerate(everywhere) if prints.get(name) != print_of_main]
        if different:
            raise DesynchronizedError(
                f"{name} of process {different[0]} differs from that of process 0 ({len(different)} of {len(everywhere)} "
                "processes differ): the processes no longer train the same model. Go on from the last checkpoint, and "
                "look for what is computed on one process alone"
            )


def fingerprints(model: nn.Module) -> dict[str, str]:
    """A hash of the bytes of each tensor of ``model``'s state."""
    return {
        name: hashlib.blake2b(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in model.state_dict().items()
    }
