"""LightGBM: what it learns, answers, stops at, writes and refuses."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import polars as pl
import pytest
from runs import Patch

import cmi_pipeline as cmi

LGBM = cmi.MEMBERS["lgbm"]
ENDS = (".txt", "_orientation.txt", "_behavior.txt")
STEMS = ["fold00", "fold01", "fold02"]
CFG = cmi.Config(lgbm_rounds=40, lgbm_lr=0.1, lgbm_feature_fraction=0.7, log_every_steps=1)


def tiny(n: int = 240) -> tuple[cmi.FeatureTable, cmi.Labels]:
    """0 to 2 say something of gesture, orientation and behavior; 8, 9 need THM, 10 ToF, 11 both."""
    rng = np.random.default_rng(0)
    gesture = rng.choice((0, 3, 5, 9, 17), n)
    orientation, behavior = rng.integers(0, 3, n), rng.integers(0, 2, n)
    x = rng.normal(size=(n, 12)).astype(np.float32)
    x[:, :3] += np.stack([gesture, 2 * orientation, 3 * behavior], axis=1)
    x[:, :8][rng.random((n, 8)) < 0.05] = np.nan
    labels = cmi.Labels.of(gesture, orientation, behavior, np.zeros(n, np.uint8))
    far = ("thm_1_mean", "thm_2_mean", "tof_1_mean", "thm_tof_present")
    names = (*(f"column_{i}" for i in range(8)), *far)
    return cmi.FeatureTable(names, x), labels


def a_job(folder: Path, fold: int = 1, mode: str = "all", n: int = 240) -> cmi.Job:
    rows = np.arange(n)
    train, valid = rows[rows % 3 != fold], rows[rows % 3 == fold]
    return cmi.Job("lgbm", mode, 0, fold, train, valid, folder / mode, folder, folder / "logs")


def fit(job: cmi.Job, n: int = 240, **changes: Any) -> dict[str, Any]:
    return LGBM.fit(job, *tiny(n), dataclasses.replace(CFG, **changes))


def ask(folder: Path, stems: list[str], rows: cmi.FeatureTable, labels: np.ndarray) -> np.ndarray:
    return LGBM.predict(LGBM.load(folder / "all", stems, labels, CFG), rows)


def booster(folder: Path, name: str = "fold01.txt") -> lgb.Booster:
    return lgb.Booster(model_file=str(folder / "all" / name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lgbm")
    for k in range(3):
        fit(a_job(out, k))
    return out


def test_composites_are_the_product_within_a_gesture(folder: Path) -> None:
    """Against a loop over labels that asks LightGBM itself; also a recording at a time."""
    table, labels = tiny()
    rows = table.take(np.arange(7))
    uneven = labels.table[np.random.default_rng(4).random(len(labels.table)) < 0.4]
    for known in (labels.table, uneven):  # gestures with as many labels each, or not
        answers = ask(folder, STEMS, rows, known)
        alone = [ask(folder, STEMS, rows.take(np.array([i])), known) for i in range(7)]
        np.testing.assert_allclose(np.concatenate(alone, axis=1), answers, atol=1e-6)
        for stem, answer in zip(STEMS, answers, strict=True):
            models = (booster(folder, stem + end) for end in ENDS)
            gesture, orientation, behavior = (model.predict(rows.x) for model in models)
            slow = np.zeros((7, len(known)))
            for i, (j, (b, o, g)) in itertools.product(range(7), enumerate(known)):
                sides = sum(orientation[i, y] * behavior[i, x] for x, y, z in known if z == g)
                slow[i, j] = gesture[i, g] * orientation[i, o] * behavior[i, b] / sides
            slow /= slow.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(answer, slow, atol=1e-6)


@pytest.mark.parametrize(("mode", "share"), [("all", 0.3), ("norot", 0.5)])
def test_sensors_are_lost(tmp_path: Path, monkeypatch: Patch, mode: str, share: float) -> None:
    """What LightGBM is handed: a third of the share loses THM, a third ToF, a third both."""
    handed, whole = [], lgb.Dataset

    def dataset(x: Any, *rest: Any, **named: Any) -> lgb.Dataset:
        handed.append(np.array(x))
        return whole(x, *rest, **named)

    monkeypatch.setattr(lgb, "Dataset", dataset)
    job, (table, _) = a_job(tmp_path, mode=mode, n=4200), tiny(4200)
    fit(job, n=4200, lgbm_rounds=1)
    *trained, watched = sorted(handed, key=len, reverse=True)
    np.testing.assert_array_equal(watched, table.x[job.valid])
    for x in trained:
        thm, tof = np.isnan(x[:, 8]), np.isnan(x[:, 10])
        np.testing.assert_array_equal(np.isnan(x[:, 9]), thm)
        np.testing.assert_array_equal(x[:, 11] == 0, thm | tof)
        np.testing.assert_array_equal(x[:, :8], table.x[job.train, :8])
        for lost in (thm & ~tof, tof & ~thm, thm & tof):
            assert lost.mean() == pytest.approx(share / 3, abs=0.02)


def test_the_best_features_of_an_earlier_run(folder: Path, tmp_path: Path) -> None:
    """The order of the full run stays known; folds of different columns answer together."""
    table, labels = tiny()
    job = a_job(tmp_path)
    with pytest.raises(cmi.ConfigError, match="Run once with LGBM_TOP_FEATURES=0"):
        fit(job, lgbm_top_features=3)
    shutil.copytree(folder / "all", job.folder)
    full = [booster(tmp_path, f"{stem}.txt") for stem in STEMS]
    gains = [dict(zip(b.feature_name(), b.feature_importance("gain"), strict=True)) for b in full]
    best = sorted(gains[1], key=lambda name: -gains[1][name])
    LGBM.summarise({"all": [job.folder / stem for stem in STEMS]}, tmp_path)
    (told,) = pl.read_csv(tmp_path / "feature_importance.csv").filter(feature=best[0]).to_dicts()
    of_best = [gain[best[0]] for gain in gains]
    spread = np.mean(of_best), np.std(of_best, ddof=1)
    assert (told["gain_mean"], told["gain_std"]) == pytest.approx(spread)
    for k in (3, 5):
        fit(job, lgbm_top_features=k)
        assert set(booster(tmp_path).feature_name()) == set(best[:k])
    together = ask(tmp_path, STEMS, table, labels.table)
    alone = [ask(tmp_path, [stem], table, labels.table)[0] for stem in STEMS]
    np.testing.assert_array_equal(together, alone)


def test_what_is_written_ends_with_the_round_of_least_log_loss(tmp_path: Path) -> None:
    """Trees grown in the hope of better ones are left out."""
    info = fit(a_job(tmp_path), lgbm_es_rounds=7, lgbm_rounds=300, lgbm_lr=0.3)
    told = [json.loads(line) for line in (tmp_path / "logs" / "lgbm_progress.jsonl").open()]
    assert [line["round"] for line in told] == list(range(1, len(told) + 1))
    losses = [line["multi_logloss"] for line in told]
    assert info["rounds"] == int(np.argmin(losses)) + 1 == len(told) - 7
    assert booster(tmp_path).num_trees() == 18 * info["rounds"]
    assert fit(a_job(tmp_path), lgbm_es_rounds=0)["rounds"] == 40, "0: all rounds"
