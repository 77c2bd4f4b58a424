"""The norm of rows, inside kernels."""

import triton
import triton.language as tl


@triton.jit
def standardize(x, columns_in, width, eps):
    """Rows (float32) -> (standardized rows, 1 / deviation); masked columns become 0."""
    mean = tl.sum(x, axis=1)[:, None] / width
    centered = tl.where(columns_in, x - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1)[:, None] / width + eps)
    return centered * inverse, inverse
