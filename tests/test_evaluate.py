"""Evaluation: batches of equal size, every image once, reports that say what was done."""

import json
from pathlib import Path

import numpy as np
import pytest

from pspnet_jax import evaluate, report
from pspnet_jax.arrays import IGNORE_LABEL
from pspnet_jax.catalog import load_label_set
from pspnet_jax.metrics import confusion_matrix
from pspnet_jax.segmenter import Provenance, Segmenter
from pspnet_jax.windows import PROTOCOLS, choose

from pictures import ExampleSource, example

BUDGET_SECONDS = 20

CAMVID = load_label_set("camvid")
WHOLE = PROTOCOLS["whole"]
PROVENANCE = Provenance("runs/oracle", 12, "abc")


class Oracle(Segmenter):
    """Stands for a segmenter: says class 3 everywhere, or the truth where it knows it."""

    label_set = CAMVID

    def __init__(self, truths=()):
        self.truths = {image.tobytes(): labels for image, labels in truths}
        self.batch_sizes = []

    def class_maps(self, images, *, protocol, windows_per_pass):
        self.batch_sizes.append((len(images), windows_per_pass))
        return np.stack(
            [self.truths.get(i.tobytes(), np.full(i.shape[:2], 3, np.uint8)) for i in images]
        )


def test_consecutive_equal_sizes_share_a_batch_that_is_filled_up():
    examples = [example(*size, seed=i) for i, size in enumerate([(4, 5)] * 3 + [(6, 5)] + [(4, 5)])]
    batches = list(evaluate.equal_size_batches(examples, 2))
    assert [batch.images.shape for batch in batches] == [
        (2, 4, 5, 3),
        (2, 4, 5, 3),
        (2, 6, 5, 3),
        (2, 4, 5, 3),
    ]
    assert [batch.valid.tolist() for batch in batches] == [[True] * 2] + [[True, False]] * 3
    seen = [int(i) for batch in batches for i in batch.index[batch.valid]]
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5])
def test_every_image_counts_once_whatever_the_batch(batch_size):
    source = ExampleSource(7, sizes=((40, 50), (40, 50), (30, 60)))
    result = evaluate.evaluate(Oracle(), source, protocol=WHOLE, batch_size=batch_size)
    threes = [np.full(e.labels.shape, 3, np.uint8) for e in (source[i] for i in range(7))]
    expected = sum(confusion_matrix(source[i].labels, threes[i], 11) for i in range(7))
    np.testing.assert_array_equal(result.confusion, expected)
    assert result.num_images == 7


def test_windows_of_one_image_go_through_together_and_images_do_not():
    oracle = Oracle()
    for protocol in (WHOLE, PROTOCOLS["semseg"]):
        evaluate.evaluate(oracle, ExampleSource(5), protocol=protocol, batch_size=4)
    assert oracle.batch_sizes == [(4, 4)] * 2 + [(1, 4)] * 5


def test_every_split_and_protocol_has_its_own_folder():
    def folder(split, protocol):
        return evaluate.output_folder(
            Path("run"), step=7, split=split, protocol=protocol, label_set=CAMVID
        ).name

    assert folder("val", WHOLE) == "00000007-val-whole"
    assert folder("v.1", WHOLE) == "00000007-v.1-whole"
    assert folder("/lists/a/val.txt", WHOLE) == "00000007-_lists_a_val-whole"
    assert folder("b/val.txt", WHOLE) == "00000007-b_val-whole"
    assert folder("val", choose("semseg", CAMVID)) == "00000007-val-semseg"


def test_truth_scores_one():
    source = ExampleSource(3)
    oracle = Oracle((source[i].image, source[i].labels) for i in range(3))
    result = evaluate.evaluate(oracle, source, protocol=WHOLE, batch_size=2)
    assert result.scores.mean_iou == 1


def test_report_and_pictures(tmp_path):
    source = ExampleSource(11)
    result = evaluate.evaluate(Oracle(), source, protocol=WHOLE, batch_size=4)
    report.write_report(tmp_path, result, PROVENANCE, source, split="val")
    contents = json.loads((tmp_path / "report.json").read_text())
    assert set(contents) == {
        "mean_iou",
        "mean_accuracy",
        "pixel_accuracy",
        "frequency_weighted_iou",
        "mean_dice",
        "csail_score",
        "classes",
        "groups",
        "protocol",
        "data",
        "checkpoint",
        "software",
        "device",
        "seconds",
    }
    assert contents["mean_iou"] == pytest.approx(result.scores.mean_iou)
    assert contents["classes"][3]["name"] == "road"
    assert set(contents["classes"][3]) == {"id", "name", "iou", "accuracy", "pixels"}
    assert contents["protocol"] == {
        "name": "whole",
        "flip": True,
        "absent_class": "skip",
        "scales": [1.0],
        "base_size": None,
        "crop_size": None,
        "stride": None,
    }
    assert contents["data"] == {"labels": "camvid", "split": "val", "num_images": 11}
    assert contents["checkpoint"] == {"path": "runs/oracle", "step": 12, "digest": "abc"}
    panels = sorted(path.name for path in (tmp_path / "panels").iterdir())
    assert panels == [f"{i:06d}.png" for i in report.panel_indices(11)] + ["overview.png"]
    text = (tmp_path / "report.md").read_text()
    assert "(-) is left out in the means" in text
    assert "Protocol: name=whole, flip=True, absent_class=skip, scales=(1.0,)" in text
    assert "| 3 | road |" in text


def test_class_without_pixels_is_null():
    class Empty(ExampleSource):
        def __getitem__(self, index):
            made = super().__getitem__(index)
            return made._replace(labels=np.full_like(made.labels, IGNORE_LABEL))

    result = evaluate.evaluate(Oracle(), Empty(2), protocol=WHOLE, batch_size=1)
    contents = report.report(result, PROVENANCE, split="val")
    assert contents["mean_iou"] is None
    assert {row["iou"] for row in contents["classes"]} == {None}


def test_groups_are_reported_for_scenes():
    class Painter(Oracle):
        label_set = load_label_set("scenes")

    source = ExampleSource(2, num_classes=12)
    result = evaluate.evaluate(Painter(), source, protocol=WHOLE, batch_size=1)
    assert set(result.groups) == {
        "mismatched relationship",
        "confusion categories",
        "inconspicuous classes",
        "others",
    }
    assert "inconspicuous classes 0.0000" in report.summary(result)


def test_panels_are_spread_over_the_split():
    assert report.panel_indices(200) == [0, 25, 50, 75, 100, 125, 150, 175]
    assert report.panel_indices(2) == [0, 1]


def test_void_of_the_truth_is_black_in_the_prediction(tmp_path):
    made = example(60, 60)
    labels = made.labels.copy()
    labels[:, :30] = IGNORE_LABEL
    picture = report.example_panel(
        made._replace(labels=labels), np.full((60, 60), 3, np.uint8), CAMVID
    )
    prediction = picture[22:262, 8 + 2 * 248 : 8 + 2 * 248 + 240]
    assert not prediction[:, :120].any()
    assert (prediction[:, 120:] == CAMVID.palette[3]).all()
