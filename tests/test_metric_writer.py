"""Rows, TensorBoard events, progress lines; what is forgotten on resume."""

import io
import json
import math
import sys
import time

import pytest

from pspnet_jax.metric_writer import (
    MetricWriter,
    Progress,
    TrainingProgress,
    log,
    log_to,
    progress_line,
    write_whole,
)

BUDGET_SECONDS = 10


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_written_at_once_and_timing_stands_apart(tmp_path):
    writer = MetricWriter(tmp_path, first_step=0)
    writer.write(5, {"loss": 0.5, "aux_loss": math.nan}, timing={"images_per_second": 3.0})
    assert rows(tmp_path) == [
        {"step": 5, "loss": 0.5, "aux_loss": None, "timing": {"images_per_second": 3.0}}
    ]
    writer.close()
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1
    content = events[0].read_bytes()
    assert b"images_per_second" in content
    assert b"aux_loss" not in content  # it has no point in a curve


def test_rows_after_the_restored_step_are_dropped_with_half_lines(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(log, "warning", lambda text, *values: said.append(text % values))
    writer = MetricWriter(tmp_path, first_step=0)
    for step in (10, 20, 30):
        writer.write(step, {"loss": step / 10}, timing={})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    MetricWriter(tmp_path, first_step=20).close()
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]
    assert [text.split(": ")[1] for text in said] == [
        "dropped 1 damaged rows, as a killed process leaves"
    ]
    MetricWriter(tmp_path, first_step=0).close()
    assert rows(tmp_path) == []


def test_only_the_first_process_writes(tmp_path):
    writer = MetricWriter(tmp_path / "run", first_step=0, is_writer=False)
    writer.write(1, {"loss": 1.0}, timing={})
    writer.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("is_writer", [True, False])
def test_only_the_first_process_says_what_an_evaluation_found(tmp_path, capsys, is_writer):
    log_to(None)
    writer = MetricWriter(tmp_path, first_step=0, is_writer=is_writer)
    options = {"first_step": 0, "num_steps": 9, "log_every_steps": 1, "images_per_step": 1}
    with TrainingProgress(writer, **options) as progress:
        progress.log_evaluation(5, {"mean_iou": 0.5}, "what was found", seconds=1.0)
    assert ("step 5: what was found" in capsys.readouterr().out) == is_writer


def test_progress_line():
    scalars = {"loss": 1.23456, "main_loss": 1.0, "aux_loss": 0.5, "learning_rate": 0.01}
    timing = {"images_per_second": 33.33, "seconds_left": 3725.2}
    assert progress_line(7, 700, scalars, timing) == (
        "step   7/700  loss 1.2346 (main 1.0000, aux 0.5000)  learning rate 1.00e-02  "
        "33.3 images/s  1:02:05 left"
    )


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_compilation_counts_in_no_rate(clock, tmp_path, caplog):
    caplog.set_level("INFO", logger="pspnet_jax")
    writer = MetricWriter(tmp_path, first_step=10)
    options = {"first_step": 10, "num_steps": 12, "log_every_steps": 1, "images_per_step": 4}
    names = ("loss", "main_loss", "learning_rate", "skipped_steps")
    with TrainingProgress(writer, **options) as progress:
        for step, seconds in ((11, 60.0), (12, 2.0)):
            clock.now += seconds
            progress.log(step, dict.fromkeys(names, 0.0))
    assert "the first step took 60.0 s" in caplog.text
    first, second = rows(tmp_path)
    assert first["timing"] == {}
    assert second["timing"]["images_per_second"] == 2.0


def test_progress_in_a_file_is_a_line_every_15_seconds_and_one_at_the_end(clock, capsys):
    with Progress(100, "images of val") as progress:
        for _ in range(40):
            clock.now += 0.5
            progress.update(2)
    assert capsys.readouterr().err.splitlines() == [
        "60/100 images of val  4.0 images/s  0:00:10 left",
        "80/100 images of val  4.0 images/s  in 0:00:20",
    ]


def test_the_time_left_does_not_count_the_first_round(clock, capsys):
    with Progress(11) as progress:
        clock.now += 20  # compiles
        progress.update()
        for _ in range(4):
            clock.now += 4
            progress.update()
        assert capsys.readouterr().err.splitlines() == [
            "1/11 images  0.05 images/s  0:03:20 left",
            "5/11 images  0.25 images/s  0:00:24 left",
        ]


def test_progress_on_a_terminal_is_one_line(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    with Progress(4) as progress:
        assert terminal.getvalue() == f"\r\x1b[K[{'':30}] 0/4 images"
        for _ in range(3):
            clock.now += 0.05
            progress.update()
            clock.now += 1.0
            progress.update(0)
        drawn = terminal.getvalue()
    assert "\n" not in drawn
    assert drawn.split("\r\x1b[K")[-1].startswith("[======================        ] 3/4 images  ")
    assert drawn.endswith(" left")
    assert terminal.getvalue().removeprefix(drawn).startswith("\r\x1b[K3/4 images  ")
    assert terminal.getvalue().endswith("  in 0:00:03\n")


def test_bar_fits_a_narrow_terminal(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "20")
    progress = Progress(10_000, "images of validation")
    clock.now += 1
    progress.update()
    assert terminal.getvalue().split("\r\x1b[K")[1:] == [
        "0/10000 images of v",
        "1/10000 images of v",
    ]
    progress.close()


def test_message_takes_the_place_of_the_bar(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    log_to(None)
    with Progress(4) as progress:
        clock.now += 1
        progress.update()
        log.warning("one is broken")
        log.warning("another")
    assert "left\r\x1b[Kone is broken\nanother\n" in terminal.getvalue()


def test_progress_is_in_the_log_file_and_a_loop_of_nothing_says_nothing(clock, tmp_path, capsys):
    log_to(tmp_path / "log.txt")
    Progress(0).close()
    with Progress(2) as progress:
        clock.now += 20
        progress.update()
    log_to(None)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split("DEBUG ")[1].split("  ")[0] for line in lines] == ["1/2 images"] * 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 2


def test_files_are_written_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "text")
    assert path.read_text() == "text"
    write_whole(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert path.read_bytes() == b"\0\1"
