"""The names of the contract, whatever was imported first."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import lowprec

NAMES = (
    "Recipe",
    "prepare",
    "calibrate",
    "reconstruct",
    "convert",
    "verify",
    "sensitivity",
    "assign",
    "Sensitivity",
    "export_onnx",
    "export_packed_onnx",
    "export_qonnx",
    "ExportOptions",
    "save",
    "load",
    "cost",
    "solve",
    "FastModel",
    "ExportedModel",
    "IntegerModel",
    "Normalization",
    "ConversionError",
    "ExportedFileError",
    "PackedFileError",
    "RecipeError",
    "RuntimeMissingError",
    "TracingError",
    "UnsupportedModelError",
    "VerificationError",
)


def printed(code: str) -> str:
    """What a fresh Python process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", NAMES)
def test_name_is_public(name: str) -> None:
    assert callable(getattr(lowprec, name))
    assert not inspect.ismodule(getattr(lowprec, name))
    assert name in lowprec.__all__
    assert name in dir(lowprec)


def test_nothing_else_is_public() -> None:
    assert sorted(lowprec.__all__) == sorted(NAMES)


@pytest.mark.slow
def test_functions_win_over_submodules_of_their_names() -> None:
    code = (
        "import lowprec.prepare, lowprec.calibrate, lowprec.verify, lowprec.cost, lowprec.assign, lowprec\n"
        "from lowprec import prepare\n"
        "from lowprec.prepare import full_precision\n"
        "lowprec.solve\n"
        "import lowprec.numerics.solve\n"
        "names = ['prepare', 'calibrate', 'verify', 'cost', 'sensitivity', 'assign', 'solve']\n"
        "print([type(getattr(lowprec, name)).__name__ for name in names], prepare is lowprec.prepare)"
    )
    assert printed(code) == f"{['function'] * 7} True"


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, lowprec\nprint([name for name in ('torch', 'onnx', 'timm', 'numpy') if name in sys.modules])"
    assert printed(code) == "[]"


def test_a_recipe_needs_no_torch() -> None:
    code = "import sys, lowprec\nprint(lowprec.Recipe.load('w2a8_n4').name, 'torch' in sys.modules)"
    assert printed(code) == "w2a8_n4 False"


def test_unknown_name_lists_the_public_ones() -> None:
    with pytest.raises(AttributeError, match=r"'lowprec' has no attribute 'quantise'; .*calibrate.*verify"):
        _ = lowprec.quantise
    with pytest.raises(ImportError, match="quantise"):
        from lowprec import quantise  # noqa: F401
