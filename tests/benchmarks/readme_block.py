"""Writes what a benchmark printed into the README: no figure there is typed by hand.

    python tests/benchmarks/training_step.py resnet18 > step.txt
    python tests/benchmarks/readme_block.py training_step step.txt [FILE ...] [--readme README.md]

NAME's place in the README is between the lines `<!-- NAME -->` and `<!-- end of NAME -->`. What is written names the machine
and the versions, as the benchmarks' first paragraph does; of several files it must be the same, and stands there once.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from lowprec.files import whole_file

README = Path(__file__).resolve().parents[2] / "README.md"
MACHINE = re.compile(r".+, \d+ cores, \d+ threads: .+\n")


def joined(outputs: Sequence[str]) -> str:
    """What several runs of a benchmark printed, as if it had been one.

    Raises:
        ValueError: they are of different machines or versions.
    """
    heads, bodies = zip(*(output.strip().split("\n\n", 1) for output in outputs), strict=True)
    if len(set(heads)) > 1:
        raise ValueError("the outputs are of different machines, threads or versions")
    return "\n\n".join([heads[0], *bodies]) + "\n"


def with_block(text: str, name: str, output: str) -> str:
    """``text`` with ``output`` as the block of that name.

    Raises:
        ValueError: the text has no place of that name, or more than one; or the output does not name its machine.
    """
    if not MACHINE.match(output):
        raise ValueError("the output does not begin with the machine: is it that of a benchmark?")
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    if (text.count(first), text.count(last)) != (1, 1):
        raise ValueError(f"there must be one line {first.strip()} and one line {last.strip()}")
    block = re.compile(re.escape(first) + ".*?" + re.escape(last), re.DOTALL)
    return block.sub(lambda _: f"{first}```text\n{output.strip()}\n```\n{last}", text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="of the block")
    parser.add_argument("outputs", metavar="FILE", type=Path, nargs="+", help="what the benchmark printed")
    parser.add_argument("--readme", type=Path, default=README)
    given = parser.parse_args(arguments)
    try:
        outputs = [file.read_text() for file in given.outputs]
        output = outputs[0] if len(outputs) == 1 else joined(outputs)
        text = with_block(given.readme.read_text(), given.name, output)
    except (OSError, ValueError) as error:
        parser.error(f"{' '.join(map(str, given.outputs))} into {given.readme}: {error}")
    with whole_file(given.readme) as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    main()
