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
        shared_memory: bytes a block.
        occupancy: share of the warps of a multiprocessor that can be resident.
    """

    kernel: str
    architecture: int
    registers: int
    spills: int
    shared_memory: int
    occupancy: float


def compile_for(launch: Launch, architecture: int) -> Resources:
    """Compile a launch for compute capability `architecture` / 10.

    Raises:
        Exception: of Triton or ptxas, where the kernel does not compile.
    """
    compiled = triton.compile(
        _source(launch),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages, **OPTIONS},
    )
    usage = _resource_usage(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    return Resources(
        kernel=launch.kernel.__name__,
        architecture=architecture,
        registers=usage["REG"],
        spills=usage["STACK"],
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


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        listing = subprocess.run(
            [tool, "-res-usage", file], capture_output=True, text=True, check=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", listing)}


def _occupancy(architecture: int, registers: int, num_warps: int, shared: int) -> float:
    all_registers, max_warps, _, all_shared = LIMITS[architecture]
    # Registers are given out in portions of 256 a warp; a block reserves 1 KiB of shared memory.
    by_registers = all_registers // (-(-registers * 32 // 256) * 256 * num_warps)
    blocks = min(by_registers, max_warps // num_warps, all_shared // (shared + 1024))
    return blocks * num_warps / max_warps
