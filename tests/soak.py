"""Ask a served pipeline thousands of questions and watch what it holds on to.

    python tests/soak.py                        # trains a small bundle, then asks 3,500 times
    python tests/soak.py --bundle cmi_output    # asks the models of an earlier run
    python tests/soak.py --recordings 300       # shorter

`cmi_pipeline.py` runs in a process of its own as in Kaggle's hidden re-run and answers over gRPC.
The questions: simulated recordings in random order, half of them IMU only, one in fifty asked
twice, one in fifty damaged. The exit status is 0 if every answer was one of the 18 gestures and,
after the first 200, the server's resident memory grew by less than 100 MB and its threads and
descriptors did not become more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cmi_pipeline as cmi  # noqa: E402
import cmi_simulator  # noqa: E402
from kaggle_evaluation.core import relay  # noqa: E402

WARM = 200  # answers after which nothing may grow any more
MEMORY_LIMIT = 100  # MB
SMALL = {"SIM_SUBJECTS": "6", "SIM_RECORDINGS": "24", "N_FOLDS": "2", "LGBM_ROUNDS": "40",
         "LGBM_LR": "0.1", "TORCH_MAX_EPOCHS": "3", "KERAS_MAX_EPOCHS": "3"}  # fmt: skip
IDS = ("row_id", "sequence_id", "sequence_counter", "subject")
SILENT = [c for c in cmi.SENSORS if c.startswith(("thm", "tof"))]
Question = tuple[pl.DataFrame, pl.DataFrame]


def values(frame: pl.DataFrame, *columns: pl.Expr, **named: pl.Expr) -> pl.DataFrame:
    return frame.with_columns(*columns, **named)


DAMAGE: dict[str, Callable[[pl.DataFrame], pl.DataFrame]] = {
    "no rows": lambda f: f.clear(),
    "one row": lambda f: f.head(1),
    "no id": lambda f: f.drop("sequence_id"),
    "no subject": lambda f: f.drop("subject"),
    "two recordings": lambda f: pl.concat([f, values(f, sequence_id=pl.lit("SEQ_OTHER"))]),
    "all null": lambda f: values(f, *(pl.lit(None).alias(c) for c in cmi.SENSORS)),
    "text": lambda f: values(f, *(pl.lit("broken").alias(c) for c in cmi.SENSORS)),
    "infinite": lambda f: values(f, *(pl.lit(float("inf")).alias(c) for c in cmi.ACC)),
    "huge": lambda f: values(f, *(pl.lit(3e38).alias(c) for c in cmi.SENSORS)),
    "no ToF column": lambda f: f.drop(cmi.TOF),
    "zero rotation": lambda f: values(f, *(pl.lit(0.0).alias(c) for c in cmi.ROT)),
    "long": lambda f: pl.concat([f] * 40),
}


@dataclass(frozen=True)
class Held:
    """What a process holds, from /proc."""

    resident: float  # MB
    threads: int
    descriptors: int

    @classmethod
    def by(cls, pid: int) -> Held:
        status = Path(f"/proc/{pid}/status").read_text()
        about = dict(line.split(":\t", 1) for line in status.splitlines())
        return cls(
            int(about["VmRSS"].split()[0]) / 1024,
            int(about["Threads"]),
            len(os.listdir(f"/proc/{pid}/fd")),
        )


def small_bundle(folder: Path) -> Path:
    """Train all members a little."""
    out, env = folder / "bundle", {**os.environ, **SMALL, "OUTPUT_PATH": str(folder / "bundle")}
    print("training a small bundle", flush=True)
    command = [sys.executable, str(ROOT / "cmi_pipeline.py")]
    subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    return out


def recordings(folder: Path, count: int, rng: np.random.Generator) -> list[Question]:
    """At least `count` simulated recordings, half of them IMU only, each with its demographics."""
    protocol = 102  # recordings of a subject
    subjects = -(-count // protocol)
    cmi_simulator.simulate(folder, subjects=1, test_subjects=subjects, seed=int(rng.integers(1000)))
    test = pl.read_csv(folder / "test.csv", infer_schema_length=None)
    people = pl.read_csv(folder / "test_demographics.csv").partition_by("subject", as_dict=True)
    asked = []
    for frame in test.partition_by("sequence_id"):
        blind = len(asked) % 2 == 0
        seen = values(frame, *(pl.lit(None).alias(c) for c in SILENT)) if blind else frame
        asked.append((seen, people[(frame["subject"][0],)]))
    return asked


def questions(
    asked: list[Question], count: int, rng: np.random.Generator
) -> Iterator[tuple[str, Question]]:
    """(kind, question): in random order; every 50th asked again, every 50th damaged."""
    order = rng.permutation(len(asked))
    damages = list(DAMAGE.items())
    past: list[Question] = []
    for i in range(count):
        if i % 50 == 25:
            name, damage = damages[(i // 50) % len(damages)]
            frame, person = asked[order[i % len(order)]]
            yield name, (damage(frame), person)
        elif i % 50 == 40:
            yield "again", past[rng.integers(len(past))]
        else:
            past.append(asked[order[i % len(order)]])
            yield "whole", past[-1]


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def served(bundle: Path, log: Path, port: int) -> subprocess.Popen[bytes]:
    """The pipeline as in the re-run, on a port of its own."""
    env = {**os.environ, "OUTPUT_PATH": str(bundle), "KAGGLE_IS_COMPETITION_RERUN": "1",
           "KAGGLE_EVALUATION_PORT": str(port), "STRICT": "0"}  # fmt: skip
    command = [sys.executable, str(ROOT / "cmi_pipeline.py")]
    with log.open("wb") as file:
        return subprocess.Popen(
            command, cwd=log.parent, env=env, stdout=file, stderr=subprocess.STDOUT
        )


def tell(name: str, **figures: object) -> None:
    print(f"{name:<10}", "  ".join(f"{k}={v}" for k, v in figures.items()), flush=True)


def soak(bundle: Path, count: int, seed: int, folder: Path) -> bool:
    """Ask `count` questions; print the figures; was all well?"""
    rng = np.random.default_rng(seed)
    asked = recordings(folder / "data", count, rng)
    log, port = folder / "server.log", free_port()
    server = served(bundle, log, port)
    client = relay.Client("localhost", [port])
    wrong, secs, kinds, seen = [], np.empty(count), [], []
    try:
        for i, (kind, question) in enumerate(questions(asked, count, rng)):
            began = time.monotonic()
            answer = client.send("predict", *question)
            secs[i] = time.monotonic() - began
            kinds.append(kind)
            if type(answer) is not str or answer not in cmi.GESTURES:
                wrong.append((i, kind, answer))
            if i + 1 == min(WARM, count // 2) or (i + 1) % 500 == 0 or i + 1 == count:
                seen.append(Held.by(server.pid))
                tell("held", answers=i + 1, resident_mb=round(seen[-1].resident),
                     threads=seen[-1].threads, descriptors=seen[-1].descriptors)  # fmt: skip
    finally:
        client.close()
        server.terminate()
        server.wait(30)
    later = secs[1:]
    tell("answers", asked=count, valid=count - len(wrong), again=kinds.count("again"),
         damaged=sum(k in DAMAGE for k in kinds), fallbacks=log.read_text().count(" fallback "))  # fmt: skip
    tell("seconds", first=round(secs[0], 1), all=round(secs.sum(), 1),
         median_ms=round(1000 * np.median(later), 1), p99_ms=round(1000 * np.quantile(later, 0.99), 1),
         slowest_ms=round(1000 * later.max(), 1))  # fmt: skip
    first, last = seen[0], seen[-1]
    grown = max(s.resident for s in seen) - first.resident
    tell("growth", resident_mb=round(grown, 1), threads=last.threads - first.threads,
         descriptors=last.descriptors - first.descriptors)  # fmt: skip
    for i, kind, answer in wrong[:10]:
        tell("wrong", question=i, kind=kind, answer=repr(answer))
    leaks = last.threads > first.threads or last.descriptors > first.descriptors
    return not wrong and grown < MEMORY_LIMIT and not leaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--recordings", type=int, default=3500)
    parser.add_argument("--bundle", type=Path, help="OUTPUT_PATH of an earlier run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = options.bundle.absolute() if options.bundle else small_bundle(folder)
        well = soak(bundle, options.recordings, options.seed, folder)
    print("well" if well else "NOT WELL", flush=True)
    sys.exit(not well)


if __name__ == "__main__":
    main()
