"""Label sets: the built-in ones, one's own, and what is wrong with a bad one."""

import numpy as np
import pytest

from pspnet_jax.catalog import LabelSet, built_in_names, load_label_set

BUDGET_SECONDS = 10

HEADER = "id,name,red,green,blue,raw_ids\n"


@pytest.mark.parametrize(
    ("name", "num_classes", "first", "last"),
    [
        ("ade20k", 150, "wall", "flag"),
        ("camvid", 11, "sky", "bicyclist"),
        ("scenes", 12, "mist", "balloon"),
    ],
)
def test_built_in(name, num_classes, first, last):
    label_set = load_label_set(name)
    assert label_set.num_classes == num_classes
    assert (label_set.names[0], label_set.names[-1]) == (first, last)
    assert len(set(label_set.names)) == num_classes
    assert label_set.palette.shape == (256, 3)
    assert name in built_in_names()


def test_ade20k_shifts_by_one_and_0_is_void():
    mask = np.array([[0, 1], [150, 255]], np.uint8)
    np.testing.assert_array_equal(load_label_set("ade20k").from_raw(mask), [[255, 0], [149, 255]])


def test_camvid_11_is_void():
    mask = np.array([[0, 10, 11]], np.uint8)
    np.testing.assert_array_equal(load_label_set("camvid").from_raw(mask), [[0, 10, 255]])


def test_raw_value_that_is_not_listed_is_named():
    with pytest.raises(
        ValueError, match=r"values 12, 200 are out .*'camvid' .*list 0\.\.10, void is 11, 255"
    ):
        load_label_set("camvid").from_raw(np.array([[0, 12, 200]], np.uint8))


def test_groups_of_scenes():
    groups = load_label_set("scenes").groups
    assert groups[5] == groups[6] == "mismatched relationship"
    assert groups[0] is None


def test_own_csv(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(HEADER + "0,field,0,255,0,7 8\n1,house,255,0,0,1\n255,void,0,0,0,0\n")
    label_set = load_label_set(str(path))
    mask = np.array([[7, 8, 1, 0, 255]], np.uint8)
    np.testing.assert_array_equal(label_set.from_raw(mask), [[0, 0, 1, 255, 255]])
    np.testing.assert_array_equal(label_set.palette[:2], [[0, 255, 0], [255, 0, 0]])
    assert label_set.name == "mine"


def test_csv_of_a_spreadsheet_may_start_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(HEADER + "0,a,0,0,0,0\n1,b,0,0,0,1\n", encoding="utf-8-sig")
    assert load_label_set(str(path)).num_classes == 2


def test_a_class_may_list_255(tmp_path):
    path = tmp_path / "binary.csv"
    path.write_text(HEADER + "0,background,0,0,0,0\n1,object,255,255,255,255\n")
    mask = np.array([[0, 255]], np.uint8)
    np.testing.assert_array_equal(load_label_set(str(path)).from_raw(mask), [[0, 1]])


def test_json_round_trip():
    label_set = load_label_set("scenes")
    assert LabelSet.from_json(label_set.to_json()) == label_set


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,name\n0,a\n", "columns red, green, blue, raw_ids are missing"),
        (HEADER + "0,a,0,0,0,0\n2,b,0,0,0,1\n", "ids must count 0, 1, 2"),
        (HEADER + "0,a,0,0,0,1\n1,b,0,0,0,1\n", r"raw ids \[1\] are listed twice"),
        (HEADER + "0,a,0,0,300,0\n1,b,0,0,0,1\n", r"\[300\] are not within 0..255"),
        (HEADER + "0,a,x,0,0,0\n1,b,0,0,0,1\n", "must be whole numbers"),
        (HEADER + "0,a,0,0,0,0\n", "at least two"),
        (HEADER + "0,a,0,0,0,0\n1,b,0,0\n", "must be whole numbers"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_label_set(str(path))


def test_unknown_name_suggests_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'camvid'"):
        load_label_set("canvid")
    with pytest.raises(ValueError, match="there is no such file"):
        load_label_set(str(tmp_path / "none.csv"))
