"""How far real recordings believe the simulator: what tells them apart, and what carries over.

    python tests/realism.py --real FOLDER              # or CMI_REAL_DATA=FOLDER

FOLDER holds CSV files with the competition's columns, at any depth, sensors that were not recorded
left out, and a train_demographics.csv. Three parts are printed:

    1 two-sample  how well a booster tells real from simulated by our own features, and by which
    2 transfer    trained on simulated recordings alone, how many real ones are named rightly
    3 order       statistics < features on simulated subjects that were held out, with classes and
                  confusions beside the anchors of the real data
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before numpy is loaded
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lightgbm as lgb
import numpy as np
import polars as pl
from sklearn.metrics import roc_auc_score

import cmi_pipeline as cmi
import cmi_simulator

ANCHORS = {  # F1 of one gold-medal run on the real data: the targets and the rest (competition.md, 4)
    "imu": (0.62, 0.53, 0.43, 0.55, 0.64, 0.78, 0.55, 0.66, 0.97),
    "all": (0.80, 0.66, 0.50, 0.61, 0.73, 0.83, 0.65, 0.72, 0.98),
}
# truth, answer and share of the truth on the real data, imu
CONFUSIONS = (3, 2, 0.23), (0, 6, 0.18), (2, 3, 0.17), (7, 6, 0.15), (2, 1, 0.13), (1, 6, 0.13)
Array, Table = np.ndarray, cmi.FeatureTable
LADDER = "real: statistics .704 imu, features .73-.79 imu, one network .810 imu and .855 all"


def read_real(folder: Path) -> tuple[cmi.Recordings, np.ndarray] | None:
    """Labelled real recordings below the folder and their gestures; None if there are none."""
    frames, people = [], [pl.DataFrame({"subject": []}, schema={"subject": pl.String})]
    for path in sorted(folder.rglob("*.csv")):
        frame = pl.read_csv(path, infer_schema=False)
        if {"gesture", "acc_x", "rot_w", "sequence_counter"} <= set(frame.columns):
            frames.append(frame)
        elif "handedness" in frame.columns:
            people.append(frame)
    if not frames:
        return None
    order = ("sequence_id", pl.col("sequence_counter").cast(pl.Int64))
    rows = pl.concat(frames, how="diagonal").sort(*order)
    person = pl.concat(people, how="diagonal").unique("subject", keep="first")
    rec = cmi.to_recordings(rows, person)
    names = rows["gesture"].gather(rec.start[:-1]).to_list()
    return cmi.canonical(rec, np.zeros(len(rec), bool)), np.array([*map(cmi.GESTURES.index, names)])


def simulated(folder: Path, subjects: int, seed: int) -> cmi.Recordings:
    cmi_simulator.simulate(folder, subjects=subjects, test_subjects=1, seed=seed)
    rec = cmi.read_train(folder)
    upside_down, _ = cmi.find_upside_down(rec, split_by(rec.subject, 5), cmi.Config())
    return dataclasses.replace(cmi.canonical(rec, upside_down), labels=rec.labels)


def whole(rec: cmi.Recordings) -> np.ndarray:
    """Numbers of the recordings with every sensor."""
    return np.flatnonzero(~np.isnan(rec.thm).all(axis=1)[rec.start[:-1]])


def in_imu(table: cmi.FeatureTable) -> np.ndarray:
    """Mask of the columns that need the IMU alone."""
    return np.isin(table.names, table.of_mode("imu").names)


def plain_statistics(rec: cmi.Recordings) -> np.ndarray:
    """Mean, sd, range and quartiles of each raw motion column and of its steps. → (N, 112)"""
    columns = []
    for a, b in zip(rec.start, rec.start[1:], strict=False):
        x = np.nan_to_num(np.c_[rec.acc[a:b], rec.rot[a:b]].astype(float))
        x = np.c_[x, np.diff(x, axis=0, prepend=x[:1])]
        quarters = np.quantile(x, (0, 0.25, 0.5, 0.75, 1), axis=0)
        columns.append(np.concatenate([x.mean(0), x.std(0), *quarters, x[-20:].mean(0)]))
    return np.array(columns)


def fit_predict(x: np.ndarray, y: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    cfg = cmi.Config()
    data = lgb.Dataset(x, y, params={"max_bin": 63, "verbosity": -1})
    params = cmi.lgbm_params(cfg, len(cmi.GESTURES), len(x), 0) | {"num_threads": 2}
    seeds = (1, 2, 3)[: 1 if len(x) > 3000 else None]
    boosters = (lgb.train(params | {"seed": s}, data, cfg.lgbm_rounds) for s in seeds)
    return np.mean([booster.predict(unseen) for booster in boosters], axis=0)


def split_by(subject: np.ndarray, n_folds: int) -> np.ndarray:
    return cmi.make_folds(subject, cmi.Config(n_folds=min(n_folds, len(np.unique(subject)))))


def told_apart(real: np.ndarray, made: np.ndarray, subject: np.ndarray) -> tuple[float, np.ndarray]:
    """Area under the curve of real against simulated, wearers apart, and the gain of each column."""
    x, y = np.concatenate([real, made]), np.r_[np.ones(len(real)), np.zeros(len(made))]
    params = {"objective": "binary", "num_leaves": 8, "learning_rate": 0.05, "num_threads": 2}
    params |= {"feature_fraction": 0.2, "min_data_in_leaf": 5, "lambda_l2": 1.0, "max_bin": 63}
    params |= {"is_unbalance": True, "verbosity": -1, "seed": 1}
    fold, logit, gain = split_by(subject, 5), np.zeros(len(x)), np.zeros(x.shape[1])
    for k in np.unique(fold):
        train = lgb.Dataset(x[fold != k], y[fold != k], params={"max_bin": 63, "verbosity": -1})
        booster = lgb.train(params, train, 150)
        logit[fold == k] = booster.predict(x[fold == k], raw_score=True)
        gain += booster.feature_importance("gain")
    return float(roc_auc_score(y, logit)), gain / gain.sum()


def two_sample(real: cmi.FeatureTable, made: cmi.FeatureTable, who: np.ndarray, kinds: str) -> None:
    """One line of result, then the columns that give the simulation away; none of the wearer's."""
    columns = in_imu(made) if kinds == "imu" else np.ones(len(made.names), bool)
    columns &= ~np.array([n.startswith(("age", "adult", "sex", "height")) for n in made.names])
    columns &= ~np.array(["_cm" in n or "_to_" in n or "present" in n for n in made.names])
    x, z = real.x[:, columns], made.x[:, columns]
    area, gain = told_apart(x, z, who)
    print(f"two-sample {kinds}: AUC {area:.3f} ({len(x)} real, {len(z)} simulated)")
    names = np.array(made.names)[columns]
    for k in np.argsort(-gain)[:15]:
        figures = np.nanquantile(x[:, k], (0.1, 0.5, 0.9)), np.nanquantile(z[:, k], (0.1, 0.5, 0.9))
        spread = "".join(f"{q:9.3g}" for q in np.concatenate(figures))
        print(f"   {names[k]:28s} gain {gain[k]:.3f}  real, simulated {spread}")


def like(real: np.ndarray, made: np.ndarray, each: int, seed: int) -> np.ndarray:
    """Numbers of simulated recordings with the gestures of the real ones, `each` for every one."""
    rng = np.random.default_rng(seed)
    wanted = [(np.flatnonzero(made == g), each * (real == g).sum()) for g in np.unique(real)]
    return np.concatenate([rng.permutation(own)[:count] for own, count in wanted])


def transfer_line(name: str, proba: np.ndarray, truth: np.ndarray) -> None:
    """Top-1, top-3 and score with intervals: a bootstrap over the recordings."""
    order = np.argsort(-proba, axis=1)
    first, third = order[:, 0] == truth, (order[:, :3] == truth[:, None]).any(axis=1)
    n, rng = len(truth), np.random.default_rng(0)
    draws = np.vstack([np.arange(n), rng.integers(n, size=(1000, n))])
    figures = [(first[i].mean(), third[i].mean(), cmi.score(truth[i], order[i, 0])) for i in draws]
    told = zip(figures[0], *np.quantile(figures[1:], (0.025, 0.975), axis=0), strict=True)
    spread = [f"{value:.3f} [{low:.2f}, {high:.2f}]" for value, low, high in told]
    loss = -np.log(np.maximum(proba[np.arange(len(truth)), truth], 1e-6)).mean()
    said = f"top-1 {spread[0]}  top-3 {spread[1]}  score {spread[2]}  log loss {loss:.2f}"
    print(f"transfer {name:24s} n={len(truth):3d}  {said}")


def transfer(rec: cmi.Recordings, truth: Array, real: Table, made: Table, gesture: Array) -> None:
    """Real recordings named by boosters that saw simulated ones only; of ten of a wearer also apart."""
    imu, seen = in_imu(made), whole(rec)
    motion = fit_predict(made.x[:, imu], gesture, real.x[:, imu])
    transfer_line("imu", motion, truth)
    for name in np.unique(rec.subject):
        own = rec.subject == name
        if own.sum() < 10:
            continue
        for label, rows in ((f"imu, {name}", own), ("imu, the others", ~own)):
            if rows.any():
                transfer_line(label, motion[rows], truth[rows])
    if len(seen):
        transfer_line("imu, where all is seen", motion[seen], truth[seen])
        transfer_line("all sensors", fit_predict(made.x, gesture, real.x[seen]), truth[seen])
    answer = motion.argmax(axis=1)
    for g in np.unique(truth):
        found = [cmi.GESTURES[a][:22] for a in answer[truth == g]]
        hits = (answer[truth == g] == g).sum()
        print(f"   {cmi.GESTURES[g][:30]:30s} {hits}/{len(found)}: {', '.join(found)}")


def order_of_models(rec: cmi.Recordings, table: cmi.FeatureTable) -> None:
    """Statistics and features on a quarter of the simulated subjects, held out."""
    test = split_by(rec.subject, 4) == 0
    y, truth = rec.labels.gesture[~test], rec.labels.gesture[test]
    inputs = plain_statistics(rec), table.x[:, in_imu(table)], table.x
    answers = [fit_predict(x[~test], y, x[test]).argmax(axis=1) for x in inputs]
    rows = dict(zip(("statistics imu", "features imu", "features all"), answers, strict=True))
    scores = {name: cmi.score(truth, answer) for name, answer in rows.items()}
    print(f"order of models, {test.sum()} recordings of held-out simulated subjects ({LADDER})")
    print("   " + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    print(f"   ordered as on the real data: {list(scores.values()) == sorted(scores.values())}")
    print(f"   F1, simulated (real): {', '.join(cmi.GESTURES[: cmi.NON_TARGET])}, the rest")
    for mode, real in ANCHORS.items():
        counts = cmi.count_classes(truth, rows[f"features {mode}"])[0]
        own = 2 * np.diagonal(counts) / np.maximum(counts.sum(0) + counts.sum(1), 1)
        print(f"   {mode}", *(f" {f1:.2f} ({r:.2f})" for f1, r in zip(own, real, strict=True)))
    for a, b, share in CONFUSIONS:
        ours = (rows["features imu"][truth == a] == b).mean()
        print(f"   {cmi.GESTURES[a]} → {cmi.GESTURES[b]}: {ours:.2f} ({share:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--real", type=Path, default=os.environ.get("CMI_REAL_DATA") or None)
    parser.add_argument("--subjects", type=int, default=36, help="simulated (36)")
    parser.add_argument("--seed", type=int, default=1)
    given, began = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = simulated(folder / "data", given.subjects, given.seed)
        table = cmi.extract_features(made, frames=False)[0]
        if given.real and (found := read_real(Path(given.real))):
            real, truth = found
            seen = cmi.extract_features(real, frames=False)[0]
            for kinds, rows in (("imu", np.arange(len(real))), ("all", whole(real))):
                if len(rows):
                    pick = like(truth[rows], made.labels.gesture, 8, given.seed)
                    who = np.concatenate([real.subject[rows], made.subject[pick]])
                    two_sample(seen.take(rows), table.take(pick), who, kinds)
            transfer(real, truth, seen, table, made.labels.gesture)
        else:
            print("two-sample and transfer skipped: --real or CMI_REAL_DATA names no recordings")
        order_of_models(made, table)
    print(f"took {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
