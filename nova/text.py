"""Prompts -> embeddings: the last hidden states of a causal language model (Phi-2 in NOVA).

Needs transformers. The model is opened from local folders only; code that a checkpoint brings
along is never run.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nova_kernels.autocast import without_autocast

from .altered_layers import uncompiled, weights_to_save
from .checkpoint import (
    check_dtypes,
    load_safetensors,
    read_json,
    weight_files,
    write_files,
)
from .errors import CheckpointError, ConfigError, InputError, dependency_error

# Distinct prompts in one pass of the language model; bounds the memory of long prompt lists.
BATCH_SIZE = 16


class PromptTruncationWarning(UserWarning):
    """A prompt has more tokens than the model takes, and its rest is ignored."""


class TextEncoder:
    """A tokenizer and a causal language model that turn prompts into embeddings.

    Args:
        model: transformers model. Of a model with a language-modelling head, only the base model
            is kept. It is put into evaluation mode and its weights are frozen.
        tokenizer: transformers tokenizer that belongs to it. Its padding settings do not matter.
        max_length: most tokens a prompt may have (`text_token_len` of a NOVA config, 256).

    Attributes:
        module: the base model; `encoder.module.to(...)` moves it.
        tokenizer, max_length: as given.

    Raises:
        ConfigError: max_length is below one, or beyond the positions that the model knows.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int):
        self.module = getattr(model, "base_model", model).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length
        positions = getattr(self.module.config, "max_position_embeddings", None)
        if max_length < 1 or (positions is not None and max_length > positions):
            raise ConfigError(
                f"max_length (text_token_len) is {max_length}; this text encoder takes 1 to "
                f"{positions or 'any number of'} tokens."
            )

    @classmethod
    def from_folders(
        cls,
        text_encoder_dir: str | os.PathLike,
        tokenizer_dir: str | os.PathLike,
        *,
        max_length: int,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        allow_pickle: bool = False,
    ) -> "TextEncoder":
        """Open the `text_encoder` and `tokenizer` folders of a checkpoint.

        Args:
            text_encoder_dir: folder with config.json and safetensors weights, one file or shards.
            tokenizer_dir: folder with the tokenizer's files.
            max_length: most tokens a prompt may have.
            torch_dtype: dtype to load the weights in; None keeps the checkpoint's.
            device: device to move the model to; None leaves it on the CPU.
            allow_pickle: also read .bin weights, where there are no safetensors.

        Raises:
            CheckpointError: a folder or file is missing or damaged, parameters are missing, of
                the wrong shape, quantised or not finite, or the checkpoint asks for its own code.
            DependencyError: transformers is not installed.
        """
        transformers = _transformers()
        model = _load_model(transformers, Path(text_encoder_dir), torch_dtype, allow_pickle)
        tokenizer = _load_tokenizer(transformers, Path(tokenizer_dir))
        if device is not None:
            model = model.to(device)
        return cls(model, tokenizer, max_length)

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings (`text_token_dim` of a NOVA config)."""
        return self.module.config.hidden_size

    @property
    def device(self) -> torch.device:
        return self.module.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.get_input_embeddings().weight.dtype

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Embed prompts, each as if it were alone; equal prompts are computed once.

        Args:
            prompts: list of strings. Too long ones are truncated, with one
                `PromptTruncationWarning` a call.

        Returns:
            List of tensors (n_tokens, hidden_size) on the model's device and in its dtype: the
            last hidden states, final norm included, of each prompt's own tokens. A prompt without
            tokens gives (0, hidden_size). Equal prompts share one tensor.

        Raises:
            InputError: prompts is no list of strings.
            CheckpointError: tokenizer and model do not belong together, or the model's output
                is not finite.
        """
        _check_prompts(prompts)
        distinct = list(dict.fromkeys(prompts))
        tokens = dict(zip(distinct, self._tokenize(distinct), strict=True))
        if "" in tokens:
            tokens[""] = []  # where the tokenizer would put special tokens: it is the null prompt
        empty = torch.empty(0, self.hidden_size, device=self.device, dtype=self.dtype)
        embeddings = {prompt: empty for prompt in distinct if not tokens[prompt]}
        # Prompts of similar length share a batch, which keeps padding short.
        pending = sorted((p for p in distinct if tokens[p]), key=lambda p: len(tokens[p]))
        for first in range(0, len(pending), BATCH_SIZE):
            batch = pending[first : first + BATCH_SIZE]
            hidden_states = self._hidden_states([tokens[prompt] for prompt in batch])
            embeddings.update(zip(batch, hidden_states, strict=True))
        return [embeddings[prompt] for prompt in prompts]

    def save(self, text_encoder_dir: str | os.PathLike, tokenizer_dir: str | os.PathLike) -> None:
        """Write both folders, weights as safetensors, so that `from_folders` opens them again.

        Raises:
            CheckpointError: see `weights_to_save`; the disk is full.
        """
        weights = self.weights_to_save()
        save_model = partial(uncompiled(self.module).save_pretrained, state_dict=weights)
        try:
            write_files(Path(text_encoder_dir), save_model)
            write_files(Path(tokenizer_dir), self.tokenizer.save_pretrained)
        except (OSError, SafetensorError) as error:  # a full disk is the latter
            raise CheckpointError(f"the text encoder cannot be saved: {error}.") from error

    def weights_to_save(self) -> dict[str, Tensor]:
        """The weights by the names that files have.

        Raises:
            CheckpointError: layers were wrapped, replaced or quantised.
        """
        with torch.device("meta"):
            fresh = _transformers().AutoModel.from_config(self.module.config)
        return weights_to_save(self.module, fresh, "the text encoder")

    def _tokenize(self, prompts: list[str]) -> list[list[int]]:
        """Return one list of token ids a prompt, at most max_length long."""
        if not prompts:
            return []
        tokens = self.tokenizer(prompts, padding=False, truncation=False, verbose=False).input_ids
        too_long = [k for k, ids in enumerate(tokens) if len(ids) > self.max_length]
        if not too_long:
            return tokens
        cuts = []
        for k in too_long:
            # The tokenizer truncates, as it knows which special tokens have to stay.
            ids = self.tokenizer(
                prompts[k], truncation=True, max_length=self.max_length, verbose=False
            ).input_ids
            cuts.append(f"{len(tokens[k]) - len(ids)} of {len(tokens[k])} tokens of {prompts[k]!r}")
            tokens[k] = ids
        shown = [cut if len(cut) <= 100 else f"{cut[:96]}...'" for cut in cuts[:3]]
        more = f" and of {len(cuts) - 3} more prompts" if len(cuts) > 3 else ""
        warnings.warn(
            f"prompts may have {self.max_length} tokens; ignored are {', '.join(shown)}{more}.",
            PromptTruncationWarning,
            stacklevel=4,  # the caller of encode, beyond no_grad's wrapper
        )
        return tokens

    def _hidden_states(self, tokens: list[list[int]]) -> list[Tensor]:
        """One pass over non-empty token lists -> list of (n_tokens, hidden_size)."""
        vocabulary = self.module.get_input_embeddings().num_embeddings
        if max(max(ids) for ids in tokens) >= vocabulary:
            raise CheckpointError(
                f"the tokenizer gives ids beyond the text encoder's {vocabulary}: they do not "
                "belong together. Take both folders from one checkpoint."
            )
        # Padding on the right: with causal attention no real token ever sees it, whichever id it
        # has, and real tokens keep positions 0, 1, ...
        length = max(len(ids) for ids in tokens)
        input_ids = torch.zeros(len(tokens), length, dtype=torch.long, device="cpu")
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(tokens):
            input_ids[row, : len(ids)] = torch.tensor(ids, device="cpu")
            attention_mask[row, : len(ids)] = 1
        with without_autocast(self.device):
            hidden = self.module(
                input_ids=input_ids.to(self.device),
                attention_mask=attention_mask.to(self.device),
                use_cache=False,
            ).last_hidden_state
        # Copies, so that a short prompt does not keep the padded batch alive.
        hidden = [hidden[row, : len(ids)].clone() for row, ids in enumerate(tokens)]
        if not all(bool(states.isfinite().all()) for states in hidden):
            raise CheckpointError(
                f"the text encoder's output in {self.dtype} is not finite. Load it with "
                "torch_dtype=torch.bfloat16 or torch.float32."
            )
        return hidden


def _check_prompts(prompts: Any) -> None:
    if isinstance(prompts, str) or not isinstance(prompts, (list, tuple)):
        raise InputError(f"prompts must be a list of strings, not {type(prompts).__name__}.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"prompt {index} is {type(prompt).__name__}; expected a string.")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"prompt {index} is not valid Unicode text: {error}.") from error


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise dependency_error(
            "the text encoder needs transformers",
            "transformers",
            "pip install transformers",
            error,
        ) from error
    return transformers


def _load_model(
    transformers: ModuleType, folder: Path, torch_dtype: torch.dtype | None, allow_pickle: bool
) -> nn.Module:
    config = read_json(folder / "config.json")
    _refuse_custom_code(folder / "config.json", config)
    if config.get("is_encoder_decoder"):
        raise CheckpointError(
            f"{folder} holds an encoder-decoder model ({config.get('model_type')}); NOVA's text "
            "encoder is a causal language model."
        )
    if not any(folder.glob("*.safetensors")):
        has_pickle = any(folder.glob("*.bin"))
        if not has_pickle:
            raise CheckpointError(f"{folder} has no weights; download its *.safetensors files.")
        if not allow_pickle:
            raise CheckpointError(
                f"the weights in {folder} are pickle files (.bin), which can carry code. Use "
                "safetensors, or pass allow_pickle=True if you trust their source."
            )
    advice = "download its weights and config.json again"
    try:
        with _third_party_errors(transformers, folder, advice):
            model, report = transformers.AutoModel.from_pretrained(
                str(folder),
                dtype="auto" if torch_dtype is None else torch_dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=None if allow_pickle else True,
                ignore_mismatched_sizes=True,  # they are in the report, and an error below
                output_loading_info=True,
            )
    except CheckpointError:
        # Before version 5 integers are errors that do not say so.
        _check_file_dtypes(folder, lambda name: name.endswith((".weight", ".bias")))
        raise
    parameters = {name for name, _ in model.named_parameters()}
    prefix = f"{model.base_model_prefix}."  # in files of a model with a language-modelling head
    _check_file_dtypes(folder, lambda name: name.removeprefix(prefix) in parameters)
    _check_loaded(folder, model, report)
    return model


def _check_loaded(folder: Path, model: nn.Module, report: Mapping[str, Any]) -> None:
    """Refuse parameters that transformers left at random values, and broken ones."""
    missing = sorted(report["missing_keys"])
    # With their shapes, or before version 5 of transformers names alone.
    misshaped = sorted(
        entry if isinstance(entry, str) else entry[0] for entry in report["mismatched_keys"]
    )
    broken = [name for name, value in model.named_parameters() if not bool(value.isfinite().all())]
    problems = {
        "missing from the weights": missing,
        "of another shape than config.json says": misshaped,
        "NaN or infinite": broken,
    }
    for problem, names in problems.items():
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise CheckpointError(
                f"parameters of the text encoder in {folder} are {problem}: {shown}. Download "
                "the folder again."
            )


def _check_file_dtypes(folder: Path, is_parameter: Callable[[str], bool]) -> None:
    """Refuse quantised parameters: transformers casts their integers to numbers of another size.

    Buffers, such as position ids, may be integers.
    """
    for file in weight_files(folder, "model", "safetensors"):
        weights = load_safetensors(file)
        check_dtypes({k: value for k, value in weights.items() if is_parameter(k)}, str(file))


def _load_tokenizer(transformers: ModuleType, folder: Path) -> Any:
    if not folder.is_dir():
        raise CheckpointError(f"tokenizer folder {folder} does not exist; download it as well.")
    if (folder / "tokenizer_config.json").is_file():
        config = read_json(folder / "tokenizer_config.json")
        _refuse_custom_code(folder / "tokenizer_config.json", config)
    advice = "download its tokenizer.json (or vocab.json and merges.txt) again"
    with _third_party_errors(transformers, folder, advice):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        # Without vocabulary files some versions build an empty tokenizer: no prompt has tokens.
        usable = len(tokenizer("a").input_ids) > 0
    if not usable:
        raise CheckpointError(f"the tokenizer in {folder} has no vocabulary; {advice}.")
    return tokenizer


def _refuse_custom_code(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("auto_map"):
        raise CheckpointError(
            f"{path} asks for code of its own (auto_map), which is never run. If transformers "
            "knows the model by itself, delete the auto_map entry."
        )


@contextlib.contextmanager
def _third_party_errors(transformers: ModuleType, folder: Path, advice: str) -> Iterator[None]:
    """Turn whatever transformers raises into a CheckpointError, and keep its log quiet."""
    log = transformers.utils.logging
    verbosity = log.get_verbosity()
    # It reports the language-modelling head, which is not wanted here, as a problem.
    log.set_verbosity_error()
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # damaged files surface as almost any type
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if sys.flags.optimize >= 2:
            advice = "transformers does not run under python -OO: it reads docstrings"
        raise CheckpointError(f"{folder} cannot be loaded ({reason}); {advice}.") from error
    finally:
        log.set_verbosity(verbosity)
