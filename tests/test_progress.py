"""How far a loop is: in a file, on a terminal, beside messages."""

import io
import sys

from pspnet_jax.progress import Progress, log, log_to

BUDGET_SECONDS = 10


class Terminal(io.StringIO):
    def isatty(self):
        return True


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
