"""Section 6: every feature and every channel obeys every contract."""

import itertools
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import reference
from made import alone, changed, joined, recordings, with_gaps
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.transform import Rotation

import cmi_pipeline as cmi
import cmi_simulator

LENGTHS = [40, 50, 31, 35, 32, 60, 30, 90, 29, 64, 65, 128, 129, 200, 33, 47]
ARRAYS = ("start", "acc", "rot", "thm", "tof", "person")


@pytest.fixture(scope="module")
def whole():
    """Complete recordings."""
    return recordings(LENGTHS, seed=1)


@pytest.fixture(scope="module")
def patchy():
    """Recordings with gaps of every kind, and some of only a few rows."""
    few = recordings([1, 2, 3, 4, 7, 8, 16, 17], seed=3)
    return joined([with_gaps(recordings([40, 50, 31, 35, 60, 64, 30, 90], seed=2)), few])


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    size = {"subjects": 3, "test_subjects": 1, "recordings_per_subject": 6}
    cmi_simulator.simulate(folder, **size, seed=5)
    return cmi.read_train(folder)


@pytest.fixture(scope="module")
def real():
    if "CMI_REAL_DATA" not in os.environ:
        pytest.skip("CMI_REAL_DATA names no folder")
    return cmi.read_train(Path(os.environ["CMI_REAL_DATA"]))


def everything(rec, **kwargs):
    """Name → (N) of the table, and name → (R) of the frames."""
    return tuple(
        dict(zip(made.names, made.x.T, strict=True)) for made in cmi.extract_features(rec, **kwargs)
    )


def identical(a, b):
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name, column in one.items():
            assert_array_equal(other[name], column, err_msg=name)


def picked(columns, recordings, rows):
    """Some recordings and their rows of what `everything` gives."""
    table, frames = columns
    return {n: c[recordings] for n, c in table.items()}, {n: c[rows] for n, c in frames.items()}


def lost(rec, *sensors, rows=slice(None)):
    """The same without some sensors, in some rows."""
    arrays = {name: getattr(rec, name).copy() for name in sensors}
    for name, array in arrays.items():
        array[rows] = 255 if name == "tof" else np.nan
    return changed(rec, **arrays)


# ---- the oracle --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whole", "patchy", "simulated", "real"])
def test_the_slow_reference_agrees(name, request):
    """1e-5 relative; for a value near zero, relative to a thousandth of the column's spread."""
    rec = request.getfixturevalue(name)
    table, frames = cmi.extract_features(rec)
    spread = np.array([np.std(c[np.isfinite(c)]) if np.isfinite(c).any() else 0 for c in table.x.T])
    for i in range(0, len(rec), 3 if name == "simulated" else 1):
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


# ---- hand-computed -----------------------------------------------------------------------------


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


@pytest.mark.parametrize("frequency", [4, 13, 20, 30])  # 64ths of a cycle per row
def test_a_rhythm_is_found_at_its_frequency(frequency):
    acc = np.zeros((64, 3), np.float32)
    acc[:, 1] = 3 * np.sin(2 * np.pi * frequency / 64 * np.arange(64))
    rot = np.tile(np.float32([1, 0, 0, 0]), (64, 1))
    x, _ = everything(changed(recordings([64]), acc=acc, rot=rot))
    assert x["lin_y_peak"][0] == x["lin_peak"][0] == frequency / 64
    assert abs(x["lin_y_centroid"][0] - frequency / 64) < 0.01
    assert x[f"lin_y_band{(frequency - 1) // 8 + 1}"][0] > 0.99
    assert np.isnan(x["omega_power"][0])  # it does not turn


def test_a_period_of_five_rows_echoes_after_five():
    acc = np.tile(np.float32([[5, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]), (20, 1))
    rot = np.tile(np.float32([1, 0, 0, 0]), (100, 1))
    x, _ = everything(changed(recordings([100]), acc=acc, rot=rot))
    assert x["lin_echo_period"][0] == x["lin_mag_echo_period"][0] == 5
    assert_allclose(x["lin_echo_strength"], x["lin_echo5"])


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
    assert set(frames["tof_2_dist"]) == set(frames["tof_2_min"]) == {250}
    assert set(frames["tof_2_near"]) == set(frames["tof_2_cx"]) == {0}


def test_the_warmest_sensor_is_named():
    thm = np.full((50, 5), 25, np.float32)
    thm[:, 2] += np.linspace(0, 4.9, 50)
    x, _ = everything(changed(recordings([50]), thm=thm))
    assert x["thm_3_hottest"][0] == 1
    assert_allclose(x["thm_3_slope"], 0.1, rtol=1e-5)
    assert_allclose(x["thm_3_rise"], 3.4 - 0.1, rtol=1e-5)
    assert x["thm_1_rise"][0] == 0


# ---- contracts ---------------------------------------------------------------------------------


def test_names_are_unique_and_explained(whole):
    table, frames = cmi.extract_features(whole)
    assert len(set(table.names)) == len(table.names) == table.x.shape[1]
    assert len(set(frames.names)) == len(frames.names) == frames.x.shape[1]
    groups = [name for name, _ in frames.groups]
    assert groups == ["acc", "rot", "motion", "thm", *(f"tof_{i}" for i in range(1, 6))]
    lines = cmi.feature_help()
    assert [name for name, _, _ in lines] == list(table.names)
    assert all(unit.strip("= ") and text and "\n" not in text for _, unit, text in lines)
    units = {name: unit for name, unit, _ in lines}
    assert units["lin_x_sd"] == units["world_up_change"] == "m/s²"
    assert (units["lin_x_skew"], units["thm_2_slope"]) == ("1", "°C/row")
    assert units["omega_gesture_power"] == "log10 (rad/s)²"


def test_a_feature_is_one_function_and_one_line(whole, monkeypatch, capsys):
    def warmest(ch):
        """The warmest reading
        of all.

        A second paragraph.
        """
        return np.maximum.reduceat(ch.rec.thm[:, :1], ch.rec.start[:-1]).T

    before = cmi.extract_features(whole, frames=False)[0]
    line = (warmest, {"thm_1_highest": "°C"})
    monkeypatch.setattr(cmi, "FEATURES", (*cmi.FEATURES, line))
    table = cmi.extract_features(whole, frames=False)[0]
    assert table.names == (*before.names, "thm_1_highest")
    expected = [whole.thm[a:b, 0].max() for a, b in itertools.pairwise(whole.start)]
    assert_array_equal(table.x[:, -1], expected)
    assert "thm_1_highest" not in table.of_mode("imu").names
    cmi.print_feature_help()
    printed = capsys.readouterr().out
    assert "warmest: The warmest reading of all.\n  thm_1_highest" in printed
    assert [row.split() for row in printed.splitlines() if row.startswith("  ")] == [
        [name, *unit.split()] for name, unit, _ in cmi.feature_help()
    ]


@pytest.mark.parametrize("i", range(16))
def test_alone_is_the_same_as_together(patchy, i):
    rows = slice(patchy.start[i], patchy.start[i + 1])
    identical(everything(alone(patchy, i)), picked(everything(patchy), [i], rows))


def test_order_does_not_matter(patchy):
    order = np.random.default_rng(0).permutation(len(patchy))
    shuffled = everything(joined([alone(patchy, i) for i in order]))
    rows = np.concatenate([np.arange(patchy.start[i], patchy.start[i + 1]) for i in order])
    identical(shuffled, picked(everything(patchy), order, rows))


def test_cutting_into_chunks_and_workers_do_not_matter(patchy, whole, monkeypatch):
    rec = joined([patchy, whole])
    expected = everything(rec)
    for rows, image_rows, workers in ((1, 7, 3), (100, 64, 2), (10**9, 10**9, 1)):
        monkeypatch.setattr(cmi, "CHUNK_ROWS", rows)
        monkeypatch.setattr(cmi, "IMAGE_ROWS", image_rows)
        identical(everything(rec, workers=workers), expected)


def test_what_is_not_wanted_stays_empty_and_leaves_the_rest(patchy):
    table, frames = cmi.extract_features(patchy)
    only_table, no_frames = cmi.extract_features(patchy, frames=False)
    no_table, only_frames = cmi.extract_features(patchy, table=False)
    assert_array_equal(only_table.x, table.x)
    assert_array_equal(only_frames.x, frames.x)
    assert no_table.x.shape == (0, len(table.names))
    assert no_frames.x.shape == (0, len(frames.names))


def test_progress_counts_recordings(whole, monkeypatch):
    monkeypatch.setattr(cmi, "CHUNK_ROWS", 200)
    done = []
    progress = cmi.Progress("features", len(whole), 10**6, cmi.Config())
    monkeypatch.setattr(progress, "step", lambda n=1: done.append(n))
    cmi.extract_features(whole, progress=progress)
    assert len(done) > 2
    assert sum(done) == len(whole)


def test_the_input_is_left_alone(patchy):
    before = [getattr(patchy, n).copy() for n in ARRAYS]
    for n in ARRAYS:
        getattr(patchy, n).flags.writeable = False
    everything(patchy)
    for n, old in zip(ARRAYS, before, strict=True):
        assert_array_equal(getattr(patchy, n), old)
        getattr(patchy, n).flags.writeable = True


def test_a_complete_recording_has_no_gaps_and_nothing_is_infinite(whole, patchy):
    tof = whole.tof.copy()
    tof[:, :, ::2, ::2] = np.minimum(tof[:, :, ::2, ::2], 249)  # something in every quarter
    table, frames = everything(changed(whole, tof=tof))
    long = np.diff(whole.start) > 33  # else nothing is before the gesture
    for name, column in table.items():
        expected = long if "before" in name or "change" in name else slice(None)
        assert np.isfinite(column[expected]).all(), name
    for name, column in frames.items():
        assert np.isfinite(column).all(), name
    for part in everything(patchy):
        for name, column in part.items():
            assert not np.isinf(column).any(), name


def test_no_warning_is_raised(patchy):
    with np.errstate(all="raise", under="ignore"):
        cmi.extract_features(patchy, workers=1)


def test_all_sensors_missing(whole):
    table, frames = everything(lost(whole, "acc", "rot", "thm", "tof"))
    known = {"adult_child", "age", "sex", "height_cm", "shoulder_to_wrist_cm", "n_rows"}
    known |= {"elbow_to_wrist_cm", "arm_to_height", "forearm_to_arm"}
    for name, column in table.items():
        if name.endswith("_present"):
            assert_array_equal(column, 0, err_msg=name)
        elif name not in known:
            assert np.isnan(column).all(), name
    assert all(np.isnan(column).all() for column in frames.values())


def test_five_thousand_rows_and_one_row():
    rec = recordings([1, 5000, 1], seed=6)
    table, _ = everything(rec)
    assert_allclose(table["acc_x_mean"][1], rec.acc[1:5001, 0].mean(dtype=float), rtol=1e-6)
    assert_array_equal(table["acc_x_mean"][[0, 2]], rec.acc[[0, 5001], 0])
    assert_array_equal(table["acc_x_sd"][[0, 2]], 0)


def test_a_constant_recording_has_no_shape():
    rec = recordings([50], seed=7)
    still = {n: np.repeat(getattr(rec, n)[:1], 50, axis=0) for n in ("acc", "rot", "thm", "tof")}
    table, _ = everything(changed(rec, **still))
    for name, column in table.items():
        if name.endswith(("_sd", "_iqr", "_delta", "_change", "_step")) and np.isfinite(column[0]):
            assert abs(column[0]) < 1e-6, name
        if name.endswith(("_skew", "_kurtosis", "_entropy", "_echo1")) or "corr_" in name:
            assert np.isnan(column[0]), name


# ---- symmetries --------------------------------------------------------------------------------


def test_a_left_handed_twin_has_the_features_of_its_right_handed_original(patchy):
    person = patchy.person.copy()
    person[:, 3] = 0
    twin = cmi.apply_map(patchy, np.ones(len(patchy), bool), cmi.MIRROR)
    twin = changed(twin, person=person)
    original = everything(patchy)
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
    moved = {
        name
        for a, b in zip(everything(whole), everything(changed(whole, rot=rot)), strict=True)
        for name in a
        if not np.allclose(a[name], b[name], rtol=1e-4, atol=1e-4, equal_nan=True)
    }
    stems = [f"{direction}_{axis}" for direction in ("north", "west") for axis in "xyz"]
    assert moved == {f"{n}{part}" for n in stems for part in ("", "_before_mean", "_gesture_mean")}


def with_another_band(rec):
    """The same movement, felt by a device that sits otherwise on the wrist; and how it sits."""
    band = Rotation.from_rotvec([0.4, -1.1, 0.7])
    rot = Rotation.from_quat(rec.rot.astype(float), scalar_first=True) * band
    acc = band.inv().apply(rec.acc.astype(float))
    return changed(rec, acc=acc, rot=rot.as_quat(scalar_first=True)), band


def test_pose_free_features_do_not_feel_the_wristband_turn(whole):
    a, b = everything(whole)[0], everything(with_another_band(whole)[0])[0]
    stems = ("acc_mag", "lin_mag", "world_up", "world_flat", "omega_mag", "jerk_mag", "swing")
    stems += ("lean", "lin_band", "omega_band", "lin_gesture_band", "lin_echo", "lin_centroid")
    checked = [n for n in a if n.startswith((*stems, "lin_entropy")) and not n.endswith("period")]
    assert len(checked) > 200
    for name in checked:
        assert_allclose(b[name], a[name], rtol=2e-3, atol=2e-3, err_msg=name)


def test_every_vector_of_the_frames_turns_with_the_wristband(whole):
    """The triples that augmentation turns, and nothing else of the motion, turn as the device."""
    other, band = with_another_band(whole)
    a, b = (cmi.extract_features(rec, table=False)[1].of_mode("imu") for rec in (whole, other))
    expected = a.x.copy()
    for triple in cmi.vector_triples(a.names):
        expected[:, triple] = band.inv().apply(a.x[:, triple])
    assert_allclose(b.x, expected, atol=2e-3)
    stems = [a.names[x][:-2] for x, _, _ in cmi.vector_triples(a.names)]
    assert stems == ["acc", "up", "north", "west", "lin", "omega", "jerk"]


# ---- modalities --------------------------------------------------------------------------------


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
    assert imu.x.shape == (len(imu), len(imu.names)) == (len(patchy), blank.x.shape[1])
    assert_array_equal(frames.of_mode("imu").x, bare.x)
    assert frames.of_mode("imu").tof is None
    assert [g for g, _ in frames.of_mode("imu").groups] == ["acc", "rot", "motion"]
    assert table.of_mode("all") is table
    assert frames.of_mode("all") is frames


def test_some_recordings_can_be_taken(patchy):
    table, frames = cmi.extract_features(patchy)
    index = np.array([5, 0, 11])
    assert_array_equal(table.take(index).x, table.x[index])
    some = frames.take(index)
    assert len(some) == 3
    for k, i in enumerate(index):
        rows = slice(patchy.start[i], patchy.start[i + 1])
        own = slice(some.start[k], some.start[k + 1])
        assert_array_equal(some.x[own], frames.x[rows])
        assert_array_equal(some.tof[own], patchy.tof[rows])
    mask = np.isin(np.arange(len(patchy)), index)
    assert_array_equal(frames.take(mask).x, frames.take(np.sort(index)).x)
    assert_array_equal(table.take(mask).x, table.take(np.sort(index)).x)


def test_memory_is_a_small_multiple_of_the_result():
    rec = recordings([60] * 500, seed=9)
    cmi.extract_features(rec.part(0, 1))
    tracemalloc.start()
    table, frames = cmi.extract_features(rec, workers=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < table.x.nbytes + frames.x.nbytes + 250e6
