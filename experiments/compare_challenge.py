"""Our metrics beside the evaluation code of the scene-parsing challenge, on PNG files.

    git clone https://github.com/CSAILVision/sceneparsing
    python experiments/compare_challenge.py --sceneparsing=sceneparsing [--annotations=DIR --predictions=DIR]

Their `intersectionAndUnion` and `pixelAccuracy` (evaluationCode/utils_eval.py) and the sums of
demoEvaluation.m run beside `metrics` on masks of ids 1 .. 150, where 0 is void. Without folders the masks are
those of their sampleData; its predictions are equal to its annotations, so the predictions are also changed by fixed
rules. Prints the largest difference over the IoU of every class, mean IoU, pixel accuracy and score.

* Their histogram has 150 bins over 1 .. 150: they are 149/150 wide, and each still holds one id. What is 0
  falls outside: void of the truth counts nowhere.
* A class that does not occur counts as 0: `absent_class="zero"`.
* A prediction of 0 has no counterpart here, where every pixel has a class: the rules make none.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from pspnet_jax.arrays import IGNORE_LABEL, LabelMap
from pspnet_jax.catalog import load_label_set
from pspnet_jax.data.folders import read_mask
from pspnet_jax.metrics import confusion_matrix, scores

NUM_CLASSES = 150
Rule = Callable[[LabelMap], LabelMap]


def as_they_are(prediction: LabelMap) -> LabelMap:
    """Without change."""
    return prediction


def next_class_in_squares(prediction: LabelMap) -> LabelMap:
    """The next id, 1 after 150, in every fifth square of 16 pixels."""
    rows, columns = np.indices(prediction.shape) // 16
    return np.where((rows + 3 * columns) % 5 == 0, prediction % NUM_CLASSES + 1, prediction)


def random_quarter(prediction: LabelMap) -> LabelMap:
    """Any id in a quarter of the pixels."""
    rng = np.random.default_rng(0)
    noise = rng.integers(1, NUM_CLASSES + 1, prediction.shape)
    return np.where(rng.random(prediction.shape) < 0.25, noise, prediction)


def first_and_last_class(prediction: LabelMap) -> LabelMap:
    """The two ends of their histogram: 1 in the left half, 150 in the right."""
    changed = np.full_like(prediction, NUM_CLASSES)
    changed[:, : prediction.shape[1] // 2] = 1
    return changed


RULES: tuple[Rule, ...] = (
    as_they_are,
    next_class_in_squares,
    random_quarter,
    first_and_last_class,
)


def main() -> None:
    """Print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sceneparsing", required=True, help="checkout of their repository")
    parser.add_argument("--annotations", help="folder of PNG masks (default: their sampleData)")
    parser.add_argument("--predictions", help="folder of PNG masks of the same names")
    parser.add_argument("--output", default="runs/compare_challenge")
    arguments = parser.parse_args()
    checkout, output = Path(arguments.sceneparsing), Path(arguments.output)
    annotations = Path(arguments.annotations or checkout / "sampleData/annotations")
    predictions = Path(arguments.predictions or checkout / "sampleData/predictions")
    names = sorted(path.name for path in predictions.glob("*.png"))
    if not names:
        raise SystemExit(f"{predictions} holds no PNG files; say --predictions=DIR")
    pairs = [(read_mask(annotations / name), read_mask(predictions / name)) for name in names]
    rows = [compare(load_theirs(checkout), pairs, rule) for rule in RULES]
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    largest = max(row["largest_difference"] for row in rows)
    print(f"largest difference over {len(names)} images and {len(RULES)} rules: {largest:.2g}")


def compare(
    theirs: ModuleType, pairs: Sequence[tuple[LabelMap, LabelMap]], rule: Rule
) -> dict[str, object]:
    """Both on predictions changed by a rule."""
    changed = []
    for annotation, prediction in pairs:
        # Void of an annotation counts nowhere, but a rule may look at the pixels beside it.
        filled = np.where(prediction == 0, 1, prediction)
        changed.append((annotation, rule(filled).astype(np.uint8)))
    them, us = their_figures(theirs, changed), our_figures(changed)
    differences = {key: float(np.abs(us[key] - them[key]).max()) for key in them}
    row: dict[str, object] = {
        "rule": rule.__name__,
        "images": len(pairs),
        "theirs": {key: float(value) for key, value in them.items() if value.ndim == 0},
        "differences": differences,
        "largest_difference": max(differences.values()),
    }
    print(row, flush=True)
    return row


def their_figures(
    theirs: ModuleType, pairs: Sequence[tuple[LabelMap, LabelMap]]
) -> dict[str, np.ndarray]:
    """As demoEvaluation.m adds up what their functions give for each image."""
    areas, pixels = [], []
    for annotation, prediction in pairs:
        areas.append(theirs.intersectionAndUnion(prediction, annotation, NUM_CLASSES))
        pixels.append(theirs.pixelAccuracy(prediction, annotation))
    intersection, union = np.sum(areas, axis=0)
    _, correct, labeled = np.sum(pixels, axis=0)
    iou = intersection / (np.spacing(1) + union)
    accuracy = correct / (np.spacing(1) + labeled)
    each = np.array([accuracy_of_image for accuracy_of_image, _, _ in pixels])
    return _named(iou, iou.mean(), accuracy, (iou.mean() + accuracy) / 2, each)


def our_figures(pairs: Sequence[tuple[LabelMap, LabelMap]]) -> dict[str, np.ndarray]:
    """By way of the label set, as in an evaluation."""
    label_set = load_label_set("ade20k")
    total = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    each = []
    for annotation, prediction in pairs:
        truth, said = label_set.from_raw(annotation), label_set.from_raw(prediction)
        assert (said != IGNORE_LABEL).all()
        confusion = confusion_matrix(truth, said, NUM_CLASSES)
        total += confusion
        each.append(scores(confusion, absent_class="zero").pixel_accuracy)
    found = scores(total, absent_class="zero")
    iou = np.nan_to_num(found.iou)
    return _named(iou, found.mean_iou, found.pixel_accuracy, found.csail_score, np.array(each))


def _named(iou, mean_iou, pixel_accuracy, score, each) -> dict[str, np.ndarray]:
    return {
        "iou": iou,
        "mean_iou": np.asarray(mean_iou),
        "pixel_accuracy": np.asarray(pixel_accuracy),
        "score": np.asarray(score),
        "pixel_accuracy_of_images": each,
    }


def load_theirs(checkout: Path) -> ModuleType:
    """Their functions."""
    path = checkout / "evaluationCode" / "utils_eval.py"
    spec = importlib.util.spec_from_file_location("utils_eval", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"{path}: there is no such file; say --sceneparsing=CHECKOUT")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
