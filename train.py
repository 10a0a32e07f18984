"""Entry point: composes conf/ and runs what it describes. ``python train.py experiment=digits_smoke seed=1``.

A mistake in the configuration stops it within a second or two, before torch is imported, with exit code 2.
"""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lowprec.run.command_line import check, execute
from lowprec.run.sweep import run_trial

# How long a thread of torch's waits actively for the others before it sleeps (read when torch is imported). By default
# so long that small layers take 40 times their time when anything else runs on the machine; with this, 3 times.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

CONFIG_FOLDER = Path(__file__).resolve().parent / "conf"
exit_codes: list[int] = []


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def start(composed: DictConfig) -> int:
    """Runs one composed configuration; a sweep (``-m``) comes here once per trial, and may do so in other processes."""
    settings = HydraConfig.get()
    if settings.mode == RunMode.MULTIRUN:
        return run_trial(composed, settings)
    exit_codes.append(execute(composed, settings.runtime.choices, settings.overrides.task))
    return exit_codes[-1]


if __name__ == "__main__":
    check(sys.argv[1:], CONFIG_FOLDER)
    start()
    sys.exit(max(exit_codes, default=0))
