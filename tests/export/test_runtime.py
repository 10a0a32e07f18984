"""Runtimes: what their kernels are, what processors they saturate on, and that a process survives them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from networks import awkward, images, quantize, random_network

import lowprec
from lowprec.export import runtime as runtimes
from lowprec.export.packed_onnx import export_packed_onnx
from lowprec.export.runtime import RUNTIME_NAMES, ExportedModel, RuntimeMissingError, openvino_core, saturates
from lowprec.integer.model import IntegerModel
from lowprec.integer.operators import IntegerLayer

# Layers of OpenVINO's compiled graph that hold no operator of ours: constants, and what moves their shapes.
CONSTANT = {"Const", "Reshape", "Input", "Output"}


@pytest.mark.parametrize("residual", ["requantized", "accumulator"])
@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_lite0", "mobilenetv2_050"])
def test_openvino_compiles_to_integer_kernels(name: str, residual: str, tmp_path: Path) -> None:
    model = awkward(timm.create_model(name, num_classes=7), seed=0, dead_channels=False)
    recipe = lowprec.Recipe.load("w2a8_n4")
    recipe.activations.residual = residual
    _, imodel = quantize(model, recipe, images(0, 2, (3, 32, 32)))
    lowprec.export_onnx(imodel, tmp_path / "model.onnx", lowprec.ExportOptions(runtime="openvino"))
    core = openvino_core()
    compiled = core.compile_model(core.read_model(tmp_path / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = [
        (str(node.get_rt_info()["layerType"].astype(str)), str(node.get_rt_info()["runtimePrecision"].astype(str)))
        for node in compiled.get_runtime_model().get_ordered_ops()
    ]
    layers = sum(kind in ("Convolution", "FullyConnected") for kind, _ in kinds)
    assert layers == sum(isinstance(step.operator, IntegerLayer) for step in imodel.steps)
    floats = [kind for kind, precision in kinds if kind not in CONSTANT and precision not in ("u8", "i8")]
    # The image is brought to whole numbers in float; nothing behind it is.
    assert floats in ([], ["Eltwise"], ["Subgraph"])


@pytest.mark.parametrize(
    ("export", "runtime"),
    [
        (lowprec.export_onnx, "onnxruntime"),
        (lowprec.export_onnx, "openvino"),
        (export_packed_onnx, "onnxruntime"),
    ],
)
def test_files_for_processors_with_vnni_agree_there(
    export: Callable[[IntegerModel, Path, lowprec.ExportOptions], None], runtime: str, tmp_path: Path
) -> None:
    if saturates(runtime):
        pytest.skip(f"{RUNTIME_NAMES[runtime]} saturates on this processor")
    file, options = tmp_path / "model.onnx", lowprec.ExportOptions(runtime=runtime, processor="vnni")
    for seed in range(4):
        qmodel, imodel = quantize(random_network(seed), "w8a8", images(seed))
        export(imodel, file, options)
        report = lowprec.verify(qmodel, imodel, [images(seed + 1, 5)], onnx=file, runtime=runtime)
        assert report.equal, report


@pytest.mark.parametrize("runtime", RUNTIME_NAMES)
def test_files_for_processors_with_vnni_are_refused_elsewhere(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, imodel = quantize(random_network(0), "w8a8", images(0))
    file = tmp_path / "model.onnx"
    lowprec.export_onnx(imodel, file, lowprec.ExportOptions(runtime=runtime, processor="vnni"))
    monkeypatch.setattr(runtimes, "saturates", lambda name: True)
    with pytest.raises(ValueError, match=r"model\.onnx is for processors with VNNI.*processor=any"):
        ExportedModel(file)


def test_a_kernel_that_saturates_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its result: 64 pairs of 255 · 127 + 255 · 127, each cut to 2^15 - 1, where the whole sum is asked for."""
    script = "from lowprec.export.runtime import saturates; print(saturates('openvino'))"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"


def test_a_process_survives_a_signal_after_openvino_has_run() -> None:
    script = (
        "import gc, os, signal, time\n"
        "from lowprec.export.runtime import saturates\n"
        "saturates('openvino'), gc.collect()\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(20)  # another thread may be the one that the signal reaches first\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    # faulthandler has the process use an alternate signal stack, as pytest and many servers do.
    run = subprocess.run([sys.executable, "-X", "faulthandler", "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "interrupted"), run.stderr


def test_a_runtime_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(RuntimeMissingError, match=r'pip install "lowprec\[openvino\]"'):
        openvino_core.__wrapped__()
