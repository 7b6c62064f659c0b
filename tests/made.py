"""Recordings made of random walks, for tests: no pattern, every sensor, any lengths; and frames.
And the competition's names, as its pages give them."""

import dataclasses

import numpy as np

import cmi_pipeline as cmi

GESTURES = """Above ear - pull hair | Cheek - pinch skin | Eyebrow - pull hair | Eyelash - pull hair |
Forehead - pull hairline | Forehead - scratch | Neck - pinch skin | Neck - scratch |
Drink from bottle/cup | Feel around in tray and pull out an object | Glasses on/off |
Pinch knee/leg skin | Pull air toward your face | Scratch knee/leg skin | Text on phone |
Wave hello | Write name in air | Write name on leg"""
GESTURES = [name.strip() for name in GESTURES.split("|")]
TARGETS, OTHERS = GESTURES[:8], GESTURES[8:]
ACC, ROT = [f"acc_{axis}" for axis in "xyz"], [f"rot_{axis}" for axis in "wxyz"]
THM = [f"thm_{i}" for i in range(1, 6)]
TOF = [f"tof_{i}_v{j}" for i in range(1, 6) for j in range(64)]
SENSORS = [*ACC, *ROT, *THM, *TOF]
PERSON = ["adult_child", "age", "sex", "handedness", "height_cm", "shoulder_to_wrist_cm"]
PERSON += ["elbow_to_wrist_cm"]
GROUPS = (  # few channels for small networks, named as the real ones
    ("acc", ("acc_x", "acc_y", "acc_z", "acc_mag")),
    ("rot", ("up_x", "up_y", "up_z")),
    ("motion", ("omega_x", "omega_y", "omega_z", "swing")),
    ("thm", ("thm_1", "thm_2")),
    *((f"tof_{i}", (f"tof_{i}_near", f"tof_{i}_sx")) for i in range(1, 6)),
)


def random_rotations(rng, n):
    """A wandering attitude, as the files have it: w first, w ≥ 0, multiples of 1/16384."""
    q = np.cumsum(rng.normal(0, 0.12, (n, 4)), axis=0) + rng.normal(0, 1, 4)
    q = np.round(q / np.linalg.norm(q, axis=1, keepdims=True) * 16384) / 16384
    return np.where(q[:, :1] < 0, -q, q).astype(np.float32)


def recordings(lengths, seed=0):
    """Complete recordings of the given numbers of rows, right-handers all."""
    rng = np.random.default_rng(seed)
    n_rows, n = sum(lengths), len(lengths)
    tof = np.clip(rng.normal(120, 70, (n_rows, 5, 8, 8)), 0, 249)
    far = rng.random((n_rows, 5, 8, 8)) < rng.random((n_rows, 5, 1, 1)) ** 2
    tof = np.where(far | (rng.random((n_rows, 5, 1, 1)) < 0.1), 254, tof).astype(np.uint8)
    person = np.stack([[1, 20 + i, i % 2, 1, 160 + i, 50 + i, 25] for i in range(n)])
    return cmi.Recordings(
        start=np.r_[0, np.cumsum(lengths)].astype(np.int64),
        acc=(np.round(rng.normal([0, 2, 8], 3, (n_rows, 3)) * 256) / 256).astype(np.float32),
        rot=np.concatenate([random_rotations(rng, k) for k in lengths]),
        thm=(30 + np.cumsum(rng.normal(0, 0.05, (n_rows, 5)), axis=0)).astype(np.float32),
        tof=tof,
        sequence_id=np.array([f"SEQ_{i:06d}" for i in range(n)]),
        subject=np.array([f"SUBJ_{i % 3}" for i in range(n)]),
        person=person.astype(np.float32),
    )


def changed(rec, **arrays):
    return dataclasses.replace(rec, **arrays)


def alone(rec, i):
    return joined([rec.part(i, i + 1)])


def joined(parts):
    start = np.r_[0, np.cumsum(np.concatenate([np.diff(p.start) for p in parts]))].astype(np.int64)
    names = ("acc", "rot", "thm", "tof", "sequence_id", "subject", "person")
    return cmi.Recordings(start, *(np.concatenate([getattr(p, n) for p in parts]) for n in names))


def with_gaps(rec):
    """The same with missing rows, components, sensors and pixels. Needs 8 recordings of 30 rows."""
    rot, thm, tof, s = rec.rot.copy(), rec.thm.copy(), rec.tof.copy(), rec.start
    rot[s[0] : s[0] + 3] = rot[s[0] + 10 : s[0] + 14] = rot[s[1] - 5 : s[1]] = np.nan
    rot[s[1], 1] = rot[s[1] + 7, 2] = rot[s[1] + 20, 0] = np.nan
    rot[s[1] + 25, :2] = np.nan
    rot[s[1] + 21] = 0
    rot[s[2] : s[3]] = np.nan  # no rotation at all
    rot[s[3] : s[4]] = np.nan
    rot[s[3] + 5] = 0.5  # one row only
    thm[s[4] : s[5]] = np.nan
    tof[s[4] : s[5]] = 255
    thm[s[5] : s[6], 2] = thm[s[5] + 3 : s[5] + 9, 1] = np.nan
    tof[s[5] + 4 : s[5] + 8, 1] = 255
    tof[s[5] + 10, 2, 0, 3] = 255  # one pixel
    tof[s[6] : s[7], 3] = 254  # nothing in range
    tof[s[7] : s[8], 4] = 255
    return changed(rec, rot=rot, thm=thm, tof=tof)


def random_frames(lengths, spread=3.0, seed=0):
    """Random numbers in 23 channels, and random ToF images."""
    rng, start = np.random.default_rng(seed), np.r_[0, np.cumsum(lengths)].astype(np.int64)
    x = rng.normal(0, spread, (start[-1], 23)).astype(np.float32)
    tof = rng.integers(0, 256, (len(x), 5, 8, 8)).astype(np.uint8)
    return cmi.Frames(start, x, GROUPS, tof)


def frames_to_learn(n=36, seed=5):
    """Frames whose gesture and behaviour show in the levels of some channels, and their labels."""
    rng, kind, behavior = np.random.default_rng(seed), np.arange(n) % 4, np.arange(n) // 4 % 2
    made = random_frames(rng.integers(6, 36, n), 0.4, seed)
    whose = np.repeat(np.arange(n), np.diff(made.start))
    made.x[:, [3, 13]] += 3 * np.stack([kind % 2, kind // 2], axis=1)[whose]
    made.x[:, [10, 15]] += 3 * np.stack([kind // 2, kind % 2], axis=1)[whose]
    made.x[:, 8] += 3 * behavior[whose]
    made.x[whose % 9 == 4, 11:13] = np.nan
    gesture = np.array([1, 6, 9, 16])[kind]  # two targets, two others
    phase = (made.tof[:, 0, 0, 0] > 99).astype(np.uint8)
    return made, cmi.Labels.of(gesture, behavior, behavior, phase)
