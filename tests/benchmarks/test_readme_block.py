"""Benchmarks' outputs are written into the README by a command."""

from __future__ import annotations

from pathlib import Path

import pytest
import readme_block
from inference import describe_machine

OUTPUT = f"{describe_machine(2)}\n\nresnet18: 1.09x \\1\n"
TEXT = "before\n<!-- step -->\nold\n<!-- end of step -->\nafter\n"


def test_the_block_alone_changes_and_again_gives_the_same(tmp_path: Path) -> None:
    readme, output = tmp_path / "README.md", tmp_path / "step.txt"
    readme.write_text(TEXT)
    output.write_text(OUTPUT)
    for _ in range(2):
        readme_block.main(["step", str(output), "--readme", str(readme)])
        expected = f"before\n<!-- step -->\n```text\n{OUTPUT.strip()}\n```\n<!-- end of step -->\nafter\n"
        assert readme.read_text() == expected


def test_outputs_of_one_machine_are_joined_and_of_two_are_not() -> None:
    assert (
        readme_block.joined([OUTPUT, OUTPUT.replace("18", "50")])
        == f"{OUTPUT}\n" + OUTPUT.replace("18", "50").split("\n\n")[1]
    )
    with pytest.raises(ValueError, match="different machines, threads or versions"):
        readme_block.joined([OUTPUT, OUTPUT.replace("2 threads", "1 threads")])


@pytest.mark.parametrize(
    ("text", "output", "message"),
    [
        (TEXT, "resnet18: 1.09x\n", "does not begin with the machine"),
        ("before\n", OUTPUT, "there must be one line <!-- step -->"),
        (TEXT * 2, OUTPUT, "there must be one line <!-- step -->"),
    ],
)
def test_a_mistake_leaves_the_readme(
    text: str, output: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "step.txt").write_text(output)
    with pytest.raises(SystemExit):
        readme_block.main(["step", str(tmp_path / "step.txt"), "--readme", str(tmp_path / "README.md")])
    assert message in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text


def test_the_blocks_of_the_readme_are_a_benchmark_s_output() -> None:
    text = readme_block.README.read_text()
    for name in ("training_step", "preparation"):
        block = text.split(f"<!-- {name} -->\n```text\n")[1].split("```\n")[0]
        assert readme_block.with_block(text, name, block) == text
