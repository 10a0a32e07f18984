"""Seconds of all that comes before and after training: solve, prepare, calibrate, convert, save and load.

    python tests/benchmarks/preparation.py [MODEL ...] [--recipe w2a8_n4] [--batch 16] [--batches 8] [--side 224] [--threads 2]

MODEL is a name of timm's or torchvision's (default: resnet50 resnet101); weights and images are random. "solve" finds codes
and scales of all convolutions and linear layers, at the recipe's bits and cluster size; "forward" is the plain model's
evaluation of the calibration images, which the others are to be held against; "prepare" solves too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from inference import describe_machine, settled
from networks import images
from torch import Tensor, nn

import lowprec
from lowprec.models import create_model

Result = TypeVar("Result")


def timed(action: Callable[[], Result]) -> tuple[Result, float]:
    """What it gives, and its seconds."""
    started = time.perf_counter()
    result = action()
    return result, time.perf_counter() - started


def solve_all(model: nn.Module, recipe: lowprec.Recipe) -> None:
    scheme = asdict(recipe.weights)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            lowprec.solve(module.weight.detach(), **scheme)


@torch.no_grad()
def measure(model: nn.Module, recipe: lowprec.Recipe, batches: list[Tensor], folder: Path) -> dict[str, float]:
    """Seconds by step."""
    model(batches[0])  # what is done once is not the forward pass
    seconds = {"forward": timed(lambda: [model(batch) for batch in batches])[1]}
    seconds["solve"] = timed(lambda: solve_all(model, recipe))[1]
    qmodel, seconds["prepare"] = timed(lambda: lowprec.prepare(model, recipe, batches[0][:2]))
    seconds["calibrate"] = timed(lambda: lowprec.calibrate(qmodel, batches))[1]
    imodel, seconds["convert"] = timed(lambda: lowprec.convert(qmodel.eval()))
    file = folder / "model.safetensors"
    seconds["save"] = timed(lambda: lowprec.save(imodel, file))[1]
    seconds["load"] = timed(lambda: lowprec.load(file))[1]
    return seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["resnet50", "resnet101"])
    parser.add_argument("--recipe", default="w2a8_n4")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: all cores")
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    recipe = lowprec.Recipe.load(given.recipe)
    print(describe_machine(torch.get_num_threads()))
    for index, name in enumerate(given.models):
        model = settled(create_model(name, num_classes=1000), given.side)
        batches = [images(seed, given.batch, (3, given.side, given.side)) for seed in range(given.batches)]
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(model, recipe, batches, Path(folder))
        if index == 0:
            print(f"{'seconds':16}" + "".join(f"{step:>11}" for step in seconds))
        print(f"{name:16}" + "".join(f"{value:11.2f}" for value in seconds.values()), flush=True)


if __name__ == "__main__":
    main()
