"""Checkpoint folders and weight files."""

import json
import pickle

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from nova import checkpoint
from nova.checkpoint import find_folder, load_state_dict, load_strict, read_json, save_state_dict
from nova.errors import CheckpointError, InputError

STEM = "diffusion_pytorch_model"


def linear_state():
    return nn.Linear(3, 2).state_dict()


def test_report_names_what_does_not_fit():
    state = {"weight": torch.zeros(2, 4), "scale": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        load_strict(nn.Linear(3, 2), state, "here")
    message = str(error.value)
    assert "1 missing: bias" in message and "1 unexpected: scale" in message
    assert "1 mis-shaped: weight (2, 4) instead of (2, 3)" in message and "here" in message


def test_long_reports_are_cut():
    state = {f"extra{i}": torch.zeros(1) for i in range(50)}
    with pytest.raises(CheckpointError, match="and 44 more"):
        load_strict(nn.Linear(3, 2), state, "here")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    state = linear_state()
    state["bias"][0] = value
    with pytest.raises(CheckpointError, match="NaN or infinite values in bias"):
        load_strict(nn.Linear(3, 2), state, "here")


def test_module_on_the_meta_device_gets_the_tensors():
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    state = linear_state()
    load_strict(module, state, "here")
    assert torch.equal(module.weight, state["weight"])


def test_save_and_load(tmp_path):
    state = linear_state()
    path = save_state_dict(state, tmp_path / "new" / "folder")
    assert [p.name for p in path.parent.iterdir()] == [f"{STEM}.safetensors"]
    loaded = load_state_dict(path.parent)
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = save_state_dict(linear_state(), tmp_path)
    before = path.read_bytes()

    def fails(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(CheckpointError, match="disk full"):
        save_state_dict(linear_state(), tmp_path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def write_index(folder, weight_map):
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_that_names_no_files(tmp_path):
    write_index(tmp_path, {"a": 5})
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load_state_dict(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype):
    state = {**linear_state(), "bias": torch.zeros(2).to(dtype)}
    with pytest.raises(CheckpointError, match=f"bias {dtype}; take a checkpoint that is not"):
        load_strict(nn.Linear(*reversed(state["weight"].shape)), state, "here")


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="cannot write .*No space left"):
        save_state_dict(linear_state(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_options_that_there_are_not():
    with pytest.raises(InputError, match="unknown option device_map; those of downloads are rev"):
        find_folder("shapes", device_map="auto")
    with pytest.raises(InputError, match="unknown option dtype; .*; torch_dtype is the dtype"):
        find_folder("shapes", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["a" * 300, "~nosuchuser/model"])
def test_names_that_are_no_path(name):
    with pytest.raises(CheckpointError, match="is no path"):
        find_folder(name)


def test_missing_shard(tmp_path):
    save_file(linear_state(), tmp_path / "a.safetensors")
    write_index(tmp_path, {"weight": "a.safetensors", "bias": "b.safetensors"})
    with pytest.raises(CheckpointError, match="b.safetensors"):
        load_state_dict(tmp_path)


def test_shards_outside_the_folder_are_refused(tmp_path):
    save_file(linear_state(), tmp_path / "a.safetensors")
    inside = tmp_path / "inside"
    inside.mkdir()
    write_index(inside, {"weight": "../a.safetensors"})
    with pytest.raises(CheckpointError, match="outside"):
        load_state_dict(inside)


def test_truncated_file(tmp_path):
    path = save_state_dict(linear_state(), tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_state_dict(tmp_path)


def test_pickles_only_when_asked_for(tmp_path):
    state = linear_state()
    torch.save(state, tmp_path / f"{STEM}.bin")
    with pytest.raises(CheckpointError, match="allow_pickle"):
        load_state_dict(tmp_path)
    loaded = load_state_dict(tmp_path, allow_pickle=True)
    assert torch.equal(loaded["weight"], state["weight"])
    torch.save({"state_dict": state, "step": 5}, tmp_path / f"{STEM}.bin")
    loaded = load_state_dict(tmp_path, allow_pickle=True)
    assert loaded.keys() == state.keys() and torch.equal(loaded["weight"], state["weight"])
    torch.save({"weight": state["weight"], "step": 5}, tmp_path / f"{STEM}.bin")
    with pytest.raises(CheckpointError, match="does not hold a state dict of tensors"):
        load_state_dict(tmp_path, allow_pickle=True)
    with pytest.raises(CheckpointError, match="absent is missing; is the checkpoint folder"):
        load_state_dict(tmp_path / "absent")


class Payload:
    def __reduce__(self):
        return (eval, ("__import__('os').putenv('NOVA_TEST', '1') or {}",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_code_is_never_run(tmp_path):
    (tmp_path / f"{STEM}.bin").write_bytes(pickle.dumps(Payload()))
    torch.save({"weight": Payload()}, tmp_path / f"{STEM}.pt")
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_state_dict(tmp_path, allow_pickle=True)


# Python reads numbers of 4300 digits at most.
@pytest.mark.parametrize(
    "text, message",
    [("{", "JSON"), ("[1]", "object"), ("\xff", "JSON"), ('{"a": %s}' % ("1" * 5000), "JSON")],
)
def test_broken_json(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json")


def test_names_that_are_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for name, message in [(tmp_path / "file", "is a file"), (tmp_path / "none", "not a folder")]:
        with pytest.raises(CheckpointError, match=message):
            find_folder(name)


def test_hub_ids_are_downloaded_without_pickles(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(name, *, allow_patterns, **options):
        asked.update(name=name, patterns=allow_patterns, **options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_folder("owner/model", revision="v1") == tmp_path
    assert asked["name"] == "owner/model" and asked["revision"] == "v1"
    assert "*.safetensors" in asked["patterns"] and "*.bin" not in asked["patterns"]


def test_hub_failures_say_what_to_do(monkeypatch):
    import huggingface_hub

    def download(*args, **options):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match="no route to host. Check the name"):
        find_folder("owner/model")
