"""What benchmarks/fps.py is made of: workloads, gate, rows, stages, tables and pictures."""

import copy
import json
import re
import shutil
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import fps_measure
import fps_memory
import fps_runs
import pytest
import torch
from card_facts import parse_card_facts
from ceilings import Ceilings, measure_ceilings
from fps_gate import Gate
from fps_measure import measure
from fps_plot import check_plot, plot
from fps_runs import run_samplers
from fps_samplers import (
    DIFFNEXT_ACCELERATED,
    EXACT,
    EXACT_COMPILED,
    GRAPHS,
    GRAPHS_COMPILED,
    PLAIN,
    PLAIN_COMPILED,
    PROGRESS,
    REFERENCE_OPS,
    TUNED,
    CompiledSampler,
    make_samplers,
)
from fps_table import PUBLISHED, captions, print_tables
from fps_text import PHI_2, PROMPT, SIZES, make_text_encoder
from fps_vae import IMAGE_VAE, decode_seconds, make_vae
from fps_workloads import RELEASED_VIDEO, Workload, choose_workloads
from random_model import RandomModelRun
from reference_package import DIFFNEXT
from shared_weights import share_weights
from small_models import Repeated, repeating_graphs, small_model

from nova.engine import SamplingGraphs
from nova.errors import ConfigError, InputError
from nova.plain_sampling import generate_frames_plain
from nova.sampling import generate_frames
from nova.step_hooks import StepProgress
from nova_kernels import onednn
from nova_kernels.dispatch import Op

CPU = torch.device("cpu")
TINY = Workload("tiny-video", 2, 3, num_diffusion_steps=2, repeats=2, vae="tiny")
FACTS = {"name": "a processor", "threads": 1, "torch": "2", "matmul_TFLOP_per_s": 0.5}


def tiny_run():
    sizes = {"num_frames": 2, "num_steps": 3, "num_diffusion_steps": 2}
    return RandomModelRun("tiny-video", batch=1, device=CPU, dtype=torch.float32, **sizes)


def run_checked(samplers, **options):
    run = tiny_run()
    return run_samplers(run, samplers, CPU, Gate(run, 1e-4), **options)


def rows_of(workload=TINY, samplers=None, **options):
    samplers = make_samplers(CPU) if samplers is None else samplers
    ceilings = Ceilings(rate=1e9, bandwidth=1e9)
    options = {"device": CPU, "dtype": torch.float32, **options}
    return measure(workload, 2, samplers, ceilings, **options)


def test_rows():
    plain, exact = rows_of()
    assert (plain["sampler"], exact["sampler"]) == (PLAIN, EXACT)
    for row in (plain, exact):
        assert len(row["latencies_s"]) == 2 and row["sets_run"] == row["sets_of_video"] == 6
        assert 0 < row["first_frame_s"] < row["latency_s"]
        # Two clips of five frames.
        assert row["fps"] == pytest.approx(10 / row["latency_s"])
        assert row["fps_with_vae"] == pytest.approx(10 / (row["latency_s"] + row["vae_s"]))
        assert row["ratio_to_plain"] == pytest.approx(plain["latency_s"] / row["latency_s"])
        assert row["floor_s"] == row["operations"] / 1e9
        assert row["share_of_floor"] == pytest.approx(row["floor_s"] / row["latency_s"])
        assert row["max_error_vs_plain"] <= row["tolerance"]
        assert row["peak_memory_bytes"] > 0
    assert "stages_s" not in plain
    assert list(exact["stages_s"]) == ["video encoder", "image encoder", "denoise", "rest", "VAE"]
    assert min(exact["stages_s"].values()) > 0


def test_rows_are_kept_as_they_come():
    kept = []
    rows = rows_of(keep=lambda rows: kept.append(copy.deepcopy(rows)))
    runs = [[len(row.get("latencies_s", ())) for row in rows] for rows in kept]
    assert runs[:6] == [[0], [0, 0], [1, 0], [1, 1], [2, 1], [2, 2]]
    assert kept[1][1]["refused"] == "not timed yet" and kept[1][1]["first_run_s"] > 0
    assert kept[2][0]["fps"] > 0 and kept[2][0]["vae_s"] is None
    assert kept[-1] == rows and rows[1]["vae_s"] > 0 and "stages_s" in rows[1]


def test_videos_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(fps_measure, "decode_seconds", lambda vae, clip, *_: 2.0 * len(clip))
    (plain,) = rows_of(samplers={PLAIN: generate_frames_plain}, stages=False)
    assert plain["batch"] == 2 and plain["vae_s"] == 4.0
    assert plain["fps_with_vae"] == pytest.approx(2 * 5 / (plain["latency_s"] + 4))


def test_too_little_memory_for_what_is_timed_by_itself(monkeypatch):
    def greedy(*arguments):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(fps_measure, "decode_seconds", greedy)
    monkeypatch.setattr(fps_measure, "stage_seconds", greedy)
    said = []
    plain, exact = rows_of(say=said.append)
    assert plain["fps"] > 0 and plain["vae_s"] is None and plain["fps_with_vae"] is None
    assert "stages_s" not in exact
    assert said[-2:] == [f"not enough memory to time the {what}" for what in ("VAE", "stages")]


def test_plain_that_is_not_a_number():
    def broken(model, conditioning, **options):
        return (
            frame * torch.nan for frame in generate_frames_plain(model, conditioning, **options)
        )

    rows = rows_of(samplers={PLAIN: broken, EXACT: generate_frames}, stages=False)
    assert all(row["refused"].startswith("wrong: ") for row in rows)


def test_part_of_a_video():
    workload = Workload("tiny-video", 2, 3, num_diffusion_steps=2, num_sets=1, repeats=1)
    row = rows_of(workload, stages=False)[1]
    assert (row["sets_run"], row["sets_of_video"]) == (1, 6)
    assert row["first_frame_s"] is None and row["fps_with_vae"] is None and "stages_s" not in row
    assert row["fps"] == pytest.approx(2 * 5 / 6 / row["latency_s"])


def test_the_first_latent_frames_of_a_video():
    workload = Workload("tiny-video", 3, 2, num_diffusion_steps=2, run_frames=2, repeats=1)
    row = rows_of(workload)[1]
    assert (row["sets_run"], row["sets_of_video"]) == (4, 6)
    assert row["first_frame_s"] <= row["latency_s"] and row["fps_with_vae"] is None
    assert row["fps"] == pytest.approx(2 * 9 * 4 / 6 / row["latency_s"])


def wrong_sampler(model, conditioning, **options):
    return (frame * 1.01 for frame in generate_frames(model, conditioning, **options))


def greedy_sampler(model, conditioning, **options):
    raise torch.OutOfMemoryError("no memory")


def broken_sampler(model, conditioning, **options):
    raise RuntimeError("no C compiler\nfound")


@pytest.mark.parametrize(
    "seconds_a_frame, frames_run", [(1.0, 3), (10.0, 3), (11.0, 2), (16.0, 1), (99.0, 1)]
)
def test_a_slow_sampler_makes_a_part_of_a_video(monkeypatch, seconds_a_frame, frames_run):
    """As many latent frames as the plain one makes in the time; all else counts as their share."""

    def timed_run(run, sampler, device):
        latents = run.sample(sampler)
        return latents, seconds_a_frame * latents.shape[2], seconds_a_frame

    monkeypatch.setattr(fps_runs, "timed_run", timed_run)
    workload = replace(TINY, num_frames=3, run_seconds=30.0)
    said = []
    row = rows_of(workload, say=said.append)[1]
    assert (row["sets_run"], row["sets_of_video"]) == (3 * frames_run, 9)
    assert said[0] == f"{3 * frames_run} of 9 sets are run"
    assert said[1] == f"plain: first run {seconds_a_frame * frames_run:.3g} s"
    share = frames_run / 3
    assert row["latency_s"] == seconds_a_frame * frames_run
    assert row["fps"] == pytest.approx(2 * 9 * share / row["latency_s"])
    whole = row["latency_s"] + share * row["vae_s"]
    assert row["fps_with_vae"] == pytest.approx(2 * 9 * share / whole)
    assert row["stages_s"]["VAE"] == pytest.approx(share * row["vae_s"])


def short_sampler(model, conditioning, **options):
    return (frame[..., :-1] for frame in generate_frames(model, conditioning, **options))


def test_what_is_wrong_is_not_timed():
    samplers = {PLAIN: generate_frames_plain, "wrong": wrong_sampler, "greedy": greedy_sampler}
    samplers |= {"broken": broken_sampler, "short": short_sampler}
    seen = run_checked(samplers, repeats=1)
    assert seen["wrong"].refused.startswith("wrong: differs from plain by 1.0e-02")
    assert seen["greedy"].refused == "not enough memory"
    assert seen["broken"].refused == "failed: RuntimeError: no C compiler"
    assert seen["short"].refused.startswith("wrong: shape (1, ")
    assert not seen["wrong"].latencies and not seen["greedy"].latencies
    assert seen[PLAIN].refused is None and len(seen[PLAIN].latencies) == 1


class OverwrittenGraphs(Repeated):
    """What is recorded is right when it is checked, and wrong in later replays."""

    replays = 0

    def replay(self):
        super().replay()
        self.replays += 1
        if self.replays > 1:
            self.output.zero_()


def test_wrong_replays_are_refused(monkeypatch):
    """In its only frame the first run records; all that it gives was computed as usual."""
    wrong = partial(SamplingGraphs, record=OverwrittenGraphs)
    monkeypatch.setattr("fps_samplers.SamplingGraphs", wrong)
    samplers = make_samplers(torch.device("cuda"))
    rows = rows_of(replace(TINY, num_frames=1), samplers, stages=False)
    assert [row["sampler"] for row in rows] == [PLAIN, EXACT, GRAPHS]
    plain, exact, graphs = rows
    assert graphs["refused"].startswith("wrong: differs from plain by") and "fps" not in graphs
    assert "refused" not in plain and "refused" not in exact


def test_memory_that_other_samplers_keep_does_not_count(monkeypatch):
    allocated = [100]  # weights
    peak = []
    monkeypatch.setattr(fps_memory, "held_bytes", lambda device: allocated[0])
    monkeypatch.setattr(fps_memory, "PeakBytes", lambda device: SimpleNamespace(read=peak.pop))
    plain, graphs = (fps_memory.SamplerMemory(torch.device("cuda"), 100) for _ in range(2))

    def run(memory, takes, keeps):
        with memory.run():
            peak.append(allocated[0] + takes)
            allocated[0] += keeps

    run(plain, takes=30, keeps=0)
    run(graphs, takes=50, keeps=40)
    run(plain, takes=20, keeps=0)
    run(graphs, takes=5, keeps=0)
    assert (plain.peak_bytes, graphs.peak_bytes) == (130, 150)


def counting(calls):
    def sampler(model, conditioning, **options):
        calls.append(1)
        return generate_frames(model, conditioning, **options)

    return sampler


@pytest.mark.parametrize(
    "options, runs", [({}, 4), ({"warm_up": False}, 3), ({"seconds": 0.0}, 3)], ids=str
)
def test_number_of_runs(options, runs):
    calls = []
    samplers = {PLAIN: counting(calls)}
    seen = run_checked(samplers, repeats=3, **options)
    assert len(calls) == runs
    assert len(seen[PLAIN].latencies) == runs - options.get("warm_up", True)


@pytest.mark.parametrize("name", [PLAIN_COMPILED, DIFFNEXT, DIFFNEXT_ACCELERATED])
def test_a_first_run_that_starts_up_never_counts(name):
    calls = []
    samplers = {PLAIN: generate_frames_plain, name: counting(calls)}
    seen = run_checked(samplers, repeats=1, warm_up=False)
    assert len(calls) == 2 and len(seen[name].latencies) == 1


def test_compiled_sampler(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options))
    )
    run, sampler = tiny_run(), CompiledSampler(generate_frames_plain)
    assert torch.equal(run.sample(sampler), run.sample(generate_frames_plain))
    run.sample(sampler)
    # Blocks of the image encoder and of the MLP, once, for any length.
    assert len(compiled) == 4 + 2
    assert all(options == {"dynamic": True} for _, options in compiled)
    ours = {id(module) for module in run._model.modules()}
    assert not any(id(module) in ours for module, _ in compiled)


def test_samplers_with_compiled_blocks():
    names = [PLAIN, PLAIN_COMPILED, EXACT, EXACT_COMPILED]
    assert list(make_samplers(CPU, compiled=True)) == names
    on_a_gpu = make_samplers(torch.device("cuda"), compiled=True)
    assert list(on_a_gpu) == [*names, GRAPHS, GRAPHS_COMPILED]


def test_compiled_blocks_from_graphs(monkeypatch):
    monkeypatch.setattr("fps_samplers.SamplingGraphs", repeating_graphs)
    run, sampler = tiny_run(), make_samplers(torch.device("cuda"), compiled=True)[GRAPHS_COMPILED]
    monkeypatch.setattr(
        torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager")
    )
    expected = run.sample()
    for _ in range(2):
        torch.testing.assert_close(run.sample(sampler), expected)
    assert sampler._compiled.has_compiled_blocks
    torch.compiler.reset()


def test_tuned_sampler(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NOVA_CACHE", str(tmp_path / "cache"))
    run, sampler = tiny_run(), make_samplers(CPU, tuned=True)[TUNED]
    before = {name: tensor.stride() for name, tensor in run._model.state_dict().items()}
    torch.testing.assert_close(run.sample(sampler), run.sample(generate_frames))
    first = sampler.tuning
    run.sample(sampler)
    assert sampler.chosen == {entry.choice: entry.chosen for entry in first.record.measurements}
    assert sampler.chosen["attention"] in ("torch", "math")
    assert sampler.tuning is first and capsys.readouterr().err.count("tuned for batch 1") == 1
    # The other samplers go on with the model as it was.
    assert before == {name: tensor.stride() for name, tensor in run._model.state_dict().items()}


def no_recording(work):
    raise RuntimeError("not permitted when stream is capturing\nCUDA error")


@pytest.mark.filterwarnings("ignore:CUDA graphs of the:UserWarning")
def test_what_is_not_recorded_does_not_pass_for_graphs(monkeypatch, tmp_path, capsys):
    """Sampling goes on without graphs then, and gives what is right."""
    monkeypatch.setenv("NOVA_CACHE", str(tmp_path))
    unrecorded = partial(SamplingGraphs, record=no_recording)
    monkeypatch.setattr("fps_samplers.SamplingGraphs", unrecorded)
    rows = rows_of(samplers=make_samplers(torch.device("cuda"), tuned=True))
    plain, exact, graphs, tuned = rows
    assert [graphs["sampler"], tuned["sampler"]] == [GRAPHS, TUNED]
    reason = "recording failed: not permitted when stream is capturing"
    for row in (graphs, tuned):
        assert row["refused"].startswith("failed: RecordingError: ") and "fps" not in row
        assert f"set loop: {reason}; video encoder: {reason}" in row["refused"]
    assert "refused" not in plain and "refused" not in exact
    print_tables(rows, FACTS)
    assert capsys.readouterr().out.count("failed: RecordingError") == 2


@pytest.mark.parametrize("name", [GRAPHS, TUNED])
def test_what_is_recorded_is_right(monkeypatch, tmp_path, name):
    monkeypatch.setenv("NOVA_CACHE", str(tmp_path))
    monkeypatch.setattr("fps_samplers.SamplingGraphs", repeating_graphs)
    run, sampler = tiny_run(), make_samplers(torch.device("cuda"), tuned=True)[name]
    torch.testing.assert_close(run.sample(sampler), run.sample(generate_frames))


def test_reference_ops_sampler(monkeypatch):
    run = tiny_run()
    sampler = make_samplers(CPU, reference_ops=True)[REFERENCE_OPS]
    expected = run.sample(generate_frames)
    chosen = []
    choose = Op.choose
    monkeypatch.setattr(
        Op, "choose", lambda *given: chosen.append(choose(*given)) or choose(*given)
    )
    monkeypatch.setattr(onednn.PackedLinear, "forward", None)
    torch.testing.assert_close(run.sample(sampler), expected, atol=1e-4, rtol=1e-4)
    assert set(chosen) == {"reference"}
    assert run._model.image_decoder.backend == "auto"  # the other samplers go on as before


def test_progress_sampler(monkeypatch):
    run, seen = tiny_run(), []
    sampler = make_samplers(CPU, progress=True)[PROGRESS]
    update = StepProgress.update
    monkeypatch.setattr(StepProgress, "update", lambda bars, step: seen.append(update(bars, step)))
    assert torch.equal(run.sample(sampler), run.sample(generate_frames))
    assert len(seen) == run.sets_run


def test_share_weights():
    model = small_model()
    model.set_backend("reference")
    twin = share_weights(model)
    assert twin is not model and not any(m is twin.image_encoder for m in model.modules())
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr() and not theirs.requires_grad
    assert twin.image_encoder.blocks[0].backend == "reference"


def test_default_workloads():
    assert choose_workloads("cpu") == [Workload("small-video", 5, 16, 25)]
    small, released = choose_workloads("cuda")
    assert released.batches == (1, 4, 24) and released.vae == "osp" and small.vae == "tiny"
    assert (released.num_frames, released.num_steps, released.num_diffusion_steps) == (9, 64, 25)
    assert released.pixel_frames == 33
    assert released.text == PHI_2 and small.text is None


def test_chosen_workloads():
    (workload,) = choose_workloads(
        "cpu",
        geometries=["small-video"],
        batches=[3],
        num_steps=128,
        num_diffusion_steps=100,
        vae=True,
    )
    assert (workload.num_steps, workload.num_diffusion_steps) == (128, 100)
    assert workload.batches == (3,) and workload.vae == "tiny" and workload.num_frames == 5
    (image,) = choose_workloads("cuda", geometries=["nova-d48w1024-sd512"])
    assert image.num_frames == image.pixel_frames == 1 and image.vae == IMAGE_VAE
    assert image.text == PHI_2
    (part,) = choose_workloads("cpu", geometries=["nova-d48w1024-sd512"])
    assert part.num_sets == 2 and part.vae is None
    (part,) = choose_workloads("cpu", geometries=[RELEASED_VIDEO], run_frames=1)
    assert (part.num_sets, part.run_frames) == (None, 1)
    small, released = choose_workloads("cpu", geometries=["small-video", RELEASED_VIDEO])
    assert (small.num_sets, released.num_sets) == (None, 2) and not released.warm_up
    (shapes,) = choose_workloads("cpu", model="shapes")
    assert shapes.checkpoint.is_dir() and shapes.num_frames == 5 and shapes.compared_sets == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batches": [1, 0]}, "batches must be at least 1"),
        ({"num_sets": 1, "run_frames": 1}, "not both"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"geometries": ["small-video"], "model": "shapes"}, "not both"),
        ({"geometries": ["small-video"], "text": True}, "none is known .* leave --text out"),
        ({"geometries": ["small-video", "tiny-class"]}, "tiny-class takes class labels"),
        ({"geometries": ["nova-d48w1024-sd512"], "num_frames": 2}, "one latent frame, not 2"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        choose_workloads("cpu", **options)
    with pytest.raises(ConfigError, match="no size named 'x'"):
        choose_workloads("cpu", geometries=["x"])


def test_class_models_are_refused():
    with pytest.raises(InputError, match="takes class labels"):
        rows_of(Workload("tiny-class", 1, 2, num_diffusion_steps=1))


def test_checkpoint_weights(tiny_video_folder):
    workload = Workload(
        "x", 2, 3, 2, repeats=1, text="checkpoint", vae="checkpoint", checkpoint=tiny_video_folder
    )
    row = rows_of(workload)[1]
    assert list(row["stages_s"])[0] == "text" and row["stages_s"]["text"] == row["text_s"] > 0
    assert row["weights"] == "checkpoint" and row["compared_sets"] == 2 and row["vae_s"] > 0


def test_frames_of_a_checkpoint_are_those_of_its_vae(tiny_video_folder, tmp_path):
    folder = shutil.copytree(tiny_video_folder, tmp_path / "x")
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text())
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    file.write_text(json.dumps({**config, **blocks}))  # which make frames smaller, not fewer
    [workload] = choose_workloads("cpu", model=folder, num_frames=3)
    assert workload.temporal_factor == 1 and workload.pixel_frames == 3
    shutil.rmtree(folder / "vae")
    [workload] = choose_workloads("cpu", model=folder, num_frames=3)
    assert workload.pixel_frames == 9


def test_rows_tell_the_frames_of_the_vae():
    row = rows_of(replace(TINY, temporal_factor=8), stages=False)[0]
    assert row["temporal_factor"] == 8
    assert row["fps"] == pytest.approx(2 * 9 / row["latency_s"])


def test_text_encoder_with_random_weights(monkeypatch):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    monkeypatch.setitem(SIZES, PHI_2, {**sizes, "num_attention_heads": 2})
    encoder = make_text_encoder(PHI_2, CPU, torch.float32, max_length=32)
    rows = encoder.encode([PROMPT, "two words"])
    assert [tuple(row.shape) for row in rows] == [(len(PROMPT.split()), 32), (2, 32)]
    exact = rows_of(replace(TINY, text=PHI_2))[1]
    assert exact["text"] == PHI_2 and exact["stages_s"]["text"] == exact["text_s"] > 0
    assert list(exact["stages_s"])[0] == "text" and list(exact["stages_s"])[-1] == "VAE"


def test_vaes():
    for name, frames in (("tiny", 5), (IMAGE_VAE, 1)):
        codec = make_vae(name, CPU, torch.float32)
        assert codec.is_video == (name == "tiny") and codec.spatial_factor == 8
        if codec.is_video:
            latents = torch.zeros(2, 4, 2, 2, 2)
            assert codec.decode(latents).shape == (2, 3, frames, 16, 16)
            assert decode_seconds(codec, latents, CPU, repeats=1) > 0


def test_ceilings_of_this_machine(monkeypatch):
    monkeypatch.setattr("ceilings.MATRIX_SIDE", {"cpu": 64})
    monkeypatch.setattr("ceilings.COPIED_BYTES", 1000)
    seconds = iter([9.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0, 5.0, 4.0, 8.0, 7.0, 6.0])
    monkeypatch.setattr("ceilings.timed", lambda call, device: (call(), next(seconds)))
    ceilings = measure_ceilings(CPU, torch.float64)
    # The fastest copy took two seconds and the fastest product four; the first did not count.
    assert ceilings == Ceilings(rate=2 * 64**3 / 4, bandwidth=2 * 1000 / 2)


@pytest.mark.skipif(not onednn.is_usable(torch.zeros(1)), reason="torch has no oneDNN here")
def test_the_ceiling_is_that_of_the_faster_product(monkeypatch):
    monkeypatch.setattr(onednn, "multiplies_faster", lambda: True)
    monkeypatch.setattr("ceilings.MATRIX_SIDE", {"cpu": 64})
    seconds = iter([*[1.0] * 6, *[4.0] * 6, *[3.0] * 6])  # copies, torch's products, oneDNN's
    monkeypatch.setattr("ceilings.timed", lambda call, device: (call(), next(seconds)))
    assert measure_ceilings(CPU, torch.float32).rate == 2 * 64**3 / 3


def test_facts_of_a_card():
    facts = parse_card_facts("570.86.10, 1755, 2619, 1980, 2619, 700.00, 41\n")
    assert facts["driver"] == "570.86.10" and facts["sm_clock_MHz"] == 1755
    assert facts["largest_sm_clock_MHz"] == 1980 and facts["temperature_C"] == 41
    assert "power_limit_W" not in parse_card_facts("5, 1, 2, 3, 4, [N/A], 5")
    assert parse_card_facts("No devices were found") == {}


def test_captions():
    rows = rows_of(Workload("tiny-video", 2, 3, num_diffusion_steps=2, repeats=1), stages=False)
    assert PUBLISHED not in captions(rows, FACTS)
    assert PUBLISHED in captions([{**rows[0], "geometry": RELEASED_VIDEO}], FACTS)
    assert any("0.5 TFLOP/s" in line for line in captions(rows, FACTS))


def test_tables(capsys):
    refused = {"sampler": "other", "refused": "wrong: differs from plain by 3.0e-01"}
    rows = rows_of()
    print_tables([*rows, {**rows[0], **refused}], FACTS)
    printed = capsys.readouterr().out
    assert "tiny-video T=2 A=3 D=2" in printed and "6 of 6" in printed
    assert "wrong: differs" in printed and "image encoder" in printed
    whole = sum(rows[1]["stages_s"].values())
    cells = [cell.strip() for cell in re.split("[│┃|]", printed)]
    assert {f"{whole:.3g}", f"{rows[1]['latency_s'] + rows[1]['vae_s']:.3g}"} <= set(cells)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = rows_of()
    part = [{**row, "geometry": "other", "sets_run": 1} for row in rows]
    del part[1]["stages_s"]
    refused = {**rows[0], "sampler": "other", "refused": "wrong"}
    plot(tmp_path / "new" / "fps.png", [*rows, *part, refused], "title")
    assert (tmp_path / "new" / "fps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stages", [(True, True), (True, False), (False, False), ()])
def test_panels_of_a_plot(tmp_path, monkeypatch, stages):
    """A panel for speeds, one for stages where they were measured, no empty ones."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures = []
    monkeypatch.setattr(figure, "savefig", lambda figure, *_, **options: figures.append(figure))
    [measured] = [row for row in rows_of() if row["sampler"] == EXACT]
    rows = [{**measured, "geometry": f"number {index}"} for index in range(len(stages))]
    for row, has_stages in zip(rows, stages, strict=True):
        if not has_stages:
            del row["stages_s"]
    plot(tmp_path / "fps.png", rows, "title")
    shown = [axes for axes in figures[0].axes if axes.get_visible()]
    assert len(shown) == len(stages) + sum(stages)


def test_formats_of_a_plot():
    pytest.importorskip("matplotlib")
    check_plot(Path("fps.PNG"))
    for name in ("fps", "fps.mp4"):
        with pytest.raises(InputError, match=rf"{name}: the name must end in one of .*\.png"):
            check_plot(Path(name))
