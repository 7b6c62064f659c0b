"""The competition's score, against scikit-learn and the table of known cases; folds by subject."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

import cmi_pipeline as cmi

TARGETS = """Above ear - pull hair|Cheek - pinch skin|Eyebrow - pull hair|Eyelash - pull hair
Forehead - pull hairline|Forehead - scratch|Neck - pinch skin|Neck - scratch""".replace(
    "\n", "|"
).split("|")
OTHERS = """Drink from bottle/cup|Feel around in tray and pull out an object|Glasses on/off
Pinch knee/leg skin|Pull air toward your face|Scratch knee/leg skin|Text on phone|Wave hello
Write name in air|Write name on leg""".replace("\n", "|").split("|")


def codes(*names: str) -> list[int]:
    return [cmi.GESTURES.index(name) for name in names]


def plain_score(truth: np.ndarray, predicted: np.ndarray) -> float:
    """The definition, said with scikit-learn on the strings."""
    t = np.array([g if g in TARGETS else "non_target" for g in np.array(cmi.GESTURES)[truth]])
    p = np.array([g if g in TARGETS else "non_target" for g in np.array(cmi.GESTURES)[predicted]])
    binary = f1_score(t != "non_target", p != "non_target", zero_division=0)
    return 0.5 * binary + 0.5 * f1_score(t, p, average="macro", zero_division=0)


def test_the_eighteen_strings() -> None:
    assert list(cmi.GESTURES[:8]) == TARGETS
    assert list(cmi.GESTURES[8:]) == OTHERS


@pytest.mark.parametrize(
    ("truth", "predicted", "expected"),
    [
        (TARGETS + OTHERS, TARGETS + OTHERS[::-1], 1.0),
        (TARGETS[:2], [TARGETS[0]] * 2, 0.66667),
        (OTHERS[:3], OTHERS[:3], 0.5),
        ([*TARGETS[:2], OTHERS[0]], [OTHERS[0]] * 3, 0.08333),
        (["Eyebrow - pull hair"] * 4, ["Forehead - pull hairline"] * 4, 0.5),
        (["Eyebrow - pull hair"] * 4, ["Text on phone"] * 4, 0.0),
    ],
)
def test_known_cases(truth: list[str], predicted: list[str], expected: float) -> None:
    assert cmi.score(codes(*truth), codes(*predicted)) == pytest.approx(expected, abs=5e-6)


def test_random_answers_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    for n in (1, 2, 5, 40, 300):
        for _ in range(20):
            truth = rng.integers(0, 18, n)
            predicted = np.where(rng.random(n) < 0.5, truth, rng.integers(0, 18, n))
            assert cmi.score(truth, predicted) == pytest.approx(
                plain_score(truth, predicted), abs=1e-12
            )


def test_many_confusion_matrices_at_once() -> None:
    rng = np.random.default_rng(4)
    truth, predicted = rng.integers(0, 18, (2, 7, 50))
    counts = np.zeros((7, 9, 9))
    for i in range(7):
        for t, p in zip(truth[i], predicted[i], strict=True):
            counts[i, min(t, 8), min(p, 8)] += 1
    expected = [plain_score(t, p) for t, p in zip(truth, predicted, strict=True)]
    np.testing.assert_allclose(np.mean(cmi.f1_of_counts(counts), axis=0), expected, atol=1e-12)


def test_no_subject_is_on_both_sides_and_folds_are_alike() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 103, 81)
    subject = rng.permutation(
        np.repeat([f"SUBJ_{i:06d}" for i in rng.permutation(10**5)[:81]], sizes)
    )
    fold = cmi.make_folds(subject, cmi.Config(n_folds=5))
    for name in np.unique(subject):
        assert len(set(fold[subject == name])) == 1
    counts = np.bincount(fold)
    assert len(counts) == 5
    assert counts.max() - counts.min() <= 102
    assert (cmi.make_folds(subject, cmi.Config(n_folds=5, seed=1)) != fold).any()


def test_too_few_subjects_say_what_to_do() -> None:
    with pytest.raises(cmi.ConfigError, match=r"3 subjects cannot fill 5 folds; set N_FOLDS=3\."):
        cmi.make_folds(np.array(["a", "b", "c", "a"]), cmi.Config(n_folds=5))


def test_composite_labels_are_those_that_occur() -> None:
    gesture, orientation, behavior = (
        np.array([3, 3, 9, 3]),
        np.array([0, 1, 2, 0]),
        np.array([1, 0, 0, 1]),
    )
    labels = cmi.Labels.of(gesture, orientation, behavior, np.zeros(9, np.uint8))
    assert labels.table.tolist() == [[0, 1, 3], [0, 2, 9], [1, 0, 3]]
    assert labels.composite.tolist() == [2, 0, 1, 2]
    proba = np.array([[0.1, 0.2, 0.7]], np.float32)
    by_gesture = cmi.gesture_proba(proba, labels.table)
    assert by_gesture.shape == (1, 18)
    np.testing.assert_allclose(by_gesture[0, [3, 9]], [0.8, 0.2], rtol=1e-6)
    assert by_gesture.sum() == pytest.approx(1)
