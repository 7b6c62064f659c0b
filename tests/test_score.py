"""The score and the folds: known cases, scikit-learn, and a subject on one side only."""

import numpy as np
import pytest
from made import GESTURES
from sklearn.metrics import f1_score

import cmi_pipeline as cmi


def plain_score(truth: np.ndarray, predicted: np.ndarray) -> float:
    """The competition's own way, by scikit-learn; codes of gestures, targets first."""
    t, p = (np.where(x < 8, x, 8) for x in (truth, predicted))
    binary = f1_score(t < 8, p < 8, zero_division=0)
    return 0.5 * binary + 0.5 * f1_score(t, p, average="macro", zero_division=0)


def test_the_eighteen_strings() -> None:
    assert list(cmi.GESTURES) == GESTURES


KNOWN = (  # codes of the truth, of the answers, score
    ([*range(18)], [*range(8), *range(17, 7, -1)], 1.0),
    ([0, 1], [0, 0], 0.66667),
    ([0, 1, 8], [8, 8, 8], 0.08333),
    ([2] * 4, [4] * 4, 0.5),
)


@pytest.mark.parametrize(("truth", "answers", "expected"), KNOWN)
def test_known_cases(truth: list[int], answers: list[int], expected: float) -> None:
    assert cmi.score(truth, answers) == pytest.approx(expected, abs=5e-6)


def test_random_answers_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    for n in (1, 2, 5, 40, 300):
        for _ in range(8):
            truth = rng.integers(0, 18, n)
            predicted = np.where(rng.random(n) < 0.5, truth, rng.integers(0, 18, n))
            expected = plain_score(truth, predicted)
            assert cmi.score(truth, predicted) == pytest.approx(expected, abs=1e-12)


def test_no_subject_is_on_both_sides_and_folds_are_alike() -> None:
    rng = np.random.default_rng(0)
    subject = np.repeat([f"SUBJ_{i:03d}" for i in range(81)], rng.integers(50, 103, 81))
    subject = rng.permutation(subject)
    fold = cmi.make_folds(subject, cmi.Config(n_folds=5))
    assert len(set(zip(subject.tolist(), fold.tolist(), strict=True))) == 81
    counts = np.bincount(fold)
    assert len(counts) == 5
    assert counts.max() - counts.min() <= 102
    assert (cmi.make_folds(subject, cmi.Config(n_folds=5, seed=1)) != fold).any()
    with pytest.raises(cmi.ConfigError, match=r"3 subjects cannot fill 5 folds; set N_FOLDS=3\."):
        cmi.make_folds(np.array(["a", "b", "c", "a"]), cmi.Config(n_folds=5))
    with pytest.raises(cmi.ConfigError, match="of several"):
        cmi.make_folds(np.array(["a", "a"]), cmi.Config(n_folds=2))
