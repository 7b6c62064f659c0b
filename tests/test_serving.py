"""predict with models that answer by rule: routes, memory, wearers, fallbacks and threads."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from made import alone, changed, recordings

import cmi_pipeline as cmi

TABLE = np.array([(0, 0, g) for g in (0, 5, 9, 14)])
MAJORITY = 16
Rule = Callable[[cmi.Recordings], list[float]]


def frame_of(rec: cmi.Recordings, subject: str = "SUBJ_1", name: str = "") -> pl.DataFrame:
    """One recording as the gateway hands it over."""
    pixels = rec.tof.reshape(-1, 320).astype(np.float64)
    pixels = np.where(pixels == 255, np.nan, np.where(pixels == 254, -1, pixels))
    values = np.concatenate([rec.acc, rec.rot, rec.thm, pixels], axis=1)
    columns = {c: values[:, i] for i, c in enumerate(cmi.SENSORS)}
    names = {"sequence_id": name or str(rec.sequence_id[0]), "subject": subject}
    lit = [pl.lit(text).alias(column) for column, text in names.items()]
    return pl.DataFrame(columns).fill_nan(None).with_columns(lit)


def person_of(left: bool = False) -> pl.DataFrame:
    row = {"adult_child": 1, "age": 30, "sex": 0, "handedness": int(not left), "height_cm": 170.0}
    arm = {"shoulder_to_wrist_cm": 52, "elbow_to_wrist_cm": 25.0}
    return pl.DataFrame({"subject": ["SUBJ_1"], **{k: [v] for k, v in (row | arm).items()}})


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., cmi.Predictor]:
    """A predictor whose models of each mode answer by a rule of what reaches them; two folds."""

    def make(rules: dict[str, Rule], wearer: Any = None, **settings: Any) -> cmi.Predictor:
        def prepare(inputs: cmi.Inputs, _: str) -> cmi.Recordings:
            return inputs.rec

        def predict(rule: Rule, rec: cmi.Recordings) -> cmi.F32:
            first = np.array(rule(rec), np.float32)[None]
            return np.stack([first, np.full_like(first, 0.25)])

        member = cmi.Member(("numpy",), (), prepare, None, None, predict, 1.0)  # type: ignore[arg-type]
        monkeypatch.setattr(cmi, "MEMBERS", {"lgbm": member})
        parts = {f"lgbm/{mode}": rule for mode, rule in rules.items()}
        blends = {m: cmi.Blend((f"lgbm/{m}",), (1.0,), "probability", (None,)) for m in rules}
        predictor = cmi.Predictor(cmi.Config(**{"strict": True, **settings}))
        predictor.served = cmi.Served(parts, blends, TABLE, MAJORITY, wearer)
        return predictor

    return make


def always(label: int) -> Rule:
    return lambda _: [0.7 if i == label else 0.1 for i in range(len(TABLE))]


ROUTES = {"all": always(0), "imu": always(1), "norot": always(2)}
ANSWER = {mode: cmi.GESTURES[TABLE[i, 2]] for i, mode in enumerate(ROUTES)}


@pytest.fixture(scope="module")
def rec() -> cmi.Recordings:
    return recordings([40, 30, 50, 20], seed=4)


def lost(rec: cmi.Recordings, share: float, code: int) -> cmi.Recordings:
    """The first rows' ToF replaced by a code."""
    tof = rec.tof.copy()
    tof[: round(share * len(tof))] = code
    return changed(rec, tof=tof)


def test_a_recording_goes_to_the_models_that_know_its_sensors(
    serve: Callable[..., cmi.Predictor], rec: cmi.Recordings
) -> None:
    predictor = serve(ROUTES, subject_assignment=False)
    one, gap = alone(rec, 0), alone(rec, 0).rot.copy()
    gap[:39] = np.nan
    cases = [
        (one, "all"),
        (lost(one, 0.4, 255), "all"),
        (lost(one, 0.6, 255), "imu"),
        (lost(one, 1.0, 254), "all"),  # it sees that nothing is there
        (changed(one, rot=gap), "all"),  # one row tells of the rest
        (changed(one, rot=gap * np.nan), "norot"),
        (lost(changed(one, rot=gap * np.nan), 1.0, 255), "norot"),
    ]
    for case, mode in cases:
        assert predictor.predict(frame_of(case), person_of()) == ANSWER[mode]
    two = serve({m: ROUTES[m] for m in cmi.MODES}, subject_assignment=False)
    blind = frame_of(changed(one, rot=gap * np.nan))
    assert two.predict(blind, person_of()) == ANSWER["all"]


def test_answers_of_all_folds_are_averaged(
    serve: Callable[..., cmi.Predictor], rec: cmi.Recordings
) -> None:
    predictor = serve({"all": lambda _: [1.0, 0.0, 0.0, 0.0]})
    raw = cmi.to_recordings(frame_of(alone(rec, 0)), person_of())
    expected = [[(1 + 0.25) / 2, 0.125, 0.125, 0.125]]
    np.testing.assert_allclose(predictor.composite(raw), expected, atol=1e-6)


def test_left_handers_reach_the_models_mirrored(
    serve: Callable[..., cmi.Predictor], rec: cmi.Recordings
) -> None:
    reached = []

    def look(seen: cmi.Recordings) -> list[float]:
        reached.append(seen)
        return always(0)(seen)

    predictor = serve({"all": look})
    for left in (False, True):
        predictor.predict(frame_of(alone(rec, 0)), person_of(left))
    right, mirrored = reached
    np.testing.assert_array_equal(mirrored.acc, right.acc * [-1, 1, 1])
    np.testing.assert_array_equal(right.acc, alone(rec, 0).acc)


def test_memory_is_of_content_and_never_grows_beyond_its_size(
    serve: Callable[..., cmi.Predictor], rec: cmi.Recordings
) -> None:
    asked = []

    def count(seen: cmi.Recordings) -> list[float]:
        asked.append(len(seen.acc))
        return always(len(seen.acc) % 4)(seen)

    predictor = serve({"all": count}, subject_assignment=False, frame_cache_max_items=2)
    parts = [frame_of(alone(rec, i), name="SEQ_SAME") for i in range(4)]
    answers = [predictor.predict(parts[i], person_of()) for i in (0, 1, 0, 2, 0, 3, 1)]
    lengths = [40, 30, 40, 50, 40, 20, 30]
    assert answers == [cmi.GESTURES[TABLE[n % 4, 2]] for n in lengths]
    assert asked == [40, 30, 50, 20, 30], "0 was asked again and stays, 1 is the oldest and goes"
    assert len(predictor.answers) == 2


def test_each_wearer_gets_each_label_once(
    serve: Callable[..., cmi.Predictor], rec: cmi.Recordings
) -> None:
    predictor = serve({"all": lambda _: [0.4, 0.3, 0.2, 0.1]})
    first, second = (frame_of(alone(rec, i)) for i in (0, 1))
    best, next_best = cmi.GESTURES[0], cmi.GESTURES[5]
    assert predictor.predict(first, person_of()) == best
    assert predictor.predict(second, person_of()) in (best, next_best)
    assert predictor.predict(first, person_of()) in (best, next_best)
    stranger = frame_of(alone(rec, 1), subject="SUBJ_2")
    assert predictor.predict(stranger, person_of()) == best, "another wearer starts anew"
    names = {"SUBJ_1": 2, "SUBJ_2": 1}
    assert {s: len(a.rows) for s, a in predictor.assignments.items()} == names
    plain = serve({"all": lambda _: [0.4, 0.3, 0.2, 0.1]}, subject_assignment=False)
    assert [plain.predict(f, person_of()) for f in (first, second)] == [best, best]


def test_evidence_of_a_turned_device_adds_up_over_its_wearers_recordings(
    serve: Callable[..., cmi.Predictor],
) -> None:
    """Weak evidence: one recording is not enough, two are; each counts once; wearers are apart."""
    odd = cmi.odd_features(recordings([40], seed=4))
    coefficients = [0.0] * cmi.N_ODD
    coefficients[0] = -1.0 / float(odd[0, 0])  # every recording says -1
    wearer = {"prior": 1.5, "coefficients": coefficients}
    reached = []

    def look(seen: cmi.Recordings) -> list[float]:
        reached.append(seen.acc[0, 1])
        return always(0)(seen)

    predictor = serve({"all": look}, wearer, frame_cache_max_items=0)
    one = recordings([40], seed=4)
    asks = [("SEQ_1", "SUBJ_1"), ("SEQ_1", "SUBJ_1"), ("SEQ_9", "SUBJ_2"), ("SEQ_2", "SUBJ_1")]
    for name, subject in asks:
        predictor.predict(frame_of(one, subject, name), person_of())
    upright = one.acc[0, 1]
    np.testing.assert_array_equal(reached, [upright, upright, upright, -upright])
    off = serve({"all": look}, wearer, upside_down=False)
    for name in ("SEQ_1", "SEQ_2"):
        off.predict(frame_of(one, "SUBJ_1", name), person_of())
    assert reached[4] == upright


def failing(_: cmi.Recordings) -> list[float]:
    raise ValueError("planted")


def test_a_failure_is_counted_and_answered_and_in_strict_mode_raised(
    serve: Callable[..., cmi.Predictor], rec: cmi.Recordings, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = frame_of(alone(rec, 0))
    lenient = serve({"all": failing}, strict=False)
    for n in (1, 2):
        assert lenient.predict(frame, person_of()) == cmi.GESTURES[MAJORITY]
        counts = lenient.fallbacks
        assert counts["ValueError: planted"] == counts["lgbm/all: ValueError: planted"] == n
    printed = capsys.readouterr()
    assert "answer=majority" in printed.out
    assert "planted" in printed.err, "with its traceback"
    with pytest.raises(ValueError, match="planted"):
        serve({"all": failing}).predict(frame, person_of())


def test_in_strict_mode_a_part_that_fails_is_not_left_out(
    serve: Callable[..., cmi.Predictor], rec: cmi.Recordings
) -> None:
    frame = frame_of(alone(rec, 0))
    for strict in (False, True):
        predictor = serve({"all": failing, "imu": always(1)}, strict=strict)
        assert predictor.served
        both = cmi.Blend(("lgbm/all", "lgbm/imu"), (0.5, 0.5), "probability", (None, None))
        predictor.served.blends["all"] = both
        if strict:
            with pytest.raises(ValueError, match="planted"):
                predictor.predict(frame, person_of())
        else:
            assert predictor.predict(frame, person_of()) == ANSWER["imu"]
            assert predictor.fallbacks.total() == 1


def test_questions_at_once_are_answered_one_after_the_other(
    serve: Callable[..., cmi.Predictor], rec: cmi.Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most, read = [], [], cmi.to_recordings

    def slow(*frames: pl.DataFrame) -> cmi.Recordings:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return read(*frames)

    monkeypatch.setattr(cmi, "to_recordings", slow)
    predictor = serve({"all": always(0)})
    frames = [frame_of(alone(rec, i)) for i in range(4)]
    asks = [
        threading.Thread(target=predictor.predict, args=(frame, person_of())) for frame in frames
    ]
    for ask in asks:
        ask.start()
    for ask in asks:
        ask.join()
    assert most == [1] * 4
    assert predictor.calls == 4


def test_who_is_left_answers_though_without_weight(
    serve: Callable[..., cmi.Predictor], rec: cmi.Recordings
) -> None:
    predictor = serve({"all": always(2)})
    assert predictor.served
    parts = ("torch/all", "lgbm/all")  # only the second is loaded
    predictor.served.blends["all"] = cmi.Blend(parts, (1.0, 0.0), "probability", (None, None))
    assert predictor.predict(frame_of(alone(rec, 0)), person_of()) == ANSWER["norot"]
    assert not predictor.fallbacks


class ForeignError(Exception):
    """As TensorFlow's and LightGBM's own, which derive from nothing narrower."""


def raising(_: cmi.Recordings) -> list[float]:
    raise ForeignError("planted")


def test_an_error_of_a_packages_own_kind_costs_that_part_alone(
    serve: Callable[..., cmi.Predictor], rec: cmi.Recordings
) -> None:
    predictor = serve({"all": raising, "imu": always(1)}, strict=False)
    assert predictor.served
    both = cmi.Blend(("lgbm/all", "lgbm/imu"), (0.5, 0.5), "probability", (None, None))
    predictor.served.blends["all"] = both
    assert predictor.predict(frame_of(alone(rec, 0)), person_of()) == ANSWER["imu"]
    assert predictor.fallbacks == {"lgbm/all: ForeignError: planted": 1}


def test_models_that_cannot_be_had_are_asked_for_once(
    serve: Callable[..., cmi.Predictor], rec: cmi.Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def load(_: cmi.Config) -> cmi.Served:
        tries.append(1)
        raise ForeignError("no card")

    monkeypatch.setattr(cmi, "load_served", load)
    predictor = serve(ROUTES, strict=False)
    predictor.served = None
    for _ in range(3):
        assert predictor.predict(frame_of(alone(rec, 0)), person_of()) == "Text on phone"
    assert len(tries) == 1, "a load can take minutes"
    assert predictor.fallbacks == {"ForeignError: no card": 3}


def test_fixed_weights_hold_for_bundles_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, knobs = ("lgbm/all", "torch/all", "lgbm/imu"), (None,) * 3
    blend = cmi.Blend(parts, (0.2, 0.5, 0.3), "probability", knobs)
    asked = cmi.Config(ensemble_weights="lgbm:1,torch:3")
    assert cmi.as_asked("all", blend, asked).weights == (0.25, 0.75, 0.0)
    assert cmi.as_asked("all", blend, cmi.Config()) is blend
    absent = cmi.Config(ensemble_weights="keras:1")
    assert cmi.as_asked("all", blend, absent) is blend
    assert "leave nothing" in capsys.readouterr().out

    def load(*_: object) -> str:
        return "a model"

    member = cmi.Member(("numpy",), (), None, None, load, None, 1.0)  # type: ignore[arg-type]
    monkeypatch.setattr(cmi, "MEMBERS", {"lgbm": member, "torch": member, "keras": member})
    found = {part: (Path(), ["fold00"], TABLE) for part in parts[:2]}
    monkeypatch.setattr(cmi, "find_models", lambda *_: found)
    monkeypatch.setattr(cmi, "chosen_weights", lambda _: (None, "defaults"))
    assert cmi.load_served(asked).blends["all"].weights == (0.25, 0.75)
    assert cmi.load_served(cmi.Config()).blends["all"].weights == (0.5, 0.5)
