"""The loader benchmark on few images: all candidates read all batches, and the files are as it says."""

from __future__ import annotations

import io

import loader
import numpy as np
import pytest
from PIL import Image


def test_every_candidate_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    loader.main(["--images", "9", "--batch", "4", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "9 JPEG files of 500×375, batches of 4, 0 workers"
    rows = [line for line in lines if line.rstrip().endswith("x")]
    assert len(rows) == 3
    assert rows[0].startswith(loader.REFERENCE)
    assert rows[0].endswith("1.00x")
    assert all(float(row.split()[-3]) > 0 for row in rows)


def test_speeds_are_images_a_second_and_core() -> None:
    speeds = loader.measure({"a": lambda epoch: 10**9, "b": lambda epoch: 0}, rounds=3, cores=1)
    assert [len(found) for found in speeds.values()] == [3, 3]
    assert min(speeds["a"]) > max(speeds["b"]) == 0
    text = loader.table({loader.REFERENCE: [1.0, 2.0, 4.0], "ours": [3.0, 3.0, 8.0]})
    assert text.splitlines()[-1].split() == ["ours", "3.0", "8.0", "2.00x"]


def test_photographs_are_jpeg_files_of_the_size_of_imagenets() -> None:
    generator = np.random.default_rng(0)
    content = loader.photograph(generator, [generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)])
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
