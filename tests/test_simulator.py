"""What must stay true of cmi_simulator.py.

The real figures below are those of the competition's train.csv (8,151 recordings). They are written
here, not read from the simulator; each line states how far a simulated set may be from them.
"""

import csv
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.spatial.transform import Rotation

import cmi_simulator as sim

ROOT = Path(sim.__file__).parent
SOURCE = Path(sim.__file__).read_text()
ACC = ["acc_x", "acc_y", "acc_z"]
ROT = ["rot_w", "rot_x", "rot_y", "rot_z"]
THM = [f"thm_{s}" for s in (1, 2, 3, 4, 5)]
TOF = [f"tof_{s}_v{p}" for s in (1, 2, 3, 4, 5) for p in range(64)]
HEAD = ["row_id", "sequence_type", "sequence_id", "sequence_counter", "subject"]
HEAD += ["orientation", "behavior", "phase", "gesture"]
TARGETS = {
    "Above ear - pull hair",
    "Cheek - pinch skin",
    "Eyebrow - pull hair",
    "Eyelash - pull hair",
    "Forehead - pull hairline",
    "Forehead - scratch",
    "Neck - pinch skin",
    "Neck - scratch",
}
EVERYWHERE = {*TARGETS, "Text on phone"}
NOT_LEANING = {"Wave hello", "Write name in air", "Pull air toward your face"}
SEATED = {
    "Drink from bottle/cup",
    "Feel around in tray and pull out an object",
    "Glasses on/off",
}
LEANING = {"Pinch knee/leg skin", "Scratch knee/leg skin", "Write name on leg"}
LEAN = "Seated Lean Non Dom - FACE DOWN"
ORIENTATIONS = {"Seated Straight", LEAN, "Lie on Back", "Lie on Side - Non Dominant"}
MOVES = "Moves hand to target location"
RELAXES = "Relaxes and moves hand to target location"


def read(path):
    return pl.read_csv(path, infer_schema_length=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 subjects, 30 recordings each; 4 test subjects."""
    out = tmp_path_factory.mktemp("simulated")
    sim.simulate(out, subjects=24, test_subjects=4, seed=3, recordings_per_subject=30)
    return out


@pytest.fixture(scope="module")
def train(folder):
    return read(folder / "train.csv")


@pytest.fixture(scope="module")
def test_set(folder):
    return read(folder / "test.csv")


@pytest.fixture(scope="module")
def recordings(train):
    """One line a recording."""
    return train.group_by("sequence_id", maintain_order=True).agg(
        pl.first("subject", "orientation", "gesture", "behavior", "sequence_type"), pl.len()
    )


def wearer(**changes):
    return dataclasses.replace(sim.draw_body("SUBJ_000042", seed=5), **changes)


def plan_for(who, count=102):
    return sim.draw_plan(who, count, np.random.default_rng(8))


# ---- the file itself -------------------------------------------------------------------------


def test_docstring_lists_the_sections_that_exist():
    promised = re.findall(r"^    (\d+ \w.*)$", sim.__doc__ or "", re.M)
    assert promised == re.findall(r"^# ## (\d+ .*)$", SOURCE, re.M)
    assert len(promised) >= 10


def test_import_is_light_and_silent():
    heavy = ("torch", "tensorflow", "keras", "lightgbm", "sklearn", "scipy", "pandas")
    code = f"import sys, cmi_simulator; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_all_randomness_comes_from_seeded_generators():
    assert not re.search(r"np\.random\.(?!Generator|default_rng)", SOURCE)
    assert not re.search(r"default_rng\(\)", SOURCE)


# ---- schema ----------------------------------------------------------------------------------


def test_columns_are_the_competitions_in_its_order(train, test_set):
    assert train.columns == HEAD + ACC + ROT + THM + TOF
    assert len(train.columns) == 341
    few = ["row_id", "sequence_id", "sequence_counter", "subject"]
    assert test_set.columns == few + ACC + ROT + THM + TOF
    assert len(test_set.columns) == 336


def test_text_of_a_row_looks_like_the_real_file(folder):
    with (folder / "train.csv").open() as file:
        rows = [row for _, row in zip(range(3000), csv.DictReader(file), strict=False)]
    for row in rows[::50]:
        assert row["row_id"] == f"{row['sequence_id']}_{int(row['sequence_counter']):06d}"
        assert re.fullmatch(r"SEQ_\d{6}", row["sequence_id"])
        assert re.fullmatch(r"SUBJ_\d{6}", row["subject"])
        assert all(re.fullmatch(r"-1\.0|\d{1,3}\.0|", row[name]) for name in TOF)
        assert all(re.fullmatch(r"-?\d+\.\d{1,8}", row[name]) for name in ACC)
        assert "-0.0" not in row.values()


def test_numbers_are_quantised_as_the_device_does(train):
    acc = train.select(ACC).to_numpy()
    np.testing.assert_array_equal(acc * 256, np.round(acc * 256))
    rot = train.select(ROT).drop_nulls().to_numpy()
    np.testing.assert_array_equal(rot * 16384, np.round(rot * 16384))
    assert rot[:, 0].min() >= 0
    np.testing.assert_allclose(np.linalg.norm(rot, axis=1), 1, atol=2e-4)
    thm = train.select(THM).drop_nulls().to_numpy()
    np.testing.assert_array_equal(thm, thm.astype(np.float32))
    tof = train.select(TOF).drop_nulls().to_numpy()
    np.testing.assert_array_equal(tof, np.round(tof))
    assert tof.min() == -1
    assert 240 <= tof.max() <= 249


def test_quaternions_jump_where_w_would_cross_zero(train):
    rot = train.filter(pl.col("rot_w").is_not_null()).select(ROT).to_numpy()
    same = (train.get_column("sequence_id") == train.get_column("sequence_id").shift(1)).to_numpy()
    same = same[train.get_column("rot_w").is_not_null().to_numpy()]
    dot = (rot[1:] * rot[:-1]).sum(axis=1)[same[1:].astype(bool)]
    assert (dot < -0.5).mean() > 0.001


def test_behaviours_follow_each_other_and_the_gesture_is_last(train, recordings):
    table = train.select("sequence_id", "behavior", "phase", "sequence_counter")
    counter = table.get_column("sequence_counter").to_numpy()
    name = table.get_column("sequence_id").to_numpy()
    new = np.r_[True, name[1:] != name[:-1]]
    np.testing.assert_array_equal(counter == 0, new)
    np.testing.assert_array_equal(np.diff(counter)[~new[1:]], 1)
    order = {MOVES: 0, RELAXES: 0, "Hand at target location": 1, "Performs gesture": 2}
    stage = np.array([order[b] for b in table.get_column("behavior")])
    assert (np.diff(stage)[~new[1:]] >= 0).all()
    last = np.r_[new[1:], True]
    assert (stage[last] == 2).all()
    phase = table.get_column("phase").to_numpy()
    np.testing.assert_array_equal(phase == "Gesture", stage == 2)
    assert set(phase) == {"Gesture", "Transition"}
    assert set(recordings.get_column("behavior")) == {MOVES, RELAXES}


def test_sequence_type_says_which_gestures_are_targets(recordings):
    for gesture, kind in recordings.select("gesture", "sequence_type").unique().iter_rows():
        assert kind == ("Target" if gesture in TARGETS else "Non-Target")


def test_sequence_ids_rise_and_subjects_are_mixed(recordings, test_set):
    names = recordings.get_column("sequence_id").to_list()
    assert names == sorted(set(names))
    others = test_set.get_column("sequence_id").unique().to_list()
    assert not set(names) & set(others)
    subject = recordings.get_column("subject")
    assert (subject != subject.shift(1)).mean() > 0.85


def test_demographics_fit_the_subjects(folder, train, test_set):
    seen = []
    for name, frame in (("train", train), ("test", test_set)):
        people = read(folder / f"{name}_demographics.csv")
        assert people.columns == [
            *("subject", "adult_child", "age", "sex", "handedness"),
            *("height_cm", "shoulder_to_wrist_cm", "elbow_to_wrist_cm"),
        ]
        kinds = [pl.String, *[pl.Int64] * 4, pl.Float64, pl.Int64, pl.Float64]
        assert people.dtypes == kinds
        assert sorted(people.get_column("subject")) == sorted(set(frame.get_column("subject")))
        assert people.filter((pl.col("age") >= 20) != (pl.col("adult_child") == 1)).is_empty()
        assert people.get_column("age").is_between(10, 53).all()
        assert people.get_column("height_cm").is_between(130, 195).all()
        assert (people.get_column("elbow_to_wrist_cm") < people.get_column("height_cm") / 4).all()
        seen.append(set(people.get_column("subject")))
    assert not seen[0] & seen[1]


# ---- protocol, gaps and oddities ---------------------------------------------------------------


def allowed(gesture):
    if gesture in EVERYWHERE:
        return ORIENTATIONS
    if gesture in NOT_LEANING:
        return ORIENTATIONS - {LEAN}
    assert gesture in SEATED | LEANING
    return {"Seated Straight"} if gesture in SEATED else {LEAN}


def test_nobody_repeats_an_entry_of_the_protocol(recordings):
    entry = ["subject", "behavior", "orientation", "gesture"]
    assert recordings.select(entry).is_unique().all()
    for gesture, orientation in recordings.select("gesture", "orientation").unique().iter_rows():
        assert orientation in allowed(gesture)


def test_a_full_protocol_has_102_entries():
    plan = plan_for(wearer())
    entries = set(zip(plan.gesture, plan.orientation, plan.relaxes, strict=True))
    assert len(plan) == len(entries) == 102
    assert sum(len(allowed(name)) for name in sim.NAMES) == 51


def test_a_few_subjects_did_less():
    counts = sim.draw_counts(81, None, np.random.default_rng(0))
    assert sorted(counts) == [51, 54, 96, 97, 101] + [102] * 76
    assert len(set(sim.draw_counts(12, None, np.random.default_rng(0)))) == 2
    assert sim.draw_counts(12, 30, np.random.default_rng(0)) == [30] * 12


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_oddities_have_their_real_shares(seed):
    train = sim.draw_wearers("train", 81, seed)
    assert sum(w.left_handed for w in train) == 10
    assert sum(w.upside_down for w in train) == 2
    assert sum("tof" in w.lacks for w in train) == 1
    assert sum("tof_5" in w.lacks for w in train) == 4
    assert 1 <= sum(w.upside_down for w in sim.draw_wearers("test", 34, seed)) <= 2
    assert sum(w.left_handed for w in sim.draw_wearers("train", 12, seed)) in (1, 2)


def test_half_of_the_test_recordings_are_imu_only(test_set):
    null = test_set.group_by("sequence_id").agg(
        pl.col(THM + TOF).is_null().all(), pl.col(ACC).is_null().any().name.suffix("_gap")
    )
    none = null.select(pl.all_horizontal(THM + TOF)).to_series()
    assert 0.4 < none.mean() < 0.6
    assert not null.select(pl.any_horizontal(f"{name}_gap" for name in ACC)).to_series().any()


def test_gaps_are_whole_recordings_and_follow_subjects():
    who, count = wearer(lacks=("tof_5", "thm_5")), 60
    session = sim.run_session(who, count, test=False)
    first, rows = session.plan.start[:-1], np.diff(session.plan.start)
    for x in (np.isnan(session.signals.rot[:, 0]), np.isnan(session.signals.thm[:, 4])):
        assert set(np.add.reduceat(x.astype(int), first) / rows) <= {0.0, 1.0}
    blind = session.signals.tof == 255
    assert blind[:, 4].mean() > 0.8
    assert not blind[:, :4].any()
    dark = sim.run_session(wearer(lacks=("tof",)), count, test=False).signals
    assert (dark.tof == 255).mean() > 0.8
    assert np.isnan(dark.thm).mean() > 0.8
    assert not np.isnan(dark.acc).any()


# ---- physics ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right():
    who = wearer()
    plan = plan_for(who)
    return plan, sim.record(who, plan)


def test_rotating_acc_into_the_world_finds_gravity(train):
    rows = train.drop_nulls("rot_w")
    turn = Rotation.from_quat(rows.select("rot_x", "rot_y", "rot_z", "rot_w").to_numpy().copy())
    mean = turn.apply(rows.select(ACC).to_numpy().copy()).mean(axis=0)
    np.testing.assert_allclose(mean, [0, 0, 9.74], atol=0.12)


def test_quaternion_kernels_agree_with_scipy():
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 50, 4))
    p, q = sim.unit(p), sim.unit(q)
    one, two = (Rotation.from_quat(x[:, [1, 2, 3, 0]]) for x in (p, q))
    np.testing.assert_allclose(sim.q_matrix(sim.q_mul(p, q)), (one * two).as_matrix(), atol=1e-12)
    np.testing.assert_allclose(sim.q_log(p), one.as_rotvec(), atol=1e-12)
    np.testing.assert_allclose(sim.q_matrix(sim.q_exp(one.as_rotvec())), one.as_matrix(), atol=1e-9)
    axes = [one.as_matrix()[:, :, j] for j in range(3)]
    np.testing.assert_allclose(sim.q_matrix(sim.q_from_axes(*axes)), one.as_matrix(), atol=1e-12)


def test_a_left_hander_is_the_exact_mirror_image(right):
    """R → M R M with M = diag(−1, 1, 1); the maps of the competition's description."""
    plan, x = right
    left = sim.record(wearer(left_handed=True), plan)
    np.testing.assert_array_equal(left.acc, x.acc * [-1, 1, 1])
    np.testing.assert_array_equal(left.thm, x.thm[:, [0, 1, 4, 3, 2]])
    mirror = np.diag([-1.0, 1, 1])
    ours = Rotation.from_quat(left.rot[:, [1, 2, 3, 0]]).as_matrix()
    real = Rotation.from_quat(x.rot[:, [1, 2, 3, 0]]).as_matrix()
    np.testing.assert_allclose(ours, mirror @ real @ mirror, atol=1e-9)
    before, after = x.tof.reshape(-1, 5, 8, 8), left.tof.reshape(-1, 5, 8, 8)
    for s in (0, 1, 3):
        np.testing.assert_array_equal(after[:, s], before[:, s, :, ::-1])
    np.testing.assert_array_equal(after[:, 2], before[:, 4, ::-1])
    np.testing.assert_array_equal(after[:, 4], before[:, 2, ::-1])


def test_upside_down_is_a_half_turn_about_z(right):
    plan, x = right
    turned = sim.record(wearer(upside_down=True), plan)
    np.testing.assert_array_equal(turned.acc, x.acc * [-1, -1, 1])
    np.testing.assert_array_equal(turned.thm, x.thm[:, [0, 3, 4, 1, 2]])
    assert turned.rot[:, 0].min() >= 0
    half = Rotation.from_euler("z", 180, degrees=True)
    ours = Rotation.from_quat(turned.rot[:, [1, 2, 3, 0]])
    real = Rotation.from_quat(x.rot[:, [1, 2, 3, 0]]) * half
    assert (ours * real.inv()).magnitude().max() < 1e-6
    before, after = x.tof.reshape(-1, 5, 8, 8), turned.tof.reshape(-1, 5, 8, 8)
    for s, source in enumerate([0, 3, 4, 1, 2]):
        np.testing.assert_array_equal(after[:, s], before[:, source, ::-1, ::-1])


@pytest.mark.parametrize(
    ("change", "axes"),
    [(sim.mirrored, np.diag([-1.0, 1, 1])), (sim.upside_down, np.diag([-1.0, -1, 1]))],
    ids=["mirrored", "upside down"],
)
def test_images_move_as_the_rays_do(change, axes):
    """The pixel that shows x afterwards looked, before, along the ray that the map turns into its."""
    _, rays = sim.sensor_rays()
    blank = np.zeros((1, 3)), np.ones((1, 4)), np.zeros((1, 5))
    code = np.arange(320)
    low, high = (
        change(sim.Signals(*blank, part.astype(np.uint8).reshape(1, 5, 64))).tof.astype(int)
        for part in (code % 64, code // 64)
    )
    source = (64 * high + low).ravel()
    np.testing.assert_allclose(rays.reshape(320, 3)[source] @ axes, rays.reshape(320, 3), atol=1e-6)


@pytest.mark.parametrize("change", [sim.mirrored, sim.upside_down])
def test_maps_undo_themselves(change, right):
    x = right[1]
    back = change(change(x))
    np.testing.assert_array_equal(back.acc, x.acc)
    np.testing.assert_array_equal(back.thm, x.thm)
    np.testing.assert_array_equal(back.tof, x.tof)
    np.testing.assert_allclose(np.abs((back.rot * x.rot).sum(axis=1)), 1, atol=1e-3)


def test_rays_to_an_ellipsoid_agree_with_a_plain_search():
    rng = np.random.default_rng(4)
    radii, centre = np.array([0.08, 0.10, 0.12]), np.array([0.02, 0.01, 0.18])
    shape = sim.ellipsoid(centre[None], np.eye(3)[None], radii, sim.SKIN)
    _, rays = sim.sensor_rays()
    squares = (rays[..., :, None] * rays[..., None, :]).reshape(5, 64, 9).swapaxes(-1, -2)
    eyes = np.zeros((1, 5, 3)) + rng.normal(0, 0.005, (1, 5, 3))
    found = sim.distances(shape, eyes, np.eye(3)[None], rays, squares)[:, 0]
    steps = np.arange(0, 0.4, 0.0005)
    for s, p in rng.integers((5, 64), size=(60, 2)):
        points = eyes[0, s] + steps[:, None] * rays[s, p]
        inside = (((points - centre) / radii) ** 2).sum(axis=1) < 1
        if inside.sum() > 20:
            assert abs(found[s, p] - steps[inside.argmax()]) < 0.001
        elif not inside.any():
            assert found[s, p] > 0.4 or np.isinf(found[s, p])


def test_acceleration_of_a_reach_is_the_second_derivative_of_its_path():
    t = np.linspace(-1, 7, 8001)
    value, bend = sim.minimum_jerk(t, np.full(len(t), 6.0))
    slope = np.gradient(value, t)
    np.testing.assert_allclose(np.gradient(slope, t)[5:-5], bend[5:-5], atol=2e-3)
    assert (value[0], value[-1]) == (0, 1)


def test_the_accelerometer_falls_behind_and_catches_up_in_each_behaviour():
    """On real recordings up to 12 rows in 240, back to one or two where the gesture begins."""
    rows = np.array([[240, 10, 30], [15, 8, 31]])
    plan = sim.Plan(np.array([7, 3]), np.array([0, 0]), np.array([0, 1]), rows)
    of = np.repeat([0, 1], rows.sum(axis=1))
    t = np.concatenate([np.arange(n) for n in rows.sum(axis=1)]).astype(float)
    behind = []
    for i in range(20):
        who = sim.draw_body(f"SUBJ_{i:06d}", seed=2)
        clock = sim.accelerometer_clock(
            who, plan, sim.moment(plan, of, t, np.ones(2)), np.random.default_rng(i)
        )
        assert clock.min() >= 0
        behind.append((t - clock)[of == 0])
    late = np.median(behind, axis=0)
    assert 9 < late[239] < 15
    assert abs(late[240]) < 1
    assert abs(late[250]) < 1
    assert 1 < late[279] < 2.5


def test_felt_gravity_is_that_of_an_earlier_rotation():
    """While hands are carried to their targets, acc fits the rotation of a row before best."""
    error = np.zeros(5)
    for n in range(6):
        who = sim.draw_body(f"SUBJ_{n:06d}", seed=6)
        plan = plan_for(who)
        x = sim.record(who, plan)
        up = Rotation.from_quat(x.rot[:, [1, 2, 3, 0]]).inv().apply([0, 0, 9.8])
        for i in np.flatnonzero(plan.relaxes):
            rows = plan.start[i] + plan.rows[i, 0] + np.arange(-7, 0)
            rows = rows[rows >= plan.start[i] + 4]
            error += [((x.acc[rows] - up[rows - lag]) ** 2).sum() for lag in range(5)]
    assert error.argmin() == 1
    assert error[0] > 1.3 * error[1]


def test_the_forearm_is_upright_where_a_seated_hand_is_at_the_forehead():
    """y runs along the forearm: about 8.5 of 9.8 m/s² on real recordings; x and z share the rest."""
    means = []
    for i in range(8):
        who = sim.draw_body(f"SUBJ_{i:06d}", seed=4)
        plan = plan_for(who)
        x = sim.record(who, plan)
        is_it = (plan.gesture == sim.NAMES.index("Forehead - scratch")) & (plan.orientation == 0)
        for k in np.flatnonzero(is_it):
            means.append(x.acc[plan.start[k + 1] - 25 : plan.start[k + 1] - 5].mean(axis=0))
    middle = np.median(means, axis=0)
    assert middle[1] > 7
    assert abs(middle[0]) < 4
    assert -6 < middle[2] < -1


def peak_rate(name, n_subjects=10):
    """Strongest rhythm of acc while a gesture is performed, cycles per row, and its share."""
    power = np.zeros(65)
    for i in range(n_subjects):
        who = sim.draw_body(f"SUBJ_{i:06d}", seed=1)
        lines = sim.PROTOCOL[sim.PROTOCOL[:, 0] == sim.NAMES.index(name)]
        rows = sim.draw_rows(who, lines, np.random.default_rng(i))
        plan = sim.Plan(lines[:, 0], lines[:, 1], lines[:, 2], rows)
        x = sim.record(who, plan)
        for k in range(len(plan)):
            part = x.acc[plan.start[k + 1] - 26 : plan.start[k + 1] - 2]
            wave = (part - part.mean(axis=0)) * np.hanning(24)[:, None]
            power += (np.abs(np.fft.rfft(wave, 128, axis=0)) ** 2).sum(axis=1)
    share = power[16:] / power[16:].sum()  # slower than 0.125 the pose slides
    return (16 + share.argmax()) / 128, share.max()


def test_rhythms_are_those_of_the_gestures():
    assert 0.40 <= peak_rate("Forehead - scratch")[0] <= 0.5
    assert 0.40 <= peak_rate("Neck - scratch")[0] <= 0.5
    assert 0.14 <= peak_rate("Above ear - pull hair")[0] <= 0.26
    assert peak_rate("Cheek - pinch skin")[1] < 0.06  # none stands out


# ---- statistics of the real files --------------------------------------------------------------

REAL = {  # figure: (of the real train.csv, tolerance)
    "mean rows of recording": (70.5, 9),
    "median rows of recording": (59, 6),
    "mean rows of Performs gesture": (31.4, 1),
    "sd rows of Performs gesture": (3.59, 1.3),
    "mean rows of Hand at target location": (11.7, 1.5),
    "median rows of Hand at target location": (8, 2),
    "mean rows of Relaxes and moves hand to target location": (16.7, 2),
    "median rows of Moves hand to target location": (28, 7),
    "mean acc_x": (1.64, 1.5),
    "mean acc_y": (1.79, 1.5),
    "mean acc_z": (-0.46, 2.0),
    "sd acc_x": (5.78, 0.8),
    "sd acc_y": (5.00, 0.8),
    "sd acc_z": (6.10, 0.8),
    "mean rot_w": (0.360, 0.10),
    "sd rot_w": (0.226, 0.06),
    "sd rot_x": (0.466, 0.10),
    "sd rot_y": (0.543, 0.10),
    "sd rot_z": (0.504, 0.14),
    "mean thm_1": (27.08, 0.9),
    "sd thm_1": (3.23, 0.7),
    "mean |acc|": (10.01, 0.3),
    "sd |acc|": (1.21, 0.3),
    "nothing tof": (0.575, 0.08),
    "distance tof": (108.2, 14),
    "valid pixels Transition": (116.4, 25),
    "valid pixels Gesture": (160.5, 25),
    "distance Transition": (135.2, 25),
    "distance Gesture": (116.8, 14),
    "nothing tof_1": (0.588, 0.09),
    "nothing tof_2": (0.629, 0.10),
    "nothing tof_3": (0.601, 0.09),
    "nothing tof_4": (0.523, 0.09),
    "nothing tof_5": (0.628, 0.09),
}
BEHAVIOUR = {  # mean acc of all rows of the real train.csv
    MOVES: (3.92, -1.34, 4.41),
    RELAXES: (3.32, 0.08, 2.97),
    "Hand at target location": (0.43, 3.83, -3.14),
    "Performs gesture": (0.26, 3.40, -3.35),
}
MOTION = {  # gesture: mean over recordings of (mean |a − mean a|, mean |step|) of the real acc
    "Cheek - pinch skin": (0.4408, 1.5404),
    "Forehead - pull hairline": (0.585, 1.8782),
    "Write name on leg": (0.5651, 1.8061),
    "Feel around in tray and pull out an object": (0.4109, 1.4316),
    "Neck - scratch": (0.4789, 1.6091),
    "Neck - pinch skin": (0.4401, 1.6056),
    "Eyelash - pull hair": (0.3897, 1.3411),
    "Eyebrow - pull hair": (0.4391, 1.4818),
    "Forehead - scratch": (0.4959, 1.6745),
    "Above ear - pull hair": (0.5194, 1.8698),
    "Wave hello": (1.7107, 5.1522),
    "Write name in air": (1.1641, 3.5655),
    "Text on phone": (0.354, 1.2565),
    "Pull air toward your face": (1.0968, 3.5744),
    "Pinch knee/leg skin": (0.5783, 1.6602),
    "Scratch knee/leg skin": (0.5531, 1.8847),
    "Drink from bottle/cup": (0.5902, 1.9156),
    "Glasses on/off": (0.6169, 1.9316),
}


@pytest.fixture(scope="module")
def figures(folder):
    return sim.folder_figures(folder)


@pytest.mark.parametrize("name", REAL)
def test_a_figure_is_near_the_real_one(name, figures):
    real, tolerance = REAL[name]
    assert abs(figures[name] - real) <= tolerance


def test_the_vertical_lies_where_it_does_in_each_behaviour(train):
    found = train.group_by("behavior").agg(pl.col(ACC).mean())
    for behavior, *mean in found.iter_rows():
        assert np.abs(np.subtract(mean, BEHAVIOUR[behavior])).max() < 2.2, behavior


def test_gestures_move_as_much_as_the_real_ones(figures):
    """Within a factor of 1.7 each, 1.25 on average, and in nearly the same order."""
    ours = np.array([(figures[f"mad |acc| {n}"], figures[f"jerk {n}"]) for n in MOTION])
    ratio = ours / np.array(list(MOTION.values()))
    assert np.abs(np.log(ratio)).max() < np.log(1.7)
    assert np.abs(np.log(ratio).mean(axis=0)).max() < np.log(1.25)
    for j in range(2):
        real = [values[j] for values in MOTION.values()]
        assert np.corrcoef(np.log(real), np.log(ours[:, j]))[0, 1] > 0.85


def test_figures_mean_what_they_say(train, figures):
    """Against a plain loop over recordings."""
    mads, jerks = {}, {}
    for _, part in train.group_by("sequence_id"):
        acc = part.select(ACC).to_numpy()
        size = np.sqrt((acc**2).sum(axis=1))
        gesture = part.item(0, "gesture")
        mads.setdefault(gesture, []).append(np.abs(size - size.mean()).mean())
        jerks.setdefault(gesture, []).append(
            np.sqrt((np.diff(acc, axis=0) ** 2).sum(axis=1)).mean()
        )
    for gesture, values in mads.items():
        assert figures[f"mad |acc| {gesture}"] == pytest.approx(np.mean(values))
        assert figures[f"jerk {gesture}"] == pytest.approx(np.mean(jerks[gesture]))
    tof = train.select(TOF).drop_nulls().to_numpy()
    assert figures["nothing tof_1"] == pytest.approx((tof[:, :64] == -1).mean(), abs=0.02)
    assert figures["rows"] == len(train)


def test_thermopiles_are_warmer_at_the_skin_and_lag(train):
    warm = train.group_by("phase").agg(pl.mean(THM))
    mean = {row[0]: np.mean(row[1:]) for row in warm.iter_rows()}
    assert 0.4 < mean["Gesture"] - mean["Transition"] < 2.5  # 1.0 in 15 real recordings
    thm = train.select(THM).drop_nulls().to_numpy()
    assert 18 < thm.min() < 24
    assert 33 < thm.max() < 40


def test_a_reading_tells_where_the_hand_is_better_than_chance(train):
    """Nearest class mean over other subjects: far from 1/8 with ToF, far from perfect without."""
    targets = train.filter(pl.col("gesture").is_in(list(TARGETS)), pl.col("phase") == "Gesture")
    each = targets.group_by("sequence_id", maintain_order=True).agg(
        pl.first("subject", "gesture", "orientation"), pl.col(ACC + THM).mean(),
        *[pl.mean_horizontal(TOF[64 * s : 64 * s + 64]).mean().alias(f"tof_{s}") for s in range(5)],
    ).drop_nulls()  # fmt: skip

    def accuracy(names):
        x = each.select(names).to_numpy()
        group = each.select(pl.concat_str("gesture", "orientation")).to_series().to_numpy()
        where = each.get_column("orientation").to_numpy()
        subject, label = (
            each.get_column("subject").to_numpy(),
            each.get_column("gesture").to_numpy(),
        )
        hits = []
        for i in range(len(x)):
            others = (subject != subject[i]) & (where == where[i])
            scale = x[others].std(axis=0)
            centres = {g: x[others & (group == g)].mean(axis=0) for g in set(group[others])}
            best = min(centres, key=lambda g: (((x[i] - centres[g]) / scale) ** 2).sum())
            hits.append(best.startswith(label[i]))
        return np.mean(hits)

    motion, everything = accuracy(ACC), accuracy(ACC + THM + [f"tof_{s}" for s in range(5)])
    assert 0.2 < motion < 0.7
    assert everything > motion + 0.05


# ---- files and the command line ----------------------------------------------------------------

FILES = ("train.csv", "train_demographics.csv", "test.csv", "test_demographics.csv")


def small(out, **changes):
    knobs = {"subjects": 3, "test_subjects": 2, "seed": 9, "recordings_per_subject": 4} | changes
    sim.simulate(out, **knobs)
    return {name: (out / name).read_bytes() for name in (*FILES, "test_truth.csv")}


def test_the_seed_alone_decides(tmp_path):
    one = small(tmp_path / "a")
    assert one == small(tmp_path / "b", workers=1)
    assert one["train.csv"] != small(tmp_path / "c", seed=10)["train.csv"]
    assert not list((tmp_path / "a").glob("*.part"))


def test_a_subject_does_not_depend_on_the_others():
    alone, together = sim.draw_wearers("train", 1, 7)[0], sim.draw_wearers("train", 1, 7)[0]
    x, y = sim.run_session(alone, 5, test=False), sim.run_session(together, 5, test=False)
    np.testing.assert_array_equal(x.signals.acc, y.signals.acc)
    np.testing.assert_array_equal(x.signals.tof, y.signals.tof)


def test_truth_names_every_test_recording_in_order(folder, test_set):
    truth = read(folder / "test_truth.csv")
    assert truth.columns == ["sequence_id", "gesture"]
    names = test_set.get_column("sequence_id").unique(maintain_order=True)
    assert truth.get_column("sequence_id").to_list() == names.to_list()
    assert set(truth.get_column("gesture")) <= EVERYWHERE | NOT_LEANING | SEATED | LEANING


def test_no_test_subjects_leaves_headers_only(tmp_path):
    files = small(tmp_path, test_subjects=0)
    assert files["test.csv"].count(b"\n") == files["test_demographics.csv"].count(b"\n") == 1


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"subjects": 0}, "subjects=0"),
        ({"test_subjects": -1}, "test_subjects=-1"),
        ({"recordings_per_subject": 103}, "the protocol has 102"),
    ],
)
def test_a_wrong_size_says_what_is_allowed(tmp_path, knobs, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **knobs)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / "cmi_simulator.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_line_makes_the_same_files_and_checks_them(tmp_path):
    knobs = ("--subjects", 3, "--test-subjects", 2, "--seed", 9, "--recordings", 4)
    run = command(tmp_path / "cli", *knobs)
    assert (run.returncode, run.stderr) == (0, "")
    assert "recordings=12" in run.stdout
    made = small(tmp_path / "api")
    assert {name: (tmp_path / "cli" / name).read_bytes() for name in made} == made
    missing = command(tmp_path / "cli", "--check", tmp_path / "none.json")
    assert missing.returncode == 2
    assert "none.json does not exist" in missing.stderr
    wrong = command(tmp_path / "cli", "--subjects", 0)
    assert (wrong.returncode, wrong.stdout) == (2, "")


def test_check_lines_up_with_the_published_names(folder, tmp_path, figures):
    """A reference of the published structure, made of the simulated figures themselves."""
    length = {"mean": 70.5, "std": 35.4, "p50": 59.0}
    reference = {
        "rows": 574945, "sequences": 8151, "subjects": 81,
        "sequence_length": length, "subject_mean_length": {"std": 9.1},
        "behavior_length": {"Performs gesture": length},
        "describe": {"acc_x": {"mean": 1.6, "std": 5.8}, "acc_magnitude": {"mean": 10, "std": 1.2}},
        "nan_fraction": {"acc": 0.0, "rot": 0.006, "tof_1": 0.01},
        "mad_of_acc_magnitude_by_gesture": {"Wave hello": [1.7, 1.0]},
        "jerk_mean_norm_diff_acc_by_gesture": {"Wave hello": [5.2, 2.4]},
        "tof_minus1_by_sensor_of_nonNaN": {"1": 0.59}, "tof_valid_mean_by_sensor": {"1": 111.8},
        "tof_minus1_fraction": 0.57, "tof_valid_mean": 108.2,
        "tof_by_phase": {"Gesture": {"valid_pixels": [160.5, 91], "mean_distance": [116.8, 51]}},
    }  # fmt: skip
    path = tmp_path / "stats.json"
    path.write_text(str(reference).replace("'", '"'))
    real = sim.reference_figures(path)
    assert set(real) - set(figures) == {"missing acc"}
    table = sim.comparison(folder, path)
    assert "| nothing tof_1 |" in table
    assert "| mad |acc| Wave hello |" in table


@pytest.mark.slow
def test_the_full_size(tmp_path):
    run = command(tmp_path)
    assert run.returncode == 0, run.stderr
    figures = sim.folder_figures(tmp_path)
    assert (figures["recordings"], figures["subjects"]) == (8151, 81)
    assert figures["rows"] == pytest.approx(574945, rel=0.05)
    assert (tmp_path / "train.csv").stat().st_size == pytest.approx(1.12e9, rel=0.08)
    for name, (real, tolerance) in REAL.items():
        assert abs(figures[name] - real) <= tolerance, name
    frame = pl.read_csv(tmp_path / "train.csv", columns=["sequence_id", "phase"])
    performed = frame.group_by("sequence_id").agg((pl.col("phase") == "Gesture").any())
    assert (~performed.get_column("phase")).sum() == 1
