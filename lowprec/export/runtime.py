"""ONNX Runtime on the CPU, as verification and evaluation use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor


def onnx_session(model: str | Path | bytes) -> onnxruntime.InferenceSession:
    """A session for a path or a serialized model, with ONNX Runtime's default optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns of unused initializers
    model = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnx_predictor(path: str | Path) -> Callable[[Tensor], Tensor]:
    """Float images [B, C, H, W] to logits [B, classes], by an exported file."""
    session = onnx_session(path)

    def predict(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return predict
