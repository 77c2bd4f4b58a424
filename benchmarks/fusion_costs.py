"""What fusing the activations would save a video: predicted from counted bytes, not measured.

    python benchmarks/fusion_costs.py

Counts the values that two activations of the model pass over in a video: GELU between the two
layers of every encoder MLP, and SiLU behind every GroupNorm of the VAE decoder. A pass reads or
writes all of them once; its time is its bytes by the bandwidth of the data sheet. The matrix
products and convolutions around them read and write as much in either form and are not counted.
What is printed stands in docs/kernels.md, beside what was measured of it.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from ceilings import CARDS, Ceilings
from torch import Tensor, nn
from work_counts import Work, sampling_work

from nova.config import ModelConfig, named_config
from nova.guidance import Guidance
from nova.schedule import FlowMatchConfig, set_sizes
from nova.vae import CausalVideoVAE, VAEConfig
from nova.vae.layers import Attention

GEOMETRY = "nova-d48w1024-osp480"
NUM_FRAMES, NUM_STEPS, NUM_DIFFUSION_STEPS = 9, 64, 25  # latent frames of 33, A, D
PASSES = 2  # guidance
BYTES = 2  # of a bfloat16 value


@dataclass(frozen=True)
class Fusion:
    """A fusion, and how often all `values` are read or written without and with it."""

    name: str
    values: int
    passes_now: int
    passes_fused: int

    @property
    def bytes_now(self) -> int:
        return self.values * self.passes_now * BYTES

    @property
    def bytes_fused(self) -> int:
        return self.values * self.passes_fused * BYTES

    def seconds_saved(self, ceilings: Ceilings) -> float:
        return (self.bytes_now - self.bytes_fused) / ceilings.bandwidth


def mlp_rows(config: ModelConfig, num_frames: int, num_steps: int, passes: int) -> int:
    """Rows that go through the MLPs of both encoders while a video is sampled.

    Args:
        num_frames: latent frames. num_steps: A. passes: of guidance.
    """
    sizes = set_sizes(config.num_image_tokens, num_steps)
    revealed = [0, *accumulate(sizes)][:-1]  # before every set
    condition, depth = config.num_frame_tokens, config.image_encoder.depth
    half = depth // 2
    first_half = half * sum(condition + n for n in revealed)
    second_half = (depth - half - 1) * len(sizes) * (condition + config.num_image_tokens)
    last_block = sum(sizes)  # only a set's rows leave it
    image = num_frames * (first_half + second_half + last_block)
    prefix = (config.text_token_len or 1) + (2 if config.is_video else 0)
    video = config.video_encoder.depth * (prefix + num_frames * condition)
    return passes * (image + video)


def mlp_values(config: ModelConfig, num_frames: int, num_steps: int, passes: int) -> int:
    """Values between the two layers of these MLPs, which are four times as wide as the encoder."""
    rows = mlp_rows(config, num_frames, num_steps, passes)
    return rows * 4 * config.image_encoder.embed_dim


def norm_silu_values(config: VAEConfig, latent_shape: tuple[int, int, int]) -> int:
    """Values that go through a GroupNorm and a SiLU while a video is decoded.

    Args:
        latent_shape: (frames, height, width) of the latents.
    """
    counts = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts.append(output.numel())

    # Tensors without memory: the decoder itself says which sizes its norms see, tile by tile.
    with torch.device("meta"), torch.no_grad():
        vae = CausalVideoVAE(config, memory_budget=None)
        without_silu = {m.group_norm for m in vae.modules() if isinstance(m, Attention)}
        for module in vae.modules():
            if isinstance(module, nn.GroupNorm) and module not in without_silu:
                module.register_forward_hook(count)
        vae.decode(torch.empty(1, config.latent_channels, *latent_shape))
    return sum(counts)


def fusions() -> list[Fusion]:
    """The fusions that were weighed, for one video of the 0.6B text-to-video model."""
    config = named_config(GEOMETRY)
    hidden = mlp_values(config, NUM_FRAMES, NUM_STEPS, PASSES)
    normed = norm_silu_values(VAEConfig.osp(), (NUM_FRAMES, *config.latent_size))
    return [
        # The library's product adds the bias before it writes. What is left is GELU, which reads
        # and writes, in place too; a kernel that also adds the bias does no less.
        Fusion("bias + GELU in one kernel", hidden, 2, 2),
        # The product writes what GELU would have written.
        Fusion("GELU inside the matrix product", hidden, 2, 0),
        # GroupNorm reads for its statistics, then reads and writes; SiLU reads and writes.
        Fusion("GroupNorm + SiLU of the VAE decoder", normed, 5, 3),
    ]


def sampled_video() -> dict[str, Work]:
    """Work of sampling that video."""
    config = named_config(GEOMETRY)
    return sampling_work(
        config,
        batch=1,
        num_frames=NUM_FRAMES,
        set_sizes=set_sizes(config.num_image_tokens, NUM_STEPS),
        schedule=FlowMatchConfig().schedule(NUM_DIFFUSION_STEPS),
        guidance=Guidance(scale=5.0),
        dtype=torch.bfloat16,
    )


def break_even(product_operations: float, saved_bytes: float, ceilings: Ceilings) -> float:
    """Share of the library's rate at which a product of our own that saves these bytes pays."""
    by_library = product_operations / ceilings.rate
    return by_library / (by_library + saved_bytes / ceilings.bandwidth)


def report() -> list[str]:
    """The lines that are printed: a table in Markdown, and sentences."""
    header = ["fusion", "moves now", "fused", *(f"saves on {card.name}" for card in CARDS)]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    weighed, sampling = fusions(), sampled_video().values()
    for fusion in weighed:
        cells = [
            fusion.name,
            *(f"{n / 1e9:.0f} GB" for n in (fusion.bytes_now, fusion.bytes_fused)),
        ]
        for card in CARDS:
            saved = fusion.seconds_saved(card.ceilings)
            floor = card.ceilings.floor_seconds(sampling)
            cells.append(f"{saved:.2f} s, {100 * saved / floor:.1f} % of {floor:.1f} s")
        lines.append(f"| {' | '.join(cells)} |")

    config, inside = named_config(GEOMETRY), weighed[1]
    width = config.image_encoder.embed_dim
    rates = []
    for card in CARDS:
        share = break_even(2 * width * inside.values, inside.bytes_now, card.ceilings)
        rates.append(f"{100 * share:.0f} % ({card.name})")
    tokens = PASSES * (config.num_frame_tokens + config.num_image_tokens)
    return [
        *lines,
        f"A product with GELU inside breaks even at {' and '.join(rates)} of the library's rate.",
        f"The values between the layers of one MLP are {tokens * 4 * width * BYTES / 1e6:.0f} MB.",
    ]


if __name__ == "__main__":
    print("Predicted from counted bytes, not measured; per video of 33 x 480 x 768.")
    print(*report(), sep="\n")
