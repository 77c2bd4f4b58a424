"""NOVAPipeline: from a checkpoint folder and a prompt to images or video frames."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nova_kernels.dispatch import check_backend

from . import inputs
from .batch_splitting import BatchParts
from .checkpoint import expand_home, find_folder
from .codec import LatentCodec
from .conditioning import Conditioning
from .config import ModelConfig
from .devices import PeakMemory, check_device, check_dtype, free_memory, out_of_memory
from .engine import SamplingGraphs
from .errors import DeviceError, InputError
from .folders import LOAD, load_parts, save_parts
from .generation_config import GenerationConfig
from .model import NOVATransformer
from .noise import NoiseSource
from .outputs import NOVAPipelineOutput, StreamedFrames, convert_pixels, join_in_time, join_samples
from .request import Request
from .run import Run
from .sampling import SetEnd, generate_frames
from .schedule import SchedulerConfig, set_sizes
from .side_stream import SideStream, side_stream
from .step_hooks import Interrupted, StepCallback, StepProgress
from .streaming import Piece, decode_beside, decode_in_turn, pixels_of
from .text import TextEncoder
from .tuning.tuner import AppliedTuning

# 33 frames, what the released video model was trained for; its time base (16) is longer.
DEFAULT_LATENT_FRAMES = 9


class NOVAPipeline:
    """Samples NOVA: text to image, text to video, class to image, image or clip to video.

    Args:
        transformer: the model.
        scheduler: how it denoises.
        vae: latents <-> pixels; None: only output_type "latent".
        text_encoder: prompts -> embeddings; None: give prompt_embeds (or class labels).
        generation_config: options of calls that leave them open; None: the reference's.
    """

    def __init__(
        self,
        transformer: NOVATransformer,
        scheduler: SchedulerConfig,
        vae: LatentCodec | None = None,
        text_encoder: TextEncoder | None = None,
        generation_config: GenerationConfig | None = None,
    ):
        self.transformer = transformer.eval().requires_grad_(False)
        self.scheduler = scheduler
        self.vae = vae
        self.text_encoder = text_encoder
        self.generation_config = generation_config or GenerationConfig()
        self._offload_device: torch.device | None = None
        self._users: Counter[str] = Counter()
        self.graphs: SamplingGraphs | None = None
        self.tuning: AppliedTuning | None = None
        self._progress_bar_config: dict[str, Any] = {}
        # As diffusers' pipelines have it: set by callbacks, and by others, to stop what runs.
        self._interrupt = False

    # Opening and saving ----------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        torch_dtype: torch.dtype | None = None,
        text_encoder: TextEncoder | None | str = LOAD,
        vae: LatentCodec | None | str = LOAD,
        variant: str | None = None,
        allow_pickle: bool = False,
        backend: str = "auto",
        **hub_options: Any,
    ) -> "NOVAPipeline":
        """Open a checkpoint folder in the format of the released ones, a hub id, or "shapes".

        That is the small model that comes with this package (docs/shapes_model.md).
        model_index.json and the configs are read as data, whatever classes they name.

        Args:
            torch_dtype: of all parts; None: float32.
            text_encoder, vae: used in place of the folder's; None leaves the part out (a text
                encoder of 2.7B parameters is not needed when prompt_embeds are given).
            variant: of the transformer's weight files, such as "fp16".
            allow_pickle: also read .bin weights, their tensors only.
            backend: implementation of the transformer's ops, see `NOVATransformer.set_backend`.
            hub_options: revision, cache_dir, token, local_files_only.

        Raises:
            CheckpointError, ConfigError: what is wrong with which file.
            InputError: another option, or a dtype that is none of floating point.
            DependencyError: an SD / SDXL VAE without diffusers.
            ValueError: an unknown backend.
        """
        check_backend(backend)
        check_dtype(torch_dtype, "torch_dtype")
        folder = find_folder(name_or_path, allow_pickle=allow_pickle, **hub_options)
        dtype = torch.float32 if torch_dtype is None else torch_dtype
        options = {"variant": variant, "allow_pickle": allow_pickle}
        parts = load_parts(folder, dtype, vae=vae, text_encoder=text_encoder, **options)
        pipeline = cls(*parts, GenerationConfig.read(folder))
        pipeline.transformer.set_backend(backend)
        return pipeline

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the folder that `from_pretrained` opens, in the layout of the released ones."""
        folder = expand_home(folder)
        parts = self.transformer, self.scheduler, self.vae, self.text_encoder
        save_parts(folder, *parts, self.generation_config)

    # Devices ---------------------------------------------------------------------------------

    @property
    def config(self) -> ModelConfig:
        """The transformer's geometry."""
        return self.transformer.config

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def device(self) -> torch.device:
        """Where sampling runs."""
        return self._offload_device or self.transformer.device

    def to(
        self,
        device: str | torch.device | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        text_encoder: bool = True,
    ) -> "NOVAPipeline":
        """Move all parts to a device, a dtype, or both.

        Args:
            text_encoder: False leaves the text encoder where it is, as on the CPU.

        Raises:
            DeviceError: the device is absent, or has too little memory.
            InputError: a dtype that is none of floating point.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        check_dtype(dtype, "dtype")
        if device is not None:
            device = check_device(device)
            self._offload_device = None
        with out_of_memory("moving the model"):
            for name, module in self._modules().items():
                if name == "vae":
                    self.vae.to(device, dtype)
                elif name != "text_encoder" or text_encoder:
                    module.to(device=device, dtype=dtype)
        if self.tuning is not None and not self.tuning.fits(self.transformer):
            self.undo_tuning()
        self._clear_graphs()
        if self.device.type != "cuda":
            self.graphs = None
        return self

    def enable_cuda_graphs(self) -> None:
        """Record the set loop and the video encoder into CUDA graphs as they run, and replay them.

        That takes away the time of hundreds of launches a step, which is most of it in small
        batches. Graphs are kept for calls of the same sizes and sampler settings, and take memory;
        `disable_cuda_graphs` frees it, and so does offloading.

        Raises:
            DeviceError: the pipeline is not on a GPU.
        """
        if self.device.type != "cuda":
            raise DeviceError(
                f"CUDA graphs need a GPU, and this pipeline is on {self.device}; move it first: "
                'pipe.to("cuda")'
            )
        self._clear_graphs()
        self.graphs = SamplingGraphs()

    def disable_cuda_graphs(self) -> None:
        """Drop the graphs."""
        self._clear_graphs()
        self.graphs = None

    def _clear_graphs(self) -> None:
        """Free what the graphs hold now: Python would free it at some later time."""
        if self.graphs is not None:
            self.graphs.clear()

    def undo_tuning(self) -> None:
        """Run again as before `nova.tune`."""
        if self.tuning is not None:
            self.tuning.undo()
        self.tuning = None

    def enable_model_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Keep all parts on the CPU, each on `device` only while it works; without CUDA graphs."""
        self._offload_device = check_device(device)
        if self._offload_device.type == "cuda":
            # Nothing moves there yet, and before that torch has no count of its memory to reset.
            torch.cuda.init()
        self.disable_cuda_graphs()
        self.undo_tuning()
        for module in self._modules().values():
            module.to("cpu")

    def _modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"transformer": self.transformer}
        if self.vae is not None:
            modules["vae"] = self.vae.module
        if self.text_encoder is not None:
            modules["text_encoder"] = self.text_encoder.module
        return modules

    @contextlib.contextmanager
    def _working(self, *names: str) -> Iterator[None]:
        """The named parts are on the offload device inside, if offloading is on."""
        if self._offload_device is None:
            yield
            return
        modules = {name: m for name, m in self._modules().items() if name in names}
        # Runs may be inside of each other, or in turns: who comes last moves a part back.
        self._users.update(modules.keys())
        try:
            with out_of_memory("moving the model"):
                for module in modules.values():
                    module.to(self._offload_device)
            yield
        finally:
            self._users.subtract(modules.keys())
            for name, module in modules.items():
                if not self._users[name]:
                    module.to("cpu")

    @contextlib.contextmanager
    def transformer_on_device(self) -> Iterator[NOVATransformer]:
        """The transformer, inside on the device where sampling runs, if offloading is on."""
        with self._working("transformer"):
            yield self.transformer

    # Sampling --------------------------------------------------------------------------------

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of the tqdm bars, such as disable=True."""
        self._progress_bar_config = options

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> list[Tensor]:
        """Embeddings (n_i, text_token_dim) of prompts, which `prompt_embeds` takes."""
        if self.text_encoder is None:
            raise InputError(
                "this pipeline has no text encoder: give prompt_embeds, or open a checkpoint that "
                "has text_encoder/ and tokenizer/"
            )
        elsewhere = "fewer prompts at a time", "pipe.to(device, text_encoder=False)"
        with self._working("text_encoder"), out_of_memory("encoding the prompt", *elsewhere):
            embeds = self.text_encoder.encode(prompts)
        return [embed.to(self.device, self.dtype) for embed in embeds]

    def __call__(
        self,
        prompt: Any = None,
        num_inference_steps: int | None = None,
        num_diffusion_steps: int | None = None,
        max_latent_length: int | None = None,
        guidance_scale: float | None = None,
        *,
        overlap_decoding: bool = False,
        **options: Any,
    ) -> NOVAPipelineOutput:
        """Generate a batch of images or clips.

        Where memory does not suffice for `max_batch_size` samples at a time, half as many are
        tried, with the same noise, and a `BatchSplitWarning` says what worked.

        Args:
            overlap_decoding: on a GPU, decode the first frames of clips while the next are
                generated, on a CUDA stream of its own. The same result, with more memory: the VAE's
                and the sampler's at once, for `max_batch_size` samples, which are not split
                further.
            options: all of them are described at `nova.Request`. What is left out is as
                `generation_config` says.

        Raises:
            NovaError: of the kind that fits, saying what to do; `DeviceError` for
                `overlap_decoding` without a GPU.
        """
        request = self.generation_config.request(
            prompt,
            num_inference_steps=num_inference_steps,
            num_diffusion_steps=num_diffusion_steps,
            max_latent_length=max_latent_length,
            guidance_scale=guidance_scale,
            **options,
        )
        side = side_stream(self.device) if overlap_decoding else None
        peak = PeakMemory(self.device)
        run = self._prepare(request)
        is_video = run.num_frames > 1
        if is_video and side is not None and run.output_type != "latent":
            latents, shown, max_batch_size = self._sample_and_decode(run, side)
        else:
            latents, max_batch_size = self._sample(run)
            shown = latents if is_video else latents[:, :, 0]
            if run.output_type != "latent":
                shown = self._decode(shown, request)
        return NOVAPipelineOutput(
            **{"frames" if is_video else "images": shown},
            latents=latents,
            max_batch_size=max_batch_size,
            peak_memory=peak.read(),
        )

    def stream(
        self, prompt: Any = None, *, overlap_decoding: bool = False, **options: Any
    ) -> Iterator[StreamedFrames]:
        """Generate as a call does, and yield after every latent frame what is finished.

        Takes the options of a call. The pixel frames put together equal those of the call; given
        frames come with the first piece. The VAE finishes frames a tile at a time; after
        `pipe.vae.module.tile_latents = 2`, every latent frame from the second on gives its pixels
        at once, and with `pipe.vae.module.first_frame_alone = True` so does the first (calls use
        these settings too, so both stay equal). With `max_batch_size`, the frames
        of the first part's samples come first, then those of the next: see
        `StreamedFrames.samples`. A stream does not split a batch by itself.

        Args:
            overlap_decoding: decode on a CUDA stream of its own while the next frame is generated.
                The same items, each one latent frame later. This takes more memory: the VAE's and
                the sampler's at once.

        Raises:
            NovaError: see `__call__`.
            DeviceError: `overlap_decoding` without a GPU; too little memory.
        """
        side = side_stream(self.device) if overlap_decoding else None
        run = self._prepare(self.generation_config.request(prompt, **options))
        return self._stream(run, side)

    def _prepare(self, request: Request) -> Run:
        """Check a request against this model, and encode its prompts and pictures."""
        self._interrupt = False  # of a run before; from here on it stops this one
        num_frames = request.max_latent_length
        if num_frames is None:
            num_frames = min(DEFAULT_LATENT_FRAMES, self.config.time_base)
        if request.output_type != "latent" and self.vae is None:
            raise InputError(
                'this pipeline has no VAE: ask for output_type="latent", or open a checkpoint that '
                "has vae/"
            )
        if request.output_type != "latent" and num_frames > 1 and not self.vae.is_video:
            raise InputError(
                "this pipeline's VAE is of images: ask for max_latent_length=1, or for "
                'output_type="latent"'
            )
        inputs.note_dtype(self.device, self.dtype)
        schedule = self.scheduler.schedule(request.num_diffusion_steps, request.flow_shift)
        sizes = set_sizes(self.config.num_image_tokens, request.num_inference_steps)
        conditioning = self._condition(request)
        batch = conditioning.batch_size
        noise = NoiseSource(request.generator, batch, dtype=self.dtype, device=self.device)
        given = self._given_latents(request, batch)
        if given is not None:
            # A copy: parts of the batch and items of a stream may be computed much later.
            given = given.detach().to(conditioning.tokens, copy=True)
        samples = range(batch)
        return Run(request, num_frames, sizes, schedule, conditioning, noise, given, batch, samples)

    @torch.no_grad()
    def _condition(self, request: Request) -> Conditioning:
        config, guidance, each = self.config, request.guidance, request.num_images_per_prompt
        motion = {"motion_flow": request.motion_flow, "fps": request.fps}
        if not config.text_token_dim:
            labels = inputs.class_labels(request.prompt, request.negative_prompt, each)
            with self._working("transformer"), out_of_memory("embedding the labels"):
                return Conditioning.from_labels(self.transformer, *labels, guidance, **motion)
        embeds, negative_embeds = self._prompt_embeds(request)
        with self._working("transformer"), out_of_memory("embedding the prompt"):
            text_embed = self.transformer.text_embed
            prompts = inputs.padded_prompts(embeds, text_embed, each)
            negatives = None
            if negative_embeds is not None:
                negatives = inputs.padded_prompts(negative_embeds, text_embed, each)
            return Conditioning.from_text(self.transformer, prompts, negatives, guidance, **motion)

    def _prompt_embeds(self, request: Request) -> tuple[list[Tensor], list[Tensor] | None]:
        """Embeddings of prompts and of negative prompts (None: the null prompt)."""
        if request.prompt_embeds is None:
            embeds, prompts = None, inputs.check_prompts(request.prompt)
            count = len(prompts)
        else:
            if request.prompt is not None:
                raise InputError("give prompt or prompt_embeds, not both")
            embeds = inputs.check_embeddings(request.prompt_embeds, self.config, "prompt_embeds")
            prompts, count = [], len(embeds)
        negatives = None
        if request.guidance.passes > 1 and request.negative_prompt_embeds is None:
            negatives = inputs.check_negative_prompts(request.negative_prompt, count)
        # One pass of the text encoder for both.
        texts = prompts + (negatives or [])
        encoded = self.encode_prompt(texts) if texts else []
        embeds = encoded[:count] if embeds is None else embeds
        if request.negative_prompt_embeds is not None:
            negative_embeds = inputs.check_embeddings(
                request.negative_prompt_embeds, self.config, "negative_prompt_embeds"
            )
            negative_embeds *= count if len(negative_embeds) == 1 else 1
            if len(negative_embeds) != count:
                raise InputError(f"negative_prompt_embeds needs one entry for each of {count}")
            return embeds, negative_embeds
        return embeds, encoded[len(prompts) :] if negatives is not None else None

    @torch.no_grad()
    def _given_latents(self, request: Request, batch: int) -> Tensor | None:
        """Latents (batch, channels, K, h, w) to go on from, or None."""
        for name in ("latents", "image", "video"):
            if getattr(request, name) is not None and not self.config.is_video:
                raise InputError(f"this is an image model, which goes on from nothing: no {name}")
        if request.latents is not None:
            return inputs.given_latents(request.latents, batch)
        if request.image is None and request.video is None:
            return None
        if self.vae is None:
            raise InputError("this pipeline has no VAE to encode pictures with: give latents")
        if request.image is not None:
            pixels = inputs.image_pixels(request.image, self.config.image_size)
        else:
            # One rate for all samples is what a file can be read at.
            rates = request.fps if isinstance(request.fps, list | tuple) else [request.fps]
            pixels = inputs.video_pixels(
                request.video, self.config.image_size, rates[0], self.vae.temporal_factor
            )
        generator = request.generator
        if isinstance(generator, list | tuple):
            # One draw a sample, from its own generator.
            pixels = inputs.repeat_to_batch(pixels, batch, "image")
        with self._working("vae"), self._vae_out_of_memory("encoding the given frames"):
            latents = self.vae.encode(pixels, generator)
        latents = latents[:, :, None] if latents.dim() == 4 else latents
        return inputs.repeat_to_batch(latents, batch, "image")

    def _sample(self, run: Run) -> tuple[Tensor, int]:
        """Latents (B, channels, T, h, w) of a call, and how many samples fit at a time."""
        parts = BatchParts(
            run.batch_size,
            run.request.max_batch_size,
            doing="sampling",
            advice="Give max_batch_size={size} (nova generate: --batch-size {size}) to start so.",
            free_memory=self._free_memory,
        )
        states = run.noise.states()

        def sample_part(start: int, stop: int) -> Tensor:
            return torch.stack(list(self._frames(run.part(start, stop, states))), dim=2)

        latents = []
        with self._working("transformer"), self._sampling_out_of_memory():
            for part in parts.run(sample_part):
                latents.append(part)
                if run.stopped.is_set():
                    break
        return run.join(latents), parts.size

    def _decode(self, latents: Tensor, request: Request) -> Any:
        """Pixels in the output type of latents (B, channels, h, w) or (B, channels, T, h, w)."""
        parts = BatchParts(
            len(latents),
            request.vae_batch_size,
            doing="decoding",
            advice="Give vae_batch_size={size} to start so.",
            free_memory=self._free_memory,
        )

        @torch.no_grad()
        def decode_part(start: int, stop: int) -> Any:
            pixels = self.vae.decode(latents[start:stop], batch_size=stop - start)
            # At once: most output types are smaller, and not on the GPU.
            return convert_pixels(pixels, request.output_type)

        with self._working("vae"), self._vae_out_of_memory("decoding the latents"):
            return join_samples(list(parts.run(decode_part)))

    def _sample_and_decode(self, run: Run, side: SideStream) -> tuple[Tensor, Any, int]:
        """Latents, pixels in the output type, and samples at a time, from an overlapped stream."""
        parts: dict[range, list[StreamedFrames]] = {}
        for item in self._stream(run, side):
            parts.setdefault(item.samples, []).append(item)
        latents = run.join(
            [torch.stack([item.latents for item in items], dim=2) for items in parts.values()]
        )
        size = min(run.request.max_batch_size or run.batch_size, run.batch_size)
        if run.stopped.is_set():
            # Parts may be short or missing: pixels of all that there is, as without overlapping.
            return latents, self._decode(latents, run.request), size
        clips = [join_in_time([item.frames for item in items]) for items in parts.values()]
        return latents, join_samples(clips), size

    def _free_memory(self) -> None:
        """After an attempt that ran out of memory; graphs of its sizes are of no use any more."""
        self._clear_graphs()
        free_memory(self.device)

    def _sampling_out_of_memory(self, *remedies: str) -> contextlib.AbstractContextManager:
        graphs = [] if self.graphs is None else ["disable_cuda_graphs()"]
        frames = [] if not self.config.is_video else ["fewer latent frames", "context_frames"]
        return out_of_memory("sampling", *remedies, *frames, *graphs)

    def _vae_out_of_memory(self, doing: str) -> contextlib.AbstractContextManager:
        graphs = [] if self.graphs is None else ["disable_cuda_graphs()"]
        return out_of_memory(doing, "vae.module.enable_tiling()", *graphs)

    def _stream(self, run: Run, side: SideStream | None) -> Iterator[StreamedFrames]:
        """What `stream` yields, one part of the batch after the other."""
        states = run.noise.states()
        size = run.request.max_batch_size or run.batch_size
        with self._working("transformer", "vae"), side or contextlib.nullcontext():
            for start in range(0, run.batch_size, size):
                stop = min(start + size, run.batch_size)
                yield from self._stream_part(run.part(start, stop, states), side)
                if run.stopped.is_set():
                    return

    def _stream_part(self, run: Run, side: SideStream | None) -> Iterator[StreamedFrames]:
        pieces = self._pieces(run)
        if run.output_type == "latent":
            yield from (piece.with_frames(piece.fresh) for piece in pieces)
            return
        decoder = self.vae.stream()

        def decode(piece: Piece) -> Tensor:
            with self._vae_out_of_memory("decoding the latents"):
                return pixels_of(decoder, piece)

        def convert(pixels: Tensor) -> Any:
            with self._vae_out_of_memory("decoding the latents"):
                return convert_pixels(pixels, run.output_type)

        if side is None:
            yield from decode_in_turn(pieces, decode, convert)
        else:
            yield from decode_beside(pieces, decode, convert, side)

    def _pieces(self, run: Run) -> Iterator[Piece]:
        """Generated frames as a streaming decoder takes them."""
        pending = run.given_frames
        fewer = ["a smaller max_batch_size"] if len(run.samples) > 1 else []
        with self._sampling_out_of_memory(*fewer):
            for index, latents in enumerate(self._frames(run), start=len(pending)):
                is_last = index == run.num_frames - 1 or run.stopped.is_set()
                fresh = torch.stack([*pending, latents], dim=2)
                pending = []
                yield Piece(index, latents, fresh, is_last, run.samples)

    def _frames(self, run: Run) -> Iterator[Tensor]:
        """Generated latent frames of a run, with a progress bar and the callback."""
        num_new = run.num_frames - len(run.given_frames)
        options = dict(self._progress_bar_config)
        if run.request.disable_progress_bar:
            options["disable"] = True
        callback = None
        if run.request.callback_on_step_end is not None:
            callback = StepCallback(self, run.request, run.samples)
        with StepProgress(num_new, len(run.set_sizes), options, run.part_name) as progress:

            def on_set_end(step: SetEnd) -> Tensor | None:
                progress.update(step)
                replaced = None if callback is None else callback(step)
                if self._interrupt:
                    self._interrupt = False  # other runs of this pipeline go on
                    run.stopped.set()
                    raise Interrupted(step.latents if replaced is None else replaced)
                return replaced

            frames = generate_frames(
                self.transformer,
                run.conditioning,
                num_frames=run.num_frames,
                set_sizes=run.set_sizes,
                schedule=run.schedule,
                guidance=run.request.guidance,
                noise=run.noise,
                given_latents=run.given,
                context_frames=run.request.context_frames,
                on_set_end=on_set_end,
                graphs=self.graphs,
            )
            try:
                yield from frames
            except Interrupted as stopped:
                # As diffusers does: what there is so far is returned, unfinished as it is.
                yield stopped.latents.clone()
