"""The LightGBM member on tiny tables: its composites, its trees at once, its choice of features."""

import json
import re
import subprocess
import sys
from pathlib import Path

import lightgbm as lgb
import numpy as np
import polars as pl
import pytest

import cmi_pipeline as cmi

N, F = 240, 12


def tiny(
    seed: int = 0, gestures: tuple[int, ...] = (0, 3, 5, 9, 17)
) -> tuple[cmi.Table, cmi.Labels]:
    """A table whose first columns say something about gesture, orientation and behavior."""
    rng = np.random.default_rng(seed)
    gesture = rng.choice(gestures, N)
    orientation, behavior = rng.integers(0, 3, N), rng.integers(0, 2, N)
    x = rng.normal(size=(N, F)).astype(np.float32)
    x[:, 0] += gesture
    x[:, 1] += 2 * orientation
    x[:, 2] += 3 * behavior
    x[:, 3] += np.isin(gesture, (3, 17)) * 2
    x[rng.random((N, F)) < 0.05] = np.nan
    names = tuple(f"column_{i}" for i in range(F))
    modality = np.array([0] * 8 + [1, 1, 2, 3], np.uint8)
    blank = np.array([np.nan] * 11 + [0], np.float32)
    labels = cmi.Labels.of(gesture, orientation, behavior, np.zeros(N, np.uint8))
    return cmi.Table(names, x, modality, blank), labels


def a_job(folder: Path, mode: str = "all") -> cmi.Job:
    rows = np.arange(N)
    return cmi.Job(
        "lgbm",
        mode,
        0,
        1,
        rows[rows % 3 != 1],
        rows[rows % 3 == 1],
        folder / mode,
        folder / "scratch",
        folder / "logs",
    )


CFG = cmi.Config(
    lgbm_rounds=40, lgbm_lr=0.1, lgbm_feature_fraction=0.7, lgbm_leaves=6, log_every_steps=10
)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, cmi.Table, cmi.Labels]:
    folder = tmp_path_factory.mktemp("lgbm")
    table, labels = tiny()
    cmi.fit_lgbm(a_job(folder), table, labels, CFG)
    return folder, table, labels


def test_it_learns(fitted: tuple[Path, cmi.Table, cmi.Labels]) -> None:
    folder, table, labels = fitted
    valid = a_job(folder).valid
    model = cmi.load_lgbm(folder / "all", ["fold01"], labels.table, CFG)
    proba = cmi.predict_lgbm(model, table.take(valid))
    assert proba.shape == (1, len(valid), len(labels.table))
    np.testing.assert_allclose(proba.sum(axis=2), 1, atol=1e-5)
    answer = cmi.gesture_proba(proba[0], labels.table).argmax(axis=1)
    assert (answer == labels.gesture[valid]).mean() > 0.5  # chance: 0.2
    assert (labels.table[proba[0].argmax(axis=1), 1] == labels.orientation[valid]).mean() > 0.6


def test_composites_are_the_product_within_a_gesture(
    fitted: tuple[Path, cmi.Table, cmi.Labels],
) -> None:
    """Against a loop over labels that asks LightGBM itself."""
    folder, table, labels = fitted
    rows = table.take(np.arange(7))
    parts = [
        lgb.Booster(model_file=str(folder / "all" / f"fold01{end}.txt")).predict(rows.x)
        for end in ("", "_orientation", "_behavior")
    ]
    uneven = labels.table[np.random.default_rng(4).random(len(labels.table)) < 0.4]
    for known in (labels.table, uneven):  # gestures with as many labels each, or not
        slow = np.zeros((7, len(known)))
        for i in range(7):
            for j, (b, o, g) in enumerate(known):
                same = [(x, y) for x, y, z in known if z == g]
                sides = sum(parts[1][i, y] * parts[2][i, x] for x, y in same)
                slow[i, j] = parts[0][i, g] * parts[1][i, o] * parts[2][i, b] / sides
            slow[i] /= slow[i].sum()
        model = cmi.load_lgbm(folder / "all", ["fold01"], known, CFG)
        np.testing.assert_allclose(cmi.predict_lgbm(model, rows)[0], slow, atol=1e-6)


def test_all_trees_at_once_answer_as_lightgbm(fitted: tuple[Path, cmi.Table, cmi.Labels]) -> None:
    folder, table, labels = fitted
    (model,) = cmi.load_lgbm(folder / "all", ["fold01", "fold01"], labels.table, CFG)
    assert model.forest is not None
    plain = cmi.dataclasses.replace(model, forest=None)
    rng = np.random.default_rng(1)
    x = np.concatenate(
        [table.x[:60], 100 * rng.normal(size=(20, F)), np.full((1, F), np.nan), np.zeros((1, F))]
    )
    x[rng.random(x.shape) < 0.1] = 1e30
    x[rng.random(x.shape) < 0.1] = np.nan
    for row in x.astype(np.float32).astype(np.float64):
        for fast, slow in zip(model.proba(row[None]), plain.proba(row[None]), strict=True):
            np.testing.assert_allclose(fast, slow, atol=1e-12)


def test_a_value_on_a_threshold_goes_the_same_way() -> None:
    """Whole numbers put thresholds between floats; the row itself is float32."""
    rng = np.random.default_rng(2)
    x = rng.integers(0, 5, (300, 4)).astype(np.float64) / 3
    y = (x[:, 0] * 3 + x[:, 1] * 3).astype(int) % 4
    booster = lgb.train(
        {"objective": "multiclass", "num_class": 4, "verbosity": -1}, lgb.Dataset(x, y), 30
    )
    forest = cmi.plant([booster.model_to_string()], 4)
    assert forest is not None
    exact = re.findall(r"^threshold=(.*)$", booster.model_to_string(), re.MULTILINE)
    below = np.unique(np.array(" ".join(exact).split(), np.float64)).astype(np.float32)
    ends = [np.nextafter(below, np.float32(way)) for way in (-np.inf, np.inf)]
    edges = np.repeat(np.concatenate([below, *ends])[:, None], 4, axis=1)
    for row in np.concatenate([np.float32(x[:100]), edges]).astype(np.float64):
        np.testing.assert_allclose(
            cmi.softmax(forest.raw(row)), booster.predict(row[None])[0], atol=1e-12
        )


def test_boosters_with_large_trees_take_the_plain_road() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(4000, 3)), rng.integers(0, 3, 4000)
    params = {
        "objective": "multiclass",
        "num_class": 3,
        "num_leaves": 100,
        "min_data_in_leaf": 2,
        "verbosity": -1,
    }
    booster = lgb.train(params, lgb.Dataset(x, y), 2)
    assert cmi.plant([booster.model_to_string()], 3) is None


def test_a_gesture_missing_from_the_training_rows_keeps_its_column(tmp_path: Path) -> None:
    table, labels = tiny()
    job = a_job(tmp_path)
    job = cmi.dataclasses.replace(job, train=job.train[labels.gesture[job.train] != 5])
    cmi.fit_lgbm(job, table, labels, CFG)
    model = cmi.load_lgbm(job.folder, ["fold01"], labels.table, CFG)
    for rows in (table.take(job.valid), table.take(job.valid[:1])):
        proba = cmi.gesture_proba(cmi.predict_lgbm(model, rows)[0], labels.table)
        assert proba.shape[1] == 18
        assert (proba[:, 5] == 0).all()
        np.testing.assert_allclose(proba.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_handful_of_rows_does_not_crash(tmp_path: Path, n: int) -> None:
    table, labels = tiny()
    job = cmi.dataclasses.replace(a_job(tmp_path), train=np.arange(n), valid=np.array([30]))
    cmi.fit_lgbm(job, table, labels, CFG)
    model = cmi.load_lgbm(job.folder, ["fold01"], labels.table, CFG)
    proba = cmi.predict_lgbm(model, table.take(np.arange(9)))
    assert np.isfinite(proba).all()


def test_the_same_seed_gives_the_same_text(
    tmp_path: Path, fitted: tuple[Path, cmi.Table, cmi.Labels]
) -> None:
    folder, table, labels = fitted
    cmi.fit_lgbm(a_job(tmp_path), table, labels, CFG)
    for end in ("", "_orientation", "_behavior"):
        name = f"fold01{end}.txt"
        assert (tmp_path / "all" / name).read_text() == (folder / "all" / name).read_text()
    other = cmi.dataclasses.replace(CFG, seed=1)
    cmi.fit_lgbm(a_job(tmp_path), table, labels, other)
    assert (tmp_path / "all" / "fold01.txt").read_text() != (
        folder / "all" / "fold01.txt"
    ).read_text()


def test_modality_dropout_is_drawn_by_recording() -> None:
    thm, tof = cmi.dropped_modalities(30_000, np.random.default_rng(0), 0.3)
    assert (thm | tof).mean() == pytest.approx(0.3, abs=0.01)
    for share in ((thm & ~tof).mean(), (tof & ~thm).mean(), (thm & tof).mean()):
        assert share == pytest.approx(0.1, abs=0.01)
    none = cmi.dropped_modalities(100, np.random.default_rng(0), 0.0)
    assert not np.any(none)


def test_the_best_features_of_an_earlier_run(tmp_path: Path) -> None:
    table, labels = tiny()
    job, some = a_job(tmp_path), cmi.dataclasses.replace(CFG, lgbm_top_features=3)
    with pytest.raises(cmi.ConfigError, match="Run once with LGBM_TOP_FEATURES=0"):
        cmi.fit_lgbm(job, table, labels, some)
    cmi.fit_lgbm(job, table, labels, CFG)
    gains = pl.read_csv(job.folder / "fold01_importance.csv").sort("gain", descending=True)
    booster = lgb.Booster(model_file=str(job.folder / "fold01.txt"))
    truth = dict(zip(booster.feature_name(), booster.feature_importance("gain"), strict=True))
    for name, gain in zip(gains["feature"], gains["gain"], strict=True):
        assert gain == pytest.approx(truth[name])
    cmi.fit_lgbm(job, table, labels, some)
    assert set(lgb.Booster(model_file=str(job.folder / "fold01.txt")).feature_name()) == set(
        gains["feature"][:3]
    )
    model = cmi.load_lgbm(job.folder, ["fold01"], labels.table, some)
    assert cmi.predict_lgbm(model, table).shape == (1, N, len(labels.table))
    more = cmi.dataclasses.replace(CFG, lgbm_top_features=5)
    cmi.fit_lgbm(job, table, labels, more)  # the order of the full run is still known
    assert set(lgb.Booster(model_file=str(job.folder / "fold01.txt")).feature_name()) == set(
        gains["feature"][:5]
    )


def test_importance_is_summed_up_over_folds(tmp_path: Path) -> None:
    for k, gain in ((0, 1.0), (1, 3.0)):
        text = f"feature,gain,split\na,{gain},2\nb,0,0\n"
        cmi.write_whole(tmp_path / "all" / f"fold0{k}_importance.csv", text)
    stale = "feature,gain,split\na,900,9\n"  # of a run with more folds
    cmi.write_whole(tmp_path / "all" / "fold02_importance.csv", stale)
    stems = [tmp_path / "all" / "fold00", tmp_path / "all" / "fold01"]
    cmi.summarise_lgbm({"all": stems}, tmp_path)
    rows = pl.read_csv(tmp_path / "feature_importance.csv").to_dicts()
    assert rows[0]["feature"] == "a"
    assert (rows[0]["gain_mean"], rows[0]["gain_std"]) == (2.0, pytest.approx(2**0.5))
    assert rows[0]["split_mean"] == 2


def test_early_stopping_watches_what_it_is_told(tmp_path: Path) -> None:
    table, labels = tiny(seed=5)
    rounds = {}
    for metric, es in (("logloss", 5), ("score", 5), ("logloss", 0)):
        cfg = cmi.dataclasses.replace(
            CFG, lgbm_es_metric=metric, lgbm_es_rounds=es, lgbm_rounds=120, lgbm_lr=0.3
        )
        rounds[metric, es] = cmi.fit_lgbm(a_job(tmp_path), table, labels, cfg)["rounds"]
    assert rounds["logloss", 0] == 120
    assert rounds["logloss", 5] < 120
    assert rounds["score", 5] < 120


def test_progress_is_printed_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, labels = tiny()
    cmi.fit_lgbm(a_job(tmp_path), table, labels, cmi.dataclasses.replace(CFG, lgbm_es_rounds=0))
    lines = [line for line in capsys.readouterr().out.splitlines() if "rounds " in line]
    assert [part for line in lines for part in line.split() if part.startswith("done=")] == [
        f"done={i}/40" for i in (10, 20, 30, 40)
    ]
    assert all("eta=" in line and "score=" in line for line in lines)
    records = [
        json.loads(line)
        for line in (tmp_path / "logs" / "lgbm_progress.jsonl").read_text().splitlines()
    ]
    assert [r["round"] for r in records] == [10, 20, 30, 40]


@pytest.mark.parametrize(
    "text", ["", "tree\n", "nonsense " * 100, "tree\nversion=v4\nnum_class=18\n"]
)
def test_a_text_that_is_no_model_is_refused(tmp_path: Path, text: str) -> None:
    for end in ("", "_orientation", "_behavior"):
        cmi.write_whole(tmp_path / f"fold00{end}.txt", text)
    with pytest.raises(ValueError, match="is not a LightGBM model"):
        cmi.load_lgbm(tmp_path, ["fold00"], np.array([[0, 0, 0]]), CFG)


def test_balanced_weights_give_every_class_the_same_sum() -> None:
    target = np.array([3] * 6 + [0] * 2 + [7])
    weight = cmi.balanced_weights(target)
    sums = [weight[target == k].sum() for k in (0, 3, 7)]
    np.testing.assert_allclose(sums, [3, 3, 3])
    assert weight.sum() == pytest.approx(9), "the mean weight is one"


@pytest.mark.parametrize("metric", ["logloss", "score"])
def test_what_is_written_ends_with_the_best_round(tmp_path: Path, metric: str) -> None:
    """The best by the metric asked for; trees grown in the hope of better ones are left out."""
    table, labels = tiny()
    settings = {"lgbm_rounds": 300, "lgbm_lr": 0.3, "lgbm_es_rounds": 7, "log_every_steps": 1}
    cfg = cmi.dataclasses.replace(CFG, **settings, lgbm_es_metric=metric)
    info = cmi.fit_lgbm(a_job(tmp_path), table, labels, cfg)
    lines = (tmp_path / "logs" / "lgbm_progress.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert len(told) < 300, "it stopped early"
    worse = [-t["score"] if metric == "score" else t["multi_logloss"] for t in told]
    assert info["rounds"] == int(np.argmin(worse)) + 1 == len(told) - 7
    text = (tmp_path / "all" / "fold01.txt").read_text()
    assert text.count("Tree=") == 18 * info["rounds"]


def test_folds_with_columns_of_their_own_answer_together(tmp_path: Path) -> None:
    """With LGBM_TOP_FEATURES each fold chooses its columns; served, they answer side by side."""
    table, labels = tiny(seed=9)
    job = a_job(tmp_path)
    for k in (0, 1, 2):
        cmi.fit_lgbm(cmi.dataclasses.replace(job, fold=k), table, labels, CFG)
    some = cmi.dataclasses.replace(CFG, lgbm_top_features=3)
    cmi.fit_lgbm(cmi.dataclasses.replace(job, fold=1), table, labels, some)
    stems = ["fold00", "fold01", "fold02"]
    models = cmi.load_lgbm(job.folder, stems, labels.table, CFG)
    assert [len(model.names) for model in models] == [F, 3, F]
    for rows in (table, table.take(np.arange(1))):
        alone = [cmi.load_lgbm(job.folder, [stem], labels.table, CFG) for stem in stems]
        expected = np.concatenate([cmi.predict_lgbm(model, rows) for model in alone])
        np.testing.assert_array_equal(cmi.predict_lgbm(models, rows), expected)


def test_a_hostile_text_is_refused_without_asserts_too(tmp_path: Path) -> None:
    """python -O removes asserts; what keeps LightGBM within its arrays must stay."""
    table, labels = tiny()
    five = cmi.Table(table.names[:5], table.x[:, :5], table.modality[:5], table.blank[:5])
    cmi.fit_lgbm(a_job(tmp_path), five, labels, CFG)
    path = tmp_path / "all" / "fold01.txt"
    text = path.read_text()
    asked = re.search(r"split_feature=(\d+)", text)
    assert asked
    high = "9" * len(asked[1])  # the text keeps its length, which is checked first
    path.write_text(text.replace(asked[0], f"split_feature={high}", 1))
    code = f"import cmi_pipeline as c; from pathlib import Path; c.checked_booster_text(Path({str(path)!r}), 18)"
    done = subprocess.run(
        [sys.executable, "-O", "-c", code],
        cwd=Path(cmi.__file__).parent,
        text=True,
        capture_output=True,
    )
    assert "DataError" in done.stderr, done.stderr
    assert re.search("it asks for feature 9+ of 5", done.stderr)
