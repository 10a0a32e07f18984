"""What quantizers make of one full-precision checkpoint: lowprec, Brevitas, LSQ, NNCF and torchao, same data, same training.

    python tests/benchmarks/accuracy.py [key=value ...] [--only 'lowprec*' 'LSQ*'] [--seeds 0 1 2] [--distillation 0.5 0]

key=value: a run's, as train.py takes them (experiment=, model=, trainer.max_epochs=); by default ResNet-8, 8 wide, stride 1
in the stem, on Fashion-MNIST. Others' quantizers are the optional extra "peers"; a line says where one is not installed or fails.

All candidates of a seed start from the same full-precision model (trained first, and kept in runs/baselines) and see the same
batches in the same order, with the same optimizer, schedule, epochs and loss, in float32. The loss holds the same
distillation from the full-precision model for all, peers included, or none for any: what differs is the quantizer. Each
candidate has its own learning rate: the best one of --rates in validation, with the first seed; the test images play no
part in it. Of the epochs the best in validation counts. The control is the full-precision model, trained in the same way.

The first convolution and the classifier have 8-bit weights, activations 8 bits, residual adds 8-bit operands. Of lowprec the
integer model is judged, of torchao the converted one, of the others the fake-quant model in eval mode, whose batch norms
stay in float. Printed are bits per weight (scales included, others' as float32), top-1 on the whole test split and its
difference to the control's of the same seed (mean ± standard deviation over seeds), and the ratio of training times.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accuracy_brevitas import CANDIDATES as BREVITAS
from accuracy_eight_bit import CANDIDATES as EIGHT_BIT
from accuracy_lowprec import CANDIDATES as LOWPREC
from accuracy_lowprec import CONTROL
from accuracy_lsq import CANDIDATES as LSQ
from accuracy_peer import Candidate, Start
from lightning.pytorch import seed_everything
from rich.console import Console
from torch import nn

from lowprec.config import RunConfig
from lowprec.run.compose import compose_run
from lowprec.run.data import run_data
from lowprec.run.full_precision import full_precision_model
from lowprec.training.checkpoints import TrainingDiverged
from lowprec.training.evaluation import top1
from lowprec.training.fit import fit
from lowprec.training.module import Classification

CONFIGS = Path(__file__).parents[2] / "conf"
CANDIDATES = [*LOWPREC, *BREVITAS, *LSQ, *EIGHT_BIT]
DEFAULTS = ["experiment=fashion_mnist_w2a8_n4", "model=cifar_resnet8_tiny"]
# Others' scales are no powers of two: in bf16 their codes would be rounded once more.
FIXED = ["trainer.progress=none", "trainer.precision=32"]
# What the candidates, or this program's options, decide.
TAKEN = ("quant", "seed", "optim.learning_rate", "trainer.distillation.weight")


@dataclass
class Line:
    """What was found of one candidate, in the order of the seeds. rate: of learning; at_end: it is the least or largest."""

    weight_bits: float = math.nan
    rate: float = math.nan
    at_end: bool = False
    top1: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Trained:
    """A fine-tuned candidate. validation: top-1 of its best epoch."""

    model: nn.Module
    weight_bits: float
    validation: float
    seconds: float


class Seed:
    """What all candidates of a seed share. limit_train: images of the fine-tuning; the baseline has seen all."""

    def __init__(self, overrides: Sequence[str], seed: int, limit_train: int | None) -> None:
        self.config = configuration(overrides, seed)
        print(f"seed {seed}: full-precision baseline", file=sys.stderr, flush=True)
        data = run_data(self.config)
        self.start = Start(
            full_precision_model(self.config, data, Console(quiet=True)),
            data.calibration_batches(self.config.calibration.images),
        )
        self.test = data.test_dataloader()
        self.full_precision = top1(self.start.model, self.test)
        if limit_train is not None:
            self.config.data.limit_train = limit_train

    def fine_tune(self, candidate: Candidate, rate: float, distillation: float) -> Trained:
        """The candidate after training, from the seed alone."""
        config = copy.deepcopy(self.config)
        config.optim.learning_rate = rate
        config.trainer.distillation.weight = distillation
        data = run_data(config)
        seed_everything(config.seed, verbose=False)
        quantized = candidate.quantize(self.start)
        module = Classification(
            quantized.model,
            config.optim,
            label_smoothing=config.trainer.label_smoothing,
            teacher=copy.deepcopy(self.start.model),
            distillation=config.trainer.distillation,
            channels_last=config.trainer.channels_last,
        )
        console, epochs = Console(quiet=True), config.trainer.max_epochs
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            fit(
                module,
                data,
                folder=Path(folder),
                max_epochs=epochs,
                settings=config.trainer,
                title="",
                console=console,
            )
            seconds = time.monotonic() - started
        validation = top1(quantized.model, data.val_dataloader())
        print(
            f"  seed {config.seed}, rate {rate:g}: validation {validation:.2%}, {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        return Trained(quantized.model, quantized.weight_bits, validation, seconds)

    def judge(self, candidate: Candidate, trained: Trained) -> float:
        """Top-1 on the whole test split of what the candidate ships."""
        return top1(candidate.shipped(trained.model.eval()), self.test)


def configuration(overrides: Sequence[str], seed: int) -> RunConfig:
    """The run's configuration; overrides replace the defaults of the same groups.

    Raises:
        ConfigError: the overrides describe no run.
    """
    given = {override.partition("=")[0] for override in overrides}
    # Another experiment brings a model of its own.
    defaults = [] if "experiment" in given else [line for line in DEFAULTS if line.partition("=")[0] not in given]
    return compose_run([*defaults, *FIXED, *overrides, f"seed={seed}"], CONFIGS)


def study(candidate: Candidate, seeds: Sequence[Seed], rates: Sequence[float], distillation: float) -> Line:
    """Chooses the rate in validation with the first seed, then trains with all seeds; the first is not trained again.

    Raises:
        TrainingDiverged: at every rate.
    """
    best: tuple[Trained, float] | None = None
    diverged: TrainingDiverged | None = None
    for rate in rates:
        try:
            trained = seeds[0].fine_tune(candidate, rate, distillation)
        except TrainingDiverged as error:
            diverged = error
            continue
        if best is None or trained.validation > best[0].validation:
            best = trained, rate
    if best is None:
        raise diverged or ValueError("no rates to choose from")
    first, rate = best
    line = Line(first.weight_bits, rate, at_end=len(rates) > 1 and rate in (min(rates), max(rates)))
    for seed in seeds:
        trained = first if seed is seeds[0] else seed.fine_tune(candidate, rate, distillation)
        line.top1.append(seed.judge(candidate, trained))
        line.seconds.append(trained.seconds)
    return line


def compare(
    candidates: Sequence[Candidate], seeds: Sequence[Seed], rates: Sequence[float], distillation: float
) -> tuple[dict[str, Line], dict[str, str]]:
    """Lines by name, the control's first, and why others have none."""
    lines: dict[str, Line] = {}
    failed: dict[str, str] = {}
    for candidate in (CONTROL, *candidates):
        print(f"distillation {distillation:g}: {candidate.name}", file=sys.stderr, flush=True)
        # Quantizers fail in their own ways, none of which may end the others' measurement.
        try:
            with contextlib.redirect_stdout(sys.stderr):  # they talk
                lines[candidate.name] = study(candidate, seeds, rates, distillation)
        except ModuleNotFoundError as error:
            failed[candidate.name] = f'pip install "lowprec[peers]" ({error})'
        except Exception as error:
            failed[candidate.name] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return lines, failed


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation (of a sample), the mean in that form; of a single value no deviation is known."""
    deviation = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "?"
    return f"{format(statistics.mean(values), form)} ± {deviation}"


def table(lines: dict[str, Line], failed: dict[str, str]) -> str:
    """A line for each candidate: bits per weight, learning rate, top-1 in percent, paired difference in points, time."""
    width = max(len(name) for name in (*lines, *failed))
    rows = [f"{'':{width}} {'bits':>6} {'rate':>8}  {'top-1, %':>13}  {'to control':>13}  {'time':>6}"]
    control = lines.get(CONTROL.name)
    for name, line in lines.items():
        difference, ratio = "—", "—"
        if control is not None:
            points = [100 * (mine - other) for mine, other in zip(line.top1, control.top1, strict=True)]
            difference = spread(points, "+.2f") if line is not control else "—"
            ratios = [mine / other for mine, other in zip(line.seconds, control.seconds, strict=True)]
            ratio = f"{statistics.median(ratios):.2f}x"
        rate = f"{line.rate:g}{'*' if line.at_end else ' '}"
        accuracy = spread([100 * found for found in line.top1], ".2f")
        rows.append(f"{name:{width}} {line.weight_bits:6.2f} {rate:>8}  {accuracy:>13}  {difference:>13}  {ratio:>6}")
    rows += [f"{name:{width}} failed: {reason}" for name, reason in failed.items()]
    if any(line.at_end for line in lines.values()):
        rows.append("* the least or the largest of --rates: a better one may lie beyond")
    return "\n".join(rows)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run, as train.py takes them")
    parser.add_argument("--only", nargs="+", default=["*"], help="candidates' names, with wildcards")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.01, 0.03, 0.1], help="learning rates")
    parser.add_argument("--distillation", type=float, nargs="+", default=[0.5, 0.0], help="shares of the loss")
    parser.add_argument("--limit-train", type=int, help="images of the fine-tuning; the baseline is trained on all")
    given = parser.parse_intermixed_args(arguments)
    names = [candidate.name for candidate in CANDIDATES]
    unmatched = [pattern for pattern in given.only if not fnmatch.filter(names, pattern)]
    if unmatched:
        parser.error(f"--only {' '.join(unmatched)}: no such candidate; there are {'; '.join(names)}")
    for override in given.overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key in TAKEN or key.startswith("quant."):
            parser.error(f"{override}: {key} is not the run's here; see --only, --seeds, --rates and --distillation")

    chosen = [one for one in CANDIDATES if any(fnmatch.fnmatchcase(one.name, pattern) for pattern in given.only)]
    config = configuration(given.overrides, given.seeds[0])
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    seeds = [Seed(given.overrides, seed, given.limit_train) for seed in given.seeds]
    sizes = run_data(seeds[0].config).sizes
    print(
        f"{config.data.name}, {config.model.name} {config.model.arguments}: {config.trainer.max_epochs} epochs of "
        f"{sizes['train']:,} images, seeds {' '.join(map(str, given.seeds))}, {sizes['test']:,} test images\n"
        f"full precision before that: {spread([100 * seed.full_precision for seed in seeds], '.2f')} %"
    )
    for weight in given.distillation:
        lines, failed = compare(chosen, seeds, given.rates, weight)
        print(f"\ndistillation {weight:g}\n{table(lines, failed)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
