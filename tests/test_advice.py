"""What counts suggest: label sets, CSV files, weights of classes."""

import numpy as np
import pytest

from pspnet_jax.advice import (
    WEIGHTINGS,
    csv_of,
    enet,
    inverse_frequency,
    median_frequency,
    suggest_labels,
    suspicions,
)
from pspnet_jax.catalog import load_label_set
from pspnet_jax.data.survey import Finding, survey

BUDGET_SECONDS = 10


def survey_of(label_set, *masks):
    """As of mask files."""
    findings = []
    for mask in masks:
        counts = np.bincount(np.uint8(mask).ravel(), minlength=256)
        classes = np.bincount(label_set.table[np.uint8(mask)].ravel(), minlength=256)
        findings.append(Finding("a", "a.jpg", "a.png", (1, 1), None, "ids", counts, classes))
    return survey("train", findings)


CAMVID = load_label_set("camvid")
# 8 pixels: 4 of sky and 4 of building; then 2 of sky, 1 of pole, 1 of void.
COUNTS = survey_of(CAMVID, [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 2, 11])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        # 11 labeled pixels of 11 classes
        (inverse_frequency, [1 / 6, 1 / 4, 1, 0]),
        (enet, [1 / np.log(1.02 + p) for p in (6 / 11, 4 / 11, 1 / 11, 0)]),
        # f is 6/12, 4/8 and 1/4, the median 1/2
        (median_frequency, [1, 1, 2, 0]),
    ],
)
def test_weights_by_hand(function, expected):
    np.testing.assert_allclose(function(COUNTS, 11)[:4], expected)


def test_weights_of_nothing():
    empty = survey_of(CAMVID, [11])
    for weighting in WEIGHTINGS:
        assert np.isfinite(weighting.weights(empty, 11)).all()


@pytest.mark.parametrize(
    ("found", "current", "suggested"),
    [
        (range(151), "ade20k_train_ids", "ade20k"),
        ([0, 3, 150], "ade20k_train_ids", "ade20k"),
        ([*range(19), 255], "camvid", "cityscapes_train_ids"),
        ([7, 8, 26, 33], "cityscapes_train_ids", "cityscapes"),
        ([*range(21), 255], "camvid", "voc2012"),
        (range(151), "camvid", "ade20k"),
    ],
)
def test_built_in_label_set_that_fits(found, current, suggested):
    suggestion = suggest_labels(list(found), load_label_set(current))
    assert suggestion.labels == suggested
    assert f"--config.data.labels={suggested}" in suggestion.sentence
    assert suggestion.csv is None


def test_csv_of_values_that_no_label_set_lists(tmp_path):
    suggestion = suggest_labels([0, 3, 11, 40, 200, 255], CAMVID)
    assert suggestion.labels is None
    (tmp_path / "mine.csv").write_text(suggestion.csv)
    mine = load_label_set(str(tmp_path / "mine.csv"))
    assert mine.names == ("sky", "road", "class_40", "class_200")
    assert mine.colors[:2] == (CAMVID.colors[0], CAMVID.colors[3])
    assert len(set(mine.colors)) == 4
    assert mine.raw_ids == ((0,), (3,), (40,), (200,))
    assert mine.void_raw_ids == (11, 255)


@pytest.mark.parametrize("found", [[200], [200, 255], [11, 200], [255]])
def test_one_class_is_no_label_set(found):
    suggestion = suggest_labels(found, CAMVID)
    assert "nothing to tell apart" in suggestion.sentence
    assert suggestion.csv is None


def test_few_classes_of_a_large_label_set_are_ones_own():
    suggestion = suggest_labels([0, 1, 12], CAMVID)  # all of them are listed by voc2012, too
    assert suggestion.labels is None
    assert "2,class_12" in suggestion.csv


def test_ones_own_label_set_is_not_replaced(tmp_path):
    (tmp_path / "mine.csv").write_text(
        "id,name,red,green,blue,raw_ids\n0,ground,1,1,1,0 1\n1,house,2,2,2,7\n"
    )
    suggestion = suggest_labels([0, 1, 7, 33], load_label_set(str(tmp_path / "mine.csv")))
    assert "label set 'mine' does not list 33:" in suggestion.sentence
    assert (suggestion.labels, suggestion.csv) == (None, None)


def test_csv_of_two_classes(tmp_path):
    (tmp_path / "mine.csv").write_text(csv_of([0, 255], CAMVID))
    mine = load_label_set(str(tmp_path / "mine.csv"))
    np.testing.assert_array_equal(mine.from_raw(np.uint8([[0, 255]])), [[0, 1]])


def test_csv_of_several_raw_ids_of_one_class(tmp_path):
    (tmp_path / "wide.csv").write_text(
        "id,name,red,green,blue,raw_ids\n0,ground,1,1,1,0 1\n1,house,2,2,2,2\n"
    )
    wide = load_label_set(str(tmp_path / "wide.csv"))
    (tmp_path / "mine.csv").write_text(csv_of([0, 1, 2, 3], wide))
    mine = load_label_set(str(tmp_path / "mine.csv"))
    assert mine.names == ("ground", "ground_1", "house", "class_3")
    assert len(set(mine.colors)) == 4


def test_csv_has_as_many_colors_as_ids(tmp_path):
    (tmp_path / "mine.csv").write_text(csv_of(range(12, 120), CAMVID))
    assert len(set(load_label_set(str(tmp_path / "mine.csv")).colors)) == 108


def test_new_color_differs_from_a_known_one(tmp_path):
    color = csv_of([0, 40], CAMVID).splitlines()[2].split(",")[2:5]
    (tmp_path / "taken.csv").write_text(
        f"id,name,red,green,blue,raw_ids\n0,a,{','.join(color)},0\n1,b,1,1,1,1\n"
    )
    rows = csv_of([0, 40], load_label_set(str(tmp_path / "taken.csv"))).splitlines()
    assert rows[1].split(",")[2:5] == color
    assert rows[2].split(",")[2:5] != color


def test_values_that_are_no_ids():
    suggestion = suggest_labels(range(256), CAMVID)
    assert (suggestion.labels, suggestion.csv) == (None, None)
    assert "256 different values" in suggestion.sentence


OFFICIAL = [[0, 1, 3, 150]] * 30
CONVERTED = [[255, 0, 2, 149]] * 30
LABEL_IDS = [[7, 11, 23, 26, 1]] * 8
LABEL_TRAIN_IDS = [[0, 2, 10, 13, 255]] * 8


@pytest.mark.parametrize(
    ("name", "masks", "advice"),
    [
        ("ade20k", OFFICIAL, None),
        ("ade20k", CONVERTED, "labels=ade20k_train_ids"),
        ("ade20k", [[0, 1, 149]] * 1000, "labels=ade20k_train_ids"),
        ("ade20k", [[0, 1, 149]] * 30, None),
        ("ade20k_train_ids", CONVERTED, None),
        ("ade20k_train_ids", [[0, 1, 149]] * 30, "labels=ade20k"),
        ("ade20k_train_ids", [[0, 1, 149]] * 3, None),
        ("cityscapes", LABEL_IDS, None),
        ("cityscapes", LABEL_TRAIN_IDS, "labels=cityscapes_train_ids"),
        ("cityscapes_train_ids", LABEL_TRAIN_IDS, None),
        ("camvid", [[0, 255]], "'1,object,220,20,60,255'"),
        ("camvid", [[0, 1, 255]], None),
    ],
)
def test_suspicions(name, masks, advice):
    label_set = load_label_set(name)
    found = suspicions(label_set, survey_of(label_set, *masks))
    assert len(found) == (advice is not None)
    assert advice is None or found[0].endswith(advice)
