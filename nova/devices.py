"""Devices and dtypes: can the one asked for be used; how much memory is, and when it is short."""

import contextlib
import gc
import re
from collections.abc import Iterator

import torch

from nova_kernels.out_of_memory import is_out_of_gpu_memory

from .checkpoint import WEIGHT_DTYPES
from .errors import DeviceError, InputError

# What a RuntimeError says when memory is short, on a CPU and on Apple's GPUs.
OUT_OF_MEMORY_MESSAGES = ("DefaultCPUAllocator", "MPS backend out of memory")


def check_device(device: str | torch.device | int) -> torch.device:
    """The device, if torch can use it.

    Raises:
        DeviceError: not a device's name, or absent.
    """
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"{device!r} is no device; use cpu, cuda, cuda:1 or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"{device} is not supported; use cpu, cuda, cuda:1 or mps")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = torch.version.cuda or torch.version.hip
            reason = "no GPU is visible" if built else "this torch is built without CUDA"
            raise DeviceError(
                f"CUDA was asked for, but {reason}; use --device cpu, see nova doctor"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise DeviceError(f"there is no {device}: {count} GPUs are visible, from cuda:0 on")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("MPS was asked for, but it is not available; use --device cpu")
    return device


def check_dtype(dtype: torch.dtype | None, name: str) -> None:
    """Raises InputError unless it is one that models compute in, or None.

    Args:
        name: of the argument.
    """
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise InputError(
            f"{name} must be a floating point torch.dtype, such as torch.bfloat16, got {dtype!r}"
        )


@contextlib.contextmanager
def torch_defaults(dtype: torch.dtype, device: str | torch.device) -> Iterator[None]:
    """What is made inside has this dtype and device, unless it says others."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_out_of_memory(error: Exception) -> bool:
    """Whether it was raised because a GPU's or the CPU's memory is short."""
    return (
        isinstance(error, MemoryError)
        or is_out_of_gpu_memory(error)
        or any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES)
    )


@contextlib.contextmanager
def out_of_memory(doing: str, *remedies: str, for_pipelines: bool = True) -> Iterator[None]:
    """Turn out-of-memory errors inside into a `DeviceError` that says what to do.

    Args:
        doing: such as "sampling".
        remedies: what helps there.
        for_pipelines: name what helps all of a pipeline's work, too.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        on_gpu = is_out_of_gpu_memory(error)
        if for_pipelines:
            remedies += ("torch_dtype=torch.bfloat16",)
            remedies += ("enable_model_cpu_offload()",) if on_gpu else ()
        where, free = (
            ("out of GPU memory", _free_on_gpu(error)) if on_gpu else ("out of memory", "")
        )
        *others, last = remedies
        what_helps = f"{', '.join(others)} or {last}" if others else last
        raise DeviceError(f"{where} while {doing}{free}. Use {what_helps}") from error


def _free_on_gpu(error: Exception) -> str:
    """How much memory is free on the GPU that has run out of it."""
    if not torch.cuda.is_available():
        return ""
    named = re.search(r"\bGPU (\d+)\b", str(error))  # as torch names it
    free, total = torch.cuda.mem_get_info(int(named[1]) if named else None)
    return f" ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free)"


def free_memory(device: torch.device) -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()  # a failed attempt may have left cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def idle_graph_bytes(device: torch.device) -> int:
    """Bytes that CUDA graphs keep on a GPU for what they write when replayed.

    torch counts none of them as allocated, but for tensors that are still referred to. 0 where they
    cannot be told: of torch's allocators only its own lists what it holds.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        segments = torch.cuda.memory_snapshot()
    except RuntimeError:  # cudaMallocAsync and those of other packages refuse
        return 0
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in segments
        if segment["device"] == index and tuple(segment["segment_pool_id"]) != (0, 0)
    )


class PeakMemory:
    """The most memory that tensors and CUDA graphs take on a GPU, from here on.

    At most so much, where graphs are recorded or dropped meanwhile: the most of both is added up.
    It starts torch's own count anew (`torch.cuda.reset_peak_memory_stats`).
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._is_counted = device.type == "cuda"
        if self._is_counted:
            self._idle_bytes = idle_graph_bytes(device)
            try:
                torch.cuda.reset_peak_memory_stats(device)
            except RuntimeError:  # of another package's allocator, which counts nothing
                self._is_counted = False

    def read(self) -> int | None:
        """Bytes so far; None where torch does not count them, as on other devices."""
        if not self._is_counted:
            return None
        self._idle_bytes = max(self._idle_bytes, idle_graph_bytes(self._device))
        return torch.cuda.max_memory_allocated(self._device) + self._idle_bytes
