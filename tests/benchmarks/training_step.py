"""What a step of quantization-aware training costs, against a plain step of the same model: time and peak memory.

    python tests/benchmarks/training_step.py [MODEL ...] [--batch 16] [--side 224] [--rounds 10] [--precision 32 bf16]

MODEL is a name of timm's or torchvision's (default: resnet18); weights and images are random. A step is forward pass,
cross-entropy, backward pass and SGD with momentum; lowprec's scales follow the weights in each. "float kernels" does without the
integer kernels that a run has by default, "codes kept" is trainer.keep_codes=true, "tensor cores", on a GPU,
trainer.tensor_cores=true, "compiled" is trainer.compile=true, which takes minutes to compile a model of this size (--only
'lowprec*n4' leaves it out). The candidates take turns in one process, so that what else runs on the machine slows all alike; the
time is the median over rounds of the ratio to the plain step of the same round and precision. Peak memory is the median of three
processes of its own for each (one on a GPU, whose device's it is there).
Where times are taken, freed memory stays with the process, as in a run of train.py.
Others' quantizers are the optional extra "peers"; a line says where one is not installed or fails.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from accuracy_brevitas import CANDIDATES as BREVITAS
from accuracy_eight_bit import CANDIDATES as EIGHT_BIT
from accuracy_peer import Start
from inference import describe_machine, settled
from torch import Tensor, nn

import lowprec
from lowprec.layers.integer_product import use_integer_kernels
from lowprec.layers.saved_codes import saved_as_codes
from lowprec.layers.tensor_core_product import use_tensor_cores
from lowprec.models import create_model
from lowprec.run.allocator import give_back_freed_memory, keep_freed_memory

CLASSES = 1000
PLAIN = "plain"
RECIPES = ("w2a8_n4", "w2a8_n64", "w4a8_n4")
WARM_UP = 4  # until no step needs memory that the process does not have yet
STEPS_FOR_MEMORY = 3
# An allocator's holes depend on chance: some percent of a process's memory.
PROCESSES_FOR_MEMORY = 1 if torch.cuda.is_available() else 3
MEBIBYTE = 1 << 20


def prepared(recipe: str, start: Start, integer_kernels: bool = True) -> nn.Module:
    """lowprec's fake-quant model of a shipped recipe, as a run trains it."""
    qmodel = lowprec.prepare(start.model, recipe, start.calibration[0][:2])
    lowprec.calibrate(qmodel, start.calibration)
    use_integer_kernels(qmodel, integer_kernels)
    return qmodel


def on_tensor_cores(start: Start) -> nn.Module:
    """lowprec's model with trainer.tensor_cores."""
    qmodel = prepared("w2a8_n4", start, integer_kernels=False)
    use_tensor_cores(qmodel)
    return qmodel


class SavedAsCodes(nn.Module):
    """A prepared model whose activations are kept for the backward pass as codes."""

    def __init__(self, qmodel: nn.Module) -> None:
        super().__init__()
        self.qmodel = qmodel

    def forward(self, images: Tensor) -> Tensor:
        with saved_as_codes(self.qmodel):
            logits: Tensor = self.qmodel(images)
        return logits


def compiled(model: nn.Module) -> nn.Module:
    """The model through torch.compile, with its defaults, as a run does it."""
    result: nn.Module = torch.compile(model)
    return result


def fx_model(start: Start) -> nn.Module:
    """PyTorch's FX graph mode quantization-aware training, with its default configuration for x86."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    model = copy.deepcopy(start.model).train()
    quantized: nn.Module = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (start.calibration[0],))
    return quantized


CANDIDATES: dict[str, Callable[[Start], nn.Module]] = {
    PLAIN: lambda start: copy.deepcopy(start.model),
    **{f"lowprec {recipe}": partial(prepared, recipe) for recipe in RECIPES},
    "lowprec w2a8_n4, float kernels": partial(prepared, "w2a8_n4", integer_kernels=False),
    "lowprec w2a8_n4, codes kept": lambda start: SavedAsCodes(prepared("w2a8_n4", start)),
    **({"lowprec w2a8_n4, tensor cores": on_tensor_cores} if torch.cuda.is_available() else {}),
    "plain, compiled": lambda start: compiled(copy.deepcopy(start.model)),
    "lowprec w2a8_n4, compiled": lambda start: compiled(prepared("w2a8_n4", start, integer_kernels=False)),
    "PyTorch FX": fx_model,
    **{
        candidate.name: (lambda start, quantize=candidate.quantize: quantize(start).model)
        for candidate in (*BREVITAS, *EIGHT_BIT)
    },
}


class Step:
    """One candidate in one precision (32 or bf16), ready to take steps."""

    def __init__(self, model: nn.Module, images: Tensor, precision: str) -> None:
        device = images.device
        self.images = images
        self.labels = torch.arange(len(images), device=device) % CLASSES
        self.model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def __call__(self) -> float:
        """Takes a step; returns its seconds."""
        _wait(self.images.device)
        started = time.perf_counter()
        with self.autocast:
            logits = self.model(self.images)
        nn.functional.cross_entropy(logits.float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        _wait(self.images.device)
        return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def beginning(name: str, batch: int, side: int) -> Start:
    """The model, in eval mode on the CPU, and random images of two batches."""
    torch.manual_seed(0)
    model = settled(create_model(name, num_classes=CLASSES), side)
    return Start(model, [torch.randn(batch, 3, side, side) for _ in range(2)])


def step_of(candidate: str, start: Start, precision: str) -> Step:
    """A candidate that has taken its first steps; what it prints goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        model = CANDIDATES[candidate](start)
        give_back_freed_memory()  # as a run does before it trains
        images = start.calibration[0].to(device()).contiguous(memory_format=torch.channels_last)
        step = Step(model, images, precision)
        for _ in range(WARM_UP):
            step()
    return step


def attempt(candidate: str, start: Start, precision: str) -> Step | str:
    """The candidate's step, or why it has none: quantizers fail in their own ways, which must not end the measurement."""
    try:
        return step_of(candidate, start, precision)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def times(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate's step in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(step())
    return seconds


def print_memory(candidate: str, model: str, batch: int, side: int, precision: str) -> None:
    """Peak memory of the steps in MiB: of this process, preparation left out, or of the device on a GPU."""
    step = step_of(candidate, beginning(model, batch, side), precision)
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    for _ in range(STEPS_FOR_MEMORY):
        step()
    if device().type == "cuda":
        print(torch.cuda.max_memory_allocated() / MEBIBYTE)
    else:
        # Not getrusage's, which begins with what the process that started this one held.
        (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        print(int(peak.split()[1]) / 1024)  # in KiB


def memory_of(candidate: str, arguments: Sequence[str]) -> float:
    """The same, the median of some processes.

    Raises:
        RuntimeError: one of them failed.
    """
    command = [sys.executable, __file__, *arguments, "--memory-of", candidate]
    peaks = []
    for _ in range(PROCESSES_FOR_MEMORY):
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode != 0:
            raise RuntimeError(" ".join(finished.stderr.strip().splitlines()[-1:]))
        peaks.append(float(finished.stdout.splitlines()[-1]))
    return statistics.median(peaks)


def measure(model: str, precision: str, names: Sequence[str], given: argparse.Namespace) -> list[str]:
    """The lines of a table: ratios of time and memory to the plain step, and why a candidate has none."""
    start = beginning(model, given.batch, given.side)
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for name in names:
        step = attempt(name, start, precision)
        if isinstance(step, Step):
            steps[name] = step
        else:
            failed[name] = step
    seconds = times(steps, given.rounds)
    arguments = [model, "--batch", str(given.batch), "--side", str(given.side), "--precision", precision]
    memory = {} if given.no_memory else {name: memory_of(name, arguments) for name in steps}
    width = max(map(len, names))
    lines = []
    for name, own in seconds.items():
        ratio = statistics.median(mine / plain for mine, plain in zip(own, seconds[PLAIN], strict=True))
        held = f"{memory[name] / memory[PLAIN]:7.2f}x {memory[name]:7.0f} MiB" if memory else ""
        lines.append(f"{name:{width}} {ratio:7.2f}x {1000 * statistics.median(own):8.0f} ms {held}")
    return lines + [f"{name:{width}} failed: {reason}" for name, reason in failed.items()]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["resnet18"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--precision", nargs="+", choices=("32", "bf16"), default=["32"])
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="candidates' names, with wildcards; plain is always there"
    )
    parser.add_argument("--threads", type=int, help="of PyTorch; default: all cores")
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--memory-of", choices=CANDIDATES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    unmatched = [pattern for pattern in given.only if not fnmatch.filter(CANDIDATES, pattern)]
    if unmatched:
        parser.error(f"--only {' '.join(unmatched)}: no such candidate; there are {'; '.join(CANDIDATES)}")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if given.memory_of is not None:
        print_memory(given.memory_of, given.models[0], given.batch, given.side, given.precision[0])
        return
    keep_freed_memory()
    chosen = [name for name in CANDIDATES if any(fnmatch.fnmatchcase(name, pattern) for pattern in given.only)]
    names = [PLAIN, *(name for name in chosen if name != PLAIN)]
    print(describe_machine(torch.get_num_threads()))
    for model in given.models:
        for precision in given.precision:
            print(
                f"\n{model}, {given.batch} images of {given.side}, precision {precision}: step and peak memory to plain"
            )
            print("\n".join(measure(model, precision, names, given)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
