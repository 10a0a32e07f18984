"""Starts the processes of a training on this machine: ``trainer.devices=8`` is all that a user has to say.

On several machines ``srun`` or ``torchrun`` starts them: ``task=sbatch`` prints a script for SLURM.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from lowprec.config import ConfigError, RunConfig

# Exit codes of a training's processes, in the order in which they say what happened to all of them: a wrong configuration,
# a failure, Ctrl-C, another signal.
_TELLING = (2, 1, 130, 75)
_SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGHUP: 75, signal.SIGUSR1: 75}


def needs_launch(config: RunConfig) -> bool:
    """Whether this process is to start others, rather than being one of them.

    Raises:
        ConfigError: processes on several machines were asked for, and nothing started them there.
    """
    if config.task != "train" or "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_STEP_ID" in os.environ:
        return False
    if config.trainer.nodes > 1:
        raise ConfigError(
            f"trainer.nodes={config.trainer.nodes}: start it with srun on each node (task=sbatch prints a script), or with "
            f"torchrun --nnodes={config.trainer.nodes} --nproc-per-node={config.trainer.devices}"
        )
    return config.trainer.devices > 1


def launch_processes(config: RunConfig, overrides: Sequence[str]) -> int:
    """Runs ``train.py`` with these overrides in ``trainer.devices`` processes; returns the exit code that tells most."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    count = config.trainer.devices
    # The training says itself what went wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    # Under nohup a lost terminal is ignored, and stays so.
    heard = [number.name for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", ",".join(heard))
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    command = [os.path.abspath(sys.argv[0]), *overrides, f"run_id={config.run_id}"]
    try:
        elastic_launch(launch, sys.executable)(*command)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        # Negative: killed by a signal, as by a lack of memory.
        return 75 if min(codes) < 0 else next((code for code in _TELLING if code in codes), 1)
    except SignalException as stop:
        return _SIGNALS.get(stop.sigval, 75)
    return 0
