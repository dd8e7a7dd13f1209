"""Weights and a network: everything fits, or everything that does not is listed by name."""

import ml_dtypes
import numpy as np
import pytest
from test_names import kernel

from pspnet_jax.weights import tables
from pspnet_jax.weights.fit import CLASSIFIER, fit
from pspnet_jax.weights.names import MisfitError, rename

BUDGET_SECONDS = 10

SEMSEG = tables.of_network("semseg", (1, 2, 3, 6), stem="deep")
WANTED = {
    "head.conv.kernel": (3, 3, 4, 5),
    "head.norm.scale": (5,),
    "head.norm.variance": (5,),
    "head.classifier.bias": (2,),
}
FITTING = {
    "cls.0.weight": kernel(5, 4, 3, 3),
    "cls.1.weight": kernel(5),
    "cls.1.running_var": kernel(5),
    "cls.4.bias": kernel(2),
}


def fitted(source, **options):
    return fit(rename(source, SEMSEG), WANTED, where="file.pth", **options)


def test_everything_fits():
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        found = fitted({key: array.astype(dtype) for key, array in FITTING.items()})
        assert set(found.loaded) == set(WANTED)
        assert {array.dtype for array in found.loaded.values()} == {np.dtype("float32")}
        assert (found.reinitialized, found.left_out) == ((), ())


def without(key):
    return {k: v for k, v in FITTING.items() if k != key}


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (without("cls.1.weight"), ["file.pth does not fit", "cls.1.weight is missing"]),
        (FITTING | {"cls.9.weight": kernel(5)}, ["cls.9.weight is not known"]),
        (
            FITTING | {"psa.0": kernel(5), "psa.1": kernel(5)},
            ["psa.1 is not known", "another depth"],
        ),
        (
            FITTING | {"aux.1.num_batches_tracked": np.array(7)},
            ["aux.1.num_batches_tracked is not"],
        ),
        (
            without("cls.1.weight") | {"cls.1.weigth": kernel(5)},
            ["cls.1.weight is missing", "'cls.1.weigth' in the file is 'cls.1.weight'"],
        ),
        (
            FITTING | {"cls.0.weight": kernel(4, 5, 3, 3)},
            [r"cls.0.weight is \[3, 3, 5, 4\], the network has \[3, 3, 4, 5\]", "is transposed"],
        ),
        (FITTING | {"aux.1.bias": kernel(5)}, ["aux.1.bias is not known"]),
        (FITTING | {"cls.4.bias": np.array([1, np.nan])}, ["cls.4.bias holds values that are not"]),
        (FITTING | {"cls.4.bias": np.array([1, 1e300])}, ["cls.4.bias holds values that are not"]),
        (FITTING | {"cls.4.bias": np.array([1, 2])}, ["cls.4.bias holds int64, not floating"]),
        (
            FITTING | {"cls.4.bias": np.array([1, 2j])},
            ["cls.4.bias holds complex128, not floating"],
        ),
        (
            FITTING | {"cls.1.running_var": -kernel(5)},
            ["cls.1.running_var holds negative variances"],
        ),
        ({"x": kernel(1), "fc.weight": kernel(1)}, ["cls.0.weight is missing", "a backbone"]),
    ],
)
def test_whatever_does_not_fit_is_named_with_its_cause(source, messages):
    for message in messages:
        with pytest.raises(MisfitError, match=message):
            fitted(source)


def test_all_offenders_are_listed_at_once():
    source = {"cls.0.weight": kernel(5, 4, 1, 1), "cls.5.bias": kernel(2), "cls.1.bias": kernel(5)}
    with pytest.raises(MisfitError) as error:
        fitted(source)
    for part in ("cls.0.weight is [1,", "cls.1.weight is missing", "cls.4.bias is missing"):
        assert part in str(error.value)
    for part in ("cls.5.bias is not known", "cls.1.bias is not known"):
        assert part in str(error.value)


def test_of_each_kind_of_fault_some_are_shown():
    source = {f"psa.{i}": kernel(1) for i in range(50)}
    with pytest.raises(MisfitError) as error:
        fitted(source)
    assert "cls.0.weight is missing" in str(error.value)
    assert "psa.11 is not known" in str(error.value)
    assert "... and 38 more like that" in str(error.value)


def test_only_what_a_pattern_excuses_starts_anew():
    found = fitted(FITTING | {"cls.4.bias": kernel(7)}, starts_anew=CLASSIFIER)
    assert found.reinitialized == ("head.classifier.bias",)
    assert found.left_out == ("cls.4.bias",)
    with pytest.raises(MisfitError, match=r"cls\.1\.weight is missing"):
        fitted(without("cls.1.weight"), starts_anew=CLASSIFIER)
