"""The library of C kernels is built once, and whatever is in the way of it leaves PyTorch's operators, and says why."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from native_kernels import needs_compiler

from lowprec.layers.training_norm import quantized_norm
from lowprec.numerics.fixed_point import SIGNED_8_BIT, UNSIGNED_8_BIT
from lowprec.numerics.native import library as module
from lowprec.numerics.native.library import BuildError, is_built, library
from lowprec.numerics.straight_through import straight_through_activation


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own; what was found out before is forgotten."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for known in (is_built, library):
        known.cache_clear()
    yield tmp_path / "lowprec"
    monkeypatch.undo()
    for known in (is_built, library):
        known.cache_clear()


@needs_compiler
def test_it_is_built_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_built()
    (file,) = folder.iterdir()
    assert file.suffix == ".so"
    library.cache_clear()
    monkeypatch.setattr(module, "_build", lambda *arguments: pytest.fail("built again"))
    library()


@needs_compiler
@pytest.mark.parametrize("kind", ["SOURCES", "HEADERS"])
def test_another_source_is_another_library(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library()
    *others, last = getattr(module, kind)
    changed = tmp_path / last.name
    changed.write_text(last.read_text() + "/* changed */")
    monkeypatch.setattr(module, kind, (*others, changed))
    library.cache_clear()
    library()
    assert len(list(folder.iterdir())) == 2


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the folder should be."""
    (tmp_path / "lowprec").write_text("")
    assert is_built()
    assert (tmp_path / "lowprec").read_text() == ""


@needs_compiler
def test_registers_of_any_width_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this CPU, and AVX2's, which each has that has wider ones."""
    generator = torch.Generator().manual_seed(0)
    values, gradient = (
        torch.randn(3, 24, 7, 5, generator=generator).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    exponent = torch.tensor(-6, dtype=torch.int32)
    found = []
    for capability in (torch.backends.cpu.get_cpu_capability(), "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        library.cache_clear()
        norm, leaf = torch.nn.BatchNorm2d(24), values.clone().requires_grad_()
        result = quantized_norm(norm, leaf, exponent, UNSIGNED_8_BIT, "relu")
        assert result is not None
        result.backward(gradient)
        behind = straight_through_activation(result.detach()[:, :23, 1:], exponent + 1, SIGNED_8_BIT)
        found.append([result.detach(), behind, leaf.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("false", "false .*activations.c"), ("no-such-compiler -x", "no-such-compiler -x.*No such file")],
)
@needs_compiler
def test_a_compiler_that_fails(
    compiler: str, reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(BuildError, match=reason):
        library()
    with caplog.at_level(logging.INFO, logger="lowprec.kernels"):
        assert not is_built()
    assert "PyTorch's operators" in caplog.text
    assert list(folder.iterdir()) == []
    # Operators do it.
    values = torch.tensor([-1.0, 0.6, 300.0], requires_grad=True)
    whole = torch.tensor(0, dtype=torch.int32)
    assert straight_through_activation(values, whole, UNSIGNED_8_BIT, "relu").tolist() == [0.0, 1.0, 255.0]


def test_no_compiler_and_no_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    with pytest.raises(BuildError, match="no C compiler"):
        library()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(BuildError, match="no AVX2"):
        library()


@needs_compiler
def test_another_openmp_is_not_taken_for_pytorchs() -> None:
    """Packages such as scikit-learn bring one, too."""
    importlib.import_module("sklearn.cluster")
    assert Path(module._openmp()).is_relative_to(Path(torch.__file__).parent)
