"""Which implementation runs an op: plain torch ("reference"), "triton", "cuda" or "cpp".

Every op takes `backend`. "auto", the default, takes the best implementation that is known to be
right and fast, and the reference for everything else. An implementation that is asked for by name
runs or raises. The environment variable NOVA_KERNELS_BACKEND replaces "auto". It speaks of all ops,
so "cuda" means "triton" for those that are not written in CUDA, and "cpp" the reference for those
that are not written in C++.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from types import ModuleType

import torch
from torch import Tensor, library
from torch.autograd import forward_ad

from nova_kernels.cpp_kernels import extension as cpp_extension
from nova_kernels.cuda_kernels import extension as cuda_extension
from nova_kernels.errors import BackendError
from nova_kernels.startup import failure_to_start

BACKENDS = ("auto", "reference", "triton", "cuda", "cpp")
VARIABLE = "NOVA_KERNELS_BACKEND"
# Where one backend is asked for all ops: what runs those that it does not have.
OTHERWISE = {"cuda": "triton", "cpp": "reference"}
# Compute capabilities (major, minor) of the GPUs that tests and benchmarks ran on.
VERIFIED_CAPABILITIES = {(9, 0)}
LIBRARY = library.Library("nova_kernels", "DEF")
# Looked for once: torch.compile cannot trace a search for modules.
HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Op:
    """An op and its implementations beside the reference.

    Attributes:
        name: of the op, of its module in `triton_kernels`, of its tests.
        implementations: those that exist, best first.
        verified: those that passed the tests on the hardware they are for, and were faster there
            than the reference, by themselves or in a whole run, by a file in benchmarks/results.
            Only these are ever chosen automatically, those for GPUs on GPUs of
            `VERIFIED_CAPABILITIES`.
        max_width: of the tensors' last axis, for kernels that hold whole rows; None: any.
        least_values: where not 0, other implementations than the reference are chosen automatically
            on a GPU only if some tensor has so many values, no gradient is wanted and torch.compile
            does not look on. With fewer, launching them takes the host longer than they gain; their
            backward passes lost to torch's; and torch.compile fuses what it sees.
    """

    name: str
    implementations: tuple[str, ...] = ("triton",)
    verified: frozenset[str] = frozenset()
    max_width: int | None = None
    least_values: int = 0

    def choose(self, backend: str, *tensors: Tensor) -> str:
        """The implementation for these tensors: "reference" or one of `implementations`.

        Raises:
            ValueError: `backend` is not one of `BACKENDS`.
            BackendError: the implementation that was asked for cannot run on these tensors, or
                NOVA_KERNELS_BACKEND names none.
        """
        named = requested(backend)
        if backend == "auto" and named not in self.implementations:
            named = OTHERWISE.get(named, named)
        if named == "reference":
            return named
        if named == "auto":
            usable = self.usable(*tensors)
            return usable[0] if usable else "reference"
        reason = self.obstacle(named, *tensors)
        if reason is not None:
            asked = f" ({VARIABLE} asks for it)" if backend == "auto" else ""
            raise BackendError(f"{self.name}: backend {named!r} cannot run: {reason}{asked}")
        return named

    def usable(self, *tensors: Tensor) -> list[str]:
        """Verified implementations that can run on these tensors and pay, best first."""
        # torch.compile of torch 2.8 and older does not trace `next` of a generator.
        on_gpu = [t.device for t in tensors if t.is_cuda]
        device = on_gpu[0] if on_gpu else tensors[0].device
        if device.type == "cuda" and not self._pays(*tensors):
            return []
        verified = self.verified_on(device)
        names = [name for name in self.implementations if name in verified]
        names = [name for name in names if self.obstacle(name, *tensors) is None]
        # torch.compile cannot trace a try, and its own code on a GPU needs what Triton needs.
        if device.type != "cuda" or torch.compiler.is_compiling():
            return names
        return [name for name in names if failure_to_start(name, device) is None]

    def obstacle(self, backend: str, *tensors: Tensor) -> str | None:
        """Why an implementation cannot run on these tensors; None if it can."""
        if backend not in self.implementations:
            return f"it is not written for this op; there is {['reference', *self.implementations]}"
        if backend == "triton" and not HAS_TRITON:
            return "Triton is not installed (on Linux it comes with torch's CUDA builds)"
        if has_tangent(*tensors):
            return "it has no derivative in forward mode; use backend='reference'"
        devices = {tensor.device.type for tensor in tensors}
        if backend == "cpp":
            if devices != {"cpu"}:
                return f"it needs tensors on a CPU, got {sorted(devices)}"
            return cpp_extension.obstacle()
        if devices != {"cuda"} and not (backend == "triton" and is_interpreting()):
            return f"it needs tensors on a GPU, got {sorted(devices)}; use backend='reference'"
        reason = self._limit(*tensors)
        return cuda_extension.obstacle() if reason is None and backend == "cuda" else reason

    def _pays(self, *tensors: Tensor) -> bool:
        """See `least_values`."""
        if self.least_values == 0:
            return True
        # Before sizes are asked for, which torch.compile would make code of its own for.
        if through_operator(*tensors):
            return False
        return any(t.numel() >= self.least_values for t in tensors)

    def verified_on(self, device: torch.device) -> frozenset[str]:
        """What of `verified` holds on a device."""
        if device.type != "cuda":
            return self.verified - {"triton", "cuda"}
        card = torch.cuda.get_device_properties(device)
        # Some of AMD's cards have the same numbers.
        known = torch.version.hip is None and (card.major, card.minor) in VERIFIED_CAPABILITIES
        return self.verified - {"cpp"} if known else frozenset()

    def _limit(self, *tensors: Tensor) -> str | None:
        """What GPU kernels do not take of these tensors."""
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            return "it computes in float32, and some are float64; use backend='reference'"
        limit = self.max_width
        if limit is not None and any(t.dim() > 0 and t.shape[-1] > limit for t in tensors):
            return f"it takes widths up to {limit}; use backend='reference'"
        return None

    def module(self, backend: str) -> ModuleType:
        """The module that holds an implementation's functions."""
        return importlib.import_module(f"nova_kernels.{backend}_kernels.{self.name}")


def requested(backend: str) -> str:
    """What is asked for, with NOVA_KERNELS_BACKEND in place of "auto".

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
        BackendError: the variable's value is not.
    """
    check_backend(backend)
    if backend != "auto":
        return backend
    named = os.environ.get(VARIABLE) or "auto"
    if named not in BACKENDS:
        raise BackendError(f"{VARIABLE} is {named!r}: it takes {', '.join(BACKENDS)}")
    return named


def check_backend(backend: str) -> None:
    """Raises ValueError unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {backend!r}")


def is_interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors too (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def through_operator(*tensors: Tensor | None) -> bool:
    """Whether a call has to go through `torch.ops`: torch.compile, a mode or autograd must see it.

    Otherwise kernels are launched directly, which saves microseconds a call. Fake tensors, for one,
    are of a mode, and have no memory.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def has_tangent(*tensors: Tensor) -> bool:
    """Whether forward-mode differentiation is on its way through one of them.

    Kernels would lose the tangent, or leave an old one in place.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def define(schema: str, function: Callable, fake: Callable) -> None:
    """Register a torch operator of this package for all devices, with its fake implementation."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    library.register_fake(f"nova_kernels::{name}", fake, lib=LIBRARY)


def define_gradient(name: str, backward: Callable, save: Callable) -> None:
    """Give an operator of this package its gradient: `save` keeps what `backward` needs."""
    library.register_autograd(f"nova_kernels::{name}", backward, setup_context=save, lib=LIBRARY)


def define_no_gradient(name: str) -> None:
    """Let a gradient of an operator be an error; torch would warn and take it for zero."""

    def refuse(ctx, *gradients):
        raise RuntimeError(
            f"nova_kernels::{name} has no gradient, so there is no second derivative; use "
            "backend='reference'"
        )

    define_gradient(name, refuse, lambda ctx, inputs, output: None)


def written(tensor: Tensor) -> None:
    """Tell autograd that a kernel wrote into a tensor, as torch's own in-place operators do."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that torch gives a sum of tensors, of those that are there."""
    return reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))


def new_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty contiguous tensor like x."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
