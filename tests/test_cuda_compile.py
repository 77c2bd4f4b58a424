"""Every CUDA source compiles for the A100 and the H100, and its kernels fit their registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
WITHOUT_KERNELS = ("denoise", "device_info")
ARCHITECTURES = (80, 90)
REGISTERS = 65536  # of a multiprocessor, and the most of a block
GRANULE = 8  # registers are given to threads in multiples

# What ptxas says of a kernel.
RESOURCES = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<architecture>\d+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
    r"(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
# The most threads of a block, as the kernel's launch bounds set them.
THREADS = re.compile(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted(CSRC.glob("*.cu")), ids=lambda path: path.stem)
def test_kernels_do_not_spill_and_fit_a_block(source, tmp_path):
    command = ["nvcc", "-std=c++17", f"-I{CSRC}", "-Xptxas", "-v", "-c", str(source)]
    command += ["-keep", "-keep-dir", str(tmp_path), "-o", str(tmp_path / "out.o")]
    for architecture in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    compiled = [match.groupdict() for match in RESOURCES.finditer(done.stdout + done.stderr)]
    threads = {
        str(architecture): dict(THREADS.findall(ptx.read_text()))
        for architecture in ARCHITECTURES
        for ptx in tmp_path.glob(f"*compute_{architecture}.ptx")
    }
    names = {entry["kernel"] for entry in compiled}
    assert all(found.keys() == names for found in threads.values())
    assert names or source.stem in WITHOUT_KERNELS
    for entry in compiled:
        assert entry["stack"] == entry["stores"] == entry["loads"] == "0", entry
        # Launches ask for all shared memory that there is, so kernels declare none of their own.
        assert entry["shared"] in (None, "0"), entry
        registers = -(-int(entry["registers"]) // GRANULE) * GRANULE
        bound = int(threads[entry["architecture"]][entry["kernel"]])
        assert registers * bound <= REGISTERS, entry
