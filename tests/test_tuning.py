"""nova.tune: what is measured, chosen, remembered and undone."""

import json
import pwd
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from kernel_testing import needs_triton
from reference_stand_in import StandInPipeline
from small_models import SMALL, SMALL_ROTARY, sample, small_model, small_prompts
from test_engine import counted_graphs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

import nova
from nova.cli.app import app
from nova.errors import DeviceError, InputError
from nova.guidance import Guidance
from nova.schedule import DDPMConfig, FlowMatchConfig, set_sizes
from nova.tuning import measuring
from nova.tuning.choices import COLUMNS, ROWS, TUNED, Choice, Stage, choices_of, together
from nova.tuning.measuring import measure
from nova.tuning.record import (
    Measurement,
    TuningRecord,
    TuningWarning,
    load_record,
    save_record,
)
from nova.tuning.step import MiddleStep
from nova.tuning.tuner import AppliedTuning
from nova_kernels import onednn
from nova_kernels.cpp_kernels import extension
from nova_kernels.errors import BackendError

CPU = torch.device("cpu")
FAST = {"num_inference_steps": 4, "num_diffusion_steps": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NOVA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Times of single calls, which are taken without a wait."""
    monkeypatch.setattr(measuring, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(measuring, "ROUNDS", 2)


@pytest.fixture(autouse=True)
def weights_as_they_lie(monkeypatch):
    """As on a GPU; on a CPU sampling may pack them, and then their layout is no choice."""
    monkeypatch.setattr(onednn, "can_pack", lambda weight: False)


@pytest.fixture
def pipe(tiny_video_folder):
    return nova.NOVAPipeline.from_pretrained(tiny_video_folder)


def prefer(monkeypatch, *preferred):
    """Make tuning choose these candidates, whatever the clock says."""

    def choose(choice, *_, **__):
        chosen = next((name for name in choice.candidates if name in (*preferred, TUNED)), None)
        chosen = choice.candidates[0] if chosen is None else chosen
        choice.set(chosen)
        return Measurement(choice.name, chosen, dict.fromkeys(choice.candidates, 1.0), {})

    monkeypatch.setattr("nova.tuning.tuner.measure", choose)


def strides(model):
    return {name: tensor.stride() for name, tensor in model.state_dict().items()}


# One choice --------------------------------------------------------------------------------------


class Clock:
    """Candidates by how long they take, in milliseconds, and what they compute."""

    def __init__(self, monkeypatch, milliseconds, outputs=None):
        self.now, self.current = 0.0, None
        self._seconds = {name: ms / 1e3 for name, ms in milliseconds.items()}
        self._outputs = outputs or {}
        monkeypatch.setattr(measuring.time, "perf_counter", lambda: self.now)
        self.choice = Choice(
            "how", Stage.DENOISE, tuple(milliseconds), self._set, partial(self._set, None)
        )

    def _set(self, name):
        self.current = name

    def work(self):
        self.now += self._seconds[self.current]
        output = self._outputs.get(self.current, 1.0)
        if isinstance(output, Exception):
            raise output
        return torch.full((3,), output)


def test_the_fastest_is_chosen(monkeypatch):
    clock = Clock(monkeypatch, {"first": 10.0, "slow": 20.0, "fast": 5.0})
    found = measure(clock.choice, clock.work, CPU)
    assert found.chosen == clock.current == "fast" and not found.refused
    assert found.seconds == pytest.approx({"first": 0.01, "slow": 0.02, "fast": 0.005})
    assert str(found) == "how: fast (fast 5 ms; first 10 ms; slow 20 ms)"


def test_a_small_gain_changes_nothing(monkeypatch):
    clock = Clock(monkeypatch, {"first": 10.0, "little": 9.91})
    assert measure(clock.choice, clock.work, CPU).chosen == clock.current == "first"


@pytest.mark.parametrize(
    "times, chosen",
    [
        ({"default": [10.0, 11.0], "other": [9.8, 9.9]}, "other"),  # 2 % in every turn
        ({"default": [10.0, 11.0], "other": [9.8, 10.1]}, "default"),  # 2 %, maybe by chance
        ({"default": [10.0, 11.0], "other": [9.4, 12.0]}, "other"),  # 6 % at best
        ({"default": [10.0, 11.0], "noisy": [9.6, 10.1], "other": [9.8, 9.9]}, "other"),
        ({"default": [10.0, 11.0], "fast": [9.0, 9.1], "other": [9.8, 9.9]}, "fast"),
    ],
)
def test_a_gain_in_every_turn_counts_more(times, chosen):
    assert measuring._fastest(times, "default") == chosen


@pytest.mark.parametrize(
    "output, reason",
    [
        (1.5, "wrong by 5.0e-01 of the largest value"),
        (float("nan"), "wrong by nan of the largest value"),
        (BackendError("no such card\nmore"), "BackendError: no such card"),
        (ValueError(), "ValueError"),
    ],
)
def test_what_computes_something_else_is_refused(monkeypatch, output, reason):
    clock = Clock(monkeypatch, {"first": 10.0, "wrong": 1.0}, {"wrong": output})
    found = measure(clock.choice, clock.work, CPU)
    assert found.chosen == clock.current == "first" and found.refused == {"wrong": reason}
    assert list(found.seconds) == ["first"]


@pytest.mark.parametrize("first, allowed", [(1.0, 1e-4), (1.1, 0.2)])
def test_what_rounding_is_allowed(monkeypatch, first, allowed):
    """Where it is magnified, twice the error of what runs by default."""
    outputs = {"first": first, "fast": 1 - 0.9 * allowed, "faster": 1 - 1.1 * allowed}
    clock = Clock(monkeypatch, {"first": 10.0, "fast": 5.0, "faster": 1.0}, outputs)
    found = measure(clock.choice, clock.work, CPU, exact=torch.ones(3, dtype=torch.float64))
    assert found.chosen == "fast" and found.refused.keys() == {"faster"}


def test_what_fails_by_default_is_an_error(monkeypatch):
    clock = Clock(monkeypatch, {"first": 10.0, "other": 1.0}, {"first": RuntimeError("broken")})
    with pytest.raises(RuntimeError, match="broken"):
        measure(clock.choice, clock.work, CPU)


def test_what_fails_by_default_in_a_later_turn_is_an_error(monkeypatch):
    clock = Clock(monkeypatch, {"first": 10.0, "other": 1.0})
    calls = []

    def work():
        calls.append(clock.current)
        if calls.count("other") and clock.current == "first":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return clock.work()

    with pytest.raises(torch.OutOfMemoryError):
        measure(clock.choice, work, CPU)


def test_float64_is_measured():
    choice = Choice("how", Stage.DENOISE, ("one", "other"), lambda name: None, lambda: None)
    found = measure(choice, lambda: torch.ones(1, dtype=torch.float64), CPU)
    assert found.seconds.keys() == {"one", "other"}


class Recorded:
    """Stands in for a CUDA graph of some work."""

    def __init__(self, work):
        self._work, self.output, self.replays = work, torch.zeros(3), 0

    def replay(self):
        self.replays += 1
        self.output.copy_(self._work())


def test_what_is_recorded_is_timed(monkeypatch):
    clock, made = Clock(monkeypatch, {"only": 10.0}), []

    def record(work):
        made.append(Recorded(work))
        return made[-1]

    measure(clock.choice, clock.work, CPU, record=record)
    assert len(made) == measuring.ROUNDS
    assert all(recorded.replays >= 2 for recorded in made)


def test_work_that_a_recording_misses_is_not_the_fastest(monkeypatch):
    """As a package's that launches on a stream of its own."""
    clock = Clock(monkeypatch, {"first": 10.0, "other": 20.0})

    class Missing(Recorded):
        def replay(self):
            if clock.current == "first":
                super().replay()

    found = measure(clock.choice, clock.work, CPU, record=Missing)
    assert found.chosen == "first"
    assert "a replay differed from the work" in found.refused["other"]


def test_short_memory_while_recording_is_told_as_such(monkeypatch):
    clock = Clock(monkeypatch, {"first": 10.0})

    def record(work):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        measure(clock.choice, clock.work, CPU, record=record)


# A model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_all_candidates_of_a_model_compute_the_same(steps):
    model = small_model(SMALL_ROTARY)
    before, expected_sample = strides(model), sample(model)
    for guidance in (Guidance(scale=1.0), Guidance(scale=3.0, image_scale=1.5)):
        schedule = FlowMatchConfig().schedule(3)
        step = MiddleStep(model, schedule, guidance, set_sizes(16, steps), 2)
        widths = [step.run(stage).shape[-1] for stage in (Stage.IMAGE_ENCODER, Stage.DENOISE)]
        assert widths == [model.config.image_encoder.embed_dim, model.config.token_dim]
        for choice in choices_of(model, CPU):
            choice.set(choice.candidates[0])
            expected = step.run(choice.stage)
            for candidate in choice.candidates[1:]:
                choice.set(candidate)
                torch.testing.assert_close(step.run(choice.stage), expected, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(sample(model), expected_sample, atol=1e-3, rtol=1e-3)
            choice.undo()
    assert strides(model) == before and torch.equal(sample(model), expected_sample)


@pytest.mark.parametrize("config", [SMALL, SMALL_ROTARY], ids=["absolute", "rotary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_in_float32(config, dtype):
    """The same one, which leaves the model as it was."""
    model = small_model(config).to(dtype)
    guidance = Guidance(scale=3.0, renorm=0.7)
    step = MiddleStep(model, DDPMConfig().schedule(3), guidance, set_sizes(16, 4), 2)
    for stage in Stage:
        exact = step.in_float32().run(stage)
        assert exact.dtype == torch.float32 and step.run(stage).dtype == dtype == model.dtype
        tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
        assert (step.run(stage) - exact).norm() < tolerance * exact.norm()


def test_choices_of_a_model(monkeypatch):
    model = small_model(SMALL_ROTARY)
    names = [choice.name for choice in choices_of(model, CPU)]
    assert names[:2] == ["attention", "weights of attn.qkv"]
    assert not any("weights" in c.name for c in choices_of(model, CPU, layouts=False))
    monkeypatch.setattr(onednn, "can_pack", lambda weight: True)
    assert not any("weights" in c.name for c in choices_of(model, CPU))
    for choice in choices_of(model, CPU):
        assert "triton" not in choice.candidates  # interpreted on a CPU
    model.set_backend("reference")  # named: nothing to choose
    assert {c.name for c in choices_of(model, CPU)}.isdisjoint({"denoise", "rope3d"})


@needs_triton
@pytest.mark.parametrize("capability, default", [((9, 0), "auto"), ((8, 0), "reference")])
def test_implementations_compete_with_what_runs_without_a_choice(monkeypatch, capability, default):
    """On a GPU that is one or another by size: by any single name tuning would lose the others."""
    card = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    model = small_model(SMALL_ROTARY)
    with FakeTensorMode():  # there is no GPU
        found = {choice.name: choice for choice in choices_of(model, torch.device("cuda", 0))}
    for name in ("residual_norm", "linear_gelu", "rope3d", "denoise"):
        assert found[name].candidates[0] == default not in found[name].unproven
        assert {"reference", "triton"} <= set(found[name].candidates)
        is_verified = default == "auto" and name != "denoise"
        assert ("triton" in found[name].unproven) == (not is_verified)
    block = model.image_encoder.blocks[0]
    found["linear_gelu"].set("triton")
    assert block.mlp.backend == "triton"
    found["linear_gelu"].set(default)
    assert block.mlp.backend == default


def test_together():
    model = small_model()
    of_stage = [c for c in choices_of(model, CPU) if c.stage is Stage.IMAGE_ENCODER]
    before = strides(model)
    all_of_them = together(of_stage, [choice.candidates[-1] for choice in of_stage])
    all_of_them.set("tuned")
    assert model.image_encoder.blocks[0].attn.kernel_library == "math"
    assert model.image_encoder.blocks[-1].mlp.fc2.weight.stride()[0] == 1
    all_of_them.set("default")
    assert strides(model) == before
    assert model.image_encoder.blocks[0].attn.kernel_library == "torch"


def test_another_library_or_layout_is_recorded_anew():
    model, (graphs, made) = small_model(), counted_graphs()
    sample(model, graphs=graphs)
    for choice in choices_of(model, CPU)[:2]:
        before = len(made)
        choice.set(choice.candidates[1])
        assert torch.equal(sample(model, graphs=graphs), sample(model))
        assert len(made) == before + 7  # all steps of a frame, all passes over frames
    assert graphs.failure is None


# A pipeline --------------------------------------------------------------------------------------


def frames_of(pipe):
    generator = torch.Generator().manual_seed(1)
    options = {**FAST, "max_latent_length": 2, "output_type": "pt"}
    return pipe("a cat", generator=generator, **options).frames


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tune_by_the_clock(pipe, dtype):
    """In half precision candidates are held against results in float32."""
    exact = frames_of(pipe)
    pipe.to("cpu", dtype)
    rounding = (frames_of(pipe) - exact).abs().max()
    record = nova.tune(pipe, batch_size=2, **FAST)
    assert {entry.choice for entry in record.measurements} == record.facts["choices"].keys()
    for entry in record.measurements:
        assert entry.chosen in entry.seconds and not entry.refused
    assert nova.report(pipe).tuning is record and str(record) in str(nova.report(pipe))
    # What was chosen may round otherwise, not worse by far.
    assert (frames_of(pipe) - exact).abs().max() < 2e-3 + 3 * rounding


def test_autocast_is_off_while_it_measures(pipe, monkeypatch):
    """As it is in the calls to come."""
    states = []
    run = MiddleStep.run

    def watched(step, stage):
        states.append(torch.is_autocast_enabled("cpu"))
        return run(step, stage)

    monkeypatch.setattr(MiddleStep, "run", watched)
    with torch.autocast("cpu", torch.bfloat16):
        nova.tune(pipe, **FAST)
        assert torch.is_autocast_enabled("cpu")
    assert states and not any(states)


@pytest.mark.gpu
def test_tune_by_replays_of_graphs(pipe):
    pipe.to("cuda").enable_cuda_graphs()
    before = frames_of(pipe)
    record = nova.tune(pipe, **FAST)
    assert record.facts["cuda_graphs"] and "INTERNAL ASSERT" not in str(record)
    torch.testing.assert_close(frames_of(pipe), before, atol=2e-3, rtol=0)


@pytest.mark.skipif(extension.obstacle() is not None, reason="no other backend to choose")
def test_what_was_chosen_is_used_until_it_is_undone(pipe, monkeypatch):
    prefer(monkeypatch, "math", COLUMNS, "reference")
    before, model = strides(pipe.transformer), pipe.transformer
    nova.tune(pipe, **FAST)
    block = model.image_encoder.blocks[0]
    assert block.attn.kernel_library == "math" and model.image_decoder.backend == "reference"
    assert block.attn.qkv.weight.stride() == (1, block.attn.qkv.out_features)
    assert set(type(p) for p in block.parameters()) == {nn.Parameter}
    pipe.to("cpu")  # nothing moves
    assert pipe.tuning is not None
    pipe.to(torch.float64)
    assert pipe.tuning is None and nova.report(pipe).tuning is None
    assert strides(model) == before and block.attn.kernel_library == "torch"
    assert model.image_decoder.backend == "auto"


def test_offloading_undoes_it(pipe, monkeypatch):
    prefer(monkeypatch, "math")
    nova.tune(pipe, **FAST)
    pipe.enable_model_cpu_offload("cpu")
    assert pipe.tuning is None
    nova.tune(pipe, **FAST)
    assert pipe.transformer.image_encoder.blocks[0].attn.kernel_library == "math"


def test_a_saved_pipeline_is_laid_out_as_usual(pipe, monkeypatch, tmp_path):
    prefer(monkeypatch, COLUMNS)
    nova.tune(pipe, **FAST)
    pipe.save_pretrained(tmp_path / "saved")
    saved = nova.NOVAPipeline.from_pretrained(tmp_path / "saved").transformer
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor)
    assert all(tensor.is_contiguous() for tensor in saved.state_dict().values())
    assert not pipe.transformer.image_encoder.blocks[0].attn.qkv.weight.is_contiguous()


def test_gains_that_do_not_add_up_are_not_kept(pipe, monkeypatch):
    measured = []

    def choose(choice, *_, **__):
        measured.append(choice.name)
        chosen = choice.candidates[-1] if choice.name != Stage.IMAGE_ENCODER.value else "default"
        return Measurement(choice.name, chosen, {chosen: 1.0}, {})

    monkeypatch.setattr("nova.tuning.tuner.measure", choose)
    record = nova.tune(pipe, **FAST)
    assert Stage.IMAGE_ENCODER.value in measured
    chosen = {entry.choice: entry.chosen for entry in record.measurements}
    assert chosen["attention"] == "torch" and chosen["weights of mlp.fc1"] == ROWS
    assert pipe.transformer.image_encoder.blocks[0].attn.kernel_library == "torch"


def test_what_fails_while_it_measures_leaves_the_model_as_it_was(pipe, monkeypatch):
    before = strides(pipe.transformer)

    def fail(choice, *_, **__):
        choice.set(choice.candidates[-1])
        if choice.name == "weights of mlp.fc1":
            raise torch.OutOfMemoryError

    monkeypatch.setattr("nova.tuning.tuner.measure", fail)
    with pytest.raises(DeviceError, match="smaller batch_size"):
        nova.tune(pipe, **FAST)
    assert pipe.tuning is None and strides(pipe.transformer) == before
    assert pipe.transformer.image_encoder.blocks[0].attn.kernel_library == "torch"


def test_bad_sizes(pipe):
    for size in (0, 1.5, "2"):
        with pytest.raises(InputError, match="batch_size must be a whole number of at least 1"):
            nova.tune(pipe, batch_size=size)
    with pytest.raises(InputError, match="num_inference_steps"):
        nova.tune(pipe, num_inference_steps=0)
    with pytest.raises(InputError, match="num_diffusion_steps"):
        nova.tune(pipe, num_diffusion_steps=0)


def test_a_pipeline_of_the_reference():
    pipe = StandInPipeline()
    nova.accelerate(pipe)
    before = strides(pipe.transformer)
    record = nova.tune(pipe, **FAST)
    assert not any("weights" in name for name in record.facts["choices"])
    assert strides(pipe.transformer) == before and nova.report(pipe).tuning is record
    pipe(small_prompts(SMALL, 2), **FAST, max_latent_length=2)
    assert nova.report(pipe).tuning is record
    pipe.transformer.double()
    pipe(small_prompts(SMALL, 2), **FAST, max_latent_length=2)
    assert nova.report(pipe).tuning is None
    nova.restore(pipe)
    with pytest.raises(InputError, match="nova.accelerate"):
        nova.tune(pipe, **FAST)


# The cache ---------------------------------------------------------------------------------------


def files_of(cache):
    return list((cache / "tuning").glob("*.json"))


def test_measured_once(pipe, cache, monkeypatch):
    first = nova.tune(pipe, **FAST)
    assert len(files_of(cache)) == 1
    monkeypatch.setattr("nova.tuning.tuner.measure", None)
    assert nova.tune(pipe, **FAST) == first
    with pytest.raises(TypeError):
        nova.tune(pipe, **FAST, measure_again=True)
    for other in ({"batch_size": 2}, {"num_diffusion_steps": 5}, {"guidance_scale": 1.0}):
        with pytest.raises(TypeError):
            nova.tune(pipe, **{**FAST, **other})


@pytest.mark.parametrize(
    "reason, is_kept",
    [
        ("OutOfMemoryError: CUDA out of memory", False),
        ("AcceleratorError: CUDA error: out of memory", False),
        ("ImportError: no cutlass", False),
        ("ModuleNotFoundError: No module named 'cutlass'", False),
        ("RuntimeError: wrong shape", True),
    ],
)
def test_what_may_be_mended_is_measured_again(pipe, cache, monkeypatch, reason, is_kept):
    def refuse(choice, *_, **__):
        choice.set(choice.candidates[0])
        refused = dict.fromkeys(choice.candidates[1:], reason)
        return Measurement(choice.name, choice.candidates[0], {choice.candidates[0]: 1.0}, refused)

    monkeypatch.setattr("nova.tuning.tuner.measure", refuse)
    nova.tune(pipe, **FAST)
    assert bool(files_of(cache)) == is_kept


RECORD = TuningRecord(
    {"batch_size": 1, "dtype": "float32", "device": "cpu", "choices": {"how": ["a", "b"]}},
    (Measurement("how", "b", {"a": 0.002, "b": 0.001}, {"c": "fails"}),),
    (),
)


def test_a_record_comes_back():
    assert load_record(RECORD.facts) is None
    save_record(RECORD)
    assert load_record(RECORD.facts) == RECORD
    assert str(RECORD) == (
        "tuned for batch 1, float32, on cpu\n  how: b (b 1 ms; a 2 ms; c: fails)"
    )
    assert load_record({**RECORD.facts, "batch_size": 2}) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"measurements"', '"other"'),
        lambda text: text.replace('"chosen": "b"', '"chosen": "c"'),
        lambda text: text.replace('"refused"', '"unknown"'),
        lambda text: text.replace('"batch_size": 1', '"batch_size": 3'),
        lambda text: re.sub('"seconds": {.*?}', '"seconds": null', text, flags=re.DOTALL),
        lambda text: text.replace("0.002", "null"),
        lambda text: re.sub('"refused": {.*?}', '"refused": [1]', text, flags=re.DOTALL),
        lambda text: text.replace('"fails"', "1"),
        lambda text: text.replace("0.002", "[" * 100_000 + "]" * 100_000),
    ],
)
def test_a_damaged_record_is_none(cache, damage):
    save_record(RECORD)
    (file,) = files_of(cache)
    damaged = damage(file.read_text())
    assert damaged != file.read_text()
    file.write_text(damaged)
    assert load_record(RECORD.facts) is None


def test_records_that_cannot_be_kept_are_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NOVA_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set NOVA_CACHE to a folder"):
        save_record(RECORD)


def test_records_without_a_home_folder(monkeypatch):
    """As in a container whose user has no name."""

    def fail(uid):
        raise KeyError(uid)

    for name in ("NOVA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", fail)
    assert load_record(RECORD.facts) is None
    with pytest.warns(TuningWarning, match="set NOVA_CACHE to a folder"):
        save_record(RECORD)


def test_the_cache_is_named_by_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NOVA_CACHE", "~/records")
    save_record(RECORD)
    assert load_record(RECORD.facts) == RECORD and len(files_of(tmp_path / "records")) == 1


def test_records_hold_what_json_holds(pipe, cache):
    facts = nova.tune(pipe, **FAST).facts
    (file,) = files_of(cache)
    assert json.loads(file.read_text())["facts"] == facts


def test_applied_tuning_fits_where_it_was_made():
    model = small_model()
    applied = AppliedTuning.apply(replace(RECORD, measurements=()), [], model)
    assert applied.fits(model) and not applied.fits(model.to(torch.float64))


def test_nova_generate_tune(tiny_video_folder, tmp_path, cache):
    arguments = ["generate", "a cat", "--model", str(tiny_video_folder), "--tune", "--steps", "4"]
    arguments += ["--diffusion-steps", "3", "--latents", "2", "--out", str(tmp_path / "cat.gif")]
    arguments += ["--device", "cpu"]  # on a GPU others may leave too little memory to tune
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "tuned for batch 1" in result.output and len(files_of(cache)) == 1
