"""What ``train.py`` does around a run: refuses a wrong command line at once, and turns expected failures into exit
codes.

Exit codes: 0 done, 1 the run failed (data, checkpoint, or differing codes), 2 the configuration is wrong, 130 Ctrl-C, 75
another signal stopped it, or another process's end: the same command goes on (a job's script requeues it then).
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lowprec.config import ConfigError, RunConfig
from lowprec.report.summary import summary_table
from lowprec.report.terminal import create_console
from lowprec.run.compose import check_sweep, run_config
from lowprec.run.directory import RunDirectory, RunFileError, RunInUseError
from lowprec.run.launcher import launch_processes, needs_launch
from lowprec.run.listing import listing
from lowprec.run.sbatch import FAILURE_FILE, batch_script

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

FAILED, WRONG_CONFIGURATION, INTERRUPTED, TEMPORARY_FAILURE = 1, 2, 130, 75
# These change what is composed, or take a value that looks like an override: Hydra itself has to read them.
_HYDRA_FLAGS = (
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--experimental-rerun",
    "-p",
    "--package",
)


def complain(error: Exception) -> None:
    """The one message of an error that a user can act on."""
    print(f"error: {error}", file=sys.stderr)


def check(arguments: list[str], config_folder: Path) -> None:
    """Exits with code 2 and one message when the overrides on the command line describe no run. Imports no torch."""
    if any(argument.split("=")[0] in (*_HYDRA_FLAGS, "--help", "-h", "--hydra-help") for argument in arguments):
        return
    try:
        check_sweep([argument for argument in arguments if not argument.startswith("-")], config_folder)
    except ConfigError as error:
        complain(error)
        sys.exit(WRONG_CONFIGURATION)


def execute(composed: DictConfig, choices: Mapping[str, Any], overrides: Iterable[str]) -> int:
    """Runs a composed configuration; returns the exit code. An error that a user can act on is one message."""
    overrides = list(overrides)
    try:
        config = run_config(composed, choices, overrides)
        if config.task == "sbatch":
            print(batch_script(config, overrides), end="")
            return 0
        if config.task == "list":
            print(listing(_config_folder()))
            return 0
        if needs_launch(config):
            return launch_processes(config, overrides)
    except ConfigError as error:
        complain(error)
        return _told(WRONG_CONFIGURATION)
    try:
        return _told(run_to_exit_code(config))
    except Exception:
        _told(FAILED)
        raise


def _config_folder() -> Path:
    """Where the configuration was composed from."""
    sources = HydraConfig.get().runtime.config_sources
    return Path(next(source.path for source in sources if source.provider == "main"))


def _told(code: int) -> int:
    """``code``, written where the batch script looks for it if it says that trying again is of no use."""
    file = os.environ.get(FAILURE_FILE)
    if file and code in (FAILED, WRONG_CONFIGURATION):
        Path(file).write_text(f"{code}\n")
    return code


def run_to_exit_code(
    config: RunConfig, callbacks: Sequence[Callback] = (), on_error: Callable[[Exception], None] = complain
) -> int:
    """Runs a checked configuration; returns the exit code, and leaves the process with 130 at Ctrl-C.

    ``callbacks`` are Lightning's, for the fine-tuning. ``on_error`` is given each error that a user can act on.
    """
    try:
        directory = RunDirectory(config)
        # Before torch is imported too: a finished run answers at once.
        if config.task == "train" and directory.finished and not config.fresh:
            return _show_finished(directory)
    except ConfigError as error:
        on_error(error)
        return WRONG_CONFIGURATION
    except RunFileError as error:
        on_error(error)
        return FAILED
    # Here, not above: torch takes seconds to import, and a mistake in the configuration should not have to wait for it.
    with _no_collection():
        from lowprec.run.stages import run
    from filelock import Timeout

    from lowprec.data import DataError
    from lowprec.export.exported_file import ExportedFileError
    from lowprec.export.runtime import RuntimeMissingError
    from lowprec.graph.planning import UnsupportedModelError
    from lowprec.graph.tracing import TracingError
    from lowprec.integer.convert import ConversionError
    from lowprec.integer.packed import PackedFileError
    from lowprec.models import CheckpointError
    from lowprec.recipe import RecipeError
    from lowprec.training.checkpoints import CheckpointWriteError, Interrupted, TrainingDiverged
    from lowprec.training.equality import DesynchronizedError
    from lowprec.training.processes import PeerError, ProcessGroupError, is_lost_connection, launch
    from lowprec.verify import VerificationError

    failures = (
        *(DataError, CheckpointError, PackedFileError, RunInUseError, RunFileError, Timeout),
        *(TracingError, UnsupportedModelError, ConversionError, VerificationError, TrainingDiverged),
        *(ExportedFileError, RuntimeMissingError, CheckpointWriteError, DesynchronizedError, ProcessGroupError),
    )
    started = launch()
    try:
        run(config, callbacks)
    except (ConfigError, RecipeError) as error:
        # All processes find the same mistake; one of them says so.
        if started.rank == 0:
            on_error(error)
        return WRONG_CONFIGURATION
    except failures as error:
        on_error(error)
        return FAILED
    except OSError as error:
        if error.filename is None:
            raise
        # A full disk, a read-only folder: not a mistake of the program.
        on_error(
            RuntimeError(f"{error}. What was saved before is as it was; once that is mended, the same command goes on")
        )
        return FAILED
    except PeerError:
        return FAILED  # the process that failed says why
    except (Interrupted, KeyboardInterrupt) as stop:
        if started.rank == 0:
            command = "the same command without fresh=true" if config.fresh else "the same command"
            run_path = f"{config.runs_dir}/{config.run_id}"
            print(f"\n{str(stop) or 'stopped'}; {command} goes on with the run {run_path}", file=sys.stderr)
        # Leaving the process also ends a sweep.
        sys.exit(INTERRUPTED if getattr(stop, "number", SIGINT) == SIGINT else TEMPORARY_FAILURE)
    except RuntimeError as error:
        if started.size == 1 or not is_lost_connection(error):
            raise
        print(
            f"error: process {started.rank}: another process of the training has ended; the checkpoint before "
            "it is kept, and the same command goes on",
            file=sys.stderr,
        )
        return TEMPORARY_FAILURE
    return 0


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection while modules are imported: it takes time, and what they hold is no garbage."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _show_finished(directory: RunDirectory) -> int:
    directory.check_configuration()
    summary = directory.summary()
    console = create_console()
    console.print(summary_table(summary))
    console.print(f"the run {directory.path} is finished; fresh=true starts it afresh, run_id=NAME makes another one")
    return FAILED if summary["verify"]["mismatched_codes"] else 0
