"""One self-contained HTML file: a template, the figures of its plots as JSON, and Vega-Lite, which draws them.

Vega-Lite, Vega and Vega-Embed come from the ``vl-convert-python`` package, which bundles them without any network. A policy
in the page itself forbids the browser to fetch anything.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lowprec.files import whole_file
from lowprec.report.html.charts import Chart

ABSENT = "–"
_PACKAGE = "vl-convert-python"


def write_page(path: Path, template: str, charts: Mapping[str, Chart], **content: Any) -> None:
    """Fills the template (of ``templates/``) and writes it to ``path``, whole or not at all; all text is escaped.

    charts: by name; a template draws one with the macro ``chart(name)``. content: what else the template shows.
    """
    text = (
        _environment()
        .get_template(template)
        .render(
            charts=charts,
            figures=_json({name: chart.content() for name, chart in charts.items()}),
            plot_library=plot_library(),
            **content,
        )
    )
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@cache
def plot_library() -> Markup:
    """The JavaScript of Vega-Lite and what it needs, some 0.9 MB, as the content of a script element.

    Bundling takes seconds, so the text is kept in the user's cache folder, by the package's version.
    """
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(folder) / "lowprec" / f"vega-embed-{version(_PACKAGE)}.js"
    with suppress(OSError):
        return Markup(path.read_text(encoding="utf-8"))
    # Here, because a page that finds the text does not need it.
    import vl_convert

    text = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return Markup(text)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lowprec.report.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(share=share, count=count, decimals=decimals, points=points, signed=signed)
    return environment


def _json(content: Any) -> Markup:
    # In a script element nothing but "<" could end it.
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def share(value: float | None, digits: int = 2) -> str:
    """``95.60%``; a dash for what was not measured."""
    return ABSENT if value is None else f"{value:.{digits}%}"


def count(value: float | None) -> str:
    """``715,020,000``."""
    return ABSENT if value is None else f"{value:,.0f}"


def decimals(value: float | None, digits: int = 1) -> str:
    """``12.3``."""
    return ABSENT if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, ``+0.42``."""
    return ABSENT if value is None else f"{100 * value:+.2f}"


def signed(value: float | None, digits: int = 0) -> str:
    """``+1,234``."""
    return ABSENT if value is None else f"{value:+,.{digits}f}"
