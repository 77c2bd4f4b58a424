"""The command `nova`: one module for each command, and one for each step of `nova generate`."""

from .app import main

__all__ = ["main"]
