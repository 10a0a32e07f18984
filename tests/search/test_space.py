"""A space is what Hydra's grammar says, and a trial's overrides are within it."""

from __future__ import annotations

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lowprec.config import ConfigError
from lowprec.search.space import Space


def space_of(*overrides: str) -> Space:
    return Space.from_overrides(OverridesParser.create().parse_overrides(list(overrides)))


@pytest.mark.parametrize(
    ("values", "distribution"),
    [
        ("interval(0.5, 8)", FloatDistribution(0.5, 8)),
        ("tag(log, interval(1e-3, 0.1))", FloatDistribution(1e-3, 0.1, log=True)),
        ("int(interval(1, 8))", IntDistribution(1, 8)),
        ("int(tag(log, interval(1, 64)))", IntDistribution(1, 64, log=True)),
        ("range(1, 8, 3)", IntDistribution(1, 7, step=3)),
        ("range(0.0, 1.0, 0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("choice(sgd, adamw)", CategoricalDistribution(["sgd", "adamw"])),
        ("4,64", CategoricalDistribution(["4", "64"])),
    ],
)
def test_a_key_is_searched_as_it_says(values: str, distribution: optuna.distributions.BaseDistribution) -> None:
    assert space_of(f"seed={values}").distributions == {"seed": distribution}


def test_what_stands_later_wins_and_single_values_are_fixed() -> None:
    space = space_of("seed=1,2", "optim.momentum=interval(0, 1)", "optim.momentum=0.5", "logger=none")
    assert space.fixed == ("optim.momentum=0.5", "logger=none")
    assert list(space.distributions) == ["seed"]


@pytest.mark.parametrize(
    "override",
    ["seed=interval(2, 1)", "seed=tag(log, interval(0, 1))", "seed=range(3, 3)", "seed=tag(log, range(1, 9))"],
)
def test_an_impossible_range_is_named(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space_of(override)
    assert str(caught.value).startswith(f"{override}: ")


def test_nothing_to_search_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.params"):
        space_of("seed=1")


def test_a_trial_gives_the_same_overrides_whenever_it_is_asked() -> None:
    space = space_of("optim.learning_rate=tag(log, interval(1e-3, 0.1))", "seed=range(0, 9)", "optim=sgd,adamw")
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    overrides = space.suggest(trial)
    assert overrides == space.suggest(trial)
    values = dict(override.split("=") for override in overrides)
    assert 1e-3 <= float(values["optim.learning_rate"]) <= 0.1
    assert int(values["seed"]) in range(9)
    assert values["optim"] in ("sgd", "adamw")


def test_choices_keep_their_quotes() -> None:
    space = space_of("quant.rules=choice([{pattern: '@classifier', bits: 8}], [])")
    assert list(space.corners()) == [["quant.rules=[{pattern:'@classifier',bits:8}]"], ["quant.rules=[]"]]


def test_corners_hold_every_end_and_every_choice() -> None:
    corners = list(space_of("seed=interval(0, 1)", "optim=a,b,c").corners())
    assert corners == [["seed=0.0", "optim=a"], ["seed=1.0", "optim=b"], ["seed=1.0", "optim=c"]]
