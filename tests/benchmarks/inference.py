"""Images a second of a model on this CPU: full precision, others' int8 and ours, in PyTorch, ONNX Runtime and OpenVINO.

    python tests/benchmarks/inference.py MODEL [--recipe w2a8_n4] [--batch 8] [--side 224] [--only 'lowprec*']

MODEL is a name of timm's or torchvision's (lowprec.models). Its weights are random, its batch norms' statistics those of
random images. The candidates take turns, several rounds of them, so that what else runs on the machine slows all alike;
ratios are medians of the rounds'. Others' quantizers are the optional extra "peers"; a line says where one is not installed
or fails.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from inference_candidates import REFERENCE, Candidate, Workload
from networks import images

from lowprec.models import create_model
from lowprec.recipe import Recipe

INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
PACKAGES = ("torch", "onnxruntime", "openvino", "nncf", "timm")
# What limits a runtime to fewer instructions than the CPU has; ONNX Runtime's kernels know no such switch.
LIMITS = {
    "ATEN_CPU_CAPABILITY": "PyTorch's own and compiled kernels",
    "ONEDNN_MAX_CPU_ISA": "oneDNN's kernels in PyTorch and OpenVINO",
}


def settled(model: nn.Module, side: int) -> nn.Module:
    """With statistics of random images in its batch norms, so that activations have the sizes of a trained network's."""
    torch.manual_seed(0)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # these images' alone
    with torch.no_grad():
        model.train()(images(0, 16, (3, side, side)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def describe_machine(threads: int) -> str:
    """CPU, its instruction sets, what limits them, and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    found = " ".join(name for name in INSTRUCTIONS if name in flags) or "instruction sets unknown"
    limits = [f"{name}={os.environ[name]} ({what})" for name, what in LIMITS.items() if name in os.environ]
    return "\n".join(
        [
            f"{fields.get('model name', 'unknown CPU')}, {os.cpu_count()} cores, {threads} threads: {found}",
            *([f"limited by {', '.join(limits)}"] if limits else []),
            ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        ]
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def build(workload: Workload, only: list[str], reference: bool) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The candidates whose names match a pattern, and why others could not be built."""
    built: dict[str, Candidate] = {}
    failed: dict[str, str] = {}
    for name, builder in workload.builders(reference):
        if name != REFERENCE and not any(fnmatch.fnmatchcase(name, pattern) for pattern in only):
            continue
        print(f"building {name}", file=sys.stderr, flush=True)
        # Quantizers and compilers fail in their own ways, none of which may end the others' measurement.
        try:
            with contextlib.redirect_stdout(sys.stderr):
                candidate = builder()
                if not candidate.once:
                    candidate.run()
            built[name] = candidate
        except ModuleNotFoundError as error:
            failed[name] = f'pip install "lowprec[peers]" ({error})'
        except Exception as error:
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return built, failed


def turn(candidate: Candidate, batch: int, seconds: float) -> float:
    """Images a second, over calls for so many seconds after one that is not counted."""
    if not candidate.once:
        candidate.run()
    calls, started = 0, time.perf_counter()
    while True:
        candidate.run()
        calls += 1
        elapsed = time.perf_counter() - started
        if elapsed >= seconds or candidate.once:
            return calls * batch / elapsed


def measure(candidates: dict[str, Candidate], batch: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Images a second of each candidate in each round; of one that is timed once, the same in all."""
    speeds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            if candidate.once and speeds[name]:
                speeds[name].append(speeds[name][0])
                continue
            speeds[name].append(turn(candidate, batch, seconds / rounds))
    return speeds


def table(candidates: dict[str, Candidate], failed: dict[str, str], speeds: dict[str, list[float]]) -> str:
    """A line for each candidate: images a second, ratio to PyTorch FP32, bytes, whether its codes are the executor's."""
    width = max(len(name) for name in (*candidates, *failed))
    lines = [f"{'':{width}} {'images/s':>9} {'best':>9} {'ratio':>7} {'file bytes':>12}  equal"]
    for name, candidate in candidates.items():
        mine = speeds[name]
        ratio = statistics.median(found / full for found, full in zip(mine, speeds[REFERENCE], strict=True))
        equal = {None: "—", True: "yes", False: "NO"}[candidate.codes_equal]
        lines.append(
            f"{name:{width}} {statistics.median(mine):9.2f} {max(mine):9.2f} {ratio:6.2f}x {candidate.bytes:12,}  {equal}"
        )
    lines += [f"{name:{width}} failed: {reason}" for name, reason in failed.items()]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name that lowprec.models.create_model takes")
    parser.add_argument("--recipe", default="w2a8_n4", help="name of a shipped recipe or path of one")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=224, help="of the square images, pixels")
    parser.add_argument("--seconds", type=float, default=20, help="for each candidate, over all rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for every runtime; all cores by default")
    parser.add_argument("--checked", type=int, default=2, help="images whose codes are compared with the executor's")
    parser.add_argument("--only", nargs="+", default=["*"], help="candidates' names, with wildcards")
    parser.add_argument("--reference", action="store_true", help="time one batch of the integer executor, too")
    given = parser.parse_args(arguments)
    for name, least in (("batch", 1), ("side", 1), ("rounds", 1), ("threads", 1), ("checked", 1), ("seconds", 0)):
        if getattr(given, name) < least:
            parser.error(f"--{name} {getattr(given, name)}: give at least {least}")

    torch.set_num_threads(given.threads)
    shape = (3, given.side, given.side)
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload(
            model=settled(create_model(given.model), given.side),
            images=images(0, given.batch, shape),
            calibration=[images(1, given.batch, shape)],
            recipe=Recipe.load(given.recipe),
            checked=min(given.checked, given.batch),
            threads=given.threads,
            folder=Path(folder),
        )
        names = [name for name, _ in workload.builders(given.reference)]
        unmatched = [pattern for pattern in given.only if not fnmatch.filter(names, pattern)]
        if unmatched:
            parser.error(f"--only {' '.join(unmatched)}: no such candidate; there are {', '.join(names)}")
        candidates, failed = build(workload, given.only, given.reference)
        speeds = measure(candidates, given.batch, given.rounds, given.seconds)
    print(f"{given.model}, {given.recipe}, {given.batch} images of {given.side}×{given.side}")
    print(describe_machine(given.threads))
    print(table(candidates, failed, speeds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
