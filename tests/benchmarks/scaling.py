"""What many GPUs would do, on paper: a formula whose inputs are measured here, and two that you give.

    python tests/benchmarks/scaling.py [resnet50] [--gpus 64] [--gpus-per-node 8] [--images-per-second 1200] [--gigabits 200]

Measured: bytes of gradients and of a checkpoint, seconds to write one (synced), to start a process up to its training, and to
agree on a step's end (two processes on this machine), training images that one core decodes. Given: what one GPU trains, and
the network of each GPU. Per step of a batch of B images at each of n GPUs:

    compute   B / images per second of one GPU
    network   2 (n - 1) / n · gradient bytes / bandwidth   (ring all-reduce; behind the backward pass where it is shorter)
    loader    n · images per second of one GPU; cores for it on each node
    requeue   checkpoint_minutes / 2 + start, lost at each interruption
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import loader
import torch
from inference import describe_machine

sys.path.insert(0, str(Path(__file__).parents[1]))
from worker_processes import run_in_processes

import lowprec
from lowprec.data import create_data
from lowprec.models import create_model
from lowprec.training import processes
from lowprec.training.checkpoints import DurableCheckpoints


@dataclass(frozen=True)
class Measured:
    """Bytes and seconds of one training; images per second of one core."""

    gradient_bytes: int
    checkpoint_bytes: int
    checkpoint_seconds: float
    start_seconds: float
    agreement_seconds: float
    loader_rate: float


def agreement(repetitions: int = 300) -> float:
    """Seconds that processes take to agree whether to stop after a step."""
    processes.largest(0, 0)
    started = time.perf_counter()
    for _ in range(repetitions):
        processes.largest(0, 0)
    return (time.perf_counter() - started) / repetitions


def decoding(images: int) -> float:
    """Training images that one core reads, crops and normalises in a second: see loader.py."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loader.write_folder(Path(folder), images)
        data = create_data("image_folder", root=folder, batch_size=32, num_workers=0, validation_share=1e-9)
        return statistics.median(loader.measure({"ours": loader.our_epoch(data)}, 3, 1)["ours"])


def measure(name: str, side: int, images: int) -> Measured:
    torch.manual_seed(0)
    model = create_model(f"timm:{name}").eval()
    qmodel = lowprec.prepare(model, lowprec.Recipe.load("w2a8_n4"), torch.randn(2, 3, side, side))
    parameters = list(qmodel.parameters())
    gradient_bytes = sum(parameter.numel() * 4 for parameter in parameters)
    momenta = [torch.zeros_like(parameter) for parameter in parameters]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "last.ckpt"
        started = time.perf_counter()
        DurableCheckpoints().save_checkpoint({"state_dict": qmodel.state_dict(), "optimizer": momenta}, file)
        checkpoint_seconds, checkpoint_bytes = time.perf_counter() - started, file.stat().st_size
        agreed = run_in_processes(agreement, folder=Path(folder))
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import lowprec.run.stages"], check=True)
    start_seconds = time.perf_counter() - started
    return Measured(gradient_bytes, checkpoint_bytes, checkpoint_seconds, start_seconds, max(agreed), decoding(images))


def estimate(measured: Measured, options: argparse.Namespace) -> list[str]:
    """The lines of the answer."""
    gpus, rate = options.gpus, options.images_per_second
    compute = options.batch / rate
    network = 2 * (gpus - 1) / gpus * measured.gradient_bytes / (options.gigabits * 1e9 / 8)
    # The backward pass is about two thirds of a step; what is sent meanwhile costs nothing.
    step = compute + max(0.0, network - compute * 2 / 3) + measured.agreement_seconds
    lost = options.checkpoint_minutes * 60 / 2 + measured.start_seconds
    return [
        f"measured: gradients {measured.gradient_bytes / 1e6:.1f} MB, checkpoint {measured.checkpoint_bytes / 1e6:.1f} MB in "
        f"{measured.checkpoint_seconds:.2f} s, imports {measured.start_seconds:.1f} s, agreement "
        f"{measured.agreement_seconds * 1e3:.2f} ms, loader {measured.loader_rate:.0f} images/s per core",
        f"given: {rate:,.0f} images/s for each of {gpus} GPUs, batch {options.batch}, {options.gigabits} Gbit/s",
        f"step: {compute * 1e3:.1f} ms of computing, {network * 1e3:.1f} ms of network behind it, "
        f"{measured.agreement_seconds * 1e3:.2f} ms to agree: {step * 1e3:.1f} ms, {gpus * options.batch / step:,.0f} images/s, "
        f"{compute / step:.1%} of {gpus} times one",
        f"loader: {gpus * rate:,.0f} images/s in all, "
        f"{rate * options.gpus_per_node / measured.loader_rate:.0f} cores on each node",
        f"checkpoints: every {options.checkpoint_minutes:g} minutes, "
        f"{measured.checkpoint_seconds / (options.checkpoint_minutes * 60):.2%} of the time",
        f"requeue: {lost / 60:.1f} minutes of work and start for each interruption, on average",
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="resnet50")
    for name, default in (("gpus", 64), ("gpus-per-node", 8), ("batch", 256), ("side", 224), ("images", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, value in (("images-per-second", 1200.0), ("gigabits", 200.0), ("checkpoint-minutes", 10.0)):
        parser.add_argument(f"--{name}", type=float, default=value)
    options = parser.parse_args(arguments)
    print(describe_machine(torch.get_num_threads()))
    print("\n".join([options.model, *estimate(measure(options.model, options.side, options.images), options)]))


if __name__ == "__main__":
    main(sys.argv[1:])
