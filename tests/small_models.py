"""Small random models and VAEs, runs of the samplers, and a stand-in for graphs, for the tests."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from nova.codec import LatentCodec
from nova.conditioning import Conditioning
from nova.config import EncoderConfig, ModelConfig, named_config
from nova.engine import SamplingGraphs
from nova.guidance import Guidance
from nova.model import NOVATransformer
from nova.noise import NoiseSource
from nova.sampling import generate_frames
from nova.schedule import FlowMatchConfig, set_sizes

SMALL = replace(
    named_config("tiny-video"),
    image_size=(64, 64),
    image_base_size=(4, 4),
    video_base_size=(3, 2, 2),
    video_encoder=EncoderConfig(2, 64, 2),
    image_encoder=EncoderConfig(4, 64, 2),
)
SMALL_ROTARY = replace(SMALL, rotary_pos_embed=True, video_mixer_rank=None)
SMALL_IMAGE = replace(SMALL, video_base_size=(1, 2, 2), video_mixer_rank=-1)


def small_model(config: ModelConfig = SMALL, seed: int = 0) -> NOVATransformer:
    """A random model whose layers all matter: norms and biases are random too."""
    torch.manual_seed(seed)
    model = NOVATransformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    for token in (model.mask_embed.bos_token, model.mask_embed.mask_token):
        token.normal_()
    return model


def small_image_codec() -> LatentCodec:
    """A small AutoencoderKL of diffusers, as SD and SDXL use it; shift and scaling of its own."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    module = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        latent_channels=4,
        scaling_factor=0.25,
        shift_factor=0.1,
    )
    return LatentCodec(module)


def small_prompts(config: ModelConfig, batch: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.text_token_len, config.text_token_dim, generator=generator)


def sample_frames(
    model: NOVATransformer,
    sampler: Callable = generate_frames,
    *,
    batch: int = 2,
    num_frames: int = 3,
    steps: int = 4,
    schedule=None,
    guidance: Guidance | None = None,
    generator=None,
    prompts: torch.Tensor | None = None,
    **options,
) -> Iterator[torch.Tensor]:
    """Latents (B, channels, h, w) of every generated frame of a small run, by default of seed 0."""
    guidance = Guidance(scale=3.0) if guidance is None else guidance
    prompts = small_prompts(model.config, batch) if prompts is None else prompts
    conditioning = Conditioning.from_text(
        model, prompts.to(model.device, model.dtype), None, guidance
    )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return sampler(
        model,
        conditioning,
        num_frames=num_frames,
        set_sizes=set_sizes(model.config.num_image_tokens, steps),
        schedule=FlowMatchConfig().schedule(3) if schedule is None else schedule,
        guidance=guidance,
        noise=NoiseSource(generator, batch, dtype=model.dtype, device=model.device),
        **options,
    )


def sample(model: NOVATransformer, sampler: Callable = generate_frames, **options) -> torch.Tensor:
    """Latents (B, channels, generated frames, h, w); see `sample_frames`."""
    return torch.stack(list(sample_frames(model, sampler, **options)), dim=2)


class Repeated:
    """Repeats work as a graph does: it reads the tensors of the first time, wherever they are."""

    def __init__(self, work):
        self._work = work
        self.output = work().clone()

    def replay(self):
        self.output.copy_(self._work())


def repeating_graphs() -> SamplingGraphs:
    """Graphs of a stand-in that needs no GPU."""
    return SamplingGraphs(Repeated)
