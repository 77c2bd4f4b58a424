"""Images and videos on disk <-> uint8 arrays, RGB: frames are (T, H, W, 3), an image is (H, W, 3).

Reading gives plain arrays or a `MediaError`. Writing is atomic: a file appears under its name
only when it is complete.
"""

from .contact_sheet import compare_clips, contact_sheet, contact_sheet_path
from .files import IMAGE_FORMATS, OUTPUT_SUFFIXES, VIDEO_SUFFIXES, check_writable
from .pixels import fit, to_uint8
from .reading import read_image, read_video
from .video_writer import MediaWarning, VideoWriter
from .writing import save, write_image, write_video

__all__ = [
    "IMAGE_FORMATS",
    "OUTPUT_SUFFIXES",
    "VIDEO_SUFFIXES",
    "MediaWarning",
    "VideoWriter",
    "check_writable",
    "compare_clips",
    "contact_sheet",
    "contact_sheet_path",
    "fit",
    "read_image",
    "read_video",
    "save",
    "to_uint8",
    "write_image",
    "write_video",
]
