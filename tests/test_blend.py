"""Pool, weights, intervals and assignment: slow formulas, scipy, brute force, made data."""

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from made import changed, recordings
from runs import Printed
from scipy import optimize
from test_score import plain_score

import cmi_pipeline as cmi

TABLE = np.array([(b, 0, g) for b in (0, 1) for g in (0, 3, 5, 9, 12, 16)])
L = len(TABLE)
MEMBERS = ("lgbm", "torch", "keras")
ALONE = "norot"  # a mode whose pool no other joins
Oof = dict[tuple[str, str], np.ndarray]
SHARES = {"ensemble_weights": "lgbm:0.5, torch:1.5"}, {"ensemble_w_lgbm": 2, "ensemble_w_torch": 6}
IMPOSSIBLE = {"lgbm:0,torch:0": "leave nothing", "lgbm:-1,torch:2": "negative",
              "lgbm:nan,torch:2": "infinite", "lgbm:half": "member:number"}  # fmt: skip
SURE_OF_ONE = ({0: 0.9, 1: 0.09}, {-1: 0.5, 0: 0.45})  # who has done A did B now
SURELY_WRONG = ({0: 0.6, 1: 0.39}, {-1: 0.6, 2: 0.3})  # B is taken for A, and pushes A aside
GAINS = (1, SURE_OF_ONE, True), (4, SURE_OF_ONE, True), (1, SURELY_WRONG, False)


def protocol(n_subjects: int, times: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Subject and label of each recording: everybody does every label so many times."""
    return np.repeat(np.arange(n_subjects), L * times), np.tile(np.arange(L), n_subjects * times)


def training_data(who: np.ndarray, label: np.ndarray) -> cmi.TrainingData:
    """Recordings of some subjects with labels of TABLE; a fold has every fourth subject."""
    behavior, orientation, gesture = TABLE[label].T
    rec = changed(recordings([2] * len(who)), subject=np.array([f"SUBJ_{i:03d}" for i in who]))
    labels = cmi.Labels.of(gesture, orientation, behavior, np.zeros(2 * len(who), np.uint8))
    return cmi.TrainingData(cmi.Inputs(rec), labels, who % 4, "data", "upright", None)


def made(n_subjects: int, seed: int, *modes: str) -> tuple[cmi.TrainingData, Oof]:
    """Members that know something, the third far too sure; some subjects are hard for all."""
    who, label = protocol(n_subjects)
    rng = np.random.default_rng(seed)
    hard, oof = rng.uniform(0.2, 3, n_subjects)[who], {}
    for mode, member in itertools.product(modes or (ALONE,), MEMBERS):
        logit = rng.normal(0, 1.2, (len(who), L))
        logit[np.arange(len(who)), label] += hard + rng.normal(0, 0.5, len(who))
        power = np.exp(logit * (3 if member == "keras" else 1))
        oof[member, mode] = (power / power.sum(axis=1, keepdims=True)).astype(np.float32)
    return training_data(who, label), oof


class Found(NamedTuple):
    content: dict[str, Any]  # weights.json
    rows: dict[tuple[str, str, str], dict[str, Any]]  # scores.json by name, mode, kind
    nested: np.ndarray  # (N, K) of that mode

    def weights(self, mode: str = ALONE) -> list[float]:
        return self.content["modes"][mode]["weights"]


def blended(oof: Oof, data: cmi.TrainingData, folder: Path, **settings: Any) -> Found:
    cmi.blend_members(oof, [], data, cmi.Config(output_path=folder, **settings))
    files = folder / "ensemble" / "weights.json", folder / "oof" / "scores.json"
    content, scores = (json.loads(file.read_text()) for file in files)
    rows = {(r["name"], r["mode"], r["kind"]): r for r in scores["rows"]}
    return Found(content, rows, np.load(folder / "oof" / f"oof_blend_{ALONE}_proba.npy"))


def slow_pool(probas: Any, weights: Any) -> np.ndarray:
    """P(label) ∝ Π P_m(label)^w_m; a probability below 1e-9 says no more than it."""
    powers = [np.maximum(np.float64(p), 1e-9) ** w for p, w in zip(probas, weights, strict=True)]
    return np.prod(powers, axis=0) / np.prod(powers, axis=0).sum(axis=1, keepdims=True)


def by_gesture(composite: np.ndarray) -> np.ndarray:
    return np.stack([composite[:, TABLE[:, 2] == g].sum(axis=1) for g in range(18)], axis=1)


def slow_loss(weights: Any, probas: Any, truth: np.ndarray) -> float:
    proba = by_gesture(slow_pool(probas, weights))
    return float(-np.log(proba[np.arange(len(truth)), truth]).mean())


def test_the_pool_is_the_product_of_powers_and_grows_where_a_part_is_absent() -> None:
    a, b, c = made(2, 0)[1].values()
    blend = cmi.Blend(("lgbm/all", "torch/all", "keras/imu"), (0.3, 0.9, 0.0))
    whole = blend.pool({"lgbm/all": a, "torch/all": b, "keras/imu": c})
    np.testing.assert_allclose(whole, slow_pool([a, b], [0.3, 0.9]), atol=1e-5)
    np.testing.assert_allclose(blend.pool({"torch/all": b}), slow_pool([b], [1.2]), atol=1e-5)
    weightless = blend.pool({"keras/imu": c})
    np.testing.assert_allclose(weightless, slow_pool([c], [1.2]), atol=1e-5)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_weights_are_of_least_log_loss(tmp_path: Path, seed: int) -> None:
    """Against scipy from another start; at the minimum finite differences point nowhere."""
    data, oof = made(8, seed)
    if seed == 3:  # noise deserves nothing
        oof["keras", ALONE] = oof["keras", ALONE][::-1]
    found, probas = blended(oof, data, tmp_path), [*oof.values()]
    weights, truth = np.array(found.weights()), data.labels.gesture
    least = slow_loss(weights, probas, truth)
    other = optimize.minimize(slow_loss, (2, 0.1, 1), (probas, truth), bounds=[(0, None)] * 3)
    np.testing.assert_allclose(weights, other.x, atol=5e-3)
    assert found.rows["blend", ALONE, "optimistic"]["log_loss"] == pytest.approx(least, abs=1e-5)
    for i, step in enumerate(1e-3 * np.eye(3)):
        up, down = (slow_loss(w, probas, truth) for w in (weights + step, weights - step))
        assert up > least - 1e-7
        assert weights[i] < 1e-3 or abs(up - down) / 2e-3 < 1e-3
    alone = [found.rows[m, ALONE, "member"]["log_loss"] for m in MEMBERS]
    assert found.rows["blend", ALONE, "nested"]["log_loss"] <= min(alone)


@pytest.mark.parametrize("search", ["logloss", "score"])
def test_nested_never_looks_at_its_own_folds_truth(tmp_path: Path, search: str) -> None:
    who, label = protocol(8)
    (data, oof), own, other = made(8, seed=4), who % 4 == 1, label.copy()
    other[own] = np.random.default_rng(0).permutation(label[own])
    both, how = (data, training_data(who, other)), {"ensemble_search": search}
    one, two = (blended(oof, x, tmp_path, **how).nested for x in both)
    np.testing.assert_array_equal(one[own], two[own])
    assert (np.abs(one - two)[~own].max(axis=1) > 0).all()


def test_imu_members_join_the_pool_of_all_and_every_kind_of_row_is_there(tmp_path: Path) -> None:
    data, oof = made(4, 5, *(modes := ("all", "imu", "norot")))
    found = blended(oof, data, tmp_path)
    parts = {mode: [f"{m}/{mode}" for m in MEMBERS] for mode in modes}
    parts["all"] = parts["all"] + parts["imu"]
    assert {mode: b["parts"] for mode, b in found.content["modes"].items()} == parts
    kinds = {(m, "member") for m in MEMBERS}
    kinds |= {("blend", k) for k in ("nested", "optimistic", "assigned", "nested, score")}
    assert set(found.rows) == {(n, mode, k) for n, k in kinds for mode in (*modes, "mixed")}
    for (name, mode, kind), row in found.rows.items():
        assert row["low"] <= row["score"] <= row["high"], row
        if mode == "mixed":
            both = [found.rows[name, m, kind]["score"] for m in ("all", "imu")]
            assert row["score"] == pytest.approx(np.mean(both))


@pytest.mark.parametrize("settings", SHARES)
def test_fixed_shares_hold_and_one_scale_is_fitted(tmp_path: Path, settings: Any) -> None:
    data, oof = made(8, 6, "all", "imu", ALONE)
    found = blended(oof, data, tmp_path, **settings).weights("all")
    total, probas = sum(found), [oof[m, "all"] for m in MEMBERS[:2]]
    assert found == pytest.approx([0.25 * total, 0.75 * total, 0, 0, 0, 0])
    scales = np.geomspace(0.2, 5, 200)
    losses = [slow_loss((s / 4, 3 * s / 4), probas, data.labels.gesture) for s in scales]
    assert total == pytest.approx(scales[np.argmin(losses)], rel=0.02)
    warm = blended(oof, data, tmp_path, ensemble_temperature=2.0, **settings).weights("all")
    assert sum(warm) == pytest.approx(0.5)


def test_impossible_shares_are_refused(tmp_path: Path) -> None:
    data, oof = made(4, 0, "all", "imu")
    for text, message in IMPOSSIBLE.items():
        with pytest.raises(cmi.ConfigError, match=message):
            blended(oof, data, tmp_path, ensemble_weights=text)


def slow_ece(proba: np.ndarray, truth: np.ndarray) -> float:
    """Ten bins of confidence: |mean confidence - share of right answers|, by recordings."""
    sure, right, total = proba.max(axis=1), proba.argmax(axis=1) == truth, 0.0
    for k in range(10):
        own = [i for i, p in enumerate(sure) if min(int(p * 10), 9) == k]
        total += abs(sum(sure[own]) - sum(right[own]))
    return total / len(proba)


def test_scores_and_intervals_against_resampled_recordings(tmp_path: Path) -> None:
    """Whole subjects are drawn; differences to the nested blend within each draw."""
    (data, oof), who = made(10, 7), protocol(10)[0]
    found, truth, rng = blended(oof, data, tmp_path), data.labels.gesture, np.random.default_rng(1)
    proba = {"blend": found.nested} | {m: by_gesture(oof[m, ALONE]) for m in MEMBERS}
    answers, drawn = [p.argmax(axis=1) for p in proba.values()], []
    for _ in range(400):
        index = np.concatenate([np.flatnonzero(who == s) for s in rng.integers(0, 10, 10)])
        drawn.append([cmi.score(truth[index], answer[index]) for answer in answers])
    samples, base = np.transpose(drawn), plain_score(truth, answers[0])
    for (name, p), answer, sample in zip(proba.items(), answers, samples, strict=True):
        row = found.rows[name, ALONE, "nested" if name == "blend" else "member"]
        for told, draws in ((row, sample), (row["difference"], sample - samples[0])):
            ends = np.percentile(draws, (2.5, 97.5))
            np.testing.assert_allclose((told["low"], told["high"]), ends, atol=0.015)
        assert row["score"] == pytest.approx(plain_score(truth, answer))
        assert row["difference"]["score"] == pytest.approx(row["score"] - base)
        folds = [plain_score(truth[who % 4 == k], answer[who % 4 == k]) for k in range(4)]
        assert row["folds"] == pytest.approx(folds)
        assert row["ece"] == pytest.approx(slow_ece(p, truth), abs=1e-6)
        loss = -np.log(np.maximum(p[np.arange(len(p)), truth], 1e-7)).mean()
        assert row["log_loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_each_arrival_gets_the_best_joint_label(seed: int) -> None:
    """By brute force over all labels of all recordings that exceed no capacity."""
    table, capacity = TABLE[:4], np.array([1, 2, 1, 1])
    rows = np.random.default_rng(seed).dirichlet(np.ones(4), 5).astype(np.float32)
    wearer = cmi.Assignment(table, capacity)
    for n in range(1, 6):
        every = itertools.product(range(4), repeat=n)
        allowed = [p for p in every if (np.bincount(p, minlength=4) <= capacity).all()]
        best = max(allowed, key=lambda p: np.log(rows[np.arange(len(p)), p]).sum())
        assert wearer.gesture(f"SEQ_{n}", rows[n - 1]) == table[best[-1], 2]


def sure(label: int, share: float) -> np.ndarray:
    row = np.full(L, (1 - share) / (L - 1), np.float32)
    row[label] = share
    return row


def test_retries_take_one_place_and_more_than_the_protocol_is_judged_alone() -> None:
    wearer, other = (cmi.Assignment(TABLE, np.ones(L, np.int64)) for _ in range(2))
    for label in (3, 0, 3, *range(L), 7):  # some are asked again, while there is room and when not
        assert wearer.gesture(f"SEQ_{label}", sure(label, 0.9)) == TABLE[label, 2]
    for label in (0, 4):
        assert wearer.gesture(f"SEQ_more{label}", sure(label, 0.6)) == TABLE[label, 2]
    assert other.gesture("SEQ_A", np.where(np.arange(L) == 0, np.nan, sure(2, 0.9))) == TABLE[2, 2]
    assert other.gesture("SEQ_B", sure(2, 0.4)) == TABLE[2, 2], "it took no place"


@pytest.mark.parametrize(("times", "pair", "gains"), GAINS)
def test_capacities_come_from_the_data_and_auto_serves_what_gains(
    tmp_path: Path, capsys: Printed, times: int, pair: tuple[dict[int, float], ...], gains: bool
) -> None:
    """Everybody does everything once or four times, somebody once more. Labels come in pairs (A, B):
    probabilities of a recording of A, and of B, by place from its own."""
    who, label = protocol(6, times)
    who, label = np.r_[who, 5], np.r_[label, 7]
    proba = np.full((len(who), L), 1e-4, np.float32)
    for i, own in enumerate(label):
        proba[i, (own + np.array([*pair[own % 2]])) % L] = [*pair[own % 2].values()]
    data, oof = training_data(who, label), {("lgbm", ALONE): proba / proba.sum(1, keepdims=True)}
    for setting, served in (("0", False), ("1", True), ("auto", gains)):
        found = blended(oof, data, tmp_path, subject_assignment=setting)
        assert found.content["assignment"] == {ALONE: served}
    assert found.content["labels"] == TABLE.tolist()
    assert found.content["capacity"] == [times + (k == 7) for k in range(L)]
    gain = found.rows["blend", ALONE, "assigned"]["difference"]["score"]
    assert abs(gain) > 0.02
    assert (gain > 0) == gains
    for served, better in ((True, not gains), (False, gains)):
        capsys.readouterr()
        cmi.show_board([r | {"mode": "all"} for r in found.rows.values()], {"all": served})
        told = "better_than_what_is_submitted=" in capsys.readouterr().out
        assert told == better, (served, gain)
