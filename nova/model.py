"""The NOVA transformer: two encoders, the diffusion MLP, and the embeddings around them.

Parameter names are the reference's. The methods are pure: what a run needs to remember (caches,
latents, orders) is held by the caller.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nova_kernels import frame_scale_shift
from nova_kernels.dispatch import OTHERWISE, check_backend

from .altered_layers import is_plain
from .config import EncoderConfig, ModelConfig
from .head import DiffusionMLP
from .layers import Block, KeyValueCache, PatchEmbed, Rotary
from .positions import frame_times, rotary_angles, sincos_1d, sincos_2d

NUM_CLASSES = 1000
NULL_CLASS = 1000
NULL_PROMPT_ROWS = 512
DEFAULT_MOTION_FLOW = 5.0
DEFAULT_FPS = 12.0


def _projector(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))


class TextEmbed(nn.Module):
    """Prompt embeddings of a language model -> tokens. `weight` is the null / padding prompt."""

    weight: Tensor

    def __init__(self, token_dim: int, dim: int, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.proj = nn.Linear(token_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.register_buffer("weight", torch.randn(NULL_PROMPT_ROWS, token_dim) * 0.02)

    def forward(self, prompts: Tensor) -> Tensor:
        """(batch, num_tokens, token_dim) padded prompts -> (batch, num_tokens, dim)."""
        return self.norm(self.proj(prompts))

    def pad(self, prompts: list[Tensor]) -> Tensor:
        """Put prompts (n_i, token_dim), n_i <= num_tokens, over the null prompt's first rows."""
        padded = self.weight[: self.num_tokens].repeat(len(prompts), 1, 1)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt.to(row)
        return padded


class LabelEmbed(nn.Module):
    """Class labels -> one token each; label 1000 is the null class."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_CLASSES + 1, dim) * 0.02)
        self.norm = nn.LayerNorm(dim)

    def forward(self, labels: Tensor) -> Tensor:
        """(batch,) integers in 0..1000 -> (batch, 1, dim)."""
        return self.norm(self.weight[labels])[:, None]


class MotionEmbed(nn.Module):
    """Motion score and frame rate -> two tokens."""

    def __init__(self, dim: int):
        super().__init__()
        self.flow_proj = _projector(dim)
        self.fps_proj = _projector(dim)

    def forward(self, flow: Tensor, fps: Tensor) -> Tensor:
        """(batch,) mean optical flow and frames per second -> (batch, 2, dim)."""
        dtype = self.flow_proj[0].weight.dtype
        flow_token = self.flow_proj(sincos_1d(flow).to(dtype))
        fps_token = self.fps_proj(sincos_1d(fps).to(dtype))
        return torch.stack([flow_token, fps_token], dim=1)


class TimeEmbed(nn.Module):
    """Absolute time positions of the video encoder."""

    def __init__(self, dim: int):
        super().__init__()
        self.time_proj = _projector(dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, times: Tensor) -> Tensor:
        """(frames,) of `positions.frame_times` -> (frames, dim)."""
        dtype = self.norm.weight.dtype
        return self.norm(self.time_proj(sincos_1d(times).to(dtype)))


class MaskEmbed(nn.Module):
    """The tokens that stand for "no frame yet" and "not revealed yet"."""

    def __init__(self, dim: int):
        super().__init__()
        self.bos_token = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(1, dim) * 0.02)


class Mixer(nn.Module):
    """Scaling and shift layer: modulates frame 0's features by frame t's.

    Args:
        rank: of the projection; negative for full rank.

    Attributes:
        backend: of the ops, see `nova_kernels.dispatch`.
    """

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.backend = "auto"
        self.lora = nn.Linear(dim, rank, bias=False) if rank > 0 else nn.Identity()
        self.proj = nn.Linear(rank if rank > 0 else dim, 2 * dim)

    def forward(self, first: Tensor, current: Tensor) -> Tensor:
        """first * (1 + scale(current)) + shift(current); both (..., dim), broadcast."""
        if is_plain(self.lora, has_bias=False) and is_plain(self.proj):
            weights = self.lora.weight, self.proj.weight, self.proj.bias
            return frame_scale_shift(first, current, *weights, backend=self.backend)
        scale, shift = self.proj(self.lora(F.silu(current))).chunk(2, dim=-1)
        return first * (1 + scale) + shift


class Encoder(nn.Module):
    """A vision transformer: patch embedding, post-norm blocks, final norm, maybe a mixer."""

    def __init__(self, config: EncoderConfig, image_dim: int, patch_size: int):
        super().__init__()
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(image_dim, dim, patch_size)
        self.blocks = nn.ModuleList(Block(dim, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)


class NOVATransformer(nn.Module):
    """Video encoder (frame by frame), image encoder (set by set), diffusion MLP (token by token).

    Shapes below: B batch, P prefix tokens (text or label, and motion), C frame tokens and N image
    tokens a frame, E width.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        dim = config.image_encoder.embed_dim
        patch = config.patch_size
        if config.text_token_dim:
            self.text_embed = TextEmbed(config.text_token_dim, dim, config.text_token_len)
        else:
            self.label_embed = LabelEmbed(dim)
        if config.is_video:
            self.motion_embed = MotionEmbed(dim)
        if not config.rotary_pos_embed:
            self.video_pos_embed = TimeEmbed(dim)
        self.mask_embed = MaskEmbed(dim)
        self.video_encoder = Encoder(config.video_encoder, config.image_dim, 2 * patch)
        if config.video_mixer_rank:
            self.video_encoder.mixer = Mixer(dim, config.video_mixer_rank)
        self.image_encoder = Encoder(config.image_encoder, config.image_dim, patch)
        head = config.image_decoder
        self.image_decoder = DiffusionMLP(head.depth, head.embed_dim, dim, patch, config.image_dim)

    def set_backend(self, backend: str) -> None:
        """Choose the implementation of all ops: "auto", "reference", "triton", "cuda" or "cpp".

        What a named one cannot do (`nova_kernels.report()` tells) raises when it is called.
        "cuda" is for the diffusion MLP; the encoders, whose attention is not written in CUDA, run
        in Triton then. "cpp" is for the denoise loop of sampling on a CPU, and all else runs in the
        reference.

        Raises:
            ValueError: there is no such backend.
        """
        check_backend(backend)
        elsewhere = OTHERWISE.get(backend, backend)
        # Of the C++ ops the loop is the only one.
        head = self.image_decoder
        in_head = {head} if backend == "cpp" else set(head.modules())
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = backend if module in in_head else elsewhere

    def compile_blocks(self, **options: Any) -> None:
        """Compile the blocks of the image encoder and of the diffusion MLP by torch.compile.

        They are compiled when they first run, one code for all lengths of a sequence. The video
        encoder, which runs once a frame, stays as it is; the denoise loop of sampling is not made
        of the MLP's blocks (`PreparedHead`), that of training is.

        torch keeps a few variants of the code for all models of a process; `torch.compiler.reset()`
        forgets them. Tune (`nova.tune`) before.

        Args:
            options: of `torch.compile`; `dynamic=True` unless they say otherwise.
        """
        for block in (*self.image_encoder.blocks, *self.image_decoder.blocks):
            block.compile(**{"dynamic": True, **options})

    @property
    def has_compiled_blocks(self) -> bool:
        """Whether `compile_blocks` was called."""
        return any(block._compiled_call_impl for block in self.image_encoder.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.mask_embed.mask_token.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mask_embed.mask_token.device

    # Video encoder ---------------------------------------------------------------------------

    def video_positions(self, num_frames: int) -> Tensor | None:
        """(num_frames, C, E): time embedding + 2D table of every frame; None with rotary."""
        if self.config.rotary_pos_embed:
            return None
        _, height, width = self.config.video_base_size
        times = frame_times(num_frames, self.config.time_base, self.device)
        table = sincos_2d(height, width, self.mask_embed.bos_token.shape[-1], self.device)
        return self.video_pos_embed(times)[:, None] + table.to(self.dtype)

    def video_rotary(self, num_frames: int) -> Tensor | None:
        """(num_frames * C, head_dim / 2) rotary angles; None with absolute positions."""
        if not self.config.rotary_pos_embed:
            return None
        _, height, width = self.config.video_base_size
        head_dim = self.config.video_encoder.head_dim
        return rotary_angles(num_frames, height, width, head_dim, self.device)

    def embed_frames(self, latents: Tensor, positions: Tensor | None) -> Tensor:
        """Frame tokens of latents (B, channels, T, h, w) that have `positions` (T, C, E).

        Returns:
            (B, T, C, E).
        """
        batch, _, frames = latents.shape[:3]
        tokens = self.video_encoder.patch_embed(latents.transpose(1, 2).flatten(0, 1))
        tokens = tokens.unflatten(0, (batch, frames))
        return tokens if positions is None else tokens + positions

    def embed_first_frame(self, batch_size: int, positions: Tensor | None) -> Tensor:
        """(B, 1, C, E): the input of frame 0, the bos token (+ positions (1, C, E))."""
        bos = self.mask_embed.bos_token
        if positions is None:
            return bos.expand(batch_size, 1, self.config.num_frame_tokens, -1)
        return (bos + positions).expand(batch_size, -1, -1, -1)

    def encode_video(
        self,
        tokens: Tensor,
        *,
        rotary: Rotary | None = None,
        caches: list[KeyValueCache] | None = None,
        block_lengths: list[int] | None = None,
    ) -> Tensor:
        """Blocks and final norm on (B, tokens, E); `caches`, one a block, hold earlier frames."""
        encoder = self.video_encoder
        for i, block in enumerate(encoder.blocks):
            cache = caches[i] if caches is not None else None
            tokens = block(tokens, rotary=rotary, cache=cache, block_lengths=block_lengths)
        return encoder.norm(tokens)

    def mix(self, first: Tensor, current: Tensor) -> Tensor:
        """The image encoder's condition for a frame t > 0, from the video encoder's outputs."""
        mixer = getattr(self.video_encoder, "mixer", None)
        return current if mixer is None else mixer(first, current)

    # Image encoder ---------------------------------------------------------------------------

    def image_positions(self) -> Tensor | None:
        """(N, E) 2D table; None with rotary."""
        if self.config.rotary_pos_embed:
            return None
        height, width = self.config.image_base_size
        dim = self.mask_embed.bos_token.shape[-1]
        return sincos_2d(height, width, dim, self.device).to(self.dtype)

    def image_rotary(self) -> Tensor | None:
        """(N, head_dim / 2) rotary angles; None with absolute positions."""
        if not self.config.rotary_pos_embed:
            return None
        height, width = self.config.image_base_size
        return rotary_angles(1, height, width, self.config.image_encoder.head_dim, self.device)

    def encode_image(
        self,
        cond: Tensor,
        revealed: Tensor,
        masked: Tensor,
        *,
        rotary: Rotary | None = None,
        rows: slice | None = None,
        blocks: Sequence[Block] | None = None,
    ) -> Tensor:
        """First half of the blocks on [cond, revealed], second half on [cond, revealed, masked].

        Tokens carry their positions already (or in `rotary`), so their order is the caller's.

        Args:
            cond: (B, C, E) the frame's condition.
            revealed: (B, n, E) embedded tokens that are known.
            masked: (B, N - n, E) mask tokens of the others.
            rotary: table of all C + N tokens in the order [cond, revealed, masked].
            rows: among the N image tokens, those wanted; None: all.
            blocks: in place of the encoder's own, see `packed_blocks`.

        Returns:
            (B, rows or N, E), after the final norm.
        """
        blocks = self.image_encoder.blocks if blocks is None else blocks
        half = len(blocks) // 2
        x = torch.cat([cond, revealed], dim=1)
        first_rotary = None if rotary is None else rotary.slice(0, x.shape[1])
        for block in blocks[:half]:
            x = block(x, rotary=first_rotary)
        x = torch.cat([x, masked], dim=1)
        for block in blocks[half:-1]:
            x = block(x, rotary=rotary)
        offset = cond.shape[1]
        first, last = (
            (offset, x.shape[1]) if rows is None else (offset + rows.start, offset + rows.stop)
        )
        # Only the wanted tokens leave the last block, so only they need queries and an MLP there.
        wanted = blocks[-1](
            x,
            rotary=rotary,
            queries=x[:, first:last],
            query_rotary=None if rotary is None else rotary.slice(first, last),
        )
        return self.image_encoder.norm(wanted)
