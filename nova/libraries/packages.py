"""Packages that are used where they are installed, by the names that pip has for them."""

from importlib import metadata

FLASH_ATTN, FLASH_ATTN_3, FLASH_ATTN_4 = "flash-attn", "flash-attn-3", "flash-attn-4"
QUACK = "quack-kernels"


def version_of(name: str) -> str | None:
    """Of an installed package; None: it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed_packages() -> dict[str, str]:
    """Versions of those that are there, by name."""
    versions = {name: version_of(name) for name in (FLASH_ATTN, FLASH_ATTN_3, FLASH_ATTN_4, QUACK)}
    return {name: version for name, version in versions.items() if version is not None}
