"""The pages in docs/: their examples run and give what they say, and the README leads to them."""

from __future__ import annotations

import ast
import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowprec

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_give_what_they_say(page: Path) -> None:
    torch.manual_seed(0)
    found = doctest.testfile(str(page), module_relative=False, report=True)
    assert found.failed == 0
    assert (found.attempted > 0) == (">>>" in page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_readme_leads_to_it(page: Path) -> None:
    assert f"(docs/{page.name})" in (REPOSITORY / "README.md").read_text()


def messages() -> list[str]:
    """All strings of the package; what an f-string fills in is …"""
    found = []
    for file in (REPOSITORY / "lowprec").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_errors_of_the_faq_are_the_codes_own() -> None:
    page = (REPOSITORY / "docs" / "faq.md").read_text()
    errors = re.findall(r"^### `(.*)`$", page, flags=re.MULTILINE)
    assert len(errors) == 20
    known = messages()
    assert [error for error in errors if not any(error in message for message in known)] == []


@pytest.mark.slow
def test_the_api_reference_holds_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "docs" / "api_reference.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    page = (tmp_path / "lowprec.html").read_text()
    assert [name for name in lowprec.__all__ if f'id="{name}"' not in page] == []
    assert "Raises" in page
    assert "full-precision" in page
