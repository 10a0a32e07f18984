"""Images per second and the share of waiting, on a clock that the test moves."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from watched_training import BATCH, STEPS, Clock, Recorder, TimedImages, TimedSteps, tiny_module, train

from lowprec.training.throughput import DataWaitWarning, Throughput


def rows_of(
    tmp_path: Path, *, image_seconds: float, step_seconds: float, every: int, accumulate: int = 1, max_epochs: int = 2
) -> Recorder:
    clock, recorder = Clock(), Recorder()
    train(
        tiny_module(),
        tmp_path,
        [TimedSteps(clock, step_seconds), Throughput(every, clock)],
        loggers=[recorder],
        images=TimedImages(clock, image_seconds),
        accumulate_grad_batches=accumulate,
        max_epochs=max_epochs,
    )
    return recorder


def test_throughput_and_wait_every_few_steps_and_per_epoch(tmp_path: Path) -> None:
    # A batch of 4 is waited for 4 · 0.25 s and trained on 3 s; validation counts nowhere.
    rows = rows_of(tmp_path, image_seconds=0.25, step_seconds=3, every=2)
    assert rows.column("perf/images_per_second") == dict.fromkeys((1, 3, 5, 7, 9, 11), BATCH / 4)
    assert rows.column("perf/data_wait_share") == pytest.approx(dict.fromkeys((1, 3, 5, 7, 9, 11), 0.25))
    assert rows.column("perf/images_per_second_epoch") == {STEPS - 1: 1.0, 2 * STEPS - 1: 1.0}
    assert rows.column("perf/data_wait_share_epoch") == pytest.approx({STEPS - 1: 0.25, 2 * STEPS - 1: 0.25})
    assert rows.rows[2 * STEPS - 1]["epoch"] == 1
    # On a CPU there is no memory of a GPU.
    assert rows.column("perf/gpu_memory_gib") == {}


def test_a_step_of_several_batches_is_logged_once(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, image_seconds=0, step_seconds=2, every=1, accumulate=2)
    assert rows.column("perf/images_per_second") == dict.fromkeys(range(6), BATCH / 2)


@pytest.mark.parametrize(
    ("image_seconds", "step_seconds", "warned"),
    [(0.5, 3.0, True), (0.05, 3.0, False), (0.005, 0.03, False)],
    ids=["40 % of 30 s", "6 % of 19 s", "40 % of 0.3 s"],
)
def test_waiting_is_warned_of_once(image_seconds: float, step_seconds: float, warned: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows_of(tmp_path, image_seconds=image_seconds, step_seconds=step_seconds, every=50)
    texts = [str(warning.message) for warning in caught if warning.category is DataWaitWarning]
    assert len(texts) == warned
    if warned:
        assert texts[0].startswith("40% of epoch 1 were spent waiting for data. Raise data.num_workers")
        assert "data=shards" in texts[0]
