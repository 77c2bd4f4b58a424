"""The text encoder: embeddings of prompts, and what it refuses to load."""

import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nova import text
from nova.errors import CheckpointError, ConfigError, DependencyError, InputError
from nova.text import BATCH_SIZE, PromptTruncationWarning, TextEncoder

transformers = pytest.importorskip("transformers")
TRANSFORMERS_MAJOR = int(transformers.__version__.split(".")[0])
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from tiny_text_encoder import make_tiny_text_encoder  # noqa: E402

PROMPTS = [
    "a red square moves to the left",
    "a blue ball",
    "A green triangle rotates slowly on a black background. It is seen from above, at night.",
    "The cyan star bounces",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_text_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tiny):
    return load(tiny)


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny checkpoint, to be broken."""
    return Path(shutil.copytree(tiny, tmp_path / "tiny"))


def load(folder, **options):
    options.setdefault("max_length", 256)
    return TextEncoder.from_folders(folder / "text_encoder", folder / "tokenizer", **options)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, edit):
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def as_released(folder):
    """Turn a base model's folder into what NOVA released: PhiEncoderModel, model.*, lm_head.*"""

    def rename(weights):
        for name in list(weights):
            weights[f"model.{name}"] = weights.pop(name)
        weights["lm_head.weight"] = torch.randn(512, 32)
        weights["lm_head.bias"] = torch.randn(512)

    edit_weights(folder, rename)
    edit_json(folder / "text_encoder" / "config.json", architectures=["PhiEncoderModel"])


# --- embeddings -----------------------------------------------------------------------------


def test_last_hidden_states_of_the_own_tokens(encoder):
    ids = encoder.tokenizer(PROMPTS[0]).input_ids
    expected = encoder.module(torch.tensor([ids])).last_hidden_state[0]
    (embedding,) = encoder.encode([PROMPTS[0]])
    assert embedding.shape == (len(ids), 32) == (len(ids), encoder.hidden_size)
    assert embedding.dtype == encoder.dtype and embedding.device == encoder.device
    assert not embedding.requires_grad
    torch.testing.assert_close(embedding, expected)


def test_batch_equals_alone(encoder):
    prompts = [f"{prompt} {number}" for number in range(BATCH_SIZE) for prompt in PROMPTS]
    for prompt, embedding in zip(prompts, encoder.encode(prompts), strict=True):
        (alone,) = encoder.encode([prompt])
        torch.testing.assert_close(embedding, alone, rtol=1e-4, atol=1e-5)


def test_equal_prompts_are_computed_once(encoder, monkeypatch):
    rows = []
    forward = encoder.module.forward

    def counting(*args, **options):
        rows.append(len(options["input_ids"]))
        return forward(*args, **options)

    monkeypatch.setattr(encoder.module, "forward", counting)
    first, second, third = encoder.encode([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert rows == [2]
    assert torch.equal(first, third) and first.shape != second.shape


def test_padding_settings_do_not_matter(tiny, encoder):
    expected = encoder.encode(PROMPTS)
    other = load(tiny)
    for side in ("left", "right"):
        other.tokenizer.padding_side = side
        other.tokenizer.pad_token = None
        for a, b in zip(other.encode(PROMPTS), expected, strict=True):
            assert torch.equal(a, b)


def test_half_precision_batch_equals_alone(tiny):
    encoder = load(tiny, torch_dtype=torch.bfloat16)
    assert encoder.dtype == torch.bfloat16
    for prompt, embedding in zip(PROMPTS, encoder.encode(PROMPTS), strict=True):
        assert embedding.dtype == torch.bfloat16
        torch.testing.assert_close(embedding, encoder.encode([prompt])[0], rtol=0.1, atol=0.1)


def test_empty_prompt_needs_no_model(encoder, monkeypatch):
    monkeypatch.setattr(encoder.module, "forward", None)
    assert [tuple(e.shape) for e in encoder.encode(["", ""])] == [(0, 32), (0, 32)]
    assert encoder.encode([]) == []


def test_empty_prompt_among_others(encoder):
    empty, ball = encoder.encode(["", PROMPTS[1]])
    assert empty.shape == (0, 32) and empty.dtype == encoder.dtype
    assert torch.equal(ball, encoder.encode([PROMPTS[1]])[0])


def test_truncation(tiny, encoder):
    short = load(tiny, max_length=5)
    with pytest.warns(PromptTruncationWarning) as caught:
        embeddings = short.encode([PROMPTS[0], PROMPTS[1], PROMPTS[2]])
    assert len(caught) == 1
    assert "2 of 7 tokens" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert [len(e) for e in embeddings] == [5, 3, 5]
    torch.testing.assert_close(embeddings[0], encoder.encode(["a red square moves to"])[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short.encode(["a red square moves to"])


def test_many_long_prompts_give_one_short_warning(tiny):
    short = load(tiny, max_length=5)
    with pytest.warns(PromptTruncationWarning) as caught:
        short.encode([f"{number} {'a red ball ' * 200}" for number in range(50)])
    assert len(caught) == 1 and len(str(caught[0].message)) < 500
    assert "47 more prompts" in str(caught[0].message)


@pytest.mark.parametrize("prompts", ["a red ball", None, [1], ["a", None], [b"a"], ["\ud800"]])
def test_what_is_no_list_of_prompts(encoder, prompts):
    with pytest.raises(InputError):
        encoder.encode(prompts)


@pytest.mark.parametrize("prompt", ["\u4e00\u53ea\u732b", "\U0001f600", "\x00", " \n\t", "e\u0301"])
def test_any_unicode_is_embedded(encoder, prompt):
    (embedding,) = encoder.encode([prompt])
    assert len(embedding) > 0 and embedding.isfinite().all()


@pytest.mark.parametrize("max_length", [0, -1, 513])
def test_impossible_max_length(tiny, max_length):
    with pytest.raises(ConfigError, match="text_token_len"):
        load(tiny, max_length=max_length)


def test_foreign_tokenizer(encoder):
    class Foreign:
        def __call__(self, prompts, **_):
            return transformers.BatchEncoding({"input_ids": [[7, 512] for _ in prompts]})

    with pytest.raises(CheckpointError, match="do not belong together"):
        TextEncoder(encoder.module, Foreign(), 256).encode(["a"])


def test_output_that_overflows(tiny):
    encoder = load(tiny, torch_dtype=torch.float16)
    encoder.module.final_layernorm.weight.fill_(65000)
    with pytest.raises(CheckpointError, match="bfloat16"):
        encoder.encode(PROMPTS)


# --- folders --------------------------------------------------------------------------------


def assert_same_embeddings(a, b):
    for x, y in zip(a.encode(PROMPTS), b.encode(PROMPTS), strict=True):
        torch.testing.assert_close(x, y)


def test_save_and_load(encoder, tmp_path):
    encoder.save(tmp_path / "a" / "text_encoder", tmp_path / "a" / "tokenizer")
    assert_same_embeddings(load(tmp_path / "a"), encoder)


def test_saving_in_place_leaves_linked_files_alone(encoder, tmp_path):
    """Checkpoints of a run share the files of their text encoder."""
    encoder.save(tmp_path / "a" / "text_encoder", tmp_path / "a" / "tokenizer")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=os.link)
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    opened = load(tmp_path / "b", torch_dtype=torch.bfloat16)
    opened.save(tmp_path / "b" / "text_encoder", tmp_path / "b" / "tokenizer")
    assert load(tmp_path / "b").dtype == torch.bfloat16
    assert before == {path: path.read_bytes() for path in before}
    assert {path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*")} == {
        path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*")
    }


def test_saving_over_weights_of_other_names(encoder, tmp_path):
    folder = tmp_path / "text_encoder"
    encoder.save(folder, tmp_path / "tokenizer")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model-00001-of-00001.safetensors")
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load(tmp_path).save(folder, tmp_path / "tokenizer")
    assert sorted(path.name for path in folder.glob("*.safetensors*")) == ["model.safetensors"]
    assert_same_embeddings(load(tmp_path), encoder)


def test_save_onto_a_full_disk(encoder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(encoder.module, "save_pretrained", full)
    with pytest.raises(CheckpointError, match="cannot be saved.*No space left"):
        encoder.save(tmp_path / "text_encoder", tmp_path / "tokenizer")


def test_save_where_a_file_is(encoder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be saved"):
        encoder.save(tmp_path / "file", tmp_path / "tokenizer")


def test_same_seed_same_files(tiny, tmp_path):
    make_tiny_text_encoder(tmp_path)
    for name in ("text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (tiny / name).read_bytes()


def test_sharded_weights(encoder, tiny, tmp_path):
    shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")
    encoder.module.save_pretrained(tmp_path / "text_encoder", max_shard_size="40KB")
    shards = sorted((tmp_path / "text_encoder").glob("*.safetensors"))
    assert len(shards) > 2
    assert_same_embeddings(load(tmp_path), encoder)
    shards[1].unlink()
    with pytest.raises(CheckpointError):
        load(tmp_path)


def test_released_layout(encoder, folder, capfd):
    as_released(folder)
    released = load(folder)
    assert_same_embeddings(released, encoder)
    assert not any("lm_head" in name for name, _ in released.module.named_parameters())
    assert "lm_head" not in capfd.readouterr().err


def test_language_modelling_head_is_dropped(encoder):
    with_head = transformers.PhiForCausalLM(encoder.module.config)
    with_head.model = encoder.module
    wrapped = TextEncoder(with_head, encoder.tokenizer, 256)
    assert wrapped.module is encoder.module
    assert not any(parameter.requires_grad for parameter in wrapped.module.parameters())


def test_another_causal_language_model(encoder, tiny, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "text_encoder")
    shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")
    llama = load(tmp_path, max_length=64)
    assert llama.hidden_size == 24
    for prompt, embedding in zip(PROMPTS, llama.encode(PROMPTS), strict=True):
        torch.testing.assert_close(embedding, llama.encode([prompt])[0], rtol=1e-4, atol=1e-5)


def test_dtype_of_the_checkpoint_is_kept(folder):
    edit_weights(folder, lambda w: w.update({name: value.half() for name, value in w.items()}))
    edit_json(folder / "text_encoder" / "config.json", dtype="float16", torch_dtype="float16")
    assert load(folder).dtype == torch.float16
    assert load(folder, torch_dtype=torch.float32).dtype == torch.float32


def test_tokenizer_from_vocabulary_and_merges(encoder, folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert_same_embeddings(load(folder), encoder)


# --- what is wrong with a folder ------------------------------------------------------------


@pytest.mark.parametrize(
    "message, gone",
    [
        ("config.json is missing", ["text_encoder"]),
        ("folder .* does not exist", ["tokenizer"]),
        ("config.json is missing", ["text_encoder/config.json"]),
        ("has no weights", ["text_encoder/model.safetensors"]),
        ("cannot be loaded", ["tokenizer/tokenizer.json", "tokenizer/vocab.json"]),
        ("cannot be loaded", ["tokenizer/tokenizer.json", "tokenizer/merges.txt"]),
        (  # before version 5 transformers itself refuses it
            "has no vocabulary" if TRANSFORMERS_MAJOR >= 5 else "cannot be loaded",
            ["tokenizer/tokenizer.json", "tokenizer/vocab.json", "tokenizer/merges.txt"],
        ),
    ],
)
def test_missing_pieces(folder, message, gone):
    for name in gone:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "name",
    ["text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"],
)
@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.99])
def test_truncated_files(folder, name, part):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CheckpointError):
        load(folder)


def test_missing_parameter(folder):
    edit_weights(folder, lambda weights: weights.pop("layers.1.mlp.fc1.weight"))
    with pytest.raises(CheckpointError, match=r"missing.*layers\.1\.mlp\.fc1\.weight"):
        load(folder)


def test_weights_of_another_model(folder):
    edit_weights(folder, lambda weights: weights.clear() or weights.update(a=torch.zeros(1)))
    with pytest.raises(CheckpointError, match="missing.* more"):
        load(folder)


def test_parameter_of_another_shape(folder):
    edit_json(folder / "text_encoder" / "config.json", intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"shape.*layers\.0\.mlp\.fc1"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder, value):
    edit_weights(folder, lambda weights: weights["final_layernorm.bias"][3].fill_(value))
    with pytest.raises(CheckpointError, match=r"NaN or infinite.*final_layernorm\.bias"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("released", [False, True])
def test_quantised_weights_are_refused(folder, dtype, released):
    name = "layers.0.mlp.fc1.weight"
    edit_weights(folder, lambda weights: weights.update({name: weights[name].to(dtype)}))
    if released:
        as_released(folder)
    with pytest.raises(CheckpointError, match=f"layers.0.mlp.fc1.weight {dtype}; take a"):
        load(folder)


def test_buffers_may_be_integers(encoder, folder):
    edit_weights(folder, lambda weights: weights.update(position_ids=torch.arange(4)))
    assert_same_embeddings(load(folder), encoder)


def test_pickle_needs_permission(encoder, folder):
    weights = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        load(folder)
    assert_same_embeddings(load(folder, allow_pickle=True), encoder)


class Payload:
    """A pickle that would create a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_allowed_pickle_still_runs_no_code(folder, tmp_path):
    weights = folder / "text_encoder" / "model.safetensors"
    state = {**load_file(weights), "extra": Payload(str(tmp_path / "executed"))}
    torch.save(state, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(CheckpointError):
        load(folder, allow_pickle=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "file,auto_map",
    [
        ("text_encoder/config.json", {"AutoModel": "evil.Evil", "AutoConfig": "evil.Config"}),
        ("tokenizer/tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", None]}),
    ],
)
def test_code_in_a_checkpoint_is_never_run(folder, tmp_path, file, auto_map):
    edit_json(folder / file, auto_map=auto_map)
    code = f"open({str(tmp_path / 'executed')!r}, 'w')\n"
    (folder / file).with_name("evil.py").write_text(code)
    with pytest.raises(CheckpointError, match="auto_map"):
        load(folder)
    assert not (tmp_path / "executed").exists()


def test_unknown_and_unfitting_model_types(folder):
    config = folder / "text_encoder" / "config.json"
    edit_json(config, model_type="no-such-model")
    with pytest.raises(CheckpointError, match="no-such-model"):
        load(folder)
    edit_json(config, model_type="t5", is_encoder_decoder=True)
    with pytest.raises(CheckpointError, match="encoder-decoder"):
        load(folder)
    config.write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        load(folder)


def test_docstrings_that_python_left_out(folder, monkeypatch):
    """Transformers fails without them, which another download would not mend."""
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    monkeypatch.setattr(text, "sys", SimpleNamespace(flags=SimpleNamespace(optimize=2)))
    with pytest.raises(CheckpointError, match="transformers does not run under python -OO") as info:
        load(folder)
    assert "download" not in str(info.value)


def test_transformers_log_level_is_restored(folder):
    log = transformers.utils.logging
    before = log.get_verbosity()
    load(folder)
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        load(folder)
    assert log.get_verbosity() == before


def test_missing_transformers_is_named(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match="pip install transformers"):
        load(tiny)
