"""Tells whether the extensions are there, how they were built, and which GPUs are seen."""

import importlib
from typing import Any

from nova_kernels import __version__

_CUDA, _CPP = "nova_kernels._cuda", "nova_kernels._cpp"
_MISSING = {
    _CUDA: "not built: installed without nvcc, or with NOVA_CUDA=0, or its build failed",
    _CPP: "not built: installed without a C++ compiler, or with NOVA_CPP=0, or its build failed",
}


def _load(name: str) -> tuple[Any, str | None]:
    """An extension module, or None with the reason why it cannot be used."""
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        return None, _MISSING[name] if error.name == name else str(error)
    except ImportError as error:
        return None, f"built, but it cannot be loaded: {error}"


def build_info() -> dict[str, Any]:
    """Describes the installed build; the same keys with and without the extensions.

    Keys: `version` of the package; `cuda_extension`, whether the extension can be used; `error`,
    why not, else None; and, None or empty without the extension, `cuda_version` and
    `architectures` that it was compiled for, `cuda_compiler` and `host_compiler`. Of the C++
    extension `cpp_extension`, `cpp_error`, and `cpp_instructions` of its kernels that this CPU
    runs, best first.
    """
    info: dict[str, Any] = {
        "version": __version__,
        "cuda_extension": False,
        "error": None,
        "cuda_version": None,
        "architectures": [],
        "cuda_compiler": None,
        "host_compiler": None,
        "cpp_extension": False,
        "cpp_error": None,
        "cpp_instructions": [],
    }
    cuda, info["error"] = _load(_CUDA)
    if cuda is not None:
        info.update(cuda.build_info(), cuda_extension=True)
    cpp, info["cpp_error"] = _load(_CPP)
    if cpp is not None:
        names = [name for name, _ in cpp.kernels()]
        info.update(cpp_extension=True, cpp_instructions=names)
    return info


def devices() -> list[dict[str, Any]]:
    """The GPUs that the CUDA extension sees; an empty list without extension, driver or GPU.

    Keys of an entry: `name`, `compute_capability` (major, minor), `sm_count`,
    `shared_memory_per_block_optin` and `memory_bytes`.
    """
    cuda, _ = _load(_CUDA)
    return [] if cuda is None else cuda.devices()
