"""Compiles planned launches for GPUs that need not be there, and reads what they use.

Needs Triton outside its interpreter (no TRITON_INTERPRET) and no GPU.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nova_kernels.errors import BackendError
from nova_kernels.triton_kernels.launch import OPTIONS, Launch

# Limits a multiprocessor, from the CUDA programming guide's table of compute capabilities:
# (registers, warps, shared memory that a block may ask for, shared memory in all), bytes.
LIMITS = {80: (65_536, 64, 166_912, 167_936), 90: (65_536, 64, 232_448, 233_472)}

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses on one architecture.

    Attributes:
        kernel, architecture: name, and compute capability times ten.
        registers: a thread.
        spills: bytes a thread that do not fit registers (its stack frame).
        costly_spills: instructions for them inside of loops; in a kernel without loops, all.
        shared_memory: bytes a block.
        occupancy: share of the warps of a multiprocessor that can be resident.
    """

    kernel: str
    architecture: int
    registers: int
    spills: int
    costly_spills: int
    shared_memory: int
    occupancy: float


def compile_for(launch: Launch, architecture: int) -> Resources:
    """Compile a launch for compute capability `architecture` / 10.

    Raises:
        BackendError: Triton is older than 3.3, whose compiler is called in another way.
        Exception: of Triton or ptxas, where the kernel does not compile.
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        raise BackendError(
            f"compiling ahead of time needs Triton 3.3 or newer, this is {triton.__version__}"
        )
    compiled = triton.compile(
        _source(launch),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages, **OPTIONS},
    )
    cubin = compiled.asm["cubin"]
    usage = _resource_usage(listing(cubin, "cuobjdump", "-res-usage"))
    shared = compiled.metadata.shared
    return Resources(
        kernel=launch.kernel.__name__,
        architecture=architecture,
        registers=usage["REG"],
        spills=usage["STACK"],
        costly_spills=costly_spills(listing(cubin, "nvdisasm", "-c")) if usage["STACK"] else 0,
        shared_memory=shared,
        occupancy=_occupancy(architecture, usage["REG"], launch.num_warps, shared),
    )


def _source(launch: Launch) -> ASTSource:
    signature, constants, attributes = {}, dict(launch.constants), {}
    for position, name in enumerate(launch.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if value is None or value is True or value is False or _is_one(value):
            # Triton compiles these into the kernel when it is launched.
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type_of(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _is_one(value: object) -> bool:
    return isinstance(value, int) and value == 1


def _type_of(value: object) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def listing(cubin: bytes, tool: str, option: str) -> str:
    """What cuobjdump or nvdisasm, as they come with Triton, says of compiled code."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run(
            [path, option, file], capture_output=True, text=True, check=True
        ).stdout


def _resource_usage(listing: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", listing)}


def costly_spills(listing: str) -> int:
    """Reads and writes of the stack inside of loops; in a kernel without loops, all of them.

    For more blocks a multiprocessor ptxas keeps to fewer registers than a thread may have, and
    puts on the stack what only the lines before and after a loop need: that costs nothing.

    Args:
        listing: of `nvdisasm -c`.
    """
    labels, jumps, spills = {}, [], []
    for number, line in enumerate(listing.splitlines()):
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = number
        elif jump := re.search(r"\bBRA\b.*?(\.L_\w+)", line):
            jumps.append((number, jump[1]))
        elif re.search(r"\b(LDL|STL)\b", line):
            spills.append(number)
    # Every kernel ends with a jump to itself.
    loops = [(labels[name], end) for end, name in jumps if labels[name] < end - 1]
    return sum(not loops or any(begin < at < end for begin, end in loops) for at in spills)


def _occupancy(architecture: int, registers: int, num_warps: int, shared: int) -> float:
    all_registers, max_warps, _, all_shared = LIMITS[architecture]
    # Registers are given out in portions of 256 a warp; a block reserves 1 KiB of shared memory.
    by_registers = all_registers // (-(-registers * 32 // 256) * 256 * num_warps)
    blocks = min(by_registers, max_warps // num_warps, all_shared // (shared + 1024))
    return blocks * num_warps / max_warps
