"""What all benchmarks share: a row, the one table, the clock, simulated recordings, benchmark.json.

Every part of a benchmark is a function that returns rows. `measure` runs parts, each in a process
of its own, so that none meets the threads and memory that the one before left, and keeps what it found
in benchmark.json after each: an interrupted run loses nothing.
"""

import importlib.metadata
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []
import cmi_pipeline as cmi  # noqa: E402

CACHE = Path(os.environ.get("CMI_BENCHMARK_DIR", "/tmp/cmi_benchmark")).absolute()
RESULTS = Path("benchmark.json")  # in the current folder
PACKAGES = ("numpy", "polars", "torch", "keras", "tensorflow", "lightgbm")
TIMES, SCORE = ("s", "ms"), "score"  # the units of which a ratio says something


@dataclass(frozen=True)
class Row:
    """One figure, and what a plain implementation reached in the same run if there is one."""

    what: str
    ours: float
    plain: float | None = None
    unit: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times faster, or how many times the score: above 1 ours is the better one."""
        if not self.ours or not self.plain or self.unit not in (*TIMES, SCORE):
            return None
        return self.plain / self.ours if self.unit in TIMES else self.ours / self.plain


Part = Callable[[], list[Row]]
Entry = dict[str, Any]  # a part's rows, and when, where and beside what load they were measured


# ---- table -------------------------------------------------------------------------------------


def cell(value: float | None, unit: str) -> str:
    """A figure with its unit; empty if there is none."""
    if value is None:
        return ""
    if unit == SCORE:
        return f"{value:.3f}"
    return f"{value:,.0f} {unit}".strip() if abs(value) >= 100 else f"{value:.3g} {unit}".strip()


def heading(entries: Mapping[str, Entry]) -> list[str]:
    """A line for each machine, set of versions and day that the figures are of."""
    groups: dict[str, list[str]] = {}
    for name, entry in entries.items():
        versions = ", ".join(f"{p} {v}" for p, v in entry["packages"].items())
        where = f"{entry['machine']}, {entry['cores']} cores, Python {entry['python']}, {versions}"
        groups.setdefault(f"{where}, {entry['date'][:10]}", []).append(name)
    lines = []
    for circumstances, names in groups.items():
        loads = [entries[name]["load"] for name in names]
        parts = "" if len(groups) == 1 else f": {', '.join(names)}"
        lines.append(f"{circumstances}, load average {min(loads)} to {max(loads)}{parts}")
    return lines


def table(entries: Mapping[str, Entry]) -> str:
    """All figures as one Markdown table, below what they were measured on."""
    lines = [
        "",
        *heading(entries),
        "Ratio: how many times faster, or how many times the score.",
        "",
    ]
    lines += ["| part | what | ours | plain | ratio |", "|---|---|---|---|---|"]
    for name, entry in entries.items():
        for row in (
            Row(**{k: r[k] for k in ("what", "ours", "plain", "unit")}) for r in entry["rows"]
        ):
            ours, plain = cell(row.ours, row.unit), cell(row.plain, row.unit)
            lines.append(f"| {name} | {row.what} | {ours} | {plain} | {cell(row.ratio, '×')} |")
    return "\n".join(lines)


# ---- measuring ---------------------------------------------------------------------------------


def cpu_model() -> str:
    """The processor by its name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str:
    """Its release, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def circumstances() -> Entry:
    """Machine, versions, date and load average of this moment."""
    return {
        "machine": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "load": round(os.getloadavg()[0], 2),
    }


def saved() -> dict[str, Entry]:
    """What benchmark.json holds by now, by part."""
    if not RESULTS.exists():
        return {}
    entries = json.loads(RESULTS.read_text())
    return {name: e for name, e in entries.items() if isinstance(e, dict) and "packages" in e}


def measure(parts: Mapping[str, Part]) -> list[str]:
    """Run the parts in turn and keep each one's rows, beside those of the parts not run now.

    Returns the names of those that failed: their errors are shown, and the others go on.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, part in parts.items():
        entry, began = circumstances(), time.perf_counter()
        cmi.log("begins", part=name, load=entry["load"])
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            done = alone.submit(part)
            error = done.exception()
        if error:
            traceback.print_exception(error)
            failed.append(name)
            continue
        rows = done.result()
        secs = round(time.perf_counter() - began, 1)
        entry |= {"seconds": secs, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}
        content = json.dumps(saved() | {name: entry}, indent=1, default=float)
        cmi.write_whole(RESULTS, content + "\n")
        cmi.log("ends", part=name, secs=secs)
    return failed


def report(parts: Mapping[str, Part], shown: Container[str] | None = None) -> int:
    """Run the parts and print the table of their figures, or of all `shown`; the exit status."""
    failed = measure(parts)
    shown = parts if shown is None else shown
    print(table({name: entry for name, entry in saved().items() if name in shown}))
    return int(bool(failed))


def turns(*calls: Callable[[], object], repeats: int) -> cmi.F64:
    """Milliseconds of each call, (repeats, calls).

    The calls take turns, so that all meet the same machine; a first turn is not counted.
    """
    took = np.empty((repeats + 1, len(calls)))
    for turn in took:
        for i, call in enumerate(calls):
            began = time.perf_counter()
            call()
            turn[i] = 1e3 * (time.perf_counter() - began)
    return took[1:]


def medians(*calls: Callable[[], object], repeats: int = 50) -> list[float]:
    """The median of each call's milliseconds."""
    return np.median(turns(*calls, repeats=repeats), axis=0).tolist()


# ---- what is measured --------------------------------------------------------------------------


def simulated_folder(subjects: int, recordings: int | None, seed: int = 1) -> Path:
    """The competition's files with simulated recordings, made once; None: the whole protocol."""
    import cmi_simulator

    source = cmi.digest(Path(cmi_simulator.__file__).read_bytes())[:8]
    folder = CACHE / f"{subjects}x{recordings or 'all'}-{seed}-{source}"
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        knobs = {"subjects": subjects, "recordings_per_subject": recordings, "seed": seed}
        cmi_simulator.simulate(partial, test_subjects=2, **knobs)
        partial.rename(folder)
    return folder


def simulated(subjects: int, recordings: int, seed: int = 1) -> cmi.Recordings:
    """Canonical simulated recordings; nobody is taken to wear the device upside down."""
    rec = cmi.read_train(simulated_folder(subjects, recordings, seed))
    return cmi.canonical(rec, np.zeros(len(rec), bool))


def pipeline(out: Path, settings: Mapping[str, str]) -> str:
    """What `python cmi_pipeline.py` prints in a process of its own, by these settings alone."""
    known = {f.name.upper() for f in cmi.dataclasses.fields(cmi.Config)} | {"MODEL_PATH"}
    env = {k: v for k, v in os.environ.items() if k not in known}
    out.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        [sys.executable, cmi.__file__], cwd=out.parent, text=True, stdout=subprocess.PIPE,
        check=True, env={**env, **settings, "OUTPUT_PATH": str(out)},
    ).stdout  # fmt: skip
