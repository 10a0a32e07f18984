"""What choices in fine-tuning are worth: the ablation table of the README, each line against the defaults, several seeds.

    python tests/benchmarks/fine_tuning.py [key=value ...] [--only 'rate*'] [--recipes w2a8_n4 w2a8_n64] [--seeds 0 1 2]

key=value: a run's, as train.py takes them; by default ResNet-8, 8 wide, stem of stride 2, on Fashion-MNIST, one epoch. Of each
seed the full-precision baseline is trained first and kept in runs/baselines; all lines start from it and see the same
batches in the same order. Options that the product has are set by their keys; methods that it does not have, because they
were not worth it, are those of fine_tuning_methods.py and fine_tuning_losses.py.

Printed are top-1 in validation (the test images play no part in choices) and the paired difference to the defaults in points,
both as mean ± standard deviation over seeds, and the ratio of training times.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from fine_tuning_losses import dampening, feature_distillation
from fine_tuning_methods import (
    Method,
    Setting,
    averaging,
    freezing,
    frozen_norms,
    layer_by_layer,
    learned_exponents,
    learned_scales,
    plain,
    reestimated_norms,
    resolved_every,
    together,
    unrounded_scales,
)
from lightning.pytorch import seed_everything
from rich.console import Console
from torch import Tensor

import lowprec
from lowprec.config import RunConfig
from lowprec.run.compose import compose_run
from lowprec.run.data import run_data
from lowprec.run.full_precision import full_precision_model
from lowprec.training.evaluation import top1
from lowprec.training.fit import fit
from lowprec.training.module import Classification

CONFIGS = Path(__file__).parents[2] / "conf"
DEFAULTS = {
    "experiment": "fashion_mnist_w2a8_n4",
    "model": "cifar_resnet8",
    "model.arguments": "{width: 8, stem_stride: 2}",
    "baseline.max_epochs": "16",
    "trainer.max_epochs": "1",
    "trainer.progress": "none",
}


@dataclass(frozen=True)
class Variant:
    """One line of the table: overrides of the run, and the method it is trained by."""

    name: str
    overrides: tuple[str, ...] = ()
    method: Method = plain


@dataclass(frozen=True)
class Result:
    """Top-1 in validation before and after fine-tuning, and the seconds of the training."""

    before: float
    after: float
    seconds: float


REFERENCE = Variant("defaults")
VARIANTS = [
    REFERENCE,
    Variant("weights as solved, not reconstructed", ("calibration.reconstruct=false",)),
    Variant("ternary classifier", ("quant.rules=[]",)),
    *(Variant(f"rate {rate}", (f"optim.learning_rate={rate}",)) for rate in (0.003, 0.01, 0.03, 0.1)),
    Variant("AdamW, rate 0.001", ("optim=adamw", "optim.learning_rate=0.001")),
    *(Variant(f"weight decay {decay}", (f"optim.weight_decay={decay}",)) for decay in (0, 5e-4)),
    *(
        Variant(f"distillation, weight {weight}", (f"trainer.distillation.weight={weight}",))
        for weight in (0, 0.5, 0.9, 1.0)
    ),
    Variant("batches of 64", ("data.batch_size=64",)),
    Variant("distillation 0.9, decay 0.0005", ("trainer.distillation.weight=0.9", "optim.weight_decay=0.0005")),
    Variant("distillation, temperature 2", ("trainer.distillation.temperature=2",)),
    *(
        Variant(f"distillation of residual sums, {weight}", method=feature_distillation(weight))
        for weight in (0.3, 3.0)
    ),
    Variant("scales solved anew every step", method=resolved_every(1)),
    Variant("scales solved anew every 100 steps", method=resolved_every(100)),
    Variant("scales learned (LSQ)", method=learned_scales),
    Variant("scales not rounded in training", method=unrounded_scales),
    *(Variant(f"dampening {strength}", method=dampening(strength)) for strength in (0.001, 0.1)),
    *(Variant(f"freezing at {share:.0%} flips", method=freezing(share)) for share in (0.01, 0.05)),
    Variant("layer by layer in the first half", method=layer_by_layer(0.5)),
    Variant("activation exponents learned (TQT)", method=learned_exponents(0.003)),
    *(Variant(f"averaging, decay {decay}", method=averaging(decay)) for decay in (0.98, 0.995)),
    *(Variant(f"batch norm frozen after {share:.0%}", method=frozen_norms(share)) for share in (0, 0.5)),
    Variant("batch norm re-estimated", method=reestimated_norms),
    Variant("averaging, batch norm re-estimated", method=together(averaging(0.98), reestimated_norms)),
]


class Study:
    """A recipe with one seed. Baselines, and models before fine-tuning, are made once for all lines that share them."""

    def __init__(self, overrides: Sequence[str], recipe: str, seed: int, limit_train: int | None) -> None:
        self.overrides, self.recipe, self.seed, self.limit_train = overrides, recipe, seed, limit_train
        config = self.configuration(REFERENCE)
        # The baseline sees all training images of its seed's split: validation images are new to it, too.
        self.baseline = full_precision_model(config, run_data(config), Console(quiet=True))
        self.starts: dict[str, dict[str, Tensor]] = {}

    def configuration(self, variant: Variant) -> RunConfig:
        """The run of a line; raises ConfigError where the overrides describe none."""
        lines = [*self.overrides, f"quant={self.recipe}", f"seed={self.seed}", *variant.overrides]
        given = {line.partition("=")[0] for line in lines}
        defaults = [f"{key}={value}" for key, value in DEFAULTS.items() if key not in given]
        # Groups first, so that keys of theirs that are given win.
        return compose_run([*defaults, *lines], CONFIGS)

    def fine_tune(self, variant: Variant) -> Result:
        """Trains the line's model from the seed alone."""
        config = self.configuration(variant)
        config.data.limit_train = self.limit_train
        data = run_data(config)
        original = lowprec.prepare(self.baseline, config.recipe, torch.zeros(2, *data.input_size))
        qmodel = lowprec.prepare(self.baseline, config.recipe, torch.zeros(2, *data.input_size))
        images = data.calibration_batches(config.calibration.images)
        start = json.dumps([asdict(config.recipe), asdict(config.calibration)], sort_keys=True)
        if start not in self.starts:
            (lowprec.reconstruct if config.calibration.reconstruct else lowprec.calibrate)(qmodel, images)
            self.starts[start] = {name: value.clone() for name, value in qmodel.state_dict().items()}
        qmodel.load_state_dict(self.starts[start])
        before = top1(qmodel, data.val_dataloader())
        seed_everything(self.seed, verbose=False)
        with tempfile.TemporaryDirectory() as folder, variant.method(Setting(qmodel, original, images)) as callbacks:
            module = Classification(
                qmodel,
                config.optim,
                label_smoothing=config.trainer.label_smoothing,
                teacher=copy.deepcopy(self.baseline),
                distillation=config.trainer.distillation,
            )
            started = time.monotonic()
            fit(
                module,
                data,
                folder=Path(folder),
                max_epochs=config.trainer.max_epochs,
                settings=config.trainer,
                title="",
                console=Console(quiet=True),
                callbacks=callbacks,
            )
            seconds = time.monotonic() - started
        return Result(before, top1(qmodel, data.val_dataloader()), seconds)


def line(name: str, results: Sequence[Result], reference: Sequence[Result]) -> str:
    """Means over seeds; differences and times paired with those of the reference."""
    points = [100 * (mine.after - other.after) for mine, other in zip(results, reference, strict=True)]
    ratio = statistics.median(mine.seconds / other.seconds for mine, other in zip(results, reference, strict=True))
    before, after = (statistics.mean(getattr(result, key) for result in results) for key in ("before", "after"))
    deviation = f"{statistics.stdev(points):.2f}" if len(points) > 1 else "?"
    return f"{name:40} {before:8.2%} {after:8.2%}  {statistics.mean(points):+6.2f} ± {deviation}  {ratio:5.2f}x"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run, as train.py takes them")
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="lines' names, with wildcards; defaults are always there"
    )
    parser.add_argument("--recipes", nargs="+", default=["w2a8_n4", "w2a8_n64"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit-train", type=int, help="images of the fine-tuning; the baseline is trained on all")
    given = parser.parse_intermixed_args(arguments)
    for pattern in given.only:
        if not fnmatch.filter([variant.name for variant in VARIANTS], pattern):
            parser.error(f"--only {pattern}: no such line; there are {'; '.join(variant.name for variant in VARIANTS)}")
    chosen = [one for one in VARIANTS[1:] if any(fnmatch.fnmatchcase(one.name, pattern) for pattern in given.only)]
    for recipe in given.recipes:
        studies = [Study(given.overrides, recipe, seed, given.limit_train) for seed in given.seeds]
        config = studies[0].configuration(REFERENCE)
        if config.trainer.threads is not None:
            torch.set_num_threads(config.trainer.threads)
        images = "all images" if given.limit_train is None else f"{given.limit_train:,} images"
        print(
            f"{recipe}, {config.model.name} {config.model.arguments}, {config.data.name}: {config.trainer.max_epochs} epochs of "
            f"{images}, seeds {' '.join(map(str, given.seeds))}; validation top-1\n"
            f"{'':40} {'before':>8} {'after':>8}  {'to defaults':>14}  {'time':>6}",
            flush=True,
        )
        reference = [study.fine_tune(REFERENCE) for study in studies]
        print(line(REFERENCE.name, reference, reference), flush=True)
        for variant in chosen:
            print(line(variant.name, [study.fine_tune(variant) for study in studies], reference), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
