"""Ask a served pipeline thousands of questions and watch what it holds on to.

    python tests/soak.py                        # trains a small bundle, then asks 3,500 times
    python tests/soak.py --bundle cmi_output --recordings 300

`cmi_pipeline.py` runs in a process of its own as in Kaggle's hidden re-run and answers over gRPC:
simulated recordings in random order, half of them IMU only, one in fifty asked again, one in fifty
damaged. The exit status is 0 if every answer was one of the 18 gestures and, after the first 200,
resident memory grew by less than 100 MB and threads and descriptors did not become more.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runs import SCRIPT, Question, environment, free_ports, good, questions, run
from test_hostile import ANSWERED, REFUSED

import cmi_pipeline as cmi
import cmi_simulator
from kaggle_evaluation.core import relay

WARM, MEMORY_LIMIT = 200, 100  # answers after which nothing may grow; MB
DAMAGE = [REFUSED[name] for name in ("zero rows", "no id", "two ids")]
DAMAGE += [ANSWERED[n] for n in ("one row", "only ids", "all None", "all 3e+38", "rows backwards")]


def held(pid: int) -> np.ndarray:
    """Resident memory (MB), threads and open descriptors of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    about = dict(line.split(":\t", 1) for line in lines)
    memory, threads = int(about["VmRSS"].split()[0]) // 1024, int(about["Threads"])
    return np.array([memory, threads, len(os.listdir(f"/proc/{pid}/fd"))])


def asked(folder: Path, count: int, rng: np.random.Generator) -> Iterator[Question]:
    """Recordings of as many simulated subjects as it takes, and what else is asked between them."""
    cmi_simulator.simulate(folder, subjects=1, test_subjects=-(-count // 102), seed=7)
    known = questions(folder)
    blank = [pl.lit(None).alias(c) for c in (*cmi.THM, *cmi.TOF)]
    for i, k in enumerate(rng.permutation(len(known))[:count]):
        frame, person = known[k]
        if i % 50 == 25:
            frame = DAMAGE[i // 50 % len(DAMAGE)](frame)
        elif i % 50 == 40:
            frame, person = known[rng.integers(len(known))]
        elif i % 2:
            frame = frame.with_columns(blank)
        yield frame, person


def soak(bundle: Path, count: int, folder: Path) -> bool:
    """Ask `count` questions; print the figures; was all well?"""
    (port,) = free_ports(1)
    rerun = {"KAGGLE_IS_COMPETITION_RERUN": "1", "KAGGLE_EVALUATION_PORT": str(port)}
    with (folder / "server.log").open("wb") as file:
        server = subprocess.Popen([sys.executable, str(SCRIPT)], cwd=folder, stdout=file,
                                  stderr=file, env=environment(bundle, **rerun))  # fmt: skip
    client, wrong, secs, seen = relay.Client("localhost", [port]), 0, [], []
    try:
        for i, question in enumerate(asked(folder / "data", count, np.random.default_rng(0)), 1):
            began = time.monotonic()
            answer = client.send("predict", *question)
            secs.append(1000 * (time.monotonic() - began))
            wrong += type(answer) is not str or answer not in cmi.GESTURES
            if i == min(WARM, count // 2) or i % 500 == 0 or i == count:
                seen.append(held(server.pid))
                print(f"{i} answers: MB, threads, descriptors {seen[-1]}", flush=True)
    finally:
        client.close()
        server.terminate()
        server.wait(30)
    fallbacks = (folder / "server.log").read_text().count(" fallback ")
    print(f"{wrong} of {len(secs)} answers wrong, {fallbacks} lines of fallbacks")
    times = np.round([secs[0], *np.percentile(secs[1:], (50, 95, 99))])
    print("first, p50, p95, p99 in ms:", *times)
    grown, more = np.max(seen, axis=0)[0] - seen[0][0], seen[-1][1:] > seen[0][1:]
    return not wrong and grown < MEMORY_LIMIT and not more.any()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recordings", type=int, default=3500)
    parser.add_argument("--bundle", type=Path, help="OUTPUT_PATH of an earlier run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bundle = options.bundle or Path(name) / "bundle"
        if options.bundle is None:
            good(run(bundle))
        well = soak(bundle.absolute(), options.recordings, Path(name))
    print("well" if well else "NOT WELL")
    sys.exit(not well)


if __name__ == "__main__":
    main()
