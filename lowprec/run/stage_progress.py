"""What the stages other than training show: on a terminal a bar or the layer at hand, elsewhere a line a minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from lowprec.training.progress import duration, shows_bar

Batch = TypeVar("Batch")
Clock = Callable[[], float]


def heading(text: str) -> Text:
    """The line that a stage begins with; its first words, up to the colon, stand out on a terminal."""
    name, colon, rest = text.partition(":")
    return Text.assemble((name, "bold"), colon, rest)


class StageProgress:
    """How far a stage is. setting: ``trainer.progress``. seconds: between two lines where there is no bar."""

    def __init__(self, console: Console, setting: str, seconds: float, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._bar = shows_bar(setting)
        self._silent = setting == "none"
        self._seconds = seconds
        self._clock = clock

    def batches(self, batches: Iterable[Batch], images: int, title: str) -> Iterator[Batch]:
        """The batches, [B, ...] or (images, labels), one after the other; ``images`` are in all of them."""
        if self._silent:
            yield from batches
        elif self._bar:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(20),
                MofNCompleteColumn(),
                _Rate(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._console, transient=True) as shown:
                task = shown.add_task(title, total=images)
                for batch in batches:
                    yield batch
                    shown.advance(task, _images_of(batch))
        else:
            yield from self._with_lines(batches, images, title)

    def _with_lines(self, batches: Iterable[Batch], images: int, title: str) -> Iterator[Batch]:
        started = printed = self._clock()
        done = 0
        for batch in batches:
            yield batch
            done += _images_of(batch)
            now = self._clock()
            if now - printed >= self._seconds:
                printed = now
                rate = done / (now - started) if now > started else float("inf")
                self._console.print(
                    f"{title}  image {done:,}/{images:,}  {rate:,.0f} images/s  {duration((images - done) / rate)} left",
                    highlight=False,
                )

    @contextmanager
    def messages(self, logger: str, title: str) -> Iterator[None]:
        """Within it, what the logger of that name says is shown: layer by layer, for stages that go through a network once."""
        if self._silent:
            yield
        elif self._bar:
            with (
                self._console.status(title) as status,
                _handled(logger, lambda text: status.update(f"{title}: {text}")),
            ):
                yield
        else:
            with _handled(logger, self._now_and_then(title)):
                yield

    def _now_and_then(self, title: str) -> Callable[[str], None]:
        printed = self._clock()

        def show(text: str) -> None:
            nonlocal printed
            if self._clock() - printed >= self._seconds:
                printed = self._clock()
                self._console.print(f"{title}  {text}", highlight=False, markup=False)

        return show


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or task.finished_speed or 0:,.0f} images/s")


class _Handler(logging.Handler):
    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.DEBUG)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.getMessage())
        if record.levelno >= logging.WARNING:
            logging.getLogger().handle(record)  # where it would have gone


@contextmanager
def _handled(name: str, show: Callable[[str], None]) -> Iterator[None]:
    """Within it, all that the logger of that name says goes to ``show``, and warnings to where they go otherwise too."""
    logger = logging.getLogger(name)
    before = logger.level, logger.propagate
    handler = _Handler(show)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _images_of(batch: Any) -> int:
    return len(batch[0] if isinstance(batch, list | tuple) else batch)
