"""Images by name, folder and pattern: which, in which order, and what their results are called."""

import os
from pathlib import Path

import pytest

from pspnet_jax.image_files import find_images

BUDGET_SECONDS = 10


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Two cities with one equal file name, a hidden file, a list and results of an earlier run."""
    for name in (
        "val/ulm/b.png",
        "val/ulm/a.JPG",
        "val/aachen/b.png",
        "val/top.jpeg",
        "val/.hidden.png",
        "val/.cache/c.png",
        "val/list.txt",
        "val/out/palette/top.png",
        "val/out/legend.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*arguments, without=("val/out/palette", "val/out/legend.png")):
    return [file.name for file in find_images(arguments, without=list(map(Path, without)))]


def test_folders_are_searched_below_and_keep_subfolders(root):
    assert names("val") == ["aachen/b", "top", "ulm/a", "ulm/b"]
    assert names(str(root / "val")) == ["aachen/b", "top", "ulm/a", "ulm/b"]
    assert names("val", without=["elsewhere"])[1:3] == ["out/legend", "out/palette/top"]
    assert names("val/ulm", "val/aachen") == ["a", "b", "b"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("val/*/b.png", ["aachen/b", "ulm/b"]),
        ("val/u*/*", ["ulm/a", "ulm/b"]),
        ("val/**/*.[jp]*g", ["aachen/b", "top", "ulm/b"]),
        ("v?l/ulm/b.png", ["val/ulm/b"]),
        ("val/*.txt", ["list"]),
        ("**/ulm/*", ["val/ulm/a", "val/ulm/b"]),
    ],
)
def test_patterns_keep_the_folders_after_their_fixed_part(root, pattern, expected):
    assert names(pattern) == expected


def test_a_file_that_is_named_twice_counts_once(root):
    assert names("val/ulm/b.png", "val/ulm", "val/../val/ulm/b.png", "val/*/b.png") == [
        "b",
        "a",
        "aachen/b",
    ]


def test_names_that_look_like_patterns_are_taken_as_they_are(root):
    (root / "a[1]").mkdir()
    (root / "a[1]/x.png").write_bytes(b"")
    (root / "y[2].webp").write_bytes(b"")
    assert names("a[1]", "y[2].webp") == ["x", "y[2]"]


def test_links_to_folders_are_followed_but_not_round_in_a_circle(root):
    os.symlink(root / "val", root / "val/ulm/again")
    os.symlink(root / "val/aachen", root / "linked")
    assert names("val") == ["aachen/b", "top", "ulm/a", "ulm/b"]
    assert names("linked") == ["b"]
    (root / "other").mkdir()
    os.symlink(root / "val/aachen", root / "other/town")
    assert names("other") == ["town/b"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["val", "none.jpg"], FileNotFoundError, "none.jpg: there is no such image or folder"),
        (["val/*/../*.png"], ValueError, r"'\.\.' stands behind the first wildcard"),
        (["val/*.bmp"], FileNotFoundError, r"val/\*.bmp: no file matches this pattern"),
        (
            ["val/out/palette/empty"],
            ValueError,
            r"there are no images \(.jpg, .jpeg, .png, .bmp, .*\) in",
        ),
        ([], ValueError, "there are no images in the command: name image files"),
    ],
)
def test_what_names_nothing_is_an_error(root, arguments, error, message):
    (root / "val/out/palette/empty").mkdir()
    with pytest.raises(error, match=message):
        names(*arguments)
