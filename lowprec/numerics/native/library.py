"""The package's C kernels as a shared library: built once for a machine, kept in the user's cache, loaded with ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger("lowprec.kernels")

SOURCES = tuple(Path(__file__).with_name(name) for name in ("activations.c", "norms.c", "weights.c"))
HEADERS = (Path(__file__).with_name("vectors.h"),)
# No fused multiply-adds but those that are written out: they round once where PyTorch's operators round twice.
FLAGS = ("-O3", "-mavx2", "-mfma", "-ffp-contract=off", "-fPIC", "-fopenmp")
# What registers hold more with, for the capabilities that PyTorch finds.
WIDER = {"AVX2": (), "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")}
SECONDS = 120

_P, _N, _F, _I = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_float, ctypes.c_int
# One for float32, one for bfloat16.
OF_ACTIVATIONS = {
    "quantize": (_P, _P, _P, _P, _N, _F, _F, _F, _F, _F),
    "gradient": (_P, _P, _P, _N),
    "codes": (_P, _P, _N, _F, _F, ctypes.c_int8),
    "values": (_P, _P, _N, _F, _F, ctypes.c_int8),
    "look_up": (_P, _P, _P, _N, _F, _F, _P),
    "times_slopes": (_P, _P, _P, _N, _P),
    "statistics": (_P, _P, _P, _P, _P, _N, _N, _I, _F, ctypes.c_double, _P, _P, _P, _P, _P),
    "quantize_normalized": (_P, _P, _P, _P, _P, _P, _N, _N, _F, _F, _F, _F, _F),
    "norm_gradient": (_P, _P, _P, _P, _P, _P, _N, _N, _I, _P, _P, _P, _P, _P),
}


class Sizes(ctypes.Structure):
    """Of a weight [O, I, P] and its clusters."""

    _fields_ = tuple((name, _N) for name in ("outputs", "channels", "positions", "members", "shared"))


class Strides(ctypes.Structure):
    """Of a tensor [O, I, P] or [O, G, P], in elements."""

    _fields_ = tuple((name, _N) for name in ("output", "channel", "position"))


ARGUMENTS = {
    **{f"{kind}_{dtype}": of for kind, of in OF_ACTIVATIONS.items() for dtype in ("float", "bfloat16")},
    "descend": (_P, _P, _P, Sizes, Strides, Strides),
    "quantize_clusters": (_P, _P, _P, _P, _P, Sizes, Strides, Strides, Strides, _I, _I, _I),
    "quantize_eight_bit": (_P, _P, _P, _N, _N, _I),
    "integers_of_weights": (_P, _P, _P, _N, _N, _I),
    "weights_of_integers": (_P, _P, _P, _N, _N, _I),
}
RETURNING = ("look_up_float", "look_up_bfloat16")


class BuildError(RuntimeError):
    """There is no library of kernels; the message says why."""


@cache
def is_built() -> bool:
    """Whether there is a library; it is built where there is none yet. Says why not, once, as information."""
    try:
        library()
    except (BuildError, OSError) as error:
        log.info("weights and activations are quantized by PyTorch's operators, several times slower: %s", error)
        return False
    return True


@cache
def library() -> ctypes.CDLL:
    """The library.

    Raises:
        BuildError: the CPU lacks AVX2, there is no C compiler, or it fails.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() not in ("x86_64", "AMD64") or capability not in WIDER:
        raise BuildError("the CPU has no AVX2")
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or ""]
    if not compiler[0]:
        raise BuildError("there is no C compiler (Debian: gcc, libc6-dev)")
    flags = (*FLAGS, *WIDER[capability])
    openmp = _openmp()
    content = "\n".join([*(source.read_text() for source in (*SOURCES, *HEADERS)), *compiler, *flags, openmp])
    file = _cache() / f"kernels-{hashlib.sha256(content.encode()).hexdigest()[:16]}.so"
    if not file.exists():
        _build([*compiler, *flags], openmp, file)
    loaded = ctypes.CDLL(str(file))
    for name, arguments in ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, _I if name in RETURNING else None
    return loaded


def _build(compiler: list[str], openmp: str, file: Path) -> None:
    """Writes the library under a temporary name, then renames it: several processes may build it at a time."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        compiled = [str(Path(folder, source.stem + ".o")) for source in SOURCES]
        linked = Path(folder, "kernels.so")
        # Linked with PyTorch's own OpenMP, whose threads are used.
        for command in (
            *([*compiler, "-c", str(source), "-o", to] for source, to in zip(SOURCES, compiled, strict=True)),
            [*compiler, "-shared", *compiled, openmp, "-lm", "-o", str(linked)],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BuildError(f"{shlex.join(command)}: {error}") from error
            if done.returncode != 0:
                raise BuildError(f"{shlex.join(command)}: {(done.stderr.strip().splitlines() or [''])[0]}")
        os.replace(linked, file)


def _openmp() -> str:
    """The OpenMP library that PyTorch has loaded: a second one would have threads of its own, waiting in the way."""
    lines = Path("/proc/self/maps").read_text().splitlines() if Path("/proc/self/maps").exists() else []
    loaded = sorted({line.split(maxsplit=5)[5] for line in lines if "libgomp" in line})
    # Other packages bring their own.
    own = [path for path in loaded if Path(path).is_relative_to(Path(torch.__file__).parent)]
    found = own or loaded
    if len(found) != 1:
        raise BuildError(f"PyTorch's OpenMP library is not found: {', '.join(found) or 'there is no libgomp'}")
    return found[0]


def _cache() -> Path:
    """$XDG_CACHE_HOME/lowprec, or where that cannot be written, a folder for temporary files."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowprec"
    try:
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lowprec-"))
