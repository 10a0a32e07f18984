"""Which families convert to integers, proven on photographs: `python tests/benchmarks/coverage.py [FAMILY ...]`.

Each family is prepared, calibrated, converted, exported for ONNX Runtime and for OpenVINO, and verified code by code. Without
a folder of photographs, crops of scikit-learn's two are taken. Weights are random, batch norms' statistics too: equality does
not depend on them. `--write README.md` puts the lines of the families measured into the table between that file's markers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from networks import awkward

import lowprec
from lowprec.data.normalization import Normalization
from lowprec.export.runtime import RUNTIME_NAMES
from lowprec.files import whole_file
from lowprec.integer.operators import FloatOperator
from lowprec.models import create_model
from lowprec.recipe import Recipe

CONVOLUTIONAL = (
    *(
        "resnet18",
        "resnet50",
        "resnet101",
        "resnext50_32x4d",
        "wide_resnet50_2",
        "mobilenetv2_100",
        "mobilenetv3_large_100",
    ),
    *(
        "efficientnet_lite0",
        "regnetx_008",
        "regnety_008",
        "vgg16_bn",
        "densenet121",
        "inception_v3",
        "repvgg_a0",
        "dla34",
    ),
    *("hrnet_w18_small", "ghostnet_100", "mnasnet_100", "torchvision:googlenet", "torchvision:shufflenet_v2_x1_0"),
)
WITH_FLOAT = (
    *(
        "vit_tiny_patch16_224",
        "deit_small_patch16_224",
        "swin_tiny_patch4_window7_224",
        "convnext_tiny",
        "mixer_s16_224",
    ),
    *("efficientformerv2_s0", "mobilevit_s"),
)
SIDES = {"inception_v3": 299, "mobilevit_s": 256}
ARGUMENTS = {"torchvision:googlenet": {"aux_logits": False, "init_weights": False}}
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HEAD = (
    "| family | operators | integer | MACs | integer | codes compared | differ | same class |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|"
)
MARKERS = ("<!-- coverage: begin -->", "<!-- coverage: end -->")


def photograph_files(folder: Path) -> list[Path]:
    """The photographs in a folder, in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))


def photographs(count: int, side: int, folder: Path | None) -> Tensor:
    """``count`` crops [count, 3, side, side] of photographs, normalised; the same ones every time."""
    if folder is None:
        pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    else:
        pictures = [Image.open(path).convert("RGB") for path in photograph_files(folder)[:count]]
    draw = np.random.default_rng(0)
    crops = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        size = int(min(picture.size) * draw.uniform(0.5, 1.0))
        left, top = (int(draw.integers(0, length - size + 1)) for length in picture.size)
        crop = picture.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + size, top + size))
        crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
    return IMAGENET.normalize(torch.stack(crops))


def measure(family: str, options: argparse.Namespace) -> str:
    """One line of the table."""
    started = time.perf_counter()
    side = options.side or SIDES.get(family, 224)
    torch.manual_seed(0)
    name = family if ":" in family else f"timm:{family}"
    model = awkward(create_model(name, **ARGUMENTS.get(family, {})).eval(), 0, dead_channels=False)
    images = photographs(options.calibration + options.images, side, options.photographs)
    qmodel = lowprec.prepare(model, Recipe.load(options.recipe), images[:2])
    lowprec.calibrate(qmodel, images[: options.calibration].split(8))
    costs = lowprec.cost(qmodel, images[:1])
    imodel = lowprec.convert(qmodel)
    compared = mismatched = 0
    agreement = 1.0
    with tempfile.TemporaryDirectory() as folder:
        # OpenVINO is proven for models without float operators alone.
        runtimes = options.runtimes.split(",") if not imodel.inexact_steps else ["onnxruntime"]
        for runtime in runtimes:
            file = Path(folder) / f"{runtime}.onnx"
            lowprec.export_onnx(imodel, file, lowprec.ExportOptions(runtime=runtime))
            report = lowprec.verify(qmodel, imodel, images[options.calibration :].split(4), onnx=file)
            report.raise_if_different()
            compared += report.compared_codes
            mismatched += report.mismatched_codes
            agreement = min(agreement, report.agreement)
    floats = sum(isinstance(step.operator, FloatOperator) for step in imodel.steps)
    print(f"{family}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return (
        f"| {family} | {len(imodel.steps)} | {(len(imodel.steps) - floats) / len(imodel.steps):.1%} | {costs.macs / 1e6:,.0f} M "
        f"| {costs.integer_mac_share:.1%} | {compared:,} | {mismatched:,}{' (behind float)' if floats and mismatched else ''} "
        f"| {agreement:.1%} |"
    )


def with_lines(text: str, lines: dict[str, str]) -> str:
    """The file's text with these lines, by family, in its table: in their old places, new ones at the end."""
    before, _, rest = text.partition(MARKERS[0])
    table, _, after = rest.partition(MARKERS[1])
    rows = {row.split("|")[1].strip(): row for row in table.strip().splitlines()[len(HEAD.splitlines()) :]}
    return "\n".join([f"{before}{MARKERS[0]}", HEAD, *{**rows, **lines}.values(), f"{MARKERS[1]}{after}"])


def fault(options: argparse.Namespace) -> str:
    """What keeps the measurement from starting, "" for nothing."""
    known = (*CONVOLUTIONAL, *WITH_FLOAT)
    unknown = [family for family in options.families if family not in known and not is_model(family)]
    if unknown:
        return (
            f"unknown families: {', '.join(unknown)}; known are {', '.join(known)}, and timm's and torchvision's names"
        )
    for name in ("images", "calibration", "side"):
        value = getattr(options, name)
        if value is not None and value < 1:
            return f"--{name} {value}: give at least 1"
    runtimes = [runtime for runtime in options.runtimes.split(",") if runtime not in RUNTIME_NAMES]
    if runtimes:
        return f"--runtimes {options.runtimes}: choose from {','.join(RUNTIME_NAMES)}"
    folder = options.photographs
    if folder is not None and not (folder.is_dir() and photograph_files(folder)):
        return f"--photographs {folder}: no folder with .jpg, .jpeg or .png files"
    if options.write is not None:
        text = options.write.read_text() if options.write.is_file() else ""
        if not all(text.count(marker) == 1 for marker in MARKERS):
            return f"--write {options.write}: no file with the lines {' and '.join(MARKERS)}, each once"
    return ""


def is_model(family: str) -> bool:
    """Whether timm or torchvision has a model of this name."""
    source, _, name = family.rpartition(":")
    if source == "torchvision":
        return name in torchvision.models.list_models()
    return source in ("", "timm") and timm.is_model(name)


def main(arguments: list[str]) -> None:
    """Measures the families that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=[*CONVOLUTIONAL, *WITH_FLOAT])
    parser.add_argument("--recipe", default="w2a8_n4")
    parser.add_argument("--images", type=int, default=8, help="photographs that are compared")
    parser.add_argument("--calibration", type=int, default=16, help="photographs that are calibrated with")
    parser.add_argument("--side", type=int, default=None, help="pixels; the size each family was published with")
    parser.add_argument("--photographs", type=Path, default=None, help="folder of photographs")
    parser.add_argument("--runtimes", default=",".join(RUNTIME_NAMES))
    parser.add_argument("--write", type=Path, default=None, help="file whose table is replaced, between its markers")
    options = parser.parse_args(arguments)
    if problem := fault(options):
        parser.error(problem)
    lines = {}
    print(HEAD, flush=True)
    for index, family in enumerate(options.families, 1):
        print(f"{family}: {index} of {len(options.families)}", file=sys.stderr, flush=True)
        lines[family] = measure(family, options)
        print(lines[family], flush=True)
    if options.write is not None:
        with whole_file(options.write) as temporary:
            temporary.write_text(with_lines(options.write.read_text(), lines))


if __name__ == "__main__":
    main(sys.argv[1:])
