"""Batches in parts: the noise and the results of the whole batch; where memory is short, a retry.

Parts and the whole batch agree to float tolerance: matrix products of another number of rows may be
summed in another order. What is drawn, and a retry against parts from the start, agree bit for bit.
"""

import contextlib
import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from small_models import repeating_graphs

import nova
from nova import devices
from nova import pipeline as pipeline_module
from nova.batch_splitting import BatchParts, BatchSplitWarning
from nova.errors import DeviceError, InputError
from nova.noise import NoiseSource
from nova.schedule import DDPMConfig

PROMPTS = ["a red circle", "a blue square moving left", "a star", "a green circle", "a triangle"]
FAST = {"num_inference_steps": 3, "num_diffusion_steps": 2, "disable_progress_bar": True}
PETABYTE = 2**50


@pytest.fixture(scope="module")
def shared_pipe(tiny_video_folder):
    return nova.NOVAPipeline.from_pretrained(tiny_video_folder)


@pytest.fixture
def pipe(shared_pipe):
    yield shared_pipe
    shared_pipe.graphs = None


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def latents_of(pipe, prompt=PROMPTS, **options):
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", **options}
    return pipe(prompt, **{**FAST, "max_latent_length": 2, **options}).latents


def assert_close(parts, whole):
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)


def gpu_error():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def triton_error():
    return RuntimeError("Triton Error [CUDA]: out of memory")


def extension_error():
    return RuntimeError("denoise: CUDA says cudaErrorMemoryAllocation, out of memory")


def cudnn_error():
    return RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")


def cpu_error():
    """Torch's own, of a CPU that has no petabyte."""
    return torch.empty(PETABYTE, dtype=torch.uint8)


@contextlib.contextmanager
def room_for(pipe, samples, *, make_error=gpu_error, passes=2, seen=None):
    """Inside, the image encoder runs out of memory above so many samples.

    It does so after all draws of the step: generators that are not put back would show.
    """

    encode_image = pipe.transformer.encode_image

    def checked(cond, *arguments, **options):
        count = len(cond) // passes
        if seen is not None:
            seen.append(count)
        if count > samples:
            raise make_error()
        return encode_image(cond, *arguments, **options)

    pipe.transformer.encode_image = checked
    try:
        yield
    finally:
        del pipe.transformer.encode_image


@contextlib.contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Noise ---------------------------------------------------------------------------------------


def draws(noise):
    return [noise.uniform(7), noise.normal(2, 3), noise.normal(4)]


def shared_by_two():
    first, second = seeded(1, 2)
    return [first, first, second, first]


@pytest.mark.parametrize(
    "make",
    [lambda: None, lambda: seeded(1)[0], lambda: seeded(1, 2, 3, 4), shared_by_two],
    ids=["default", "one", "one a sample", "shared"],
)
def test_parts_draw_what_the_whole_batch_draws(make):
    def source(generator):
        torch.manual_seed(5)
        return NoiseSource(generator, 4, dtype=torch.float32, device=torch.device("cpu"))

    whole = source(make())
    expected, end = draws(whole), whole.states()
    noise = source(make())
    states = noise.states()
    for start, stop in ((0, 2), (0, 1), (1, 3), (3, 4)):  # one of them again, as in a retry
        part = draws(noise.part(start, stop, states))
        for drawn, all_drawn in zip(part, expected, strict=True):
            assert torch.equal(drawn, all_drawn[start:stop])
    # What is drawn next is the same too.
    for state, expected_state in zip(noise.states(), end, strict=True):
        assert torch.equal(state, expected_state)


# Parts asked for -----------------------------------------------------------------------------

RUNS = {
    "guidance": {},
    "no guidance": {"guidance_scale": 1.0},
    "image guidance": {"image_guidance_scale": 1.5, "guidance_renorm": 0.5},
    "motion": {"motion_flow": [1.0, 3.0, 5.0, 7.0, 9.0]},
    "negative": {"negative_prompt": "a square"},
    "image": {"image": np.full((64, 96, 3), 90, np.uint8)},
    "latents": {"latents": torch.linspace(-1, 1, 5 * 384).view(5, 4, 1, 8, 12)},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("own", [False, True], ids=["one generator", "one a sample"])
def test_parts_give_the_whole_batch(pipe, options, own):
    def run(**more):
        generator = seeded(*range(5)) if own else seeded(0)[0]
        return latents_of(pipe, generator=generator, **options, **more)

    with no_warnings():
        assert_close(run(max_batch_size=2), run())


def test_parts_with_noise_in_every_denoise_step(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", DDPMConfig())
    assert_close(latents_of(pipe, max_batch_size=3), latents_of(pipe))


def test_parts_of_several_images_a_prompt(tiny_class_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_class_folder)

    def run(**more):
        return latents_of(pipe, [3, 400, 7], max_latent_length=1, num_images_per_prompt=2, **more)

    assert_close(run(max_batch_size=4), run())


def test_parts_never_exceed_what_was_asked_for(pipe):
    for size, expected in ((2, {2, 1}), (3, {3, 2}), (5, {5}), (9, {5}), (None, {5})):
        seen = []
        with room_for(pipe, 5, seen=seen):
            output = pipe(
                PROMPTS, max_batch_size=size, output_type="latent", max_latent_length=1, **FAST
            )
        assert set(seen) == expected and output.max_batch_size == max(expected)
    for wrong in (0, -1, 1.5):
        with pytest.raises(InputError, match="max_batch_size must be a whole number"):
            latents_of(pipe, max_batch_size=wrong)


@pytest.mark.parametrize("output_type", ["pil", "np", "uint8", "pt"])
def test_pixels_of_parts_are_one_batch(pipe, output_type):
    def run(**more):
        frames = pipe(
            PROMPTS[:3],
            generator=seeded(0)[0],
            output_type=output_type,
            max_latent_length=2,
            **FAST,
            **more,
        ).frames
        return frames

    whole, parts = run(vae_batch_size=3), run(vae_batch_size=2)
    assert type(parts) is type(whole) and len(parts) == 3
    if output_type == "pil":
        whole, parts = (np.stack([np.stack(clip) for clip in x]) for x in (whole, parts))
    assert parts.shape == whole.shape and parts.dtype == whole.dtype
    # Rounding may take a pixel to the next of 256 values.
    step = 1 if output_type in ("pil", "uint8") else 1 / 255
    difference = np.abs(np.asarray(parts, np.float64) - np.asarray(whole, np.float64))
    assert difference.max() <= 1.01 * step


# Memory is short -----------------------------------------------------------------------------


@pytest.mark.parametrize("make_error", [gpu_error, cpu_error], ids=["GPU", "CPU"])
@pytest.mark.parametrize("own", [False, True], ids=["one generator", "one a sample"])
def test_out_of_memory_halves_the_batch_and_changes_nothing(pipe, make_error, own):
    def run(**more):
        generator = seeded(*range(5)) if own else seeded(0)[0]
        latents = latents_of(pipe, generator=generator, **more)
        first = generator[0] if own else generator
        return latents, first.get_state()

    whole, end = run()
    parts, _ = run(max_batch_size=2)
    seen = []
    with room_for(pipe, 2, make_error=make_error, seen=seen), pytest.warns() as caught:
        retried, end_of_retried = run()
    assert torch.equal(retried, parts)
    assert_close(retried, whole)
    assert torch.equal(end, end_of_retried)
    # 2 frames of 3 sets for each of 2 + 2 + 1 samples, behind attempts with 5 and 3.
    assert seen == [5, 3] + [2] * 12 + [1] * 6
    (warning,) = caught
    assert warning.category is BatchSplitWarning
    assert str(warning.message) == (
        "out of memory while sampling 5 samples at a time; 2 at a time fit. Give max_batch_size=2 "
        "(nova generate: --batch-size 2) to start so."
    )


def test_the_output_says_what_fitted(pipe):
    options = {"output_type": "latent", "max_latent_length": 1, **FAST}
    with room_for(pipe, 2), pytest.warns(BatchSplitWarning):
        output = pipe(PROMPTS, **options)
    assert output.max_batch_size == 2
    with room_for(pipe, 2), no_warnings():
        pipe(PROMPTS, max_batch_size=output.max_batch_size, **options)


@pytest.mark.parametrize(
    "make_error", [gpu_error, triton_error, extension_error, cudnn_error, cpu_error]
)
def test_one_sample_that_does_not_fit(pipe, make_error):
    seen = []
    where = "out of memory" if make_error is cpu_error else "out of GPU memory"
    with room_for(pipe, 0, make_error=make_error, seen=seen), no_warnings():
        with pytest.raises(DeviceError, match=where) as caught:
            latents_of(pipe)
    assert seen == [5, 3, 2, 1]
    message = str(caught.value)
    assert "fewer latent frames" in message and "torch_dtype=torch.bfloat16" in message
    assert ("enable_model_cpu_offload()" in message) == (make_error is not cpu_error)


def test_other_errors_are_not_tried_again(pipe):
    seen = []

    def make_error():
        return RuntimeError("CUDA error: an illegal memory access was encountered")

    with room_for(pipe, 0, make_error=make_error, seen=seen):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            latents_of(pipe)
    assert seen == [5]


def test_a_failed_attempt_is_freed_before_the_next(pipe, monkeypatch):
    """With the cycle collector off: what is freed by it alone may be freed too late."""
    held, freed = [], []

    def fail_once(module, arguments):
        if not held:
            held.append(weakref.ref(arguments[0]))  # a tensor that only the attempt refers to
            raise gpu_error()

    def free_memory(device):
        freed.append(held[0]() is None)
        devices.free_memory(device)

    monkeypatch.setattr(pipeline_module, "free_memory", free_memory)
    hook = pipe.transformer.image_encoder.blocks[0].register_forward_pre_hook(fail_once)
    collecting = gc.isenabled()
    gc.disable()
    try:
        with pytest.warns(BatchSplitWarning):
            latents_of(pipe, PROMPTS[:2])
    finally:
        hook.remove()
        if collecting:
            gc.enable()
    assert freed == [True]


def test_graphs_of_the_size_that_failed_are_dropped(pipe, monkeypatch):
    expected = latents_of(pipe, max_batch_size=2)
    pipe.graphs = repeating_graphs()
    latents_of(pipe)
    assert len(pipe.graphs) > 0
    counts = []
    monkeypatch.setattr(pipeline_module, "free_memory", lambda _: counts.append(len(pipe.graphs)))
    with room_for(pipe, 2), pytest.warns(BatchSplitWarning):
        result = latents_of(pipe)
    assert counts == [0, 0]  # nothing is left when memory is given back, after 5 and after 3
    assert torch.equal(result, expected) and pipe.graphs.failure is None


def test_graphs_are_among_the_remedies(pipe):
    pipe.graphs = repeating_graphs()
    with room_for(pipe, 0), pytest.raises(DeviceError, match=r"disable_cuda_graphs\(\)"):
        latents_of(pipe, PROMPTS[0])


def test_decoding_out_of_memory(pipe, monkeypatch):
    options = {"output_type": "pt", "max_latent_length": 2, **FAST}

    def run(**more):
        return pipe(PROMPTS, generator=seeded(0)[0], **options, **more).frames

    expected, seen = run(vae_batch_size=2), []
    original = type(pipe.vae).decode

    def decode(self, latents, batch_size=1):
        seen.append(len(latents))
        if len(latents) > 2:
            raise cpu_error()
        return original(self, latents, batch_size)

    monkeypatch.setattr(type(pipe.vae), "decode", decode)
    message = "out of memory while decoding 4 samples at a time; 2 at a time fit. Give vae_batch"
    with pytest.warns(BatchSplitWarning, match=message):
        assert torch.equal(run(vae_batch_size=4), expected)
    assert seen == [4, 2, 2, 1]
    monkeypatch.setattr(type(pipe.vae), "decode", lambda *_, **__: cpu_error())
    with pytest.raises(DeviceError, match=r"decoding the latents. Use vae.module.enable_tiling"):
        run()


def test_sizes_that_are_tried():
    asked = []

    def parts(batch, max_size, room):
        asked.clear()

        def work(start, stop):
            asked.append((start, stop))
            if stop - start > room[len(asked) - 1]:
                raise cpu_error()
            return list(range(start, stop))

        done = BatchParts(
            batch, max_size, doing="testing", advice="use {size}", free_memory=lambda: None
        )
        return [sample for part in done.run(work) for sample in part], done.size

    with no_warnings():
        assert parts(5, None, [5]) == ([0, 1, 2, 3, 4], 5) and asked == [(0, 5)]
        assert parts(5, 2, [2] * 3)[1] == 2 and asked == [(0, 2), (2, 4), (4, 5)]
    with pytest.warns(BatchSplitWarning, match="testing 6 samples at a time; 3 at a time fit. use"):
        assert parts(6, 8, [5] * 3) == ([0, 1, 2, 3, 4, 5], 3)
    assert asked == [(0, 6), (0, 3), (3, 6)]
    # Memory gets short on the way, and again in a last part that is small anyhow.
    with pytest.warns(BatchSplitWarning) as caught:
        assert parts(6, 4, [4, 1, 1, 1]) == ([0, 1, 2, 3, 4, 5], 1)
    assert asked == [(0, 4), (4, 6), (4, 5), (5, 6)] and len(caught) == 1


# Callbacks, progress bars, streams -----------------------------------------------------------


def test_callbacks_see_parts(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, tensors["samples"].tolist(), len(tensors["latents"])))
        return {"latents": 2 * tensors["latents"]}

    options = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "samples"],
    }
    expected = latents_of(pipe, **options)
    assert seen == [(step, [0, 1, 2, 3, 4], 5) for step in range(6)]
    seen.clear()
    assert_close(latents_of(pipe, max_batch_size=3, **options), expected)
    first, second = ([(step, rows, len(rows)) for step in range(6)] for rows in ([0, 1, 2], [3, 4]))
    assert seen == first + second


def test_a_retry_calls_the_callback_from_step_0_again(pipe):
    seen, calls = [], []

    def fail_in_the_second_frame(module, arguments):
        calls.append(len(arguments[0]))
        if len(calls) == 5:
            raise gpu_error()

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, tensors["samples"].tolist()))

    hook = pipe.transformer.image_encoder.blocks[0].register_forward_pre_hook(
        fail_in_the_second_frame
    )
    try:
        with pytest.warns(BatchSplitWarning):
            result = latents_of(
                pipe,
                PROMPTS[:2],
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["samples"],
            )
    finally:
        hook.remove()
    assert seen[:4] == [(step, [0, 1]) for step in range(4)]
    assert seen[4:] == [(step, [sample]) for sample in (0, 1) for step in range(6)]
    assert torch.equal(result, latents_of(pipe, PROMPTS[:2], max_batch_size=1))


def test_an_interrupt_leaves_zeros_where_nothing_was_generated(pipe):
    steps = []

    def stop(pipeline, step, timestep, tensors):
        steps.append(step)
        pipeline._interrupt = len(steps) == 8  # in the second part's first frame

    whole = latents_of(pipe)
    stopped = latents_of(pipe, max_batch_size=2, callback_on_step_end=stop)
    assert stopped.shape == whole.shape and len(steps) == 8
    assert_close(stopped[:2], whole[:2])
    assert stopped[2:4, :, 0].any() and not stopped[2:4, :, 1].any() and not stopped[4].any()
    assert_close(latents_of(pipe, max_batch_size=2), whole)  # the next call begins anew


def test_progress_bars_name_the_part(pipe, tiny_image_folder, capsys):
    latents_of(pipe, max_batch_size=2, disable_progress_bar=False)
    shown = capsys.readouterr().err
    for name in ("samples 1-2 of 5, frames", "samples 3-4 of 5, frames", "sample 5 of 5, frames"):
        assert name in shown
    latents_of(pipe, disable_progress_bar=False)
    assert "sample" not in capsys.readouterr().err
    images = nova.NOVAPipeline.from_pretrained(tiny_image_folder)
    latents_of(images, max_latent_length=1, max_batch_size=4, disable_progress_bar=False)
    assert "samples 1-4 of 5, sets" in capsys.readouterr().err


def test_a_stream_goes_part_by_part(pipe):
    options = {"output_type": "pt", "max_latent_length": 3, **FAST}
    whole = pipe(PROMPTS, generator=seeded(0)[0], **options)
    items = list(pipe.stream(PROMPTS, generator=seeded(0)[0], max_batch_size=2, **options))
    parts = [range(0, 2), range(2, 4), range(4, 5)]
    assert [(i.samples, i.index) for i in items] == [(p, t) for p in parts for t in range(3)]
    for part in parts:
        own = [item for item in items if item.samples == part]
        frames = torch.cat([item.frames for item in own], dim=1)
        assert_close(frames, whole.frames[part.start : part.stop])
        assert_close(own[-1].latents, whole.latents[part.start : part.stop, :, -1])
    (item,) = pipe.stream(PROMPTS, max_latent_length=1, output_type="latent", **FAST)
    assert item.samples == range(5)


def test_a_stream_that_is_stopped_begins_no_further_part(pipe):
    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 1

    options = {"output_type": "latent", "max_latent_length": 2, **FAST}
    items = list(pipe.stream(PROMPTS, max_batch_size=2, callback_on_step_end=stop, **options))
    assert [item.samples for item in items] == [range(0, 2)]


def test_a_stream_does_not_split_by_itself(pipe):
    options = {"output_type": "latent", "max_latent_length": 2, **FAST}
    with room_for(pipe, 2), pytest.raises(DeviceError, match="Use a smaller max_batch_size"):
        list(pipe.stream(PROMPTS, **options))
    with room_for(pipe, 2):
        assert len(list(pipe.stream(PROMPTS, max_batch_size=2, **options))) == 6
    with room_for(pipe, 0), pytest.raises(DeviceError) as caught:
        list(pipe.stream(PROMPTS, max_batch_size=1, **options))
    assert "max_batch_size" not in str(caught.value)


# Memory in use -------------------------------------------------------------------------------


def test_peak_memory_is_counted_on_gpus_alone(pipe, monkeypatch):
    assert pipe(PROMPTS[0], output_type="latent", max_latent_length=1, **FAST).peak_memory is None
    asked = []
    for name in ("reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(
            torch.cuda, name, lambda device, name=name: asked.append((name, device)) or 123
        )
    segments = [
        {"device": 1, "segment_pool_id": pool, "total_size": total, "allocated_size": 5}
        for pool, total in (((0, 0), 999), ((0, 1), 1005), ((0, 2), 2005))
    ]
    segments.append({**segments[-1], "device": 0})
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    device = torch.device("cuda:1")
    peak = devices.PeakMemory(device)
    assert asked == [("reset_peak_memory_stats", device)]
    # What graphs write when they are replayed counts, which torch does not.
    assert peak.read() == 123 + 1000 + 2000
    assert asked[1:] == [("max_memory_allocated", device)]
    # Those that were recorded meanwhile too; what others have dropped may have been the most.
    segments.append({**segments[1], "segment_pool_id": (0, 3)})
    assert peak.read() == 123 + 4000
    segments.clear()
    assert peak.read() == 123 + 4000


@pytest.mark.parametrize("counts", [True, False])
def test_allocators_that_list_nothing(monkeypatch, counts):
    """cudaMallocAsync counts bytes, and lists no segments; another package's may do neither."""

    def refuse(*_):
        raise RuntimeError("this allocator does not support it")

    monkeypatch.setattr(torch.cuda, "memory_snapshot", refuse)
    reset = (lambda device: None) if counts else refuse
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    peak = devices.PeakMemory(torch.device("cuda:1"))
    assert peak.read() == (123 if counts else None)


def test_memory_is_given_back_to_the_device(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("cuda"))
    devices.free_memory(torch.device("cpu"))
    assert asked == []
    devices.free_memory(torch.device("cuda"))
    assert asked == ["cuda"]


@pytest.mark.gpu
def test_a_gpu_that_is_too_small(tiny_video_folder):
    pipe = nova.NOVAPipeline.from_pretrained(tiny_video_folder).to("cuda")

    def run(**more):
        options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", **FAST}
        return pipe(PROMPTS, **options, **more)

    expected = run(max_batch_size=2)
    assert expected.peak_memory > 0

    def allocate():
        return torch.empty(PETABYTE, dtype=torch.uint8, device="cuda")

    for _ in range(2):  # without graphs, then with them
        with room_for(pipe, 2, make_error=allocate), pytest.warns(BatchSplitWarning):
            result = run()
        assert torch.equal(result.latents, expected.latents) and result.max_batch_size == 2
        pipe.enable_cuda_graphs()
