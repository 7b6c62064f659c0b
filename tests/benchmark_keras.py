"""How fast the Keras member answers, how its memory behaves, and what it scores.

    python tests/benchmark_keras.py            # about ten minutes on two cores
    python tests/benchmark_keras.py --serving  # only the serving figures, about a minute

Latency is of one recording of 90 rows through five networks in one compiled function, against
the same networks called one after the other, and against Keras's own predict.
"""

import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

import cmi_pipeline as cmi  # noqa: E402

FOLDS, CALLS = 5, 3000


def simulated(subjects: int, recordings: int) -> cmi.Recordings:
    """Canonical simulated recordings; no wearer of them is upside down to the simulator's knowledge."""
    import cmi_simulator

    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--subjects", str(subjects), "--recordings", str(recordings)]
        cmi_simulator.main([folder, *sizes, "--test-subjects", "1", "--seed", "1"])
        rec = cmi.read_train(Path(folder))
    return cmi.canonical(rec, np.zeros(len(rec), bool))


def job_of(folder: Path, mode: str, fold: cmi.I64, k: int) -> cmi.Job:
    return cmi.Job(
        "keras", mode, 0, k, np.flatnonzero(fold != k), np.flatnonzero(fold == k),
        folder / "keras_models" / mode, folder / "checkpoints" / mode, folder / "logs",
    )  # fmt: skip


def resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("VmRSS is not in /proc/self/status")


def milliseconds(call: Any, repeats: int) -> tuple[float, float]:
    """Median and 95th percentile of a call."""
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        took.append(1e3 * (time.perf_counter() - began))
    return float(np.median(took)), float(np.quantile(took, 0.95))


def serving() -> dict[str, float]:
    """Five untrained networks of the default width on all sensors, written and read as real ones."""
    cfg = cmi.Config()
    _, keras = cmi.keras_quietly(cfg.threads)
    rec = simulated(subjects=2, recordings=51)
    frames, labels = cmi.make_frames(rec), rec.labels
    assert labels is not None
    table = tuple(tuple(row) for row in labels.table.tolist())
    spec = cmi.KerasSpec(frames.groups, table, cfg.fixed_pad_len, cfg.keras_width, 0.2)
    with tempfile.TemporaryDirectory() as folder:
        stems = [f"fold{k:02d}" for k in range(FOLDS)]
        networks = [cmi.keras_network(spec) for _ in stems]
        for stem, network in zip(stems, networks, strict=True):
            network.save(Path(folder) / f"{stem}.keras")
        began = time.perf_counter()
        model = cmi.load_keras(Path(folder), stems, labels.table, cfg)
        ones = [frames.take(np.array([i])) for i in range(len(frames))]
        cmi.predict_keras(model, ones[0])
        ready = time.perf_counter() - began
    rows = cmi.padded_rows(frames, np.array([0]), spec.rows)
    together, together95 = milliseconds(lambda: cmi.predict_keras(model, ones[7]), 300)
    loop, _ = milliseconds(lambda: [np.asarray(net(rows, training=False)) for net in networks], 10)
    networks[0].predict(rows, verbose=0)
    own, _ = milliseconds(lambda: networks[0].predict(rows, verbose=0), 10)
    gc.collect()
    before = resident_mb()
    for i in range(CALLS):
        cmi.predict_keras(model, ones[i % len(ones)])
    gc.collect()
    return {
        "seconds_to_first_answer": ready, "ms": together, "ms_95th": together95, "ms_plain_loop": loop,
        "ms_keras_predict": FOLDS * own, "mb_grown_in_3000_calls": resident_mb() - before,
        "keras": float(".".join(keras.__version__.split(".")[:2])),
    }  # fmt: skip


def training(epochs: int = 12) -> dict[str, float]:
    """Out-of-fold score in both modes, with the demo's number of epochs and otherwise the defaults."""
    cfg = cmi.Config(n_folds=3, keras_max_epochs=epochs)
    rec = simulated(subjects=24, recordings=51)
    frames, labels, fold = cmi.make_frames(rec), rec.labels, cmi.make_folds(rec.subject, cfg)
    assert labels is not None
    found: dict[str, float] = {}
    for mode in cmi.MODES:
        x, answer = frames.of_mode(mode), np.full(len(frames), -1)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            for k in range(cfg.n_folds):
                job = job_of(Path(folder), mode, fold, k)
                cmi.fit_keras(job, x, labels, cfg)
                model = cmi.load_keras(job.folder, [job.stem], labels.table, cfg)
                proba = cmi.predict_keras(model, x.take(job.valid))[0]
                answer[job.valid] = cmi.gesture_proba(proba, labels.table).argmax(axis=1)
        found[f"score_{mode}"] = cmi.score(labels.gesture, answer)
        found[f"seconds_{mode}"] = time.perf_counter() - began
    return found


def run(*, only_serving: bool = False) -> dict[str, float]:
    figures = serving() | ({} if only_serving else training())
    for name, value in figures.items():
        print(f"{name:<26} {value:10.3f}")
    return figures


if __name__ == "__main__":
    print(json.dumps(run(only_serving="--serving" in sys.argv)))
