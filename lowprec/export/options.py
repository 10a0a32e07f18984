"""How an ONNX file is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    8-bit layers are faster; a processor without would saturate, and compute something else. opset:
    13 to 25. batch_size: None for any. input: ``float`` (normalised images [B, C, H, W]), ``uint8`` (pixels of the same
    shape) or ``uint8_nhwc`` ([B, H, W, C], as cameras give them), for which ``normalization`` says what the model was
    trained with. class_names: kept in the file's metadata.
    """

    runtime: str = "onnxruntime"
    processor: str = "any"
    opset: int = DEFAULT_OPSET
    batch_size: int | None = None
    input: str = "float"
    normalization: Normalization | None = None
    class_names: Sequence[str] | None = None

    def validate(self) -> None:
        """Raises ValueError for an option that cannot be; the message names it and the choices."""
        for name, value, choices in (
            ("runtime", self.runtime, RUNTIMES),
            ("processor", self.processor, PROCESSORS),
            ("input", self.input, INPUTS),
        ):
            if value not in choices:
                raise ValueError(f"export.{name}={value!r}: choose one of {', '.join(choices)}")
        if self.opset not in OPSETS:
            raise ValueError(f"export.opset={self.opset}: give one of {OPSETS.start} to {OPSETS.stop - 1}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"export.batch_size={self.batch_size}: give at least 1, or null for any")
        if self.input != "float" and self.normalization is None:
            raise ValueError(f"export.input={self.input}: give the normalization (mean, std) of the training images")
