"""The process in which `reporting.py` checks implementations on a GPU."""

import json
import sys

import torch

from nova_kernels.isolation import answers_to_parent
from nova_kernels.reporting import check_implementation


def main() -> None:
    """Read a device and implementations, and answer with the errors and the failure of each."""
    given = json.load(sys.stdin)
    say = answers_to_parent()
    torch.zeros(1, device=given["device"])
    say("started")
    for op, backend in given["implementations"]:
        errors, failure = check_implementation(op, backend, given["device"])
        # After some errors of a GPU nothing else goes well in the same process.
        say([errors, failure], last=failure is not None)


if __name__ == "__main__":
    main()
