"""What a checkpoint recommends for sampling: generation_config.json, as transformers calls it."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .checkpoint import read_json, write_json
from .errors import ConfigError, InputError
from .numeric import check_finite, check_whole
from .request import Request

FILE_NAME = "generation_config.json"


@dataclass(frozen=True)
class GenerationConfig:
    """Options of a call that it leaves open. See `Request`, whose defaults are the reference's.

    Raises:
        ConfigError: a value that `Request` does not take.
    """

    num_inference_steps: int = Request.num_inference_steps
    num_diffusion_steps: int = Request.num_diffusion_steps
    guidance_scale: float = Request.guidance_scale
    motion_flow: float = Request.motion_flow

    def __post_init__(self) -> None:
        try:
            self.request()
            check_whole(self, "num_inference_steps", "num_diffusion_steps", least=1)
            check_finite(self, "guidance_scale", "motion_flow")
        except InputError as error:
            raise ConfigError(f"{FILE_NAME}: {error}") from None

    @classmethod
    def read(cls, folder: Path) -> "GenerationConfig":
        """Of a checkpoint folder; the reference's values where it has no such file.

        Raises:
            ConfigError: unknown keys, or wrong values.
            CheckpointError: the file cannot be read.
        """
        path = folder / FILE_NAME
        if not path.exists():
            return cls()
        content = read_json(path)
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(content) - set(known))
        if unknown:
            raise ConfigError(f"{path} has unknown keys {unknown}; known keys are {known}")
        return cls(**content)

    def write(self, folder: Path) -> None:
        """Write the file that `read` opens."""
        write_json(folder / FILE_NAME, asdict(self))

    def request(self, prompt: Any = None, **options: Any) -> Request:
        """A request; what is not given, or None, is as recommended.

        Raises:
            InputError: see `Request`.
        """
        given = {name: value for name, value in options.items() if value is not None}
        return Request(prompt, **{**asdict(self), **given})
