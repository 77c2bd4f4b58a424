"""Makes Triton's interpreter faster, by which tests without a GPU run kernels.

Interpreted kernels compute the same without what it repeats at every operation, and sooner. Two of
the functions are no part of Triton's interface: where they are missing, tests take longer.
"""

import triton.language as tl
from triton.runtime import interpreter


def patch_interpreter() -> None:
    """Leave out what the interpreter does more than once; to be called once."""
    if hasattr(interpreter, "_patch_lang"):
        _patch_language_once()
    if hasattr(interpreter, "_get_np_dtype"):
        _remember_numpy_dtypes()
    _remember_block_types()


class _NothingToRestore:
    def restore(self) -> None:
        pass


def _patch_language_once() -> None:
    """At every call of a function inside a kernel, it searches its whole language for functions
    to replace by NumPy's, which the kernel's launch has replaced already."""
    patch = interpreter._patch_lang

    def patch_what_is_not_patched(function):
        values = list(function.__globals__.values())
        used = [lang for lang in (tl, tl.core) if any(value is lang for value in values)]
        # Once replaced, a function of the language is no builtin any more.
        if any(tl.core.is_builtin(lang.load) for lang in used):
            return patch(function)
        return _NothingToRestore()

    interpreter._patch_lang = patch_what_is_not_patched


def _remember_numpy_dtypes() -> None:
    """It makes its table of all NumPy dtypes for every dtype that it looks up."""
    look_up, found = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = look_up(dtype)
        return found[name]

    interpreter._get_np_dtype = numpy_dtype


def _remember_block_types() -> None:
    """The type of every result is made anew, with its shape checked and written out as text."""
    make, made = tl.block_type.__init__, {}

    def init(self, element_ty, shape):
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in made:
            make(self, element_ty, shape)
            made[key] = vars(self).copy()
        vars(self).update(made[key], element_ty=element_ty)

    tl.block_type.__init__ = init
