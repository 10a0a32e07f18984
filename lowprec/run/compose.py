"""From a command line to a checked :class:`~lowprec.config.RunConfig`, or to one message that says what is wrong with
it.

Hydra and OmegaConf stop at the same mistakes with very different words; :func:`explain` gives them one form: the full
key, the value, the valid choices and the nearest valid key. Imports no torch.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lowprec.config import INCIDENTAL_KEYS, ConfigError, RunConfig, schema_keys
from lowprec.config.debug import apply_debug
from lowprec.recipe import Recipe, RecipeError
from lowprec.search.settings import register

# Below these, keys belong to the model's constructor or to the recipe, which name their own mistakes.
_FREE_FORM = ("model.arguments", "quant")
_LONGEST_NAME = 100

# Here, so that a configuration can be composed where Hydra does not find the sweepers' own plugin (another folder).
register()


def compose_run(overrides: Iterable[str], config_folder: str | Path) -> RunConfig:
    """The checked configuration that ``train.py`` runs with these overrides; of a sweep, its first run.

    Raises:
        ConfigError: the overrides, or the files they name, describe no run; the message names the key and the valid
        choices.
    """
    overrides = list(overrides)
    # A process that composes twice, such as a sweep or a test, finds Hydra initialized by the first.
    GlobalHydra.instance().clear()
    try:
        first = [_values_of_sweep(override)[0] for override in overrides]
        with initialize_config_dir(str(Path(config_folder).resolve()), version_base="1.3", job_name="train"):
            composed = compose("train", first, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error, overrides)) from error
    return run_config(composed, composed.hydra.runtime.choices, first)


def check_sweep(overrides: Iterable[str], config_folder: str | Path) -> None:
    """Checks a command line before its first run starts: each value of a sweep, beside the first ones of the others.

    Raises:
        ConfigError: as :func:`compose_run`.
    """
    overrides = list(overrides)
    compose_run(overrides, config_folder)
    for index, override in enumerate(overrides):
        for value in _values_of_sweep(override)[1:]:
            compose_run([*overrides[:index], value, *overrides[index + 1 :]], config_folder)


def sweep_config(loader: ConfigLoader, composed: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """The checked configuration of one trial of the sweep that was composed.

    Raises:
        ConfigError: as :func:`compose_run`.
    """
    try:
        trial = loader.load_sweep_config(composed, list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error, overrides)) from error
    return run_config(trial, trial.hydra.runtime.choices, overrides)


def run_config(composed: DictConfig, choices: Mapping[str, Any], overrides: Iterable[str]) -> RunConfig:
    """The typed, checked configuration of what Hydra composed; ``choices`` are the groups' chosen files.

    Raises:
        ConfigError: an unknown key, a missing or an impossible value.
    """
    composed = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    _check_keys(composed, overrides)
    try:
        content = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        typed = OmegaConf.merge(OmegaConf.structured(RunConfig), content)
        config: RunConfig = OmegaConf.to_object(typed)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, overrides)) from error
    config.experiment = str(choices.get("experiment") or "custom")
    config.run_id = config.run_id or run_name(config.experiment, overrides)
    _read_recipe_file(config, overrides)
    apply_debug(config)
    config.validate()
    return config


def run_name(experiment: str, overrides: Iterable[str]) -> str:
    """The folder of a run: its experiment and those overrides that change what comes out of it, in alphabetical order.

    The same command line gives the same name at any time, so a run that was cut off is found again. What a folder
    name cannot hold, and what makes it too long, is replaced by a hash.
    """
    telling = sorted(override for override in overrides if not _is_incidental(override))
    parts = [re.sub(r"[^\w.,+-]+", "_", part.replace("=", "_", 1)) for part in telling]
    name = "-".join([experiment.replace("/", "_"), *parts])
    readable = all(re.fullmatch(r"[\w.]+=[\w.,+-]*", part) for part in telling)
    if readable and len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256("\n".join(telling).encode()).hexdigest()[:8]
    return f"{name[:_LONGEST_NAME]}-{digest}"


# What OmegaConf calls types.
_KINDS = {"Integer": "a whole number", "Float": "a number"}


def explain(error: Exception, overrides: Iterable[str]) -> str:
    """One message for what Hydra or OmegaConf could not compose: full key, value, valid choices, nearest valid key."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException) and "submitit" in str(error.missing_cfg_file):
        return 'hydra/launcher=slurm: submitit is not installed: pip install "lowprec[slurm]"'
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice}: choose one of {', '.join(error.options)}{did_you_mean(choice, error.options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: write KEY=VALUE, such as experiment=digits_smoke ({_first_line(error.message)})"
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.full_key:
        return unknown_key(str(cause.full_key), overrides)
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        reason = _first_line(str(cause.msg or cause))
        if wanted := re.search(r"could not be converted to (Integer|Float)$", reason):
            reason = f"expected {_KINDS[wanted[1]]}"
        return f"{_with_value(str(cause.full_key), overrides)}: {reason}"
    reason = " ".join(line.strip() for line in str(error).splitlines() if "append to your" not in line)
    return f"{reason} (composing {' '.join(overrides)})"


def unknown_key(key: str, overrides: Iterable[str] = ()) -> str:
    """The message for a key that no run has."""
    valid = schema_keys()
    # Hydra reports the first part that it does not know; the user wrote the whole key.
    written = next((name for name in map(_key_of, overrides) if name == key or name.startswith(f"{key}.")), key)
    parent = written.rpartition(".")[0]
    while parent and not any(name.startswith(f"{parent}.") for name in valid):
        parent = parent.rpartition(".")[0]
    depth = parent.count(".") + 2 if parent else 1
    siblings = sorted(
        {".".join(name.split(".")[:depth]) for name in valid if not parent or name.startswith(f"{parent}.")}
    )
    others = [name for name in valid if not written.startswith(f"{name}.")]
    same_leaf = [name for name in others if name.split(".")[-1] == written.split(".")[-1]]
    # What people call lr is the learning_rate.
    initials = [name for name in others if "".join(word[0] for word in name.split(".")[-1].split("_")) == written]
    hint = did_you_mean(written, others, cutoff=0.75)
    hint = hint or did_you_mean(written, initials, cutoff=0) or did_you_mean(written, same_leaf or others)
    where = f"the keys of {parent} are" if parent else "the keys are"
    return f"unknown key {_with_value(written, overrides)}: {where} {', '.join(siblings)}{hint}"


def did_you_mean(value: str, choices: Iterable[str], cutoff: float = 0.5) -> str:
    """``; did you mean CHOICE?`` for the nearest of the choices, or nothing when none is near."""
    near = difflib.get_close_matches(value, list(choices), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def _read_recipe_file(config: RunConfig, overrides: Iterable[str]) -> None:
    """Puts the recipe of ``recipe_file`` in the place of ``quant``: a run keeps what it holds, not where it lay."""
    if config.recipe_file is None:
        return
    for override in overrides:
        if _key_of(override).split(".")[0] == "quant":
            raise ConfigError(f"{override}: recipe_file={config.recipe_file} takes the place of quant; leave one out")
    if not Path(config.recipe_file).is_file():
        raise ConfigError(f"recipe_file={config.recipe_file}: there is no such file")
    try:
        config.quant, config.recipe_file = Recipe.load(config.recipe_file).to_dict(), None
    except RecipeError as error:
        raise ConfigError(f"recipe_file={config.recipe_file}: {error}") from error


def _check_keys(composed: DictConfig, overrides: Iterable[str]) -> None:
    # "+key=value" adds keys that the dataclasses lack without any complaint of Hydra's.
    valid = set(schema_keys())
    for key in _keys_of(composed):
        if key not in valid and not any(key.startswith(f"{free}.") for free in _FREE_FORM):
            raise ConfigError(unknown_key(key, overrides))


def _keys_of(node: DictConfig, prefix: str = "") -> Iterable[str]:
    for name in map(str, node):
        key = f"{prefix}{name}"
        yield key
        if OmegaConf.is_missing(node, name):
            continue
        if isinstance(child := node[name], DictConfig) and key not in _FREE_FORM:
            yield from _keys_of(child, f"{key}.")


def _values_of_sweep(override: str) -> list[str]:
    """The override once for each of its values."""
    (parsed,) = OverridesParser.create().parse_overrides([override])
    if not parsed.is_sweep_override() or parsed.is_hydra_override():
        return [override]
    key = override.split("=", 1)[0]
    # An interval, of a search, has ends but no values that could be counted.
    value: Any = parsed.value()
    values = [value.start, value.end] if parsed.is_interval_sweep() else parsed.sweep_string_iterator()
    return [f"{key}={item}" for item in values]


def _is_incidental(override: str) -> bool:
    key = _key_of(override)
    names = (*INCIDENTAL_KEYS, "experiment", "hydra")
    return any(key == name or key.startswith((f"{name}.", f"{name}/")) for name in names)


def _key_of(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _with_value(key: str, overrides: Iterable[str]) -> str:
    for override in overrides:
        if _key_of(override) == key and "=" in override:
            return f"{key}={override.split('=', 1)[1]}"
    return key


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), text)
