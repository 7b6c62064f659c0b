"""What families of features are worth: LightGBM with and without them, subjects apart.

    python tests/features_evidence.py PIPELINE_FOLDER DATA_FOLDER MODES SEEDS [FAMILY+FAMILY+…]…

PIPELINE_FOLDER holds a cmi_pipeline.py, DATA_FOLDER a train.csv; MODES is imu, all or imu,all. Each
further argument names families to leave out. Printed are score and log loss, means over the seeds (1
… SEEDS, which also draw the folds) and three folds, what leaving out costs, and its standard error.
"""

import datetime
import itertools
import os
import platform
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is loaded
sys.path.insert(0, sys.argv[1])

import lightgbm as lgb
import numpy as np

import cmi_pipeline as cmi

PARAMS = {
    "objective": "multiclass", "num_class": 18, "extra_trees": True, "learning_rate": 0.07,
    "num_leaves": 20, "feature_fraction": 0.2, "bagging_fraction": 0.8, "bagging_freq": 1,
    "lambda_l2": 1.0, "max_bin": 63, "min_data_in_leaf": 10, "num_threads": 1, "verbosity": -1,
}  # fmt: skip
ROUNDS = 200


def columns_without(families: str) -> np.ndarray:
    """Mask of the table's columns that are left without the families named, joined by +."""
    makers = [make.__name__ for make, columns in cmi.FEATURES for _ in columns]
    lost = [name for name in families.split("+") if name]
    assert set(lost) <= set(makers), f"of {lost} some are no families: {sorted(set(makers))}"
    return ~np.isin(makers, lost)


def judge(x: np.ndarray, y: np.ndarray, subject: np.ndarray, seeds: int) -> np.ndarray:
    """Score and log loss, mean over the folds of each seed. (N, F) → (seeds, 2)"""
    out = np.empty((seeds, 3, 2))
    for seed, k in itertools.product(range(seeds), range(3)):
        fold = cmi.make_folds(subject, cmi.Config(n_folds=3, seed=seed + 1))
        train, test = fold != k, fold == k
        data = lgb.Dataset(x[train], y[train], params={"verbosity": -1, "max_bin": 63})
        proba = lgb.train(PARAMS | {"seed": seed + 1}, data, ROUNDS).predict(x[test])
        loss = -np.log(np.maximum(proba[np.arange(test.sum()), y[test]], 1e-15)).mean()
        out[seed, k] = cmi.score(y[test], proba.argmax(axis=1)), loss
    return out.mean(axis=1)


def main(folder: Path, modes: str, seeds: int, trials: list[str]) -> None:
    rec = cmi.read_train(folder)
    gesture, fold = rec.labels.gesture, cmi.make_folds(rec.subject, cmi.Config(n_folds=3))
    rec = cmi.canonical(rec, cmi.find_upside_down(rec, fold, cmi.Config())[0])
    table = cmi.extract_features(rec, frames=False)[0]
    print(f"{datetime.date.today()}, {platform.platform()}, lightgbm {lgb.__version__}")
    head = "| mode | left out | columns | score | difference | log loss | difference |"
    print(head, "|---" * 7 + "|", sep="\n", flush=True)
    for mode in modes.split(","):
        seen = np.isin(table.names, table.of_mode(mode).names)
        results = []
        for without in ["", *trials]:
            kept = seen & columns_without(without)
            results.append(judge(table.x[:, kept], gesture, rec.subject, seeds))
            mean, d = results[-1].mean(axis=0), results[-1] - results[0]
            cost = zip(mean, d.mean(axis=0), d.std(axis=0, ddof=1) / seeds**0.5, strict=True)
            cells = " | ".join(f"{m:.4f} | {c:+.4f} ± {e:.4f}" for m, c, e in cost)
            print(f"| {mode} | {without or 'nothing'} | {kept.sum()} | {cells} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5:])
