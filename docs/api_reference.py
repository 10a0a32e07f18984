"""Writes the API reference, pages of HTML made of the docstrings: ``python docs/api_reference.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

import lowprec


def write(folder: Path) -> None:
    """The public names of the package, all on one page with a search, under ``folder``."""
    for name in lowprec.__all__:
        # Names are found when first used; pdoc looks for those that are there.
        vars(lowprec)[name] = getattr(lowprec, name)
    pdoc.render.configure(
        docformat="google", math=True, show_source=False, footer_text=f"lowprec {lowprec.__version__}"
    )
    pdoc.pdoc("lowprec", output_directory=folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/api_reference.py FOLDER")
    write(Path(sys.argv[1]))
