"""The libraries that report to their makers unless they are told not to: imported here, told so, and nowhere else.

What the environment says already counts: with `ORT_DISABLE_TELEMETRY=0` ONNX Runtime does as it would by itself.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read while ONNX Runtime loads: it makes files in ~/.cache
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read while huggingface_hub loads, which only `export` does

import onnxruntime as ort

__all__ = ["import_openvino", "ort"]

_REPORTER = "openvino_telemetry"


def import_openvino() -> Any:
    """The module `openvino`. Its import alone would count in ~/intel and tell a server, unless its reporter is missing.

    A program that has imported the reporter itself keeps it. Raises ImportError.
    """
    hidden = _REPORTER not in sys.modules
    if hidden:
        sys.modules[_REPORTER] = types.ModuleType(_REPORTER)  # without its parts, OpenVINO takes a stub of its own
    try:
        return importlib.import_module("openvino")
    finally:
        if hidden:
            del sys.modules[_REPORTER]
