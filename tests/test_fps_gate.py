"""benchmarks/fps_gate.py: what a sampler has to agree with for its times to count."""

import pytest
import torch
from fps_gate import ALLOWED_TIMES, PLAIN_TORCH_SETS, Gate, first_sets_by_plain_torch
from fps_rows import float32_errors
from fps_table import captions, print_tables
from random_model import RandomModelRun
from test_fps import CPU, FACTS, TINY, rows_of

from nova.plain_sampling import generate_frames_plain
from nova.sampling import generate_frames

SILENT = {"device": CPU, "say": lambda line: None}


def make_run(dtype=torch.float32, num_steps=8):
    sizes = {"num_frames": 2, "num_steps": num_steps, "num_diffusion_steps": 2}
    return RandomModelRun("tiny-video", batch=2, device=CPU, dtype=dtype, **sizes)


def disturbed(latents, size):
    """With an error of a relative size."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    return latents + (size * noise * latents.float().norm() / noise.norm()).to(latents)


def test_differing_from_plain():
    run = make_run()
    gate, latents = Gate(run, 1e-4), run.sample(generate_frames_plain)
    assert gate.check(latents).refused is None
    exact = gate.check(run.sample(generate_frames))
    assert exact.refused is None and 0 < exact.error < 1e-5 and exact.float32_error is None
    assert gate.check(1.01 * latents).refused.startswith("wrong: differs from plain by 1.0e-02")
    assert gate.check(latents / 0).refused == "wrong: NaN or infinite values"
    shape = tuple(latents.shape)
    refused = gate.check(latents[:1]).refused
    assert refused == f"wrong: shape {(1, *shape[1:])}, plain's {shape}"


def test_compared_sets():
    """Of a checkpoint, which magnifies rounding from set to set, the first ones alone tell."""
    run = make_run()
    gate, latents = Gate(run, 1e-4, compared_sets=2), run.sample(generate_frames_plain)
    gate.check(latents)
    revealed = torch.isin(latents, run.first_tokens(latents, 2))
    assert gate.check(torch.where(revealed, latents, 2 * latents)).refused is None
    assert gate.check(torch.where(revealed, 2 * latents, latents)).refused
    not_a_number = torch.where(revealed, latents, torch.nan)
    assert gate.check(not_a_number).refused == "wrong: NaN or infinite values"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plain_torch_is_the_same_run(dtype):
    run = make_run(dtype)
    plain_torch = first_sets_by_plain_torch(run, **SILENT)
    tokens = plain_torch.tokens
    latents = run.sample(generate_frames_plain)
    rounded = run.first_tokens(latents, PLAIN_TORCH_SETS)
    assert tokens.dtype == torch.float32 and tokens.shape == rounded.shape
    # Rounding alone: half a unit in the last place of a result, and as much a few times before.
    error = (tokens - rounded).norm() / tokens.norm()
    assert 0.2 * torch.finfo(dtype).eps < error < 10 * torch.finfo(dtype).eps
    # On a CPU plain is plain torch.
    assert plain_torch.error == pytest.approx(error.item(), rel=1e-3)
    # The run itself stays as it was.
    assert torch.equal(run.sample(generate_frames_plain), latents)


def test_further_from_float32_than_plain_torch():
    run = make_run(torch.bfloat16)
    plain_torch = first_sets_by_plain_torch(run, **SILENT)
    latents = run.sample(generate_frames_plain)
    gate = Gate(run, 1.0, plain_torch=plain_torch)
    plain = gate.check(latents)
    assert plain.refused is None and plain.error == 0 and 0 < plain.float32_error < 0.1
    # An error of the same size beside that of plain: together 1.4 times as much; three: 3.2.
    near = gate.check(disturbed(latents, plain.float32_error))
    assert near.refused is None and near.float32_error > 1.1 * plain.float32_error
    far = gate.check(disturbed(latents, 3 * plain.float32_error))
    allowed = ALLOWED_TIMES * plain_torch.error
    assert far.float32_error > allowed
    told = f"differs from float32 by {far.float32_error:.1e}, allowed {allowed:.1e}"
    assert far.refused == f"wrong: {told}"
    # Plain itself, which may run wrong kernels.
    plain = Gate(run, 1.0, plain_torch=plain_torch).check(
        disturbed(latents, 3 * plain.float32_error)
    )
    assert plain.error == 0 and plain.refused == far.refused
    # Of a checkpoint it is told, and refuses nothing.
    gate = Gate(run, 1.0, compared_sets=2, plain_torch=plain_torch)
    gate.check(latents)
    told = gate.check(disturbed(latents, 3 * plain_torch.error))
    assert told.refused is None and told.float32_error == far.float32_error


def test_wrong_kernels_that_plain_runs_too():
    """In float32 as well, which has no error of its own."""
    run = make_run()
    plain_torch = first_sets_by_plain_torch(run, **SILENT)
    latents = run.sample(generate_frames_plain)
    assert plain_torch.error == 0
    assert Gate(run, 1e-4, plain_torch=plain_torch).check(latents).refused is None
    wrong = Gate(run, 1e-4, plain_torch=plain_torch).check(disturbed(latents, 1e-3))
    assert wrong.error == 0 and wrong.refused.endswith(", allowed 1.0e-04")


def test_no_memory_for_plain_torch(monkeypatch):
    def greedy(self, *arguments):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(RandomModelRun, "by_plain_torch", greedy)
    said = []
    assert first_sets_by_plain_torch(make_run(torch.bfloat16), CPU, said.append) is None
    assert said == ["not enough memory to compare with plain torch"]
    rows = rows_of(dtype=torch.bfloat16, stages=False)
    assert [row["error_vs_float32"] for row in rows] == [None, None]


def test_rows_in_half_precision(capsys):
    rows = rows_of(TINY, dtype=torch.bfloat16, stages=False)
    plain, exact = (row["error_vs_float32"] for row in rows)
    assert 1e-3 < plain < 0.1 and exact < ALLOWED_TIMES * plain
    of_plain = f"{exact / plain:.2f} to {exact / plain:.2f} times that of plain"
    assert float32_errors(rows) == of_plain
    peer = {**rows[0], "sampler": "diffnext", "error_vs_float32": exact / 1.5}
    other = {**rows[1], "sampler": "tuned", "error_vs_float32": 2 * exact}
    compiled = {**rows[0], "sampler": "plain, compiled", "error_vs_float32": 9 * exact}
    of_both = float32_errors([*rows, peer, other, compiled])
    assert of_both.endswith(" times that of plain, 1.50 to 3.00 times that of diffnext")
    caption = next(line for line in captions(rows, FACTS) if "float32" in line)
    assert caption.endswith(f"This package's samplers: {of_plain}.")
    print_tables(rows, FACTS)
    assert f"{exact:.1e}" in capsys.readouterr().out
    # A peer without any error is left out.
    assert float32_errors([{**row, "error_vs_float32": 0.0} for row in rows]) == ""
    refused = [row for row in rows_of(TINY, stages=False) if row.pop("error_vs_float32") is None]
    assert float32_errors(refused) == ""
    in_float32 = rows_of(TINY, stages=False)
    print_tables(in_float32, FACTS)
    assert "from float32" not in capsys.readouterr().out
