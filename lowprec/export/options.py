"""How an ONNX file is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from lowprec.data.normalization import Normalization

RUNTIMES = ("onnxruntime", "openvino")
# Whether 8-bit weights avoid saturating int16 pair sums, or are for processors that sum in int32.
PROCESSORS = ("any", "vnni")
INPUTS = ("float", "uint8", "uint8_nhwc")
# Older operator sets lack dequantization by channel; newer ones than 25 are not known to the runtimes measured.
OPSETS = range(13, 26)
DEFAULT_OPSET = 18


@dataclass(frozen=True)
class ExportOptions:
    """How an ONNX file is written.

    runtime: ``onnxruntime`` or ``openvino``, whose exact form is written (the second is exact in ONNX Runtime too).
    processor: ``any``, or ``vnni`` for those that sum products of codes in 32 bits (AVX-VNNI, AVX-512 VNNI, AMX, ARM), where
    8-bit layers are faster; a processor without would saturate, and compute something else. opset: 13 to 25; None is 18,
    and 25 for packed weights, which need it. batch_size: None for any. input: ``float`` (normalised images [B, C, H, W]),
    ``uint8`` (pixels of the same shape) or ``uint8_nhwc`` ([B, H, W, C], as cameras give them), for which ``normalization``
    says what the model was trained with. class_names: one for each logit; preprocessing: how a picture becomes an image of the
    model's size, see :attr:`lowprec.data.DataModule.preprocessing`. Both are kept in the file's metadata.
    """

    runtime: str = "onnxruntime"
    processor: str = "any"
    opset: int | None = None
    batch_size: int | None = None
    input: str = "float"
    normalization: Normalization | None = None
    class_names: Sequence[str] | None = None
    preprocessing: Mapping[str, Any] | None = None

    def validate(self) -> None:
        """Raises ValueError or TypeError for an option that cannot be; the message names it and the choices."""
        for name, value, choices in (
            ("runtime", self.runtime, RUNTIMES),
            ("processor", self.processor, PROCESSORS),
            ("input", self.input, INPUTS),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")
        for name, number in (("opset", self.opset), ("batch_size", self.batch_size)):
            if number is not None and type(number) is not int:
                raise TypeError(f"{name}={number!r}: give a whole number, not {type(number).__name__}")
        if self.opset is not None and self.opset not in OPSETS:
            raise ValueError(f"opset={self.opset}: give one of {OPSETS.start} to {OPSETS.stop - 1}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: give at least 1, or None (null) for any")
        if self.normalization is not None:
            _check_normalization(self.normalization)
        elif self.input != "float":
            raise ValueError(f"input={self.input}: give the normalization (mean, std) of the training images")
        names = self.class_names
        if names is not None and (
            isinstance(names, str)
            or not isinstance(names, Sequence)
            or not all(isinstance(name, str) for name in names)
        ):
            raise TypeError(f"class_names={names!r}: give a list of strings, one for each class")


def checked_options(options: ExportOptions | None, logits: tuple[int, ...]) -> ExportOptions:
    """The options, or the defaults for None, if they can be.

    logits: their shape, [B, classes].

    Raises:
        TypeError, ValueError: an option that cannot be, or no :class:`ExportOptions`; the message names it.
    """
    options = ExportOptions() if options is None else options
    if not isinstance(options, ExportOptions):
        raise TypeError(f"options must be lowprec.ExportOptions(...), not {type(options).__name__}")
    options.validate()
    classes = prod(logits[1:2])
    if options.class_names is not None and len(options.class_names) != classes:
        raise ValueError(f"class_names holds {len(options.class_names)} names; the model has {classes} classes")
    return options


def _check_normalization(normalization: object) -> None:
    if not isinstance(normalization, Normalization):
        raise TypeError(f"normalization must be lowprec.Normalization(mean, std), not {type(normalization).__name__}")
    for name, values in (("mean", normalization.mean), ("std", normalization.std)):
        plain = isinstance(values, tuple | list) and all(
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
        )
        if not plain or not values:
            raise TypeError(f"normalization.{name}={values!r}: give a tuple of finite numbers, one for each channel")
    if min(normalization.std) <= 0:
        raise ValueError(f"normalization.std={normalization.std!r}: give numbers above 0")
    if type(normalization.peak) is not int or normalization.peak < 1:
        raise ValueError(f"normalization.peak={normalization.peak!r}: give the pixel that stands for 1.0, such as 255")
