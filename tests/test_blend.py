"""Weights, transforms and the assignment, against plain loops and brute force."""

import itertools
import json

import numpy as np
import pytest

import cmi_pipeline as cmi


def opinions(n_parts: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of parts that know something, and the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 18, n)
    logit = rng.normal(0, 1, (n_parts, n, 18))
    logit[:, np.arange(n), truth] += rng.uniform(0.5, 2.5, (n_parts, 1))
    proba = np.exp(logit)
    return (proba / proba.sum(axis=2, keepdims=True)).astype(np.float32), truth


def test_all_candidates_at_once_score_as_each_alone() -> None:
    proba, truth = opinions(3, 200, seed=1)
    weights = np.random.default_rng(2).dirichlet(np.ones(3), 300)
    at_once = cmi.scores_of_weights(weights, proba, truth)
    for w, fast in zip(weights, at_once, strict=True):
        blend = sum(np.float32(a) * p for a, p in zip(w, proba, strict=True))
        assert fast == pytest.approx(cmi.score(truth, blend.argmax(axis=1)), abs=1e-12)


def test_the_search_is_never_worse_than_the_best_part() -> None:
    for seed in range(5):
        proba, truth = opinions(3, 150, seed)
        weights = cmi.search_weights(
            proba, truth, cmi.Config(ensemble_trials=64), np.random.default_rng(seed)
        )
        assert weights.sum() == pytest.approx(1)
        assert (weights >= 0).all()
        best_alone = max(cmi.score(truth, p.argmax(axis=1)) for p in proba)
        blend = np.tensordot(weights.astype(np.float32), proba, axes=1)
        assert cmi.score(truth, blend.argmax(axis=1)) >= best_alone


def test_the_search_finds_that_noise_deserves_nothing() -> None:
    rng = np.random.default_rng(0)
    proba, truth = opinions(1, 400, seed=3)
    noise = rng.dirichlet(np.ones(18) * 0.1, 400).astype(np.float32)[None]
    weights = cmi.search_weights(np.concatenate([proba, noise]), truth, cmi.Config(), rng)
    assert weights[0] > 0.7


def test_the_fitted_temperature_undoes_a_known_one() -> None:
    proba, truth = opinions(1, 3000, seed=4)
    calibrated = cmi.fit_temperature(proba[0], truth, cmi.Config())
    sharper = cmi.at_temperature(proba[0], 0.5)
    assert cmi.fit_temperature(sharper, truth, cmi.Config()) == pytest.approx(
        2 * calibrated, rel=0.02
    )
    assert cmi.fit_temperature(proba[0], truth, cmi.Config(ensemble_temperature=1.5)) == 1.5
    np.testing.assert_allclose(cmi.at_temperature(proba[0], 1.0), proba[0], atol=1e-6)
    np.testing.assert_allclose(sharper.sum(axis=1), 1, atol=1e-5)


def test_half_the_temperature_squares_the_odds() -> None:
    proba = np.array([[0.8, 0.2]], np.float32)
    np.testing.assert_allclose(cmi.at_temperature(proba, 0.5), [[16 / 17, 1 / 17]], atol=1e-6)
    np.testing.assert_allclose(cmi.at_temperature(proba, 2.0), [[2 / 3, 1 / 3]], atol=1e-6)


def test_ranks_do_not_depend_on_how_sure_a_part_is() -> None:
    proba, truth = opinions(1, 500, seed=5)
    timid = proba[0] ** 0.3
    for one in (proba[0], timid):
        grid = cmi.fit_ranks(one, truth, cmi.Config())
        ranks = cmi.as_ranks(one, grid)
        order = np.argsort(np.argsort(one[:, 4])) / 499
        raw = np.interp(one[:, 4], grid[4], np.linspace(0, 1, len(grid[4])))
        np.testing.assert_allclose(raw, order, atol=0.02)
        np.testing.assert_allclose(ranks.sum(axis=1), 1, atol=1e-5)


TABLE = np.array([(b, o, g) for b in (0, 1) for o in (0, 1) for g in (0, 3, 9)])


def composites(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(len(TABLE)), n).astype(np.float32)


def test_a_blend_of_one_part_is_that_part() -> None:
    one = composites(20, 0)
    blend = cmi.Blend(("lgbm/all",), (1.0,), "probability", (None,))
    np.testing.assert_allclose(blend.mix({"lgbm/all": one}, TABLE), one, atol=1e-6)


def test_a_blend_mixes_gestures_by_weight() -> None:
    a, b = composites(20, 0), composites(20, 1)
    blend = cmi.Blend(("lgbm/all", "torch/all"), (0.3, 0.7), "probability", (None, None))
    mixed = blend.mix({"lgbm/all": a, "torch/all": b}, TABLE)
    expected = 0.3 * cmi.gesture_proba(a, TABLE) + 0.7 * cmi.gesture_proba(b, TABLE)
    np.testing.assert_allclose(cmi.gesture_proba(mixed, TABLE), expected, atol=1e-5)
    np.testing.assert_allclose(mixed.sum(axis=1), 1, atol=1e-5)


def test_a_blend_keeps_the_plain_mean_within_a_gesture() -> None:
    """However gestures are mixed, a gesture's labels share it as in the weighted mean."""
    a, b = composites(20, 0), composites(20, 1)
    blend = cmi.Blend(("lgbm/all", "torch/all"), (0.3, 0.7), "temperature", (0.5, 2.0))
    mixed = blend.mix({"lgbm/all": a, "torch/all": b}, TABLE)
    plain = 0.3 * a + 0.7 * b
    for gesture in (0, 3, 9):
        own = TABLE[:, 2] == gesture
        shares = [p[:, own] / p[:, own].sum(axis=1, keepdims=True) for p in (mixed, plain)]
        np.testing.assert_allclose(*shares, atol=1e-5)


def test_an_absent_part_is_left_out_and_the_rest_renormalised() -> None:
    parts = ("lgbm/all", "torch/all", "keras/all")
    blend = cmi.Blend(parts, (0.2, 0.3, 0.5), "temperature", (1.0, 1.3, 0.7))
    a, b = composites(9, 0), composites(9, 1)
    pair = cmi.Blend(parts[:2], (0.4, 0.6), "temperature", (1.0, 1.3))
    both = {"lgbm/all": a, "torch/all": b}
    np.testing.assert_allclose(blend.mix(both, TABLE), pair.mix(both, TABLE), atol=1e-6)
    weightless = cmi.Blend(parts[:2], (0.0, 1.0), "probability", (None, None))
    np.testing.assert_allclose(weightless.mix({"lgbm/all": a}, TABLE), a, atol=1e-6)


def test_fixed_weights_are_taken_and_renormalised() -> None:
    members = ["lgbm", "torch", "keras"]
    text = cmi.Config(ensemble_weights="lgbm:0.4, torch:0.6")
    assert cmi.fixed_weights(members, text) == {"lgbm": 0.4, "torch": 0.6, "keras": 0.0}
    assert cmi.fixed_weights(["lgbm"], text) == {"lgbm": 1.0}
    single = cmi.Config(ensemble_w_torch=3.0, ensemble_w_keras=1.0)
    assert cmi.fixed_weights(members, single) == {"lgbm": 0.0, "torch": 0.75, "keras": 0.25}
    assert cmi.fixed_weights(members, cmi.Config()) is None


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (cmi.Config(ensemble_weights="lgbm:0,torch:0"), "sum to zero"),
        (cmi.Config(ensemble_weights="lgbm:-1,torch:2"), "negative"),
        (cmi.Config(ensemble_weights="lgbm:nan,torch:2"), "infinite"),
        (cmi.Config(ensemble_weights="catboost:1"), "'catboost' is no member. Known: lgbm"),
        (cmi.Config(ensemble_weights="lgbm=0.5"), "is no member|member:number"),
        (cmi.Config(ensemble_weights="lgbm:half"), "member:number"),
        (cmi.Config(ensemble_weights="keras:1"), "leave nothing"),
    ],
)
def test_impossible_weights_are_refused(cfg: cmi.Config, message: str) -> None:
    with pytest.raises(cmi.ConfigError, match=message):
        cmi.fixed_weights(["lgbm", "torch"], cfg)


def best_by_brute_force(rows: list[np.ndarray]) -> tuple[int, ...]:
    costs = [-np.log(np.maximum(r, 1e-9)) for r in rows]
    return min(
        itertools.permutations(range(len(TABLE)), len(rows)),
        key=lambda p: sum(c[i] for c, i in zip(costs, p, strict=True)),
    )


def test_each_arrival_gets_the_best_joint_label() -> None:
    rows = [*composites(4, 11), composites(1, 11)[0]]  # the last repeats the first
    wearer = cmi.Assignment(TABLE)
    for i in range(len(rows)):
        answer = wearer.gesture(f"SEQ_{i}", rows[i])
        assert answer == TABLE[best_by_brute_force(rows[: i + 1])[i], 2]


def test_two_recordings_do_not_share_a_label() -> None:
    table = np.array([[0, 0, 3], [0, 0, 9]])
    sure, less = np.float32([0.9, 0.1]), np.float32([0.6, 0.4])
    assert cmi.Assignment(table).gesture("b", less) == 3  # alone
    wearer = cmi.Assignment(table)
    assert wearer.gesture("a", sure) == 3
    assert wearer.gesture("b", less) == 9


def test_asking_twice_takes_one_place() -> None:
    table = np.array([[0, 0, 3], [0, 0, 9]])
    wearer = cmi.Assignment(table)
    row = np.float32([0.9, 0.1])
    assert [wearer.gesture("a", row) for _ in range(5)] == [3] * 5
    assert len(wearer.rows) == 1


def test_without_a_solution_the_most_probable_gesture_is_told() -> None:
    table = np.array([[0, 0, 3], [0, 0, 9], [1, 0, 9]])
    wearer = cmi.Assignment(table)
    row = np.float32([0.4, 0.3, 0.3])
    for i in range(3):
        wearer.gesture(f"{i}", row)
    assert wearer.gesture("one too many", row) == 9  # .3 + .3 against .4
    bad = np.float32([np.nan, 0.5, 0.5])
    assert cmi.Assignment(table).gesture("x", bad) in (3, 9)
    assert not cmi.Assignment(table).rows


def sure(label: int, share: float) -> np.ndarray:
    """One label with this probability, the others alike."""
    row = np.full(len(TABLE), (1 - share) / (len(TABLE) - 1), np.float32)
    row[label] = share
    return row


def test_an_earlier_recording_asked_again_gets_its_own_answer() -> None:
    state = cmi.Assignment(TABLE)
    labels = {"A": 0, "B": 4, "C": 11}
    for name, label in labels.items():
        assert state.gesture(name, sure(label, 0.9)) == TABLE[label, 2]
    for name in ("A", "C", "B", "A"):
        assert state.gesture(name, sure(labels[name], 0.9)) == TABLE[labels[name], 2], name


def test_one_recording_more_than_there_are_labels_is_judged_alone() -> None:
    state = cmi.Assignment(TABLE)
    for label in range(len(TABLE)):
        assert state.gesture(f"SEQ_{label}", sure(label, 0.99)) == TABLE[label, 2]
    assert state.gesture("SEQ_X", sure(0, 0.6)) == TABLE[0, 2]
    assert state.gesture("SEQ_Y", sure(4, 0.6)) == TABLE[4, 2]


def test_weights_survive_json() -> None:
    blend = cmi.Blend(("lgbm/all",), (1.0,), "rank", ([[0.0, 0.5, 1.0]] * 18,))
    again = json.loads(json.dumps(cmi.dataclasses.asdict(blend)))
    same = cmi.blend_from(again)
    one = composites(5, 3)
    np.testing.assert_array_equal(
        same.mix({"lgbm/all": one}, TABLE), blend.mix({"lgbm/all": one}, TABLE)
    )


def test_weights_without_lightgbm_leave_recordings_without_rotation_to_it() -> None:
    """norot has models of LightGBM alone: settings that give it nothing cannot hold there."""
    proba = np.full((1, 20, 18), 1 / 18, np.float32)
    cfg = cmi.Config(ensemble_weights="torch:0.6,keras:0.4")
    truth = np.arange(20) % 18
    blend = cmi.make_blend([("lgbm", cmi.BLIND)], proba, truth, "probability", cfg)
    assert blend.weights == (1.0,)
