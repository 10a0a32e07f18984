"""Checkpoints are whole, whatever happens while they are written, and belong to the training that they are of."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowprec.models import CheckpointError
from lowprec.recipe import Recipe
from lowprec.training.checkpoints import BestAndLast, CheckpointWriteError, DurableCheckpoints, Interrupted
from lowprec.training.resume import IDENTITY, batches_done

WRITER = """
import sys, torch
from lowprec.training.checkpoints import DurableCheckpoints
for step in range(1, 10_000):
    DurableCheckpoints().save_checkpoint({"step": step, "weights": torch.full((4_000_000,), float(step))}, sys.argv[1])
    print(step, flush=True)
"""

# With a terminal of its own, which it loses; it prints when it has heard that.
LISTENER = """
import fcntl, sys, termios, time
from pathlib import Path
from lowprec.training.checkpoints import BestAndLast
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
checkpoints = BestAndLast(Path(sys.argv[1]))
with checkpoints.listening():
    print("ready", flush=True)
    while not checkpoints._signal:
        time.sleep(0.01)
    print("a line", flush=True)
    print("an error", file=sys.stderr, flush=True)
Path(sys.argv[1], "heard").write_text(str(checkpoints._signal))
sys.exit(75)
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


@pytest.fixture
def with_a_terminal() -> Iterator[None]:
    """SIGHUP is heard, by processes that a test starts too, also where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT],
    ids=lambda number: number.name,
)
@pytest.mark.usefixtures("with_a_terminal")
def test_a_signal_only_sets_a_flag(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    checkpoints = BestAndLast(tmp_path)
    with checkpoints.listening():
        os.kill(os.getpid(), number)
        assert checkpoints._signal == number
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("with_a_terminal")
def test_under_nohup_a_lost_terminal_changes_nothing(tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    checkpoints = BestAndLast(tmp_path)
    with checkpoints.listening():
        checkpoints.on_train_start(None, None)  # type: ignore[arg-type]  # it looks at neither
        os.kill(os.getpid(), signal.SIGHUP)
        assert checkpoints._signal == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.usefixtures("with_a_terminal")
def test_what_is_said_to_a_lost_terminal_is_no_error(tmp_path: Path) -> None:
    """A bar that is drawn after the loss would otherwise end the training before its checkpoint is written."""
    keeper, terminal = pty.openpty()
    listener = subprocess.Popen(
        [sys.executable, "-c", LISTENER, str(tmp_path)],
        stdout=terminal,
        stderr=terminal,
        stdin=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    said = b""
    while not said.endswith(b"\n"):  # the whole line, else the terminal is lost while it is being written
        said += os.read(keeper, 100)
    assert said.startswith(b"ready")
    os.close(keeper)
    assert listener.wait(60) == 75
    assert (tmp_path / "heard").read_text() == "1"


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
    with pytest.raises(CheckpointError, match=r"training \(recipe: w2a8_n4 there, w4a8_n4 here\): .*fresh=true"):
        batches_done(file, {"model": "resnet18", "recipe": "w4a8_n4"})
    with pytest.raises(CheckpointError, match="processes: nothing there, 2 here"):
        batches_done(file, {"model": "resnet18", "processes": 2, "recipe": "w2a8_n4"})


def test_of_another_recipe_the_keys_that_differ_are_named(tmp_path: Path) -> None:
    recipes = [json.dumps(Recipe.load(name).to_dict()) for name in ("w2a8_n4", "w4a8_n4")]
    file = checkpoint(tmp_path / "last.ckpt", recipe=recipes[0])
    with pytest.raises(CheckpointError, match=r"quant\.weights\.bits: 2 there, 4 here") as caught:
        batches_done(file, {"recipe": recipes[1]})
    assert "{" not in str(caught.value)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "last.ckpt")
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be read .*fresh=true"):
        batches_done(file, {})
