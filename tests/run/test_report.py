"""report.html of a finished run, of an interrupted one, and where something is missing or fails."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FinishedRun, compose
from PIL import Image

import lowprec.run.report
import lowprec.run.stages
from lowprec.config import RunConfig
from lowprec.data import DataError, create_data
from lowprec.run.command_line import run_to_exit_code
from lowprec.run.directory import RunDirectory
from lowprec.run.report import picture, run_content
from lowprec.run.stages import run
from lowprec.run.tasks import stored_run

SECTIONS = (
    *("accuracy", "cost", "layers", "weights", "activations", "training", "sensitivity", "classes", "configuration"),
)
# Elements without an end tag.
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Elements of a page, checked to be nested as they should."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            # A browser would end an open paragraph here, and find its end tag too many.
            assert not (self.open and self.open[-1] == "p" and tag in ("p", "div", "table", "figure", "ul")), attrs
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        # "option" and such may be left open, but are not here.
        assert self.open.pop() == tag

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.elements if attribute in attributes]


def report_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def figures_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    content: dict[str, Any] = json.loads(found.group(1))
    return content


def test_a_run_ends_with_one_self_contained_file(digits_run: FinishedRun) -> None:
    text = report_of(digits_run.directory)
    page = Page(text)
    assert len(text.encode()) < 5_000_000
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert [attributes["id"] for tag, attributes in page.elements if tag == "section"] == list(SECTIONS)
    assert set(page.values("href")) == {"data:,", "#main", *(f"#{name}" for name in SECTIONS)}
    assert all(source.startswith("data:image/png;base64,") for source in page.values("src"))
    # The browser itself refuses whatever would be fetched, and no element carries a script of its own.
    policies = [
        attributes for _, attributes in page.elements if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in (policies[0]["content"] or "")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "url(" not in text[: text.index("</style>")]
    labels = {tag: attributes for tag, attributes in page.elements if tag == "label"}
    assert labels
    assert {label for label in page.values("for")} == {a["id"] for tag, a in page.elements if tag == "select"}


def test_the_report_says_what_the_summary_says(digits_run: FinishedRun) -> None:
    text, summary = report_of(digits_run.directory), digits_run.summary
    for stage in ("full_precision", "post_training", "fine_tuned", "integer", "onnx"):
        assert f'<td class="number">{summary[stage]["top1"]:.2%}</td>' in text
    verify = summary["verify"]
    assert f"differ in 0 of {verify['compared_codes']:,} codes compared on {verify['images']:,} test images" in text
    assert 'class="verdict good"' in text
    assert "Horowitz" in text
    assert f"{summary['cost']['multiplications_replaced']:.1%}" in text
    assert set(figures_of(text)) == {
        *("ladder", "depth", "weights", "scales", "activations", "loss", "top1", "flips", "sparsity", "confusion"),
    }


def test_the_summary_and_the_state_are_as_without_a_report(digits_run: FinishedRun) -> None:
    assert "report" not in json.loads((digits_run.directory / "run.json").read_text())["seconds"]
    assert f"  {digits_run.directory / 'report.html'}\n" in digits_run.output


def test_task_report_makes_the_same_report_again(
    copied_digits_run: Callable[[], Path], digits_run: FinishedRun
) -> None:
    folder = copied_digits_run() / "digits_smoke"
    (folder / "report.html").unlink()
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    run(compose("run_id=digits_smoke", f"runs_dir={folder.parent}", "task=report"))
    assert report_of(folder) == report_of(digits_run.directory)
    assert {name: (folder / name).read_bytes() for name in files} == files


def test_measurements_agree_with_what_the_run_found(digits_run: FinishedRun) -> None:
    directory = stored_run(compose("run_id=digits_smoke", f"runs_dir={digits_run.runs_dir}", "task=report"))
    directory.read_state()
    content = run_content(directory)
    classes, summary = content.classes, digits_run.summary
    assert classes is not None
    right = sum(classes.confusion[index][index] for index in range(10))
    assert right / classes.images == pytest.approx(summary["fine_tuned"]["top1"], abs=1e-12)
    assert (right - classes.gained + classes.lost) / classes.images == pytest.approx(summary["full_precision"]["top1"])
    assert classes.agreed == classes.images - len(classes.changed)
    assert len(classes.pictures) == len(classes.changed) > 0
    assert sum(layer.macs for layer in content.layers) == summary["cost"]["macs"]
    last = content.metrics[-1]
    assert all(layer.sparsity >= 0 and f"sparsity/{layer.name}" in last for layer in content.layers)
    assert content.missing == {"sensitivity": content.missing["sensitivity"]}


def test_an_interrupted_run_has_a_report_of_what_there_is(copied_digits_run: Callable[[], Path]) -> None:
    folder = copied_digits_run() / "digits_smoke"
    for name in ("summary.json", "report.html", "model.onnx", "model.safetensors", "metrics.csv"):
        (folder / name).unlink()
    state = json.loads((folder / "run.json").read_text())
    for name in ("fine_tuned", "validation", "verify", "integer", "onnx"):
        del state["results"][name]
    (folder / "run.json").write_text(json.dumps(state))
    run(compose("run_id=digits_smoke", f"runs_dir={folder.parent}", "task=report"))
    text = report_of(folder)
    Page(text)
    assert "This run is not finished" in text
    assert text.count("not measured</td>") == 3
    assert "Not verified yet" in text
    assert "The best weights of the fine-tuning so far" in text
    assert "There is no metrics.csv" in text
    assert "weights" in figures_of(text)
    assert "loss" not in figures_of(text)
    assert not (folder / "summary.json").exists()


def test_a_run_that_has_only_begun_has_a_report_too(copied_digits_run: Callable[[], Path]) -> None:
    folder = copied_digits_run() / "digits_smoke"
    for name in ("summary.json", "report.html", "run.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints")
    run(compose("run_id=digits_smoke", f"runs_dir={folder.parent}", "task=report"))
    text = report_of(folder)
    assert text.count("the run has no calibrated model yet") == 4
    assert "Costs are not known yet" in text


def test_without_the_baseline_the_rest_is_shown_and_nothing_is_trained(copied_digits_run: Callable[[], Path]) -> None:
    runs = copied_digits_run()
    for path in (runs / "baselines").glob("*.safetensors"):
        path.unlink()
    run(compose("run_id=digits_smoke", f"runs_dir={runs}", "task=report"))
    text = report_of(runs / "digits_smoke")
    assert "Changed classes and full-precision weights are not shown: there is no " in text
    assert {"weights", "confusion"} < set(figures_of(text))
    assert not list((runs / "baselines").glob("*.safetensors"))


def test_data_that_is_not_there_is_said_in_the_report(
    copied_digits_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied_digits_run() / "digits_smoke"

    def fail(config: RunConfig) -> None:
        raise DataError("no images in <here>")

    monkeypatch.setattr(lowprec.run.report, "run_data", fail)
    run(compose("run_id=digits_smoke", f"runs_dir={folder.parent}", "task=report"))
    text = report_of(folder)
    assert text.count("Not measured: no images in &lt;here&gt;") == 4
    assert {"ladder", "loss"} < set(figures_of(text))


def test_a_damaged_checkpoint_is_said_in_the_report(copied_digits_run: Callable[[], Path]) -> None:
    folder = copied_digits_run() / "digits_smoke"
    (folder / "checkpoints" / "best.safetensors").write_bytes(b"nothing")
    assert run_to_exit_code(compose("run_id=digits_smoke", f"runs_dir={folder.parent}", "task=report")) == 0
    assert "best.safetensors" in report_of(folder)


def test_a_verification_that_failed_is_not_called_equal(copied_digits_run: Callable[[], Path]) -> None:
    folder = copied_digits_run() / "digits_smoke"
    state = json.loads((folder / "run.json").read_text())
    state["results"]["verify"]["mismatched_codes"] = 7
    state["results"]["verification"] = "7 of 9 codes differ; the first in <conv1>"
    (folder / "run.json").write_text(json.dumps(state))
    run(compose("run_id=digits_smoke", f"runs_dir={folder.parent}", "task=report"))
    text = report_of(folder)
    assert (
        'class="verdict bad">Not equal, do not ship this run: 7 of 9 codes differ; the first in &lt;conv1&gt;.' in text
    )


def test_a_report_that_fails_is_one_warning_and_the_run_is_finished(
    copied_digits_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = copied_digits_run()
    (runs / "digits_smoke" / "summary.json").unlink()

    def fail(directory: RunDirectory) -> None:
        raise ValueError("no [paper]")

    monkeypatch.setattr(lowprec.run.report, "run_content", fail)
    config = compose("experiment=digits_smoke", "logger=csv_wandb", f"runs_dir={runs}", "logger.wandb=false")
    assert run_to_exit_code(config) == 0
    output = capsys.readouterr().out
    assert output.count("warning: there is no report.html (ValueError: no [paper])") == 1
    assert (runs / "digits_smoke" / "summary.json").is_file()


def test_wandb_without_its_report_is_one_warning_and_the_page_is_there(
    copied_digits_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = copied_digits_run()
    for made in ("summary.json", "report.html"):
        (runs / "digits_smoke" / made).unlink()

    def fail(*arguments: object) -> None:
        raise ValueError("no [table]")

    monkeypatch.setattr(lowprec.run.stages, "log_media", fail)
    config = compose("experiment=digits_smoke", "logger=csv_wandb", f"runs_dir={runs}", "logger.wandb=false")
    assert run_to_exit_code(config) == 0
    output = capsys.readouterr().out
    assert output.count("warning: W&B has no report (ValueError: no [table])") == 1
    assert "there is no report.html" not in output
    assert (runs / "digits_smoke" / "report.html").is_file()


def test_sensitivity_is_shown_where_it_was_measured(copied_digits_run: Callable[[], Path]) -> None:
    folder = copied_digits_run() / "digits_smoke"
    row = {"kl_divergence": 0.1, "top1_difference": None, "weight_bits": 2.2}
    rows = [
        {**row, "layer": "conv1", "scheme": "4-bit", "signal_to_noise": 20.0},
        {**row, "layer": "classifier", "scheme": "ternary", "signal_to_noise": 5.0},
        {**row, "layer": "classifier", "scheme": "8-bit", "signal_to_noise": None},
    ]
    (folder / "sensitivity.json").write_text(json.dumps({"images": 32, "rows": rows}))
    run(compose("run_id=digits_smoke", f"runs_dir={folder.parent}", "task=report"))
    chart = figures_of(report_of(folder))["sensitivity"]["spec"]
    assert chart["encoding"]["y"]["sort"] == ["classifier", "conv1"]
    assert [found["signal_to_noise"] for found in chart["datasets"]["rows"]] == [20.0, 5.0]


def test_a_report_of_no_run_is_one_clear_error(digits_run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_to_exit_code(compose(f"runs_dir={digits_run.runs_dir}", "task=report", "run_id=nothing")) == 2
    assert capsys.readouterr().err.startswith("error: there is no run in")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_are_the_pixels_that_the_data_had(channels: int) -> None:
    data = create_data("digits")
    data.mean, data.std = (0.3,) * channels, (0.4,) * channels
    pixels = torch.randint(0, 256, (channels, 6, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = (pixels / 255 - 0.3) / 0.4
    drawn = torch.from_numpy(np.array(Image.open(io.BytesIO(picture(image, data)))))
    assert torch.equal(drawn, pixels.permute(1, 2, 0) if channels == 3 else pixels[0])


def test_large_pictures_are_made_smaller() -> None:
    data = create_data("digits")
    drawn = Image.open(io.BytesIO(picture(torch.zeros(1, 224, 448), data)))
    assert drawn.size == (112, 56)
