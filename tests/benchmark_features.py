"""How fast tables and frames are made: against `pl.read_csv`, and against a plain loop with scipy.

    python tests/benchmark_features.py [FOLDER]     # with a train.csv; without, one is simulated

CMI_BENCHMARK_TRAIN=FOLDER does the same; nothing is written there. Each figure comes from a process
of its own, in turns, and the best of three counts. Only the ratios mean anything on another
machine; on a busy one, those of processor time do.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measured import Row, cmi, medians, report, simulated_folder

SAMPLE = 60  # recordings of which the plain loop is timed
REPEATS = 3
ARRAYS = ("start", "acc", "rot", "thm", "tof", "sequence_id", "subject", "person")
Figures = dict[str, float]


# ---- measures, each in a process of its own ----------------------------------------------------


def load(folder: Path, scratch: Path) -> cmi.Recordings:
    """The recordings; from plain arrays in `scratch` after the first time."""
    path = scratch / "recordings.npz"
    if not path.exists():
        rec = cmi.read_train(folder)
        np.savez(path, **{n: getattr(rec, n) for n in ARRAYS})
    with np.load(path) as stored:
        return cmi.Recordings(**{n: stored[n] for n in ARRAYS})


def measure_csv(folder: Path, _scratch: Path) -> Figures:
    """Reading the file, which any road has to do."""
    import polars as pl

    began, cpu = time.perf_counter(), time.process_time()
    frame = pl.read_csv(folder / "train.csv")
    secs = {"csv_s": time.perf_counter() - began, "csv_cpu_s": time.process_time() - cpu}
    return secs | {"rows": len(frame)}


def measure_ours(folder: Path, scratch: Path) -> Figures:
    """Canonical form, table and frames of all recordings in both modes, and of one."""
    import resource

    rec = load(folder, scratch)
    began, cpu = time.perf_counter(), time.process_time()
    ours = cmi.canonical(rec, np.zeros(len(rec), bool))
    table, frames = cmi.describe(ours)
    narrow = table.of_mode("imu"), frames.of_mode("imu")
    end, cpu = time.perf_counter(), time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    one = ours.part(0, 1)
    table_ms, frames_ms = medians(
        lambda: cmi.feature_table(one), lambda: cmi.make_frames(one), repeats=101
    )
    sizes = {"features": len(table.names), "features_imu": len(narrow[0].names)}
    return {
        **{"ours_s": end - began, "ours_cpu_s": cpu, "peak_gb": peak, "table_of_one_ms": table_ms},
        **{"frames_of_one_ms": frames_ms, "recordings": len(rec), "channels": len(frames.names)},
        **sizes,
    }


def measure_plain(folder: Path, scratch: Path) -> Figures:
    """The same by a loop over recordings, from some of them; by rows, which is what takes time."""
    import reference

    rec = load(folder, scratch)
    some = np.random.default_rng(0).choice(len(rec), min(SAMPLE, len(rec)), replace=False)
    reference.features(rec, int(some[0]))  # what is loaded on first use does not count
    began, cpu = time.perf_counter(), time.process_time()
    for i in some:
        reference.features(rec, int(i))
        reference.channels(rec, int(i))
    secs, cpu = time.perf_counter() - began, time.process_time() - cpu
    share = float(np.diff(rec.start)[some].sum()) / len(rec.acc)
    return {"plain_s": secs / share, "plain_cpu_s": cpu / share}


def measure_cached(folder: Path, scratch: Path) -> Figures:
    """Recordings as every run gets them: read and cached the first time, then from the cache."""
    built = not (scratch / "checkpoints").exists()
    began = time.perf_counter()
    cmi.cached_recordings(folder, cmi.Config(ckpt_base_dir=scratch / "checkpoints"))
    return {"read_and_cache_s" if built else "cached_s": time.perf_counter() - began}


MEASURES: dict[str, Callable[[Path, Path], Figures]] = {
    "csv": measure_csv,
    "ours": measure_ours,
    "plain": measure_plain,
    "cached": measure_cached,
}


def elsewhere(what: str, folder: Path, scratch: Path) -> Figures:
    """A measure in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, str(folder), str(scratch)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---- the part ----------------------------------------------------------------------------------


def best_figures(folder: Path) -> Figures:
    """Each measure's least time; whatever else runs on the machine only ever adds to it."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        elsewhere("ours", folder, scratch)  # reads, and leaves the arrays
        runs = [elsewhere(w, folder, scratch) for _ in range(REPEATS) for w in ("csv", "ours")]
        runs += [elsewhere("cached", folder, scratch) for _ in range(1 + REPEATS)]
        runs.append(elsewhere("plain", folder, scratch))
    best: Figures = {}
    for figures in runs:
        for key, value in figures.items():
            timed = key.endswith(("_s", "_ms")) and key in best
            best[key] = min(value, best[key]) if timed else value
    return best


def features() -> list[Row]:
    """Canonical form, table and frames of a whole train.csv, in both modes."""
    named = os.environ.get("CMI_BENCHMARK_TRAIN")
    f = best_figures(Path(named).absolute() if named else simulated_folder(81, None))
    all_of = f"canonical form, table and frames of {f['recordings']:,.0f} recordings, both modes"
    cpu, loop = "processor time", f"a loop with scipy (from {SAMPLE})"
    sizes = f"{f['features']:.0f} features, {f['features_imu']:.0f} of them imu, {f['channels']:.0f} channels"
    return [
        Row(f"{all_of}, against pl.read_csv of the file", f["ours_s"], f["csv_s"], "s"),
        Row(f"{all_of}, against pl.read_csv, {cpu}", f["ours_cpu_s"], f["csv_cpu_s"], "s"),
        Row(f"{all_of}, against {loop}", f["ours_s"], f["plain_s"], "s"),
        Row(f"{all_of}, against {loop}, {cpu}", f["ours_cpu_s"], f["plain_cpu_s"], "s"),
        Row(f"rows of the file: {sizes}", f["rows"] / f["ours_s"], None, "rows/s"),
        Row("peak memory, recordings included", f["peak_gb"], None, "GB"),
        Row("table of one recording", f["table_of_one_ms"], None, "ms"),
        Row("frames of one recording", f["frames_of_one_ms"], None, "ms"),
        Row("recordings at the second start, from the cache, against the first, from train.csv",
            f["cached_s"], f["read_and_cache_s"], "s"),
    ]  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(MEASURES[sys.argv[2]](Path(sys.argv[3]), Path(sys.argv[4]))))
    else:
        if sys.argv[1:]:
            os.environ["CMI_BENCHMARK_TRAIN"] = sys.argv[1]
        sys.exit(report({"features": features}))
