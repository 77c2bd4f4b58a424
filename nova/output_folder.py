"""The folder that long work writes into."""

import tempfile
from pathlib import Path

from .errors import MediaError


def make_output_folder(folder: Path) -> None:
    """Make a folder, if it is absent, and see whether files can be written into it.

    Raises:
        MediaError: it cannot be made, or not be written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permission bits lie on read-only and network file systems; only writing tells.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MediaError(
            f"{folder} cannot be made, or not be written into: {error.strerror}; give another "
            "folder"
        ) from error
