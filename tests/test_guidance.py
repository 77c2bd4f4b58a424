"""Guidance: passes, schedules of the scale."""

from fractions import Fraction

import numpy as np
import pytest

from nova.errors import InputError
from nova.guidance import Guidance
from nova.request import Request


def test_passes():
    assert Guidance(scale=1.0).passes == 1
    assert Guidance(scale=1.5).passes == Guidance(scale=3.0).passes == 2
    assert Guidance(scale=3.0, image_scale=1.0).passes == 3


def test_scale_grows_from_the_minimum_to_the_whole():
    guidance = Guidance(scale=5.0, min_scale=2.0)
    assert [guidance.scale_at(i, 3) for i in range(3)] == [3.0, 4.0, 5.0]
    assert Guidance(scale=5.0).scale_at(0, 3) == 5.0


def test_truncation_counts_the_guided_steps():
    times = (1000.0, 700.0, 500.0, 300.0)
    assert Guidance(trunc=0).guided_steps(times) == 4
    assert Guidance(trunc=500).guided_steps(times) == 3  # 500 is not below 500
    assert Guidance(trunc=2000).guided_steps(times) == 0
    assert Guidance(scale=1.0).guided_steps(times) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_scale": -1.0}, "0 or above"),
        ({"scale": 1.0, "image_scale": 1.0}, "above 1"),
        ({"renorm": -0.1}, "0 or above"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(InputError, match=message):
        Guidance(**options)


def test_numbers_of_numpy_become_pythons():
    """They are sent to other processes as JSON (nova/tuning/trial.py)."""
    guidance = Guidance(scale=np.float32(5), min_scale=np.int64(2), trunc=Fraction(1, 2))
    assert guidance == Guidance(scale=5.0, min_scale=2.0, trunc=0.5)
    assert {type(value) for value in vars(guidance).values()} == {float}
    assert type(Request("a", flow_shift=np.float32(3)).flow_shift) is float
