"""How what is stored (a run's configuration, a checkpoint's training) differs from what was asked for, in one sentence.

Imports no torch: a finished run answers before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SHOWN = 10


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """All keys that differ, flattened (``quant.rules[0].bits``) and sorted; "" where nothing does.

    ``quant.weights.bits: 2 there, 4 here; seed: 0 there, 3 here``: "there" is what is stored. After ten keys, a count. An
    empty mapping or list is as good as none.
    """
    there, here = dict(_leaves(stored)), dict(_leaves(wanted))
    found = [
        f"{key}: {_word(there, key)} there, {_word(here, key)} here"
        for key in sorted({*there, *here})
        if key not in there or key not in here or there[key] != here[key]
    ]
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "; ".join([*found[:SHOWN], *more])


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from _leaves(child, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(node, list) and (not node or any(isinstance(child, Mapping) for child in node)):
        for index, child in enumerate(node):
            yield from _leaves(child, f"{prefix}[{index}]")
    else:
        yield prefix, node


def _word(leaves: dict[str, Any], key: str) -> str:
    if key not in leaves:
        return "nothing"
    value = leaves[key]
    # As they are written on the command line.
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
