"""The figures of a run, as summary.json and as one table."""

from __future__ import annotations

from typing import Any

from rich.table import Table

TOP1_ROWS = (
    ("full_precision", "full precision"),
    ("post_training", "post-training"),
    ("fine_tuned", "fine-tuned"),
    ("integer", "integer"),
    ("onnx", "ONNX Runtime"),
)
VERIFY_KEYS = ("images", "compared_codes", "mismatched_codes")
COST_KEYS = ("macs", "multiplications_replaced", "weight_bits", "fp32_bytes", "packed_bytes", "integer_mac_share")
SECONDS_KEYS = ("prepare", "calibrate", "fine_tune", "export")

Summary = dict[str, Any]


def build_summary(
    names: dict[str, str], results: dict[str, Any], seconds: dict[str, float], fine_tuned_epochs: int
) -> Summary:
    """summary.json's content.

    Args:
        names: ``experiment``, ``model``, ``data`` and ``recipe``.
        results: accuracies (shares of the whole test split) by stage, and the mappings ``verify`` and ``cost``.
        seconds: by stage. fine_tuned_epochs: how many epochs were fine-tuned; 0 makes that entry null.

    What was not measured is None, never made up.
    """
    summary: Summary = {key: names[key] for key in ("experiment", "model", "data", "recipe")}
    for key, _ in TOP1_ROWS:
        summary[key] = None if results.get(key) is None else {"top1": results[key]}
    if summary["fine_tuned"] is not None:
        summary["fine_tuned"]["epochs"] = fine_tuned_epochs
    for key, wanted in (("verify", VERIFY_KEYS), ("cost", COST_KEYS)):
        figures = results.get(key) or {}
        summary[key] = {name: figures.get(name) for name in wanted} if figures else None
    summary["seconds"] = {key: seconds.get(key) for key in SECONDS_KEYS}
    return summary


def cost_summary(costs: Any) -> dict[str, Any]:
    """The totals of a cost table (an object with these attributes) that go into the summary."""
    return {name: getattr(costs, name) for name in COST_KEYS}


def summary_table(summary: Summary) -> Table:
    """One table: top-1 of every form of the model, differing codes, and what it costs."""
    table = Table(
        title=f"{summary['experiment']}: {summary['model']} on {summary['data']}, {summary['recipe']}",
        title_justify="left",
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for key, label in TOP1_ROWS:
        entry = summary[key]
        value, note = ("not measured", "") if entry is None else (f"{entry['top1']:.2%}", "top-1")
        if key == "fine_tuned" and entry is not None:
            note = f"top-1 after {plural(entry['epochs'], 'epoch')}"
        table.add_row(label, value, note)
    table.add_section()
    _add_verify_row(table, summary["verify"])
    if summary["cost"] is not None:
        table.add_section()
        for row in cost_rows(summary["cost"]):
            table.add_row(*row)
    return table


def plural(count: int, noun: str) -> str:
    """``1 epoch``, ``2 epochs``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _add_verify_row(table: Table, verify: dict[str, Any] | None) -> None:
    if verify is None:
        table.add_row("differing codes", "not measured", "")
        return
    style = "bold red" if verify["mismatched_codes"] else None
    note = f"of {verify['compared_codes']:,} compared on {verify['images']:,} images"
    table.add_row("differing codes", f"{verify['mismatched_codes']:,}", note, style=style)


def cost_rows(cost: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (label, figure, unit or note) of a ``cost`` mapping."""
    ratio = cost["fp32_bytes"] / cost["packed_bytes"]
    return [
        ("multiplications replaced", f"{cost['multiplications_replaced']:.1%}", f"of {cost['macs']:,} MACs an image"),
        ("bits per weight", f"{cost['weight_bits']:.2f}", "scales included"),
        ("bytes", f"{cost['packed_bytes']:,}", f"packed; {cost['fp32_bytes']:,} in float32, {ratio:.1f}x smaller"),
        ("integer MACs", f"{cost['integer_mac_share']:.1%}", "of all MACs"),
    ]
