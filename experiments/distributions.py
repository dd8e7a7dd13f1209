"""How far two samples are from being drawn alike."""

from collections.abc import Sequence

import numpy as np


def distances(
    names: Sequence[str], one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Of each quantity the largest difference between the two shares of values up to a number: the distance of
    Kolmogorov and Smirnov, 0 .. 1, to three digits.

    Args:
        names: of the quantities.
        one, other: [draws, quantities], each with draws of its own.
    """
    found = {}
    for name, a, b in zip(names, np.transpose(one), np.transpose(other), strict=True):
        grid = np.concatenate([a, b])
        shares = (np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (a, b))
        found[name] = round(float(np.abs(np.subtract(*shares)).max()), 3)
    return found
