"""What there is to choose from, for ``task=list``: read from the comments at the top of the configuration files."""

from __future__ import annotations

import importlib.resources
import textwrap
from collections.abc import Iterator
from pathlib import Path

WIDTH = 130
GROUPS = {
    "experiment": "Experiments (experiment=NAME), with the results to expect",
    "quant": "Recipes (quant=NAME; recipe_file=FILE takes one of your own)",
    "model": "Models (model=NAME; model.name=timm:NAME or model.name=torchvision:NAME takes any of theirs)",
    "data": "Data sets (data=NAME)",
    "hparams_search": "Sweeps and searches (-m hparams_search=NAME)",
}
EXPECTED = "Expected: "


def listing(config_folder: Path) -> str:
    """A paragraph for each group of ``config_folder``: the names of its choices, and what their files say of them."""
    return "\n\n".join("\n".join([title, *_choices(_folder(group, config_folder))]) for group, title in GROUPS.items())


def description(file: Path) -> str:
    """The comment that a configuration file begins with, without the line that tells Hydra where it belongs."""
    lines = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def _folder(group: str, config_folder: Path) -> Path:
    if group == "quant":
        return Path(str(importlib.resources.files("lowprec.recipes"))) / group
    return config_folder / group


def _choices(folder: Path) -> Iterator[str]:
    files = sorted(folder.glob("*.yaml"))
    width = max(len(file.stem) for file in files)
    for file in files:
        told, _, expected = description(file).partition(EXPECTED)
        for index, text in enumerate([told.strip(), EXPECTED + expected] if expected else [told.strip()]):
            first = f"  {file.stem if index == 0 else '':{width}}  "
            yield textwrap.fill(
                text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
            )
