"""Every figure that README quotes, with its plain counterpart measured in the same run.

    python tests/benchmark.py                 # all parts, on simulated data; writes benchmark.json
    python tests/benchmark.py search boosting # some parts

Times are medians on whatever machine this is; compare the ratios. Scores are of simulated data.
"""

import argparse
import collections
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import cmi_pipeline as cmi  # noqa: E402
import cmi_simulator  # noqa: E402

Row = tuple[str, float, str]  # what, value, unit
CACHE = Path(os.environ.get("CMI_BENCHMARK_DIR", "/tmp/cmi_benchmark"))


def median_ms(call: Callable[[], object], n: int = 50) -> float:
    call()
    times = []
    for _ in range(n):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times) * 1e3)


def study_of(subjects: int, recordings: int, cfg: cmi.Config, seed: int = 1) -> cmi.Study:
    """Simulated recordings as the pipeline sees them."""
    folder = CACHE / f"{subjects}x{recordings}-{seed}"
    if not (folder / "test.csv").exists():
        cmi_simulator.simulate(
            folder, subjects=subjects, test_subjects=2, recordings_per_subject=recordings, seed=seed
        )
    settled = cmi.dataclasses.replace(
        cfg, cmi_data_dir=folder, output_path=CACHE / f"out-{folder.name}-{cfg.n_folds}"
    )
    settled.out.mkdir(parents=True, exist_ok=True)
    return cmi.make_study(settled)


# ---- parts -------------------------------------------------------------------------------------


def start() -> list[Row]:
    """Importing the file, beside importing what it needs anyway."""

    def seconds(code: str) -> float:
        runs = []
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, check=True)
            runs.append(time.perf_counter() - began)
        return float(np.median(runs))

    base = seconds("import numpy, polars")
    return [
        ("import numpy, polars", base, "s"),
        ("import cmi_pipeline, beyond that", seconds("import cmi_pipeline") - base, "s"),
    ]


def search() -> list[Row]:
    """1,024 weightings of 3 members on 8,151 recordings, all at once and one by one."""
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    truth = rng.integers(0, 18, 8151)
    proba = rng.dirichlet(np.ones(18), (3, 8151)).astype(np.float32)
    weights = rng.dirichlet(np.ones(3), 1024)
    began = time.perf_counter()
    fast = cmi.scores_of_weights(weights, proba, truth)
    secs = time.perf_counter() - began

    def plain(w: np.ndarray) -> float:
        answer = np.tensordot(w, proba, axes=1).argmax(axis=1)
        t, p = np.minimum(truth, 8), np.minimum(answer, 8)
        binary = f1_score(t < 8, p < 8, zero_division=0)
        return 0.5 * binary + 0.5 * f1_score(t, p, average="macro", zero_division=0)

    began = time.perf_counter()
    slow = [plain(w) for w in weights[:16]]
    loop = (time.perf_counter() - began) / 16 * 1024
    np.testing.assert_allclose(fast[:16], slow, atol=1e-9)
    return [
        ("1,024 weightings at once", secs, "s"),
        ("one by one, scikit-learn (from 16)", loop, "s"),
        ("ratio", loop / secs, "×"),
    ]


def boosters(n_folds: int = 5, rounds: int = 300) -> tuple[cmi.LgbmModel, cmi.F64]:
    """LightGBM folds of the size that the issue names, on random features, and one row."""
    import lightgbm as lgb

    rng = np.random.default_rng(0)
    y = rng.integers(0, 18, 1500)
    x = rng.normal(size=(1500, 300)).astype(np.float32) + 0.1 * y[:, None] * rng.normal(size=300)
    names = [f"f{i}" for i in range(300)]
    folder = CACHE / "boosters"
    for k in range(n_folds):
        for end, n_classes, n_rounds in (
            ("", 18, rounds),
            ("_orientation", 4, 60),
            ("_behavior", 4, 60),
        ):
            params = cmi.lgbm_params(cmi.Config(), n_classes, len(x), k)
            booster = lgb.train(params, lgb.Dataset(x, y % n_classes, feature_name=names), n_rounds)
            cmi.write_whole(folder / f"fold{k:02d}{end}.txt", booster.model_to_string())
    stems = [f"fold{k:02d}" for k in range(n_folds)]
    return cmi.load_lgbm(
        folder, stems, np.array([[0, 0, g] for g in range(18)]), cmi.Config()
    ), np.float64(x[:1])


def boosting() -> list[Row]:
    """One recording through 5 folds × 300 rounds × 18 classes, plainly and with all trees at once."""
    model, row = boosters()
    plain = cmi.dataclasses.replace(model, forest=None)
    slow, fast = median_ms(lambda: plain.proba(row)), median_ms(lambda: model.proba(row))
    one_thread = median_ms(
        lambda: [b.predict(row, num_threads=1) for f in model.boosters for b in f]
    )
    gap = max(np.abs(a - b).max() for a, b in zip(plain.proba(row), model.proba(row), strict=True))
    return [("plain calls", slow, "ms"), ("plain calls, one thread", one_thread, "ms"), ("all trees at once", fast, "ms"),
            ("ratio", slow / fast, "×"), ("largest difference", float(gap), "")]  # fmt: skip


def fold_scores(
    study: cmi.Study, table: cmi.Table, cfg: cmi.Config, mode: str
) -> tuple[float, float]:
    """Out-of-fold score and seconds of LightGBM on a table."""
    began = time.perf_counter()
    reached = taught_and_asked(study, table, table, cfg, mode)
    return reached, time.perf_counter() - began


def plain_table(rec: cmi.Recordings) -> cmi.Table:
    """108 statistics of acceleration and rotation: what a first notebook computes."""
    raw = np.c_[
        rec.acc,
        rec.rot,
        np.linalg.norm(rec.acc, axis=1),
        np.linalg.norm(np.nan_to_num(rec.rot[:, 1:]), axis=1),
    ]
    rows = []
    for a, b in zip(rec.start[:-1], rec.start[1:], strict=True):
        x = np.nan_to_num(raw[a:b])
        d = np.abs(np.diff(x, axis=0)) if b - a > 1 else np.zeros((1, 9))
        quartiles = np.quantile(x, (0.25, 0.5, 0.75), axis=0)
        rows.append(
            np.r_[
                x.mean(0),
                x.std(0),
                x.min(0),
                x.max(0),
                *quartiles,
                x[0],
                x[-1],
                x[-1] - x[0],
                d.mean(0),
                d.max(0),
            ]
        )
    x = np.array(rows, np.float32)
    assert x.shape[1] == 108
    return cmi.Table(
        tuple(f"s{i}" for i in range(108)),
        x,
        np.zeros(108, np.uint8),
        np.full(108, np.nan, np.float32),
    )


def baseline() -> list[Row]:
    """LightGBM in IMU mode: 108 statistics against our table, same folds; and the K best of it."""
    out: list[Row] = []
    for seed in (1, 2):
        cfg = cmi.Config(
            output_path=CACHE / f"baseline-{seed}",
            seed=seed,
            n_folds=4,
            lgbm_rounds=400,
            lgbm_lr=0.05,
        )
        study = study_of(24, 51, cfg, seed)
        ours = study.inputs.table.of_mode("imu")
        for name, table in (
            ("108 statistics", plain_table(study.inputs.rec)),
            (f"our {len(ours.names)} features", ours),
        ):
            reached, secs = fold_scores(study, table, cfg, "imu")
            out += [(f"IMU score, {name}, seed {seed}", reached, ""), ("  seconds", secs, "s")]
        for k in (100, 300, 500):
            reached, secs = fold_scores(
                study, ours, cmi.dataclasses.replace(cfg, lgbm_top_features=k), "imu"
            )
            out += [(f"IMU score, best {k}, seed {seed}", reached, ""), ("  seconds", secs, "s")]
    return out


def stopping() -> list[Row]:
    """What early stopping should watch, scored on subjects that it never saw."""
    out: list[Row] = []
    for metric in ("logloss", "score", "all rounds"):
        reached = []
        for seed in (1, 2, 3):
            rounds = {"lgbm_es_rounds": 0} if metric == "all rounds" else {"lgbm_es_metric": metric}
            cfg = cmi.Config(
                output_path=CACHE / f"stopping-{seed}",
                seed=seed,
                n_folds=4,
                lgbm_rounds=500,
                lgbm_lr=0.05,
                **rounds,
            )
            study = study_of(24, 51, cfg, seed)
            reached.append(fresh_score(study, cfg))
        out += [
            (f"IMU score on unseen subjects, {metric}", float(np.mean(reached)), ""),
            ("  spread over 3 seeds", float(np.std(reached)), ""),
        ]
    return out


def fresh_score(study: cmi.Study, cfg: cmi.Config) -> float:
    """Train without a fold, stop on half of its subjects, score the other half; mean of both ways."""
    table, scores = study.inputs.table.of_mode("imu"), []
    for job in study.jobs("lgbm", "imu", cfg)[:2]:
        names = np.unique(study.inputs.rec.subject[job.valid])
        first = np.isin(study.inputs.rec.subject, names[: len(names) // 2])
        watch, judge = job.valid[first[job.valid]], job.valid[~first[job.valid]]
        inner = cmi.dataclasses.replace(job, valid=watch)
        job.folder.mkdir(parents=True, exist_ok=True)
        cmi.fit_lgbm(inner, table, study.labels, cfg)
        scores.append(
            cmi.score(study.labels.gesture[judge], answers(job, table.take(judge), study, cfg))
        )
    return float(np.mean(scores))


def rotation() -> list[Row]:
    """LightGBM, IMU: recordings without rotation, by members as they are, by ones whose training
    recordings lost theirs in part, and by ones that never saw any."""
    reached = collections.defaultdict[str, list[float]](list)
    for seed in (1, 2):
        cfg = cmi.Config(
            output_path=CACHE / f"rotation-{seed}",
            seed=seed,
            n_folds=4,
            lgbm_rounds=300,
            lgbm_lr=0.05,
        )
        study = study_of(24, 51, cfg, seed)
        rec = study.inputs.rec
        blind = cmi.dataclasses.replace(rec, rot=np.full_like(rec.rot, np.nan))
        whole, without = (cmi.feature_table(r).of_mode("imu") for r in (rec, blind))
        for name, share in (
            ("as they are", 0.0),
            ("15 % lost theirs", 0.15),
            ("never saw any", 1.0),
        ):
            lost = np.random.default_rng(seed).random(len(rec)) < share
            mixed = cmi.dataclasses.replace(whole, x=np.where(lost[:, None], without.x, whole.x))
            for asked, judged in (("without", without), ("with", whole)):
                if share < 1 or asked == "without":
                    score = taught_and_asked(study, mixed, judged, cfg)
                    reached[f"members {name}, asked {asked} rotation"].append(score)
    return [(what, float(np.mean(values)), "") for what, values in reached.items()]


def taught_and_asked(
    study: cmi.Study, taught: cmi.Table, asked: cmi.Table, cfg: cmi.Config, mode: str = "imu"
) -> float:
    """Out-of-fold score of LightGBM that learns from one table and answers from another."""
    answer = np.empty(len(study.fold), np.int64)
    for job in study.jobs("lgbm", mode, cfg):
        job.folder.mkdir(parents=True, exist_ok=True)
        cmi.fit_lgbm(job, taught, study.labels, cfg)
        answer[job.valid] = answers(job, asked.take(job.valid), study, cfg)
    return cmi.score(study.labels.gesture, answer)


def answers(job: cmi.Job, table: cmi.Table, study: cmi.Study, cfg: cmi.Config) -> cmi.I64:
    """Gestures by the model of one job. → (N)"""
    model = cmi.load_lgbm(job.folder, [job.stem], study.labels.table, cfg)
    proba = cmi.gesture_proba(cmi.predict_lgbm(model, table)[0], study.labels.table)
    return proba.argmax(axis=1)


def wearer() -> list[Row]:
    """The detector of devices worn upside down, on subjects left out of its training, and what
    turning them back gains in score (LightGBM, all sensors, on the wearers that were turned)."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for seed in (1, 2, 3):
        cfg = cmi.Config(
            output_path=CACHE / f"wearer-{seed}", seed=seed, n_folds=4, lgbm_rounds=150, lgbm_lr=0.1
        )
        study = study_of(24, 51, cfg, seed)
        rec, names = study.inputs.rec, np.unique(study.inputs.rec.subject)
        fold, right = study.fold, np.zeros(len(study.fold), bool)
        evidence = np.zeros(len(names))  # of three recordings, that the device is the right way up
        odd = cmi.odd_features(rec)
        for k in range(cfg.n_folds):
            model = cmi.fit_wearer(odd[fold != k])
            right[fold == k] = odd[fold == k] @ model["coefficients"] > 0
        prior = float(np.log(len(names) + 1))
        for i, name in enumerate(names):
            own = np.flatnonzero(rec.subject == name)[:3]
            model = cmi.fit_wearer(odd[fold != fold[own[0]]])
            evidence[i] = (odd[own] @ model["coefficients"]).sum()
        found["recordings told right, alone"].append(right.mean())
        recall, alarm = (evidence > prior).mean(), (evidence < -prior).mean()  # antisymmetric
        found["recall of turned subjects after three recordings"].append(recall)
        found["upright subjects taken for turned by then"].append(alarm)
        found["precision, if 2 of 81 are turned"].append(2 * recall / (2 * recall + 79 * alarm))
        turned = cmi.turned_back(rec, np.ones(len(rec), bool))  # everybody the wrong way round
        whole, wrong = cmi.feature_table(rec), cmi.feature_table(turned)
        found["score, right way round"].append(taught_and_asked(study, whole, whole, cfg, "all"))
        found["score, upside down and not noticed"].append(
            taught_and_asked(study, whole, wrong, cfg, "all")
        )
    return [(what, float(np.mean(values)), "") for what, values in found.items()]


def serving() -> list[Row]:
    """predict() of all members × 5 folds × 2 modes on simulated test recordings, after `python cmi_pipeline.py`."""
    import polars as pl

    out = Path(os.environ.get("CMI_BENCHMARK_BUNDLE", "cmi_output")).absolute()
    data = next(out.glob("simulated-*"))
    predictor = cmi.Predictor(cmi.Config(output_path=out, strict=True))
    test = pl.read_csv(data / "test.csv", infer_schema_length=None)
    person = pl.read_csv(data / "test_demographics.csv")
    times = []
    for _, part in test.group_by("sequence_id", maintain_order=True):
        own = person.filter(pl.col("subject") == part["subject"][0])
        began = time.perf_counter()
        predictor.predict(part, own)
        times.append(time.perf_counter() - began)
    first, rest = times[0], np.array(times[1:]) * 1e3
    assert predictor.served is not None
    return [(f"first call, loads {len(predictor.served.models)} models", first, "s"), ("p50", float(np.median(rest)), "ms"),
            ("p95", float(np.percentile(rest, 95)), "ms"), ("recordings", len(times), "")]  # fmt: skip


PARTS: dict[str, Callable[[], list[Row]]] = {
    f.__name__: f for f in (start, search, boosting, baseline, stopping, rotation, wearer, serving)
}
OWN_FILES = ("features", "torch", "keras")  # tests/benchmark_<name>.py print their own tables


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, *OWN_FILES, []], help="all if none is named"
    )
    chosen = parser.parse_args().parts or [*PARTS, *OWN_FILES]
    CACHE.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                               "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    for name in chosen:
        if name in OWN_FILES:
            results[name] = importlib.import_module(f"benchmark_{name}").run()
            continue
        rows = PARTS[name]()
        print(f"\n{name}: {PARTS[name].__doc__}")
        for what, value, unit in rows:
            print(f"  {what:<60} {value:10.4g} {unit}", flush=True)
        results[name] = [list(row) for row in rows]
    Path("benchmark.json").write_text(json.dumps(results, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
