"""Evaluation: every image once, over any number of processes, and reports that say what was done."""

import base64
import html.parser
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from pspnet_jax import evaluate, report
from pspnet_jax.arrays import IGNORE_LABEL
from pspnet_jax.catalog import LabelSet, load_label_set
from pspnet_jax.checkpoint import CheckpointFolder
from pspnet_jax.config import to_json
from pspnet_jax.data.layouts import DataError
from pspnet_jax.metrics import ImageScore, confusion_matrix
from pspnet_jax.parallel import make_mesh
from pspnet_jax.protocols import PROTOCOLS, choose, override
from pspnet_jax.report_html import page
from pspnet_jax.report_text import protocol_words
from pspnet_jax.segmenter import Prediction, Provenance, Segmenter
from pspnet_jax.stored_model import model_part
from pspnet_jax.train_step import split_model

import tiny_config
from compiling import compilations
from networks import description, network, segmenter
from pictures import ExampleSource, example, write_split
from training import finish, free_port

BUDGET_SECONDS = 60

CAMVID = load_label_set("camvid")
WHOLE = PROTOCOLS["whole"]
PROVENANCE = Provenance("runs/oracle", 12, "abc")


class Oracle(Segmenter):
    """Stands for a segmenter: says class 3 everywhere, or the truth where it knows it."""

    label_set = CAMVID
    description = description()

    def __init__(self, truths=(), *, read_ahead=1):
        self.truths = {image.tobytes(): labels for image, labels in truths}
        self.read_ahead = read_ahead
        self.options = {}

    def predict(self, images, **options):
        self.options = options
        images = iter(images)
        while waiting := [image for _, image in zip(range(self.read_ahead), images, strict=False)]:
            for image in waiting:
                threes = np.full(image.shape[:2], 3, np.uint8)
                yield Prediction(self.truths.get(image.tobytes(), threes))


def shares(sources, wrong):
    """Knows every image but for a share of its rows, which it calls class 3."""
    truths = []
    for made, share in zip(sources, wrong, strict=True):
        labels = made.labels.copy()
        labels[: round(share * len(labels))] = 3
        truths.append((made.image, labels))
    return Oracle(truths)


@pytest.mark.parametrize("read_ahead", [1, 2, 5, 20])
def test_every_image_counts_once_however_far_the_prediction_reads_ahead(read_ahead):
    source = ExampleSource(7, sizes=((40, 50), (40, 50), (30, 60)))
    oracle = Oracle(((e.image, e.labels) for e in (source[2], source[5])), read_ahead=read_ahead)
    result = evaluate.evaluate(oracle, source, protocol=WHOLE, batch_size=3, canvas_gib=0.5)
    assert oracle.options == {"protocol": WHOLE, "batch_size": 3, "canvas_gib": 0.5}
    expected = np.zeros((11, 11), np.int64)
    for i in range(7):
        labels = source[i].labels
        said = labels if i in (2, 5) else np.full_like(labels, 3)
        expected += confusion_matrix(labels, said, 11)
    np.testing.assert_array_equal(result.confusion, expected)
    assert [score.index for score in result.images] == list(range(7))
    assert [score.index for score in result.images if score.mean_iou == 1] == [2, 5]
    np.testing.assert_array_equal(result.predictions[5], source[5].labels)


@pytest.mark.parametrize("num_processes", [2, 3, 8])
def test_processes_find_together_what_one_finds_alone(monkeypatch, num_processes):
    """Threads stand for the processes; the eighth of seven images has nothing to do."""
    source = ExampleSource(7, sizes=((40, 50), (30, 60)))
    oracle = shares(source, np.linspace(0, 0.9, 7))
    alone = evaluate.evaluate(oracle, source, protocol=WHOLE, batch_size=2)
    place = threading.local()
    barrier, given = threading.Barrier(num_processes, timeout=30), [b""] * num_processes

    def gather(local):
        given[place.index] = local
        barrier.wait()
        found = list(given)
        barrier.wait()
        return found

    def evaluate_in_place(index):
        place.index = index
        return evaluate.evaluate(oracle, source, protocol=WHOLE, batch_size=2)

    monkeypatch.setattr(evaluate.parallel, "gather", gather)
    monkeypatch.setattr(evaluate.jax, "process_index", lambda: place.index)
    monkeypatch.setattr(evaluate.jax, "process_count", lambda: num_processes)
    with ThreadPoolExecutor(num_processes) as threads:
        results = list(threads.map(evaluate_in_place, range(num_processes)))
    for found in results:
        np.testing.assert_array_equal(found.confusion, alone.confusion)
        assert found.images == alone.images
        assert found.ranked == alone.ranked
        assert found.predictions.keys() == alone.predictions.keys()
        for index, class_map in alone.predictions.items():
            np.testing.assert_array_equal(found.predictions[index], class_map)


def test_an_image_that_is_missing_or_counted_twice_is_noticed(monkeypatch):
    source = ExampleSource(3)
    for seen in ([0, 1], [0, 1, 1], [0, 1, 2, 2]):
        rows = [ImageScore(i, 0.5, 0.5) for i in seen]
        monkeypatch.setattr(evaluate, "_gather_rows", lambda _, rows=rows: rows)
        with pytest.raises(AssertionError, match="images were evaluated, the split has 3"):
            evaluate.evaluate(Oracle(), source, protocol=WHOLE, batch_size=1)


def test_every_split_and_protocol_has_its_own_folder():
    def folder(split, protocol, **options):
        return evaluate.output_folder(
            Path("run"), step=7, split=split, protocol=protocol, label_set=CAMVID, **options
        ).name

    assert folder("val", WHOLE) == "00000007-val-whole"
    assert folder("v.1", WHOLE) == "00000007-v.1-whole"
    assert folder("/lists/a/val.txt", WHOLE) == "00000007-_lists_a_val-whole"
    assert folder("b/val.txt", WHOLE) == "00000007-b_val-whole"
    assert folder("val", choose("semseg", CAMVID)) == "00000007-val-semseg"
    assert folder("val", WHOLE, dtype="bfloat16") == "00000007-val-whole-bfloat16"


def test_truth_scores_one():
    source = ExampleSource(3)
    oracle = Oracle((source[i].image, source[i].labels) for i in range(3))
    result = evaluate.evaluate(oracle, source, protocol=WHOLE, batch_size=2)
    assert result.scores.mean_iou == 1


def test_report_and_pictures(tmp_path):
    source = ExampleSource(11)
    source.names = [f"photo_{i}" for i in range(11)]
    oracle = shares(source, np.linspace(0, 1, 11))
    result = evaluate.evaluate(oracle, source, protocol=WHOLE, batch_size=4)
    (tmp_path / "panels").mkdir()
    (tmp_path / "panels/worst_1_000000.png").write_bytes(b"of an earlier evaluation")
    report.write_report(tmp_path, result, PROVENANCE, source, split="val")
    contents = json.loads((tmp_path / "report.json").read_text())
    assert list(contents) == [
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
        "network",
        "software",
        "device",
        "seconds",
        "images",
        "confusion",
    ]
    assert contents["mean_iou"] == pytest.approx(result.scores.mean_iou)
    assert contents["csail_score"] == pytest.approx(
        (contents["mean_iou"] + contents["pixel_accuracy"]) / 2
    )
    assert contents["classes"][3]["name"] == "road"
    keys = {"id", "name", "iou", "accuracy", "precision", "dice", "pixels"}
    assert set(contents["classes"][3]) == keys
    assert contents["confusion"] == result.confusion.tolist()
    assert contents["images"][4] == {
        "index": 4,
        "name": "photo_4",
        "mean_iou": result.images[4].mean_iou,
        "pixel_accuracy": result.images[4].pixel_accuracy,
    }
    assert contents["protocol"] == json.loads(json.dumps(WHOLE.to_json()))
    assert contents["data"] == {"labels": "camvid", "split": "val", "num_images": 11}
    assert contents["checkpoint"] == {"path": "runs/oracle", "step": 12, "digest": "abc"}
    panels = {path.name for path in (tmp_path / "panels").iterdir()}
    ranked = {
        f"{r}_{i}_{x:06d}.png" for r, xs in result.ranked.items() for i, x in enumerate(xs, 1)
    }
    assert panels == ranked | {"overview.png"}
    assert len(ranked) == 9
    text = (tmp_path / "report.md").read_text()
    assert "(-) is left out in the means" in text
    assert f"Protocol: {protocol_words(WHOLE.to_json())}\n" in text
    assert "| 3 | road |" in text
    assert "[report.html](report.html)" in text
    assert f"| {100 * contents['csail_score']:.2f} |" in text


def test_pages_of_processes_that_are_not_the_first_are_not_written(tmp_path, monkeypatch):
    source = ExampleSource(2)
    result = evaluate.evaluate(Oracle(), source, protocol=WHOLE, batch_size=1)
    monkeypatch.setattr(report.jax, "process_index", lambda: 1)
    contents = report.write_report(tmp_path / "out", result, PROVENANCE, source, split="val")
    assert contents["data"]["num_images"] == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [
        (0, {"best": [], "median": [], "worst": []}),
        (1, {"best": [0], "median": [], "worst": []}),
        (2, {"best": [0], "median": [], "worst": [1]}),
        (3, {"best": [0], "median": [1], "worst": [2]}),
        (4, {"best": [0], "median": [2], "worst": [3]}),
        (7, {"best": [0, 1], "median": [3, 4], "worst": [6, 5]}),
        (21, {"best": [0, 1, 2], "median": [9, 10, 11], "worst": [20, 19, 18]}),
    ],
)
def test_best_median_and_worst_images_without_duplicates(num_images, expected):
    images = [ImageScore(i, 0.9 - i / 30, 1.0) for i in range(num_images)]
    images.append(ImageScore(num_images, float("nan"), float("nan")))
    assert report.ranks(images) == expected
    mixed = [images[i] for i in np.random.default_rng(0).permutation(num_images + 1)]
    assert report.ranks(mixed) == expected


def test_the_overview_is_bounded_and_its_titles_stay_legible(tmp_path):
    titles = []
    for size, low in (((60, 900), 1900), ((33, 33), 1000), ((150, 200), 1200)):
        source = ExampleSource(3, sizes=(size,))
        result = evaluate.evaluate(Oracle(), source, protocol=WHOLE, batch_size=1)
        report.write_report(tmp_path, result, PROVENANCE, source, split="val")
        overview = cv2.imread(str(tmp_path / "panels/overview.png"))
        assert low <= overview.shape[1] <= 2000
        titles.append(overview[:20, :60])
    assert (titles[0] < 128).any()
    assert all((title == titles[0]).all() for title in titles)


class Page(html.parser.HTMLParser):
    """What a page refers to and says; raises where a tag is not closed."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.links, self.words, self.open, self.alts = [], [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.sources += [attributes[key] for key in ("src", "srcset") if key in attributes]
        self.links += [attributes["href"]] if "href" in attributes else []
        assert tag not in ("script", "link", "iframe", "object")
        if tag == "img":
            self.alts.append(attributes["alt"])
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def many_classes(num_classes, *, name="class {}"):
    names = tuple(name.format(i) for i in range(num_classes))
    colors = tuple((i, 255 - i, 7) for i in range(num_classes))
    raw_ids = tuple((i,) for i in range(num_classes))
    return LabelSet("<mine>", names, colors, raw_ids, (), (None,) * num_classes)


@pytest.mark.parametrize("num_classes", [11, 150])
def test_the_page_needs_nothing_beside_it_and_stays_small(tmp_path, num_classes):
    source = ExampleSource(9, sizes=((700, 900),), num_classes=num_classes)
    source.names = ["<b>first</b>", *(f"photo & {i}" for i in range(1, 9))]
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3)).astype(np.uint8)
    source._examples = [made._replace(image=noise ^ np.uint8(i)) for i, made in enumerate(source)]
    oracle = shares(source, np.linspace(0, 0.9, 9))
    oracle.label_set = many_classes(num_classes, name="<i>{}</i> & more")
    result = evaluate.evaluate(oracle, source, protocol=WHOLE, batch_size=1)
    report.write_report(tmp_path, result, PROVENANCE, source, split="val")
    text = (tmp_path / "report.html").read_text()
    assert len(text) < 8e6  # nothing is larger than noise
    assert "<i>3" not in text
    assert "<b>first" not in text
    found = Page(text)
    assert found.sources
    assert all(source.startswith("data:image/") for source in found.sources)
    assert all(link.startswith("#") for link in found.links)
    assert "url(" not in text
    assert "@import" not in text
    words = "".join(found.words)
    assert "<b>first</b>" in words
    assert "<i>3</i> & more" in words
    assert "<mine>, val" in words
    assert protocol_words(WHOLE.to_json()) in words
    assert all(found.alts)
    for part in ("Best", "Median", "Worst"):
        assert part in found.words
    occurring = int(np.isfinite(result.scores.iou).sum())
    assert (f"Absent ({num_classes - occurring} of {num_classes})" in words) == (
        occurring < num_classes
    )
    assert ("Confusion matrix" in "".join(found.alts)) == (occurring > 30)


def test_pictures_of_the_page_are_at_most_480_wide(tmp_path):
    source = ExampleSource(1, sizes=((500, 960),))
    result = evaluate.evaluate(Oracle(), source, protocol=WHOLE, batch_size=1)
    report.write_report(tmp_path, result, PROVENANCE, source, split="val")
    text = (tmp_path / "report.html").read_text()
    encoded = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', text)
    assert [kind for kind, _ in encoded] == ["jpeg", "png", "png", "jpeg"]
    for _, data in encoded:
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape == (250, 480, 3)
    # Class maps keep their colors.
    truth = cv2.imdecode(np.frombuffer(base64.b64decode(encoded[1][1]), np.uint8), 1)[..., ::-1]
    colors = {tuple(color) for color in truth.reshape(-1, 3).tolist()}
    assert colors <= set(CAMVID.colors)


def test_the_page_lists_the_most_frequent_confusions_first():
    contents = report.report(
        evaluate.evaluate(Oracle(), ExampleSource(2), protocol=WHOLE, batch_size=1),
        PROVENANCE,
        split="val",
    )
    confusion = np.zeros((11, 11), int)
    confusion[1, 2], confusion[4, 0], confusion[0, 0] = 7, 30, 1000
    for i, row in enumerate(contents["classes"]):
        row["iou"] = 0.5 if i < 5 else None
    contents["confusion"] = confusion.tolist()
    words = Page(page(contents, colors=CAMVID.colors, shown=[])).words
    start = words.index("The most frequent ones")
    named = [word for word in words[start:] if word in CAMVID.names]
    assert named == ["pavement", "sky", "building", "pole"]
    assert "81.08" in words[start:]  # 30 of 37 errors
    row = words.index("Truth (rows) and prediction (columns), % of the row")
    assert [w for w in words[row:start] if w in CAMVID.names] == list(CAMVID.names[:5]) * 2


def test_protocols_are_printed_in_full_in_plain_words():
    semseg = override(choose("semseg", CAMVID), scales=(0.5, 0.75, 1.0), flip=False)
    words = protocol_words(json.loads(json.dumps(semseg.to_json())))
    assert words == semseg.describe()
    assert "scales 0.5, 0.75, 1;" in words


def test_names_do_not_break_the_tables_of_report_md():
    oracle = Oracle()
    oracle.label_set = many_classes(11, name="a|b <i>{}")
    result = evaluate.evaluate(oracle, ExampleSource(1), protocol=WHOLE, batch_size=1)
    text = report.markdown(report.report(result, PROVENANCE, split="val"))
    assert "| 3 | a\\|b &lt;i>3 |" in text
    assert text.startswith("# &lt;mine>, val, 1 images")


def test_class_without_pixels_is_null():
    class Empty(ExampleSource):
        def __getitem__(self, index):
            made = super().__getitem__(index)
            return made._replace(labels=np.full_like(made.labels, IGNORE_LABEL))

    result = evaluate.evaluate(Oracle(), Empty(2), protocol=WHOLE, batch_size=1)
    assert result.ranked == {"best": [], "median": [], "worst": []}
    contents = report.report(result, PROVENANCE, split="val")
    assert "All pixels are void." in page(contents, colors=CAMVID.colors, shown=[])
    assert contents["images"][1] == {"index": 1, "mean_iou": None, "pixel_accuracy": None}
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


def test_void_of_the_truth_is_black_in_the_prediction():
    made = example(60, 60)
    labels = made.labels.copy()
    labels[:, :30] = IGNORE_LABEL
    found = np.full((60, 60), 3, np.uint8)
    picture = report.example_panel(made._replace(labels=labels), found, CAMVID)
    labels[:, :30] = labels[:, 30:]
    without_void = report.example_panel(made._replace(labels=labels), found, CAMVID)
    assert len(picture) == len(without_void) + 22  # a note says so
    prediction = picture[22:262, 8 + 2 * 248 : 8 + 2 * 248 + 240]
    assert not prediction[:, :120].any()
    assert (prediction[:, 120:] == CAMVID.palette[3]).all()


def test_errors_stand_beside_the_prediction():
    made = example(60, 60)
    wrong = (made.labels + np.uint8(1)) % np.uint8(11)
    picture = report.example_panel(made, wrong, CAMVID, with_errors=True)
    found = picture[22:262, 8 + 3 * 248 : 8 + 3 * 248 + 240]
    assert found.shape == (240, 240, 3)
    assert (found == report.visualize.ERROR_COLOR).all()


_PROCESS = """
import sys
import jax
port, index, count, checkpoint, output = sys.argv[1:]
if int(count) > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
assert jax.process_count() == int(count)
assert jax.local_device_count() == 2
from pspnet_jax import evaluate, progress
progress.log_to(None)
evaluate.run(checkpoint, config=None, output=output)
"""


def stored_run(path: Path, data: Path) -> Path:
    """An untrained network over data in a folder."""
    folder = CheckpointFolder(path / "checkpoints")
    _, params, batch_stats = split_model(network(CAMVID.num_classes))
    folder.save(3, {"model": model_part(description(), params, batch_stats)}, mean_iou=None)
    folder.wait()
    (path / "config.json").write_text(default_tiny(data))
    return path


def test_evaluated_in_half_precision(tmp_path):
    """Reports say what was computed in, and two of them do not share a folder."""
    write_split(tmp_path / "data", "val", 2)
    run = str(stored_run(tmp_path / "run", tmp_path / "data"))
    found = {dtype: evaluate.run(run, config=None, dtype=dtype) for dtype in (None, "bfloat16")}
    names = {path.name for path in (tmp_path / "run/evaluation").iterdir()}
    assert names == {"00000003-val-whole", "00000003-val-whole-bfloat16"}
    expected = {"family": "semseg", "backbone": "resnet10", "width": 8}
    assert found[None]["network"] == expected | {"dtype": "float32"}
    assert found["bfloat16"]["network"] == expected | {"dtype": "bfloat16"}
    assert found["bfloat16"]["mean_iou"] == pytest.approx(found[None]["mean_iou"], abs=0.01)
    for name in names:
        words = found["bfloat16" if "bfloat16" in name else None]["network"]["dtype"]
        text = (tmp_path / "run/evaluation" / name / "report.md").read_text()
        assert (
            f"Network: semseg resnet10 of width 8, computed in {words}; step 3 of {run} (" in text
        )
        assert (
            f"width 8, computed in {words}<"
            in (tmp_path / "run/evaluation" / name / "report.html").read_text()
        )
    output = str(tmp_path / "run/evaluation/00000003-val-whole")
    with pytest.raises(FileExistsError, match="its network's dtype is float32, here it is bfl"):
        evaluate.run(run, config=None, dtype="bfloat16", output=output)
    with pytest.raises(ValueError, match="dtype='half' is not"):
        evaluate.run(run, config=None, dtype="half")


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    """Seven images of two sizes over two local processes with two devices each."""
    write_split(tmp_path / "data", "val", 7)
    write_split(tmp_path / "data", "val", 4, size=(30, 40))
    run = stored_run(tmp_path / "run", tmp_path / "data")
    alone = start_processes(1, run, tmp_path / "alone")
    both = start_processes(2, run, tmp_path / "both")
    assert "mean IoU" in both[0]
    assert "mean IoU" not in both[1]
    assert not (tmp_path / "both_1").exists()
    one, two = (
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("alone_0", "both_0")
    )
    assert two["confusion"] == one["confusion"]
    assert two["images"] == one["images"]
    assert two["data"]["num_images"] == 7
    panels = [
        sorted(p.name for p in (tmp_path / n / "panels").iterdir()) for n in ("alone_0", "both_0")
    ]
    assert panels[0] == panels[1]
    for name in panels[0]:
        one, two = (tmp_path / n / "panels" / name for n in ("alone_0", "both_0"))
        assert one.read_bytes() == two.read_bytes()
    assert "mean IoU" in alone[0]


def default_tiny(root):
    config = tiny_config.get_config()
    config.data.root = str(root)
    return to_json(config)


def start_processes(count, run, output):
    """What each of `count` processes prints."""
    port = free_port()
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, *map(str, (port, i, count, run, f"{output}_{i}"))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    ended = finish(processes)
    assert [code for code, _ in ended] == [0] * count, ended
    return [text for _, text in ended]


@pytest.mark.slow
def test_200_sizes_on_one_and_on_eight_devices():
    """The same counts, every image once, and nothing compiled after the first image."""
    sizes = np.random.default_rng(0).integers(20, 400, (200, 2)).tolist()
    source = ExampleSource(200, sizes=sizes)
    protocol = override(
        choose("semseg", CAMVID), crop_size=(65, 65), base_size=96, scales=(0.5, 1.0, 1.5)
    )
    found = []
    for devices in (jax.devices()[:1], jax.devices()):
        made = segmenter(sureness=40, mesh=make_mesh(devices))
        passes = {"protocol": protocol, "batch_size": 2 * len(devices)}
        evaluate.evaluate(made, ExampleSource(1), **passes)
        with compilations() as compiled:
            found.append(evaluate.evaluate(made, source, **passes))
        assert compiled == []
    one, eight = found
    assert len(np.flatnonzero(one.confusion.sum(axis=0))) > 1
    assert one.confusion.sum() == sum((source[i].labels != 255).sum() for i in range(200))
    np.testing.assert_array_equal(one.confusion, eight.confusion)
    assert [image.index for image in eight.images] == list(range(200))


@pytest.mark.parametrize(
    ("failures", "kinds"),
    [
        ([DataError("a"), None], [DataError, DataError]),
        ([None, DataError("a"), DataError("b")], [DataError] * 3),
        ([DataError("a"), OSError("b"), None], [RuntimeError, OSError, RuntimeError]),
        ([MemoryError(), None], [MemoryError, RuntimeError]),  # which says nothing of itself
    ],
    ids=repr,
)
def test_of_several_processes_all_or_none_can_go_on(failures, kinds, monkeypatch):
    """A training goes on after a DataError, and every process must."""

    def fail(error):
        def part(*_, **__):
            if error is not None:
                raise error
            return evaluate.Part(np.zeros((11, 11), np.int64))

        return part

    said = [repr(error).encode() if error else b"" for error in failures]
    monkeypatch.setattr(evaluate.parallel, "gather", lambda mine: said)
    for error, kind in zip(failures, kinds, strict=True):
        monkeypatch.setattr(evaluate, "evaluate_part", fail(error))
        with pytest.raises(kind) as caught:
            evaluate.evaluate(Oracle(), ExampleSource(2), protocol=WHOLE, batch_size=1)
        assert type(caught.value) is kind
