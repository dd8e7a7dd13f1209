"""The layers of the package as a picture, from its imports: `experiments/pictures/layers.svg`.

    python experiments/layers_picture.py

Layers and their order are those of the table in ARCHITECTURE.md. A line is an import; only imports from one layer to another
are drawn. A test holds the picture to the code.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pspnet_jax"
TARGET = Path(__file__).parent / "pictures" / "layers.svg"
NAMES = {
    1: "foundations",
    2: "data, networks, losses",
    3: "steps and protocols",
    4: "networks in use",
    5: "what verbs do",
    6: "a run",
    7: "command line",
    8: "names to import",
}
PER_ROW, BOX, GAP, LINE = 9, (112, 22), (10, 8), 34  # boxes in a row; sizes in pixels
LEFT, WIDTH = 175, 175 + 9 * 122


def layers() -> dict[int, list[str]]:
    """Layer -> modules in the order of the table; the modules of `weights`, `data` and `models` are one box each."""
    found: dict[int, list[str]] = {}
    for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines():
        row = re.match(r"\| (\d) \| ((?:`[\w/]+` ?)+)\|", line)
        for module in re.findall(r"`([\w/]+)`", row[2]) if row else ():
            place = found.setdefault(int(row[1]), [])
            box = _box_of(module)
            if box not in place:
                place.append(box)
    return found


def imports() -> set[tuple[str, str]]:
    """(importing box, imported box)."""
    modules = {str(p.relative_to(PACKAGE).with_suffix("")): p for p in PACKAGE.rglob("*.py")}
    found = set()
    for module, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                other = name.removeprefix("pspnet_jax.").replace(".", "/")
                if other in modules and _box_of(other) != _box_of(module):
                    found.add((_box_of(module), _box_of(other)))
    return found


def _box_of(module: str) -> str:
    return module.split("/")[0] + "/" if "/" in module else module


def draw() -> str:
    """The picture as SVG, the same for the same code."""
    places: dict[str, tuple[int, int]] = {}
    bands, y = [], 10
    for layer, modules in sorted(layers().items(), reverse=True):
        top = y
        for start in range(0, len(modules), PER_ROW):
            for i, module in enumerate(modules[start : start + PER_ROW]):
                places[module] = (LEFT + i * (BOX[0] + GAP[0]), y)
            y += BOX[1] + GAP[1]
        bands.append((layer, top - 5, y - top + 2))
        y += LINE
    layer_of = {module: layer for layer, modules in layers().items() for module in modules}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y - LINE + 10}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for layer, top, height in bands:
        lines.append(
            f'<rect x="5" y="{top}" width="{WIDTH - 10}" height="{height}" fill="#eef2f7"/>'
        )
        lines.append(
            f'<text x="12" y="{top + height / 2 + 4:.0f}" fill="#333">{layer} {NAMES[layer]}</text>'
        )
    for a, b in sorted(imports()):
        if a in places and b in places and layer_of[a] != layer_of[b]:
            (x0, y0), (x1, y1) = places[a], places[b]
            middle = BOX[0] // 2
            lines.append(
                f'<line x1="{x0 + middle}" y1="{y0 + BOX[1]}" x2="{x1 + middle}" y2="{y1}" '
                'stroke="#3465a4" stroke-opacity="0.25"/>'
            )
    for module, (x, top) in places.items():
        lines.append(
            f'<rect x="{x}" y="{top}" width="{BOX[0]}" height="{BOX[1]}" rx="3" fill="white" stroke="#888"/>'
        )
        lines.append(
            f'<text x="{x + BOX[0] // 2}" y="{top + 15}" text-anchor="middle">{module}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    TARGET.write_text(draw())
    print(TARGET)
