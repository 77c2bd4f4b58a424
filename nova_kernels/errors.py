"""The error of an implementation that was asked for by name and cannot run here."""


class BackendError(RuntimeError):
    """An implementation of an op cannot run: not written, not installed, or on a wrong device."""
