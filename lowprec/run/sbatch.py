"""The batch script of a SLURM job that trains, is warned before its time is over, and is requeued until it is done."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from lowprec.config import ConfigError, RunConfig

_SCRIPT = """\
#!/usr/bin/env bash
{directives}
# Exit codes of train.py: 0 done, 1 failed and 2 wrong configuration (neither is tried again), 130 Ctrl-C. Any other is a
# checkpoint after a signal (75), a node that died or a process that was killed: the job is queued again, and goes on.
cd {folder}
unset WANDB_SERVICE  # that of whoever submitted this job
# The first process that fails writes its exit code there: srun, which then stops the others, returns that of their stopping.
export {failure_file}={folder}/slurm-$SLURM_JOB_ID.failed
rm -f "${failure_file}"
{setup}export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}"
# Processes without images left to train on end before the first one, which goes on with the integer model: --wait=0.
srun --kill-on-bad-exit=1 --wait=0 --cpus-per-task={threads} {command}
code=$?
if [ -e "${failure_file}" ]; then
  code=$(cat "${failure_file}")
  rm -f "${failure_file}"
fi
case $code in 0 | 1 | 2 | 130) exit $code ;; esac
if (( ${{SLURM_RESTART_COUNT:-0}} >= {requeues} )); then
  echo "requeued {requeues} times already (slurm.requeues): giving up with exit code $code" >&2
  exit $code
fi
scontrol requeue "$SLURM_JOB_ID" || exit $code
sleep 60  # the job ends here, when SLURM takes it back
exit $code
"""
# The variable of the environment that names the file in which a process says that it failed, and with which exit code.
FAILURE_FILE = "LOWPREC_FAILURE_FILE"


def batch_script(config: RunConfig, overrides: Iterable[str]) -> str:
    """The text of a script for ``sbatch``: ``trainer.nodes`` nodes with ``trainer.devices`` processes each.

    Nobody but this script requeues the job, besides SLURM itself after a preemption.

    Raises:
        ConfigError: fresh=true, with which each requeued job would start from nothing.
    """
    if config.fresh:
        raise ConfigError("fresh=true: a requeued job would start afresh each time; delete the run's folder instead")
    slurm, trainer = config.slurm, config.trainer
    options = {
        "job-name": config.run_id,
        "nodes": trainer.nodes,
        "ntasks-per-node": trainer.devices,
        "cpus-per-task": slurm.cpus_per_task,
        "gpus-per-node": slurm.gpus_per_node,
        "mem": None if slurm.memory_gb is None else f"{slurm.memory_gb}G",
        "time": slurm.time_minutes,
        "partition": slurm.partition,
        "account": slurm.account,
        "constraint": slurm.constraint,
        # To the training's processes, not to this script.
        "signal": f"USR1@{slurm.signal_seconds}",
        "output": "slurm-%j.out",
        "open-mode": "append",
    }
    directives = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    kept = [override for override in overrides if not override.startswith(("task=", "hydra/"))]
    named = [override for override in kept if not override.startswith("run_id=")]
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), *named, f"run_id={config.run_id}"]
    return _SCRIPT.format(
        directives="\n".join([*directives, "#SBATCH --requeue"]),
        folder=shlex.quote(os.getcwd()),
        setup="".join(f"{line}\n" for line in slurm.setup),
        threads=slurm.cpus_per_task,
        failure_file=FAILURE_FILE,
        command=shlex.join(command),
        requeues=slurm.requeues,
    )
