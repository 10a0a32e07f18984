"""summary.json's content and the table: null is null, and differing codes stand out."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from lowprec.report.summary import build_summary, plural, summary_table

NAMES = {"experiment": "mine", "model": "resnet8", "data": "digits", "recipe": "w2a8_n4"}
COST = {
    "macs": 1000,
    "multiplications_replaced": 0.847,
    "weight_bits": 2.25,
    "fp32_bytes": 4000,
    "packed_bytes": 500,
    "integer_mac_share": 1.0,
}


def printed(summary: dict[str, Any]) -> str:
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(summary))
    return console.export_text()


def test_what_was_not_measured_is_null_and_said_to_be() -> None:
    summary = build_summary(NAMES, {"full_precision": 0.9}, {"prepare": 1.5}, 3)
    assert summary["full_precision"] == {"top1": 0.9}
    for key in ("post_training", "fine_tuned", "integer", "onnx", "verify", "cost"):
        assert summary[key] is None
    assert summary["seconds"] == {"prepare": 1.5, "calibrate": None, "fine_tune": None, "export": None}
    text = printed(summary)
    assert "90.00%" in text
    assert text.count("not measured") == 5


def test_all_figures_are_in_the_table() -> None:
    verify = {"images": 10, "compared_codes": 12345, "mismatched_codes": 0}
    results = {
        "full_precision": 0.9237,
        "post_training": 0.8975,
        "fine_tuned": 0.916,
        "integer": 0.916,
        "onnx": 0.916,
        "verify": verify,
        "cost": COST,
    }
    summary = build_summary(NAMES, results, {}, 3)
    assert summary["fine_tuned"] == {"top1": 0.916, "epochs": 3}
    assert summary["verify"] == verify
    assert summary["cost"] == COST
    text = printed(summary)
    for words in (
        "mine: resnet8 on digits, w2a8_n4",
        "92.37%",
        "top-1 after 3 epochs",
        "of 12,345 compared on 10 images",
    ):
        assert words in text
    for words in ("84.7%", "2.25", "500", "4,000 in float32, 8.0x smaller", "100.0%"):
        assert words in text


def test_plural() -> None:
    assert (plural(1, "epoch"), plural(0, "epoch"), plural(2, "epoch")) == ("1 epoch", "0 epochs", "2 epochs")
