"""Candidates in a process of their own: what fails or takes the process along is refused."""

import sys

import pytest
import torch
from small_models import SMALL, small_model

import nova_kernels.ops.denoise
from nova.guidance import Guidance
from nova.schedule import DDPMConfig, FlowMatchConfig, set_sizes
from nova.tuning import choices, trial
from nova.tuning.choices import choices_of
from nova.tuning.record import Measurement
from nova.tuning.trial import TrialRun, try_apart
from nova.tuning.tuner import TunedRun, tune_sampler
from nova_kernels.cpp_kernels import extension
from nova_kernels.dispatch import Op

RUN = TrialRun(
    "cpu",
    "float32",
    SMALL,
    FlowMatchConfig().schedule(3),
    Guidance(scale=3.0, image_scale=1.5),
    set_sizes(16, 4),
    batch_size=2,
    cuda_graphs=False,
)
# In place of the real process: a candidate called cpp ends it.
STAND_IN = """
import json, os, sys
from nova_kernels.isolation import answers_to_parent
say = answers_to_parent()
run = json.load(sys.stdin)
say("started")
for _, name in run["candidates"]:
    if name == "cpp":
        os._exit(3)
    say(None)
"""


class Sampler:
    graphs = tuning = None


def use_stand_in(monkeypatch):
    monkeypatch.setattr(trial, "PROGRAM", [sys.executable, "-c", STAND_IN])


@pytest.mark.parametrize("schedule", [RUN.schedule, DDPMConfig().schedule(4)])
def test_a_run_crosses_over(schedule):
    run = TrialRun(**{**vars(RUN), "schedule": schedule})
    candidates = [("attention", "math"), ("denoise", "cpp")]
    assert TrialRun.from_json(run.to_json(candidates)) == (run, candidates)


def test_a_real_process():
    """It computes with a model of the run's geometry, and goes on after one that raises."""
    candidates = [("attention", "none such"), ("attention", "math")]
    result = try_apart(RUN, candidates)
    assert result.is_complete
    assert result.refused == {("attention", "none such"): "KeyError: 'none such'"}


def test_lack_of_memory_is_not_remembered(monkeypatch, tmp_path):
    def choose(choice, *_, refused, **__):
        first = choice.candidates[0]
        return Measurement(choice.name, first, {first: 1.0}, {"other": "OutOfMemoryError: none"})

    monkeypatch.setenv("NOVA_CACHE", str(tmp_path))
    monkeypatch.setattr("nova.tuning.tuner.measure", choose)
    tune_sampler(Sampler(), TunedRun(small_model(), RUN.schedule, RUN.guidance, [16], 1))
    assert not any(tmp_path.rglob("*.json"))


def test_a_candidate_that_takes_its_process_along_is_refused(monkeypatch):
    use_stand_in(monkeypatch)
    result = try_apart(RUN, [("denoise", "triton"), ("denoise", "cpp")])
    reason = "in a trial its process ended with code 3"
    assert result.refused == {("denoise", "cpp"): reason} and not result.is_complete
    assert result.refused_of("denoise") == {"cpp": reason} and not result.refused_of("attention")


@pytest.mark.skipif(extension.obstacle() is not None, reason="no other backend to choose")
@pytest.mark.parametrize("verified", [True, False])
def test_tuning_tries_what_is_not_verified(monkeypatch, tmp_path, verified):
    monkeypatch.setenv("NOVA_CACHE", str(tmp_path))
    op = nova_kernels.ops.denoise.OP if verified else Op("denoise", ("cpp",))
    monkeypatch.setattr(choices, "DENOISE", op)
    model = small_model()
    tried = [(c.name, name) for c in choices_of(model, model.device) for name in c.unproven]
    assert tried == ([] if verified else [("denoise", "cpp")])
    use_stand_in(monkeypatch)
    run = TunedRun(model, RUN.schedule, RUN.guidance, RUN.set_sizes, RUN.batch_size)
    record = tune_sampler(Sampler(), run)
    (denoise,) = (entry for entry in record.measurements if entry.choice == "denoise")
    if verified:
        assert "cpp" in denoise.seconds and not denoise.refused
    else:
        assert denoise.chosen == "reference" and "code 3" in denoise.refused["cpp"]
    # What ended its process may go well the next time.
    assert any(tmp_path.rglob("*.json")) == verified


@pytest.mark.gpu
def test_kernels_on_a_gpu():
    run = TrialRun(**{**vars(RUN), "device": "cuda:0", "dtype": "float16", "cuda_graphs": True})
    model = small_model().to("cuda", torch.float16)
    candidates = [(c.name, name) for c in choices_of(model, model.device) for name in c.unproven]
    assert try_apart(run, candidates).refused == {}
