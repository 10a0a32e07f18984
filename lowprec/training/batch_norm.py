"""Batch norm over the batches of all processes, on CPUs as well (torch's own is for GPUs alone)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as distributed
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from lowprec.training import processes


class SumOverProcesses(torch.autograd.Function):
    """y = Σ over processes of x. Gradient: each x adds to every process's y, so dx = Σ over processes of dy."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        distributed.all_reduce(total)
        return total


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of [B, C, H, W] whose statistics in training are those of the batches of all processes together.

    mean = Σ n·mean_p / Σ n and variance = Σ n·(variance_p + (mean_p − mean)²) / Σ n over processes p, in at least float32 (Chan,
    Golub and LeVeque, 1979). Equal to one process with the whole batch, to float tolerance.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or processes.size() == 1:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            # Half precision has too few digits for sums; float64 keeps its own.
            wide = input if input.dtype == torch.float64 else input.float()
            return self._normalized(wide).to(input.dtype)

    def _normalized(self, values: Tensor) -> Tensor:
        axes = [axis for axis in range(values.ndim) if axis != 1]
        count = values.new_tensor([values.numel() / values.shape[1]])
        variance, mean = torch.var_mean(values, axes, correction=0)
        counted: Tensor = SumOverProcesses.apply(torch.cat([count, count * mean]))
        whole, mean_of_all = counted[0], counted[1:] / counted[0]
        spread: Tensor = SumOverProcesses.apply(count * (variance + (mean - mean_of_all).square()))
        variance_of_all = spread / whole
        self._update(mean_of_all.detach(), variance_of_all.detach(), whole.detach())
        gain = (variance_of_all + self.eps).rsqrt()
        offset = -mean_of_all * gain
        if self.affine:
            gain, offset = gain * self.weight, offset * self.weight + self.bias
        shape = [-1 if axis == 1 else 1 for axis in range(values.ndim)]
        return values * gain.view(shape) + offset.view(shape)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(variance * count / (count - 1), factor)


class SynchronizedBatchNormAct2d(BatchNormAct2d, SynchronizedBatchNorm2d):
    """timm's batch norm with an activation in it, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(SynchronizedBatchNorm2d.forward(self, x)))


_SYNCHRONIZED: dict[type, type] = {
    nn.BatchNorm2d: SynchronizedBatchNorm2d,
    BatchNormAct2d: SynchronizedBatchNormAct2d,
}


def synchronize_batch_norms(model: nn.Module) -> None:
    """Makes each batch norm of ``model`` one over all processes, in place; its tensors and names stay.

    Raises:
        TypeError: a batch norm of another kind than those of 2-d images; it is named.
    """
    for name, module in model.named_modules():
        if type(module) in _SYNCHRONIZED:
            # The class alone changes, so that whoever holds the module or a tensor of it still does.
            module.__class__ = _SYNCHRONIZED[type(module)]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in _SYNCHRONIZED.values():
            raise TypeError(
                f"trainer.sync_batchnorm=true: {name} is a {type(module).__name__}, which cannot be synchronized"
            )


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Running statistics of all batch norms become their mean over processes: each has seen images of its own."""
    if processes.size() == 1:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for statistic in (module.running_mean, module.running_var):
                if statistic is not None:
                    distributed.all_reduce(statistic)
                    statistic /= processes.size()
