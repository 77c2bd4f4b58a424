"""Geometry of the causal video VAE, with the field names of diffusers' VAE configurations."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError
from ..numeric import is_finite_number

# Keys that VAE configurations carry and that change nothing here: SiLU is the only activation,
# frames may have any size, and the precision is the caller's choice.
_IGNORED_KEYS = ("act_fn", "sample_size", "force_upcast")
# Keys that would change the latents; no checkpoint of this family sets them.
_UNSUPPORTED_KEYS = ("latents_mean", "latents_std")


@dataclass(frozen=True)
class VAEConfig:
    """Geometry and latent statistics of a `CausalVideoVAE`.

    A level named "...2D" handles every frame as an image, one named "...3D" also mixes frames,
    causally. `layers_per_block` counts the residual blocks of an encoder level; a decoder level
    has one more. Latents are `(z - shift_factor) * scaling_factor`.

    Raises:
        ConfigError: values that are out of range or contradict each other.
    """

    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    layers_per_block: int
    latent_channels: int
    scaling_factor: float
    shift_factor: float | None = None
    in_channels: int = 3
    out_channels: int = 3
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    def __post_init__(self) -> None:
        for name in ("block_out_channels", "down_block_types", "up_block_types"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not values:
                raise ConfigError(f"`{name}` must be a list that is not empty, got {values!r}")
            object.__setattr__(self, name, tuple(values))
        _check(self)

    @classmethod
    def osp(cls) -> "VAEConfig":
        """The Open-Sora-Plan video VAE of the released text-to-video model (233 M parameters).

        A checkpoint's own config.json decides; this is the geometry for measurements.
        """
        return cls(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 2 + ("DownEncoderBlock3D",) * 2,
            up_block_types=("UpDecoderBlock3D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.18215,
        )

    @classmethod
    def tiny(cls) -> "VAEConfig":
        """The same layout with 32 to 64 channels and one block a level, for tests and demos."""
        return cls(
            block_out_channels=(32, 32, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2 + ("DownEncoderBlock3D",) * 2,
            up_block_types=("UpDecoderBlock3D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            scaling_factor=0.5,
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Read a VAE's config.json. Keys that start with "_" are skipped.

        Raises:
            ConfigError: unknown or missing keys, or wrong values.
        """
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        for key in _UNSUPPORTED_KEYS:
            if config.pop(key, None) is not None:
                raise ConfigError(f"VAE config sets `{key}`, which is not supported; remove it")
        for key in _IGNORED_KEYS:
            config.pop(key, None)
        known = {field.name for field in fields(cls)}
        required = [field.name for field in fields(cls) if field.default is MISSING]
        unknown = sorted(set(config) - known)
        missing = [key for key in required if config.get(key) is None]
        if unknown:
            raise ConfigError(
                f"VAE config has unknown keys {unknown}; known keys are {sorted(known)}"
            )
        if missing:
            raise ConfigError(f"VAE config lacks {missing}; add them to config.json")
        return cls(**config)

    def to_dict(self) -> dict[str, Any]:
        """For config.json; `from_dict` reads it back to an equal config."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def spatial_factor(self) -> int:
        """Pixels along a side of a latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames to a latent frame, after the first, which stands for one."""
        return 2 ** sum(is_causal(kind) for kind in self.down_block_types[1:])


def is_causal(block_type: str) -> bool:
    """Whether a level of this type name mixes frames (3D) or handles each as an image (2D)."""
    return block_type.endswith("3D")


def _check(config: VAEConfig) -> None:
    integers = ("layers_per_block", "latent_channels", "in_channels", "out_channels")
    sizes = [(name, getattr(config, name)) for name in (*integers, "norm_num_groups")]
    sizes += [("block_out_channels", channels) for channels in config.block_out_channels]
    for name, value in sizes:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"`{name}` must be positive integers, got {value!r}")
    for name in ("use_quant_conv", "use_post_quant_conv"):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"`{name}` must be true or false, got {getattr(config, name)!r}")
    indivisible = [c for c in config.block_out_channels if c % config.norm_num_groups]
    if indivisible:
        raise ConfigError(
            f"`block_out_channels` {indivisible} are no multiples of `norm_num_groups` "
            f"{config.norm_num_groups}"
        )
    for name in ("scaling_factor", "shift_factor"):
        value = getattr(config, name)
        if value is None and name == "shift_factor":
            continue
        if not is_finite_number(value):
            raise ConfigError(f"`{name}` must be a finite number, got {value!r}")
    if config.scaling_factor <= 0:
        raise ConfigError(f"`scaling_factor` must be positive, got {config.scaling_factor!r}")
    _check_block_types(config)


def _check_block_types(config: VAEConfig) -> None:
    levels = len(config.block_out_channels)
    for name in ("down_block_types", "up_block_types"):
        kinds = getattr(config, name)
        stem = "DownEncoderBlock" if name == "down_block_types" else "UpDecoderBlock"
        unknown = [kind for kind in kinds if kind not in (f"{stem}2D", f"{stem}3D")]
        if unknown:
            raise ConfigError(f"`{name}` must be {stem}2D or {stem}3D, got {unknown}")
        if len(kinds) != levels:
            raise ConfigError(
                f"`{name}` has {len(kinds)} levels and `block_out_channels` {levels}; "
                "they must have as many"
            )
    if len({is_causal(kind) for kind in config.up_block_types}) > 1:
        raise ConfigError(f"`up_block_types` must be all 2D or all 3D, got {config.up_block_types}")
    # The last of a 3D decoder's upsamplers leaves time alone, see `layers.Decoder`.
    upsampled = max(levels - 2, 0) if is_causal(config.up_block_types[0]) else 0
    if config.temporal_factor != 2**upsampled:
        raise ConfigError(
            f"the encoder shortens time {config.temporal_factor} times and the decoder lengthens "
            f"it {2**upsampled} times; change `down_block_types` or `up_block_types`"
        )
