"""Imports run one way, through one ordered list of modules; the package is cheap and safe to import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

BUDGET_SECONDS = 20

PACKAGE = Path(__file__).parent.parent / "pspnet_jax"

# Imports go only to a module further up, or within one folder. Folders end with "/".
LAYERS = [
    [
        "version",
        "arrays",
        "resample",
        "taps",
        "catalog",
        "config",
        "trees",
        "packing",
        "whole_files",
        "checkpoint",
        "progress",
        "metric_writer",
        "programs",
        "termination",
        "watchdog",
        "processes",
        "folder_lock",
        "skipped_steps",
        "weights/",
    ],
    ["data/", "models/", "losses", "optimizer", "metrics", "parallel", "visualize"],
    ["train_step", "protocols", "windows", "canvas", "stream"],
    ["passes", "stored_model", "segmenter"],
    [
        "report_text",
        "report_html",
        "report",
        "evaluate",
        "image_files",
        "submission",
        "predict",
        "advice",
        "check_report",
        "check",
        "prepare",
        "pretrained",
        "convert",
        "export",
    ],
    ["run", "compose", "train"],
    ["command_words", "verbs", "main"],
    ["__init__"],
]
# Within a folder, in the order of the flow.
FOLDERS = {
    "weights/": [
        "names",
        "tables",
        "fit",
        "pickles",
        "pytorch",
        "messages",
        "caffe",
        "safetensors",
    ],
    "data/": [
        "layouts",
        "headers",
        "folders",
        "builders",
        "scenes",
        "views",
        "transforms",
        "workers",
        "unreadable",
        "pipeline",
        "survey",
    ],
    "models/": [
        "marks",
        "convolution",
        "layers",
        "resnet",
        "densenet",
        "squeezenet",
        "backbones",
        "pyramid",
        "families",
        "pspnet",
    ],
}
FOUNDATIONS = {"arrays", "resample", "catalog"}  # where the modules of layer 2 meet
PURE = [
    "arrays",
    "resample",
    "losses",
    "optimizer",
    "metrics",
    "train_step",
    "taps",
    "protocols",
    "windows",
    "canvas",
    "stream",
    "visualize",
]
PURE += [f"models/{module}" for module in FOLDERS["models/"]]
PURE += ["data/headers", "data/views", "data/transforms"]
IMPURE_IMPORTS = {"os", "time", "pathlib", "shutil", "random", "logging", "sys", "io", "tempfile"}


def modules():
    return {str(p.relative_to(PACKAGE).with_suffix("")): p for p in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(path: Path):
    """Absolute names that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_within(path: Path):
    """Modules of this package that a file imports, as 'models/pspnet'."""
    names = {n.removeprefix("pspnet_jax.").replace(".", "/") for n in imported_modules(path)}
    return sorted(names & set(modules()))


def folder_of(module: str) -> str | None:
    return module.split("/")[0] + "/" if "/" in module else None


def position(module: str) -> tuple[int, int]:
    """(layer, place in the layer); modules of a folder share the folder's place."""
    name = folder_of(module) or module
    for i, layer in enumerate(LAYERS):
        if name in layer:
            return i, layer.index(name)
    raise AssertionError(f"{module} has no layer: add it to LAYERS")


def may_import(importer: str, imported: str) -> bool:
    a, b = position(importer), position(imported)
    folder = folder_of(importer)
    if folder is not None and folder == folder_of(imported):
        order = FOLDERS[folder]
        for module in (importer, imported):
            assert module.split("/")[1] in order, f"{module} has no place in FOLDERS: add it there"
        return order.index(importer.split("/")[1]) > order.index(imported.split("/")[1])
    if a[0] == 1 and b[0] == 0:
        return imported in FOUNDATIONS
    is_of_files = folder_of(imported) is None and (folder is None or folder == "weights/")
    return b[0] < a[0] or (a[0] == b[0] and is_of_files and b[1] < a[1])


@pytest.mark.parametrize("module", [m for m in modules() if not m.endswith("/__init__")])
def test_imports_go_one_way(module):
    wrong = [m for m in imports_within(modules()[module]) if not may_import(module, m)]
    assert not wrong, f"{module} must not import {wrong}"


def test_rule_itself():
    assert may_import("models/pspnet", "models/layers")
    assert not may_import("models/layers", "models/pspnet")
    assert not may_import("losses", "models/pspnet")
    assert not may_import("data/folders", "models/layers")
    assert not may_import("models/pspnet", "config")
    assert not may_import("catalog", "metric_writer")
    assert may_import("train", "config")


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_know_no_disk_and_no_clock(module):
    names = {name.split(".")[0] for name in imported_modules(modules()[module])}
    assert not names & IMPURE_IMPORTS


def test_torch_is_imported_nowhere_and_nothing_is_unpickled():
    for path in modules().values():
        names = {name.split(".")[0] for name in imported_modules(path)}
        assert not names & {"torch", "torchvision", "pickle", "tensorflow", "clu"}, path
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"eval", "exec"}, path


def test_importing_the_package_and_the_command_line_is_cheap():
    code = (
        "import sys, pspnet_jax, pspnet_jax.main; "
        "heavy = {'jax', 'flax', 'cv2', 'grain', 'orbax', 'tensorflow_datasets'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_public_names():
    import pspnet_jax

    assert {name for name in pspnet_jax.__all__ if getattr(pspnet_jax, name)} == {
        "load",
        "read_image",
        "Segmenter",
        "PSPNet",
    }
    with pytest.raises(AttributeError, match="no attribute 'Segmentor'"):
        _ = pspnet_jax.Segmentor


def test_functions_fit_in_the_head():
    """The longest function has at most 60 lines; the page of options is a page."""
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60 or node.name == "default_config", (
                    f"{module}.{node.name} has {length} lines"
                )


def test_every_test_module_states_its_seconds():
    """In the form that conftest.py reads."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        assert (
            len(re.findall(r"^BUDGET_SECONDS = \d+(?: +#.*)?$", path.read_text(), re.MULTILINE))
            == 1
        ), path


def test_picture_of_the_layers_is_that_of_the_code(monkeypatch):
    monkeypatch.syspath_prepend(PACKAGE.parent / "experiments")
    import layers_picture

    drawn = [name for modules in layers_picture.layers().values() for name in modules]
    assert sorted(drawn) == sorted(name for layer in LAYERS for name in layer)
    assert layers_picture.TARGET.read_text() == layers_picture.draw(), "draw it again"
