"""How scales should follow the weights while fine-tuning: one descent step a training step, or a full re-solve every k.

    python tests/benchmarks/weight_updates.py [RECIPE ...]

Fine-tunes ResNet-8 on a part of Fashion-MNIST from one full-precision baseline with each policy and several seeds; prints
validation top-1 (mean and spread over seeds) and the time of a training step against the descent's. The product has the
descent alone; the re-solving policies live here.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from rich.console import Console
from torch import Tensor

import lowprec
from lowprec.compose import compose_run
from lowprec.full_precision import full_precision_model
from lowprec.layers.weights import WeightQuantizer
from lowprec.run_data import run_data
from lowprec.training.evaluation import top1
from lowprec.training.fit import fit
from lowprec.training.module import Classification

CONFIGS = Path(__file__).parents[2] / "conf"
SEEDS = (0, 1, 2)
EPOCHS = 2
LIMIT_TRAIN = 12_000


def resolve_every(steps: int) -> Callable[[WeightQuantizer, Tensor], None]:
    """A policy that finds all scales anew every ``steps`` training steps and leaves them alone in between."""

    def follow(quantizer: WeightQuantizer, weight: Tensor) -> None:
        count = getattr(quantizer, "_steps", 0)
        if count % steps == 0:
            quantizer.solve(weight, "")
        quantizer._steps = count + 1  # type: ignore[assignment]

    return follow


POLICIES: dict[str, Callable[[WeightQuantizer, Tensor], None]] = {
    "descent every step": WeightQuantizer.descend,
    "re-solve every step": resolve_every(1),
    "re-solve every 10 steps": resolve_every(10),
    "re-solve every 100 steps": resolve_every(100),
}


@contextmanager
def policy(name: str) -> Iterator[None]:
    """Within it, training follows weights by that policy."""
    original = WeightQuantizer.descend
    WeightQuantizer.descend = POLICIES[name]  # type: ignore[method-assign]
    try:
        yield
    finally:
        WeightQuantizer.descend = original  # type: ignore[method-assign]


def fine_tune(name: str, recipe: str, seed: int) -> tuple[float, float]:
    """Validation top-1 after fine-tuning with a policy, and seconds of training."""
    config = compose_run(["experiment=fashion_mnist_w2a8_n4", f"quant={recipe}", "trainer.progress=none"], CONFIGS)
    console = Console(quiet=True)
    # The baseline sees all training images, and is trained once.
    baseline = full_precision_model(config, run_data(config), console)
    config.seed = seed
    config.data.limit_train = LIMIT_TRAIN
    data = run_data(config)
    seed_everything(seed, verbose=False)
    qmodel = lowprec.prepare(baseline, config.recipe, torch.zeros(2, *data.input_size))
    lowprec.calibrate(qmodel, data.calibration_batches(config.calibration.images))
    module = Classification(qmodel, config.optim, label_smoothing=config.trainer.label_smoothing)
    with tempfile.TemporaryDirectory() as folder, policy(name):
        started = time.monotonic()
        fit(module, data, folder=Path(folder), max_epochs=EPOCHS, settings=config.trainer, title="", console=console)
        seconds = time.monotonic() - started
    return top1(qmodel, data.val_dataloader()), seconds


def main(recipes: list[str]) -> None:
    for recipe in recipes:
        print(f"{recipe}: validation top-1 after {EPOCHS} epochs of {LIMIT_TRAIN:,} images, {len(SEEDS)} seeds")
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in POLICIES}
        for seed in SEEDS:
            for name in POLICIES:
                results[name].append(fine_tune(name, recipe, seed))
        reference = statistics.median(seconds for _, seconds in results["descent every step"])
        for name, runs in results.items():
            accuracies = [accuracy for accuracy, _ in runs]
            ratio = statistics.median(seconds for _, seconds in runs) / reference
            mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
            print(f"  {name:26} {mean:7.2%} ± {spread:.2%}   time {ratio:.2f}x", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["w2a8_n4", "w2a8_n64"])
