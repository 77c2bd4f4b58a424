"""Decoding beside sampling. Without a GPU, a stand-in does its work as late as a stream may."""

import pytest
import torch

import nova
from nova import pipeline as pipeline_module
from nova import side_stream as side_stream_module
from nova.side_stream import side_stream

PROMPTS = ["a red circle moving right", "a blue square"]
FAST = {"num_inference_steps": 3, "num_diffusion_steps": 2, "disable_progress_bar": True}


class LateStream:
    """Does what is launched only when its result is wanted, in order, as a busy GPU may.

    Attributes:
        log: what happened, in order.
    """

    def __init__(self, log):
        self.log = log
        self._work, self._results = [], []

    def launch(self, work, reads):
        self._work.append((work, reads, reads.clone()))
        self.log.append(f"launch {len(self._work) - 1}")
        return len(self._work) - 1

    def finish(self, use, launched):
        # Behind all that was launched: waiting for a later frame as well would be no overlap.
        assert launched == len(self._work) - 1
        self._catch_up()
        self.log.append(f"finish {launched}")
        return use(self._results[launched])

    def _catch_up(self):
        for work, reads, before in self._work[len(self._results) :]:
            assert torch.equal(reads, before)  # nobody wrote there in the meantime
            self._results.append(work())

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._catch_up()
        self.log.append("close")


@pytest.fixture
def log():
    return []


@pytest.fixture
def pipe(tiny_video_folder, monkeypatch, log):
    """Its streams overlap on the stand-in; the log tells of latent frames too."""
    monkeypatch.setattr(pipeline_module, "side_stream", lambda device: LateStream(log))
    original = pipeline_module.generate_frames

    def generate_frames(*arguments, **options):
        for index, latents in enumerate(original(*arguments, **options)):
            log.append(f"sample {index}")
            yield latents

    monkeypatch.setattr(pipeline_module, "generate_frames", generate_frames)
    return nova.NOVAPipeline.from_pretrained(tiny_video_folder)


def stream(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    options = {"max_latent_length": 4, "output_type": "pt", **FAST, **options}
    return pipe.stream(PROMPTS, generator=generator, **options)


@pytest.mark.parametrize("tile_latents, first_frame_alone", [(2, False), (5, False), (5, True)])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_batch_size": 1}, {"image": torch.zeros(64, 96, 3, dtype=torch.uint8).numpy()}],
    ids=["plain", "parts", "given"],
)
def test_overlapped_decoding_gives_the_same_items(pipe, tile_latents, first_frame_alone, options):
    pipe.vae.module.tile_latents = tile_latents
    pipe.vae.module.first_frame_alone = first_frame_alone
    expected = list(stream(pipe, **options))
    overlapped = list(stream(pipe, overlap_decoding=True, **options))
    assert len(overlapped) == len(expected)
    for item, other in zip(overlapped, expected, strict=True):
        assert (item.index, item.samples) == (other.index, other.samples)
        assert torch.equal(item.latents, other.latents)
        assert torch.equal(item.frames, other.frames)


@pytest.mark.parametrize("output_type", ["uint8", "latent"])
def test_other_output_types(pipe, output_type):
    expected = [item.frames for item in stream(pipe, output_type=output_type)]
    items = list(stream(pipe, output_type=output_type, overlap_decoding=True))
    for item, frames in zip(items, expected, strict=True):
        assert (item.frames == frames).all()


def test_a_frame_is_finished_while_the_next_is_sampled(pipe, log):
    for item in stream(pipe, max_latent_length=3, overlap_decoding=True):
        log.append(f"item {item.index}")
    assert log == [
        *("sample 0", "launch 0"),
        *("sample 1", "finish 0", "launch 1", "item 0"),
        *("sample 2", "finish 1", "launch 2", "item 1"),
        *("finish 2", "item 2", "close"),
    ]


def test_without_overlap_items_come_at_once(pipe, log):
    for item in stream(pipe, max_latent_length=2):
        log.append(f"item {item.index}")
    assert log == ["sample 0", "item 0", "sample 1", "item 1"]


def test_a_stream_that_is_left_early_waits_for_its_work(pipe, log):
    """Weights may be moved away afterwards."""
    items = stream(pipe, overlap_decoding=True)
    next(items)
    items.close()
    assert log[-2:] == ["launch 1", "close"]


def test_a_stopped_stream_decodes_what_there_is(pipe):
    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 4  # in the second frame

    expected = list(stream(pipe, callback_on_step_end=stop))
    overlapped = list(stream(pipe, callback_on_step_end=stop, overlap_decoding=True))
    assert [item.index for item in overlapped] == [0, 1]
    for item, other in zip(overlapped, expected, strict=True):
        assert torch.equal(item.frames, other.frames)


def call(pipe, **options):
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    options = {"max_latent_length": 4, "output_type": "pt", **FAST, **options}
    return pipe(PROMPTS, generator=generator, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_size": 1},
        {"image": torch.zeros(64, 96, 3, dtype=torch.uint8).numpy()},
        {"output_type": "np"},
        {"output_type": "latent"},
        {"max_latent_length": 1},
    ],
    ids=str,
)
def test_calls_that_overlap_give_the_same_clips(pipe, log, options):
    expected = call(pipe, **options)
    log.clear()
    result = call(pipe, overlap_decoding=True, **options)
    shown = "images" if result.frames is None else "frames"
    assert (result[shown] == expected[shown]).all()
    assert torch.equal(result.latents, expected.latents)
    assert result.max_batch_size == expected.max_batch_size
    # Single frames, and latents, leave nothing to overlap.
    overlaps = shown == "frames" and options.get("output_type") != "latent"
    assert any(entry.startswith("launch") for entry in log) == overlaps


def test_pictures_of_a_call_that_overlaps(pipe):
    expected = call(pipe, output_type="pil").frames
    result = call(pipe, output_type="pil", overlap_decoding=True).frames
    assert [len(clip) for clip in result] == [13, 13]
    for clip, other in zip(result, expected, strict=True):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(clip, other, strict=True))


@pytest.mark.parametrize("max_batch_size", [1, 2])
def test_a_stopped_call_decodes_what_there_is(pipe, max_batch_size):
    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 4

    options = {"callback_on_step_end": stop, "max_batch_size": max_batch_size}
    expected, result = call(pipe, **options), call(pipe, overlap_decoding=True, **options)
    assert torch.equal(result.latents, expected.latents)
    assert torch.equal(result.frames, expected.frames)


def test_overlapped_decoding_needs_a_gpu(tiny_video_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    with pytest.raises(nova.DeviceError, match="overlap_decoding needs a GPU, .* is on cpu"):
        pipe.stream(PROMPTS, overlap_decoding=True)
    with pytest.raises(nova.DeviceError, match="overlap_decoding needs a GPU"):
        pipe(PROMPTS, overlap_decoding=True)


def test_a_gpu_has_one_stream(monkeypatch):
    """Each new one would take memory for the VAE that those before keep."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda gpu: made.append(gpu) or object())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    side_stream_module._stream_of.cache_clear()
    sides = [side_stream(torch.device(name)) for name in ("cuda:0", "cuda:1", "cuda", "cuda:0")]
    side_stream_module._stream_of.cache_clear()
    assert made == [0, 1]
    first, second, current, again = (side._stream for side in sides)
    assert first is again and second is current and first is not second


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("output_type", ["pt", "uint8"])
def test_on_a_gpu(tiny_video_folder, offload, output_type):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder)
    if offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to("cuda")
    pipe.vae.module.tile_latents = 2
    options = {"max_latent_length": 6, "output_type": output_type}
    expected = [item.frames for item in stream(pipe, **options)]
    for _ in range(3):
        items = stream(pipe, overlap_decoding=True, **options)
        for item, frames in zip(items, expected, strict=True):
            # Memory that was given away too early would be overwritten by this.
            torch.full((2**24,), torch.nan, device="cuda")
            assert (item.frames == frames).all()
    expected = call(pipe, **options)
    assert (call(pipe, overlap_decoding=True, **options).frames == expected.frames).all()
    before, calls = len(torch.cuda.memory_snapshot()), 8
    for _ in range(calls):
        call(pipe, overlap_decoding=True, **options)
    # What a call frees serves the next, though not all of it at once: the GPU may be behind. A
    # stream of its own for every call would take at least a segment of memory for each.
    assert len(torch.cuda.memory_snapshot()) < before + calls
