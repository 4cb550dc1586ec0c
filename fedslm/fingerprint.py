"""What a test's result depends on: this code, byte for byte, and this machine."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from fedslm.errors import RunError
from fedslm.extras import EXTRAS, is_installed, missing

_LIBRARIES = (
    "cryptography",
    "dp-accounting",
    "numpy",
    "opacus",
    "peft",
    "scipy",
    "torch",
    "transformers",
)
_READ = ("fedslm", "opacus", "dp_accounting")  # packages whose source implements the guarantees
_PROCESSOR = ("model name", "flags", "CPU implementer", "CPU part", "Features")
_KERNELS = (  # variables that choose among the kernels of a processor or a GPU
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NPY_DISABLE_CPU_FEATURES",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
)


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """Hash of the source that implements the guarantees, library versions, and the architecture.

    A library of the same version that was modified by hand is noticed only if it is Opacus or
    dp-accounting.

    Raises:
        MissingPackage: A library that training needs is not installed.
    """
    for library in _LIBRARIES:
        if library in EXTRAS and not is_installed(library):
            raise missing(library, "the comparison of this code")
    digest = hashlib.sha256()
    for package in _READ:
        directory = _directory(package)
        for path in sorted(directory.rglob("*.py")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{package}/{path.relative_to(directory).as_posix()} {content}\0".encode())
    for library in _LIBRARIES:
        digest.update(f"{library}=={version(library)}\0".encode())
    digest.update(f"{platform.python_version()} {platform.machine()} {platform.system()}".encode())
    digest.update(f" -{'O' * sys.flags.optimize}".encode())  # which disables assertions
    return digest.hexdigest()


def machine_fingerprint() -> str:
    """Hash of this machine's name, its processor, and the variables that choose kernels.

    The name is part of it because a home directory may be shared by several machines.
    """
    chosen = [f"{name}={os.environ[name]}" for name in _KERNELS if name in os.environ]
    parts = (platform.node(), platform.machine(), _processor(), *chosen)
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()


@lru_cache(maxsize=1)
def _processor() -> str:
    """The first processor's model and instruction sets, as the system names them."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:  # not Linux
        return platform.processor()
    return "\n".join(line for line in first.splitlines() if line.split("\t")[0] in _PROCESSOR)


def _directory(package: str) -> Path:
    """Directory of a package's source; the package is not imported."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise RunError(f"package={package} is not installed: install fedslm again")
    return Path(found.origin).parent
