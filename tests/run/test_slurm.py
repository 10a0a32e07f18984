"""Real SLURM jobs on two nodes: trained, requeued, warned, killed, swept. `tests/start-slurm-cluster` starts a cluster.

All jobs train the same: whatever happens to one, it comes back by itself and ends with the same bits as the undisturbed one.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file

pytestmark = pytest.mark.slurm

EPOCHS = 30
PATIENCE = 240.0
ENDS = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
TRAINING = (
    *(
        "experiment=digits_smoke",
        "trainer.nodes=2",
        "trainer.accelerator=cpu",
        "trainer.precision=32",
        "trainer.threads=1",
    ),
    *(f"trainer.max_epochs={EPOCHS}", "trainer.checkpoint_minutes=0", "logger=csv_wandb", "logger.mode=offline"),
)


def command(*arguments: str) -> str:
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


def nodes() -> int:
    if shutil.which("sinfo") is None:
        return 0
    answer = subprocess.run(["sinfo", "-h", "-o", "%D"], capture_output=True, text=True, timeout=30)
    return sum(map(int, answer.stdout.split()))


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"waited {PATIENCE:.0f} s for {what}")


class Job:
    """A batch job of ``task=sbatch``: what it prints, and in which state SLURM has it."""

    def __init__(self, folder: Path, name: str, *overrides: str) -> None:
        self.folder, self.name = folder, name
        self.directory = folder / "runs" / name
        arguments = (*TRAINING, f"runs_dir={folder / 'runs'}", f"run_id={name}", *overrides)
        script = folder / f"{name}.sh"
        printed = command(sys.executable, str(REPOSITORY / "train.py"), "task=sbatch", *arguments)
        # Where the test runs, so that its output is found.
        script.write_text(printed.replace("slurm-%j.out", f"{folder}/{name}.out"))
        self.id = re.findall(r"\d+", command("sbatch", str(script)))[0]

    @property
    def output(self) -> str:
        file = self.folder / f"{self.name}.out"
        return file.read_text() if file.is_file() else ""

    @property
    def state(self) -> str:
        found = re.search(r"JobState=(\w+)", command("scontrol", "show", "job", self.id))
        return found.group(1) if found else ""

    def reaches(self, epoch: int) -> None:
        """Waits until fine-tuning has ended this epoch, and is within the next one."""
        wait_for(lambda: f"fine-tuning  epoch {epoch}/" in self.output, f"epoch {epoch} of {self.name}\n{self.output}")

    def ends(self) -> None:
        """Waits for the end; SLURM holds a requeued job back for two minutes, which is cut short."""

        def ended() -> bool:
            if self.state == "PENDING":
                # Within the second in which it was requeued, its credential would count as revoked.
                time.sleep(5)
                subprocess.run(["scontrol", "update", f"jobid={self.id}", "StartTime=now"], capture_output=True)
            return self.state in ENDS and self.stays_ended()

        wait_for(ended, f"the end of {self.name}\n{self.output}")
        assert self.state == "COMPLETED", self.output

    def stays_ended(self) -> bool:
        """A job that is being requeued looks failed for a moment."""
        time.sleep(4)
        return self.state in ENDS

    @property
    def restarts(self) -> int:
        found = re.search(r"Restarts=(\d+)", command("scontrol", "show", "job", self.id))
        return int(found.group(1)) if found else -1

    @property
    def minutes(self) -> int:
        """How many it has run."""
        shown = command("scontrol", "show", "job", self.id)
        (hours, minutes) = map(int, re.findall(r"RunTime=(\d+):(\d+):", shown)[0])
        return 60 * hours + minutes

    def processes(self) -> list[int]:
        """The training's processes, one on each node."""
        return [
            int(line) for line in command("pgrep", "-f", f"train.py .*run_id={self.name}$").split() if _is_python(line)
        ]

    @contextmanager
    def paused(self) -> Iterator[list[int]]:
        """Within it, the training's processes stand still; signals reach them afterwards."""
        processes = self.processes()
        assert len(processes) == 2, self.output
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            yield processes
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)


def _is_warned(process: int) -> bool:
    """Whether SIGUSR1 waits for a process that stands still; SLURM may wake those that it warns, so it may have ended."""
    status = Path(f"/proc/{process}/status")
    try:
        (pending,) = re.findall(r"ShdPnd:\t(\w+)", status.read_text())
    except (FileNotFoundError, ProcessLookupError):
        return True
    return bool(int(pending, 16) >> (signal.SIGUSR1 - 1) & 1)


def _is_python(process: str) -> bool:
    try:
        return "python" in Path(f"/proc/{process}/exe").resolve().name
    except OSError:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if nodes() < 2:
        pytest.skip("no SLURM cluster of two nodes answers: tests/start-slurm-cluster starts one")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield tmp_path_factory.mktemp("slurm")
    subprocess.run(["scancel", "--user", str(os.getuid())], capture_output=True)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Job:
    job = Job(folder, "undisturbed")
    job.ends()
    assert job.restarts == 0
    return job


def assert_same_training(job: Job, undisturbed: Job) -> None:
    """Weights, integer model, optimizer and metrics are equal, bit for bit, in one run directory and one W&B run."""
    for name in ("checkpoints/best.safetensors", "checkpoints/post_training.safetensors", "model.safetensors"):
        first, second = load_file(job.directory / name), load_file(undisturbed.directory / name)
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
    last = [torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True) for run in (job, undisturbed)]
    for key, tensor in last[0]["state_dict"].items():
        assert torch.equal(tensor, last[1]["state_dict"][key]), key
    momenta = [content["optimizer_states"][0]["state"] for content in last]
    for key, state in momenta[0].items():
        assert torch.equal(state["momentum_buffer"], momenta[1][key]["momentum_buffer"]), key
    summaries = [json.loads((run.directory / "summary.json").read_text()) for run in (job, undisturbed)]
    for summary in summaries:
        del summary["seconds"]
    assert summaries[0] == summaries[1]
    assert metrics(job) == metrics(undisturbed)
    (name,) = {path.name.rpartition("-")[2] for path in (job.directory / "wandb").glob("offline-run-*")}
    assert name == job.name


def metrics(job: Job) -> list[tuple[float, ...]]:
    """Epoch, loss and accuracy of all validations."""
    with (job.directory / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/top1"]]
    assert len(rows) == EPOCHS
    return [tuple(float(row[key]) for key in ("epoch", "val/loss", "val/top1")) for row in rows]


def test_a_job_on_two_nodes_trains(undisturbed: Job) -> None:
    summary = json.loads((undisturbed.directory / "summary.json").read_text())
    assert summary["verify"]["mismatched_codes"] == 0
    assert summary["integer"]["top1"] > 0.9
    assert "differing codes" in undisturbed.output


def test_a_job_that_is_requeued_comes_back_to_the_same_bits(folder: Path, undisturbed: Job) -> None:
    job = Job(folder, "requeued")
    job.reaches(3)
    command("scontrol", "requeue", job.id)
    job.ends()
    assert job.restarts == 1
    assert_same_training(job, undisturbed)


def test_a_job_that_is_warned_before_its_time_is_over_comes_back_to_the_same_bits(
    folder: Path, undisturbed: Job
) -> None:
    job = Job(folder, "warned", "slurm.time_minutes=20", "slurm.signal_seconds=175")
    job.reaches(3)
    # Its time is nearly over now: SLURM warns it, at its leisure. A training that stands still is not over before.
    with job.paused() as processes:
        command("scontrol", "update", f"jobid={job.id}", f"TimeLimit={job.minutes + 3}")
        wait_for(lambda: all(map(_is_warned, processes)), f"the warning of {job.name}\n{job.output}")
    wait_for(lambda: job.restarts == 1 and job.state == "PENDING", f"the requeueing of {job.name}\n{job.output}")
    command("scontrol", "update", f"jobid={job.id}", "TimeLimit=20")
    job.ends()
    assert "stopped by SIGUSR1; the same command goes on" in job.output
    assert job.restarts == 1
    assert_same_training(job, undisturbed)


def test_a_job_of_which_a_process_is_killed_comes_back_to_the_same_bits(folder: Path, undisturbed: Job) -> None:
    job = Job(folder, "killed")
    job.reaches(4)
    processes = job.processes()
    assert len(processes) == 2
    os.kill(max(processes), signal.SIGKILL)
    job.ends()
    assert job.restarts == 1
    assert_same_training(job, undisturbed)


def test_a_job_of_which_a_process_fails_is_not_tried_again(folder: Path) -> None:
    broken = folder / "broken"
    broken.mkdir()
    # Python imports it at its start: the second process cannot fine-tune.
    (broken / "sitecustomize.py").write_text(
        "import os\n"
        "def fit(*arguments, **keywords):\n"
        "    raise RuntimeError('no training here')\n"
        "if os.environ.get('SLURM_PROCID') == '1':\n"
        "    from lowprec.run import stages\n"
        "    stages.fit = fit\n"
    )
    job = Job(folder, "failing", f"slurm.setup=['export PYTHONPATH={broken}']", "logger=none")
    wait_for(lambda: job.state in ENDS and job.stays_ended(), f"the end of {job.name}\n{job.output}")
    assert (job.state, job.restarts) == ("FAILED", 0), job.output
    assert "no training here" in job.output


def test_a_sweep_is_a_job_for_each_run(folder: Path) -> None:
    runs = folder / "sweep"
    arguments = (
        *TRAINING,
        "trainer.max_epochs=1",
        "logger=csv",
        "slurm.time_minutes=5",
        f"runs_dir={runs}",
        "seed=0,1",
    )
    kept = [
        argument
        for argument in arguments
        if argument != f"trainer.max_epochs={EPOCHS}" and "logger.mode" not in argument
    ]
    kept.remove("logger=csv_wandb")
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), "-m", "hydra/launcher=slurm", *kept],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    summaries = sorted(runs.glob("*seed_*/summary.json"))
    assert len(summaries) == 2
    assert len(list(runs.glob("sweeps/*/.submitit/*"))) >= 1 or "best is" in done.stdout
