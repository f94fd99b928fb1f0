"""What `cembed --version` says below the version: the kernels of this machine, the engines that are installed."""

from __future__ import annotations

import warnings
from importlib import metadata

ENGINES = {
    "ONNX Runtime": ("onnxruntime", "onnxruntime-gpu"),
    "OpenVINO": ("openvino",),
    "TensorRT": ("tensorrt",),
}
"""Names, and the packages that bring each. Packages are asked for their versions, and not imported."""


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def engines() -> list[str]:
    """
    >>> engines()[0].startswith("ONNX Runtime ")
    True
    """
    found = [(engine, version_of(package)) for engine, names in ENGINES.items() for package in names]
    return [f"{engine} {version}" for engine, version in found if version]


def kernels() -> list[str]:
    """The sets of MaxSim kernels from the fastest, which is taken; numpy where the library is missing."""
    from cembed.runtime.scoring.kernels import kernel_sets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kernel_sets() or ["numpy"]


def details() -> list[str]:
    return [f"MaxSim: {', '.join(kernels())}", f"engines: {', '.join(engines()) or 'none'}"]
