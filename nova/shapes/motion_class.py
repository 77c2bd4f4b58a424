"""What a track does: the motion whose path fits its positions and sizes best."""

import math

import numpy as np

from .vocabulary import BOUNCES, DIRECTIONS, GROWTH_SPEEDS, ORBIT_RADIUS, SPEEDS

# Of what the slowest motion would do: less is standing still, or not growing.
SMALLEST_SHARE = 0.5
FRAMES_FOR_CURVES = 5
STILL_RANGE = 4 / 64  # of the shorter side; what moves for long enough goes further


def classify_motion(
    times: np.ndarray, centers: np.ndarray, radii: np.ndarray
) -> tuple[str, float, float]:
    """Name the motion of a track.

    Three families of paths are fitted by least squares: along a line (perhaps with a rest at the
    end), along a line and back (perhaps more than once), and around a circle.

    Args:
        times: (n,) frame numbers, increasing.
        centers: (n, 2) positions x, y (down), as fractions of the frame's shorter side.
        radii: (n,) in the same unit.

    Returns:
        (motion, speed, growth): one of `MOTIONS`, speed along the path and change of the radius,
        both in shorter sides a frame.
    """
    if len(times) < 2:
        return "still", 0.0, 0.0
    time = times - times[0].astype(float)
    duration = time[-1]
    growth = float(np.polyfit(time, radii, 1)[0])
    moved = np.ptp(centers, axis=0).max()
    if moved < min(STILL_RANGE, SMALLEST_SHARE * SPEEDS["slow"] * duration):
        if abs(growth) > SMALLEST_SHARE * GROWTH_SPEEDS["slow"]:
            return ("growing" if growth > 0 else "shrinking"), 0.0, growth
        return "still", 0.0, growth

    # Positions as complex numbers with y up: then a factor e^(i a) turns by a, counter-clockwise.
    path = centers[:, 0] - 1j * centers[:, 1]
    rests = np.linspace(0.2, 1, 17) * duration
    line = _fit(path, np.minimum(time, rests[:, None]))
    back = _fit(path, _bouncing(time, duration))
    slowest, fastest = 0.6 * SPEEDS["slow"] / ORBIT_RADIUS, 1.7 * SPEEDS["fast"] / ORBIT_RADIUS
    turns = np.linspace(slowest, fastest, 30)
    turns = np.concatenate([turns, -turns])
    circle = _fit(path, np.exp(1j * turns[:, None] * time))

    # A few points lie on curves of every kind.
    fits = (line, back, circle) if len(time) >= FRAMES_FOR_CURVES else (line,)
    best = min(fits, key=lambda fit: fit[0])
    _, k, factor = best
    if best is circle:
        turn = "counterclockwise" if turns[k] > 0 else "clockwise"
        return turn, abs(float(turns[k])) * abs(factor), growth
    if best is back:
        return _nearest(BOUNCES, -factor), abs(factor), growth
    return _nearest(DIRECTIONS, factor), abs(factor), growth


def _bouncing(time: np.ndarray, duration: float) -> np.ndarray:
    """Distances from the first border: falling to zero and rising, perhaps up to a second border.

    Returns:
        (curves, n), for various times of the bounce and between two bounces, in frames.
    """
    bounces = np.linspace(0.2, 0.8, 25)[:, None, None] * duration
    between = np.linspace(0.3, 1, 8)[:, None] * duration
    curves = np.abs((time - bounces + between) % (2 * between) - between)
    # What met another border before is no path away from the start.
    return curves[(bounces <= between)[..., 0]]


def _fit(path: np.ndarray, curves: np.ndarray) -> tuple[float, int, complex]:
    """Fit path = offset + factor * curve for each row of `curves`.

    Returns:
        (squared error, row, factor) of the best row.
    """
    path = path - path.mean()
    curves = curves - curves.mean(axis=1, keepdims=True)
    power = np.maximum((np.abs(curves) ** 2).sum(axis=1), 1e-12)
    product = curves.conj() @ path
    errors = (np.abs(path) ** 2).sum() - np.abs(product) ** 2 / power
    k = int(errors.argmin())
    return float(errors[k]), k, complex(product[k] / power[k])


def _nearest(angles: dict[str, int], vector: complex) -> str:
    angle = math.degrees(math.atan2(vector.imag, vector.real))
    return min(angles, key=lambda name: abs((angles[name] - angle + 180) % 360 - 180))
