"""Rows, TensorBoard events, progress lines; what is forgotten on resume."""

import json
import math

import pytest

from pspnet_jax.metric_writer import MetricWriter, TrainingProgress, progress_line
from pspnet_jax.progress import log_to

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


def test_rows_after_the_restored_step_are_dropped_with_half_lines(tmp_path, said):
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
