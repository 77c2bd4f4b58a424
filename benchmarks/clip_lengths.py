"""How many pixel frames latent frames stand for, and the other way round."""

from nova.data.clips import VIDEO_STRIDE


def pixel_frames(latent: int, factor: int = VIDEO_STRIDE) -> int:
    """Pixel frames of a clip: one for the first latent frame, `factor` for each other."""
    return 1 + factor * (latent - 1)


def latent_frames(pixel: int) -> int:
    """Latent frames of 1 + 4n pixel frames."""
    return 1 + (pixel - 1) // VIDEO_STRIDE
