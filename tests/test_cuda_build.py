"""The CUDA extension as users get it, and what its kernels take on A100 and H100. Needs no GPU."""

import os
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
from builds import ROOT, build_info_of, build_wheel, make_checkout
from kernel_testing import needs_triton

import nova_kernels
from nova_kernels.cuda_kernels import extension

ARCHITECTURES = {"80", "90"}
REGISTERS = 65536  # of a multiprocessor, and the most of a block
GRANULE = 8  # registers are given to threads in multiples

# What cuobjdump says of kernels, by the architecture named above them. What registers do not hold
# is in the stack; shared memory is what a kernel declares.
RESOURCES = re.compile(
    r"arch = sm_(?P<architecture>\d+)|"
    r"Function (?P<kernel>\w+):\s+REG:(?P<registers>\d+) "
    r"STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)"
)
# The most threads of a block, as the kernel's launch bounds set them.
THREADS = re.compile(
    r"arch = sm_(?P<architecture>\d+)|"
    r"^\.nv\.info\.(?P<kernel>_Z\w+)$.*?EIATTR_MAX_THREADS.*?Value:\s+(?P<threads>0x\w+)",
    re.DOTALL | re.MULTILINE,
)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_extension_is_in_the_wheel_and_loads_without_a_driver(tmp_path):
    """In an environment that pip makes for it, where a package index can be reached."""
    checkout = make_checkout(tmp_path)
    # Of one architecture and little optimised: nvcc takes long, and the tests' own environment has
    # the others, and kernels as users run them.
    variables = {"NOVA_CUDA": "1", "NOVA_CUDA_ARCHS": "90-real"}
    variables["NVCC_APPEND_FLAGS"] = "-Xcicc -O1 -Xptxas -O1"
    process, wheel = build_wheel(checkout, tmp_path, isolated=True, **variables)
    if process.returncode != 0 and "No matching distribution found" in process.stdout:
        if shutil.which("cmake") is None:
            pytest.skip("needs cmake, or an index that has it")
        process, wheel = build_wheel(checkout, tmp_path, **variables)
    assert process.returncode == 0, process.stdout
    assert process.stdout.count("built the CUDA extension") == 1
    printed = build_info_of(wheel, tmp_path / "new")
    assert "'cuda_extension': True, 'error': None" in printed
    assert "'architectures': ['90-real']" in printed and printed.endswith("[]\n")


def by_architecture(pattern, text):
    """Matches for each architecture, by the kernel's name."""
    found, architecture = defaultdict(dict), None
    for match in pattern.finditer(text):
        if match["kernel"] is None:
            architecture = match["architecture"]
        else:
            found[architecture][match["kernel"]] = match
    return found


@needs_triton
@pytest.mark.skipif(
    extension.obstacle() is not None
    and (shutil.which("nvcc") is None or os.environ.get("NOVA_CUDA") == "0"),
    reason="needs the CUDA extension",
)
def test_kernels_do_not_spill_and_fit_a_block():
    """Of the module in use: `make` builds it where there is nvcc."""
    assert extension.obstacle() is None
    built_for = {name.partition("-")[0] for name in nova_kernels.build_info()["architectures"]}
    if not ARCHITECTURES <= built_for:
        pytest.skip(f"the extension was built for {sorted(built_for)} (NOVA_CUDA_ARCHS)")
    from nova_kernels.triton_kernels.ahead_of_time import listing

    module = Path(extension.extension().__file__).read_bytes()
    resources = by_architecture(RESOURCES, listing(module, "cuobjdump", "-res-usage"))
    threads = by_architecture(THREADS, listing(module, "cuobjdump", "-elf"))
    assert resources.keys() == threads.keys() == built_for

    sources = "".join(path.read_text() for path in (ROOT / "csrc").glob("*.cu*"))
    names = set(re.findall(r"__global__ void __launch_bounds__\([^)]*\)\s*(\w+)", sources))
    assert len(names) == sources.count("__global__") > 0
    for architecture, kernels in resources.items():
        assert kernels.keys() == threads[architecture].keys() == resources["80"].keys()
        assert all(any(name in kernel for kernel in kernels) for name in names)
        for kernel, used in kernels.items():
            assert used["stack"] == "0", used[0]
            # Launches ask for all shared memory that there is, so kernels declare none. From sm_90
            # on, the KiB counts that CUDA itself has in a block with shared memory.
            assert int(used["shared"]) <= (1024 if int(architecture) >= 90 else 0), used[0]
            registers = -(-int(used["registers"]) // GRANULE) * GRANULE
            bound = int(threads[architecture][kernel]["threads"], 16)
            assert registers * bound <= REGISTERS, used[0]
