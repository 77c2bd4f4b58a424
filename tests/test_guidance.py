"""Guidance: passes, schedules of the scale, combination."""

import pytest
import torch

from nova.denoising import _combine
from nova.errors import InputError
from nova.guidance import Guidance, guided_with_renorm


def test_passes():
    assert Guidance(scale=1.0).passes == 1
    assert Guidance(scale=3.0).passes == 2
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


def test_combination_of_two_and_three_passes():
    cond, uncond, image = torch.randn(3, 5, 4)
    two = _combine(torch.stack([cond, uncond]), Guidance(scale=3.0), 3.0)
    torch.testing.assert_close(two, uncond + 3 * (cond - uncond))
    guidance = Guidance(scale=3.0, image_scale=1.5)
    three = _combine(torch.stack([cond, uncond, image]), guidance, 3.0)
    torch.testing.assert_close(three, uncond + 3 * (cond - image) + 1.5 * (image - uncond))


@pytest.mark.parametrize("image_scale", [0.0, 1.5])
def test_renorm_counts_the_whole_frame(image_scale):
    """Written out over whole frames, with the noisy tokens as predictions outside the set."""
    guidance = Guidance(scale=4.0, renorm=0.3, image_scale=image_scale)
    outside = torch.randn(2, 7, 4)
    inside = torch.randn(guidance.passes, 2, 3, 4)
    guided, factor = guided_with_renorm(inside, outside.square().sum((1, 2)), guidance, 4.0)
    whole = [torch.cat([x, outside], dim=1) for x in inside]
    image = whole[2] if image_scale else whole[1]
    expected = whole[1] + 4.0 * (whole[0] - image)
    ratio = whole[0].norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    torch.testing.assert_close(factor, ratio.clamp(0.3, 1.0))
    expected = expected * factor[:, None, None] + image_scale * (image - whole[1])
    torch.testing.assert_close(guided, expected[:, :3])
    torch.testing.assert_close(factor[:, None, None] * outside, expected[:, 3:])


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
