"""How fast tables and frames are made: against `pl.read_csv`, and against a plain loop with scipy.

    python tests/benchmark_features.py [FOLDER]     # with a train.csv; without, one is simulated

Each figure comes from a process of its own, in turns, and the best of three counts. Only the
ratios mean anything on another machine; on a busy one, those of processor time do.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAMPLE = 60  # recordings of which the plain loop is timed
ARRAYS = ("start", "acc", "rot", "thm", "tof", "sequence_id", "subject", "person")


def measure_csv(folder: Path, _scratch: Path) -> dict[str, float]:
    import polars as pl

    began, cpu = time.perf_counter(), time.process_time()
    frame = pl.read_csv(folder / "train.csv")
    secs = {"csv_s": time.perf_counter() - began, "csv_cpu_s": time.process_time() - cpu}
    return secs | {"rows": len(frame), "columns": frame.width}


def measure_ours(folder: Path, scratch: Path) -> dict[str, float]:
    import resource

    import numpy as np

    import cmi_pipeline as cmi

    rec = load(folder, scratch)
    began, cpu = time.perf_counter(), time.process_time()
    ours = cmi.canonical(rec, np.zeros(len(rec), bool))
    table = cmi.feature_table(ours)
    half = time.perf_counter()
    frames = cmi.make_frames(ours)
    narrow = table.of_mode("imu"), frames.of_mode("imu")
    end, cpu = time.perf_counter(), time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    one = ours.part(0, 1)
    sizes = {"features": len(table.names), "features_imu": len(narrow[0].names)}
    return {
        **{"table_s": half - began, "frames_s": end - half, "ours_s": end - began},
        **{"ours_cpu_s": cpu, "peak_gb": peak},
        **{"recordings": len(rec), **sizes, "channels": len(frames.names)},
        "table_of_one_ms": 1e3 * median_time(lambda: cmi.feature_table(one)),
        "frames_of_one_ms": 1e3 * median_time(lambda: cmi.make_frames(one)),
    }


def measure_plain(folder: Path, scratch: Path) -> dict[str, float]:
    import numpy as np
    import reference

    rec = load(folder, scratch)
    some = np.random.default_rng(0).choice(len(rec), min(SAMPLE, len(rec)), replace=False)
    reference.features(rec, int(some[0]))  # what is loaded on first use does not count
    began = time.perf_counter()
    for i in some:
        reference.features(rec, int(i))
        reference.channels(rec, int(i))
    secs = time.perf_counter() - began
    return {"plain_s": secs * len(rec.acc) / float(np.diff(rec.start)[some].sum())}


def measure_cached(folder: Path, scratch: Path) -> dict[str, float]:
    """Recordings as every run gets them: read and cached the first time, from the cache after that."""
    import cmi_pipeline as cmi

    built = not (scratch / "checkpoints").exists()
    began = time.perf_counter()
    cmi.cached_recordings(folder, cmi.Config(ckpt_base_dir=scratch / "checkpoints"))
    return {"read_and_cache_s" if built else "cached_s": time.perf_counter() - began}


MEASURES = {
    "csv": measure_csv,
    "ours": measure_ours,
    "plain": measure_plain,
    "cached": measure_cached,
}


def load(folder: Path, scratch: Path):  # type: ignore[no-untyped-def]
    """The recordings; from plain arrays in `scratch` after the first time."""
    import numpy as np

    import cmi_pipeline as cmi

    path = scratch / "recordings.npz"
    if not path.exists():
        rec = cmi.read_train(folder)
        np.savez(path, **{n: getattr(rec, n) for n in ARRAYS})
    with np.load(path) as saved:
        return cmi.Recordings(**{n: saved[n] for n in ARRAYS})


def median_time(work: Callable[[], object], repeats: int = 101) -> float:
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return sorted(took)[repeats // 2]


def elsewhere(what: str, folder: Path, scratch: Path) -> dict[str, float]:
    """A measure in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, str(folder), str(scratch)]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def run(folder: Path | None = None, repeats: int = 3) -> dict[str, float]:
    """All figures; simulates the full size if there is no folder."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if folder is None:
            folder = scratch / "simulated"
            size = ("--subjects", "81", "--test-subjects", "2", "--seed", "1")
            subprocess.run([sys.executable, ROOT / "cmi_simulator.py", folder, *size], check=True)
        elsewhere("ours", folder, scratch)  # reads, and leaves the arrays
        runs = [elsewhere(w, folder, scratch) for _ in range(repeats) for w in ("csv", "ours")]
        runs += [elsewhere("cached", folder, scratch) for _ in range(1 + repeats)]
        runs.append(elsewhere("plain", folder, scratch))
    out: dict[str, float] = {}
    for figures in runs:
        for key, value in figures.items():
            out[key] = min(value, out[key]) if key.endswith(("_s", "_ms")) and key in out else value
    out["rows_per_s"] = out["rows"] / out["ours_s"]
    out["ours_to_csv"] = out["ours_s"] / out["csv_s"]
    out["ours_to_csv_in_processor_time"] = out["ours_cpu_s"] / out["csv_cpu_s"]
    out["times_faster_than_plain"] = out["plain_s"] / out["ours_s"]
    return out


def report(figures: dict[str, float]) -> None:
    for key, value in figures.items():
        print(f"{key:32s}{value:14,.3f}" if value % 1 else f"{key:32s}{value:10,.0f}")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(MEASURES[sys.argv[2]](Path(sys.argv[3]), Path(sys.argv[4]))))
    else:
        report(run(Path(sys.argv[1]) if sys.argv[1:] else None))
