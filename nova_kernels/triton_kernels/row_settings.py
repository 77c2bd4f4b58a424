"""Launch settings of kernels that hold whole rows in registers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nova_kernels.rows import MAX_WIDTH, Rows
from nova_kernels.triton_kernels.launch import Launch, ceil_div


@dataclass(frozen=True)
class RowSetting:
    """Rows a program, their padded width (a power of two), warps a program.

    strip_warps: of a program that goes through a strip of rows and adds up what they have in
        common, which takes registers.
    """

    block_rows: int
    block_width: int
    num_warps: int
    strip_warps: int


# By padded width. Narrow rows share a program. Of rows from 1024 on a thread holds sixteen values,
# two accesses of 16 bytes in half precision: sums and indices cost a thread the same whatever it
# holds, and these kernels should wait for memory, not for instructions. To be tuned on GPUs.
SETTINGS = {
    setting.block_width: setting
    for setting in (
        RowSetting(32, 16, 2, 2),
        RowSetting(16, 32, 2, 2),
        RowSetting(8, 64, 2, 2),
        RowSetting(8, 128, 4, 4),
        RowSetting(4, 256, 4, 4),
        RowSetting(2, 512, 4, 4),
        RowSetting(1, 1024, 2, 4),
        RowSetting(1, 2048, 4, 8),
        RowSetting(1, 4096, 8, 8),
        RowSetting(1, 8192, 16, 16),
    )
}


def row_setting(width: int) -> RowSetting:
    """The setting for rows of a width.

    Raises:
        ValueError: rows are wider than a program can hold.
    """
    if width > MAX_WIDTH:
        raise ValueError(
            f"Triton kernels of rows take widths up to {MAX_WIDTH}, got {width}; "
            "use backend='reference'"
        )
    return next(setting for size, setting in SETTINGS.items() if size >= width)


def row_launch(
    kernel: Any,
    rows: Rows,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any] | None = None,
    strip: int = 1,
) -> Launch:
    """A launch of `kernel` over all rows.

    A program has `strip` blocks of rows one after the other.
    """
    setting = row_setting(rows.width)
    return Launch(
        kernel,
        (ceil_div(rows.count, setting.block_rows * strip),),
        arguments,
        {
            **(constants or {}),
            "BLOCK_ROWS": setting.block_rows,
            "BLOCK_WIDTH": setting.block_width,
        },
        num_warps=setting.num_warps if strip == 1 else setting.strip_warps,
    )
