"""One line for people who have a pipeline of the reference package (diffnext) already.

    nova.accelerate(pipe)  # the same calls, weights and videos; the sampling is this package's
    print(nova.report(pipe))
    nova.restore(pipe)

Nothing of the reference is imported: its transformer is known by its config and parameters. What is
replaced is the transformer's `generate_video` on this one object; prompts, VAE, and the pipeline's
interface stay the reference's.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nova_kernels.dispatch import check_backend

from .altered_layers import is_altered, named_weights, uncompiled
from .checkpoint import load_strict
from .conditioning import Conditioning
from .config import ModelConfig
from .engine import SamplingGraphs
from .errors import InputError, NovaError
from .guidance import Guidance
from .inputs import note_dtype
from .model import NOVATransformer
from .noise import NoiseSource
from .sampling import generate_frames
from .schedule import DiffusionSchedule, scheduler_from_dict
from .step_hooks import StepProgress
from .tuning.record import TuningRecord
from .tuning.tuner import AppliedTuning

METHOD = "generate_video"
# The reference's own call runs these, before METHOD.
EMBEDDINGS = ("text_embed", "label_embed", "motion_embed")


def accelerate(
    pipe: Any, *, backend: str = "auto", cuda_graphs: bool = False, compile_blocks: bool = False
) -> Any:
    """Replace the sampling of a reference pipeline by this package's.

    Weights are shared, not copied: the pipeline may be moved, converted, fine-tuned or given other
    weights afterwards. The same seed gives the same video up to rounding.

    The transformer's modules are not run. While layers of its encoders or its diffusion MLP are
    wrapped (adapters that are not merged), have forward hooks or a replaced `forward`, calls are
    left to the reference, with a warning. Layers replaced by others with weights of the same names
    and shapes are not noticed. Under torch.autocast, where the reference fails unless its weights
    are of the same dtype, the dtype of the weights decides.

    Args:
        pipe: the reference's `NOVAPipeline` or `NOVAC2IPipeline`.
        backend: of the ops, see `NOVATransformer.set_backend`.
        cuda_graphs: see `NOVAPipeline.enable_cuda_graphs`; used on a GPU alone.
        compile_blocks: see `NOVATransformer.compile_blocks`.

    Returns:
        `pipe`, changed. Called again, it takes the new options.

    Raises:
        InputError: `pipe` is not such a pipeline; it says what is missing.
        ConfigError, CheckpointError: its transformer's config or weights are not NOVA's.
        ValueError: an unknown backend.
    """
    check_backend(backend)
    transformer = _reference_transformer(pipe)
    model = _shared_model(transformer)
    model.set_backend(backend)
    if compile_blocks:
        model.compile_blocks()
    graphs = SamplingGraphs() if cuda_graphs else None
    restore(pipe)
    setattr(transformer, METHOD, AcceleratedSampling(transformer, model, graphs))
    return pipe


def restore(pipe: Any) -> Any:
    """Undo `accelerate`; a pipeline that is as it was stays so.

    Raises:
        InputError: `pipe` is not a pipeline of the reference; it says what is missing.
    """
    transformer = _reference_transformer(pipe)
    sampling = _sampling_of(transformer)
    if sampling is not None:
        delattr(transformer, METHOD)  # its class keeps the reference's method
        if sampling.replaced is not None:
            setattr(transformer, METHOD, sampling.replaced)
    return pipe


@dataclass(frozen=True)
class SamplingReport:
    """What a pipeline samples with.

    Attributes:
        accelerated: whether this package samples.
        device, dtype: of the transformer.
        backend: that was asked for.
        compiled: whether blocks are compiled by torch.compile.
        graphs: CUDA graphs recorded so far; None: not used.
        graphs_failure: which part is not recorded, and why.
        tuning: what `nova.tune` chose.
        left_to_reference: why the last call was the reference's all the same.
    """

    accelerated: bool
    device: str
    dtype: str
    backend: str | None = None
    compiled: bool = False
    graphs: int | None = None
    graphs_failure: str | None = None
    tuning: TuningRecord | None = None
    left_to_reference: str | None = None

    def __str__(self) -> str:
        if not self.accelerated:
            return f"sampling: the reference's, {self.dtype} on {self.device}"
        lines = [f"sampling: nova, {self.dtype} on {self.device}, ops by backend={self.backend!r}"]
        if self.compiled:
            lines.append("blocks: compiled by torch.compile")
        if self.graphs is not None:
            lines.append(f"CUDA graphs: {self.graphs} recorded")
        if self.graphs_failure is not None:
            lines.append(f"no CUDA graphs of {self.graphs_failure}")
        if self.tuning is not None:
            lines.append(str(self.tuning))
        if self.left_to_reference is not None:
            lines.append(f"the last call was left to the reference: {self.left_to_reference}")
        return "\n".join(lines)


def report(pipe: Any) -> SamplingReport:
    """What a pipeline samples with; `python -m nova_kernels` tells which ops run by default.

    Args:
        pipe: of the reference, accelerated or not, or this package's `NOVAPipeline`.

    Raises:
        InputError: it is neither.
    """
    from .pipeline import NOVAPipeline

    if isinstance(pipe, NOVAPipeline):
        sampler, model, left = pipe, pipe.transformer, None
    else:
        transformer = _reference_transformer(pipe)
        sampler = _sampling_of(transformer)
        if sampler is None:
            return SamplingReport(False, str(transformer.device), _name(transformer.dtype))
        model, left = sampler.model, sampler.left_to_reference
    graphs, tuning = sampler.graphs, sampler.tuning
    return SamplingReport(
        accelerated=True,
        # Not the model's: weights that were replaced are taken over by the next call.
        device=str(pipe.transformer.device),
        dtype=_name(pipe.transformer.dtype),
        backend=model.image_decoder.backend,
        compiled=model.has_compiled_blocks,
        graphs=None if graphs is None else len(graphs),
        graphs_failure=None if graphs is None else graphs.failure,
        tuning=None if tuning is None else tuning.record,
        left_to_reference=left,
    )


def accelerated_sampling(pipe: Any) -> "AcceleratedSampling":
    """What `accelerate` put into a pipeline of the reference, with its weights as they are now.

    Raises:
        InputError: it is none, not accelerated, or wrapped since.
    """
    sampling = _sampling_of(_reference_transformer(pipe))
    if sampling is None:
        raise InputError("this pipeline samples by the reference: call nova.accelerate(pipe) first")
    sampling.share_weights()
    return sampling


class AcceleratedSampling:
    """What takes the place of the reference transformer's `generate_video(inputs)`.

    Attributes:
        model: this package's, with the reference's own parameters.
        graphs: CUDA graphs of set loop and video encoder, or None.
        tuning: what the model runs by, or None.
        left_to_reference: why the last call was; None: it was not.
        replaced: what the transformer had in its class's place; None: nothing.
    """

    def __init__(
        self, transformer: nn.Module, model: NOVATransformer, graphs: SamplingGraphs | None
    ):
        self.model, self.graphs = model, graphs
        self.tuning: AppliedTuning | None = None
        self.left_to_reference: str | None = None
        self.replaced: Callable[[dict[str, Any]], None] | None = vars(transformer).get(METHOD)
        self._transformer, self._original = transformer, getattr(transformer, METHOD)

    def __call__(self, inputs: dict[str, Any]) -> None:
        """Append the frames (B, channels, h, w) to the list inputs["latents"].

        Args:
            inputs: of the pipeline's call; "c" holds the embedded prompts (passes * B, P, E).
        """
        self.left_to_reference = self._obstacle(inputs)
        if self.left_to_reference is None:
            self._sample(inputs)
            return
        warnings.warn(
            f"this call samples as before nova.accelerate: {self.left_to_reference}", stacklevel=2
        )
        self._original(inputs)

    # Where the transformer is compiled as a whole, torch would trace all loops from here on.
    @torch.compiler.disable
    def _sample(self, inputs: dict[str, Any]) -> None:
        note_dtype(self.model.device, self.model.dtype)
        if self.tuning is not None and not self.tuning.fits(self.model):
            # The reference's pipeline was moved or converted.
            self.tuning.undo()
            self.tuning = None
        guidance = _guidance(inputs)
        tokens = inputs["c"].to(self.model.dtype)  # autocast leaves those of norms in float32
        batch, num_frames = inputs["x"].shape[0], inputs.get("max_latent_length", 1)
        given, sizes = inputs["latents"], [int(n) for n in inputs["num_preds"] if n > 0]
        hidden = not (inputs.get("tqdm1", True) or inputs.get("tqdm2", False))
        graphs = self.graphs if self.model.device.type == "cuda" else None
        if given and num_frames == 1:
            return
        num_new = num_frames - bool(given)
        with StepProgress(num_new, len(sizes), {"disable": hidden}) as progress:
            frames = generate_frames(
                self.model,
                Conditioning(_all_passes(tokens, batch, guidance), batch),
                num_frames=num_frames,
                set_sizes=sizes,
                schedule=self.schedule(inputs.get("num_diffusion_steps", 25)),
                guidance=guidance,
                noise=NoiseSource(
                    inputs.get("generator"),
                    batch,
                    dtype=self.model.dtype,
                    device=self.model.device,
                ),
                # The reference goes on from the last given one, as frame 0.
                given_latents=given[-1][:, :, None].expand(batch, -1, -1, -1, -1)
                if given
                else None,
                on_set_end=progress.update,
                graphs=graphs,
            )
            given.extend(frames)

    @torch.compiler.disable
    def _obstacle(self, inputs: dict[str, Any]) -> str | None:
        if inputs.get("spatiotemporal_guidance_scale", 0):
            return "spatiotemporal_guidance_scale is not in this package"
        try:
            self.schedule(inputs.get("num_diffusion_steps", 25))
            _guidance(inputs)
            self.share_weights()
        except NovaError as error:
            return str(error)
        return None

    def share_weights(self) -> None:
        """Take the reference's tensors as they are now: others may have been put there since.

        Raises:
            InputError: there are others under other names or of other shapes, or layers with hooks
                or a forward of their own. The model would not compute what the reference does.
        """
        tensors = named_weights(self._transformer)
        changed = _shapes(self.model.state_dict()).items() ^ _shapes(tensors).items()
        if changed:
            raise InputError(
                "weights of the transformer were added, removed or reshaped since nova.accelerate, "
                f"such as {min(changed)[0]}. Merge an adapter into the weights or take it off, or "
                "keep it and call nova.restore(pipe)"
            )
        altered = _altered_layer(self._transformer)
        if altered is not None:
            raise InputError(
                f"{altered} has forward hooks or a forward of its own, which nova would not run. "
                "Take them off, or keep them and call nova.restore(pipe)"
            )
        _share(self.model, tensors)

    def schedule(self, num_steps: int) -> DiffusionSchedule:
        """The table of the scheduler as it is now: a call may have set its shift."""
        scheduler = self._transformer.sample_scheduler
        config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        config = {key: v for key, v in config.items() if key == "_class_name" or key[0] != "_"}
        return scheduler_from_dict(config).schedule(num_steps, getattr(scheduler, "shift", None))


def _reference_transformer(pipe: Any) -> nn.Module:
    transformer = getattr(pipe, "transformer", None)
    if isinstance(transformer, nn.Module):
        transformer = uncompiled(transformer)
    wanted = ("config", "sample_scheduler", METHOD)
    missing = [name for name in wanted if not hasattr(transformer, name)]
    if not isinstance(transformer, nn.Module) or missing:
        raise InputError(
            f"{type(pipe).__name__} is not a pipeline of the reference package: its transformer "
            f"has no {', '.join(missing) or 'parameters'}. nova.NOVAPipeline needs no accelerating"
        )
    return transformer


def _sampling_of(transformer: nn.Module) -> AcceleratedSampling | None:
    # Others may have put something there too.
    found = vars(transformer).get(METHOD)
    return found if isinstance(found, AcceleratedSampling) else None


def _shared_model(transformer: nn.Module) -> NOVATransformer:
    """This package's model made of the reference's own parameters."""
    config = ModelConfig.from_dict(dict(transformer.config))
    with torch.device("meta"):
        model = NOVATransformer(config)
    tensors = named_weights(transformer)
    # For its checks alone: it copies some tensors, and sets requires_grad.
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    load_strict(model, detached, f"the {type(transformer).__name__}")
    _share(model, tensors)
    return model.eval()


def _share(model: NOVATransformer, tensors: Mapping[str, Tensor]) -> None:
    """Put in the tensors themselves, so that moving the pipeline moves them here as well."""
    for name, tensor in tensors.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, tensor)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _altered_layer(transformer: nn.Module) -> str | None:
    """A layer that computes more than its weights tell, among those that the sampling replaces."""
    for name, module in transformer.named_modules():
        # The transformer itself and its embeddings are run as they are.
        if not name or name.split(".")[0] in EMBEDDINGS:
            continue
        if is_altered(module):
            return name
    return None


def _guidance(inputs: dict[str, Any]) -> Guidance:
    return Guidance(
        scale=inputs.get("guidance_scale", 1),
        min_scale=inputs.get("min_guidance_scale"),
        trunc=inputs.get("guidance_trunc", 0),
        renorm=inputs.get("guidance_renorm", 1),
        image_scale=inputs.get("image_guidance_scale", 0),
    )


def _all_passes(tokens: Tensor, batch: int, guidance: Guidance) -> Tensor:
    """The third pass has no text either, but sees the frames."""
    return torch.cat([tokens, tokens[batch:]]) if guidance.passes == 3 else tokens


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
