"""Top-1 accuracy of anything that turns images into logits, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from lowprec.layers.linear import folded_once
from lowprec.training import processes
from lowprec.training.precision import float32_evaluation

Predictor = Callable[[Tensor], Tensor]


@torch.no_grad()
def top1(predict: Predictor, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu") -> float:
    """The share of images whose largest logit is that of their label.

    Args:
        predict: float images [B, C, H, W] on ``device`` → logits [B, classes]; a module is put there, and into eval
        mode.
        batches: images and int64 labels [B].

    Raises:
        ValueError: there are no images, so there is no accuracy either.
    """
    once: AbstractContextManager[None] = nullcontext()
    if isinstance(predict, nn.Module):
        once = folded_once(predict.to(device).eval())
    correct = total = 0
    with float32_evaluation(torch.device(device)), once:
        for images, labels in batches:
            logits = predict(images.to(device))
            correct += int((logits.argmax(dim=1).cpu() == labels).sum())
            total += len(labels)
    # The loaders of several processes share the images.
    all_correct, images_in_all = processes.total(correct, total)
    if images_in_all == 0:
        raise ValueError("no images to measure accuracy on")
    return all_correct / images_in_all
