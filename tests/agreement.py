"""How near values are to those of a golden file."""

from collections.abc import Collection, Mapping

import make_step
import numpy as np


def difference(value: np.ndarray, golden: np.ndarray) -> float:
    """Largest difference relative to the largest golden value."""
    assert value.shape == golden.shape
    return np.abs(value - golden).max() / np.abs(golden).max()


def assert_near(
    kind: str,
    values: Mapping[str, np.ndarray],
    golden: Mapping[str, np.ndarray],
    tolerance: float,
    *,
    left_out: Collection[str] = (),
) -> None:
    """The norm and one product of every tensor, then every value of those stored in full.

    Args:
        kind: of tensors: 'gradient', 'statistic' or 'movement'.
        left_out: paths of which no norm and product is compared.
    """
    differences = {}
    summaries = zip(sorted(values), make_step.summarize(values), golden[f"{kind}s"], strict=True)
    for path, (norm, product), (golden_norm, golden_product) in summaries:
        if path not in left_out:
            larger = np.maximum(abs(norm - golden_norm), abs(product - golden_product))
            differences[path] = larger / golden_norm
    full = {name.partition("/")[2] for name in golden if name.startswith(f"{kind}/")}
    assert full <= set(values)
    for path in full:
        worst = difference(values[path], golden[f"{kind}/{path}"])
        differences[path] = np.maximum(differences[path], worst)
    wrong = {path: x for path, x in differences.items() if not x <= tolerance}
    assert not wrong, f"{len(wrong)} of {len(differences)} {kind}s differ: {wrong}"
