"""Checkpoints are whole, whatever happens while they are written, and belong to the training that they are of."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lowprec.models import CheckpointError
from lowprec.training.checkpoints import BestAndLast, CheckpointWriteError, DurableCheckpoints, Interrupted
from lowprec.training.resume import IDENTITY, batches_done

WRITER = """
import sys, torch
from lowprec.training.checkpoints import DurableCheckpoints
for step in range(1, 10_000):
    DurableCheckpoints().save_checkpoint({"step": step, "weights": torch.full((4_000_000,), float(step))}, sys.argv[1])
    print(step, flush=True)
"""


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    DurableCheckpoints().save_checkpoint({"step": 1}, file)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # What a full disk is to a process: a file of more than 64 KiB cannot be written.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(
            CheckpointWriteError, match=r"last\.ckpt cannot be written .*: the one before it \(.*\) is kept"
        ):
            DurableCheckpoints().save_checkpoint({"step": 2, "weights": torch.zeros(100_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_without_a_checkpoint_before_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointWriteError, match="there is none before it"):
        DurableCheckpoints().save_checkpoint({}, tmp_path / "file" / "last.ckpt")


@pytest.mark.parametrize("delay", [0.0, 0.007, 0.02])
def test_a_kill_while_it_is_written_leaves_a_whole_checkpoint(delay: float, tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(3):
        written = int(writer.stdout.readline())
    time.sleep(delay)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    content = torch.load(file, weights_only=True)
    assert content["step"] >= written
    assert torch.equal(content["weights"], torch.full((4_000_000,), float(content["step"])))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_only_sets_a_flag(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    checkpoints = BestAndLast(tmp_path)
    with checkpoints.listening():
        os.kill(os.getpid(), number)
        assert checkpoints._signal == number
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    with BestAndLast(tmp_path).listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)


def interrupted(checkpoints: BestAndLast, called: list[int]) -> None:
    with checkpoints.listening():
        os.kill(os.getpid(), signal.SIGUSR2)
        assert called == []
        raise Interrupted(signal.SIGUSR2)


def test_the_handler_of_a_launcher_is_called_after_the_checkpoint(tmp_path: Path) -> None:
    """Submitit's, for SIGUSR2: it queues its job again."""
    called: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    try:
        with pytest.raises(Interrupted, match="stopped by SIGUSR2"):
            interrupted(BestAndLast(tmp_path), called)
        assert called == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def checkpoint(file: Path, **identity: object) -> Path:
    progress = {"epoch_loop.batch_progress": {"current": {"processed": 7}}}
    torch.save({IDENTITY: identity, "loops": {"fit_loop": progress}}, file)
    return file


def test_a_checkpoint_knows_its_training(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "last.ckpt", model="resnet18", recipe="w2a8_n4")
    assert batches_done(file, {"model": "resnet18", "recipe": "w2a8_n4"}) == 7
    with pytest.raises(CheckpointError, match="its recipe is w2a8_n4, and this one's is w4a8_n4"):
        batches_done(file, {"model": "resnet18", "recipe": "w4a8_n4"})
    with pytest.raises(CheckpointError, match="its processes is nothing, and this one's is 2"):
        batches_done(file, {"model": "resnet18", "processes": 2, "recipe": "w2a8_n4"})


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "last.ckpt")
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be read .*fresh=true"):
        batches_done(file, {})
