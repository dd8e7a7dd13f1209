"""Names, digests and comparisons of trees of arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.trees import check_same_shapes, digest, filled, flatten, unflatten

BUDGET_SECONDS = 10


def test_digest_sees_values_names_types_and_shapes():
    tree = {"a": {"b": np.arange(6, dtype=np.float32)}}
    reference = digest(tree)
    assert reference == digest({"a": {"b": jnp.arange(6.0)}})
    for other in (
        {"a": {"c": np.arange(6, dtype=np.float32)}},
        {"a": {"b": np.arange(6, dtype=np.float64)}},
        {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}},
        {"a": {"b": np.arange(1, 7, dtype=np.float32)}},
        {"a": {"b": np.arange(6, dtype=np.float32), "d": "text"}},
    ):
        assert digest(other) != reference


def test_shape_report_lists_all_offenders():
    stored = {"a": np.ones(3), "b": {"c": np.ones((2, 2))}, "old": np.ones(1)}
    wanted = {"a": np.ones(4), "b": {"c": np.ones((2, 2))}, "new": np.ones(1)}
    with pytest.raises(ValueError, match="does not fit") as caught:
        check_same_shapes(stored, wanted, where="step 3")
    for text in (
        "a is (3,) in the checkpoint and (4,)",
        "new is not in the ch",
        "old is not in the n",
    ):
        assert text in str(caught.value)
    check_same_shapes(stored, stored, where="step 3")


def test_flatten_is_sorted_and_dotted():
    tree = {"b": {"y": 1, "x": 2}, "a": 3}
    assert list(flatten(tree)) == ["a", "b.x", "b.y"]
    assert unflatten(flatten(tree)) == tree


def test_filled_takes_its_own_names_alone_and_needs_all_of_them():
    tree = {"b": {"y": 1, "x": 2}, "empty": {}}
    leaves = {"b.x": 20, "b.y": 10, "c": 0}
    assert filled(tree, leaves) == {"b": {"y": 10, "x": 20}, "empty": {}}
    with pytest.raises(KeyError, match=r"b\.y"):
        filled(tree, {"b.x": 20})
