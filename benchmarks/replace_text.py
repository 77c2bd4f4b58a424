"""Files that are written anew while work goes on. Imports no torch, which memory.py must not."""

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """The file is the old one or the new one, whenever the process ends.

    What is no regular file, such as /dev/stdout, is written to where it is.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()  # of a link it is the file behind it that changes
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
