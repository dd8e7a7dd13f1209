"""The sweep over the paper's tables: what is run, once, and under which options."""

import json
import sys
from pathlib import Path

import ablations
import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

BUDGET_SECONDS = 20
SCENES = str(EXPERIMENTS.parent / "configs" / "scenes.py")


@pytest.fixture
def commands(monkeypatch):
    """What would have been run; each leaves a report behind, whose score is the number of the command."""
    seen: list[list[str]] = []

    def run(self, folder, arguments):
        seen.append(arguments)
        report = folder / "evaluation/00000007-val-whole/report.json"
        if arguments[0] == "evaluate":
            report = folder / "multi_scale" / "report.json"
        report.parent.mkdir(parents=True)
        scores = {"mean_iou": len(seen) / 100, "pixel_accuracy": 0.5, "groups": {"others": 0.25}}
        report.write_text(json.dumps(scores))

    monkeypatch.setattr(ablations.Sweep, "_run", run)
    return seen


def sweep(output, **shared) -> ablations.Sweep:
    return ablations.Sweep(output, SCENES, {"train.num_steps": "7"} | shared, "0.75,1.0")


def run(one: ablations.Sweep, numbers="1234", jobs=1, seeds=(0, 1)) -> int:
    every = ablations.tables(["resnet10", "resnet18"])
    return ablations.run_all(one, {n: every[n] for n in numbers}, seeds, jobs=jobs)


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_network_is_trained_once(commands, tmp_path, jobs):
    assert run(sweep(tmp_path), jobs=jobs) == 0
    trained = [command for command in commands if command[0] != "evaluate"]
    # Seven poolings; four more weights; one more depth; three with augmentation, and the deepest of them.
    assert len(trained) == 2 * (7 + 4 + 1 + 4)
    assert len(commands) - len(trained) == 2  # multi-scale
    assert len({tuple(command) for command in trained}) == len(trained)
    assert run(sweep(tmp_path), jobs=jobs) == 0
    assert len(commands) == 2 * 17
    text = (tmp_path / "results.md").read_text()
    assert "| B1236, average, reduced | " in text
    assert "configs/scenes.py" in text
    assert "train.num_steps=7" in text
    assert "| 41.68 / 80.04 |" in text
    assert text.count("| 2 |") == 7 + 5 + 2 + 6


def test_options_of_a_row_come_last(commands, tmp_path):
    """What all runs share does not undo what a row is about."""
    run(sweep(tmp_path, **{"augment.recipe": "semseg"}), "4", seeds=[0])
    baseline = next(c for c in commands if "--config.loss.aux_weight=0.0" in c and "none" in str(c))
    assert [word for word in baseline if word.startswith("--config.augment")] == [
        "--config.augment.recipe=none"
    ]
    assert "recipe=none" in next(word for word in baseline if "workdir" in word)


def test_other_settings_need_another_folder(commands, tmp_path):
    run(sweep(tmp_path), "3", seeds=[0])
    with pytest.raises(ValueError, match=r"other settings; take another --output"):
        run(sweep(tmp_path, **{"model.width": "8"}), "3", seeds=[0])


def test_a_run_that_fails_is_told_and_tried_again(commands, tmp_path, monkeypatch, capsys):
    working = ablations.Sweep._run

    def failing(self, folder, arguments):
        raise RuntimeError(f"{folder}: exit status 1: error: no space")

    monkeypatch.setattr(ablations.Sweep, "_run", failing)
    assert run(sweep(tmp_path), "3", seeds=[0]) == 1
    assert "error: no space" in capsys.readouterr().err
    monkeypatch.setattr(ablations.Sweep, "_run", working)
    assert run(sweep(tmp_path), "3", seeds=[0]) == 0


def test_reports_of_other_steps_do_not_count(commands, tmp_path):
    one = sweep(tmp_path)
    row = ablations.tables(["resnet10"])["3"][1][0]
    early = one.folder(row, 0) / "evaluation/00000005-val-whole/report.json"
    early.parent.mkdir(parents=True)
    early.write_text("{}")
    assert one.scores(row, 0)["mean_iou"] == 0.01
    assert len(commands) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables=1,5"], "--tables: 5 is not among 1, 2, 3, 4"),
        (["--depths=resnet10,resnet77"], "--depths: resnet77 is not among resnet10"),
        (["--set=model.widht=8"], "--set: model.widht is not among options of"),
        (["--set=model.width"], "--set takes OPTION=VALUE"),
        (["--seeds=a"], "--seeds takes whole numbers"),
    ],
)
def test_mistakes_are_told_before_the_first_run(
    commands, arguments, message, tmp_path, monkeypatch, capsys
):
    given = ["ablations.py", f"--output={tmp_path}", f"--config={SCENES}", *arguments]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit):
        ablations.main()
    assert message in capsys.readouterr().err
    assert not commands
