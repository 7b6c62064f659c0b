"""How fast the Keras member answers, how its memory behaves, and what it scores.

    python tests/benchmark_keras.py            # about ten minutes on two cores
    python tests/benchmark_keras.py --serving  # only the serving figures, about a minute

Latency is of one recording of 90 rows through five networks in one compiled function, against
the same networks called one after the other, and against Keras's own predict.
"""

import gc
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measured import SCORE, Row, cmi, medians, report, simulated, turns

FOLDS, CALLS, EPOCHS = 5, 3000, 12
SIZE = (24, 51)  # subjects and recordings of each that the scores are of


def job_of(folder: Path, mode: str, fold: cmi.I64, k: int) -> cmi.Job:
    """Fold k in a folder of its own."""
    return cmi.Job(
        "keras", mode, 0, k, np.flatnonzero(fold != k), np.flatnonzero(fold == k),
        folder / "keras_models" / mode, folder / "checkpoints" / mode, folder / "logs",
    )  # fmt: skip


def resident_mb() -> float:
    """Memory that this process holds now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("VmRSS is not in /proc/self/status")


def growth_mb(model: cmi.KerasEnsemble, ones: list[cmi.Frames]) -> float:
    """What thousands of answers leave in memory."""
    gc.collect()
    before = resident_mb()
    for i in range(CALLS):
        cmi.predict_keras(model, ones[i % len(ones)])
    gc.collect()
    return resident_mb() - before


def keras_serving() -> list[Row]:
    """Five untrained networks of the default width on all sensors, written and read as usual."""
    cfg = cmi.Config()
    cmi.keras_quietly(cfg.threads)
    rec = simulated(2, 51)
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
    ours = turns(lambda: cmi.predict_keras(model, ones[7]), repeats=300)[:, 0]
    loop, own = medians(
        lambda: [np.asarray(net(rows, training=False)) for net in networks],
        lambda: [net.predict(rows, verbose=0) for net in networks],
        repeats=10,
    )
    p50, p95 = np.quantile(ours, (0.5, 0.95)).tolist()
    what = f"one recording through {FOLDS} networks"
    return [
        Row(f"{what}, p50, against calls one after the other", p50, loop, "ms"),
        Row(f"{what}, p50, against Keras's predict", p50, own, "ms"),
        Row(f"{what}, p95", p95, None, "ms"),
        Row(f"loading {FOLDS} networks and the first answer", ready, None, "s"),
        Row(f"resident memory grown in {CALLS:,} answers", growth_mb(model, ones), None, "MB"),
    ]


def keras_training() -> list[Row]:
    """Out-of-fold score in both modes: few epochs, otherwise the defaults."""
    cfg = cmi.Config(n_folds=3, keras_max_epochs=EPOCHS)
    rec = simulated(*SIZE)
    frames, labels, fold = cmi.make_frames(rec), rec.labels, cmi.make_folds(rec.subject, cfg)
    assert labels is not None
    out: list[Row] = []
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
        secs = time.perf_counter() - began
        what = f"{mode}, {cfg.n_folds} folds, {EPOCHS} epochs"
        out.append(Row(f"score {what}", cmi.score(labels.gesture, answer), None, SCORE))
        out.append(Row(f"training {what}", secs, None, "s"))
    return out


if __name__ == "__main__":
    serving_only = {"keras_serving": keras_serving}
    sys.exit(
        report(
            serving_only
            if "--serving" in sys.argv
            else serving_only | {"keras_training": keras_training}
        )
    )
