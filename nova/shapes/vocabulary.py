"""The words of the world and what they mean: colours, shapes, sizes, motions, speeds, relations.

Lengths are fractions of a frame's shorter side, written as pixels in a frame of 64, and speeds are
those lengths a frame. Angles are in degrees, counter-clockwise from "right", as one sees them.
"""

import math

FPS = 12
REFERENCE_FRAMES = 17  # what the sampler makes room for: no motion meets a border before its time

# RGB. Every two of them, and each with every background, are far apart (CIE Lab, see the tests).
COLORS = {
    "red": (222, 32, 38),
    "orange": (255, 140, 0),
    "yellow": (250, 228, 40),
    "green": (30, 165, 60),
    "cyan": (40, 215, 225),
    "blue": (25, 95, 245),
    "purple": (150, 35, 175),
    "pink": (255, 130, 195),
}
BACKGROUNDS = {
    "black": (14, 14, 16),
    "navy": (14, 20, 68),
    "gray": (112, 112, 116),
    "beige": (226, 208, 172),
    "white": (244, 244, 242),
}

# Radius of the circle; other shapes are scaled so that they look as large (see geometry.py).
SIZES = {"small": 9 / 64, "large": 12.5 / 64}

# A shape that grows starts at this radius, one that shrinks ends at it.
SMALLEST_RADIUS = 8 / 64
LARGEST_RADIUS = 18 / 64

SPEEDS = {"slow": 1 / 64, "fast": 1.75 / 64}
GROWTH_SPEEDS = {"slow": 0.25 / 64, "fast": 0.5 / 64}  # change of the radius a frame

ORBIT_RADIUS = 8 / 64  # of a circling shape's centre
MARGIN = 1 / 64  # kept free at the frame's borders
GAP = 3 / 64  # kept free between the two shapes, along the axis of their relation

DIRECTIONS = {
    "right": 0,
    "up right": 45,
    "up": 90,
    "up left": 135,
    "left": 180,
    "down left": 225,
    "down": 270,
    "down right": 315,
}
# Each bounces off the border that it names; so it first moves towards that border.
BOUNCES = {"bounce right": 0, "bounce up": 90, "bounce left": 180, "bounce down": 270}
TURNS = ("clockwise", "counterclockwise")
GROWTHS = ("growing", "shrinking")
MOTIONS = ("still", *DIRECTIONS, *TURNS, *GROWTHS, *BOUNCES)

# Relation of the first shape to the second -> (axis: 0 for x, 1 for y; whether it comes first on
# it), with x to the right and y down.
RELATIONS = {"above": (1, True), "below": (1, False), "left of": (0, True), "right of": (0, False)}


def unit_vector(angle: float) -> tuple[float, float]:
    """(x, y) of length 1 in image coordinates (y down); exact zeros along the axes."""
    x, y = math.cos(math.radians(angle)), -math.sin(math.radians(angle))
    return round(x, 12), round(y, 12)
