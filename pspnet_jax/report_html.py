"""The report of an evaluation as one page that opens anywhere: report.html.

* One file: styles inside, pictures as data, no scripts, nothing from a network.
* Names come from outside (label sets, file names): all text goes through `escape`.
* Pictures are brought to `PICTURE_SIZE`, so that the page stays within a few megabytes. Up to
  `MAX_CELLS` classes the confusion matrix is a table, beyond it a picture; the confusions that matter are
  listed under either.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from pspnet_jax import visualize
from pspnet_jax.arrays import RawImage
from pspnet_jax.metrics import ImageScore
from pspnet_jax.report_text import METRICS, network_words, percent, protocol_words

PICTURE_SIZE = (480, 640)
"""Largest width and height of a picture, pixels."""
MAX_CELLS = 30
"""Classes up to which the confusion matrix is a table; those that do not occur are left out of it."""
NUM_CONFUSIONS = 15
NUM_BINS = 20

Color = tuple[int, int, int]


@dataclass(frozen=True)
class ShownImage:
    """One image of the data set, to be looked at."""

    rank: str
    """'best', 'median' or 'worst'."""
    name: str
    score: ImageScore
    photographs: dict[str, RawImage]
    """Title -> picture of many colors."""
    maps: dict[str, RawImage]
    """Title -> picture of few colors, whose borders stay sharp."""
    class_ids: list[int]
    """What occurs in it."""


def page(
    contents: Mapping[str, Any], *, colors: Sequence[Color], shown: Sequence[ShownImage]
) -> str:
    """The whole page.

    Args:
        contents: the report, as in report.json.
        colors: RGB of each class.
        shown: images, best first.
    """
    data = contents["data"]
    title = f"{escape(data['labels'])}, {escape(data['split'])}"
    sections = [
        _headline(contents),
        _classes(contents, colors),
        _confusions(contents, colors),
        _images(contents, colors, shown),
        _facts(contents),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}: mean IoU {percent(contents['mean_iou'])} %</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{title}</h1>\n<p>{data['num_images']:,} images</p>\n"
        '<nav><a href="#classes">Classes</a> <a href="#confusions">Confusions</a> '
        '<a href="#images">Images</a> <a href="#about">How it was measured</a></nav></header>\n'
        "<main>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def _headline(contents: Mapping[str, Any]) -> str:
    figures = "".join(
        f"<div><dt>{name[0].upper()}{name[1:]}</dt><dd>{percent(contents[key])}<small> %</small></dd></div>"
        for key, name in METRICS.items()
    )
    text = f'<section aria-label="Scores"><dl class="figures">{figures}</dl>\n'
    text += f"<p>Protocol: {escape(protocol_words(contents['protocol']))}</p>\n"
    if contents["groups"]:
        rows = "".join(
            f'<tr><th scope="row">{escape(name)}</th>{_bar(iou)}<td>{percent(iou)}</td></tr>'
            for name, iou in contents["groups"].items()
        )
        head = '<tr><th scope="col">Group of classes (absent ones left out)</th><th colspan="2" scope="colgroup">Mean IoU, %</th></tr>'
        text += f'<div class="wide"><table class="bars few"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    return text + "</section>"


def _classes(contents: Mapping[str, Any], colors: Sequence[Color]) -> str:
    """A table with bars, the class with the highest IoU first; absent classes are listed below it."""
    classes = contents["classes"]
    total = max(1, sum(row["pixels"] for row in classes))
    largest = max(1, *(row["pixels"] for row in classes))
    occurring = [row for row in classes if row["iou"] is not None]
    rows = []
    for row in sorted(occurring, key=lambda row: (-row["iou"], row["id"])):
        mark = "" if row["pixels"] else " <em>not in the truth</em>"
        rest = "".join(f"<td>{percent(row[key])}</td>" for key in ("accuracy", "precision", "dice"))
        rows.append(
            f'<tr><th scope="row">{_chip(colors[row["id"]])}{escape(row["name"])}{mark}</th>'
            f"{_bar(row['iou'])}<td>{percent(row['iou'])}</td>"
            f"{_bar(row['pixels'] / largest, kind='share')}<td>{percent(row['pixels'] / total)}</td>"
            f"{rest}<td>{row['pixels']:,}</td></tr>"
        )
    head = (
        '<tr><th scope="col">Class</th><th colspan="2" scope="colgroup">IoU, %</th>'
        '<th colspan="2" scope="colgroup">Share of pixels, %</th><th scope="col">Accuracy, %</th>'
        '<th scope="col">Precision, %</th><th scope="col">Dice, %</th><th scope="col">Pixels</th></tr>'
    )
    text = (
        '<section id="classes"><h2>Classes</h2>\n'
        f'<div class="wide"><table class="bars"><thead>{head}</thead>\n<tbody>'
        + "\n".join(rows)
        + "</tbody></table></div>"
    )
    absent = [row for row in classes if row["iou"] is None]
    if absent:
        counts = {"zero": "counts as 0", "skip": "is left out"}[
            contents["protocol"]["absent_class"]
        ]
        named = _legend([row["id"] for row in absent], [row["name"] for row in classes], colors)
        text += (
            f"<h3>Absent ({len(absent)} of {len(classes)})</h3><p>In neither truth nor prediction. "
            f"An absent class {counts} in the means.</p>{named}"
        )
    return text + "</section>"


def _confusions(contents: Mapping[str, Any], colors: Sequence[Color]) -> str:
    occurring = [row["id"] for row in contents["classes"] if row["iou"] is not None]
    names = [contents["classes"][i]["name"] for i in occurring]
    colors = [colors[i] for i in occurring]
    confusion = np.array(contents["confusion"], np.int64)[np.ix_(occurring, occurring)]
    true = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, true, out=np.zeros(confusion.shape), where=true > 0)
    if not names:
        return '<section id="confusions"><h2>Confusions</h2><p>All pixels are void.</p></section>'
    matrix = _matrix_table if len(names) <= MAX_CELLS else _matrix_picture
    return (
        '<section id="confusions"><h2>Confusions</h2>\n'
        "<p>Each row is a class of the truth: what share of its pixels is predicted as which class. Blue is "
        "correct, orange is not; colors show the square root, so that rare confusions are seen.</p>\n"
        f"{matrix(shares, names)}\n<h3>The most frequent ones</h3>\n"
        f"{_most_frequent(confusion, shares, names, colors)}</section>"
    )


def _matrix_table(shares: Float64[np.ndarray, "rows rows"], names: Sequence[str]) -> str:
    """Cells hold per cent; which classes they are of, they say when one points at them."""
    labels = [escape(name, quote=True) for name in names]
    head = "".join(f'<th scope="col"><span>{label}</span></th>' for label in labels)
    rows = []
    for i, row in enumerate(shares):
        cells = []
        for j, share in enumerate(row.tolist()):
            strength = round(share**0.5, 2)
            kind = ("d" if i == j else "e") + (" strong" if strength > 0.8 else "")
            text = f"{100 * share:.0f}" if share >= 0.005 else ""
            title = f"{labels[i]} predicted as {labels[j]}: {percent(share)} %"
            cells.append(f'<td class="{kind}" style="--v:{strength:g}" title="{title}">{text}</td>')
        rows.append(f'<tr><th scope="row">{labels[i]}</th>{"".join(cells)}</tr>')
    return (
        '<div class="wide"><table class="matrix"><caption>Truth (rows) and prediction (columns), % of the '
        f"row</caption><thead><tr><td></td>{head}</tr></thead>\n<tbody>"
        + "\n".join(rows)
        + "</tbody></table></div>"
    )


def _matrix_picture(shares: Float64[np.ndarray, "rows rows"], names: Sequence[str]) -> str:
    picture = visualize.heat_map(shares, cell=max(3, 750 // len(names)))
    encoded = _data_uri(".png", cv2.cvtColor(picture, cv2.COLOR_RGBA2BGRA))
    return (
        f'<figure class="heat"><img src="{encoded}" width="{picture.shape[1]}" height="{picture.shape[0]}" '
        f'alt="Confusion matrix of {len(names)} classes as colored squares; the table below lists its '
        'largest cells"><figcaption>From the top: truth, '
        f"{escape(names[0])} to {escape(names[-1])}. From the left: prediction, in the same order."
        "</figcaption></figure>"
    )


def _most_frequent(
    confusion: np.ndarray, shares: np.ndarray, names: Sequence[str], colors: Sequence[Color]
) -> str:
    wrong = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-wrong, axis=None, kind="stable")[:NUM_CONFUSIONS]
    total = max(1, wrong.sum())
    rows = []
    for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[i, j] == 0:
            break
        rows.append(
            f'<tr><th scope="row">{_chip(colors[i])}{escape(names[i])}</th>'
            f"<td class=text>{_chip(colors[j])}{escape(names[j])}</td>"
            f"{_bar(shares[i, j], kind='wrong')}<td>{percent(shares[i, j])}</td>"
            f"<td>{percent(wrong[i, j] / total)}</td><td>{wrong[i, j]:,}</td></tr>"
        )
    if not rows:
        return "<p>There is none: every pixel is correct.</p>"
    head = (
        '<tr><th scope="col">Truth</th><th scope="col" class=text>Prediction</th>'
        '<th colspan="2" scope="colgroup">Of the class, %</th><th scope="col">Of all errors, %</th>'
        '<th scope="col">Pixels</th></tr>'
    )
    table = f'<table class="bars few"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _images(
    contents: Mapping[str, Any], colors: Sequence[Color], shown: Sequence[ShownImage]
) -> str:
    names = [row["name"] for row in contents["classes"]]
    parts = [
        '<section id="images"><h2>Images</h2>\n<p>By the mean IoU of each image, over the classes that '
        "occur in it. Errors: wrong pixels are red, correct ones show the photograph in gray, void is "
        f"black.</p>\n{_histogram(contents['images'])}"
    ]
    for rank in dict.fromkeys(image.rank for image in shown):
        chosen = [image for image in shown if image.rank == rank]
        parts.append(f"<h3>{rank.capitalize()}</h3>")
        parts += [_figure(image, names, colors) for image in chosen]
    return "\n".join(parts) + "</section>"


def _figure(image: ShownImage, names: Sequence[str], colors: Sequence[Color]) -> str:
    name = escape(image.name, quote=True)
    pictures = {
        title: _encode_photograph(picture) for title, picture in image.photographs.items()
    } | {title: _encode_map(picture) for title, picture in image.maps.items()}
    order = [title for title in ("input", "truth", "prediction", "errors") if title in pictures]
    columns = "".join(
        f'<div><img src="{pictures[title]}" alt="{title} of {name}" loading="lazy"><span>{title}</span></div>'
        for title in order
    )
    return (
        f'<figure class="shown"><figcaption><b>{name}</b> mean IoU {percent(image.score.mean_iou)} %, '
        f"pixel accuracy {percent(image.score.pixel_accuracy)} %</figcaption>"
        f'<div class="pictures">{columns}</div>{_legend(image.class_ids, names, colors)}</figure>'
    )


def _histogram(images: Iterable[Mapping[str, Any]]) -> str:
    """How many images have which mean IoU, as SVG; nothing where none can be judged."""
    values = [image["mean_iou"] for image in images if image["mean_iou"] is not None]
    if not values:
        return ""
    counts, edges = np.histogram(values, bins=NUM_BINS, range=(0, 1))
    bars = []
    for i, count in enumerate(counts.tolist()):
        height = 70 * count / counts.max()
        title = f"{100 * edges[i]:.0f} to {100 * edges[i + 1]:.0f} %: {count} images"
        bars.append(
            f'<rect x="{20 * i + 1}" y="{80 - height:.1f}" width="18" height="{height:.1f}">'
            f"<title>{title}</title></rect>"
        )
    ticks = "".join(
        f'<text x="{4 * tick}" y="95" text-anchor="{anchor}">{tick} %</text>'
        for tick, anchor in ((0, "start"), (50, "middle"), (100, "end"))
    )
    return (
        '<figure class="histogram"><svg viewBox="0 0 400 100" role="img" aria-label="Histogram: the median '
        f'image has a mean IoU of {percent(float(np.median(values)))} %">{"".join(bars)}'
        f'<line x1="0" y1="80.5" x2="400" y2="80.5"/>{ticks}</svg><figcaption>Images by mean IoU; median '
        f"{percent(float(np.median(values)))} %</figcaption></figure>\n"
    )


def _facts(contents: Mapping[str, Any]) -> str:
    data, checkpoint = contents["data"], contents["checkpoint"]
    software = ", ".join(f"{name} {version}" for name, version in contents["software"].items())
    rows = {
        "Protocol": protocol_words(contents["protocol"]),
        "Data": f"label set {data['labels']}, split {data['split']}, {data['num_images']:,} images"
        + "".join(
            f", {name} {data[name]}" for name in ("source", "layout", "root") if name in data
        ),
        "Network": network_words(contents["network"]),
        "Checkpoint": f"{checkpoint['path']}, step {checkpoint['step']:,}",
        "Digest": checkpoint["digest"],
        "Software": software,
        "Device": contents["device"],
        "Time": f"{contents['seconds']:.1f} s",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{escape(str(text))}</dd>" for name, text in rows.items())
    return (
        f'<section id="about"><h2>How it was measured</h2>\n<dl class="facts">{listed}</dl>\n'
        "<p>CSAIL score: the mean of mean IoU and pixel accuracy. Accuracy of a class: the share of its "
        "true pixels that is found; precision: the share of what is predicted as the class that is "
        "correct.</p></section>"
    )


def _bar(value: float | None, *, kind: str = "iou") -> str:
    width = 0.0 if value is None else 100 * value
    return f'<td class="bar {kind}" aria-hidden="true"><i style="width:{width:.1f}%"></i></td>'


def _legend(class_ids: Iterable[int], names: Sequence[str], colors: Sequence[Color]) -> str:
    named = " ".join(f"<span>{_chip(colors[i])}{escape(names[i])}</span>" for i in class_ids)
    return f'<p class="legend">{named}</p>'


def _chip(color: Color) -> str:
    return '<i class="chip" style="background:#{:02x}{:02x}{:02x}"></i>'.format(*color)


def _encode_photograph(picture: RawImage) -> str:
    small = visualize.shrunk(picture, *PICTURE_SIZE)
    options = (cv2.IMWRITE_JPEG_QUALITY, 82)
    return _data_uri(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), options)


def _encode_map(picture: RawImage) -> str:
    height, width = visualize.shrunk(picture, *PICTURE_SIZE).shape[:2]
    small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_NEAREST)
    return _data_uri(
        ".png", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_PNG_COMPRESSION, 9)
    )


def _data_uri(
    suffix: str, picture: UInt8[np.ndarray, "height width channels"], options: Sequence[int] = ()
) -> str:
    done, encoded = cv2.imencode(suffix, picture, list(options))
    assert done, suffix
    kind = {".png": "png", ".jpg": "jpeg"}[suffix]
    return f"data:image/{kind};base64,{base64.b64encode(encoded.tobytes()).decode()}"


_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --dim: #5b6570; --page: #fff; --line: #dfe3e8;
  --fill: #eef1f4; --blue: 37 99 205; --orange: 217 85 10; --gray: #8a94a0; --link: #1d56b8 }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ed; --dim: #9ba5b1; --page: #14171b;
  --line: #2d333b; --fill: #22272e; --blue: 52 115 235; --orange: 214 92 24; --link: #7fb0ff } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; background: var(--page);
  color: var(--text); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "DejaVu Sans", sans-serif }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; overflow-wrap: anywhere }
h2 { margin: 3rem 0 .5rem; font-size: 1.3rem; border-top: 1px solid var(--line); padding-top: 1rem }
h3 { margin: 2rem 0 .5rem; font-size: 1.05rem }
p { margin: .5rem 0 1rem; max-width: 46rem; color: var(--dim) }
header p { margin: .25rem 0 .75rem }
a { color: var(--link); margin-right: 1rem }
dl { margin: 1.5rem 0 1rem }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem }
.figures div { background: var(--fill); border-radius: .5rem; padding: .75rem 1rem;
  display: flex; flex-direction: column; justify-content: space-between }
.figures dt { font-size: .85rem; color: var(--dim) }
.figures dd { margin: 0; font-size: 1.6rem; font-weight: 600; font-variant-numeric: tabular-nums }
.figures small { font-size: .9rem; font-weight: 400; color: var(--dim) }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th { font-weight: 500; text-align: left }
td { text-align: right }
.bars { width: 100%; min-width: 20rem }
.bars.few { max-width: 46rem }
.bars th, .bars td { padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap }
.bars thead th { color: var(--dim); vertical-align: bottom; white-space: normal }
.bars thead th:nth-child(n+4) { text-align: right }
.bars thead th[colspan] { text-align: left }
.text { text-align: left }
td.bar { min-width: 6rem; width: 30% }
td.bar.share, td.bar.wrong { min-width: 4rem; width: 12% }
td.bar i { display: block; height: .7rem; border-radius: 2px; background: rgb(var(--blue)) }
td.bar.share i { background: var(--gray) }
td.bar.wrong i { background: rgb(var(--orange)) }
em { font-size: .8rem; color: var(--dim); border: 1px solid var(--line); border-radius: .5rem;
  padding: 0 .4rem; margin-left: .3rem; font-style: normal }
.chip { display: inline-block; width: .8rem; height: .8rem; margin-right: .45rem; border-radius: 2px;
  border: 1px solid var(--gray); vertical-align: -.05rem }
.matrix { font-size: .75rem }
.matrix caption { text-align: left; color: var(--dim); padding-bottom: .5rem }
.matrix td { width: 2.3rem; min-width: 2.1rem; height: 2.1rem; text-align: center;
  border: 1px solid var(--page) }
.matrix tbody th { position: sticky; left: 0; background: var(--page); text-align: right;
  padding-right: .5rem; white-space: nowrap }
.matrix thead th { vertical-align: bottom; text-align: center }
.matrix thead span { writing-mode: vertical-rl; transform: rotate(180deg); white-space: nowrap;
  padding-top: .35rem }
.d { background: rgb(var(--blue) / var(--v)) }
.e { background: rgb(var(--orange) / var(--v)) }
.strong { color: #fff }
figure { margin: 1rem 0 1.5rem }
figcaption { font-size: .9rem; color: var(--dim); overflow-wrap: anywhere }
figcaption b { color: var(--text); font-weight: 600; margin-right: .5rem }
.heat img { width: 100%; max-width: 47rem; height: auto; border: 1px solid var(--line);
  image-rendering: pixelated }
.histogram svg { width: 100%; max-width: 30rem; overflow: visible }
.histogram rect { fill: rgb(var(--blue)) }
.histogram line { stroke: var(--line) }
.histogram text { fill: var(--dim); font-size: 11px }
.pictures { display: grid; grid-template-columns: repeat(4, 1fr); gap: .5rem; margin-top: .4rem }
.pictures img { display: block; width: 100%; height: auto; border-radius: 3px }
.pictures span { font-size: .8rem; color: var(--dim) }
.legend { margin: .3rem 0; max-width: none; font-size: .85rem; display: flex; flex-wrap: wrap;
  gap: .1rem 1rem }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.5rem; font-size: .9rem }
.facts dt { color: var(--dim) }
.facts dd { margin: 0; overflow-wrap: anywhere }
@media (max-width: 40rem) {
  body { padding: 1.25rem .9rem 3rem }
  .pictures { grid-template-columns: 1fr 1fr }
  .figures { grid-template-columns: 1fr 1fr }
  .figures dd { font-size: 1.3rem }
  .facts { grid-template-columns: 1fr; gap: 0 }
  .facts dd { margin-bottom: .6rem }
}
@media print { body { max-width: none } .wide { overflow: visible } figure { break-inside: avoid } }
"""
