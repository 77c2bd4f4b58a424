"""What nvidia-smi says of a card: driver, clocks, power limit."""

import subprocess
from typing import Any

import torch

# Field of nvidia-smi -> name in results files.
FIELDS = {
    "driver_version": "driver",
    "clocks.sm": "sm_clock_MHz",
    "clocks.mem": "memory_clock_MHz",
    "clocks.max.sm": "largest_sm_clock_MHz",
    "clocks.max.mem": "largest_memory_clock_MHz",
    "power.limit": "power_limit_W",
    "temperature.gpu": "temperature_C",
}


def card_facts(device: torch.device) -> dict[str, Any]:
    """Facts of a GPU at this moment; none without nvidia-smi, or for a CPU."""
    if device.type != "cuda":
        return {}
    # The identity holds where CUDA_VISIBLE_DEVICES renumbers cards.
    card = str(torch.cuda.get_device_properties(device).uuid)
    command = [
        "nvidia-smi",
        "--query-gpu=" + ",".join(FIELDS),
        "--format=csv,noheader,nounits",
        f"--id=GPU-{card.removeprefix('GPU-')}",
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_card_facts(result.stdout)


def parse_card_facts(line: str) -> dict[str, Any]:
    """A line of nvidia-smi's table, by the names of `FIELDS`; what it does not know is left out.

    >>> parse_card_facts("570.86, 1980, 2619, 1980, 2619, 700.00, 35")["power_limit_W"]
    700.0
    """
    values = [value.strip() for value in line.strip().split(",")]
    if len(values) != len(FIELDS):
        return {}
    facts: dict[str, Any] = {}
    for name, value in zip(FIELDS.values(), values, strict=True):
        if name == "driver":
            facts[name] = value
        elif value.replace(".", "", 1).isdigit():  # not "[N/A]"
            facts[name] = float(value)
    return facts
