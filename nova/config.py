"""Model geometry: frozen dataclasses, the reference's config.json, and the named sizes."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError

# Head counts of the reference's encoders, by width.
HEADS_BY_WIDTH = {768: 12, 1024: 16, 1536: 16}
DEFAULT_HEAD_DIM = 64

_KEYS_REQUIRED = ("image_dim", "image_size", "image_stride", "image_base_size", "video_base_size")
_KEYS_OPTIONAL = {
    "text_token_dim": None,
    "text_token_len": None,
    "video_mixer_rank": None,
    "rotary_pos_embed": False,
}


@dataclass(frozen=True)
class EncoderConfig:
    """Depth, width and number of attention heads of a vision transformer."""

    depth: int
    embed_dim: int
    num_heads: int

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


@dataclass(frozen=True)
class HeadConfig:
    """Depth and width of the diffusion MLP."""

    depth: int
    embed_dim: int


@dataclass(frozen=True)
class ModelConfig:
    """Geometry of a NOVA transformer, with the field names of the reference's config.json.

    Sizes are (height, width): `image_size` in pixels, `image_base_size` in image tokens,
    `video_base_size` in (time base, frame-token rows, frame-token columns). `text_token_dim` is
    None for class-conditional models. `video_mixer_rank`: None for no scaling-and-shift layer,
    negative for a full-rank one.

    Raises:
        ConfigError: values of a wrong type, out of range, or that contradict each other.
    """

    image_dim: int
    image_size: tuple[int, int]
    image_stride: int
    image_base_size: tuple[int, int]
    video_base_size: tuple[int, int, int]
    video_encoder: EncoderConfig
    image_encoder: EncoderConfig
    image_decoder: HeadConfig
    text_token_dim: int | None = None
    text_token_len: int | None = None
    video_mixer_rank: int | None = None
    rotary_pos_embed: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def patch_size(self) -> int:
        """Latent pixels along a side of an image token."""
        return 15 // self.image_stride + 1

    @property
    def latent_size(self) -> tuple[int, int]:
        """(height, width) of a latent frame."""
        return self.image_size[0] // self.image_stride, self.image_size[1] // self.image_stride

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent frame."""
        return (self.image_dim, *self.latent_size)

    @property
    def num_image_tokens(self) -> int:
        """Tokens of a frame in the image encoder."""
        return math.prod(self.image_base_size)

    @property
    def num_frame_tokens(self) -> int:
        """Tokens of a frame in the video encoder."""
        return math.prod(self.video_base_size[1:])

    @property
    def token_dim(self) -> int:
        """Values in an image token."""
        return self.patch_size**2 * self.image_dim

    @property
    def time_base(self) -> int:
        """Latent frames that the positions were trained for."""
        return self.video_base_size[0]

    @property
    def is_video(self) -> bool:
        """Whether it makes clips; an image model makes single frames."""
        return self.time_base > 1

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read the reference's transformer/config.json.

        The encoders come from `arch` (names such as "vit_d16w1024", "mlp_d3w1280") or from
        `arch_dims` (a list of dictionaries of depth, embed_dim, num_heads).

        Raises:
            ConfigError: unknown or missing keys, or values that contradict each other.
        """
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        arch_keys = [key for key in ("arch", "arch_dims") if config.get(key) is not None]
        known = {*_KEYS_REQUIRED, *_KEYS_OPTIONAL, "arch", "arch_dims"}
        unknown = sorted(set(config) - known)
        missing = [key for key in _KEYS_REQUIRED if config.get(key) is None]
        if unknown:
            raise ConfigError(
                f"transformer config has unknown keys {unknown}; known keys are {sorted(known)}. "
                "Is this the config.json of a NOVA transformer?"
            )
        if missing or not arch_keys:
            missing += [] if arch_keys else ["arch"]
            raise ConfigError(f"transformer config lacks {missing}; add them to config.json")
        if len(arch_keys) == 2:
            raise ConfigError("transformer config has both `arch` and `arch_dims`; keep one")
        video, image, head = (
            _parse_arch(config["arch"]) if arch_keys == ["arch"] else _dims(config["arch_dims"])
        )
        image_size = config["image_size"]
        return cls(
            image_dim=config["image_dim"],
            image_size=_ints("image_size", [image_size] * 2 if _is_int(image_size) else image_size),
            image_stride=config["image_stride"],
            image_base_size=_ints("image_base_size", config["image_base_size"]),
            video_base_size=_ints("video_base_size", config["video_base_size"]),
            video_encoder=video,
            image_encoder=image,
            image_decoder=head,
            **{key: config.get(key, default) for key, default in _KEYS_OPTIONAL.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """The reference's config.json; `from_dict` reads it back to an equal config."""
        encoders = (self.video_encoder, self.image_encoder)
        config: dict[str, Any] = {
            "image_dim": self.image_dim,
            "image_size": list(self.image_size),
            "image_stride": self.image_stride,
            "text_token_dim": self.text_token_dim,
            "text_token_len": self.text_token_len,
            "image_base_size": list(self.image_base_size),
            "video_base_size": list(self.video_base_size),
            "video_mixer_rank": self.video_mixer_rank,
            "rotary_pos_embed": self.rotary_pos_embed,
        }
        if all(HEADS_BY_WIDTH.get(e.embed_dim) == e.num_heads for e in encoders):
            config["arch"] = [f"vit_d{e.depth}w{e.embed_dim}" for e in encoders]
            config["arch"].append(f"mlp_d{self.image_decoder.depth}w{self.image_decoder.embed_dim}")
        else:
            config["arch_dims"] = [dict(vars(part)) for part in (*encoders, self.image_decoder)]
        return config


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ints(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or not all(_is_int(v) and v > 0 for v in values):
        raise ConfigError(f"`{name}` must be a list of positive integers, got {values!r}")
    return tuple(values)


def _parse_arch(arch: Any) -> tuple[EncoderConfig, EncoderConfig, HeadConfig]:
    names = list(arch) if isinstance(arch, list | tuple) else [arch]
    patterns = (r"vit_d(\d+)w(\d+)", r"vit_d(\d+)w(\d+)", r"mlp_d(\d+)w(\d+)")
    matches = [
        re.fullmatch(pattern, str(name)) for pattern, name in zip(patterns, names, strict=False)
    ]
    if len(names) != 3 or None in matches:
        raise ConfigError(
            f"`arch` must be [video encoder, image encoder, diffusion MLP] such as "
            f"['vit_d16w1024', 'vit_d32w1024', 'mlp_d3w1280'], got {arch!r}"
        )
    (vd, vw), (im_d, im_w), (hd, hw) = [[int(v) for v in m.groups()] for m in matches]
    return (
        EncoderConfig(vd, vw, _heads_for(vw)),
        EncoderConfig(im_d, im_w, _heads_for(im_w)),
        HeadConfig(hd, hw),
    )


def _heads_for(width: int) -> int:
    return HEADS_BY_WIDTH.get(width, max(width // DEFAULT_HEAD_DIM, 1))


def _dims(arch_dims: Any) -> tuple[EncoderConfig, EncoderConfig, HeadConfig]:
    try:
        video, image, head = arch_dims
        return EncoderConfig(**video), EncoderConfig(**image), HeadConfig(**head)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "`arch_dims` must be [video encoder, image encoder, diffusion MLP], the encoders with "
            f"depth, embed_dim and num_heads, the MLP with depth and embed_dim: {error}"
        ) from None


def _check(config: ModelConfig) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(f"transformer config: {message}")

    for name in ("image_dim", "image_stride"):
        value = getattr(config, name)
        require(_is_int(value) and value > 0, f"`{name}` must be a positive integer, got {value!r}")
    for name in ("text_token_dim", "video_mixer_rank"):
        value = getattr(config, name)
        require(value is None or _is_int(value), f"`{name}` must be an integer, got {value!r}")
    width = config.text_token_dim
    require(width is None or width >= 0, f"`text_token_dim` must be positive, got {width}")
    rotary = config.rotary_pos_embed
    # Of text, "false" would be true.
    require(rotary in (True, False, None), f"`rotary_pos_embed` is true or false, got {rotary!r}")
    for part in (config.video_encoder, config.image_encoder, config.image_decoder):
        for name, value in vars(part).items():
            require(_is_int(value), f"`arch_dims`: {name} must be an integer, got {value!r}")
    require(len(config.image_size) == 2, f"`image_size` needs 2 numbers, got {config.image_size}")
    require(len(config.image_base_size) == 2, "`image_base_size` needs 2 numbers")
    require(len(config.video_base_size) == 3, "`video_base_size` needs 3 numbers")
    if config.text_token_dim is not None:
        length = config.text_token_len
        require(
            _is_int(length) and 0 < length <= 512,
            f"`text_token_len` must be 1 to 512 where `text_token_dim` is set, got {length!r}",
        )
    video, image, head = config.video_encoder, config.image_encoder, config.image_decoder
    for name, encoder in (("video", video), ("image", image)):
        require(min(encoder.depth, encoder.num_heads) >= 1, f"{name} encoder needs depth and heads")
        # Rotary splits a head into an eighth for time and two halves of the rest, all in pairs.
        divisor = encoder.num_heads * (32 if config.rotary_pos_embed else 1)
        require(
            encoder.embed_dim % divisor == 0 and encoder.embed_dim % 4 == 0,
            f"{name} encoder width {encoder.embed_dim} does not fit {encoder.num_heads} heads",
        )
    require(video.embed_dim == image.embed_dim, "both encoders must have the same width")
    require(image.depth >= 2, "the image encoder needs at least two blocks")
    require(min(head.depth, head.embed_dim) >= 1, "the diffusion MLP needs depth and width")

    height, width = config.latent_size
    patch = config.patch_size
    divisor = 2 * patch * config.image_stride
    require(
        all(size % divisor == 0 for size in config.image_size),
        f"`image_size` {config.image_size} must be divisible by {divisor} (VAE stride x patch)",
    )
    grids = (height // patch, width // patch), (height // (2 * patch), width // (2 * patch))
    require(
        config.image_base_size == grids[0] and config.video_base_size[1:] == grids[1],
        f"image_size {config.image_size} has {grids[0]} image tokens and {grids[1]} frame tokens, "
        f"but image_base_size is {config.image_base_size} and video_base_size "
        f"{config.video_base_size}",
    )


def _named(
    image_size: tuple[int, int],
    encoders: tuple[int, int, int],
    *,
    time_base: int = 1,
    text: tuple[int, int] | None = (2560, 256),
    mixer_rank: int | None = None,
    head: tuple[int, int] = (3, 1280),
) -> ModelConfig:
    """A config from pixels, (video depth, image depth, width), and what differs between sizes."""
    video_depth, image_depth, width = encoders
    tokens = image_size[0] // 16, image_size[1] // 16
    return ModelConfig(
        image_dim=4,
        image_size=image_size,
        image_stride=8,
        image_base_size=tokens,
        video_base_size=(time_base, tokens[0] // 2, tokens[1] // 2),
        video_encoder=EncoderConfig(video_depth, width, _heads_for(width)),
        image_encoder=EncoderConfig(image_depth, width, _heads_for(width)),
        image_decoder=HeadConfig(*head),
        text_token_dim=text[0] if text else None,
        text_token_len=text[1] if text else None,
        video_mixer_rank=mixer_rank,
    )


# The released geometries (for random weights and counting: a checkpoint folder brings its own
# config.json) and small ones for tests, benchmarks and laptops.
NAMED_CONFIGS: dict[str, ModelConfig] = {
    "nova-d48w1024-osp480": _named((480, 768), (16, 32, 1024), time_base=16, mixer_rank=24),
    "nova-d48w1024-sd512": _named((512, 512), (16, 32, 1024)),
    "nova-d48w768-sdxl1024": _named((1024, 1024), (16, 32, 768)),
    "nova-d48w1024-sdxl1024": _named((1024, 1024), (16, 32, 1024)),
    "nova-d48w1536-sdxl1024": _named((1024, 1024), (16, 32, 1536)),
    "small-video": _named(
        (128, 128), (6, 8, 256), time_base=5, text=(64, 32), mixer_rank=16, head=(3, 256)
    ),
    "tiny-video": _named(
        (64, 96), (2, 4, 64), time_base=3, text=(32, 16), mixer_rank=8, head=(2, 64)
    ),
    "tiny-image": _named((64, 64), (2, 4, 64), text=(32, 16), head=(2, 64)),
    "tiny-class": _named((64, 64), (2, 4, 64), text=None, head=(2, 64)),
}


def named_config(name: str) -> ModelConfig:
    """The `ModelConfig` of a named size.

    Raises:
        ConfigError: no such name; the message lists the known ones.
    """
    if name not in NAMED_CONFIGS:
        raise ConfigError(f"no size named {name!r}; known sizes: {', '.join(NAMED_CONFIGS)}")
    return NAMED_CONFIGS[name]
