"""Packed files: the same model again, or a clear error; never another model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import images, quantize, random_network, random_recipe
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lowprec
from lowprec import files
from lowprec.integer import packed
from lowprec.integer.model import IntegerModel
from lowprec.integer.operators import IntegerLayer
from lowprec.integer.packed import PackedFileError


class Tiny(nn.Sequential):
    """The smallest network with 8-bit and ternary layers, so that its file can be damaged at every byte."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))


@pytest.fixture(scope="module")
def tiny() -> IntegerModel:
    torch.manual_seed(0)
    return quantize(Tiny().eval(), "w2a8_n4", torch.randn(4, 1, 2, 2))[1]


@pytest.fixture
def file(tiny: IntegerModel, tmp_path: Path) -> Path:
    lowprec.save(tiny, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("seed", range(40, 52))
def test_a_loaded_model_gives_the_same_codes(seed: int, tmp_path: Path) -> None:
    _, imodel = quantize(random_network(seed), random_recipe(seed), images(seed))
    lowprec.save(imodel, tmp_path / "model.safetensors")
    loaded = lowprec.load(tmp_path / "model.safetensors")
    assert loaded.image_shape == imodel.image_shape
    assert [(step.name, step.inputs) for step in loaded.steps] == [(step.name, step.inputs) for step in imodel.steps]
    x = images(seed + 1)
    expected, found = imodel.codes(x), loaded.codes(x)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], codes) for name, codes in expected.items())
    assert torch.equal(loaded(x), imodel(x))
    for step, other in zip(imodel.steps, loaded.steps, strict=True):
        assert step.operator.attributes() == other.operator.attributes()
        if isinstance(step.operator, IntegerLayer):
            assert torch.equal(step.operator.codes, other.operator.codes)


def test_saving_again_gives_the_same_bytes(file: Path, tiny: IntegerModel) -> None:
    found = {file.read_bytes()}
    for _ in range(12):
        lowprec.save(tiny, file)
        found.add(file.read_bytes())
    assert len(found) == 1


def test_codes_take_two_and_four_bits_each(tmp_path: Path) -> None:
    for recipe, per_byte in (("w2a8_n4", 4), ("w4a8_n4", 2)):
        _, imodel = quantize(random_network(40), recipe, images(0))
        lowprec.save(imodel, tmp_path / "model.safetensors")
        with safe_open(tmp_path / "model.safetensors", framework="pt") as content:
            for step in imodel.steps:
                if isinstance(step.operator, IntegerLayer):
                    weights = step.operator.codes.numel()
                    divisor = 1 if step.operator.bits == 8 else per_byte
                    assert len(content.get_tensor(f"{step.name}.codes")) == -(-weights // divisor)


def test_a_loaded_model_can_be_saved_again(file: Path, tiny: IntegerModel) -> None:
    lowprec.save(lowprec.load(file), file)
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lowprec.load(file)(x), tiny(x))


def test_loading_needs_neither_timm_nor_the_models_code(file: Path, tiny: IntegerModel) -> None:
    code = (
        "import sys, torch, lowprec\n"
        "model = lowprec.load(sys.argv[1])\n"
        "print(model(torch.arange(4.0).view(1, 1, 2, 2)).flatten().tolist())\n"
        "print([name for name in ('timm', 'torchvision', 'onnx', 'lowprec.prepare', 'lowprec.layers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    logits = tiny(torch.arange(4.0).view(1, 1, 2, 2)).flatten().tolist()
    assert done.stdout.splitlines() == [str(logits), "[]"]


def test_every_damaged_byte_is_noticed(file: Path) -> None:
    content = file.read_bytes()
    damaged = file.with_name("damaged.safetensors")
    for position in range(len(content)):
        for flip in (1 << position % 8, 0xFF):
            damaged.write_bytes(content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :])
            with pytest.raises(PackedFileError, match=r"damaged\.safetensors"):
                lowprec.load(damaged)


def test_truncated_files_are_refused(file: Path) -> None:
    content = file.read_bytes()
    short = file.with_name("short.safetensors")
    for length in [0, 1, 7, 8, 9, *range(10, len(content), 37), len(content) - 1]:
        short.write_bytes(content[:length])
        with pytest.raises(PackedFileError, match=r"short\.safetensors is truncated"):
            lowprec.load(short)


def test_missing_file_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors: lowprec\.save"):
        lowprec.load(tmp_path / "nowhere.safetensors")


def test_other_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(PackedFileError, match="no packed model of lowprec"):
        lowprec.load(path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(PackedFileError, match="no safetensors file"):
        lowprec.load(path)


def test_a_later_version_is_refused(tiny: IntegerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(packed, "VERSION", max(packed.VERSIONS) + 1)
        lowprec.save(tiny, tmp_path / "model.safetensors")
    with pytest.raises(PackedFileError, match=r"version 4, this lowprec reads versions 2 and 3: update lowprec"):
        lowprec.load(tmp_path / "model.safetensors")


def test_an_earlier_version_is_to_be_exported_again(
    tiny: IntegerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(packed, "VERSION", packed.VERSION - 1)
        lowprec.save(tiny, tmp_path / "model.safetensors")
    with pytest.raises(PackedFileError, match=r"version 1, this lowprec reads versions 2 and 3: export it again"):
        lowprec.load(tmp_path / "model.safetensors")


def test_an_unknown_operator_names_itself(tiny: IntegerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowprec.save(tiny, tmp_path / "model.safetensors")
    monkeypatch.delitem(packed.OPERATORS, "linear")
    with pytest.raises(PackedFileError, match=r"operators that this lowprec does not know \(linear\): update it"):
        lowprec.load(tmp_path / "model.safetensors")


def test_a_place_that_no_file_can_have_is_named(tiny: IntegerModel, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    with pytest.raises(IsADirectoryError, match=r"a folder; give the name of a file in it: .*inside"):
        lowprec.save(tiny, tmp_path / "inside")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere to write to.*nowhere/model"):
        lowprec.save(tiny, tmp_path / "nowhere" / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


def test_a_failed_save_leaves_the_old_file_alone(
    file: Path, tiny: IntegerModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        lowprec.save(tiny, file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_only_integer_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"lowprec\.convert\(qmodel\), not Tiny"):
        lowprec.save(Tiny(), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
