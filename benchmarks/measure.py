"""What every benchmark does alike: time, peak memory, the machine it ran on, results files."""

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from replace_text import replace_text

from nova.devices import PeakMemory, idle_graph_bytes
from nova.errors import InputError
from nova.libraries.packages import installed_packages
from nova_kernels import build_info

ROOT = Path(__file__).resolve().parent.parent


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result of `call`, and its wall seconds, with all GPU work finished."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_lost(device: torch.device) -> bool:
    """Whether a GPU refuses all work of this process, as after an access outside of memory."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def held_bytes(device: torch.device) -> int:
    """Bytes that tensors and CUDA graphs take on the GPU now; 0 on a CPU, where none count."""
    if device.type != "cuda":
        return 0
    return torch.cuda.memory_allocated(device) + idle_graph_bytes(device)


class PeakBytes:
    """The most memory taken from here on: by tensors and graphs on a GPU, else by this process.

    Of the process it is the peak so far, where Linux does not let it begin anew.
    """

    def __init__(self, device: torch.device):
        self._of_gpu = PeakMemory(device)
        if device.type != "cuda":
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # see proc(5): resets VmHWM

    def read(self) -> int:
        """Bytes so far."""
        of_gpu = self._of_gpu.read()
        return _process_peak_bytes() if of_gpu is None else of_gpu


def _process_peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine(device: torch.device) -> dict[str, Any]:
    """Card or processor, versions and commit, for a results file."""
    facts: dict[str, Any] = {
        "device": str(device),
        "name": processor_name(),
        "threads": torch.get_num_threads(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }
    if device.type == "cuda":
        facts["name"] = torch.cuda.get_device_name(device)
        facts["cuda"], facts["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        facts["packages"] = installed_packages()
        build = build_info()
        facts["cuda_extension"] = build["architectures"] if build["cuda_extension"] else None
    return facts


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, "+" behind it if files of it differ; "unknown" outside of git.

    Of a copy without git the variable NOVA_COMMIT tells it.
    """
    if os.environ.get("NOVA_COMMIT"):
        return os.environ["NOVA_COMMIT"]
    try:
        run = [
            subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            )
            for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run[0].stdout.strip() + ("+" if run[1].stdout.strip() else "")


def check_file(path: Path) -> None:
    """Check before long work that a file of any kind can be written; missing folders are created.

    Raises:
        InputError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("a"):  # what is in it stays
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error


def results_file(text: str) -> Path:
    """A path for `--json` of argparse: one that can be written, see `check_file`."""
    try:
        check_file(Path(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def write_rows(path: Path, script: str, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write a results file: the machine, the command that this process was called by, the rows.

    Raises:
        OSError: it cannot be written; an earlier one stays.
    """
    command = shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "command": command, "rows": rows}
    replace_text(path, json.dumps(content, indent=1) + "\n")


def keep_rows(path: Path, script: str, facts: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """`write_rows` while work goes on, which a full disk must not end; whether it succeeded."""
    try:
        write_rows(path, script, facts, rows)
    except OSError as error:
        print(f"{path} could not be written: {error}", file=sys.stderr, flush=True)
        return False
    return True


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||, in float64, where `a` is."""
    a, b = a.detach().double(), b.detach().to(a.device, torch.float64)
    return float((a - b).norm() / b.norm())
