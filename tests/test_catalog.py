"""Label sets: the built-in ones, one's own, and what is wrong with a bad one."""

import json

import numpy as np
import pytest

from pspnet_jax.catalog import LabelSet, built_in_names, load_label_set

BUDGET_SECONDS = 10

HEADER = "id,name,red,green,blue,raw_ids\n"


@pytest.mark.parametrize(
    ("name", "num_classes", "first", "last"),
    [
        ("ade20k", 150, "wall", "flag"),
        ("ade20k_train_ids", 150, "wall", "flag"),
        ("camvid", 11, "sky", "bicyclist"),
        ("cityscapes", 19, "road", "bicycle"),
        ("cityscapes_train_ids", 19, "road", "bicycle"),
        ("scenes", 12, "mist", "balloon"),
        ("voc2012", 21, "background", "tvmonitor"),
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


def test_ade20k_as_the_authors_convert_it_is_a_label_set_of_its_own():
    ready, raw = load_label_set("ade20k_train_ids"), load_label_set("ade20k")
    assert (ready.names, ready.colors) == (raw.names, raw.colors)
    mask = np.array([[*range(150), 255]], np.uint8)
    np.testing.assert_array_equal(ready.from_raw(mask), mask)
    with pytest.raises(ValueError, match=r"mask values 150 are out of range"):
        ready.from_raw(np.array([[150]], np.uint8))


def test_camvid_11_is_void():
    mask = np.array([[0, 10, 11]], np.uint8)
    np.testing.assert_array_equal(load_label_set("camvid").from_raw(mask), [[0, 10, 255]])


def test_voc2012_has_the_colors_of_its_devkit():
    """Bit j of red, green and blue, from the top, is bit 3j, 3j + 1 and 3j + 2 of the class."""
    label_set = load_label_set("voc2012")
    assert label_set.colors == tuple(
        tuple(sum((c >> 3 * j + channel & 1) << 7 - j for j in range(3)) for channel in range(3))
        for c in range(21)
    )
    assert label_set.void_colors == ((224, 224, 192),)
    raw = np.array([[0, 20, 255]], np.uint8)
    np.testing.assert_array_equal(label_set.from_raw(raw), raw)


def test_cityscapes_label_ids():
    label_set = load_label_set("cityscapes")
    ids = dict(zip(label_set.names, label_set.raw_ids, strict=True))
    assert (ids["road"], ids["wall"], ids["pole"], ids["sky"]) == ((7,), (12,), (17,), (23,))
    assert (ids["person"], ids["bus"], ids["train"], ids["bicycle"]) == ((24,), (28,), (31,), (33,))
    # Each of the 34 ids once, in the order of the classes; -1 is stored as 255.
    evaluated = [raw for raw in range(34) if raw not in label_set.void_raw_ids]
    assert [(raw,) for raw in evaluated] == list(label_set.raw_ids)
    raw = np.array([[*range(34), 255]], np.uint8)
    assert (label_set.from_raw(raw) == 255).sum() == 34 - 19 + 1


def test_cityscapes_in_train_ids_is_a_label_set_of_its_own():
    ready, raw = load_label_set("cityscapes_train_ids"), load_label_set("cityscapes")
    assert (ready.names, ready.colors) == (raw.names, raw.colors)
    mask = np.array([[*range(19), 255]], np.uint8)
    np.testing.assert_array_equal(ready.from_raw(mask), mask)
    with pytest.raises(ValueError, match=r"values 19, 26 are out .*'cityscapes_train_ids'"):
        ready.from_raw(np.array([[7, 19, 26]], np.uint8))


@pytest.mark.parametrize(
    ("name", "crop_size", "base_size"),
    [
        ("ade20k", 473, 512),
        ("camvid", 353, 512),
        ("cityscapes", 713, 2048),
        ("cityscapes_train_ids", 713, 2048),
        ("voc2012", 473, 512),
    ],
)
def test_default_sizes(name, crop_size, base_size):
    label_set = load_label_set(name)
    assert (label_set.crop_size, label_set.base_size) == ((crop_size, crop_size), base_size)


def test_colors_say_the_class_exactly():
    label_set = load_label_set("voc2012")
    mask = np.array([[(0, 64, 128), (224, 224, 192)], [(0, 0, 0), (128, 0, 0)]], np.uint8)
    np.testing.assert_array_equal(label_set.from_colors(mask), [[20, 255], [0, 1]])
    mask[0, 0], mask[1, 1] = (0, 64, 129), (255, 255, 255)
    with pytest.raises(
        ValueError, match=r"\(0, 64, 129\), \(255, 255, 255\) .* 2 in all\) .*'voc2012'"
    ):
        label_set.from_colors(mask)


def test_colors_of_several_rows_say_nothing(tmp_path):
    path, mask = tmp_path / "mine.csv", np.full((1, 1, 3), 9, np.uint8)
    path.write_text(HEADER + "0,a,9,9,9,0\n1,b,7,7,7,1\n255,void,9,9,9,5\n")
    with pytest.raises(ValueError, match=r"'mine' has \[\(9, 9, 9\)\] for several rows"):
        load_label_set(str(path)).from_colors(mask)
    path.write_text(HEADER + "0,a,9,9,9,0\n1,b,7,7,7,1\n255,void,,,,5\n")  # void needs no color
    np.testing.assert_array_equal(load_label_set(str(path)).from_colors(mask), [[0]])


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            HEADER + "0,a,0,0,0,0\n1,b,9,9,9,1,255\n",
            r"mine\.csv, line 3: '255' stands behind the last",
        ),
        (HEADER + "0,a,0,0,0,0\n1,b,9,9,9,'0,1'\n", r"line 3: \"1'\" stands behind"),
        (HEADER + "0,a,0,0,0,0\n1,b,9,9,9,x\n", r"line 3: invalid literal .* whole numbers"),
        (
            HEADER.strip() + ",group\n0,a,0,0,0,0,x\n1,b,9,9,9,1,255\n",
            "line 3: the group is 255, a number",
        ),
    ],
)
def test_raw_ids_that_are_separated_by_commas_are_not_dropped(text, message, tmp_path):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_label_set(str(tmp_path / "mine.csv"))


def test_empty_cells_behind_the_last_column_are_nothing(tmp_path):
    """As spreadsheets write them."""
    (tmp_path / "mine.csv").write_text(HEADER + "0,a,0,0,0,0,\n1,b,9,9,9,1,, \n")
    assert load_label_set(str(tmp_path / "mine.csv")).raw_ids == ((0,), (1,))


def test_changes_between_label_sets_are_told(tmp_path):
    def own(text):
        (tmp_path / "mine.csv").write_text(HEADER + text)
        return load_label_set(str(tmp_path / "mine.csv"))

    before = own("0,a,0,0,0,0\n1,house,9,9,9,1\n")
    after = own("0,a,0,0,1,0 4\n1,building,9,9,9,1\n2,c,8,8,8,2\n255,void,,,,7\n")
    assert before.changes_to(before) == []
    assert before.changes_to(after) == [
        "name of 1: house -> building",
        "name of 2: none -> c",
        "raw ids of 0: (0,) -> (0, 4)",
        "raw ids of 2: none -> (2,)",
        "color of 0: (0, 0, 0) -> (0, 0, 1)",
        "color of 2: none -> (8, 8, 8)",
        "group of 2: none -> None",
        "raw ids of void: () -> (7,)",
    ]


def test_csv_of_a_spreadsheet_may_start_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(HEADER + "0,a,0,0,0,0\n1,b,0,0,0,1\n", encoding="utf-8-sig")
    assert load_label_set(str(path)).num_classes == 2


def test_a_class_may_list_255(tmp_path):
    path = tmp_path / "binary.csv"
    path.write_text(HEADER + "0,background,0,0,0,0\n1,object,220,20,60,255\n")
    mask = np.array([[0, 255]], np.uint8)
    np.testing.assert_array_equal(load_label_set(str(path)).from_raw(mask), [[0, 1]])


def test_values_beside_255_suggest_how_a_class_lists_it(tmp_path):
    camvid = load_label_set("camvid")
    with pytest.raises(ValueError, match=r"'1,object,220,20,60,255'"):
        camvid.from_raw(np.array([[0, 128, 255]], np.uint8))
    for values in ([0, 128], [3, 50, 255]):
        with pytest.raises(ValueError, match=r"is data\.labels the right one\?$"):
            camvid.from_raw(np.array([values], np.uint8))
    (tmp_path / "binary.csv").write_text(HEADER + "0,background,0,0,0,0\n1,object,9,9,9,255\n")
    binary = load_label_set(str(tmp_path / "binary.csv"))
    with pytest.raises(
        ValueError, match=r"values 128 are .* list 0, 255, void is nothing\); is .* one\?$"
    ):
        binary.from_raw(np.array([[0, 128, 255]], np.uint8))


def test_meaning_of_raw_values():
    camvid = load_label_set("camvid")
    assert [camvid.meaning(raw) for raw in (0, 10, 11, 255, 12)] == [
        "sky",
        "bicyclist",
        "void",
        "void",
        None,
    ]


@pytest.mark.parametrize("name", ["cityscapes", "scenes", "voc2012"])
def test_json_round_trip(name):
    label_set = load_label_set(name)
    read = LabelSet.from_json(json.loads(json.dumps(label_set.to_json())))
    assert read == label_set
    assert read.void_colors == label_set.void_colors


def test_json_of_an_older_checkpoint_is_the_same_label_set():
    """Otherwise a run that began before there were base sizes could not be resumed."""
    label_set = load_label_set("camvid")
    older = label_set.to_json()
    del older["base_size"], older["void_colors"]
    assert LabelSet.from_json(older) == label_set


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
