"""What the docs say of an H200, against the results files that it is from."""

import json
from pathlib import Path
from statistics import median

import torch
from fps_rows import float32_errors
from fps_samplers import GRAPHS, PROGRESS
from reference_package import DIFFNEXT
from roofline import video_work
from work_counts import VAE

from nova.config import named_config
from nova.schedule import set_sizes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = (ROOT / "docs" / "benchmarks.md").read_text()
CONFIG, STEPS = named_config("nova-d48w1024-osp480"), 64


def results(name):
    return json.loads((RESULTS / f"{name}_h200.json").read_text())


def test_what_was_reached():
    rows = results("fps")["rows"]
    by_name = {(row["sampler"], row["batch"]): row for row in rows}
    small, large = by_name[GRAPHS, 1], by_name[GRAPHS, 24]
    small_peer, large_peer = by_name[DIFFNEXT, 1], by_name[DIFFNEXT, 24]
    assert f"| {small['fps'] / small_peer['fps']:.1f} times |" in DOCS
    assert f"| {small['fps']:.1f} FPS |" in DOCS
    most = f"{1 / large_peer['share_of_floor']:.1f} times would be the floor"
    assert f"| {large['fps'] / large_peer['fps']:.2f} times (and {most}) |" in DOCS
    assert f"| {large['share_of_floor']:.0%} |".replace("%", " %") in DOCS
    errors = float32_errors(rows).split(", ")[1].removesuffix(f" that of {DIFFNEXT}")
    assert f"| {errors} |" in DOCS
    seconds = {
        row["sampler"]: f"{median(row['latencies_s']):.3f} s"
        for row in results("fps_progress")["rows"]
    }
    assert f"| {seconds[PROGRESS]} a frame, {seconds[GRAPHS]} without" in DOCS


def kernel_seconds(name):
    """Seconds of the profiled run, and of its kernels by what they do."""
    content = results(name)
    kinds = {
        "attention": ("sdpa",),
        "first layer": ("linear_gelu",),
        "products": ("nvjet", "cublas", "gemm"),
        "norms": ("norm", "scale_shift"),
    }
    seconds = dict.fromkeys(kinds, 0.0)
    for row in content["rows"]:
        kind = next((k for k, words in kinds.items() if any(w in row["name"] for w in words)), None)
        if kind is not None:
            seconds[kind] += row["ms"] / 1e3
    return content["machine"]["run_ms"] / 1e3, seconds


def frame_operations(batch):
    """Of a latent frame: attention of the image encoder, first layers of its MLPs, all else."""
    work = video_work(
        CONFIG,
        batch=batch,
        num_frames=1,
        num_steps=STEPS,
        num_diffusion_steps=25,
        guidance_scale=5.0,
        dtype=torch.bfloat16,
    )
    total = sum(w.operations for stage, w in work.items() if stage != VAE)
    width, half = CONFIG.image_encoder.embed_dim, CONFIG.image_encoder.depth // 2
    later = CONFIG.image_encoder.depth - half - 1  # but for the last one, which needs the set alone
    whole = CONFIG.num_frame_tokens + CONFIG.num_image_tokens
    attention = first = start = 0
    for size in set_sizes(CONFIG.num_image_tokens, STEPS):
        seen = CONFIG.num_frame_tokens + start
        attention += 4 * width * (half * seen**2 + later * whole**2 + size * whole)
        first += 8 * width**2 * (half * seen + later * whole + size)
        start += size
    attention, first = (2 * batch * operations for operations in (attention, first))
    return attention, first, total - attention - first


def test_where_the_time_goes_at_batch_24():
    run, seconds = kernel_seconds("kernel_times_batch24_triton")
    rate = results("fps")["machine"]["matmul_TFLOP_per_s"] * 1e12
    operations = frame_operations(24)
    for kind, count in zip(("attention", "first layer", "products"), operations, strict=True):
        assert f"| {seconds[kind]:.2f} s | {count / rate:.2f} s |" in DOCS
    assert f"| norms and residuals | {seconds['norms']:.2f} s |" in DOCS
    assert f"| everything else, and gaps | {run - sum(seconds.values()):.2f} s |" in DOCS
    text = " ".join(DOCS.split())
    published = f"would be {seconds['attention'] * 395 / 460:.2f} s in place of"
    assert f"{published} {seconds['attention']:.2f} s at batch 24" in text
    # What GELU reads and writes, two bytes each.
    moved = 4 * operations[1] / (2 * CONFIG.image_encoder.embed_dim)
    copying = moved / (results("fps")["machine"]["copy_GB_per_s"] * 1e9)
    assert f"moves {moved / 1e12:.1f} TB a latent frame, {copying:.2f} s" in text
    reached = operations[0] / seconds["attention"] / 1e12
    assert f"at {reached:.0f} of {rate / 1e12:.0f} TFLOP/s" in DOCS


def test_where_the_time_goes_at_batch_1():
    run, seconds = kernel_seconds("kernel_times")
    rows = results("kernel_times")["rows"]
    gelu = sum(row["ms"] for row in rows if "Gelu" in row["name"])
    text = " ".join(DOCS.split())
    parts = [f"{1e3 * seconds[kind]:.0f}" for kind in ("products", "attention", "norms")]
    assert f"{1e3 * run:.0f} ms with the profiler" in text
    assert f"products {parts[0]} ms, attention {parts[1]}, norms {parts[2]}," in text
    assert (
        f"GELU {gelu:.0f}, and {1e3 * run - sum(row['ms'] for row in rows):.0f} ms of gaps" in text
    )
