"""How fast the Keras member answers, how its memory behaves, and what it scores.

    python tests/benchmark_keras.py             # all of it, more than an hour on two cores
    python tests/benchmark_keras.py --serving   # only the serving figures, about a minute
    python tests/benchmark_keras.py --training  # only the score, ten minutes
    python tests/benchmark_keras.py --defaults  # what one other setting at a time scores, an hour

Latency is of one recording of 90 rows through five networks in one compiled function, against
the same networks called one after the other, and against Keras's own predict.
"""

import dataclasses
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measured import SCORE, Part, Row, cmi, medians, report, simulated, turns

NETWORKS, CALLS, EPOCHS, LONG = 5, 3000, 12, 25
FOLDS, USED_FOLDS = 3, 2
SIZE = (24, 51)  # subjects and recordings of each that the scores are of
SCORED = cmi.Config(n_folds=FOLDS, keras_max_epochs=EPOCHS)
SEEDS = (0, 1)


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
    cmi.keras_quietly(cfg.keras_threads)
    rec = simulated(2, 51)
    frames, labels = cmi.make_frames(rec), rec.labels
    assert labels is not None
    table = tuple(tuple(row) for row in labels.table.tolist())
    spec = cmi.KerasSpec(frames.groups, table, cfg.fixed_pad_len, cfg.keras_width, 0.2)
    with tempfile.TemporaryDirectory() as folder:
        stems = [f"fold{k:02d}" for k in range(NETWORKS)]
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
    what = f"one recording through {NETWORKS} networks"
    return [
        Row(f"{what}, p50, against calls one after the other", p50, loop, "ms"),
        Row(f"{what}, p50, against Keras's predict", p50, own, "ms"),
        Row(f"{what}, p95", p95, None, "ms"),
        Row(f"loading {NETWORKS} networks and the first answer", ready, None, "s"),
        Row(f"resident memory grown in {CALLS:,} answers", growth_mb(model, ones), None, "MB"),
    ]


def trained(
    rec: cmi.Recordings, frames: cmi.Frames, mode: str, cfg: cmi.Config, used: int
) -> tuple[float, float]:
    """Out-of-fold score of one network in each of the first folds, and the seconds of their training."""
    labels, fold = rec.labels, cmi.make_folds(rec.subject, cfg)
    assert labels is not None
    x, answer = frames.of_mode(mode), np.full(len(frames), -1)
    known, secs = fold < used, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for k in range(used):
            job = job_of(Path(folder), mode, fold, k)
            began = time.perf_counter()
            cmi.fit_keras(job, x, labels, cfg)
            secs += time.perf_counter() - began
            model = cmi.load_keras(job.folder, [job.stem], labels.table, cfg)
            proba = cmi.predict_keras(model, x.take(job.valid))[0]
            answer[job.valid] = cmi.gesture_proba(proba, labels.table).argmax(axis=1)
    return cmi.score(labels.gesture[known], answer[known]), secs


def keras_training() -> list[Row]:
    """Out-of-fold score in both modes: few epochs, otherwise the defaults."""
    rec, out = simulated(*SIZE), []
    frames = cmi.make_frames(rec)
    for mode in cmi.MODES:
        score, secs = trained(rec, frames, mode, SCORED, USED_FOLDS)
        what = f"{mode}, {USED_FOLDS} of {FOLDS} folds, {EPOCHS} epochs"
        out.append(Row(f"score {what}", score, None, SCORE))
        out.append(Row(f"training {what}", secs, None, "s"))
    return out


VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "learning rate .001": {"keras_lr": 0.001},
    "patience 3 and 2": {"keras_es_patience": 3, "keras_rlr_patience": 2},
    "a fixed number of epochs": {"keras_es_patience": 0},
    "no augmentation": {"keras_augment": False},
}


def keras_defaults() -> list[Row]:
    """What one other setting at a time scores, mean of both modes, a fold of other subjects each seed."""
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in SEEDS:
        rec = simulated(*SIZE, seed)
        frames = cmi.make_frames(rec)
        for name, changes in VARIANTS.items():
            cfg = dataclasses.replace(SCORED, seed=seed, keras_max_epochs=LONG, **changes)
            scores = [trained(rec, frames, mode, cfg, 1)[0] for mode in cmi.MODES]
            found[name].append(float(np.mean(scores)))
            cmi.log("scored", seed=seed, settings=name, mixed=found[name][-1])
    means = {name: float(np.mean(scores)) for name, scores in found.items()}
    ours, what = means.pop("as it is"), f"mixed, one of {FOLDS} folds, mean of {len(SEEDS)} seeds"
    return [
        Row(f"score {what}, against {name}", ours, plain, SCORE) for name, plain in means.items()
    ]


PARTS: dict[str, Part] = {
    "keras_serving": keras_serving, "keras_training": keras_training, "keras_defaults": keras_defaults,
}  # fmt: skip

if __name__ == "__main__":
    chosen = [name for name in PARTS if f"--{name.removeprefix('keras_')}" in sys.argv] or [*PARTS]
    sys.exit(report({name: PARTS[name] for name in chosen}))
