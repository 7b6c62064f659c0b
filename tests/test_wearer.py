"""Upside-down wearers: the evidence is antisymmetric, and found on subjects never seen."""

from pathlib import Path

import numpy as np
import pytest
from made import changed, joined
from runs import Patch

import cmi_pipeline as cmi
import cmi_simulator


@pytest.fixture(scope="module")
def rec(tmp_path_factory: pytest.TempPathFactory) -> cmi.Recordings:
    out: Path = tmp_path_factory.mktemp("wearer") / "sim"
    cmi_simulator.simulate(out, subjects=16, test_subjects=1, recordings_per_subject=20, seed=3)
    return cmi.read_train(out)


def upright(rec: cmi.Recordings) -> cmi.Recordings:
    return cmi.canonical(rec, np.zeros(len(rec), bool))


def test_the_evidence_of_a_turned_twin_is_the_negative(rec: cmi.Recordings) -> None:
    odd = cmi.odd_features(upright(rec))
    twin = cmi.odd_features(cmi.canonical(rec, np.ones(len(rec), bool)))
    assert np.abs(odd).max() > 0.1
    np.testing.assert_allclose(twin, -odd, atol=1e-9)


def test_evidence_is_means_of_the_beginning_the_gesture_and_the_whole(rec: cmi.Recordings) -> None:
    """Against a loop; of every other recording the fifth ToF and THM are missing."""
    lost_tof, lost_thm = rec.tof.copy(), rec.thm.copy()
    gone = np.repeat(np.arange(len(rec)) % 2 == 0, np.diff(rec.start))
    lost_tof[gone, 4], lost_thm[gone, 4] = 255, np.nan
    lost = changed(rec, tof=lost_tof, thm=lost_thm)
    odd = cmi.odd_features(lost).reshape(len(rec), 3, 10)
    for i in range(0, len(rec), 7):
        rows = slice(rec.start[i], rec.start[i + 1])
        tof, thm = lost_tof[rows], lost_thm[rows].astype(float)
        seen = np.where((tof == 255).all(axis=(2, 3)), np.nan, (tof < 250).mean(axis=(2, 3)))
        sides = [seen[:, 1] - seen[:, 3], seen[:, 2] - seen[:, 4]]
        sides += [thm[:, 1] - thm[:, 3], thm[:, 2] - thm[:, 4]]
        values = np.c_[rec.acc[rows].astype(float) / 9.81, np.nan_to_num(np.stack(sides, axis=1))]
        for part, some in zip(odd[i], (values[:10], values[-31:], values), strict=True):
            x, y, z, *side = some.mean(axis=0)
            expected = [x, y, x * z, y * z, x * y * y, y * x * x, *side]
            np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-7)


def test_subjects_that_were_turned_are_found(rec: cmi.Recordings) -> None:
    """Turn three whole subjects by hand: they, and nobody else new, must be found."""
    cfg = cmi.Config(n_folds=4)
    fold = cmi.make_folds(rec.subject, cfg)
    before, _ = cmi.find_upside_down(rec, fold, cfg)
    names = np.unique(rec.subject[~before])[[1, 5, 9]]
    hand = np.isin(rec.subject, names)
    turned = cmi.apply_map(rec, hand, cmi.HALF_TURN)
    after, wearer = cmi.find_upside_down(turned, fold, cfg)
    assert set(rec.subject[after & hand]) == set(names)
    assert set(rec.subject[after & ~hand]) == set(rec.subject[before])
    assert wearer is not None
    found = len(set(rec.subject[after]))
    assert wearer["prior"] == pytest.approx(np.log((17 - found) / (1 + found)))
    logit = cmi.odd_features(upright(turned)) @ wearer["coefficients"]
    assert ((logit < 0) == after).mean() > 0.85


def test_with_few_subjects_nobody_is_turned(rec: cmi.Recordings) -> None:
    seven = np.flatnonzero(np.isin(rec.subject, np.unique(rec.subject)[:7]))  # all they recorded
    sparse = np.arange(100)  # of all wearers
    for some in (seven, sparse):
        few = joined([rec.part(i, i + 1) for i in some])
        found, wearer = cmi.find_upside_down(few, np.arange(len(few)) % 2, cmi.Config())
        assert not found.any()
        assert wearer is None
    off = cmi.find_upside_down(rec, np.arange(len(rec)) % 2, cmi.Config(upside_down=False))[0]
    assert not off.any()


def test_nobody_is_judged_by_a_model_of_their_fold(rec: cmi.Recordings, monkeypatch: Patch) -> None:
    cfg = cmi.Config(n_folds=4)
    fold = cmi.make_folds(rec.subject, cfg)
    size = np.abs(cmi.odd_features(upright(rec)))  # a row, whichever its sign
    seen, fit = [], cmi.fit_wearer
    monkeypatch.setattr(cmi, "fit_wearer", lambda odd: seen.append(np.abs(odd)) or fit(odd))
    cmi.find_upside_down(rec, fold, cfg)
    assert len(seen) == 2 * 4 + 1, "two rounds over the folds, then the model for new wearers"
    for i, rows in enumerate(seen[:-1]):
        np.testing.assert_array_equal(rows, size[fold != i % 4])
    np.testing.assert_array_equal(seen[-1], size)
