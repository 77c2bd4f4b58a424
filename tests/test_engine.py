"""Recorded steps. Without a GPU, a stand-in repeats the work on the memory it was recorded on."""

import gc
import warnings
import weakref

import pytest
import torch
from small_models import (
    SMALL,
    SMALL_ROTARY,
    Repeated,
    repeating_graphs,
    sample,
    sample_frames,
    small_model,
    small_prompts,
)

from nova.engine import SamplingGraphs
from nova.guidance import Guidance
from nova.schedule import DDPMConfig

RUNS = [
    (SMALL, {"guidance": Guidance(scale=3.0)}),
    (SMALL_ROTARY, {"guidance": Guidance(scale=3.0, image_scale=1.5, renorm=0.5)}),
    (SMALL, {"guidance": Guidance(scale=1.0), "schedule": DDPMConfig().schedule(3)}),
    (SMALL, {"guidance": Guidance(scale=3.0, renorm=0.5), "schedule": DDPMConfig().schedule(3)}),
    (SMALL, {"guidance": Guidance(scale=3.0, min_scale=1.5, trunc=500.0)}),
]


@pytest.mark.parametrize("config, options", RUNS)
def test_recorded_steps_give_the_same_bits(config, options):
    model, graphs = small_model(config), repeating_graphs()
    for seed in range(3):
        noise = [torch.Generator().manual_seed(seed) for _ in range(2)]
        prompts = torch.randn(
            2, config.text_token_len, config.text_token_dim, generator=noise[0].manual_seed(seed)
        )
        noise[1].set_state(noise[0].get_state())
        expected = sample(model, prompts=prompts, generator=noise[0], **options)
        result = sample(model, prompts=prompts, generator=noise[1], graphs=graphs, **options)
        assert torch.equal(result, expected)
    assert len(graphs.sets) == 4 and len(graphs.frames) == 3 and graphs.failure is None


def test_float64_is_recorded():
    model, graphs = small_model().double(), repeating_graphs()
    assert torch.equal(sample(model, graphs=graphs), sample(model))
    assert len(graphs.sets) == 4 and len(graphs.frames) == 3


def test_weights_that_change_in_place_are_followed():
    model, graphs = small_model(), repeating_graphs()
    before = sample(model, graphs=graphs)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    result = sample(model, graphs=graphs)
    assert torch.equal(result, sample(model)) and not torch.equal(result, before)


def counted_graphs():
    """Graphs of a stand-in, and what was recorded as a list that grows."""
    made = []
    return SamplingGraphs(lambda work: made.append(work) or Repeated(work)), made


def test_another_kind_of_run_is_recorded_anew():
    model, (graphs, made) = small_model(), counted_graphs()
    sample(model, graphs=graphs)
    sample(model, graphs=graphs)
    assert len(made) == 7
    for change in ({"batch": 1}, {"guidance": Guidance(scale=4.0)}, {"steps": 3}):
        before = len(made)
        result = sample(model, graphs=graphs, **change)
        assert len(made) > before and torch.equal(result, sample(model, **change))
    assert len(graphs.sets) == 3  # those of other sets are gone
    model.double().float()  # other addresses
    before = len(made)
    assert torch.equal(sample(model, graphs=graphs), sample(model)) and len(made) > before


def test_another_layout_at_the_same_address_is_recorded_anew():
    model, (graphs, made) = small_model(), counted_graphs()
    sample(model, graphs=graphs)
    weight = model.image_encoder.blocks[0].attn.proj.weight
    before, weight.data = weight.data_ptr(), weight.data.t()  # it is square
    assert weight.data_ptr() == before
    assert torch.equal(sample(model, graphs=graphs), sample(model)) and len(made) == 14


def test_another_backend_is_recorded_anew(monkeypatch):
    model, (graphs, made) = small_model(), counted_graphs()
    sample(model, graphs=graphs)
    monkeypatch.setenv("NOVA_KERNELS_BACKEND", "reference")
    assert torch.equal(sample(model, graphs=graphs), sample(model)) and len(made) == 14


def test_blocks_that_were_compiled_are_recorded_anew():
    model, (graphs, made) = small_model(), counted_graphs()
    expected = sample(model, graphs=graphs)
    model.compile_blocks(backend="eager")
    # Compiled blocks are not packed for a CPU, so that rounding differs.
    torch.testing.assert_close(sample(model, graphs=graphs), expected)
    assert len(made) == 14
    torch.compiler.reset()


class Scaled(torch.nn.Linear):
    """A layer as an adapter makes it, with a number that is no weight."""

    number = 1.0

    def forward(self, x):
        return self.number * super().forward(x)


def with_adapter(model):
    layer = model.image_encoder.blocks[0].mlp.fc2
    layer.__class__ = Scaled
    return layer


def with_hook(model):
    layer = model.image_encoder.blocks[0]
    layer.number = 1.0
    layer.register_forward_hook(lambda layer, inputs, output: layer.number * output)
    return layer


def with_kept_method(model):
    layer = model.video_encoder.blocks[0].attn.proj
    layer.number, forward = 1.0, layer.forward
    layer.forward = lambda x: layer.number * forward(x)
    return layer


class Marked(torch.nn.Parameter):
    """A weight of a kind of its own, as quantised ones are."""


def with_marked_weight(model):
    layer = model.image_encoder.blocks[0].attn.qkv
    layer.weight = Marked(layer.weight.data, requires_grad=False)
    return layer


@pytest.mark.parametrize(
    "change, what",
    [
        (with_adapter, "image_encoder.blocks.0.mlp.fc2 is a Scaled"),
        (with_hook, "image_encoder.blocks.0 has hooks"),
        (with_kept_method, "video_encoder.blocks.0.attn.proj has hooks"),
        (with_marked_weight, "image_encoder.blocks.0.attn.qkv has weights of a kind of their own"),
    ],
)
def test_what_replays_would_not_follow_is_not_recorded(change, what):
    model, graphs = small_model(), repeating_graphs()
    sample(model, graphs=graphs)
    layer = change(model)
    with pytest.warns(UserWarning, match=what):
        before = sample(model, graphs=graphs)
    layer.number = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = sample(model, graphs=graphs)
    assert torch.equal(result, sample(model)) and len(graphs) == 0
    if change is not with_marked_weight:
        assert not torch.equal(result, before)


def test_a_hook_that_a_callback_adds():
    def add(step):
        if (step.frame, step.set_index) == (1, 3):
            model.image_encoder.norm.register_forward_hook(lambda layer, x, output: 0.5 * output)

    model, graphs = small_model(), repeating_graphs()
    sample(model, graphs=graphs)
    with pytest.warns(UserWarning, match="image_encoder.norm has hooks"):
        result = sample(model, graphs=graphs, on_set_end=add)
    model = small_model()
    assert torch.equal(result, sample(model, on_set_end=add))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_clip_that_a_callback_makes_inside_a_frame(batch):
    def sample_another(step):
        if (step.frame, step.set_index) == (1, 1):
            others.append(sample(model, batch=batch, graphs=graphs, generator=seeded(5)))

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    model, graphs, others = small_model(), repeating_graphs(), []
    for _ in range(2):
        result = sample(model, graphs=graphs, on_set_end=sample_another)
        assert torch.equal(result, sample(model))
    expected = sample(model, batch=batch, generator=seeded(5))
    assert len(others) == 2 and all(torch.equal(other, expected) for other in others)


def test_latents_that_a_callback_replaces():
    model, graphs = small_model(), repeating_graphs()

    def halve(step):
        return step.latents / 2 if step.set_index == 1 else None

    for _ in range(2):
        result = sample(model, graphs=graphs, on_set_end=halve)
        assert torch.equal(result, sample(model, on_set_end=halve))


def test_where_recording_fails_sampling_goes_on():
    def record(work):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    model, graphs = small_model(), SamplingGraphs(record)
    with pytest.warns(UserWarning, match="recording failed: CUDA error: operation not permitted"):
        result = sample(model, graphs=graphs)
    assert torch.equal(result, sample(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sample(model, graphs=graphs), result)  # it does not try again
    assert len(graphs) == 0
    assert "set loop: " in graphs.failure and "video encoder: " in graphs.failure
    graphs.clear()
    assert graphs.failure is None


class Wrong(Repeated):
    """A graph that lost its last launch."""

    def replay(self):
        super().replay()
        self.output[0, 0] += 1


def test_replays_that_differ_are_not_used():
    model, graphs = small_model(), SamplingGraphs(Wrong)
    with pytest.warns(UserWarning, match="a replay differed from the work by up to 1"):
        result = sample(model, graphs=graphs)
    assert torch.equal(result, sample(model))


@pytest.mark.parametrize("part", ["image", "video"])
def test_what_a_failed_recording_left_is_freed_before_sampling_goes_on(part, monkeypatch):
    model, left = small_model(), []

    class Memory:
        pass

    def record(work):
        if left or f"encode_{part}" not in work_done(work):
            return Repeated(work)
        memory = Memory()
        left.append(weakref.ref(memory))
        raise RuntimeError("out of memory")

    def work_done(work):
        calls.clear()
        work()
        return calls

    def count(name):
        method = getattr(model, name)

        def call(*arguments, **options):
            calls.append(name)
            assert not left or left[0]() is None
            return method(*arguments, **options)

        monkeypatch.setattr(model, name, call)

    calls, expected = [], sample(model)
    count("encode_image")
    count("encode_video")
    with pytest.warns(UserWarning, match="out of memory"):
        assert torch.equal(sample(model, graphs=SamplingGraphs(record)), expected)
    assert left


def test_graphs_that_a_callback_drops_after_a_failure():
    def record(work):
        raise RuntimeError("out of memory")

    model, graphs = small_model(), SamplingGraphs(record)
    with pytest.warns(UserWarning, match="out of memory"):
        result = sample(model, graphs=graphs, on_set_end=lambda step: graphs.clear())
    assert torch.equal(result, sample(model))


class Still:
    """A graph that does nothing, and as a graph does not know its work."""

    def __init__(self, work):
        self.output = work().clone()

    def replay(self):
        pass


@pytest.mark.parametrize("part", ["sets", "frames"])
def test_graphs_of_a_part_that_fails_are_freed_at_once(part):
    recordings = []

    def record(work):
        if sum(ref() is not None for ref in recordings) == 4:
            raise RuntimeError("out of memory")
        recording = Still(work)
        recordings.append(weakref.ref(recording))
        return recording

    def count_alive(step):
        if graphs.failure is not None:
            alive.append(sum(ref() is not None for ref in recordings))

    model, graphs, alive = small_model(), SamplingGraphs(record), []
    other = graphs.frames if part == "sets" else graphs.sets
    other.failure = "for this test"
    gc.disable()  # it would come, but at its own time
    try:
        # Sets are 4 a frame, frames 5.
        options = {"steps": 5, "num_frames": 5, "on_set_end": count_alive}
        with pytest.warns(UserWarning, match="out of memory"):
            sample(model, graphs=graphs, **options)
    finally:
        gc.enable()
    assert len(recordings) == 4 and alive[-1] == 0


def test_graphs_are_freed_with_what_keeps_them():
    recordings = weakref.WeakSet()

    def record(work):
        recording = Still(work)
        recordings.add(recording)
        return recording

    model, graphs = small_model(), SamplingGraphs(record)
    gc.disable()  # it would come, but at its own time
    try:
        sample(model, graphs=graphs)
        assert len(recordings) == len(graphs) > 0
        del graphs
        assert not recordings
    finally:
        gc.enable()


def test_one_part_may_fail_alone():
    model, graphs = small_model(), repeating_graphs()
    graphs.frames.failure = "for this test"
    assert torch.equal(sample(model, graphs=graphs), sample(model))
    assert len(graphs.sets) == 4 and len(graphs.frames) == 0
    assert graphs.failure == "video encoder: for this test"


@pytest.mark.parametrize("config", [SMALL, SMALL_ROTARY])
def test_clips_that_go_on_from_frames_are_recorded(config):
    model, graphs = small_model(config), repeating_graphs()
    for seed in range(2):
        given = torch.randn(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
        result = sample(model, num_frames=4, given_latents=given, graphs=graphs)
        assert torch.equal(result, sample(model, num_frames=4, given_latents=given))
    assert len(graphs.frames) == 2


def test_windows_share_graphs():
    model, graphs = small_model(), repeating_graphs()
    options = {"num_frames": 7, "context_frames": 3}
    for _ in range(2):
        assert torch.equal(sample(model, graphs=graphs, **options), sample(model, **options))
    # Inputs 0, 1 and 2 by themselves; then 0 and 1 in one pass at the start of each later window.
    assert len(graphs.frames) == 4


def frame_by_frame(model, graphs, seed):
    """A generator of the frames of a clip."""
    prompts = small_prompts(model.config, 1, seed)
    generator = torch.Generator().manual_seed(seed)
    return sample_frames(model, batch=1, prompts=prompts, generator=generator, graphs=graphs)


def test_clips_made_in_turn_do_not_mix():
    model, graphs = small_model(), repeating_graphs()
    expected = [list(frame_by_frame(model, None, seed)) for seed in range(2)]
    in_turn = zip(*(frame_by_frame(model, graphs, seed) for seed in range(2)), strict=True)
    for frames, (first, second) in zip(in_turn, zip(*expected, strict=True), strict=True):
        assert torch.equal(frames[0], first) and torch.equal(frames[1], second)
    # Both ended, one of them early: the next clip has the memory again.
    abandoned = frame_by_frame(model, graphs, 0)
    next(abandoned)
    abandoned.close()
    before = len(graphs.frames)
    assert before == 3 and not graphs.frames._recorded.in_use
    assert torch.equal(next(frame_by_frame(model, graphs, 1)), expected[1][0])


def test_weights_that_move_between_two_frames_are_followed():
    model, graphs = small_model(), repeating_graphs()
    model.set_backend("reference")  # which a CPU, too, runs with the weights where they lie
    sample(model, batch=1, graphs=graphs)
    frames = frame_by_frame(model, graphs, 0)
    results = [next(frames)]
    before = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for old in before:
        old.zero_()  # whoever still reads the old place gets nothing
    results += frames
    for result, expected in zip(results, frame_by_frame(model, None, 0), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("config, options", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_give_the_same_bits(config, options, dtype):
    model, graphs = small_model(config).cuda().to(dtype), SamplingGraphs()
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = sample(model, graphs=graphs, **options)
        assert torch.equal(result, sample(model, **options))
    assert len(graphs.sets) == 4 and len(graphs.frames) == 3
