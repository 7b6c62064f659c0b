"""The progress line of a local run: printed now and then, flushed, never silent for long."""

from __future__ import annotations

import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any

INTERVAL_SECONDS = 15  # s between two lines; a first line follows the first answer
_STARTED = time.monotonic()


def log(what: str, text: str = "") -> None:
    """One line per event: seconds since the import, what happened, then the rest; flushed."""
    line = f"[{time.monotonic() - _STARTED:7.1f}s] {what:<12} {text}".rstrip()
    print(line, flush=True)  # noqa: T201  # the one place that prints


def duration(seconds: float) -> str:
    """`seconds` in s, as 4.2s, 3m05s or 2h07m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


class Progress:
    """Counts calls and answers; as a context manager it also prints them every INTERVAL_SECONDS.

    Attributes:
        total: calls to expect; None while unknown.
        done: answers received.
        answers: how often each str was answered.
        slowest: (s, name) of the longest call so far.
        seconds: total duration of all answered calls, in s.
        current: (start, name) of the call under way, or None. Start is of time.monotonic.
    """

    def __init__(self) -> None:
        self.total: int | None = None
        self.done = 0
        self.answers: Counter[str] = Counter()
        self.slowest: tuple[float, str] = (0.0, "")
        self.seconds = 0.0
        self.current: tuple[float, str] | None = None
        self._first_answered = 0.0
        self._printing = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print_regularly, daemon=True)

    def begin(self, name: str) -> None:
        """Note that the call for the recording `name` starts."""
        self.current = (time.monotonic(), name)

    def end(self, answer: Any) -> None:
        """Note that the call under way was answered."""
        assert self.current is not None, "end() without begin()"
        start, name = self.current
        seconds = time.monotonic() - start
        self.current = None
        self.done += 1
        self.seconds += seconds
        self._first_answered = self._first_answered or time.monotonic()
        self.slowest = max(self.slowest, (seconds, name))
        if isinstance(answer, str):
            self.answers[answer] += 1
        if self.done == 1 and self._printing:
            log("progress", self.line())

    def line(self) -> str:
        """Done and total, rate, ETA, slowest call, the call under way, the commonest answers.

        The first answer tells no pace: models are loaded for it.
        """
        current = self.current  # the other thread may clear it
        waiting = time.monotonic() - current[0] if current else 0.0
        parts = [f"done={self.done}/{'?' if self.total is None else self.total}"]
        if self.done > 1 or (self.done and self.done == self.total):
            pace = self._seconds_per_answer()
            parts.append(f"rate={1 / max(pace, 1e-9):.3g}/s")
            if self.total is not None:
                parts.append(f"eta={duration((self.total - self.done) * pace)}")
        if self.done:
            parts.append(f"slowest={duration(self.slowest[0])} {self.slowest[1]}")
        if current and waiting >= 1:
            parts.append(f"waiting={duration(waiting)} for {current[1]}")
        if self.answers:
            most = [f"{answer} {n}" for answer, n in self.answers.most_common(2)]
            others = [f"{len(self.answers) - 2} others"] if len(self.answers) > 2 else []
            parts.append(f"answers: {', '.join(most + others)}")
        return "  ".join(parts)

    def _seconds_per_answer(self) -> float:
        """Pace in s, without the first answer if there are others."""
        if self.done == 1:
            return self.seconds
        return (time.monotonic() - self._first_answered) / (self.done - 1)

    def _print_regularly(self) -> None:
        while not self._ended.wait(INTERVAL_SECONDS):
            log("progress", self.line())

    def __enter__(self) -> Progress:
        self._printing = True
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        current = f"  failed at {self.current[1]}" if self.current else ""
        log("progress" if error is None else "stopped", self.line() + current)
