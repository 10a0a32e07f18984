"""What choices in fine-tuning are worth, on a part of Fashion-MNIST, several seeds, each with its full-precision baseline.

    python tests/benchmarks/fine_tuning.py [updates] [distillation] [classifier] [reconstruction]

The baseline of each seed is trained first and kept in runs/baselines.

updates: how scales follow the weights – one descent step a training step, or a full re-solve every k steps. distillation:
from the full-precision model's logits, at several weights. classifier: ternary or 8-bit. reconstruction: weights as solved, or
fitted to full-precision outputs, and learning rates from there. Prints validation top-1 before and after fine-tuning (means over
seeds), both differences to the study's first line (mean ± standard deviation over seeds) and the ratio of training times.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from rich.console import Console
from torch import Tensor

import lowprec
from lowprec.layers.weights import WeightQuantizer
from lowprec.run.compose import compose_run
from lowprec.run.data import run_data
from lowprec.run.full_precision import full_precision_model
from lowprec.training.evaluation import top1
from lowprec.training.fit import fit
from lowprec.training.module import Classification

CONFIGS = Path(__file__).parents[2] / "conf"
SEEDS = (0, 1, 2)
EPOCHS = 2
LIMIT_TRAIN = 12_000

Follow = Callable[[WeightQuantizer, Tensor], None]


@dataclass(frozen=True)
class Variant:
    """One line of a study: overrides of the default run, and how scales follow the weights."""

    name: str
    overrides: tuple[str, ...] = ()
    follow: Follow = WeightQuantizer.descend


def resolve_every(steps: int) -> Follow:
    """A policy that finds all scales anew every ``steps`` training steps; the product has the descent alone."""

    def follow(quantizer: WeightQuantizer, weight: Tensor) -> None:
        count = getattr(quantizer, "_steps", 0)
        if count % steps == 0:
            quantizer.solve(weight, "")
        quantizer._steps = count + 1  # type: ignore[assignment]

    return follow


STUDIES: dict[str, list[Variant]] = {
    "updates": [
        Variant("descent every step"),
        Variant("re-solve every step", follow=resolve_every(1)),
        Variant("re-solve every 100 steps", follow=resolve_every(100)),
    ],
    "distillation": [
        Variant(f"distillation weight {weight}", (f"trainer.distillation.weight={weight}",)) for weight in (0, 0.5, 0.9)
    ],
    "classifier": [
        Variant("ternary classifier", ("quant.rules=[]",)),
        Variant("8-bit classifier"),
    ],
    "reconstruction": [
        Variant("weights as solved", ("calibration.reconstruct=false",)),
        Variant("reconstructed"),
        Variant("reconstructed, rate 0.01", ("optim.learning_rate=0.01",)),
    ],
}


@contextmanager
def following(follow: Follow) -> Iterator[None]:
    """Within it, training follows the weights by that policy."""
    original = WeightQuantizer.descend
    WeightQuantizer.descend = follow  # type: ignore[method-assign]
    try:
        yield
    finally:
        WeightQuantizer.descend = original  # type: ignore[method-assign]


def fine_tune(variant: Variant, recipe: str, seed: int) -> tuple[float, float, float]:
    """Validation top-1 before and after fine-tuning a variant, and seconds of training."""
    overrides = ["experiment=fashion_mnist_w2a8_n4", f"quant={recipe}", "trainer.progress=none", *variant.overrides]
    config = compose_run(overrides, CONFIGS)
    console = Console(quiet=True)
    config.seed = seed
    # The baseline sees all training images of its seed's split: validation images are new to it, too.
    baseline = full_precision_model(config, run_data(config), console)
    config.data.limit_train = LIMIT_TRAIN
    data = run_data(config)
    seed_everything(seed, verbose=False)
    qmodel = lowprec.prepare(baseline, config.recipe, torch.zeros(2, *data.input_size))
    adapt = lowprec.reconstruct if config.calibration.reconstruct else lowprec.calibrate
    adapt(qmodel, data.calibration_batches(config.calibration.images))
    before = top1(qmodel, data.val_dataloader())
    module = Classification(
        qmodel,
        config.optim,
        label_smoothing=config.trainer.label_smoothing,
        teacher=baseline,
        distillation=config.trainer.distillation,
    )
    with tempfile.TemporaryDirectory() as folder, following(variant.follow):
        started = time.monotonic()
        fit(module, data, folder=Path(folder), max_epochs=EPOCHS, settings=config.trainer, title="", console=console)
        seconds = time.monotonic() - started
    return before, top1(qmodel, data.val_dataloader()), seconds


def main(studies: list[str]) -> None:
    for study in studies:
        for recipe in ("w2a8_n4", "w2a8_n64"):
            print(f"{study}, {recipe}: validation top-1, {EPOCHS} epochs of {LIMIT_TRAIN:,} images, {len(SEEDS)} seeds")
            runs = {variant.name: [fine_tune(variant, recipe, seed) for seed in SEEDS] for variant in STUDIES[study]}
            reference = runs[STUDIES[study][0].name]
            for name, results in runs.items():
                columns = [_against(results, reference, index) for index in (0, 1)]
                ratio = statistics.median(mine[2] / other[2] for mine, other in zip(results, reference, strict=True))
                print(f"  {name:26} before {columns[0]}   after {columns[1]}   time {ratio:.2f}x", flush=True)


def _against(results: list[tuple[float, float, float]], reference: list[tuple[float, float, float]], index: int) -> str:
    """The mean of one figure, and its difference in points: mean ± standard deviation over the seeds, paired."""
    mean = statistics.mean(result[index] for result in results)
    points = [100 * (mine[index] - other[index]) for mine, other in zip(results, reference, strict=True)]
    return f"{mean:7.2%} ({statistics.mean(points):+.2f} ± {statistics.stdev(points):.2f})"


if __name__ == "__main__":
    main(sys.argv[1:] or list(STUDIES))
