"""Section 5: motion against known poses, known physics and scipy's Rotation."""

import itertools

import numpy as np
import pytest
import reference
from made import changed, recordings, with_gaps
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.transform import Rotation

import cmi_pipeline as cmi

ONE = np.array([0, 40])


def quaternion(axis, degrees, rows=1):
    """w first."""
    half = np.radians(degrees) / 2
    q = np.zeros((rows, 4))
    q[:, 0], q[:, 1 + "xyz".index(axis)] = np.cos(half), np.sin(half)
    return q


def of_scipy(turn):
    q = turn.as_quat()[:, [3, 0, 1, 2]]
    return np.where(q[:, :1] < 0, -q, q)


def random_turns(n, seed=0):
    q = np.random.default_rng(seed).normal(size=(n, 4))
    return Rotation.from_quat(q)


# ---- known poses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "degrees", "felt"),
    [
        ("z", 0, (0, 0, 1)),
        ("z", 77, (0, 0, 1)),
        ("x", 90, (0, 1, 0)),
        ("y", 90, (-1, 0, 0)),
        ("x", 180, (0, 0, -1)),
    ],
)
def test_gravity_in_known_poses(axis, degrees, felt):
    got = cmi.GRAVITY * cmi.up_seen(quaternion(axis, degrees))
    assert_allclose(got, [np.multiply(felt, 9.81)], atol=1e-12)


def test_tilt_is_the_angle_to_the_vertical():
    for degrees in (0, 10, 90, 135, 180):
        up = cmi.up_seen(quaternion("x", degrees))
        tilt = np.arctan2(np.hypot(up[:, 0], up[:, 1]), up[:, 2])
        assert_allclose(np.degrees(tilt), degrees, atol=1e-10)


def test_constant_turning_is_measured_in_radians_per_second():
    rot = np.concatenate([quaternion("y", 5.0 * t) for t in range(40)])
    rate = cmi.angular_velocity(rot, ONE)
    assert_allclose(rate[1:], [[0, np.radians(5) / 0.1, 0]] * 39, atol=1e-10)
    assert_array_equal(rate[0], 0)


def test_the_shorter_way_round_is_taken():
    rot = np.concatenate([quaternion("z", 170), quaternion("z", -170)])
    assert_allclose(cmi.angular_velocity(rot, np.array([0, 2]))[1, 2] * 0.1, np.radians(20))
    assert_allclose(np.degrees(cmi.angular_distance(rot[:1], rot[1:])), 20)


def test_a_device_at_rest_has_no_linear_acceleration():
    turn = random_turns(40)
    acc = turn.inv().apply([0, 0, 9.81]).astype(np.float32)
    rec = changed(recordings([40]), acc=acc, rot=of_scipy(turn).astype(np.float32))
    assert_allclose(cmi.Motion.of(rec).linear, 0, atol=1e-5)


def test_a_push_in_the_world_is_found_in_the_world():
    turn = random_turns(40)
    acc = turn.inv().apply([1.0, -2.0, 9.81 + 3.0]).astype(np.float32)
    rec = changed(recordings([40]), acc=acc, rot=of_scipy(turn).astype(np.float32))
    m = cmi.Motion.of(rec)
    assert_allclose(cmi.rotate(m.rot, m.linear), [[1, -2, 3]] * 40, atol=1e-5)
    assert_allclose(m.vertical, 3, atol=1e-5)
    assert_allclose(m.horizontal, np.sqrt(5), atol=1e-5)


def test_jerk_is_the_slope_of_acceleration():
    acc = np.arange(40.0)[:, None] * [0.2, 0.0, -1.0]
    assert_allclose(cmi.jerk(acc, ONE)[1:], [[2, 0, -10]] * 39, atol=1e-12)


# ---- scipy's Rotation on random poses ----------------------------------------------------------


def test_the_helpers_agree_with_scipy():
    p, q = random_turns(200, 1), random_turns(200, 2)
    v = np.random.default_rng(3).normal(size=(200, 3))
    a, b = of_scipy(p), of_scipy(q)
    product = cmi.multiply(a, b)
    assert_allclose(product * np.sign(product[:, :1]), of_scipy(p * q), atol=1e-12)
    assert_allclose(cmi.rotate(a, v), p.apply(v), atol=1e-12)
    assert_allclose(cmi.rotate(cmi.conjugate(a), v), p.inv().apply(v), atol=1e-12)
    assert_allclose(cmi.angular_distance(a, b), (p.inv() * q).magnitude(), atol=1e-12)
    matrix = p.as_matrix()
    assert_allclose(cmi.rotation_6d(a), matrix[:, :2].reshape(-1, 6), atol=1e-12)
    assert_allclose(cmi.up_seen(a), matrix[:, 2], atol=1e-12)
    rate = (p[:-1].inv() * p[1:]).as_rotvec() / 0.1
    assert_allclose(cmi.angular_velocity(a, np.array([0, 200]))[1:], rate, atol=1e-9)


def test_the_sign_of_a_quaternion_does_not_matter():
    rec = recordings([50, 20], seed=4)
    flip = np.where(np.random.default_rng(0).random(70) < 0.5, -1, 1)[:, None].astype(np.float32)
    a, b = cmi.Motion.of(rec), cmi.Motion.of(changed(rec, rot=rec.rot * flip))
    for name in ("rot", "up", "level", "linear", "omega", "swing"):
        assert_array_equal(getattr(a, name), getattr(b, name))


def test_turning_the_wristband_turns_every_vector_alike():
    rec, band = recordings([60], seed=5), random_turns(1, 6)
    turn = Rotation.from_quat(rec.rot[:, [1, 2, 3, 0]].astype(float))
    acc = band.inv().apply(rec.acc.astype(float))
    other = changed(rec, acc=acc, rot=of_scipy(turn * band))
    a, b = cmi.make_frames(rec), cmi.make_frames(other)
    for name in ("acc", "up", "north", "west", "lin", "omega", "jerk"):
        columns = [a.names.index(f"{name}_{axis}") for axis in "xyz"]
        assert_allclose(b.x[:, columns], band.inv().apply(a.x[:, columns]), atol=2e-3, err_msg=name)
    for name in ("acc_mag", "lin_mag", "world_up", "world_flat", "omega_mag", "jerk_mag", "swing"):
        k = a.names.index(name)
        assert_allclose(b.x[:, k], a.x[:, k], atol=2e-3, err_msg=name)


# ---- repair ------------------------------------------------------------------------------------


def test_complete_rotations_are_only_normalised():
    rec = recordings([30, 7])
    q = cmi.repair_rotation(rec.rot, rec.start)
    assert_allclose(q, rec.rot, atol=1e-4)
    assert_allclose(np.linalg.norm(q, axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("component", [0, 1, 2, 3])
def test_one_missing_component_is_rebuilt(component):
    rec = recordings([60], seed=7)
    rot = rec.rot.copy()
    rows = np.arange(3, 60, 5)
    rot[rows, component] = np.nan
    q = cmi.repair_rotation(rot, rec.start)
    turn = Rotation.from_quat(q[:, [1, 2, 3, 0]]).inv() * Rotation.from_quat(
        rec.rot[:, [1, 2, 3, 0]].astype(float)
    )
    sure = np.abs(rec.rot[rows, component]) > 0.15  # near zero either sign is right
    assert sure.sum() >= 5
    assert turn.magnitude()[rows][sure].max() < 0.02


def test_gaps_are_filled_half_way_and_ends_are_held():
    rot = np.concatenate([quaternion("x", 10, 3), quaternion("x", 0, 3), quaternion("x", 50, 3)])
    rot[[0, 1, 3, 4, 5, 8]] = np.nan
    angle = np.degrees(2 * np.arccos(cmi.repair_rotation(rot, np.array([0, 9]))[:, 0]))
    assert_allclose(angle, [10, 10, 10, 20, 30, 40, 50, 50, 50], atol=1e-9)


def test_repair_agrees_with_the_reference_and_stays_within_its_recording():
    rec = with_gaps(recordings([40, 50, 30, 35, 30, 30, 30, 30], seed=8))
    q = cmi.repair_rotation(rec.rot, rec.start)
    for i in range(len(rec)):
        rows = slice(rec.start[i], rec.start[i + 1])
        assert_allclose(q[rows], reference.repaired(rec.rot[rows]), atol=1e-12, err_msg=str(i))
    assert np.isnan(q[rec.start[2] : rec.start[3]]).all()


def test_a_zero_quaternion_is_missing():
    rot = quaternion("x", 40, 5)
    rot[2] = 0
    assert_allclose(cmi.repair_rotation(rot, np.array([0, 5])), quaternion("x", 40, 5), atol=1e-12)


def test_signs_become_continuous_within_each_recording():
    rec = recordings([80, 80], seed=9)
    flip = np.where(np.random.default_rng(1).random(160) < 0.5, -1, 1)[:, None]
    q = cmi.continuous_rotation(rec.rot.astype(float) * flip, rec.start)
    for a, b in ((0, 80), (80, 160)):
        assert (q[a + 1 : b] * q[a : b - 1]).sum(axis=1).min() > 0
        assert q[a:b, 0].sum() > 0


def test_without_rotation_gravity_is_guessed():
    """Slow turning, a few knocks: the median finds the vertical within a few degrees."""
    turn = Rotation.from_euler(
        "xy", np.stack([np.linspace(0, 60, 80), np.linspace(10, 40, 80)], 1), degrees=True
    )
    acc = turn.inv().apply([0, 0, 9.81])
    acc[[20, 21, 50]] += [15, -9, 4]
    nothing = np.full((80, 4), np.nan, np.float32)
    rec = changed(recordings([80]), acc=acc.astype(np.float32), rot=nothing)
    m = cmi.Motion.of(rec)
    cosine = (m.up * turn.as_matrix()[:, 2]).sum(axis=1)
    assert np.degrees(np.arccos(np.clip(cosine, -1, 1))).max() < 8
    assert np.isnan(m.omega).all()
    assert np.isfinite(m.linear).all()


def test_the_median_stays_within_its_recording():
    """Against a loop, for neighbours of which none has a rotation; with a gap."""
    lengths = [20, 3, 40, 1]
    acc = np.random.default_rng(6).normal([0, 3, 8], 4, (64, 3))
    acc[30:33] = np.nan
    start = np.r_[0, np.cumsum(lengths)]
    slow = np.empty_like(acc)
    for a, b in itertools.pairwise(start):
        for row in range(a, b):
            median = np.nanmedian(acc[max(a, row - 7) : min(b, row + 8)], axis=0)
            slow[row] = median / np.linalg.norm(median)
    assert_allclose(cmi.slow_direction(acc, start), slow, rtol=1e-12)
    blind = np.full((64, 4), np.nan)
    assert_allclose(cmi.up_direction(acc, blind, start), slow, rtol=1e-12)


# ---- borders -----------------------------------------------------------------------------------


def test_nothing_crosses_a_border():
    """Changing one recording leaves every other as it was."""
    rec = with_gaps(recordings([40, 50, 30, 35, 30, 30, 30, 30], seed=10))
    noise = np.random.default_rng(0)
    for i in range(len(rec)):
        acc, rot = rec.acc.copy(), rec.rot.copy()
        rows = slice(rec.start[i], rec.start[i + 1])
        acc[rows] = noise.normal(0, 50, acc[rows].shape)
        rot[rows] = noise.normal(0, 1, rot[rows].shape)
        a, b = cmi.Motion.of(rec), cmi.Motion.of(changed(rec, acc=acc, rot=rot))
        others = np.delete(np.arange(len(rec.acc)), np.arange(rows.start, rows.stop))
        for name in ("acc", "rot", "up", "linear", "omega", "jerk", "vertical", "swing"):
            assert_array_equal(getattr(a, name)[others], getattr(b, name)[others], err_msg=name)


# ---- mirror and turn ---------------------------------------------------------------------------

EVERY = np.ones(2, bool)
MAPS = {"mirrored": np.diag([-1.0, 1, 1]), "turned_back": np.diag([-1.0, -1, 1])}


def same(a, b):
    for name in ("start", "acc", "rot", "thm", "tof", "sequence_id", "subject", "person"):
        assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.parametrize("name", MAPS)
def test_twice_is_the_identity(name):
    rec = recordings([30, 20], seed=11)
    change = getattr(cmi, name)
    same(change(change(rec, EVERY), EVERY), rec)
    assert (change(rec, EVERY).rot[:, 0] >= 0).all()


@pytest.mark.parametrize("name", MAPS)
def test_the_maps_are_what_the_matrices_say(name):
    rec = recordings([30, 20], seed=12)
    other, m = getattr(cmi, name)(rec, EVERY), MAPS[name]
    assert_allclose(other.acc, rec.acc @ m)
    before = Rotation.from_quat(rec.rot[:, [1, 2, 3, 0]].astype(float)).as_matrix()
    after = Rotation.from_quat(other.rot[:, [1, 2, 3, 0]].astype(float)).as_matrix()
    expected = m @ before @ m if name == "mirrored" else before @ m
    assert_allclose(after, expected, atol=1e-6)
    omega = cmi.angular_velocity(rec.rot, rec.start) * (
        [1, -1, -1] if name == "mirrored" else [-1, -1, 1]
    )
    assert_allclose(cmi.angular_velocity(other.rot, rec.start), omega, atol=1e-6)


def test_mirror_and_turn_commute_and_keep_gravity_vertical():
    rec = recordings([30, 20], seed=13)
    same(
        cmi.mirrored(cmi.turned_back(rec, EVERY), EVERY),
        cmi.turned_back(cmi.mirrored(rec, EVERY), EVERY),
    )
    for name in MAPS:
        other = getattr(cmi, name)(rec, EVERY)
        a, b = cmi.Motion.of(rec), cmi.Motion.of(other)
        assert_allclose(b.vertical, a.vertical, atol=1e-9)
        assert_allclose(b.up, a.up @ MAPS[name], atol=1e-9)


def test_sensors_and_pixels_change_places():
    rec = recordings([4, 4], seed=14)
    mirror, turn = cmi.mirrored(rec, EVERY), cmi.turned_back(rec, EVERY)
    for new, old in zip((1, 2, 3, 4, 5), (1, 2, 5, 4, 3), strict=True):
        assert_array_equal(mirror.thm[:, new - 1], rec.thm[:, old - 1])
        image = rec.tof[:, old - 1]
        flipped = image[:, ::-1] if new in (3, 5) else image[:, :, ::-1]
        assert_array_equal(mirror.tof[:, new - 1], flipped)
    for new, old in zip((1, 2, 3, 4, 5), (1, 4, 5, 2, 3), strict=True):
        assert_array_equal(turn.thm[:, new - 1], rec.thm[:, old - 1])
        assert_array_equal(turn.tof[:, new - 1], np.rot90(rec.tof[:, old - 1], 2, axes=(1, 2)))


def test_canonical_changes_only_whom_it_must():
    rec = with_gaps(recordings([30] * 8, seed=15))
    person = rec.person.copy()
    person[2:5, 3] = 0
    left, turned = changed(rec, person=person), np.arange(8) >= 4
    before = [getattr(left, n).copy() for n in ("acc", "rot", "thm", "tof")]
    out = cmi.canonical(left, turned)
    for n, old in zip(("acc", "rot", "thm", "tof"), before, strict=True):
        assert_array_equal(getattr(left, n), old)
        assert_array_equal(getattr(out, n)[: left.start[2]], old[: left.start[2]])
    expected = cmi.turned_back(cmi.mirrored(left, person[:, 3] == 0), turned)
    same(out, expected)
    same(cmi.canonical(rec, np.zeros(8, bool)), rec)
