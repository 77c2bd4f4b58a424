"""Recorded outputs of the reference: sampling, training step, VAE."""

from pathlib import Path

import pytest
import torch
from parity import TOLERANCE, load_model, run_case, sampling_outputs
from safetensors.torch import load_file

from nova.config import ModelConfig
from nova.plain_sampling import generate_frames_plain

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
    outputs = sampling_outputs(case, vectors, GOLDEN / case["weights"], generate_frames_plain)
    torch.testing.assert_close(
        outputs["out.latents"], vectors["out.latents"], rtol=1e-3, atol=1e-4 * case["latents_std"]
    )


def test_a_wrong_activation_is_noticed(monkeypatch):
    """The tolerance is tight enough to tell the two GELU forms apart."""
    from nova import layers

    monkeypatch.setenv("NOVA_KERNELS_BACKEND", "reference")  # which calls torch's
    exact = layers.F.gelu
    monkeypatch.setattr(layers.F, "gelu", lambda x: exact(x, approximate="tanh"))
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
