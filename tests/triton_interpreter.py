"""Makes Triton's interpreter faster, by which tests without a GPU run kernels."""

import triton.language as tl
from triton.runtime import interpreter


class _NothingToRestore:
    def restore(self) -> None:
        pass


def patch_language_once() -> None:
    """Leave out what Triton repeats at every call of a function inside a kernel.

    Up to 3.9 at least, Triton then searches its whole language for functions to replace by NumPy's,
    which the kernel's launch has replaced already. Interpreted tests compute the same without, and
    sooner.
    """
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:  # it is no part of Triton's interface: then tests take longer
        return

    def patch_what_is_not_patched(function):
        values = list(function.__globals__.values())
        used = [lang for lang in (tl, tl.core) if any(value is lang for value in values)]
        # Once replaced, a function of the language is no builtin any more.
        if any(tl.core.is_builtin(lang.load) for lang in used):
            return patch(function)
        return _NothingToRestore()

    interpreter._patch_lang = patch_what_is_not_patched
