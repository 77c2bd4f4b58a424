"""What a resumed run needs besides the weights in use: raw weights, optimiser, progress.

Tensors are gathered whole and named as in the unwrapped module, so that a run may go on with
another number of processes or another way to shard. Generator states are not needed: all draws
depend on the seed, the step and the position alone.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..altered_layers import named_weights
from ..checkpoint import load_state_dict, load_strict, read_json, save_state_dict, write_json
from ..errors import CheckpointError
from .engine import Engine

FOLDER = "training_state"
WEIGHTS, OPTIMIZER, PROGRESS = "weights", "optimizer", "progress.json"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def averaged_weights(engine: Engine) -> dict[str, Tensor]:
    """The averaged weights with all buffers, on the CPU; on the main process (others: empty).

    All processes must call this.
    """
    with engine.ema.swapped_in():
        state = get_model_state_dict(engine.module, options=_WHOLE)
        # On a CPU the tensors are the module's own, which change again below.
        return {name: tensor.clone() for name, tensor in state.items()}


@torch.no_grad()
def load_averaged_weights(module: nn.Module, fresh: nn.Module, folder: Path) -> None:
    """Put a checkpoint's weights into the module to train, which stays as it is otherwise.

    Args:
        module: torch.compile may have wrapped parts of it.
        fresh: one of the same config, on the meta device; it takes the file's tensors.
        folder: the part's, with safetensors files.

    Raises:
        CheckpointError: files are missing or damaged, or of another model.
    """
    load_strict(fresh, load_state_dict(folder), str(folder))
    weights = fresh.state_dict()
    for name, tensor in named_weights(module).items():
        tensor.copy_(weights[name])


def _optimizers(engine: Engine) -> list[torch.optim.Optimizer]:
    """Torch's own, without accelerate's wrappers."""
    return [optimizer.optimizer for optimizer in engine.optimizers]


def save_training_state(engine: Engine, folder: Path, progress: dict[str, Any]) -> None:
    """Write folder/training_state. All processes must call this; the main one writes."""
    weights = get_model_state_dict(engine.module, options=_WHOLE)
    optimizer = get_optimizer_state_dict(engine.module, _optimizers(engine), options=_WHOLE)
    if not engine.accelerator.is_main_process:
        return
    folder = folder / FOLDER
    save_state_dict(weights, folder, WEIGHTS)
    moments = {
        f"{name}/{key}": torch.as_tensor(value)
        for name, values in optimizer["state"].items()
        for key, value in values.items()
    }
    save_state_dict(moments, folder, OPTIMIZER)
    watch = {"losses": list(engine.watch.losses), "suspicious": engine.watch.suspicious}
    write_json(folder / PROGRESS, {**progress, "watch": watch})


def read_progress(folder: Path) -> dict[str, Any]:
    """What `save_training_state` was given."""
    return read_json(folder / FOLDER / PROGRESS)


def load_training_state(engine: Engine, folder: Path) -> None:
    """Put folder/training_state into an engine whose module has the averaged weights.

    That the average starts from the module's weights saves storing it twice.

    Raises:
        CheckpointError: files are missing or damaged, or of another model.
    """
    where = folder / FOLDER
    weights = load_state_dict(where, WEIGHTS)
    moments = load_state_dict(where, OPTIMIZER)
    optimizers = _optimizers(engine)
    # Not gathered: names and settings alone are wanted, on every process.
    current = get_optimizer_state_dict(engine.module, optimizers)
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in moments.items():
        name, _, kind = key.rpartition("/")
        state.setdefault(name, {})[kind] = tensor
    trained = {name for group in current["param_groups"] for name in group["params"]}
    if set(state) != trained:
        different = sorted(set(state) ^ trained)
        raise CheckpointError(
            f"{where} is of a run that trained other parameters, such as {different[:3]}; go on "
            "with the options it was started with"
        )
    try:
        set_model_state_dict(engine.module, weights, options=StateDictOptions(full_state_dict=True))
        set_optimizer_state_dict(
            engine.module,
            optimizers,
            {"state": state, "param_groups": current["param_groups"]},
            options=StateDictOptions(full_state_dict=True),
        )
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{where} does not fit this model: {reason}") from error
    watch = read_progress(folder)["watch"]
    engine.watch.losses.extend(watch["losses"])
    engine.watch.suspicious = watch["suspicious"]
