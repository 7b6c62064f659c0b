"""Section 6: every feature and every channel obeys every contract."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import reference
from made import alone, changed, joined, recordings, with_gaps
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.transform import Rotation

import cmi_pipeline as cmi
import cmi_simulator


def sealed(rec):
    for name in ("start", "acc", "rot", "thm", "tof", "person"):
        getattr(rec, name).flags.writeable = False
    return rec


@pytest.fixture(scope="module")
def whole():
    return sealed(recordings([40, 31, 32, 30, 90, 29, 64, 65, 129, 33], seed=1))


@pytest.fixture(scope="module")
def patchy():
    """Recordings with gaps of every kind, some of only a few rows, one at rest, one of nothing."""
    few = recordings([1, 2, 3, 4, 7, 8, 16, 17, 50, 40], seed=3)
    for name in ("acc", "rot", "thm", "tof"):
        array = getattr(few, name)
        array[-90:-40], array[-40:] = array[-90], 255 if name == "tof" else np.nan
    return sealed(joined([with_gaps(recordings([40, 50, 31, 35, 60, 64, 30, 90], seed=2)), few]))


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    cmi_simulator.simulate(folder, 2, 1, seed=5, recordings_per_subject=4)
    return cmi.read_train(folder)


@pytest.fixture(scope="module")
def real():
    if "CMI_REAL_DATA" not in os.environ:
        pytest.skip("CMI_REAL_DATA names no folder")
    return cmi.read_train(Path(os.environ["CMI_REAL_DATA"]))


def everything(rec, **kwargs):
    """Name → (N) of the table, and name → (R) of the frames."""
    made = cmi.extract_features(rec, **kwargs)
    return tuple(dict(zip(part.names, part.x.T, strict=True)) for part in made)


def identical(a, b):
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name, column in one.items():
            assert_array_equal(other[name], column, err_msg=name)


def lost(rec, *sensors, rows=slice(None)):
    arrays = {name: getattr(rec, name).copy() for name in sensors}
    for name, array in arrays.items():
        array[rows] = 255 if name == "tof" else np.nan
    return changed(rec, **arrays)


@pytest.mark.parametrize("name", ["whole", "patchy", "simulated", "real"])
def test_the_slow_reference_agrees(name, request):
    """1e-5 relative; for a value near zero, relative to a thousandth of the column's spread."""
    rec = request.getfixturevalue(name)
    table, frames = cmi.extract_features(rec)
    spread = np.array([np.std(c[np.isfinite(c)]) if np.isfinite(c).any() else 0 for c in table.x.T])
    for i in range(len(rec)):
        expected = reference.features(rec, i)
        assert sorted(expected) == sorted(table.names)
        for k, column in enumerate(table.names):
            floor, message = 1e-8 * spread[k] + 1e-12, f"{column} of recording {i}"
            assert_allclose(table.x[i, k], expected[column], rtol=1e-5, atol=floor, err_msg=message)
        expected = reference.channels(rec, i)
        assert sorted(expected) == sorted(frames.names)
        for column, x in zip(frames.names, frames.take(np.array([i])).x.T, strict=True):
            message = f"{column} of recording {i}"
            assert_allclose(x, expected[column], rtol=1e-5, atol=1e-6, err_msg=message)


def test_statistics_of_a_ramp():
    acc = np.zeros((40, 3), np.float32)
    acc[:, 0] = np.arange(40)
    x, _ = everything(changed(recordings([40]), acc=acc))
    assert x["acc_x_mean"][0] == 19.5
    assert_allclose(x["acc_x_sd"], np.sqrt((40**2 - 1) / 12), rtol=1e-6)
    assert (x["acc_x_min"][0], x["acc_x_q25"][0], x["acc_x_max"][0]) == (0, 9.75, 39)
    assert (x["acc_x_first"][0], x["acc_x_last"][0], x["acc_x_delta"][0]) == (1, 38, 37)
    assert x["acc_x_before_mean"][0] == 4  # rows 0 … 8; the gesture is the last 31
    assert (x["acc_x_gesture_mean"][0], x["acc_x_change"][0]) == (24, 20)
    assert (x["acc_x_gesture_min"][0], x["acc_x_gesture_q50"][0]) == (9, 24)
    assert (x["acc_x_step"][0], x["acc_x_step_sd"][0]) == (1, 0)
    assert x["acc_x_step_bin6"][0] == 1  # from 1 up to 4
    assert x["n_rows"][0] == 40


def test_a_hand_in_a_corner_is_seen_there():
    tof = np.full((40, 5, 8, 8), 254, np.uint8)
    tof[:, 0, :2, 6:] = 100  # top right of sensor 1
    tof[:, 0, 0, 7] = 60
    x, frames = everything(changed(recordings([40]), tof=tof))
    expected = {"min": 60, "cx": 3, "cy": -3, "ne_near": 4 / 16, "asym_x": 4 / 64}
    expected |= {"asym_y": -4 / 64, "sx": -20, "sy": 20}  # nearer to the right, and at the top
    assert {n: x[f"tof_1_{n}_gesture_mean"][0] for n in expected} == expected
    assert (x["tof_1_near_mean"][0], x["tof_1_dist_mean"][0]) == (4 / 64, 90)
    assert x["tof_2_near_mean"][0] == 0
    assert np.isnan(x["tof_2_dist_mean"][0])
    for name, nothing in (("dist", 250), ("min", 250), ("near", 0), ("cx", 0)):
        assert set(frames[f"tof_2_{name}"]) == {nothing}


def test_names_are_unique_and_explained(whole):
    table, frames = cmi.extract_features(whole)
    for made in (table, frames):
        assert len(set(made.names)) == len(made.names) == made.x.shape[1]
    lines = cmi.feature_help()
    assert [name for name, _, _ in lines] == list(table.names)
    assert all(unit.strip("= ") and text and "\n" not in text for _, unit, text in lines)
    units = {name: unit for name, unit, _ in lines}
    assert units["lin_x_sd"] == units["world_up_change"] == "m/s²"
    assert (units["lin_x_skew"], units["thm_2_slope"]) == ("1", "°C/row")


def test_a_feature_is_one_function_and_one_line(whole, monkeypatch, capsys):
    def warmest(ch):
        """The warmest reading."""
        return np.maximum.reduceat(ch.rec.thm[:, :1], ch.rec.start[:-1]).T

    before = cmi.extract_features(whole, frames=False)[0]
    monkeypatch.setattr(cmi, "FEATURES", (*cmi.FEATURES, (warmest, {"thm_1_highest": "°C"})))
    table = cmi.extract_features(whole, frames=False)[0]
    assert table.names == (*before.names, "thm_1_highest")
    expected = [whole.thm[a:b, 0].max() for a, b in itertools.pairwise(whole.start)]
    assert_array_equal(table.x[:, -1], expected)
    assert "thm_1_highest" not in table.of_mode("imu").names
    cmi.print_feature_help()
    assert "warmest: The warmest reading.\n  thm_1_highest" in capsys.readouterr().out


def test_alone_is_the_same_as_together(patchy):
    together = everything(patchy)
    for i, (a, b) in enumerate(itertools.pairwise(patchy.start)):
        expected = [{n: c[rows] for n, c in part.items()}
                    for part, rows in zip(together, ([i], slice(a, b)), strict=True)]  # fmt: skip
        identical(everything(alone(patchy, i)), expected)


def test_cutting_into_chunks_and_workers_do_not_matter(patchy, whole, monkeypatch):
    rec = joined([patchy, whole])
    expected = everything(rec)
    for rows, image_rows, workers in ((1, 7, 3), (100, 64, 2), (10**9, 10**9, 1)):
        monkeypatch.setattr(cmi, "CHUNK_ROWS", rows)
        monkeypatch.setattr(cmi, "IMAGE_ROWS", image_rows)
        monkeypatch.setattr(cmi, "FEATURE_THREADS", workers)
        identical(everything(rec), expected)


def test_a_complete_recording_has_no_gaps_and_nothing_is_infinite(whole, patchy):
    tof = whole.tof.copy()
    tof[:, :, ::2, ::2] = np.minimum(tof[:, :, ::2, ::2], 249)  # something in every quarter
    table, frames = everything(changed(whole, tof=tof))
    long = np.diff(whole.start) > 33  # else nothing is before the gesture
    for name, column in table.items():
        expected = long if "before" in name or "change" in name else slice(None)
        assert np.isfinite(column[expected]).all(), name
    assert all(np.isfinite(column).all() for column in frames.values())
    with np.errstate(all="raise", under="ignore"):
        gappy = cmi.extract_features(patchy)
    assert not any(np.isinf(part.x).any() for part in gappy)


def test_a_left_handed_twin_has_the_features_of_its_right_handed_original(patchy):
    twin = cmi.apply_map(patchy, np.ones(len(patchy), bool), cmi.MIRROR)
    person = patchy.person * np.array([1, 1, 1, 0, 1, 1, 1], np.float32)  # nobody is right-handed
    twin, original = changed(twin, person=person), everything(patchy)
    identical(everything(cmi.canonical(twin, np.zeros(len(patchy), bool))), original)
    assert (everything(twin)[0]["acc_x_mean"] != original[0]["acc_x_mean"]).all()


def test_an_upside_down_twin_has_the_features_of_its_original(whole):
    every = np.ones(len(whole), bool)
    twin = cmi.apply_map(whole, every, cmi.HALF_TURN)
    identical(everything(cmi.canonical(twin, every)), everything(whole))


def test_the_compass_heading_matters_only_where_it_is_named(whole):
    """A turn of the world about the vertical, after which the quaternions are other numbers."""
    q = Rotation.from_quat(whole.rot.astype(float), scalar_first=True)
    rot = (Rotation.from_euler("z", 1.4) * q).as_quat(scalar_first=True)
    moved, near = set(), {"rtol": 1e-4, "atol": 1e-4, "equal_nan": True}
    for a, b in zip(everything(whole), everything(changed(whole, rot=rot)), strict=True):
        moved |= {name for name in a if not np.allclose(a[name], b[name], **near)}
    stems = [f"{direction}_{axis}" for direction in ("north", "west") for axis in "xyz"]
    assert moved == {f"{n}{part}" for n in stems for part in ("", "_before_mean", "_gesture_mean")}


@pytest.mark.parametrize("sensors", [("thm",), ("tof",), ("thm", "tof")])
def test_a_dropped_modality_is_as_if_it_had_never_been_there(patchy, sensors):
    mask, none = np.random.default_rng(0).random(len(patchy)) < 0.5, np.zeros(len(patchy), bool)
    rows = np.repeat(mask, np.diff(patchy.start))
    table = cmi.extract_features(patchy, frames=False)[0]
    got = table.without(*(mask if s in sensors else none for s in ("thm", "tof")))
    expected = cmi.extract_features(lost(patchy, *sensors, rows=rows), frames=False)[0]
    for k, name in enumerate(table.names):
        assert_array_equal(got.x[:, k], expected.x[:, k], err_msg=name)
    assert not np.array_equal(got.x, table.x, equal_nan=True)


def test_imu_mode_has_no_trace_of_tof_and_thm(patchy):
    table, frames = cmi.extract_features(patchy)
    blank, bare = (made.of_mode("imu") for made in cmi.extract_features(lost(patchy, "thm", "tof")))
    imu = table.of_mode("imu")
    assert imu.names == tuple(n for n in table.names if "thm" not in n and "tof" not in n)
    assert_array_equal(imu.x, blank.x)
    assert imu.x.shape == (len(patchy), len(imu.names)) == blank.x.shape
    assert_array_equal(frames.of_mode("imu").x, bare.x)
    assert frames.of_mode("imu").tof is None
    assert [g for g, _ in frames.of_mode("imu").groups] == ["acc", "rot", "motion"]
    assert table.of_mode("all") is table
    assert frames.of_mode("all") is frames


def test_some_recordings_can_be_taken(patchy):
    table, frames = cmi.extract_features(patchy)
    index = np.array([5, 0, 11])
    assert_array_equal(table.take(index).x, table.x[index])
    some, rows = frames.take(index), [np.arange(*patchy.start[[i, i + 1]]) for i in index]
    assert_array_equal(np.diff(some.start), [len(own) for own in rows])
    assert_array_equal(some.x, frames.x[np.concatenate(rows)])
    assert_array_equal(some.tof, patchy.tof[np.concatenate(rows)])
    mask = np.isin(np.arange(len(patchy)), index)
    for made in (table, frames):
        assert_array_equal(made.take(mask).x, made.take(np.sort(index)).x)
