"""`nova doctor`: what is installed, what will run, and how to get what is missing."""

import importlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from nova_kernels.build import build_info

from .. import __version__

GIB = 2**30
NOT_INSTALLED = "not installed"
DISTRIBUTION = "nova-kernels"

# Distribution -> (what needs it, the command that installs it).
PACKAGES = {
    "triton": ("Triton kernels, on GPUs", "pip install triton"),
    "transformers": ("text encoders", "pip install transformers"),
    "diffusers": ("SD and SDXL image VAEs", "pip install 'nova-kernels[diffusers]'"),
    "opencv-python-headless": (
        "motion scores, and measuring clips",
        "pip install 'nova-kernels[motion]'",
    ),
    "accelerate": ("training", "pip install 'nova-kernels[train]'"),
    "matplotlib": ("plots of training", "pip install 'nova-kernels[train]'"),
    "av": ("videos", "pip install av"),
    "pillow": ("images", "pip install pillow"),
}
# Other distributions of the same module.
ALTERNATIVES = {
    "opencv-python-headless": (
        "opencv-python",
        "opencv-contrib-python-headless",
        "opencv-contrib-python",
    ),
    "triton": ("pytorch-triton", "pytorch-triton-rocm", "triton-windows"),
}
INSTALL_TORCH = "see https://pytorch.org/get-started/locally, or: pip install torch"
INSTALL_TORCH_CUDA = "pip install --force-reinstall torch"
INSTALL_TORCH_CUDA_12 = f"{INSTALL_TORCH_CUDA} --index-url https://download.pytorch.org/whl/cu126"
INSTALL_NVCC = "install the CUDA toolkit: https://developer.nvidia.com/cuda-downloads"
# The oldest drivers that run builds with this CUDA, by its first number.
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVERS = {12: 525, 13: 580}
# Without pip's cache, which may hold a wheel without the extension.
REBUILD = "pip install --force-reinstall --no-deps --no-cache-dir"


def examine() -> dict[str, Any]:
    """All that `nova doctor` knows, as a dictionary that JSON can hold.

    Nothing here raises: what cannot be found out is None, or said so.
    """
    torch, torch_error = _import("torch")
    return {
        "nova": __version__,
        "checkout": _checkout(),
        "python": platform.python_version(),
        "torch": {
            "version": torch.__version__ if torch else None,
            "cuda_build": (torch.version.cuda or torch.version.hip) if torch else None,
            "error": torch_error,
        },
        "packages": {name: _version_of(name) for name in PACKAGES},
        "cuda_extension": build_info(),  # and of the C++ one
        "nvcc": _nvcc(),
        "h264": _has_h264(),
        "driver": _driver(),
        "gpus": _gpus(torch) if torch else [],
        "cpu": {
            "threads": torch.get_num_threads() if torch else os.cpu_count(),
            "free_memory_gib": _free_memory(),
        },
        "runs": _what_runs(torch) if torch else None,
    }


def missing(report: dict[str, Any]) -> dict[str, str]:
    """What is missing in a report of `examine` -> what it is for, and how to get it.

    Things that only a GPU needs are not missed where there is none.
    """
    wanted = {}
    if report["torch"]["version"] is None:
        wanted["torch"] = f"everything: {INSTALL_TORCH}"
    for name, (purpose, command) in PACKAGES.items():
        if report["packages"][name] is None and (report["gpus"] or name != "triton"):
            wanted[name] = f"{purpose}: {command}"
    if report["packages"]["av"] is not None and not report["h264"]:
        wanted["libx264"] = "H.264 videos: pip install --force-reinstall --only-binary av av"
    if report["gpus"]:
        if not report["cuda_extension"]["cuda_extension"]:
            if report["nvcc"] is None:
                wanted["nvcc"] = f"building the CUDA extension: {INSTALL_NVCC}"
            wanted["CUDA extension"] = f"CUDA kernels: {_rebuild(report, 'NOVA_CUDA')}"
    elif report["driver"] is not None and report["torch"]["version"] is not None:
        wanted["GPU in torch"] = f"sampling on it: {_torch_for_driver(report)}"
    if not report["cuda_extension"]["cpp_extension"]:
        wanted["C++ extension"] = f"C++ kernels, on CPUs: {_rebuild(report, 'NOVA_CPP')}"
    return wanted


def _rebuild(report: dict[str, Any], variable: str) -> str:
    """The command that builds an extension and installs it in place of what is there.

    Args:
        variable: of setup.py, which asks for this extension.
    """
    checkout = report["checkout"]
    if checkout is None:
        return f"in a checkout of {DISTRIBUTION}, {variable}=1 {REBUILD} ."
    editable = "--editable " if checkout["editable"] else ""
    return f"{variable}=1 {REBUILD} {editable}{shlex.quote(checkout['folder'])}"


def _torch_for_driver(report: dict[str, Any]) -> str:
    """Why torch does not use the GPU of a machine with this driver, and what to do."""
    driver, build = report["driver"], report["torch"]["cuda_build"]
    number = int(driver.split(".")[0])
    install = INSTALL_TORCH_CUDA if number >= OLDEST_DRIVERS[13] else INSTALL_TORCH_CUDA_12
    if build is None:
        return f"torch is a CPU build; {install}"
    oldest = OLDEST_DRIVERS.get(int(build.split(".")[0]), 0)
    if number >= oldest:
        return f"torch does not start with driver {driver}; look at CUDA_VISIBLE_DEVICES first"
    advice = f"driver {driver} is too old for torch with CUDA {build}, which needs {oldest}; update"
    return f"{advice} it, or: {install}" if number >= OLDEST_DRIVERS[12] else f"{advice} it"


def print_report(report: dict[str, Any]) -> None:
    """Print a report of `examine` as a table, and what is missing below it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(show_header=False, title="nova doctor", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(report):
        # Text, since versions and errors may hold what Rich takes for markup.
        table.add_row(name, Text(value))
    console.print(table)
    wanted = missing(report)
    if not wanted:
        console.print("nothing is missing")
    for name, advice in wanted.items():
        # Commands are copied from here: they must not be broken into lines.
        console.print(Text(f"missing: {name}, for {advice}"), soft_wrap=True)


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("nova-kernels", report["nova"]), ("Python", report["python"])]
    torch = report["torch"]
    if torch["version"] is None:
        rows.append(("torch", f"cannot be imported: {torch['error']}"))
    else:
        build = f"CUDA {torch['cuda_build']}" if torch["cuda_build"] else "CPU build"
        rows.append(("torch", f"{torch['version']} ({build})"))
    rows += [(name, version or NOT_INSTALLED) for name, version in report["packages"].items()]
    rows.append(("H.264 encoder", "libx264, in PyAV" if report["h264"] else "none"))
    rows.append(("nvcc", report["nvcc"] or "not found"))
    rows.append(("CUDA extension", _cuda_extension_text(report["cuda_extension"])))
    rows.append(("C++ extension", _cpp_extension_text(report["cuda_extension"])))
    for gpu in report["gpus"]:
        free = "?" if gpu["free_memory_gib"] is None else gpu["free_memory_gib"]
        rows.append(
            (
                gpu["device"],
                f"{gpu['name']}, compute capability {gpu['compute_capability']}, "
                f"{free} of {gpu['memory_gib']} GiB free",
            )
        )
    if not report["gpus"]:
        driver = "" if report["driver"] is None else f" to torch; the driver is {report['driver']}"
        rows.append(("GPU", f"none is visible{driver}"))
    free = report["cpu"]["free_memory_gib"]
    memory = "free memory unknown" if free is None else f"{free} GiB free"
    rows.append(("CPU", f"{report['cpu']['threads']} threads, {memory}"))
    if report["runs"] is not None:
        rows.append(("will run", _runs_text(**report["runs"])))
    return rows


def _runs_text(device: str, dtype: str, ops: dict[str, str], error: str | None = None) -> str:
    if error is not None:
        return f"{device}, {dtype}; nothing with these settings: {error}"
    own = "; ".join(f"{name} by {who}" for name, who in ops.items())
    return f"{device}, {dtype}, {own + '; all else' if own else 'all'} by plain torch"


def _cuda_extension_text(info: dict[str, Any]) -> str:
    if not info["cuda_extension"]:
        return str(info["error"])
    return f"CUDA {info['cuda_version']} for {', '.join(info['architectures'])}"


def _cpp_extension_text(info: dict[str, Any]) -> str:
    return ", ".join(info["cpp_instructions"]) if info["cpp_extension"] else str(info["cpp_error"])


def _import(name: str) -> tuple[Any, str | None]:
    """The module, or None with the reason."""
    try:
        return importlib.import_module(name), None
    except Exception as error:  # broken installations fail in many ways
        return None, f"{type(error).__name__}: {error}"


def _version_of(distribution: str) -> str | None:
    for name in (distribution, *ALTERNATIVES.get(distribution, ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _checkout() -> dict[str, Any] | None:
    """The folder that this package was installed from; None where that is unknown, or gone."""
    try:
        # https://packaging.python.org/en/latest/specifications/direct-url/
        text = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
        origin = json.loads(text or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):  # not installed, or damaged
        return None
    if "dir_info" not in origin:
        return None
    folder = url2pathname(urlsplit(origin["url"]).path)
    if not os.path.isdir(folder):
        return None
    return {"folder": folder, "editable": origin["dir_info"].get("editable", False)}


def _nvcc() -> str | None:
    """Path and release of the CUDA compiler; None where there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(home, "bin") for home in homes if home]
    search_path = os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])
    path = shutil.which("nvcc", path=search_path)
    if path is None:
        return None
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path}, which does not run: {error}"
    release = re.search(r"release ([\d.]+)", output.stdout)
    return f"{path}, CUDA {release[1] if release else 'of unknown release'}"


def _has_h264() -> bool:
    av, _ = _import("av")
    if av is None:
        return False
    try:
        av.codec.Codec("libx264", "w")
    except Exception:  # PyAV's own error type; any failure means that it cannot be used
        return False
    return True


def _driver() -> str | None:
    """Version of the NVIDIA driver, such as "570.86.15"; None where there is none, or no GPU."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    version = re.match(r"\d+\.[\d.]+", output.stdout)
    return version[0] if version else None


def _gpus(torch: Any) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        try:
            free = round(torch.cuda.mem_get_info(index)[0] / GIB, 1)
        except RuntimeError:  # a GPU that another process has for itself
            free = None
        gpus.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / GIB, 1),
                "free_memory_gib": free,
            }
        )
    return gpus


def _free_memory() -> float | None:
    """GiB that programs can still have; None where the system does not say (outside Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return round(kibibytes[0] * 1024 / GIB, 1) if kibibytes else None


def _what_runs(torch: Any) -> dict[str, Any]:
    """Device and dtype without options, and who computes what is not left to torch's defaults."""
    import nova_kernels
    from nova_kernels import onednn
    from nova_kernels.dispatch import requested

    from .device import choose_device, choose_dtype

    device = choose_device(None)
    dtype = choose_dtype(None, device)
    runs = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    try:
        packs = requested("auto") == "auto" and device.type == "cpu"
        entries = nova_kernels.report(device.type, check=False)
    except RuntimeError as error:  # NOVA_KERNELS_BACKEND, or a GPU that is in use
        return {**runs, "ops": {}, "error": str(error)}
    ops = {e.op: e.backend for e in entries if e.default and e.backend != "reference"}
    weight = torch.empty(0, dtype=dtype)
    if packs and onednn.can_pack(weight):
        ops["linear layers"] = "oneDNN"
    if packs and onednn.is_usable(weight):
        ops["3D convolutions"] = "oneDNN"
    return {**runs, "ops": ops}
