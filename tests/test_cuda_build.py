"""The CUDA extension as users build it, for the A100 and the H100. Needs nvcc, and no GPU."""

import re
import shutil
from types import SimpleNamespace

import pytest
from builds import ROOT, build_info_of, build_wheel, make_checkout

SOURCES = sorted(path.stem for path in (ROOT / "csrc").glob("*.cu"))
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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A build: log, wheel, and the checkout with the compiler's intermediate files.

    In an environment that pip makes for it, where a package index can be reached.
    """
    folder = tmp_path_factory.mktemp("cuda")
    checkout = make_checkout(folder)
    environment = {
        "NOVA_CUDA": "1",
        "NOVA_CUDA_ARCHS": ";".join(f"{architecture}-real" for architecture in ARCHITECTURES),
        "NVCC_APPEND_FLAGS": "-Xptxas -v -keep",
        "MAX_JOBS": "1",  # what compilers say does not mix
    }
    process, wheel = build_wheel(checkout, folder, isolated=True, **environment)
    if process.returncode != 0 and "No matching distribution found" in process.stdout:
        if shutil.which("cmake") is None:
            pytest.skip("needs cmake, or an index that has it")
        process, wheel = build_wheel(checkout, folder, **environment)
    assert process.returncode == 0, process.stdout
    return SimpleNamespace(log=process.stdout, wheel=wheel, checkout=checkout)


def test_the_extension_is_in_the_wheel_and_loads_without_a_driver(built, tmp_path):
    assert built.log.count("built the CUDA extension") == 1
    printed = build_info_of(built.wheel, tmp_path / "new")
    assert "'cuda_extension': True, 'error': None" in printed
    assert "'architectures': ['80-real', '90-real']" in printed and printed.endswith("[]\n")


@pytest.mark.parametrize("source", SOURCES)
def test_kernels_do_not_spill_and_fit_a_block(built, source):
    threads = {}
    for architecture in ARCHITECTURES:
        (ptx,) = built.checkout.rglob(f"{source}.compute_{architecture}.ptx")
        threads[str(architecture)] = dict(THREADS.findall(ptx.read_text()))
    names = threads[str(ARCHITECTURES[0])].keys()
    assert all(found.keys() == names for found in threads.values())
    assert names or source in WITHOUT_KERNELS

    compiled = [match.groupdict() for match in RESOURCES.finditer(built.log)]
    compiled = [entry for entry in compiled if entry["kernel"] in names]
    assert len(compiled) == len(names) * len(ARCHITECTURES)
    for entry in compiled:
        assert entry["stack"] == entry["stores"] == entry["loads"] == "0", entry
        # Launches ask for all shared memory that there is, so kernels declare none of their own.
        assert entry["shared"] in (None, "0"), entry
        registers = -(-int(entry["registers"]) // GRANULE) * GRANULE
        bound = int(threads[entry["architecture"]][entry["kernel"]])
        assert registers * bound <= REGISTERS, entry
