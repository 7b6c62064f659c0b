"""Progress: when a line is due, what it says, and the bar that stands in for it on a terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmi_pipeline as cmi


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(cmi.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    return [dict(re.findall(r"(\w+)=(\S+)", line)) for line in capsys.readouterr().out.splitlines()]


def test_a_line_every_so_many_steps_and_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with cmi.Progress("rounds", 25, 10, cmi.Config(), job="a") as progress:
        for _ in range(25):
            clock.now += 0.5
            progress.step()
    told = lines(capsys)
    assert [line["done"] for line in told] == ["10/25", "20/25", "25/25"]
    assert [float(line["per_sec"]) for line in told] == [2, 2, 2]
    assert [float(line["eta"]) for line in told] == [7.5, 2.5, 0]
    assert all(line["job"] == "a" for line in told)


def test_never_more_than_twenty_seconds_of_silence(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with cmi.Progress("steps", 100, 50, cmi.Config()) as progress:
        for _ in range(12):
            clock.now += 7
            progress.step()
    assert [line["done"] for line in lines(capsys)] == ["3/100", "6/100", "9/100", "12/100"]


def test_a_resumed_loop_counts_its_rate_from_where_it_was_taken_up(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with cmi.Progress("steps", 100, 10, cmi.Config(), done=60) as progress:
        clock.now += 5
        progress.step(10)
    (line,) = lines(capsys)
    assert line["done"] == "70/100"
    assert float(line["per_sec"]) == 2
    assert float(line["eta"]) == 15


def test_a_loop_that_has_done_nothing_yet_still_tells(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = cmi.Progress("jobs", 4, 1, cmi.Config())
    clock.now += 30
    progress.step(0)
    (line,) = lines(capsys)
    assert (line["done"], line["eta"]) == ("0/4", "nan")


@pytest.mark.usefixtures("clock")
def test_figures_are_asked_for_only_if_a_line_is_due() -> None:
    asked: list[int] = []

    def figures() -> dict[str, Any]:
        asked.append(progress.done)
        return {"loss": 1.0}

    progress = cmi.Progress("steps", 20, 8, cmi.Config())
    for _ in range(20):
        progress.step(1, figures)
    assert asked == [8, 16, 20], "reading a loss from a card waits for the card"


@pytest.mark.parametrize(("tqdm", "bar"), [("1", True), ("0", False)])
def test_on_a_terminal_a_bar_stands_in_for_the_lines(tqdm: str, bar: bool) -> None:
    pytest.importorskip("tqdm")
    code = (
        "import os, cmi_pipeline as cmi\n"
        "with cmi.Progress('steps', 5, 1, cmi.Config.from_env(os.environ)) as progress:\n"
        "    for _ in range(5): progress.step()\n"
    )
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    root = Path(cmi.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=theirs, text=True,
        env={**os.environ, "USE_TQDM": tqdm}, check=True,
    )  # fmt: skip
    written, _, _ = select.select([ours], [], [], 1)
    drawn = os.read(ours, 10_000).decode() if written else ""
    os.close(theirs)
    assert ("steps:" in drawn and "/5 " in drawn) == bar
    assert len(done.stdout.splitlines()) == (0 if bar else 5)


def test_jobs_of_workers_elsewhere_are_counted_by_their_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = np.empty(0, np.int64)
    jobs = [
        cmi.Job("lgbm", "all", 0, k, nobody, nobody, tmp_path, tmp_path, tmp_path) for k in (0, 1)
    ]
    threads = threading.active_count()
    with cmi.watched(jobs, cmi.Config()):
        for job in jobs:
            job.note.write_text("{}")
            time.sleep(1.6)
        time.sleep(1.2)
    assert [line["done"] for line in lines(capsys)] == ["1/2", "2/2"]
    assert threading.active_count() == threads
