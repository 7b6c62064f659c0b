"""Sections 7 and 8: every feature and every channel obeys every contract."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import reference
from made import alone, changed, joined, recordings, with_gaps
from numpy.testing import assert_allclose, assert_array_equal

import cmi_pipeline as cmi

ROOT = Path(__file__).parents[1]
LENGTHS = [40, 50, 31, 35, 32, 60, 30, 90, 29, 64, 65, 128, 129, 200, 33, 47]


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
    size = ("--subjects", "3", "--test-subjects", "1", "--recordings", "6", "--seed", "5")
    subprocess.run([sys.executable, ROOT / "cmi_simulator.py", folder, *size], check=True)
    return cmi.read_train(folder)


def everything(rec, **kwargs):
    """Name → (N) of the table, and name → (R) of the frames."""
    table, frames = cmi.feature_table(rec, **kwargs), cmi.make_frames(rec, **kwargs)
    return dict(zip(table.names, table.x.T, strict=True)), dict(
        zip(frames.names, frames.x.T, strict=True)
    )


def identical(a, b):
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name, column in one.items():
            assert_array_equal(other[name], column, err_msg=name)


# ---- the oracle --------------------------------------------------------------------------------


def check_against_reference(rec, which):
    """1e-5 relative; for a value near zero, relative to a thousandth of the column's spread."""
    table, frames = cmi.feature_table(rec), cmi.make_frames(rec)
    spread = np.array([np.std(c[np.isfinite(c)]) if np.isfinite(c).any() else 0 for c in table.x.T])
    for i in which:
        expected = reference.features(rec, i)
        assert sorted(expected) == sorted(table.names)
        for k, name in enumerate(table.names):
            floor = 1e-8 * spread[k] + 1e-12
            message = f"{name} of recording {i}"
            assert_allclose(table.x[i, k], expected[name], rtol=1e-5, atol=floor, err_msg=message)
        expected = reference.channels(rec, i)
        assert sorted(expected) == sorted(frames.names)
        x = frames.take(np.array([i])).x
        for k, name in enumerate(frames.names):
            message = f"{name} of recording {i}"
            assert_allclose(x[:, k], expected[name], rtol=1e-5, atol=1e-6, err_msg=message)


def test_the_slow_reference_agrees_on_complete_recordings(whole):
    check_against_reference(whole, range(len(whole)))


def test_the_slow_reference_agrees_on_gaps_and_short_recordings(patchy):
    check_against_reference(patchy, range(len(patchy)))


def test_the_slow_reference_agrees_on_simulated_recordings(simulated):
    check_against_reference(simulated, range(0, len(simulated), 3))


@pytest.mark.skipif("CMI_REAL_DATA" not in os.environ, reason="CMI_REAL_DATA names no folder")
def test_the_slow_reference_agrees_on_real_recordings():
    rec = cmi.read_train(Path(os.environ["CMI_REAL_DATA"]))
    check_against_reference(rec, range(len(rec)))


# ---- hand-computed -----------------------------------------------------------------------------


def test_statistics_of_a_ramp():
    acc = np.zeros((40, 3), np.float32)
    acc[:, 0] = np.arange(40)
    x, _ = everything(changed(recordings([40]), acc=acc))
    assert x["acc_x_mean"][0] == 19.5
    assert (x["acc_x_min"][0], x["acc_x_q25"][0], x["acc_x_max"][0]) == (0, 9.75, 39)
    assert (x["acc_x_first"][0], x["acc_x_last"][0], x["acc_x_delta"][0]) == (1, 38, 37)
    assert x["acc_x_before_mean"][0] == 4  # rows 0 … 8; the gesture is the last 31
    assert x["acc_x_gesture_mean"][0] == 24
    assert x["acc_x_change"][0] == 20
    assert (x["acc_x_step"][0], x["acc_x_step_sd"][0]) == (1, 0)
    assert x["acc_x_step_bin6"][0] == 1  # from 1 up to 4
    assert x["n_rows"][0] == 40


@pytest.mark.parametrize("frequency", [4, 13, 20, 30])  # 64ths of a cycle per row
def test_a_rhythm_is_found_at_its_frequency(frequency):
    t = np.arange(64)
    acc = np.zeros((64, 3), np.float32)
    acc[:, 1] = 3 * np.sin(2 * np.pi * frequency / 64 * t)
    rot = np.tile(np.float32([1, 0, 0, 0]), (64, 1))
    x, _ = everything(changed(recordings([64]), acc=acc, rot=rot))
    assert x["lin_y_peak"][0] == frequency / 64
    assert x["lin_peak"][0] == frequency / 64
    assert abs(x["lin_y_centroid"][0] - frequency / 64) < 0.01
    assert x[f"lin_y_band{(frequency - 1) // 8 + 1}"][0] > 0.99
    assert np.isnan(x["omega_power"][0])  # it does not turn


def test_a_period_of_five_rows_echoes_after_five():
    acc = np.tile(np.float32([[5, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]), (20, 1))
    rot = np.tile(np.float32([1, 0, 0, 0]), (100, 1))
    x, _ = everything(changed(recordings([100]), acc=acc, rot=rot))
    assert x["lin_echo_period"][0] == 5
    assert x["lin_mag_echo_period"][0] == 5
    assert_allclose(x["lin_echo_strength"], x["lin_echo5"])
    assert (x["lin_mag_peak_gap"][0], x["lin_mag_peak_gap_sd"][0]) == (5, 0)
    assert_allclose(x["lin_major"], 1)  # it shakes along a line


def test_a_hand_in_a_corner_is_seen_there():
    tof = np.full((40, 5, 8, 8), 254, np.uint8)
    tof[:, 0, :2, 6:] = 100  # top right of sensor 1
    tof[:, 0, 0, 7] = 60
    x, frames = everything(changed(recordings([40]), tof=tof))
    assert x["tof_1_near_mean"][0] == 4 / 64
    assert x["tof_1_dist_mean"][0] == 90
    assert x["tof_1_min_gesture_mean"][0] == 60
    assert (x["tof_1_cx_gesture_mean"][0], x["tof_1_cy_gesture_mean"][0]) == (3, -3)
    assert x["tof_1_ne_near_gesture_mean"][0] == 4 / 16
    assert x["tof_1_asym_x_gesture_mean"][0] == 4 / 64
    assert x["tof_1_asym_y_gesture_mean"][0] == -4 / 64
    assert x["tof_1_sx_gesture_mean"][0] == -20  # nearer to the right
    assert x["tof_1_sy_gesture_mean"][0] == 20
    assert x["tof_1_nearest"][0] == 1
    assert x["tof_2_near_mean"][0] == 0
    assert np.isnan(x["tof_2_dist_mean"][0])
    assert set(frames["tof_2_dist"]) == {250}
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
    table, frames = cmi.feature_table(whole), cmi.make_frames(whole)
    assert len(set(table.names)) == len(table.names) == table.x.shape[1]
    assert len(set(frames.names)) == len(frames.names) == frames.x.shape[1]
    assert [g for g, _ in frames.groups] == [
        "acc",
        "rot",
        "motion",
        "thm",
        *(f"tof_{i}" for i in range(1, 6)),
    ]
    lines = cmi.feature_help()
    assert [name for name, _, _ in lines] == list(table.names)
    assert all(unit.strip("= ") and text for _, unit, text in lines)
    assert len({text for _, _, text in lines}) == len(lines)
    units = {name: unit for name, unit, _ in lines}
    assert units["lin_x_sd"] == "m/s²"
    assert units["lin_x_skew"] == "1"
    assert units["thm_2_slope"] == "°C/row"
    assert units["omega_energy_gesture"] == "log10 rad²/s²"


def test_help_lists_every_feature(capsys):
    cmi.main({}, ["--help-features"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(cmi.table_columns()[0])
    assert "°C/row" in next(line for line in printed if line.startswith("thm_2_slope "))


@pytest.mark.parametrize("i", range(16))
def test_alone_is_the_same_as_together(patchy, i):
    together, own = everything(patchy), everything(alone(patchy, i))
    rows = slice(patchy.start[i], patchy.start[i + 1])
    identical(
        own,
        ({n: c[[i]] for n, c in together[0].items()}, {n: c[rows] for n, c in together[1].items()}),
    )


def test_order_does_not_matter(patchy):
    order = np.random.default_rng(0).permutation(len(patchy))
    table, frames = everything(patchy)
    shuffled = everything(joined([alone(patchy, i) for i in order]))
    rows = np.concatenate([np.arange(patchy.start[i], patchy.start[i + 1]) for i in order])
    identical(
        shuffled, ({n: c[order] for n, c in table.items()}, {n: c[rows] for n, c in frames.items()})
    )


def test_cutting_into_chunks_and_workers_do_not_matter(patchy, whole, monkeypatch):
    rec = joined([patchy, whole])
    expected = everything(rec)
    for rows, image_rows, workers in ((1, 7, 3), (100, 64, 2), (10**9, 10**9, 1)):
        monkeypatch.setattr(cmi, "CHUNK_ROWS", rows)
        monkeypatch.setattr(cmi, "IMAGE_ROWS", image_rows)
        identical(everything(rec, workers=workers), expected)


def test_the_input_is_left_alone(patchy):
    names = ("start", "acc", "rot", "thm", "tof", "person")
    before = [getattr(patchy, n).copy() for n in names]
    for n in names:
        getattr(patchy, n).flags.writeable = False
    everything(patchy)
    for n, old in zip(names, before, strict=True):
        assert_array_equal(getattr(patchy, n), old)
        getattr(patchy, n).flags.writeable = True


def test_a_complete_recording_has_no_gaps_and_nothing_is_infinite(whole, patchy):
    tof = whole.tof.copy()
    tof[:, :, ::2, ::2] = np.minimum(tof[:, :, ::2, ::2], 249)  # something in every quarter
    table, frames = everything(changed(whole, tof=tof))
    short = ("before", "change", "rise", "peak_gap", "rms")  # nothing before the last 31 rows
    for name, column in table.items():
        expected = (
            whole.start[1:] - whole.start[:-1] > 33
            if any(s in name for s in short)
            else slice(None)
        )
        assert np.isfinite(column[expected]).all(), name
    for name, column in frames.items():
        assert np.isfinite(column).all(), name
    for part in everything(patchy):
        for name, column in part.items():
            assert not np.isinf(column).any(), name


def test_frames_are_missing_exactly_where_a_sensor_is(patchy):
    _, frames = everything(patchy)
    blind = np.repeat(np.arange(len(patchy)) == 2, np.diff(patchy.start))  # no rotation
    for name, column in frames.items():
        if name.startswith(("north", "west", "up", "omega", "swing")):
            gone = blind
        elif name.startswith("thm"):
            gone = np.isnan(patchy.thm[:, int(name[4]) - 1])
        elif name.startswith("tof"):
            gone = (patchy.tof[:, int(name[4]) - 1] == 255).all(axis=(1, 2))
        else:
            gone = np.zeros_like(blind)
        assert_array_equal(np.isnan(column), gone, err_msg=name)


def test_no_warning_is_raised(patchy):
    with np.errstate(all="raise", under="ignore"):
        cmi.make_frames(patchy, workers=1)
        cmi.feature_table(patchy, workers=1)


def test_all_sensors_missing(whole):
    lost = changed(
        whole,
        acc=np.full_like(whole.acc, np.nan),
        rot=np.full_like(whole.rot, np.nan),
        thm=np.full_like(whole.thm, np.nan),
        tof=np.full_like(whole.tof, 255),
    )
    table, frames = everything(lost)
    known = {"adult_child", "age", "sex", "height_cm", "shoulder_to_wrist_cm", "elbow_to_wrist_cm"}
    known |= {"arm_to_height", "forearm_to_arm", "n_rows"}
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
    one = changed(
        rec, **{n: np.repeat(getattr(rec, n)[:1], 50, axis=0) for n in ("acc", "rot", "thm", "tof")}
    )
    table, _ = everything(one)
    for name, column in table.items():
        if name.endswith(("_sd", "_iqr", "_delta", "_change", "_step")) and np.isfinite(column[0]):
            assert abs(column[0]) < 1e-6, name
        if name.endswith(("_skew", "_kurtosis", "_entropy", "_echo1")) or "corr_" in name:
            assert np.isnan(column[0]), name


# ---- symmetries --------------------------------------------------------------------------------


def test_a_left_handed_twin_has_the_features_of_its_right_handed_original(patchy):
    twin = cmi.mirrored(patchy, np.ones(len(patchy), bool))
    person = patchy.person.copy()
    person[:, 3] = 0
    twin = changed(twin, person=person)
    back = cmi.canonical(twin, np.zeros(len(patchy), bool))
    identical(everything(back), everything(patchy))
    assert (everything(twin)[0]["acc_x_mean"] != everything(patchy)[0]["acc_x_mean"]).all()


def test_a_turned_twin_has_the_features_of_its_original(whole):
    every = np.ones(len(whole), bool)
    twin = cmi.turned_back(whole, every)
    identical(everything(cmi.canonical(twin, every)), everything(whole))


def test_the_heading_matters_only_where_it_is_named(whole):
    """A turn of the world about the vertical, after which the quaternions are other numbers."""
    half = 0.7
    q, c, s = whole.rot.astype(float), np.cos(half), np.sin(half)
    w, x, y, z = q.T
    rot = np.stack([c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w], axis=1)
    a, b = everything(whole), everything(changed(whole, rot=rot))
    moved = set()
    for k in range(2):
        for name in a[k]:
            if not np.allclose(a[k][name], b[k][name], rtol=1e-4, atol=1e-4, equal_nan=True):
                moved.add(name)
    absolute = (
        "rot_",
        "heading_cos",
        "heading_sin",
        "heading_gesture_cos",
        "heading_gesture_sin",
        "north",
        "west",
    )
    assert {n for n in moved if not n.startswith(absolute)} == set()
    assert {"rot_z_mean", "heading_cos", "north_x"} <= moved


def test_pose_free_features_do_not_feel_the_wristband_turn(whole):
    from scipy.spatial.transform import Rotation

    band = Rotation.from_rotvec([0.4, -1.1, 0.7])
    turn = Rotation.from_quat(whole.rot[:, [1, 2, 3, 0]].astype(float)) * band
    rot, acc = turn.as_quat()[:, [3, 0, 1, 2]], band.inv().apply(whole.acc.astype(float))
    a, b = everything(whole)[0], everything(changed(whole, rot=rot, acc=acc))[0]
    stems = (
        "acc_mag",
        "lin_mag",
        "world_up",
        "world_flat",
        "omega_mag",
        "jerk_mag",
        "swing",
        "lean",
    )
    stems += (
        "lin_energy",
        "omega_energy",
        "lin_band",
        "omega_band",
        "lin_gesture_band",
        "lin_echo",
    )
    stems += ("lin_major", "omega_minor", "lin_rms", "omega_rms", "lin_centroid", "lin_entropy")
    checked = [
        n for n in a if n.startswith(stems) and not n.endswith(("period", "peaks", "gap", "gap_sd"))
    ]
    assert len(checked) > 250
    for name in checked:
        assert_allclose(b[name], a[name], rtol=2e-3, atol=2e-3, err_msg=name)


# ---- modalities --------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", ["thm", "tof", "both"])
def test_a_dropped_modality_is_as_if_it_had_never_been_there(patchy, drop):
    n = len(patchy)
    which = np.random.default_rng(0).random(n) < 0.5
    rows = np.repeat(which, np.diff(patchy.start))
    thm, tof, none = patchy.thm.copy(), patchy.tof.copy(), np.zeros(n, bool)
    if drop != "tof":
        thm[rows] = np.nan
    if drop != "thm":
        tof[rows] = 255
    table = cmi.feature_table(patchy)
    got = table.without(which if drop != "tof" else none, which if drop != "thm" else none)
    expected = cmi.feature_table(changed(patchy, thm=thm, tof=tof))
    for k, name in enumerate(table.names):
        assert_array_equal(got.x[:, k], expected.x[:, k], err_msg=name)
    assert not np.array_equal(got.x, table.x, equal_nan=True)


def test_imu_mode_has_no_trace_of_tof_and_thm(patchy):
    table, frames = cmi.feature_table(patchy), cmi.make_frames(patchy)
    lost = changed(patchy, thm=np.full_like(patchy.thm, np.nan), tof=np.full_like(patchy.tof, 255))
    imu, blank = table.of_mode("imu"), cmi.feature_table(lost).of_mode("imu")
    assert not [n for n in imu.names if "thm" in n or "tof" in n]
    assert imu.names == tuple(n for n in table.names if "thm" not in n and "tof" not in n)
    assert_array_equal(imu.x, blank.x)
    assert imu.x.shape == (len(patchy), len(imu.names)) == (len(patchy), len(imu.modality))
    bare = frames.of_mode("imu")
    assert bare.tof is None
    assert_array_equal(bare.x, cmi.make_frames(lost).of_mode("imu").x)
    assert [g for g, _ in bare.groups] == ["acc", "rot", "motion"]
    assert table.of_mode("all") is table
    assert frames.of_mode("all") is frames


def test_some_recordings_can_be_taken(patchy):
    table, frames = cmi.feature_table(patchy), cmi.make_frames(patchy)
    which = np.array([5, 0, 11])
    assert_array_equal(table.take(which).x, table.x[which])
    some = frames.take(which)
    for k, i in enumerate(which):
        rows = slice(patchy.start[i], patchy.start[i + 1])
        own = slice(some.start[k], some.start[k + 1])
        assert_array_equal(some.x[own], frames.x[rows])
        assert_array_equal(some.tof[own], patchy.tof[rows])


def test_frames_across_borders_are_those_alone(patchy):
    """Each recording by itself has the rows that it has among others, to the last bit."""
    together = cmi.make_frames(patchy)
    for i in range(len(patchy)):
        rows = slice(patchy.start[i], patchy.start[i + 1])
        assert_array_equal(cmi.make_frames(alone(patchy, i)).x, together.x[rows])


def test_one_pass_gives_what_two_give(patchy, tmp_path):
    """Table and frames made together, in memory or mapped from disk, are those made apart."""
    table, frames = cmi.feature_table(patchy), cmi.make_frames(patchy)
    for cached in (True, False):
        cfg = cmi.Config(output_path=tmp_path, frame_cache=cached)
        pair = cmi.Inputs(patchy, cfg, pair=True)
        assert isinstance(pair.frames.x, np.memmap) != cached
        assert_array_equal(pair.table.x, table.x)
        assert_array_equal(pair.frames.x, frames.x)
        assert pair.both is pair.both, "made once"


# ---- what networks take ------------------------------------------------------------------------


def test_standardisation_looks_at_the_training_recordings_only(patchy):
    frames = cmi.make_frames(patchy)
    train = np.array([0, 1, 5, 7])
    mean, sd = cmi.standardisation(frames, train)
    x = np.concatenate([frames.x[patchy.start[i] : patchy.start[i + 1]] for i in train]).astype(
        float
    )
    assert_allclose(mean, np.nanmean(x, axis=0), rtol=1e-5, atol=1e-6)
    assert_allclose(sd, np.nanstd(x, axis=0), rtol=1e-5)
    other = frames.x.copy()
    other[patchy.start[2] : patchy.start[5]] = 1e6
    again = cmi.standardisation(cmi.Frames(frames.start, other, frames.groups), train)
    assert_array_equal(again, (mean, sd))
    mask = np.isin(np.arange(len(patchy)), train)
    assert_array_equal(cmi.standardisation(frames, mask), (mean, sd))


def test_a_silent_or_constant_channel_standardises_to_nought():
    rec = recordings([30], seed=8)
    frames = cmi.make_frames(
        changed(rec, thm=np.full_like(rec.thm, np.nan), tof=np.full_like(rec.tof, 254))
    )
    mean, sd = cmi.standardisation(frames, np.array([0]))
    k, c = frames.names.index("thm_1"), frames.names.index("tof_1_dist")
    assert (mean[k], sd[k]) == (0, 1)
    assert (mean[c], sd[c]) == (250, 1)


def test_pad_length_is_the_setting_or_a_percentile(whole):
    frames = cmi.make_frames(whole)
    assert cmi.pad_length(frames, cmi.Config(fixed_pad_len=77)) == 77
    cfg = cmi.Config(fixed_pad_len=0, pad_len_percentile=50)
    assert cmi.pad_length(frames, cfg) == np.ceil(np.median(LENGTHS))
    assert cmi.pad_length(frames, cmi.Config(fixed_pad_len=0, pad_len_percentile=100)) == 200


def test_the_last_rows_are_kept():
    first, kept = cmi.last_rows(np.array([0, 3, 13, 18]), 5)
    assert first.tolist() == [0, 8, 13]
    assert kept.tolist() == [3, 5, 5]


def test_frames_are_lean():
    """The peak is a small multiple of the result, whatever the number of recordings."""
    rec = recordings([60] * 500, seed=9)
    cmi.feature_table(rec.part(0, 1))
    tracemalloc.start()
    table, frames = cmi.feature_table(rec, workers=2), cmi.make_frames(rec, workers=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < table.x.nbytes + frames.x.nbytes + 250e6
