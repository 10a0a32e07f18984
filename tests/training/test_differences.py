"""What differs is named in full, in words of the command line."""

from __future__ import annotations

from lowprec.training.differences import SHOWN, differences


def test_all_keys_that_differ_are_named_flattened() -> None:
    stored = {"seed": 0, "quant": {"weights": {"bits": 2, "layout": None}, "rules": []}, "same": [1, 2], "off": False}
    wanted = {
        "seed": 0,
        "quant": {"weights": {"bits": 4, "layout": "x"}, "rules": [{"bits": 8}]},
        "same": [1, 2],
        "off": True,
    }
    assert differences(stored, wanted) == (
        "off: false there, true here; quant.rules[0].bits: nothing there, 8 here; quant.weights.bits: 2 there, 4 here; "
        "quant.weights.layout: null there, x here"
    )
    assert differences(stored, stored) == ""


def test_a_flat_mapping_is_as_good_as_a_nested_one() -> None:
    assert differences({"a.b": 1}, {"a": {"b": 1}}) == ""


def test_of_many_there_is_a_count() -> None:
    text = differences({}, {f"key{index:02}": index for index in range(SHOWN + 3)})
    assert text.count(" here") == SHOWN
    assert text.endswith("key09: nothing there, 9 here; and 3 more")
