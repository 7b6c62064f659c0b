"""predict with models that answer by rule: routes, memory, wearers, fallbacks and threads."""

import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from made import changed, recordings
from runs import Patch, Printed

import cmi_pipeline as cmi

TABLE = [[0, 0, g] for g in (0, 5, 9, 14)]
GESTURES = [cmi.GESTURES[g] for _, _, g in TABLE]
FOLDS = ["fold00", "fold01"]
Rule = Callable[[cmi.Recordings], list[float]]
Serve = Callable[..., cmi.Predictor]
REC = recordings([40, 30, 50, 20], seed=4)
RIGHT = pl.DataFrame({"subject": ["SUBJ_1"], "handedness": [1], "age": [30]})
ASSIGNED = ("auto", True, 1, [0, 1, 0]), ("auto", True, 2, [0, 0, 0]), ("auto", False, 1, [0, 0, 0])
ASSIGNED += ("0", True, 1, [0, 0, 0]), ("1", False, 1, [0, 1, 0])
PLAIN = {"subject_assignment": "0", "frame_cache_max_items": 0}


class ForeignError(Exception):
    """As TensorFlow's and LightGBM's own, which derive from nothing narrower."""


def failing(*_: object) -> Any:
    raise ForeignError("planted")


def always(label: int) -> Rule:
    return lambda _: [0.7 if i == label else 0.1 for i in range(4)]


def write_bundles(out: Path, parts: list[list[str]]) -> None:
    digest = hashlib.blake2b(b"model", digest_size=8).hexdigest()
    for name, mode in parts:
        folder = out / f"{name}_models" / mode
        folder.mkdir(parents=True, exist_ok=True)
        for stem in FOLDS:
            (folder / f"{stem}.txt").write_text("model")
            (folder / f"{stem}.json").write_text(json.dumps({"files": {".txt": digest}}))
        modes = {other: FOLDS for member, other in parts if member == name}
        bundle = json.dumps({"modes": modes, "labels": TABLE})
        folder.with_name("bundle.json").write_text(bundle)


def weights_of(weights: dict[str, float], **content: Any) -> dict[str, Any]:
    """What weights.json holds; weights in the mode all by "member/mode"."""
    modes = {"all": {"parts": [*weights], "weights": [*weights.values()]}}
    whole = {"modes": modes, "labels": TABLE, "capacity": [1] * 4}
    return whole | {"assignment": {"all": True}, "digests": {}, "wearer": None} | content


@pytest.fixture
def serve(monkeypatch: Patch, tmp_path: Path) -> Serve:
    """Of each part the first fold answers by its rule ("member/mode" → rule), the second .25 each."""

    def make(rules: dict[str, Rule], weights: Any = None, **settings: Any) -> cmi.Predictor:
        def load(folder: Path, stems: Sequence[str], *_: object) -> Rule:
            assert stems == FOLDS
            return rules[f"{folder.parent.name.removesuffix('_models')}/{folder.name}"]

        def predict(rule: Rule, rec: cmi.Recordings) -> np.ndarray:
            return np.array([rule(rec), [0.25] * 4], np.float32)[:, None]

        member = cmi.Member(("numpy",), (".txt",), lambda x, _: x.rec, failing, load, predict, 1.0)
        monkeypatch.setattr(cmi, "MEMBERS", dict.fromkeys(("lgbm", "torch"), member))
        write_bundles(tmp_path, [part.split("/") for part in rules])
        shutil.rmtree(tmp_path / "ensemble", ignore_errors=True)
        if weights:
            (tmp_path / "ensemble").mkdir()
            (tmp_path / "ensemble" / "weights.json").write_text(json.dumps(weights))
        return cmi.Predictor(cmi.Config(**{"strict": True, "output_path": tmp_path, **settings}))

    return make


def frame_of(i: int = 0, subject: str = "SUBJ_1", name: str = "", rec: Any = REC) -> pl.DataFrame:
    one = rec.part(i, i + 1)
    pixels = one.tof.reshape(-1, 320).astype(np.float64)
    pixels = np.where(pixels == 255, np.nan, np.where(pixels == 254, -1, pixels))
    values = np.concatenate([one.acc, one.rot, one.thm, pixels], axis=1)
    names = {"sequence_id": pl.lit(name or one.sequence_id[0]), "subject": pl.lit(subject)}
    return pl.DataFrame(values, schema=list(cmi.SENSORS)).with_columns(**names)


def ask(predictor: cmi.Predictor, i: int = 0, hand: int = 1, **about: Any) -> str:
    return predictor.predict(frame_of(i, **about), RIGHT.with_columns(handedness=pl.lit(hand)))


def test_a_recording_goes_to_the_models_that_know_its_sensors(serve: Serve) -> None:
    one_row, blind = REC.rot.copy(), changed(REC, rot=REC.rot * np.nan)
    one_row[:39] = np.nan

    def lost(rec: cmi.Recordings, n: int, code: int = 255) -> cmi.Recordings:
        gone = np.arange(len(rec.acc)).reshape(-1, 1, 1, 1) < n
        return changed(rec, tof=np.where(gone, code, rec.tof).astype(np.uint8))

    routes = {"lgbm/all": always(0), "lgbm/imu": always(1), "lgbm/norot": always(2)}
    predictor = serve(routes, **PLAIN)
    cases = [(REC, 0), (lost(REC, 16), 0), (lost(REC, 24), 1), (blind, 2), (lost(blind, 40), 2)]
    cases += [(lost(REC, 40, 254), 0)]  # it sees that nothing is there
    cases += [(changed(REC, rot=one_row), 0)]  # one row tells of the rest
    assert [ask(predictor, rec=rec) for rec, _ in cases] == [GESTURES[k] for _, k in cases]
    two = serve({part: routes[part] for part in ("lgbm/all", "lgbm/imu")}, **PLAIN)
    assert ask(two, rec=blind) == GESTURES[0]


def test_retries_are_answered_from_a_memory_of_content_that_stays_small(serve: Serve) -> None:
    asked: list[int] = []
    rules = {"lgbm/all": lambda x: asked.append(len(x.acc)) or always(len(x.acc) % 4)(x)}
    predictor = serve(rules, subject_assignment="0", frame_cache_max_items=2)
    answers = [ask(predictor, i, name="SEQ_SAME") for i in (0, 1, 0, 2, 0, 3, 1)]
    assert answers == [GESTURES[n % 4] for n in (40, 30, 40, 50, 40, 20, 30)]
    assert asked == [40, 30, 50, 20, 30], "0 was asked again and stays, 1 is the oldest and goes"


@pytest.mark.parametrize(("setting", "by_data", "capacity", "labels"), ASSIGNED)
def test_assignment(serve: Any, setting: str, by_data: bool, capacity: int, labels: Any) -> None:
    """Each wearer gets each label as often as it may be; the first recording is asked again."""
    first, second = [0.9, 0.08, 0.01, 0.01], [0.6, 0.38, 0.01, 0.01]
    content = {"assignment": {"all": by_data}, "capacity": [capacity] * 4}
    rules = {"lgbm/all": lambda seen: first if len(seen.acc) == 40 else second}
    weights = weights_of({"lgbm/all": 1.0}, **content)
    predictor = serve(rules, weights, subject_assignment=setting)
    assert [ask(predictor, i) for i in (0, 1, 0)] == [GESTURES[k] for k in labels]
    assert ask(predictor, 1, subject="SUBJ_2") == GESTURES[0]


def test_evidence_of_a_turned_device_adds_up_over_its_wearers_recordings(serve: Serve) -> None:
    """One recording is not enough, two are; each counts once. And left-handers are mirrored."""
    odd = cmi.odd_features(REC)[0]
    coefficients = [-1.0 / float(odd[0])] + [0.0] * (len(odd) - 1)  # every recording says -1
    wearer = {"prior": 1.5, "coefficients": coefficients}
    weights, reached = weights_of({"lgbm/all": 1.0}, wearer=wearer), []
    rules = {"lgbm/all": lambda seen: reached.append(seen.acc[0]) or always(0)(seen)}
    for looks in (True, False):
        predictor = serve(rules, weights, upside_down=looks, **PLAIN)
        for k, subject in ((1, "SUBJ_1"), (1, "SUBJ_1"), (9, "SUBJ_2"), (2, "SUBJ_1")):
            ask(predictor, subject=subject, name=f"SEQ_{k}")
    ask(predictor, hand=0)
    signs = [[1, 1, 1]] * 3 + [[-1, -1, 1]] + [[1, 1, 1]] * 4 + [[-1, 1, 1]]
    np.testing.assert_array_equal(reached, REC.acc[0] * np.array(signs))


def test_a_part_that_fails_is_left_out_counted_and_dropped(serve: Serve, capsys: Printed) -> None:
    """Without any answer a common gesture is told."""
    calls: list[int] = []
    rules = {"lgbm/all": lambda seen: calls.append(1) or failing(seen), "torch/all": always(1)}
    weights = weights_of({"lgbm/all": 0.5, "torch/all": 0.5})
    lenient = serve(rules, weights, strict=False, **PLAIN)
    assert [ask(lenient) for _ in range(9)] == [GESTURES[1]] * 9
    assert len(calls) < 6
    assert lenient.fallbacks == {"lgbm/all: ForeignError: planted": len(calls)}
    alone = serve({"lgbm/all": failing}, weights, strict=False)
    assert [ask(alone) for _ in range(2)] == ["Text on phone"] * 2
    assert alone.fallbacks["ForeignError: planted"] == 2
    printed = capsys.readouterr()
    assert "in_a_row=3/3" in printed.out
    assert "planted" in printed.err, "with its traceback"
    with pytest.raises(ForeignError, match="planted"):
        ask(serve(rules, weights, **PLAIN))


def test_models_that_cannot_be_had_are_asked_for_once(serve: Serve, monkeypatch: Patch) -> None:
    tries: list[int] = []
    predictor = serve({"lgbm/all": always(0)}, strict=False)
    broken = dataclasses.replace(cmi.MEMBERS["lgbm"], load=lambda *_: tries.append(1) or failing())
    monkeypatch.setitem(cmi.MEMBERS, "lgbm", broken)
    assert [ask(predictor) for _ in range(3)] == ["Text on phone"] * 3
    assert len(tries) == 1, "a load can take minutes"
    assert predictor.fallbacks.total() == 3


def test_questions_at_once_are_answered_one_after_the_other(serve: Serve) -> None:
    told: list[str] = []

    def slow(seen: cmi.Recordings) -> list[float]:
        told.append("begins")
        time.sleep(0.05)
        told.append("ends")
        return always(0)(seen)

    with ThreadPoolExecutor(4) as pool:
        [*pool.map(functools.partial(ask, serve({"lgbm/all": slow})), range(4))]
    assert told == ["begins", "ends"] * 4


def test_others_are_told(serve: Any, tmp_path: Path, monkeypatch: Patch, capsys: Printed) -> None:
    """Of several weights, as with two bundles attached, the first are taken; the others are told."""
    monkeypatch.setattr(cmi, "KAGGLE_INPUT", tmp_path / "input")
    predictor = serve({"lgbm/all": always(0)}, weights_of({"lgbm/all": 1.0}), **PLAIN)
    for name in ("a", "b"):
        copy = tmp_path / "input" / name / "ensemble"
        shutil.copytree(tmp_path / "ensemble", copy)
    shutil.rmtree(tmp_path / "ensemble")
    assert ask(predictor) == GESTURES[0]
    chosen, passed_over = (f"{tmp_path}/input/{name}/ensemble/weights.json" for name in "ab")
    printed = " ".join(capsys.readouterr().out.split())
    assert f"weights={chosen} passed_over={passed_over}" in printed


def test_parts_are_pooled_and_fixed_shares_hold(serve: Serve, capsys: Printed) -> None:
    rules = {"lgbm/all": always(0), "torch/all": always(1), "lgbm/imu": always(2)}
    found = weights_of({"lgbm/all": 0.2, "torch/all": 0.5, "lgbm/imu": 0.3})

    def odds(**settings: Any) -> float:
        """Of lgbm's label against torch's: (.475 / .175) to the power of their weights' difference."""
        proba = serve(rules, found, **settings).predict_proba(frame_of(), RIGHT)
        return float(np.log(proba[GESTURES[0]] / proba[GESTURES[1]]) / np.log(0.475 / 0.175))

    fixed = odds(ensemble_weights="lgbm:1,torch:3"), odds(ensemble_w_torch=1.0)
    warm = odds(ensemble_w_torch=1.0, ensemble_temperature=0.5)
    assert (odds(), *fixed, warm) == pytest.approx((-0.3, -0.5, -1, -2), abs=1e-4)
    assert odds(ensemble_weights="lgbm:0", strict=False) == pytest.approx(-0.3, abs=1e-4)
    assert "leave nothing" in capsys.readouterr().out
