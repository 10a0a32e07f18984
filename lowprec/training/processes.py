"""The processes of one training: who each of them is, and what they do together.

``torchrun`` and ``srun`` start them and say so in the environment; :func:`join` makes a process group of them, which
Lightning then finds. Without either there is one process, and everything here costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment

from lowprec.config import ConfigError

T = TypeVar("T")

# Long enough for whatever one process does while the others wait: a calibration, a baseline that is being trained.
PATIENCE = timedelta(hours=12)
# For all processes to start, on nodes that may import torch from a slow file system.
PATIENCE_TO_MEET = timedelta(minutes=10)


class PeerError(RuntimeError):
    """Another process of the training failed; its own message says why."""


class ProcessGroupError(RuntimeError):
    """The processes of a training do not find each other."""


@dataclass(frozen=True)
class Launch:
    """How the processes were started. size: of all nodes; local_size: on this one; environment: Lightning's, or None."""

    by: str
    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def environment(self) -> ClusterEnvironment | None:
        if self.by == "torchrun":
            return TorchElasticEnvironment()
        # Requeueing is the batch script's, or submitit's: two owners would requeue a job twice.
        return SLURMEnvironment(auto_requeue=False) if self.by == "srun" else None


def launch(variables: Mapping[str, str] = os.environ) -> Launch:
    """What the environment says about the processes of this training."""
    if "TORCHELASTIC_RUN_ID" in variables:
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return Launch("torchrun", *(int(variables[key]) for key in keys))
    # A batch script itself has some of these too, but is no step of its job.
    if variables.get("SLURM_STEP_ID", "").isdigit() and int(variables.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        size = int(variables["SLURM_STEP_NUM_TASKS"])
        local_size = size // int(variables.get("SLURM_STEP_NUM_NODES", "1"))
        return Launch("srun", int(variables["SLURM_PROCID"]), size, int(variables["SLURM_LOCALID"]), local_size)
    return Launch("python", 0, 1, 0, 1)


def check_launch(found: Launch, nodes: int, devices: int) -> None:
    """Raises ConfigError where as many processes were started as the configuration does not say."""
    if found.size != nodes * devices or (found.size > 1 and found.local_size != devices):
        where = f"{found.by} started {found.size} ({found.local_size} on this node)"
        raise ConfigError(
            f"trainer.nodes={nodes} and trainer.devices={devices} ask for {nodes * devices} processes, but {where}: "
            f"give trainer.nodes={found.size // found.local_size} trainer.devices={found.local_size}, or start as many"
        )


@contextmanager
def joined(found: Launch, gpu: bool) -> Iterator[None]:
    """Within it, the processes are one group: NCCL between GPUs, Gloo between CPUs.

    Raises:
        ProcessGroupError: they do not find each other, or the port is taken.
    """
    environment = found.environment
    if environment is None or found.size == 1:
        yield
        return
    if gpu:
        torch.cuda.set_device(found.local_rank)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    try:
        store, *_ = next(distributed.rendezvous("env://", found.rank, found.size, timeout=PATIENCE_TO_MEET))
        # The store's own patience is that of meeting: from here on, the group's counts.
        store.set_timeout(PATIENCE)
        distributed.init_process_group(backend, store=store, rank=found.rank, world_size=found.size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ProcessGroupError(
            f"process {found.rank} of {found.size} cannot join the others at {where}: {_first_line(error)}. Another job may "
            "hold the port: set MASTER_PORT to a free one"
        ) from error
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number, from 0, which is the main one's."""
    return distributed.get_rank() if _grouped() else 0


def size() -> int:
    """How many processes train."""
    return distributed.get_world_size() if _grouped() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return rank() == 0


def on_main(function: Callable[[], T]) -> T:
    """What ``function`` returns in the main process, in all of them.

    Raises:
        PeerError: it failed there, where the error itself is raised.
    """
    if size() == 1:
        return function()
    outcome: list[Any] = [None, False]
    failure: BaseException | None = None
    if is_main():
        try:
            outcome = [function(), True]
        except BaseException as error:
            failure = error
    distributed.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if not outcome[1]:
        raise PeerError("the main process failed")
    return outcome[0]


def meet() -> None:
    """Returns once all processes have come here; before files are taken away that another may still be reading."""
    if size() > 1:
        distributed.barrier()


def total(*values: float) -> list[float]:
    """The sums of these numbers over all processes, in float64."""
    return _reduced(values, distributed.ReduceOp.SUM)


def largest(*values: float) -> list[float]:
    """The largest of each of these numbers over all processes."""
    return _reduced(values, distributed.ReduceOp.MAX)


def gathered(value: T) -> list[T]:
    """What each process gave, in the order of ranks."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    distributed.all_gather_object(values, value)
    return values


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process ended."""
    lost = (
        "connection closed by peer",
        "connection reset",
        "connection refused",
        "socket closed",
        "broken pipe",
        "remote process",
    )
    return isinstance(error, distributed.DistBackendError) or any(words in str(error).lower() for words in lost)


def _reduced(values: tuple[float, ...], operation: Any) -> list[float]:
    if size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(tensor, operation)
    return tensor.tolist()


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
