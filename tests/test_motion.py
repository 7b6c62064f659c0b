"""Section 5: motion against known poses, known physics and scipy's Rotation."""

import itertools

import numpy as np
import pytest
import reference
from made import changed, recordings, with_gaps
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.transform import Rotation

import cmi_pipeline as cmi

EVERY = np.ones(2, bool)
MAPS = {"MIRROR": np.diag([-1.0, 1, 1]), "HALF_TURN": np.diag([-1.0, -1, 1])}
ARRAYS = ("start", "acc", "rot", "thm", "tof", "sequence_id", "subject", "person")
POSES = ("z", 77, [0, 0, 1]), ("x", 90, [0, 1, 0]), ("y", 90, [-1, 0, 0]), ("x", 180, [0, 0, -1])


def of_scipy(turn):
    q = turn.as_quat(scalar_first=True)
    return np.where(q[:, :1] < 0, -q, q)


def to_scipy(q):
    return Rotation.from_quat(np.asarray(q, float), scalar_first=True)


def about(axis, degrees):
    return of_scipy(Rotation.from_euler(axis, np.reshape(degrees, (-1, 1)), degrees=True))


def moving(turn, push=(0, 0, 0)):
    """Motion of a device with these attitudes that is pushed, world axes, in m/s²."""
    rec = changed(recordings([len(turn)]), rot=of_scipy(turn))
    return cmi.wrist_motion(changed(rec, acc=turn.inv().apply(np.add(push, [0, 0, 9.81]))))


def turning(*quaternions):
    rot = np.concatenate(quaternions)
    return cmi.wrist_motion(changed(recordings([len(rot)]), rot=rot))


def same(a, b):
    for name in ARRAYS:
        assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.parametrize(("axis", "degrees", "felt"), POSES)
def test_gravity_in_known_poses(axis, degrees, felt):
    rec = changed(recordings([1]), acc=np.multiply([felt], 9.81), rot=about(axis, degrees))
    m = cmi.wrist_motion(rec)
    assert_allclose(m["up"], [felt], atol=1e-12)
    assert_allclose(m["lin"], 0, atol=1e-12)


def test_turning_is_measured_in_radians_per_second_the_shorter_way_round():
    m = turning(about("y", 4.0 * np.arange(40)))
    assert_allclose(m["omega"][1:], [[0, np.radians(4) / 0.1, 0]] * 39, atol=1e-10)
    assert_array_equal(m["omega"][0], 0)
    assert_allclose(np.degrees(m["swing"]), 4.0 * np.arange(40), atol=1e-10)
    m = turning(about("z", 170), about("z", -170))
    assert_allclose(m["omega"][1] * 0.1, [0, 0, np.radians(20)], atol=1e-12)
    assert_allclose(np.degrees(m["swing"]), [0, 20], atol=1e-10)


def test_a_push_is_told_by_where_the_device_points():
    """Whatever the compass says: it lies flat and is pushed along, then across its x axis."""
    for heading in (0, 50, 200):
        c, s = np.cos(np.radians(heading)), np.sin(np.radians(heading))
        flat = Rotation.from_euler("z", np.full((40, 1), heading), degrees=True)
        for push, ahead, aside in (((2 * c, 2 * s, 1), 2, 0), ((-2 * s, 2 * c, 1), 0, 2)):
            m = moving(flat, push)
            assert_allclose(m["world_ahead"], np.full(40, ahead), atol=1e-12)
            assert_allclose(m["world_aside"], np.full(40, aside), atol=1e-12)
            assert_allclose(np.stack([m["world_flat"], m["world_up"]]), [[2] * 40, [1] * 40])


def test_repair_agrees_with_the_reference_and_stays_within_its_recording():
    rec = with_gaps(recordings([40, 50, 30, 35, 30, 30, 30, 30], seed=8))
    q = cmi.repair_rotation(rec.rot, rec.start)
    for i, (a, b) in enumerate(itertools.pairwise(rec.start)):
        assert_allclose(q[a:b], reference.repaired(rec.rot[a:b]), atol=1e-12, err_msg=str(i))
        alone = cmi.repair_rotation(rec.rot[a:b], np.array([0, b - a]))
        assert_array_equal(q[a:b], alone, err_msg=str(i))
    assert np.isnan(q[rec.start[2] : rec.start[3]]).all()


def test_without_rotation_gravity_is_guessed():
    """Slow turning, a few knocks: the median finds the vertical within a few degrees."""
    angles = np.stack([np.linspace(0, 60, 80), np.linspace(10, 40, 80)], 1)
    turn = Rotation.from_euler("xy", angles, degrees=True)
    acc = turn.inv().apply([0, 0, 9.81])
    acc[[20, 21, 50]] += [15, -9, 4]
    blind = changed(recordings([80]), acc=acc, rot=np.full((80, 4), np.nan, np.float32))
    m = cmi.wrist_motion(blind)
    cosine = (m["up"] * turn.as_matrix()[:, 2]).sum(axis=1)
    assert np.degrees(np.arccos(np.clip(cosine, -1, 1))).max() < 8
    assert np.isnan(m["omega"]).all()
    assert np.isfinite(m["lin"]).all()


@pytest.mark.parametrize("name", MAPS)
def test_the_maps_are_what_the_matrices_say(name):
    rec = recordings([30, 20], seed=12)
    other, m = cmi.apply_map(rec, EVERY, getattr(cmi, name)), MAPS[name]
    assert_array_equal(other.acc, rec.acc @ m)
    assert (other.rot[:, 0] >= 0).all()
    before, after = to_scipy(rec.rot).as_matrix(), to_scipy(other.rot).as_matrix()
    assert_allclose(after, m @ before @ m if name == "MIRROR" else before @ m, atol=1e-6)
    a, b = cmi.wrist_motion(rec), cmi.wrist_motion(other)
    assert_allclose(b["omega"], a["omega"] @ m * np.linalg.det(m), atol=1e-9)  # an axial vector
    assert_allclose(b["up"], a["up"] @ m, atol=1e-9)
    assert_allclose(b["world_up"], a["world_up"], atol=1e-9)


def test_sensors_and_pixels_change_places():
    rec = recordings([4, 4], seed=14)
    mirror, turn = (cmi.apply_map(rec, EVERY, c) for c in (cmi.MIRROR, cmi.HALF_TURN))
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
    left, upside_down = changed(rec, person=person), np.arange(8) >= 4
    before = [getattr(left, n).copy() for n in ARRAYS]
    out = cmi.canonical(left, upside_down)
    for n, old in zip(ARRAYS, before, strict=True):
        assert_array_equal(getattr(left, n), old, err_msg="the input is left alone")
    for n in ("acc", "rot", "thm", "tof"):
        assert_array_equal(getattr(out, n)[: rec.start[2]], getattr(rec, n)[: rec.start[2]])
    mirrored = cmi.apply_map(left, person[:, 3] == 0, cmi.MIRROR)
    same(out, cmi.apply_map(mirrored, upside_down, cmi.HALF_TURN))
    assert cmi.canonical(rec, np.zeros(8, bool)) is rec
