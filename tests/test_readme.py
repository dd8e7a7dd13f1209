"""The README: its commands are understood, its Python runs, its links lead somewhere."""

import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from pspnet_jax import main as main_module
from pspnet_jax.data.scenes import SPLITS, render

from pictures import write_image

BUDGET_SECONDS = 60
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
# Words that stand for what is not shipped: such commands are parsed here and run by nobody.
NOT_SHIPPED = (
    "DIR",
    "PREPARED",
    "PHOTOS",
    "FOLDER",
    ".pth",
    ".caffemodel",
    "photo.jpg",
    "test",
    "runs/",
)


def commands() -> list[str]:
    """Those of `pspnet`, one a line, with what stands in brackets."""
    text = "\n".join(block for language, block in BLOCKS if not language)
    text = text.replace("\\\n", " ")
    lines = [line.split("  #")[0].split(" # ")[0].strip() for line in text.splitlines()]
    return [re.sub(r"[\[\]]", "", line) for line in lines if line.startswith("pspnet ")]


def test_there_are_commands():
    assert len(commands()) > 25
    assert len({command.split()[1] for command in commands()}) > 8


EXAMPLES = [example for verb in main_module.VERBS.values() for example in verb.examples]


@pytest.mark.parametrize("command", [*commands(), *EXAMPLES])
def test_command_is_understood(command, monkeypatch):
    """Verb, flags and options exist; what it would run is left out."""
    ran = []
    harmless = {
        name: dataclasses.replace(verb, run=lambda values, words: ran.append(words))
        for name, verb in main_module.VERBS.items()
    }
    monkeypatch.setattr(main_module, "VERBS", harmless)
    monkeypatch.chdir(ROOT)
    assert main_module.main(shlex.split(command)[1:]) == 0
    assert ran or "--help" in command


def test_commands_that_need_nothing_are_these():
    """All others hold a placeholder; these are run by the tests that are named."""
    free = [c for c in commands() if not any(word in c for word in NOT_SHIPPED)]
    assert sorted(free) == [
        "pspnet --config=configs/scenes.py",  # test_notebooks, by its function
        "pspnet --help",  # test_main
        "pspnet evaluate --checkpoint=scenes",  # test_stored_model
    ]


def test_python_runs(tmp_path):
    """With the shipped network in place of a run, and a photograph of its own."""
    (block,) = (block for language, block in BLOCKS if language == "python" and "load(" in block)
    image = render(0, SPLITS["val"][0])[0]
    write_image(tmp_path / "photo.jpg", image)
    names = {"images": [image, image[:97, :81]]}
    block = block.replace('"runs/scenes"', '"scenes"').replace("photo.jpg", f"{tmp_path}/photo.jpg")
    exec(block, names)
    assert names["prediction"].class_map.shape == (97, 81)
    assert names["prediction"].confidence.shape == (97, 81)
    np.testing.assert_allclose(np.sum(names["probabilities"], axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "experiments/README.md"]
)
def test_links_lead_somewhere(name):
    """Files exist; anchors are headings of the file."""
    path = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        aim = (path.parent / file) if file else path
        assert aim.exists(), f"{name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", aim.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{name}: {target}"
