"""Tells whether the CUDA extension is there, how it was built, and which GPUs it sees."""

import importlib
from typing import Any

from nova_kernels import __version__

_EXTENSION = "nova_kernels._cuda"


def _load_extension() -> tuple[Any, str | None]:
    """The extension module, or None with the reason why it cannot be used."""
    try:
        return importlib.import_module(_EXTENSION), None
    except ModuleNotFoundError as error:
        if error.name != _EXTENSION:
            return None, str(error)
        return None, "not built: installed without nvcc, or with NOVA_CUDA=0, or its build failed"
    except ImportError as error:
        return None, f"built, but it cannot be loaded: {error}"


def build_info() -> dict[str, Any]:
    """Describes the installed build; the same keys with and without the CUDA extension.

    Keys: `version` of the package; `cuda_extension`, whether the extension can be used; `error`,
    why not, else None; and, None or empty without the extension, `cuda_version` and
    `architectures` that it was compiled for, `cuda_compiler` and `host_compiler`.
    """
    info: dict[str, Any] = {
        "version": __version__,
        "cuda_extension": False,
        "error": None,
        "cuda_version": None,
        "architectures": [],
        "cuda_compiler": None,
        "host_compiler": None,
    }
    extension, info["error"] = _load_extension()
    if extension is not None:
        info.update(extension.build_info(), cuda_extension=True)
    return info


def devices() -> list[dict[str, Any]]:
    """The GPUs that the CUDA extension sees; an empty list without extension, driver or GPU.

    Keys of an entry: `name`, `compute_capability` (major, minor), `sm_count`,
    `shared_memory_per_block_optin` and `memory_bytes`.
    """
    extension, _ = _load_extension()
    return [] if extension is None else extension.devices()
