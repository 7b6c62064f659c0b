"""Every figure that README quotes, with its plain counterpart measured in the same run.

    python tests/benchmark.py                 # all parts, some hours; writes benchmark.json
    python tests/benchmark.py --quick         # the speed figures, minutes
    python tests/benchmark.py search boosting # some parts; benchmark.json keeps the others

One table at the end: what benchmark.json holds by then, of this run and of earlier ones. Times are
of whatever machine this is; compare the ratios. Scores are of simulated data. CMI_BENCHMARK_DIR
names the folder for simulated recordings and models, /tmp/cmi_benchmark if unset.
"""

import argparse
import collections
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import benchmark_features
import benchmark_keras
import benchmark_machines
import benchmark_torch
import measured
import numpy as np
from measured import CACHE, ROOT, SCORE, Part, Row, cmi, medians

SIZE = (24, 51)  # subjects and recordings of each, of the parts that train LightGBM
SEEDS = (1, 2, 3)
BUNDLE = {"N_FOLDS": "5", "SIM_SUBJECTS": "10", "SIM_TEST_SUBJECTS": "2", "SIM_RECORDINGS": "40",
          "LGBM_ROUNDS": "60", "TORCH_MAX_EPOCHS": "2", "KERAS_MAX_EPOCHS": "2"}  # fmt: skip


# ---- speed -------------------------------------------------------------------------------------


def start() -> list[Row]:
    """Importing the file, beside importing what it needs anyway."""

    def imported(names: str) -> None:
        subprocess.run([sys.executable, "-c", f"import {names}"], cwd=ROOT, check=True)

    ours, plain = medians(
        lambda: imported("cmi_pipeline"), lambda: imported("numpy, polars"), repeats=7
    )
    return [
        Row("a process that imports cmi_pipeline, against one with numpy and polars alone",
            ours / 1e3, plain / 1e3, "s"),
        Row("importing cmi_pipeline, beyond numpy and polars", (ours - plain) / 1e3, None, "s"),
    ]  # fmt: skip


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
    what = "1,024 weightings of 3 members × 8,151 recordings, against scikit-learn (from 16)"
    return [Row(what, secs, loop, "s")]


def boosters(n_folds: int = 5, rounds: int = 300) -> tuple[cmi.LgbmModel, cmi.F64]:
    """LightGBM folds of the size that README quotes, on random features, and one row."""
    import lightgbm as lgb

    rng = np.random.default_rng(0)
    y = rng.integers(0, 18, 1500)
    x = rng.normal(size=(1500, 300)).astype(np.float32) + 0.1 * y[:, None] * rng.normal(size=300)
    names = [f"f{i}" for i in range(300)]
    folder, cfg = CACHE / "boosters", cmi.Config()
    models = (("", 18, rounds), ("_orientation", 4, 60), ("_behavior", 4, 60))
    for k in range(n_folds):
        for end, n_classes, n_rounds in models:
            params = cmi.lgbm_params(cfg, n_classes, len(x), k)
            booster = lgb.train(params, lgb.Dataset(x, y % n_classes, feature_name=names), n_rounds)
            cmi.write_whole(folder / f"fold{k:02d}{end}.txt", booster.model_to_string())
    stems = [f"fold{k:02d}" for k in range(n_folds)]
    table = np.array([[0, 0, g] for g in range(18)])
    (model,) = cmi.load_lgbm(folder, stems, table, cfg)
    return model, np.float64(x[:1])


def boosting() -> list[Row]:
    """One recording through 5 folds × 300 rounds × 18 classes, plainly and all trees at once."""
    model, row = boosters()
    plain = cmi.dataclasses.replace(model, forest=None)
    fast, slow, one_thread = medians(
        lambda: model.proba(row),
        lambda: plain.proba(row),
        lambda: [b.predict(row, num_threads=1) for f in model.boosters for b in f],
    )
    gap = max(np.abs(a - b).max() for a, b in zip(plain.proba(row), model.proba(row), strict=True))
    what = "one recording, 5 folds × 300 rounds × 18 classes"
    return [
        Row(f"{what}, against LightGBM's predict", fast, slow, "ms"),
        Row(f"{what}, against its predict on one thread", fast, one_thread, "ms"),
        Row(f"{what}, largest difference of a probability", float(gap)),
    ]


def bundle() -> Path:
    """Output folder of a short real run of this very pipeline; made once."""
    out = CACHE / f"bundle-{cmi.digest(Path(cmi.__file__).read_bytes(), BUNDLE)[:8]}"
    if not (out / "submission.parquet").exists():
        cmi.log("bundle", trains=out)
        measured.pipeline(out, BUNDLE)
    return out


def serving() -> list[Row]:
    """predict() of all members × 5 folds × 2 modes on simulated test recordings.

    CMI_BENCHMARK_BUNDLE names the output folder of a full run on simulated recordings. Without it a
    short one is made: few rounds and epochs, which shorten LightGBM's small share only.
    """
    import polars as pl

    out = Path(os.environ.get("CMI_BENCHMARK_BUNDLE") or bundle()).absolute()
    data = next(out.glob("simulated-*"), None)
    if data is None:
        raise FileNotFoundError(
            f"{out} holds no simulated-*: name the output of a run on simulated data"
        )
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
    what = f"predict, all members × 5 folds × 2 modes, {len(rest)} recordings"
    return [
        Row(f"{what}, p50", float(np.median(rest)), None, "ms"),
        Row(f"{what}, p95", float(np.percentile(rest, 95)), None, "ms"),
        Row(f"first call, loads {len(predictor.served.models)} models", first, None, "s"),
    ]


# ---- scores ------------------------------------------------------------------------------------


def small_study(
    part: str, seed: int, rounds: int, rate: float = 0.05, **changes: Any
) -> tuple[cmi.Study, cmi.Config]:
    """Simulated recordings as the pipeline sees them, and settings for short LightGBM training.

    The parts share what is derived from the recordings; each has a folder of its own for models.
    """
    cfg = cmi.Config(
        output_path=CACHE / f"{part}-{seed}", seed=seed, n_folds=4,
        lgbm_rounds=rounds, lgbm_lr=rate, **changes,
    )  # fmt: skip
    data = measured.simulated_folder(*SIZE, seed)
    out = CACHE / f"out-{data.name}"
    out.mkdir(parents=True, exist_ok=True)
    return cmi.make_study(cmi.dataclasses.replace(cfg, cmi_data_dir=data, output_path=out)), cfg


def answers(job: cmi.Job, table: cmi.Table, study: cmi.Study, cfg: cmi.Config) -> cmi.I64:
    """Gestures by the model of one job. → (N)"""
    model = cmi.load_lgbm(job.folder, [job.stem], study.labels.table, cfg)
    proba = cmi.gesture_proba(cmi.predict_lgbm(model, table)[0], study.labels.table)
    return proba.argmax(axis=1)


def taught_and_asked(
    study: cmi.Study, taught: cmi.Table, asked: cmi.Table, cfg: cmi.Config, mode: str = "imu"
) -> float:
    """Out-of-fold score of LightGBM that learns from one table and answers from another."""
    answer = np.full(len(study.fold), -1, np.int64)
    for job in study.jobs("lgbm", mode, cfg):
        job.folder.mkdir(parents=True, exist_ok=True)
        cmi.fit_lgbm(job, taught, study.labels, cfg)
        answer[job.valid] = answers(job, asked.take(job.valid), study, cfg)
    assert (answer >= 0).all()
    return cmi.score(study.labels.gesture, answer)


def plain_table(rec: cmi.Recordings) -> cmi.Table:
    """108 statistics of acceleration and rotation: what a first notebook computes."""
    sizes = [np.linalg.norm(x, axis=1) for x in (rec.acc, np.nan_to_num(rec.rot[:, 1:]))]
    raw = np.nan_to_num(np.c_[rec.acc, rec.rot, sizes[0], sizes[1]])
    rows = []
    for a, b in zip(rec.start[:-1], rec.start[1:], strict=True):
        x = raw[a:b]
        d = np.abs(np.diff(x, axis=0)) if b - a > 1 else np.zeros((1, 9))
        whole = (
            x.mean(0),
            x.std(0),
            x.min(0),
            x.max(0),
            *np.quantile(x, (0.25, 0.5, 0.75), axis=0),
        )
        rows.append(np.concatenate([*whole, x[0], x[-1], x[-1] - x[0], d.mean(0), d.max(0)]))
    x = np.array(rows, np.float32)
    assert x.shape[1] == 108
    names = tuple(f"s{i}" for i in range(108))
    return cmi.Table(names, x, np.zeros(108, np.uint8), np.full(108, np.nan, np.float32))


def baseline() -> list[Row]:
    """LightGBM in IMU mode: 108 statistics against our table, same folds; and the K best of it."""
    out: list[Row] = []
    for seed in SEEDS[:2]:
        study, cfg = small_study("baseline", seed, 400)
        ours = study.inputs.table.of_mode("imu")
        found = []
        for table, best in (
            (plain_table(study.inputs.rec), 0),
            *((ours, k) for k in (0, 100, 300, 500)),
        ):
            began = time.perf_counter()
            few = cmi.dataclasses.replace(cfg, lgbm_top_features=best)
            found.append(
                (best, taught_and_asked(study, table, table, few), time.perf_counter() - began)
            )
        (_, plain, plain_secs), *rest = found
        for best, reached, secs in rest:
            name = f"our best {best} features" if best else f"our {len(ours.names)} features"
            what = f"imu, {name}, against 108 statistics, seed {seed}"
            out += [
                Row(f"score {what}", reached, plain, SCORE),
                Row(f"training {what}", secs, plain_secs, "s"),
            ]
    return out


def fresh_score(study: cmi.Study, cfg: cmi.Config) -> float:
    """Train without a fold, stop on half of its subjects, score the other half; mean of two."""
    table, scores = study.inputs.table.of_mode("imu"), []
    for job in study.jobs("lgbm", "imu", cfg)[:2]:
        names = np.unique(study.inputs.rec.subject[job.valid])
        first = np.isin(study.inputs.rec.subject, names[: len(names) // 2])
        watch, judge = job.valid[first[job.valid]], job.valid[~first[job.valid]]
        inner = cmi.dataclasses.replace(job, valid=watch)
        job.folder.mkdir(parents=True, exist_ok=True)
        cmi.fit_lgbm(inner, table, study.labels, cfg)
        answer = answers(job, table.take(judge), study, cfg)
        scores.append(cmi.score(study.labels.gesture[judge], answer))
    return float(np.mean(scores))


def stopping() -> list[Row]:
    """What early stopping should watch, scored on subjects that it never saw."""
    watched: dict[str, dict[str, Any]] = {
        "all rounds": {"lgbm_es_rounds": 0},
        "log loss": {"lgbm_es_metric": "logloss"},
        "the score": {"lgbm_es_metric": "score"},
    }
    reached = {
        name: [fresh_score(*small_study("stopping", seed, 500, **changes)) for seed in SEEDS]
        for name, changes in watched.items()
    }
    plain, out = reached.pop("all rounds"), []
    for name, values in reached.items():
        what = f"imu on unseen subjects, stopped on {name}, against all rounds"
        seeds = f"{len(values)} seeds"
        out.append(
            Row(
                f"score {what}, mean of {seeds}",
                float(np.mean(values)),
                float(np.mean(plain)),
                SCORE,
            )
        )
        out.append(Row(f"spread {what}, {seeds}", float(np.std(values)), float(np.std(plain))))
    return out


def rotation() -> list[Row]:
    """LightGBM, IMU: recordings without rotation, by members as they are, by ones whose training
    recordings lost theirs in part, and by ones that never saw any."""
    reached = collections.defaultdict[tuple[str, str], list[float]](list)
    shares = {"as they are": 0.0, "that lost 15 % in training": 0.15, "that never saw any": 1.0}
    for seed in SEEDS[:2]:
        study, cfg = small_study("rotation", seed, 300)
        rec = study.inputs.rec
        blind = cmi.dataclasses.replace(rec, rot=np.full_like(rec.rot, np.nan))
        whole, without = (cmi.feature_table(r).of_mode("imu") for r in (rec, blind))
        for name, share in shares.items():
            lost = np.random.default_rng(seed).random(len(rec)) < share
            mixed = cmi.dataclasses.replace(whole, x=np.where(lost[:, None], without.x, whole.x))
            for asked, judged in (("without", without), ("with", whole)):
                if share < 1 or asked == "without":
                    reached[asked, name].append(taught_and_asked(study, mixed, judged, cfg))
    return [
        Row(f"score imu, asked {asked} rotation, members {name}, against as they are",
            float(np.mean(values)), float(np.mean(reached[asked, "as they are"])), SCORE)
        for (asked, name), values in reached.items() if name != "as they are"
    ]  # fmt: skip


def told(study: cmi.Study, cfg: cmi.Config) -> dict[str, float]:
    """How well the detector tells the left-out subjects of each fold."""
    rec, fold, names = study.inputs.rec, study.fold, np.unique(study.inputs.rec.subject)
    odd, right = cmi.odd_features(rec), np.zeros(len(study.fold), bool)
    evidence = np.zeros(len(names))  # of three recordings, that the device is the right way up
    for k in range(cfg.n_folds):
        coefficients = cmi.fit_wearer(odd[fold != k])["coefficients"]
        right[fold == k] = odd[fold == k] @ coefficients > 0
        for i in np.flatnonzero(np.isin(names, rec.subject[fold == k])):
            evidence[i] = (odd[rec.subject == names[i]][:3] @ coefficients).sum()
    prior = float(np.log(len(names) + 1))
    recall, alarm = (evidence > prior).mean(), (evidence < -prior).mean()  # antisymmetric
    return {
        "recordings told right, alone": right.mean(),
        "recall of turned subjects after three recordings": recall,
        "upright subjects taken for turned by then": alarm,
        "precision, if 2 of 81 are turned": 2 * recall / (2 * recall + 79 * alarm),
    }


def wearer() -> list[Row]:
    """The detector of devices worn upside down, on subjects left out of its training, and what
    turning them back gains in score (LightGBM, all sensors, on the wearers that were turned)."""
    figures, scores = collections.defaultdict[str, list[float]](list), []
    for seed in SEEDS:
        study, cfg = small_study("wearer", seed, 150, rate=0.1)
        for what, value in told(study, cfg).items():
            figures[what].append(value)
        rec = study.inputs.rec
        turned = cmi.turned_back(rec, np.ones(len(rec), bool))  # everybody the wrong way round
        whole, wrong = cmi.feature_table(rec), cmi.feature_table(turned)
        scores.append([taught_and_asked(study, whole, x, cfg, "all") for x in (whole, wrong)])
    right, unnoticed = np.mean(scores, axis=0).tolist()
    rows = [Row(what, float(np.mean(values))) for what, values in figures.items()]
    what = f"score all, device turned back, against upside down and not noticed, {len(SEEDS)} seeds"
    return [*rows, Row(what, right, unnoticed, SCORE)]


PARTS: dict[str, Part] = {part.__name__: part for part in (
    start, search, boosting, baseline, stopping, rotation, wearer, serving,
    benchmark_features.features,
    benchmark_torch.torch_speed, benchmark_torch.torch_scores, benchmark_torch.torch_defaults,
    benchmark_keras.keras_serving, benchmark_keras.keras_training, benchmark_keras.keras_defaults,
    benchmark_machines.machines,
)}  # fmt: skip
QUICK = ("start", "search", "boosting", "serving", "features", "torch_speed", "keras_serving")


def main() -> int:
    """Run the parts that are asked for, then print all that benchmark.json holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all if none is named")
    parser.add_argument("--quick", action="store_true", help="also: " + ", ".join(QUICK))
    asked = parser.parse_args()
    chosen = {*asked.parts, *(QUICK if asked.quick else ())} or {*PARTS}
    parts = {name: part for name, part in PARTS.items() if name in chosen}
    return measured.report(parts, shown=PARTS)


if __name__ == "__main__":
    sys.exit(main())
