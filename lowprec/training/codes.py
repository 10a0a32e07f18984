"""How the weight codes of a fake-quant model move while it trains, and an alarm when a layer's all go to zero."""

from __future__ import annotations

import warnings

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lowprec.layers import quantized_layers
from lowprec.training import processes
from lowprec.training.loggers import alert, log_metrics

COLLAPSE = 0.99


class CollapseWarning(UserWarning):
    """A layer whose ternary codes are almost all zero computes almost nothing."""


class CodeStatistics(Callback):
    """Logs per epoch and layer ``sparsity/<layer>``, the share of zero codes, and ``flips/<layer>``, of changed ones.

    Flips are counted from one epoch's end to the next. A ternary layer with more than 99 % zeros raises
    CollapseWarning and a W&B alert, once. Codes are the same in all processes, so the main one alone counts.
    """

    def __init__(self) -> None:
        self._previous: dict[str, Tensor] = {}
        self._warned: set[str] = set()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not processes.is_main():
            return
        # The codes of the checkpoint, when training goes on from one: those of the last epoch's end.
        self._previous = _codes(pl_module.model)  # type: ignore[arg-type]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not processes.is_main():
            return
        current = _codes(pl_module.model)  # type: ignore[arg-type]
        metrics = {}
        for name, codes in current.items():
            metrics[f"sparsity/{name}"] = sparsity(codes)
            metrics[f"flips/{name}"] = float((codes != self._previous[name]).float().mean())
        log_metrics(trainer, metrics)
        self._previous = current
        self._warn_of_collapse(trainer, pl_module.model, metrics)  # type: ignore[arg-type]

    def _warn_of_collapse(self, trainer: lightning.Trainer, model: nn.Module, metrics: dict[str, float]) -> None:
        for name, layer in quantized_layers(model):
            zeros = metrics[f"sparsity/{name}"]
            if layer.scheme.bits != 2 or zeros <= COLLAPSE or name in self._warned:
                continue
            self._warned.add(name)
            text = (
                f"layer {name} has collapsed: {zeros:.1%} of its ternary codes are zero. Lower optim.learning_rate, "
                f"use a smaller quant.weights.cluster_size, or give the layer more bits: "
                f"quant.rules=[{{pattern: '{name}', bits: 4}}]"
            )
            warnings.warn(text, CollapseWarning, stacklevel=2)
            alert(trainer.loggers, "a layer has collapsed", text)


def sparsity(codes: Tensor) -> float:
    """The share of zeros among codes of any shape."""
    return float((codes == 0).float().mean())


@torch.no_grad()
def _codes(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight_codes().detach().clone() for name, layer in quantized_layers(model)}
