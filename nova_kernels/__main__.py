"""`python -m nova_kernels` prints how the kernels were built, the GPUs, and what runs on them."""

import argparse
import importlib.util
import sys

from nova_kernels.build import build_info, devices
from nova_kernels.errors import BackendError


def main() -> int:
    """Exit code 1 if an op is wrong on this machine, or if NOVA_KERNELS_BACKEND is."""
    parser = argparse.ArgumentParser(prog="python -m nova_kernels", description=__doc__)
    parser.add_argument("--build", action="store_true", help="only how the kernels were built")
    only_build = parser.parse_args().build
    print_build()
    if only_build:
        return 0
    if importlib.util.find_spec("torch") is None:
        print("ops: torch is not installed")
        return 0
    try:
        return print_ops()
    except BackendError as error:
        print(error)
        return 1


def print_build() -> None:
    info = build_info()
    print(f"nova-kernels {info['version']}")
    if info["cpp_extension"]:
        print(f"C++ extension: {', '.join(info['cpp_instructions'])}")
    else:
        print(f"C++ extension: {info['cpp_error']}")
    if not info["cuda_extension"]:
        print(f"CUDA extension: {info['error']}")
        return
    print(
        f"CUDA extension: CUDA {info['cuda_version']} for {', '.join(info['architectures'])}"
        f" ({info['cuda_compiler']}, {info['host_compiler']})"
    )
    for index, device in enumerate(devices()):
        major, minor = device["compute_capability"]
        print(
            f"GPU {index}: {device['name']}, compute capability {major}.{minor},"
            f" {device['sm_count']} SMs, {device['memory_bytes'] / 2**30:.0f} GiB,"
            f" {device['shared_memory_per_block_optin'] // 1024} KiB shared memory a block"
        )


def print_ops() -> int:
    from nova_kernels.reporting import each_report

    wrong = 0
    print("ops (forward and backward on small inputs, against the reference in float64):")
    for entry in each_report():
        if entry.obstacle is not None:
            state = f"not here: {entry.obstacle}"
        elif not entry.is_right:
            state, wrong = f"WRONG: {entry.failure}", wrong + 1
        else:
            errors = ", ".join(f"{name} {error:.0e}" for name, error in entry.errors.items())
            state = f"right ({errors})"
            if not entry.verified:
                state += "; not verified on such hardware: runs only if asked for by name"
        default = "*" if entry.default else " "
        print(f"  {default} {entry.op:24} {entry.backend:10} {state}", flush=True)
    print(
        "* runs by default, where tensors are large enough; an op's `backend`, or"
        " NOVA_KERNELS_BACKEND, chooses another"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
