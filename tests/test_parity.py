"""Recorded outputs of the reference: sampling, training step, VAE."""

from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_testing import DEVICE, needs_triton
from parity import TOLERANCE, Place, load_model, run_case, sampling_outputs
from safetensors.torch import load_file
from torch.nn import functional as F

from nova.config import ModelConfig
from nova.layers import Mlp
from nova.plain_sampling import generate_frames_plain
from nova_kernels.cuda_kernels import extension

GOLDEN = Path(__file__).parent / "data" / "golden"
CASES = sorted(path.parent for path in GOLDEN.glob("*/case.json"))


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_outputs_equal_the_reference(folder):
    errors = run_case(folder)
    assert errors and max(errors.values()) < TOLERANCE


@pytest.mark.parametrize(
    "folder",
    [case for case in CASES if case.name[:3] in ("c2i", "i2v", "t2i", "t2v")],
    ids=lambda path: path.name,
)
def test_plain_sampler_equals_the_reference(folder):
    import json

    case = json.loads((folder / "case.json").read_text())
    vectors = load_file(folder / "vectors.safetensors")
    weights = GOLDEN / case["weights"]
    outputs = sampling_outputs(case, vectors, weights, sampler=generate_frames_plain)
    torch.testing.assert_close(
        outputs["out.latents"], vectors["out.latents"], rtol=1e-3, atol=1e-4 * case["latents_std"]
    )


@needs_triton
@pytest.mark.parametrize("name", ["c2i_min_guidance", "t2v_flow_nocfg", "train_t2v"])
def test_kernels_equal_the_reference(name, monkeypatch):
    """Whole models by the Triton kernels. The command runs the other cases too, in minutes here."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    errors = run_case(GOLDEN / name, Place(torch.device(DEVICE), "triton"))
    assert errors and max(errors.values()) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_a_gpu_equals_the_reference(folder, backend, monkeypatch):
    if backend == "cuda" and extension.obstacle() is not None:
        pytest.skip(extension.obstacle())
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    errors = run_case(folder, Place(torch.device("cuda"), backend))
    assert errors and max(errors.values()) < TOLERANCE


def test_a_wrong_activation_is_noticed(monkeypatch):
    """The tolerance is tight enough to tell the two GELU forms apart."""
    monkeypatch.setenv("NOVA_KERNELS_BACKEND", "reference")  # which runs no packed layers
    by_tanh = partial(F.gelu, approximate="tanh")
    monkeypatch.setattr(Mlp, "forward", lambda mlp, x: mlp.fc2(by_tanh(mlp.fc1(x))))
    errors = run_case(GOLDEN / "t2v_flow_cfg")
    assert max(errors.values()) > TOLERANCE


def test_reference_configs_and_names():
    """Every recorded config survives a round trip, and its weights load strictly by name."""
    import json

    for folder in CASES:
        case = json.loads((folder / "case.json").read_text())
        if "arch_dims" in case["config"]:
            config = ModelConfig.from_dict(case["config"])
            assert ModelConfig.from_dict(config.to_dict()) == config
            load_model(case, GOLDEN / case["weights"])


def test_a_damaged_case_takes_no_other_along(tmp_path, capsys, monkeypatch):
    import shutil

    import parity

    for name in ("a", "b", "c"):
        shutil.copytree(GOLDEN / "t2i_rope_cfg", tmp_path / name)
    (tmp_path / "weights").mkdir()
    shutil.copy(GOLDEN / "weights" / "t2i_rope.safetensors", tmp_path / "weights")
    (tmp_path / "a" / "case.json").write_text('{"call"')
    vectors = tmp_path / "b" / "vectors.safetensors"
    vectors.write_bytes(vectors.read_bytes()[:-9])
    monkeypatch.setattr("sys.argv", ["parity.py", str(tmp_path)])
    assert parity.main() == 1
    told = capsys.readouterr().out
    assert "NOT SUPPORTED: JSONDecodeError" in told and "NOT SUPPORTED: SafetensorError" in told
    assert "1 of 3 cases" in told

    def fail(folder, place):
        raise RuntimeError("CUDA error: no kernel image\nand more")

    monkeypatch.setattr(parity, "run_case", fail)
    assert parity.main() == 1
    told = capsys.readouterr().out
    assert told.count("NOT SUPPORTED: RuntimeError: CUDA error: no kernel image\n") == 3


def test_command_line(tmp_path, capsys, monkeypatch):
    """Exit status: 0 when all pass, 1 when one is off or unknown."""
    import json
    import shutil

    import parity

    def run(folder):
        monkeypatch.setattr("sys.argv", ["parity.py", str(folder)])
        return parity.main()

    shutil.copytree(GOLDEN / "t2i_rope_cfg", tmp_path / "t2i_rope_cfg")
    (tmp_path / "weights").mkdir()
    shutil.copy(GOLDEN / "weights" / "t2i_rope.safetensors", tmp_path / "weights")
    assert run(tmp_path) == 0
    path = tmp_path / "t2i_rope_cfg" / "case.json"
    case = json.loads(path.read_text())
    case["call"]["guidance_scale"] = 4.0
    path.write_text(json.dumps(case))
    assert run(tmp_path) == 1
    assert "FAILED" in capsys.readouterr().out
    case["call"]["spatiotemporal_guidance_scale"] = 1.0
    path.write_text(json.dumps(case))
    assert run(tmp_path) == 1
    assert "NOT SUPPORTED" in capsys.readouterr().out
