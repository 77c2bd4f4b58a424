"""The error of an implementation that cannot run here, and errors of others in a line."""


class BackendError(RuntimeError):
    """An implementation of an op cannot run: not written, not installed, or on a wrong device."""


def in_a_line(error: Exception) -> str:
    """Kind and first line of an error: compilers and drivers write many."""
    text, kind = str(error).strip(), type(error).__name__
    return f"{kind}: {text.splitlines()[0]}" if text else kind
