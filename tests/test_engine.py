"""Recorded steps. Without a GPU, a stand-in repeats the work on the memory it was recorded on."""

import warnings

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


def test_weights_that_change_in_place_are_followed():
    model, graphs = small_model(), repeating_graphs()
    before = sample(model, graphs=graphs)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    result = sample(model, graphs=graphs)
    assert torch.equal(result, sample(model)) and not torch.equal(result, before)


def count_recordings(graphs):
    """How often the graphs given were recorded, as a list that grows."""
    made = []

    def make_recorder():
        return lambda work: made.append(work) or Repeated(work)

    graphs._make_recorder = make_recorder
    return made


def test_another_kind_of_run_is_recorded_anew():
    model, graphs = small_model(), repeating_graphs()
    made = count_recordings(graphs)
    sample(model, graphs=graphs)
    sample(model, graphs=graphs)
    assert len(made) == 7
    for change in ({"batch": 1}, {"guidance": Guidance(scale=4.0)}, {"steps": 3}):
        before = len(made)
        result = sample(model, graphs=graphs, **change)
        assert len(made) > before and torch.equal(result, sample(model, **change))
    model.double().float()  # other addresses
    before = len(made)
    assert torch.equal(sample(model, graphs=graphs), sample(model)) and len(made) > before


def test_latents_that_a_callback_replaces():
    model, graphs = small_model(), repeating_graphs()

    def halve(step):
        return step.latents / 2 if step.set_index == 1 else None

    for _ in range(2):
        result = sample(model, graphs=graphs, on_set_end=halve)
        assert torch.equal(result, sample(model, on_set_end=halve))


def test_where_recording_fails_sampling_goes_on():
    def make_recorder():
        def record(work):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

        return record

    model, graphs = small_model(), SamplingGraphs(make_recorder)
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
    model, graphs = small_model(), SamplingGraphs(lambda: Wrong)
    with pytest.warns(UserWarning, match="a replay differed from the work by up to 1"):
        result = sample(model, graphs=graphs)
    assert torch.equal(result, sample(model))


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
