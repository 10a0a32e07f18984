"""A search space: from overrides in Hydra's grammar to Optuna's distributions, and from a trial to overrides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lowprec.config import ConfigError


@dataclass(frozen=True)
class Space:
    """What a search leaves alone (``fixed`` overrides) and what it tries (``distributions`` by override key)."""

    fixed: tuple[str, ...]
    distributions: Mapping[str, BaseDistribution]

    @classmethod
    def from_overrides(cls, overrides: Iterable[Override]) -> Space:
        """The space of parsed overrides, of which a later one wins over an earlier one of the same key.

        Raises:
            ConfigError: an impossible interval or range, or nothing to try at all.
        """
        by_key = {override.get_key_element(): override for override in overrides}
        fixed = [override.input_line for override in by_key.values() if not override.is_sweep_override()]
        distributions = {
            key: _distribution(override) for key, override in by_key.items() if override.is_sweep_override()
        }
        if not distributions:
            raise ConfigError(
                "hydra.sweeper.params: give at least one key an interval, a range or a choice to search in"
            )
        return cls(tuple(str(line) for line in fixed), distributions)

    def suggest(self, trial: optuna.Trial) -> list[str]:
        """The overrides that ``trial`` tries; the same ones whenever it is asked again."""
        return [_override(key, _suggest(trial, key, kind)) for key, kind in self.distributions.items()]

    def corners(self) -> Iterator[list[str]]:
        """Assignments in which every end of an interval and every choice occurs: if they can be run, all can."""
        ends = {key: _ends(distribution) for key, distribution in self.distributions.items()}
        for position in range(max(len(values) for values in ends.values())):
            yield [_override(key, values[min(position, len(values) - 1)]) for key, values in ends.items()]


def _distribution(override: Override) -> BaseDistribution:
    value: Any = override.value()
    try:
        if isinstance(value, IntervalSweep):
            assert value.start is not None
            assert value.end is not None
            log = "log" in value.tags
            if isinstance(value.start, int) and isinstance(value.end, int):
                return IntDistribution(value.start, value.end, log=log)
            return FloatDistribution(float(value.start), float(value.end), log=log)
        if isinstance(value, RangeSweep):
            return _range(value)
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    except ValueError as error:
        raise ConfigError(f"{override.input_line}: {error}") from error


def _range(sweep: RangeSweep) -> BaseDistribution:
    values = list(sweep.range())
    if not values:
        raise ValueError("the range is empty")
    if "log" in sweep.tags:
        raise ValueError("a range has no logarithmic form; write tag(log, interval(...)), or a choice")
    low, high = min(values), max(values)
    if isinstance(sweep.range(), range):
        return IntDistribution(int(low), int(high), step=abs(int(sweep.step)))
    return FloatDistribution(float(low), float(high), step=abs(float(sweep.step)))


def _suggest(trial: optuna.Trial, key: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def _ends(distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    return [distribution.low, distribution.high]


def _override(key: str, value: Any) -> str:
    # Choices are kept as the text that stood in the override, quotes included.
    return f"{key}={value}"
