# %% [markdown]
"""Make recordings of a wrist sensor in the exact schema of the CMI competition.

One file, numpy and polars only. Nothing of the real data is in it: a jointed arm carries a
simulated device from rest to a place on a simulated body and moves it there.

    python cmi_simulator.py OUT --subjects 81 --test-subjects 34 --seed 1   # the full size
    python cmi_simulator.py OUT --subjects 12 --test-subjects 3             # a demo, in seconds
    python cmi_simulator.py OUT --subjects 6 --recordings 30                # smaller, for tests
    python cmi_simulator.py OUT --check cmi_stats.json                      # compare with figures

OUT receives train.csv, train_demographics.csv, test.csv, test_demographics.csv and
test_truth.csv (sequence_id, gesture). The competition has no test_truth.csv: it is the answer
sheet for dry runs, and nothing that predicts may read it.

Sections
    1 Schema
    2 Gestures
    3 Rotations
    4 Wearers
    5 Protocol
    6 Poses
    7 Motion
    8 Time of flight
    9 Thermopiles
    10 Device
    11 Files
    12 Check
    13 Entry

Array axes, as written in every shape comment
    N recordings of one subject    R rows of those recordings, end to end
    S five sensors                 P 64 pixels of a sensor, row by row

Frames of reference
    room    x right, y forward, z up, origin between the hips; the wearer faces y
    trunk   x right, y forward, z from the hips to the head; turned by the posture
    head    the same axes, fixed to the head
    device  x to the thumb, y from the elbow to the hand, z out of the inner wrist, where all five
            sensors look; so for a right wrist, others are maps of it (section 10)
    world   the room, turned about z by the direction that the wearer faces

Units are SI: m, s, m/s², rad; °C. A ToF pixel counts TOF_UNIT. Quaternions are (w, x, y, z) and
turn the first-named frame into the second. Rows follow each other every SAMPLE_PERIOD.
"""

# %%
from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

F64 = npt.NDArray[np.float64]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Vec3 = tuple[float, float, float]

# %% [markdown]
# ## 1 Schema
#
# Names, strings and their order are the competition's, to the letter. A pixel is one byte in
# memory: 0…249 is a distance, two codes above stand for "nothing in range" and "missing".

# %%
ACC = ["acc_x", "acc_y", "acc_z"]
ROT = ["rot_w", "rot_x", "rot_y", "rot_z"]
THM = [f"thm_{s}" for s in range(1, 6)]
TOF = [f"tof_{s}_v{p}" for s in range(1, 6) for p in range(64)]
SENSORS = ACC + ROT + THM + TOF
LABELS = ["orientation", "behavior", "phase", "gesture"]
TRAIN_COLUMNS = ["row_id", "sequence_type", "sequence_id", "sequence_counter", "subject"]
TRAIN_COLUMNS += LABELS + SENSORS
TEST_COLUMNS = ["row_id", "sequence_id", "sequence_counter", "subject", *SENSORS]
DEMOGRAPHICS = ["subject", "adult_child", "age", "sex", "handedness"]
DEMOGRAPHICS += ["height_cm", "shoulder_to_wrist_cm", "elbow_to_wrist_cm"]

STRAIGHT, LEAN = "Seated Straight", "Seated Lean Non Dom - FACE DOWN"
BACK, SIDE = "Lie on Back", "Lie on Side - Non Dominant"
ORIENTATIONS = (STRAIGHT, LEAN, BACK, SIDE)
MOVES, RELAXES = "Moves hand to target location", "Relaxes and moves hand to target location"
BEHAVIORS = (MOVES, RELAXES, "Hand at target location", "Performs gesture")

SAMPLE_PERIOD = 0.1  # s; unpublished, 10 Hz fits the real recordings
GRAVITY = 9.88  # m/s², what the real accelerometers show at rest
NOTHING, MISSING = 254, 255  # codes of a ToF pixel
TOF_MAX = 249
TOF_UNIT = 0.00132  # m; the real unit is unpublished, this one gives the real distances

# %% [markdown]
# ## 2 Gestures
#
# Three tables, a line a gesture: when it is done, where the hand is, how it moves there. A wearer's
# habits (section 4) are of the size of the differences between the lines of some gestures.


# %%
@dataclass(frozen=True, slots=True)
class Gesture:
    """When it is done; `wait` is a factor of the time before the hand moves."""

    name: str
    kind: str  # sequence_type
    orientations: tuple[str, ...]
    wait: float = 1.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where the hand is. Degrees; m for a wearer of 1.70 m.

    On head and neck `spot` is (azimuth to the right of forward, elevation) on the surface; in
    trunk, lap and tray it is a point of that frame. The wrist is the length of a bent hand away,
    in the direction `wrist` and a little along the normal.
    """

    part: str
    spot: tuple[float, ...]
    wrist: Vec3  # direction from the fingertips to the wrist, axes of the part
    swivel: float  # of the elbow, outwards from where it hangs
    supine: float  # of the forearm: 0 the thumb, 90 the palm looks to the shoulder
    curl: float  # of the fingers towards the palm: how much of the own hand the sensors see
    normal: Vec3 = (0.0, 0.0, 0.0)  # where the back of the hand looks; head and neck know theirs


@dataclass(frozen=True, slots=True)
class Motion:
    """How the hand moves. Arm axes: across the forearm in the arm's plane, along it, hinge."""

    rate: float  # cycles per row of the rhythm; 0.5 is the fastest that 10 Hz can show
    turn: Vec3  # degrees, amplitude of the rhythm about the arm's axes
    push: Vec3  # m/s², what the wrist and the shoulder add to it, along the arm's axes
    jitter: float  # m/s², movement without a rhythm


TARGET, OTHER = "Target", "Non-Target"
ALL, FREE, CHAIR, KNEE = ORIENTATIONS, (STRAIGHT, BACK, SIDE), (STRAIGHT,), (LEAN,)
GESTURES = (
    Gesture("Above ear - pull hair", TARGET, ALL),
    Gesture("Cheek - pinch skin", TARGET, ALL),
    Gesture("Eyebrow - pull hair", TARGET, ALL, wait=1.2),
    Gesture("Eyelash - pull hair", TARGET, ALL),
    Gesture("Forehead - pull hairline", TARGET, ALL),
    Gesture("Forehead - scratch", TARGET, ALL),
    Gesture("Neck - pinch skin", TARGET, ALL),
    Gesture("Neck - scratch", TARGET, ALL, wait=2.1),
    Gesture("Drink from bottle/cup", OTHER, CHAIR, wait=1.5),
    Gesture("Feel around in tray and pull out an object", OTHER, CHAIR, wait=2.6),
    Gesture("Glasses on/off", OTHER, CHAIR, wait=1.7),
    Gesture("Pinch knee/leg skin", OTHER, KNEE, wait=0.8),
    Gesture("Pull air toward your face", OTHER, FREE),
    Gesture("Scratch knee/leg skin", OTHER, KNEE, wait=1.35),
    Gesture("Text on phone", OTHER, ALL, wait=2.3),
    Gesture("Wave hello", OTHER, FREE, wait=1.3),
    Gesture("Write name in air", OTHER, FREE),
    Gesture("Write name on leg", OTHER, KNEE),
)
NAMES = tuple(g.name for g in GESTURES)
PARTS = ("head", "neck", "trunk", "lap", "tray")
# fmt: off
PLACES = (  # part, spot, wrist, swivel, supine, curl, normal; one line for each of GESTURES
    Place("head", (86, 16), (0.42, 0.24, -0.38), 46, 20, 29),
    Place("head", (48, -22), (0.30, 0.50, -0.50), 40, 50, 31),
    Place("head", (24, 14), (0.48, 0.27, -0.42), 36, 62, 35),
    Place("head", (26, 6), (0.48, 0.30, -0.45), 36, 28, 38),
    Place("head", (18, 50), (0.45, 0.25, -0.30), 36, 74, 25),
    Place("head", (14, 34), (0.46, 0.28, -0.35), 36, 62, 18),
    Place("neck", (66, 5), (0.40, 0.46, -0.28), 42, -8, 30),
    Place("neck", (80, 0), (0.50, 0.50, -0.15), 42, 4, 23),
    Place("head", (0, -35), (0.25, 0.75, -0.60), 35, 15, 18),
    Place("tray", (0.05, 0.42, 0.17), (0.25, -0.75, 0.40), 30, -48, 34, (0, 0, 1)),
    Place("head", (60, 4), (0.35, 0.75, -0.25), 36, 60, 14),
    Place("lap", (0.11, 0.47, 0.08), (0.30, -0.60, 0.14), 38, -28, 45, (0, 0, 1)),
    Place("trunk", (0.10, 0.42, 0.16), (0.40, -0.20, -0.60), 38, -10, 25, (0, 1, 0)),
    Place("lap", (0.11, 0.46, 0.08), (0.30, -0.60, 0.14), 40, -15, 25, (0, 0, 1)),
    Place("trunk", (0.00, 0.36, -0.24), (0.50, -0.20, 0.25), 28, 26, 28, (0, 0.5, -0.8)),
    Place("trunk", (0.24, 0.34, 0.26), (0.10, -0.10, -0.85), 40, -35, 5, (0, -1, 0)),
    Place("trunk", (0.12, 0.42, 0.18), (0.20, -0.45, -0.75), 40, 5, 30, (0, -0.2, 1)),
    Place("lap", (0.10, 0.46, 0.08), (0.30, -0.60, 0.12), 36, -38, 42, (0, 0, 1)),
)
MOTIONS = (  # rate, turn, push, jitter
    Motion(0.20, (1.5, 3.5, 3.5), (0.2, 0.3, 0.2), 0.40),
    Motion(0.15, (0.3, 0.6, 0.5), (0.0, 0.1, 0.1), 0.50),
    Motion(0.24, (0.7, 3.4, 1.5), (0.1, 0.2, 0.2), 0.36),
    Motion(0.33, (0.3, 0.9, 0.4), (0.1, 0.1, 0.1), 0.27),
    Motion(0.25, (1.2, 4.5, 2.2), (0.3, 0.4, 0.3), 0.40),
    Motion(0.48, (0.2, 1.3, 0.3), (0.4, 0.6, 0.4), 0.28),
    Motion(0.34, (0.4, 1.2, 0.5), (0.2, 0.3, 0.3), 0.42),
    Motion(0.49, (0.2, 1.2, 0.3), (0.5, 0.7, 0.5), 0.30),
    Motion(0.05, (12.0, 20.0, 25.0), (0.1, 0.1, 0.1), 0.85),
    Motion(0.14, (4.0, 9.0, 5.0), (0.5, 0.4, 0.4), 0.62),
    Motion(0.09, (8.0, 12.0, 16.0), (0.3, 0.3, 0.3), 0.60),
    Motion(0.30, (0.5, 2.4, 0.9), (0.6, 0.6, 0.5), 0.55),
    Motion(0.16, (4.0, 8.0, 13.0), (1.1, 1.0, 0.8), 0.70),
    Motion(0.44, (0.2, 1.5, 0.4), (0.8, 0.9, 0.6), 0.36),
    Motion(0.33, (0.2, 0.8, 0.3), (0.2, 0.2, 0.2), 0.32),
    Motion(0.30, (6.0, 17.0, 6.0), (1.2, 1.2, 2.0), 0.80),
    Motion(0.13, (9.0, 12.0, 12.0), (2.2, 1.5, 2.0), 1.05),
    Motion(0.31, (0.6, 3.2, 0.9), (0.6, 0.7, 0.4), 0.50),
)
# fmt: on


def column(table: Sequence[Gesture | Place | Motion], name: str, gesture: I64) -> F64:
    """One column of a table for each recording. (N) → (N) or (N, 3)"""
    return np.array([getattr(line, name) for line in table], dtype=np.float64)[gesture]


def by_posture(table: npt.ArrayLike, plan: Plan) -> F64:
    """The entries of a table of ORIENTATIONS. → (N) or (N, …)"""
    return np.array(table, dtype=np.float64)[plan.orientation]


def part_is(gesture: I64, *parts: str) -> npt.NDArray[np.bool_]:
    """Whether the hand is at one of these parts. (N) → (N)"""
    return np.array([place.part in parts for place in PLACES])[gesture]


def rng_for(seed: int, *path: str | int) -> np.random.Generator:
    """Random numbers fixed by the seed and `path` alone, whatever ran before."""
    return np.random.default_rng([seed, *(zlib.crc32(str(p).encode()) for p in path)])


# %% [markdown]
# ## 3 Rotations
#
# Quaternions (w, x, y, z) in the last axis, everything else broadcast.


# %%
def q_mul(p: F64, q: F64) -> F64:
    """First q, then p. (…, 4) × (…, 4) → (…, 4)"""
    pw, px, py, pz = np.moveaxis(p, -1, 0)
    qw, qx, qy, qz = np.moveaxis(q, -1, 0)
    return np.stack(
        [
            pw * qw - px * qx - py * qy - pz * qz,
            pw * qx + px * qw + py * qz - pz * qy,
            pw * qy - px * qz + py * qw + pz * qx,
            pw * qz + px * qy - py * qx + pz * qw,
        ],
        axis=-1,
    )


def q_conj(q: F64) -> F64:
    return q * np.array([1.0, -1.0, -1.0, -1.0])


def q_exp(v: F64) -> F64:
    """Rotation vector to quaternion. (…, 3) rad → (…, 4)"""
    angle = np.linalg.norm(v, axis=-1, keepdims=True)
    return np.concatenate([np.cos(angle / 2), 0.5 * np.sinc(angle / (2 * np.pi)) * v], axis=-1)


def q_log(q: F64) -> F64:
    """Quaternion to rotation vector, the shorter way round. (…, 4) → (…, 3) rad"""
    q = np.where(q[..., :1] < 0, -q, q)
    sine = np.linalg.norm(q[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, q[..., :1])
    return angle / np.maximum(sine, 1e-12) * q[..., 1:]


def q_matrix(q: F64) -> F64:
    """(…, 4) → (…, 3, 3), column j is where axis j goes"""
    w, x, y, z = np.moveaxis(q, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def q_from_axes(x: F64, y: F64, z: F64) -> F64:
    """Quaternion that carries the unit axes to x, y, z. 3 × (N, 3) → (N, 4)

    Of the four ways to read it off a matrix, the one that divides by the largest is taken.
    """
    xx, yy, zz = x[:, 0], y[:, 1], z[:, 2]
    a, b, c = y[:, 2] - z[:, 1], z[:, 0] - x[:, 2], x[:, 1] - y[:, 0]
    d, e, f = x[:, 1] + y[:, 0], x[:, 2] + z[:, 0], y[:, 2] + z[:, 1]
    ways = np.array(
        [
            [1 + xx + yy + zz, a, b, c],
            [a, 1 + xx - yy - zz, d, e],
            [b, d, 1 - xx + yy - zz, f],
            [c, e, f, 1 - xx - yy + zz],
        ]
    )  # (4, 4, N)
    best = np.argmax(np.stack([ways[i, i] for i in range(4)]), axis=0)
    return unit(ways[best, :, np.arange(len(x))])


def turn_by(matrix: F64, v: F64) -> F64:
    """(…, 3, 3) × (…, 3) → (…, 3)"""
    return (matrix @ v[..., None])[..., 0]


def unit(v: F64) -> F64:
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)


# %% [markdown]
# ## 4 Wearers
#
# A wearer has a body and habits. Habits are drawn once and kept for all recordings of the wearer:
# they, and not the noise of a recording, are what makes a new subject hard.


# %%
@dataclass(frozen=True, slots=True)
class Wearer:
    """One subject; the habits follow from `seed` and `name`, whatever the rest says."""

    name: str
    seed: int
    adult: bool
    age: int
    male: bool
    height: float  # m
    arm: float  # m, shoulder to wrist
    forearm: float  # m, elbow to wrist
    left_handed: bool = False
    upside_down: bool = False  # the device is worn turned by 180° about its z
    lacks: tuple[str, ...] = ()  # of tof, tof_5, thm_5: absent in most recordings


@dataclass(frozen=True, slots=True)
class Habit:
    """Standard deviations of one habit of a wearer, and of what adds to it."""

    wearer: float
    gesture: float  # in each gesture
    recording: float
    posture: float = 0.0  # in each orientation


HABITS = {
    "place": Habit(5.0, 4.0, 2.5),  # degrees on the head
    "approach": Habit(0.08, 0.08, 0.04),  # of a hand's length
    "swivel": Habit(8.0, 4.0, 3.0, 10.0),  # degrees
    "supine": Habit(9.0, 6.0, 5.0, 13.0),  # degrees
    "curl": Habit(11.0, 10.0, 6.0),  # degrees
    "strap": Habit(5.0, 0.0, 1.5),  # degrees, how the band sits
    "slip": Habit(0.014, 0.0, 0.003),  # m, of the device on the wrist
    "strength": Habit(0.42, 0.26, 0.28),  # logarithm of the amplitude
    "jitter": Habit(0.36, 0.22, 0.24),  # the same for what has no rhythm
    "rate": Habit(0.08, 0.09, 0.07),  # logarithm
    "axis": Habit(0.15, 0.20, 0.10),  # of the direction of the rhythm
    "lag": Habit(0.30, 0.0, 0.25),  # rows, of the accelerometer behind the rotation
    "drift": Habit(0.018, 0.0, 0.010),  # rows a row, the same
}


def habit(wearer: Wearer, name: str, plan: Plan, rng: np.random.Generator, width: int) -> F64:
    """One habit in each recording, with its shares. → (N, width)"""
    of = HABITS[name]
    lasting = rng_for(wearer.seed, wearer.name, "habit", name)
    own = of.wearer * lasting.standard_normal(width)
    by_gesture = of.gesture * lasting.standard_normal((len(GESTURES), width))
    by_posture = of.posture * lasting.standard_normal((len(ORIENTATIONS), width))
    now = of.recording * rng.standard_normal((len(plan), width))
    return own + by_gesture[plan.gesture] + by_posture[plan.orientation] + now


def shares(count: int, per_81: float, rng: np.random.Generator) -> int:
    """How many of `count` subjects, if it is `per_81` of 81: rounded up or down by chance."""
    expected = count * per_81 / 81
    return int(expected + rng.random()) if expected % 1 else int(expected)


def draw_body(name: str, seed: int) -> Wearer:
    """A subject with the ages and lengths of the real ones: half children, 10 to 53 years."""
    rng = rng_for(seed, name, "body")
    adult = bool(rng.random() < 0.52)
    male = bool(rng.random() < 0.62)
    age = int(np.clip(rng.gamma(3.0, 4.2) + 19, 20, 53)) if adult else int(rng.integers(10, 19))
    grown = 1.715 if adult else 1.48 + 0.215 * min((age - 10) / 5, 1)
    height = np.clip(grown + 0.02 * male + 0.07 * rng.standard_normal(), 1.35, 1.91)
    arm = height * (0.308 + 0.013 * rng.standard_normal())
    forearm = arm * (0.485 + 0.025 * rng.standard_normal())
    height, arm, forearm = np.round([height, arm, forearm], 2)
    return Wearer(name, seed, adult, age, male, float(height), float(arm), float(forearm))


def draw_wearers(kind: str, count: int, seed: int, taken: Iterable[str] = ()) -> list[Wearer]:
    """`count` subjects of train or test, sorted by name, with the real shares of oddities.

    Small sets round by chance, but from 8 subjects on one is left-handed, and from 20 on one
    wears the device upside down.
    """
    rng = rng_for(seed, kind, "wearers")
    pool = np.setdiff1d(np.arange(200, 65_000), [int(name[5:]) for name in taken])
    numbers = np.sort(rng.choice(pool, count, replace=False))
    wearers = [draw_body(f"SUBJ_{number:06d}", seed) for number in numbers]
    left = max(shares(count, 10, rng), int(count >= 8))
    upside = max(shares(count, 2, rng), int(count >= 20))
    for i in rng.permutation(count)[:left]:
        wearers[i] = replace(wearers[i], left_handed=True)
    for i in rng.permutation(count)[:upside]:
        wearers[i] = replace(wearers[i], upside_down=True)
    gaps = [("tof",)] * shares(count, 1, rng) + [("tof_5", "thm_5")] * shares(count, 4, rng)
    gaps += [("thm_5",)] * shares(count, 0.5, rng)
    for i, lacks in zip(rng.permutation(count), gaps, strict=False):
        wearers[i] = replace(wearers[i], lacks=lacks)
    return wearers


# %% [markdown]
# ## 5 Protocol
#
# 51 pairs of orientation and gesture, each begun in two ways: 102 recordings a subject, in random
# order. Lengths of the behaviours follow the real distributions; the gesture is always at the end.


# %%
@dataclass(frozen=True, slots=True)
class Plan:
    """What one subject will do: N recordings, before any of it is simulated."""

    gesture: I64  # (N) index into GESTURES
    orientation: I64  # (N) index into ORIENTATIONS
    relaxes: I64  # (N) 1: starts at the target, relaxes, returns
    rows: I64  # (N, 3) of moving, hand at target, gesture

    @property
    def start(self) -> I64:
        """First row of each recording and, last, R. → (N + 1)"""
        return np.concatenate([[0], np.cumsum(self.rows.sum(axis=1))])

    def __len__(self) -> int:
        return len(self.gesture)


PROTOCOL = np.array(
    [
        (g, ORIENTATIONS.index(orientation), relaxes)
        for g, gesture in enumerate(GESTURES)
        for orientation in gesture.orientations
        for relaxes in (0, 1)
    ]
)  # (102, 3)
SHORT_SUBJECTS = (51, 54, 96, 97, 101)  # recordings of the 5 real subjects who lack some
GESTURE_ROWS = {0.0: 3, 0.002: 14, 0.01: 24, 0.05: 28, 0.15: 29, 0.25: 30, 0.5: 31, 0.75: 32}
GESTURE_ROWS |= {0.9: 35, 0.95: 37, 0.99: 42, 0.998: 52, 1.0: 71}  # share below → rows


def skewed(rng: np.random.Generator, median: F64 | float, spread: float, count: int) -> F64:
    """Log-normal times, a few of them much longer. → (N) rows"""
    tail = np.where(rng.random(count) < 0.03, rng.lognormal(0.9, 0.5, count), 1.0)
    return np.asarray(median * rng.lognormal(0, spread, count) * tail)


def draw_rows(wearer: Wearer, plan: I64, rng: np.random.Generator) -> I64:
    """Lengths of the three behaviours. (N, 3) plan → (N, 3) rows"""
    n = len(plan)
    wait = column(GESTURES, "wait", plan[:, 0])
    patience = rng_for(wearer.seed, wearer.name, "patience").lognormal(0, 0.38)
    first = (plan[:, 1] == ORIENTATIONS.index(STRAIGHT)) * 0.15 + 1  # explanations take time
    moves = skewed(rng, 22.0 * patience * wait * first, 0.55, n)
    relaxes = skewed(rng, 14.8 * patience**0.3, 0.30, n)
    slow = rng.random(n) < np.where(wait > 1.4, 0.55, 0.22)
    at_target = np.where(slow, skewed(rng, 17.5, 0.35, n), skewed(rng, 7.2, 0.32, n))
    performs = np.interp(rng.random(n), list(GESTURE_ROWS), list(GESTURE_ROWS.values()))
    before = np.where(plan[:, 2] == 1, np.clip(relaxes, 3, 98), np.clip(moves, 2, 653))
    rows = np.stack([before, np.clip(at_target, 1, 108), performs], axis=1)
    rows = np.rint(rows).astype(np.int64)
    rows[:, 0] += np.maximum(0, 29 - rows.sum(axis=1))  # the shortest real recording
    return rows


def draw_plan(wearer: Wearer, count: int, rng: np.random.Generator) -> Plan:
    """`count` different entries of the protocol in random order."""
    plan = PROTOCOL[rng.permutation(len(PROTOCOL))[:count]]
    return Plan(plan[:, 0], plan[:, 1], plan[:, 2], draw_rows(wearer, plan, rng))


# %% [markdown]
# ## 6 Poses
#
# Where wrist and elbow are, at rest and at the target. The wrist stands one hand's length from
# the place that the fingers touch; the elbow follows by inverse kinematics of a two-bone arm, whose
# one freedom, the swivel about the line from shoulder to wrist, is a habit.


# %%
# pitch (forward is negative), roll (to the left is negative) of the trunk, then pitch of the head
POSTURES = ((-4, 0, -4), (-42, -14, -28), (86, 0, -8), (4, -86, -4))
SWIVEL = (0, -4, 33, -50)  # degrees more, by orientation: elbows sink
SUPINE = (0, 26, 30, -22)  # the same of the forearm
HEAD_RADII = np.array([0.081, 0.102, 0.123])
NECK_RADII = np.array([0.060, 0.064, 0.085])


@dataclass(frozen=True, slots=True)
class Body:
    """Frames of the body in the room, one for each recording."""

    scale: float  # of all lengths; 1 at 1.70 m
    trunk: F64  # (N, 3, 3)
    head: F64  # (N, 3, 3)
    chest: F64  # (N, 3) between the shoulders
    skull: F64  # (N, 3) centre of the head
    neck: F64  # (N, 3) its centre
    shoulder: F64  # (N, 3) the right one


COLD, CLOTHED, SKIN = KINDS = range(3)


@dataclass(frozen=True, slots=True)
class Ellipsoid:
    """`squash` turns it into the unit sphere at the origin."""

    centre: F64  # (N or R, 3) room; R once rows are seen
    squash: F64  # (N or R, 3, 3)
    kind: int  # COLD, CLOTHED or SKIN


def ellipsoid(centre: F64, axes: F64, radii: F64 | Vec3, kind: int) -> Ellipsoid:
    return Ellipsoid(centre, axes.swapaxes(-1, -2) / np.asarray(radii)[..., None], kind)


def picked(shape: Ellipsoid, which: I64 | slice) -> Ellipsoid:
    """The ellipsoid of other rows."""
    return replace(shape, centre=shape.centre[which], squash=shape.squash[which])


def along(direction: F64) -> F64:
    """Axes whose third points along `direction`. (…, 3) → (…, 3, 3)"""
    z = unit(direction)
    x = unit(np.cross(z, np.array([0.31, 0.27, -0.91])))
    return np.stack([x, np.cross(z, x), z], axis=-1)


def body_shapes(wearer: Wearer, body: Body, plan: Plan) -> list[Ellipsoid]:
    """What keeps still within a recording: body, seat or bed, pillow, tray."""
    k, lying = body.scale, np.isin(plan.orientation, [2, 3])[:, None]
    right, up = body.trunk[..., 0], body.trunk[..., 2]
    top = k * np.where(lying, -0.14, np.where(part_is(plan.gesture, "tray")[:, None], 0.02, -0.16))
    middle = 0.5 * body.chest[:, :2] + np.where(lying, 0.0, [0.0, 0.2])
    flat = np.broadcast_to(np.eye(3), body.trunk.shape)
    long = rng_for(wearer.seed, wearer.name, "hair").uniform(0, 1)
    hair = body.skull - k * (0.03 * body.head[..., 1] + (0.01 + 0.07 * long) * body.head[..., 2])
    locks = k * np.array([0.095 + 0.02 * long, 0.095, 0.13 + 0.07 * long])
    pillow = body.skull - np.where(lying, [0.0, 0.0, 0.13], [0.0, 0.0, 9.0]) * k
    torso, ahead = body.chest - 0.24 * k * up, np.where(lying, -up, np.array([0.0, 0.97, -0.1]))
    joints = [body.chest + k * (side * right - 0.03 * up) for side in (0.15, -0.15)]
    thighs = [k * (side * right + 0.22 * ahead) for side in (0.095, -0.095)]
    limb, thigh = k * np.array([0.09, 0.075, 0.07]), k * np.array([0.09, 0.09, 0.30])
    return [
        ellipsoid(body.skull, body.head, k * HEAD_RADII, SKIN),
        ellipsoid(body.neck, body.trunk, k * NECK_RADII, SKIN),
        ellipsoid(hair, body.head, locks, CLOTHED),
        ellipsoid(torso, body.trunk, k * np.array([0.175, 0.125, 0.31]), CLOTHED),
        *(ellipsoid(joint, body.trunk, limb, CLOTHED) for joint in joints),
        *(ellipsoid(leg, along(ahead), thigh, CLOTHED) for leg in thighs),
        ellipsoid(np.concatenate([middle, top - 0.05], axis=1), flat, (0.6, 0.6, 0.05), COLD),
        ellipsoid(pillow, flat, (0.30, 0.24, 0.07), COLD),
    ]


@dataclass(frozen=True, slots=True)
class Pose:
    """Device in the room, and how the forearm is turned about itself."""

    wrist: F64  # (N, 3)
    rot: F64  # (N, 4) device → room
    supine: F64  # (N) rad; 0 at rest, where nobody asks


def turned(pitch: F64, roll: F64, yaw: F64) -> F64:
    """Roll about y first, then pitch about x, then yaw about z; degrees. 3 × (N) → (N, 4)"""
    zero = np.zeros_like(pitch)
    about = [np.stack(v, axis=-1) for v in ((zero, roll, zero), (pitch, zero, zero))]
    q = q_mul(q_exp(np.radians(about[1])), q_exp(np.radians(about[0])))
    return q_mul(q_exp(np.radians(np.stack([zero, zero, yaw], axis=-1))), q)


def pose_body(wearer: Wearer, plan: Plan, rng: np.random.Generator) -> Body:
    """Posture of each recording, with the wearer's way to sit and lie."""
    n, lasting = len(plan), rng_for(wearer.seed, wearer.name, "posture")
    own = lasting.normal(0, 5.0, (len(ORIENTATIONS), 5))[plan.orientation]
    pitch, roll, nod = by_posture(POSTURES, plan).T
    pitch, roll, yaw, nod, tilt = np.stack([pitch, roll, 0 * roll, nod, 0 * roll]) + (
        own.T + rng.normal(0, 2.0, (5, n))
    )
    k = wearer.height / 1.70
    q_trunk = turned(pitch, roll, yaw)
    trunk, head = q_matrix(q_trunk), q_matrix(q_mul(q_trunk, turned(nod, tilt, 0 * nod)))
    chest = trunk[..., 2] * 0.50 * k
    neck = chest + k * (0.065 * trunk[..., 2] + 0.01 * head[..., 1])
    skull = chest + k * (0.10 * trunk[..., 2] + 0.125 * head[..., 2] + 0.03 * head[..., 1])
    shoulder = chest + k * (0.175 * trunk[..., 0] - 0.03 * trunk[..., 2])
    return Body(k, trunk, head, chest, skull, neck, shoulder)


def touched(body: Body, gesture: I64, shift: F64) -> tuple[F64, F64, F64]:
    """Place that the fingers touch, the normal there, and the part's axes. → (N, 3), (N, 3), axes

    `shift` (N, 3) moves the place: degrees on head and neck, as many mm elsewhere.
    """
    part = np.array([PARTS.index(p.part) for p in PLACES])[gesture]
    table = np.array([(*p.spot, 0.0)[:3] for p in PLACES])[gesture]  # (N, 3)
    azimuth, elevation = np.radians(table[:, :2] + shift[:, :2]).T
    way = np.stack([np.sin(azimuth), np.cos(azimuth), np.tan(elevation)], axis=1)
    upright = np.broadcast_to(np.eye(3), body.trunk.shape)
    every = np.arange(len(part))
    axes = np.stack([body.head, body.trunk, body.trunk, upright, upright])[part, every]
    radii = body.scale * np.where(part_is(gesture, "head")[:, None], HEAD_RADII, NECK_RADII)
    on_surface = way / np.linalg.norm(way / radii, axis=1, keepdims=True)
    free = (part >= 2)[:, None]
    local = np.where(free, body.scale * (table + 0.001 * shift), on_surface)
    normal = np.where(free, column(PLACES, "normal", gesture), unit(on_surface / radii**2))
    hips = 0 * body.chest
    origin = np.stack([body.skull, body.neck, body.chest, hips, hips])
    return origin[part, every] + turn_by(axes, local), turn_by(axes, normal), axes


def bend_arm(wearer: Wearer, body: Body, wrist: F64, swivel: F64) -> F64:
    """Elbow of a two-bone arm. (N, 3) wrist, (N) rad → (N, 3)

    A wrist out of reach pulls the shoulder along, as shoulders do.
    """
    upper, lower = wearer.arm - wearer.forearm, wearer.forearm
    line = wrist - body.shoulder
    gap = np.linalg.norm(line, axis=1, keepdims=True)
    along = unit(line)
    gap = np.clip(gap, abs(upper - lower) + 0.04, 0.985 * (upper + lower))
    back = (gap**2 + lower**2 - upper**2) / (2 * gap)  # from the wrist along the line
    radius = np.sqrt(np.maximum(lower**2 - back**2, 1e-6))
    hanging = -body.trunk[..., 2]
    hanging = unit(hanging - (hanging * along).sum(axis=1, keepdims=True) * along)
    outwards = np.cross(hanging, along)
    swung = np.cos(swivel)[:, None] * hanging + np.sin(swivel)[:, None] * outwards
    return wrist - back * along + radius * swung


def pose_target(wearer: Wearer, plan: Plan, body: Body, rng: np.random.Generator) -> Pose:
    """Hand at the gesture's place."""
    g = plan.gesture
    place, normal, axes = touched(body, g, habit(wearer, "place", plan, rng, 3))
    approach = column(PLACES, "wrist", g) + habit(wearer, "approach", plan, rng, 3)
    hand = 0.128 * body.scale
    wrist = place + hand * unit(0.20 * normal + turn_by(axes, approach))
    supine = column(PLACES, "supine", g) + habit(wearer, "supine", plan, rng, 1)[:, 0]
    supine = np.radians(supine + by_posture(SUPINE, plan))
    swivel = column(PLACES, "swivel", g) + habit(wearer, "swivel", plan, rng, 1)[:, 0]
    strap = np.radians(habit(wearer, "strap", plan, rng, 3))
    elbow = bend_arm(wearer, body, wrist, np.radians(swivel + by_posture(SWIVEL, plan)))
    y, x = unit(wrist - elbow), body.shoulder - elbow
    x = unit(x - (x * y).sum(axis=1, keepdims=True) * y)
    plain = q_from_axes(x, y, np.cross(x, y))  # the thumb in the plane of the arm
    turn = np.outer(supine, (0.0, 1.0, 0.0))
    return Pose(wrist, q_mul(plain, q_mul(q_exp(turn), q_exp(strap))), supine)


REST = (  # by orientation
    ((0.08, 0.32, -0.35), (0.08, 0.34, -0.27), (0.17, 0.09, -0.40), (0.02, 0.25, -0.20)),  # wrist,
    # m from the chest in the trunk's axes; then the vertical in the device's axes; then where the
    # forearm points, degrees to the left of forward
    ((0.54, -0.22, 0.81), (0.52, -0.22, 0.83), (0.62, -0.05, 0.78), (0.78, -0.40, 0.45)),
    (35, 35, -50, 75),
)


def pose_rest(wearer: Wearer, plan: Plan, body: Body, rng: np.random.Generator) -> Pose:
    """Forearm in the lap or beside the body, palm up; now and then somewhere else."""
    n, lasting = len(plan), rng_for(wearer.seed, wearer.name, "rest")
    own = lasting.normal(0, (0.05, 0.05, 0.05, 14, 18, 25), (len(ORIENTATIONS), 6))
    change = own[plan.orientation] + rng.normal(0, (0.03, 0.03, 0.03, 9, 12, 12), (n, 6))
    change[:, 3:5] += (rng.random(n) < 0.12)[:, None] * rng.normal(0, 45, (n, 2))
    local, up, heading = (by_posture(table, plan) for table in REST)
    wrist = body.chest + body.scale * turn_by(body.trunk, local + change[:, :3])
    up, ahead, zero = unit(up), np.array([0.0, 1.0, 0.0]), np.zeros(n)
    flat = unit(ahead - up[:, 1:2] * up)  # the forearm's part across the vertical, device axes
    plain = q_conj(q_from_axes(np.cross(flat, up), flat, up))  # device → room, forearm ahead
    yaw = np.radians(np.stack([zero, zero, heading + change[:, 5]], axis=1))
    tilt = np.radians(np.stack([change[:, 3], change[:, 4], zero], axis=1))
    strap = np.radians(habit(wearer, "strap", plan, rng, 3))
    return Pose(wrist, q_mul(q_mul(q_exp(yaw), plain), q_exp(tilt + strap)), zero)


# %% [markdown]
# ## 7 Motion
#
# A minimum-jerk reach carries the device from one pose to the other; rhythm and jitter are
# added where the gesture is performed. Accelerations are analytic: second differences at 10 Hz
# would lose most of a scratch at 4.5 Hz.


# %%
@dataclass(frozen=True, slots=True)
class Track:
    """Device in the room, row by row."""

    position: F64  # (R, 3)
    rot: F64  # (R, 4) device → room
    felt: F64  # (R, 3) m/s² with gravity, device axes, by the accelerometer's clock
    reached: F64  # (R) 0 at rest, 1 at the target
    recording: I64  # (R) index into the plan
    start: I64  # (N + 1)


@dataclass(frozen=True, slots=True)
class Moment:
    """When something is looked at: t[r] rows after the beginning of recording of[r]."""

    of: I64  # (R)
    t: F64  # (R) may fall between rows
    on: F64  # (R) 0…1, how much of the gesture is going on
    start: I64  # (N + 1)

    def read(self, series: F64) -> F64:
        """A series of the rows, between its rows on straight lines. (R, …) → (R, …)"""
        low = np.minimum(self.t.astype(np.int64), np.diff(self.start)[self.of] - 2)
        share = (self.t - low).reshape(-1, *[1] * (series.ndim - 1))
        low = self.start[self.of] + low
        return np.asarray((1 - share) * series[low] + share * series[low + 1])


Shift = tuple[F64, F64, F64]  # linear (R, 3) m/s² in device axes, turn (R, 3) rad, shift (R, 3) m
Movement = Callable[[Moment], Shift]


def minimum_jerk(rows: F64, duration: F64) -> tuple[F64, F64]:
    """0 → 1 within `duration`, with its second derivative per row. (R) → 2 × (R)

    Flash and Hogan 1985: 10 τ³ − 15 τ⁴ + 6 τ⁵.
    """
    tau = np.clip(rows / duration, 0, 1)
    value = tau**3 * (10 + tau * (6 * tau - 15))
    return value, 60 * tau * (1 - tau) * (1 - 2 * tau) / duration**2


def fading(keep: float, taps: int = 16) -> F64:
    """Weights of the present and of the rows before it; they sum to 1. → (taps)"""
    weight = keep ** np.arange(taps)
    return np.asarray(weight / weight.sum())


def lagged(x: F64, start: I64, recording: I64, keep: float, taps: int = 16) -> F64:
    """First-order lag within each recording, as if its first row had always been. (R, …) → same

    y[t] = keep · y[t−1] + (1 − keep) · x[t], cut off after `taps` rows.
    """
    weight = fading(keep, taps)
    rows, first = np.arange(len(x)), start[recording]
    return np.asarray(sum(w * x[np.maximum(rows - k, first)] for k, w in enumerate(weight)))


def wander(rng: np.random.Generator, start: I64, recording: I64, keep: float, width: int) -> F64:
    """Noise of unit variance that remembers; more in the first rows. → (R, width)"""
    noise = rng.standard_normal((len(recording), width)) / np.linalg.norm(fading(keep))
    return lagged(noise, start, recording, keep)


def draw_reach(plan: Plan, rng: np.random.Generator) -> F64:
    """When the hand is halfway: relaxing, arriving, departing; and how long it takes. → (4, N) rows

    Relaxes: from the target to rest and back. Most hands leave just before the last row.
    """
    n, moving = len(plan), plan.rows[:, 0].astype(np.float64)
    lasts = rng.uniform(3.4, 6.8, n) * np.where(moving < 12, 0.8, 1.0)
    relax = np.where(plan.relaxes == 1, rng.uniform(-0.5, 3.6, n), -1e3)
    arrive = moving - 0.5 * lasts - rng.uniform(-0.5, 2, n)
    arrive = np.where(plan.relaxes == 1, np.maximum(arrive, relax + lasts), arrive)
    early = np.where(rng.random(n) < 0.85, np.clip(rng.normal(2.2, 1.3, n), 0, 6), 0.0)
    return np.stack([relax, arrive, plan.rows.sum(axis=1) - early + 0.5 * lasts, lasts])


def reach(plan: Plan, now: Moment, times: F64, longer: float) -> tuple[F64, F64]:
    """Share of the way from rest to target, with its second derivative per row. → 2 × (R)

    A `longer` way to the target ends, and one from there begins, as the plain one does.
    """
    relax_at, arrive_at, depart_at, lasts = times[:, now.of]
    begins = relax_at - 0.5 * lasts, arrive_at + (0.5 - longer) * lasts, depart_at - 0.5 * lasts
    relax, arrive, depart = (minimum_jerk(now.t - begin, longer * lasts) for begin in begins)
    stays = (plan.relaxes == 1)[now.of].astype(np.float64)
    # sum of moves: (1 − relax) where it starts at the target, + arrive, − depart
    value = stays * (1 - relax[0]) + arrive[0] - depart[0]
    return value, arrive[1] - stays * relax[1] - depart[1]


LEVER = 0.07  # m, from the wrist to what it turns about; a forearm's length if the elbow kept still


def rhythm(
    wearer: Wearer, plan: Plan, arm: F64, rows: Moment, rng: np.random.Generator
) -> Movement:
    """Movement with a beat. The amplitude breathes, the phase wanders: no hand is a metronome.

    A turn about an axis across the forearm carries the wrist along: fingers and elbow give way.
    """
    g = plan.gesture
    rate = column(MOTIONS, "rate", g) * np.exp(habit(wearer, "rate", plan, rng, 1)[:, 0])
    strength = np.exp(habit(wearer, "strength", plan, rng, 1))
    bias = habit(wearer, "axis", plan, rng, 6)
    push, turn = column(MOTIONS, "push", g), np.radians(column(MOTIONS, "turn", g))
    push = strength * (push + bias[:, :3] * np.linalg.norm(push, axis=1, keepdims=True))
    turn = strength * (turn + bias[:, 3:] * np.linalg.norm(turn, axis=1, keepdims=True))
    omega = 2 * np.pi * rate[:, None] / SAMPLE_PERIOD
    lever = LEVER * np.cross(turn, (0.0, 1.0, 0.0))  # m, amplitude of the wrist
    push, carry = turn_by(arm, push - lever * omega**2), turn_by(arm, lever + push / omega**2)
    turn = turn_by(arm, turn)
    straying = np.cumsum(rng.normal(0, 0.35, len(rows.t)))
    breath = np.clip(1 + 0.35 * wander(rng, rows.start, rows.of, 0.8, 1)[:, 0], 0.1, None)

    def at(now: Moment) -> Shift:
        of = now.of
        phase = 2 * np.pi * rate[of] * now.t + now.read(straying)
        wave = (now.on * now.read(breath) * np.cos(phase))[:, None]
        return wave * push[of], wave * turn[of], wave * carry[of]

    return at


QUIET = 0.10  # of the restlessness, while the gesture waits
SHAKE = np.array([1.3, 0.7, 1.0])  # of the arm's axes, in the acceleration
TREMBLE = np.radians((1.0, 3.4, 1.8))  # for each m/s²: a forearm turns about itself most easily
DRIFT = np.radians((4.0, 6.0, 5.0))  # of the pose, about the arm's axes


def restless(
    wearer: Wearer, plan: Plan, arm: F64, rows: Moment, rng: np.random.Generator
) -> Movement:
    """Movement without a rhythm: work of the fingers, sliding poses, and fidgets of who waits."""
    g, start, of = plan.gesture, rows.start, rows.of
    amount = column(MOTIONS, "jitter", g) * np.exp(habit(wearer, "jitter", plan, rng, 1)[:, 0])
    quiet = QUIET * np.exp(rng.normal(0, 0.6, len(plan)))[of]
    level = (amount[of] * (quiet + (1 - quiet) * rows.on))[:, None]
    quick = turn_by(arm[of], SHAKE * rng.standard_normal((len(of), 3)))  # never between two rows
    tremble = wander(rng, start, of, 0.1, 3)
    drift = lagged(wander(rng, start, of, 0.9, 3), start, of, 0.8)  # smooth: poses slide
    drift *= rng.lognormal(0, 0.5, (len(plan), 1))[of] * (0.06 + 0.94 * rows.on[:, None])
    noise = lagged(wander(rng, start, of, 0.9, 3), start, of, 0.6)
    waits = (rows.t > 15) & (rows.t < plan.rows[of, 0] - 8) & (plan.relaxes[of] == 0)
    fidget = np.radians(60) * np.sign(noise) * np.maximum(np.abs(noise) - 1.4, 0) * waits[:, None]
    turn = turn_by(arm[of], DRIFT * drift + TREMBLE * level * tremble + fidget)
    shift = 0.01 * drift + 0.006 * level * tremble

    def at(now: Moment) -> Shift:
        return now.read(level) * quick, now.read(turn), now.read(shift)

    return at


def moment(plan: Plan, of: I64, t: F64, zeal: F64) -> Moment:
    """`zeal` (N) is 1 where the gesture is done as it should."""
    begins = plan.rows[:, :2].sum(axis=1)
    on = zeal[of] * minimum_jerk(t - begins[of] + 1, np.full(len(t), 3.0))[0]
    return Moment(of, t, on, plan.start)


def accelerometer_clock(wearer: Wearer, plan: Plan, rows: Moment, rng: np.random.Generator) -> F64:
    """What the accelerometer shows in each row was felt that long after the beginning. → (R) rows

    It falls behind the rotation by a row in twenty, and catches up where a behaviour begins.
    """
    ends = np.cumsum(plan.rows, axis=1)[rows.of]
    begins = np.where(rows.t >= ends[:, 1], ends[:, 1], (rows.t >= ends[:, 0]) * ends[:, 0])
    late = 0.35 + habit(wearer, "lag", plan, rng, 1)[:, 0]
    drift = np.maximum(0.05 + habit(wearer, "drift", plan, rng, 1)[:, 0], 0)
    return np.maximum(rows.t - late[rows.of] - drift[rows.of] * (rows.t - begins), 0)


def track(wearer: Wearer, plan: Plan, rest: Pose, target: Pose, rng: np.random.Generator) -> Track:
    """From poses to rows: interpolate, add the movements, and feel it by another clock."""
    start = plan.start
    of = np.repeat(np.arange(len(plan)), np.diff(start))
    zeal = np.where(rng.random(len(plan)) < 0.08, 0.35, 1.0)  # some gestures are hardly done
    rows = moment(plan, of, (np.arange(start[-1]) - start[of]).astype(np.float64), zeal)
    times = draw_reach(plan, rng)
    arm = q_matrix(q_exp(np.outer(-target.supine, (0.0, 1.0, 0.0))))  # arm → device axes
    movements = [make(wearer, plan, arm, rows, rng) for make in (rhythm, restless)]
    way = target.wrist - rest.wrist
    between = q_log(q_mul(q_conj(rest.rot), target.rot))
    detour = np.radians(rng.normal(0, 14, way.shape))

    def at(now: Moment) -> tuple[F64, F64, F64]:
        """Position, rotation, and acceleration with gravity in device axes."""
        turned_by = reach(plan, now, times, 1.0)[0][:, None]
        # the wrist turns quickly on a path that takes longer: real reaches accelerate little
        share, bend = (v[:, None] for v in reach(plan, now, times, 2.0))
        parts = [movement(now) for movement in movements]
        linear, turn, shift = (sum(p) for p in zip(*parts, strict=True))
        turned = turned_by * between[of] + 4 * turned_by * (1 - turned_by) * detour[of]
        rot = q_mul(q_mul(rest.rot[of], q_exp(turned)), q_exp(turn))
        axes = q_matrix(rot)
        felt = bend * way[of] / SAMPLE_PERIOD**2 + np.array([0.0, 0.0, GRAVITY])
        position = rest.wrist[of] + share * way[of] + turn_by(axes, shift)
        return position, rot, linear + turn_by(axes.swapaxes(-1, -2), felt)

    position, rot, _ = at(rows)
    felt = at(moment(plan, of, accelerometer_clock(wearer, plan, rows, rng), zeal))[2]
    return Track(position, rot, felt, reach(plan, rows, times, 1.0)[0], of, start)


# %% [markdown]
# ## 8 Time of flight
#
# Five cameras of 8 × 8 rays look at a body made of ellipsoids. An ellipsoid is a unit sphere seen
# through a matrix, so the quadratic of 320 rays is one small matrix product a row.


# %%
TILT = np.radians(21.0)  # of the four outer sensors, away from the middle one
FIELD = np.radians(45.0)
SEEN_FROM = 0.018  # m, from the middle of the unit to an outer sensor
NEAREST = 0.004  # m
GLOW = np.float32(0.14)  # m; a thermopile hardly feels what is much farther away


def sensor_rays() -> tuple[F32, F32]:
    """Where sensors sit and their pixels look, device axes. → (S, 3) m, (S, P, 3) unit vectors

    1 is in the middle, 2 towards the hand, 4 opposite; 3 towards the thumb, 5 away from it.
    Columns of 1, 2 and 4 run along x and rows along y; 3 and 5 are mounted turned by 90°:
    columns run along y, rows against x. So mirroring x flips 1, 2, 4 left–right, 3 and 5 up–down.
    """
    away = np.array([(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, -1, 0), (-1, 0, 0)], dtype=np.float64)
    x, y, z = np.eye(3)
    columns, rows = np.array([x, x, y, x, y]), np.array([y, y, -x, y, -x])
    ahead = np.cos(TILT) * z + np.sin(TILT) * away
    ahead[0] = z
    spots = (np.arange(8) - 3.5) / 4 * np.tan(FIELD / 2)
    columns = columns - (columns * ahead).sum(axis=1, keepdims=True) * ahead
    rows = rows - (rows * ahead).sum(axis=1, keepdims=True) * ahead
    rays = ahead[:, None, None] + spots[:, None, None] * unit(rows)[:, None, None]
    rays = rays + spots[:, None] * unit(columns)[:, None, None]  # (S, 8, 8, 3)
    places = (SEEN_FROM * away).astype(np.float32)
    return places, unit(rays.reshape(5, 64, 3)).astype(np.float32)


RELAXED = 10.0  # degrees, curl of the fingers at rest


def arm_shapes(
    wearer: Wearer, plan: Plan, body: Body, now: Track, rng: np.random.Generator
) -> list[Ellipsoid]:
    """What moves with the device: the own hand, bent towards the palm, and the upper arm."""
    of, k = now.recording, body.scale
    axes = q_matrix(now.rot)
    curl = column(PLACES, "curl", plan.gesture)[of] * now.reached + RELAXED * (1 - now.reached)
    curl = curl + habit(wearer, "curl", plan, rng, 1)[of, 0]
    bent = np.radians(curl[:, None] + 7.0 * wander(rng, now.start, of, 0.6, 1))
    fingers = np.cos(bent) * axes[..., 1] + np.sin(bent) * axes[..., 2]
    hand = now.position + k * (0.03 * axes[..., 1] - 0.015 * axes[..., 2] + 0.10 * fingers)
    thumb = np.stack([fingers, axes[..., 0], np.cross(fingers, axes[..., 0])], axis=-1)
    elbow = now.position - wearer.forearm * axes[..., 1]
    upper = body.shoulder[of] - elbow
    return [
        ellipsoid(hand, thumb, k * np.array([0.075, 0.042, 0.020]), SKIN),
        ellipsoid(elbow + 0.5 * upper, along(upper), (0.05, 0.05, 0.17), CLOTHED),
    ]


def distances(shape: Ellipsoid, eyes: F64, axes: F64, rays: F32, squares: F32) -> F32:
    """Ray lengths to one ellipsoid, infinite where it is missed. → (S, B, P) m for B rows

    With o, d the ray in the sphere's space: |o + t d| = 1 gives t = c / (−b + √(b² − a c)).
    """
    through = shape.squash @ axes  # (B, 3, 3)
    gram = through.swapaxes(-1, -2) @ through
    a = gram.reshape(-1, 9).astype(np.float32) @ squares  # (S, B, P)
    origin = np.einsum("bij,bsj->bsi", shape.squash, eyes - shape.centre[:, None])
    b = (origin @ through).astype(np.float32).swapaxes(0, 1) @ rays.swapaxes(-1, -2)  # (S, B, P)
    c = ((origin**2).sum(axis=-1).T - 1).astype(np.float32)[..., None]  # (S, B, 1)
    root = b * b - a * c
    hit = (root > 0) & (b < 0)
    np.sqrt(np.maximum(root, 0, out=root), out=root)
    root -= b
    length = np.maximum(c, 0) / np.maximum(root, np.float32(1e-9))
    return np.where(hit, np.maximum(length, np.float32(NEAREST)), np.float32(np.inf))


def see(shapes: list[Ellipsoid], now: Track, slip: F64, rng: np.random.Generator) -> tuple[U8, F32]:
    """Images, and how warm a view each sensor has. → (R, S, P) bytes, (R, S, 3)

    `slip` (R, 3) m moves the unit from where it should sit on the wrist, device axes.
    """
    places, rays = sensor_rays()
    squares = (rays[..., :, None] * rays[..., None, :]).reshape(5, 64, 9).swapaxes(-1, -2)
    images = np.empty((len(now.rot), 5, 64), dtype=np.uint8)
    warmth = np.empty((len(now.rot), 5, len(KINDS)), dtype=np.float32)
    axes = q_matrix(now.rot)
    eyes = (now.position + turn_by(axes, slip))[:, None] + places @ axes.swapaxes(-1, -2)
    for first in range(0, len(eyes), 512):
        rows = slice(first, first + 512)
        nearest = dict.fromkeys(KINDS, np.array(np.inf, dtype=np.float32))
        for shape in shapes:
            found = distances(picked(shape, rows), eyes[rows], axes[rows], rays, squares)
            nearest[shape.kind] = np.minimum(nearest[shape.kind], found)
        image, warm = expose(np.stack([nearest[kind] for kind in KINDS]), rng)
        images[rows], warmth[rows] = image.swapaxes(0, 1), warm.swapaxes(0, 1)
    return images, warmth


def expose(nearest: F32, rng: np.random.Generator) -> tuple[U8, F32]:
    """Distances to bytes, with noise and lost echoes. (3, S, B, P) m → bytes, (S, B, 3) of KINDS

    Far and grazing surfaces send little light back: a pixel is lost the likelier the farther.
    """
    metres = nearest.min(axis=0)
    glow = np.exp(-metres / GLOW)
    first = nearest.argmin(axis=0)
    warm = np.stack([(glow * (first == kind)).mean(axis=-1) for kind in KINDS], axis=-1)
    noise = rng.standard_normal(metres.shape, dtype=np.float32)
    units = metres / np.float32(TOF_UNIT) * (1 + np.float32(0.04) * noise) + 3 * noise
    lost = rng.random(metres.shape, dtype=np.float32) < np.float32(0.003) + 32 * metres**4
    gone = lost | ~(units < TOF_MAX + 0.5)
    image = np.where(gone, NOTHING, np.clip(np.where(gone, 0, units), 0, TOF_MAX))
    return image.astype(np.uint8), warm


# %% [markdown]
# ## 9 Thermopiles
#
# A thermopile sits beside each ToF camera and averages over its view: bare skin is warm, clothes
# are a little, the room is cool. It follows with a lag.


# %%
def thermopiles(wearer: Wearer, now: Track, warmth: F32, rng: np.random.Generator) -> F64:
    """(R, S, 3) views → (R, S) °C"""
    lasting = rng_for(wearer.seed, wearer.name, "thermopiles")
    room = lasting.normal(24.6, 1.3)
    there = np.array([room, lasting.normal(29.4, 1.2), lasting.normal(34.8, 1.2)])  # of KINDS
    offset, gain = lasting.normal(0, 0.3, 5), lasting.normal(3.0, 0.3, 5)
    day = rng.normal(0, 0.4, (len(now.start) - 1, 1))[now.recording]
    seen = warmth * np.minimum(gain, 1 / np.maximum(warmth.sum(axis=-1), 1e-6))[..., None]
    flat = room + day + (seen * (there - room)).sum(axis=-1)
    slow = lagged(flat, now.start, now.recording, 0.62)
    return offset + slow + rng.normal(0, 0.06, slow.shape)


# %% [markdown]
# ## 10 Device
#
# Everything so far was a right wrist. A left wrist and a device worn upside down are exact maps of
# the finished signals, which is what makes them exactly reversible.


# %%
@dataclass(frozen=True, slots=True)
class Signals:
    """What one subject's device wrote."""

    acc: F64  # (R, 3) m/s²
    rot: F64  # (R, 4) device → world, w ≥ 0; NaN = missing
    thm: F64  # (R, 5) °C; NaN = missing
    tof: U8  # (R, S, P)


def mirrored(x: Signals) -> Signals:
    """As on the other wrist: R → M R M with M = diag(−1, 1, 1).

    Sensors 3 and 5 change places; images flip along the device's x (see sensor_rays).
    """
    swap = [0, 1, 4, 3, 2]
    images = x.tof.reshape(-1, 5, 8, 8)
    flat = images[:, :, :, ::-1].copy()
    flat[:, [2, 4]] = images[:, [4, 2], ::-1, :]
    acc = x.acc * np.array([-1.0, 1.0, 1.0])
    rot = x.rot * np.array([1.0, 1.0, -1.0, -1.0])
    return Signals(acc, rot, x.thm[:, swap], flat.reshape(-1, 5, 64))


def upside_down(x: Signals) -> Signals:
    """As turned by 180° about the device's z: R → R · Rz(180°), 2 ↔ 4, 3 ↔ 5, images by 180°."""
    swap = [0, 3, 4, 1, 2]
    acc = x.acc * np.array([-1.0, -1.0, 1.0])
    w, rx, ry, rz = x.rot.T
    rot = one_sign(np.stack([-rz, ry, -rx, w], axis=1))
    return Signals(acc, rot, x.thm[:, swap], x.tof[:, swap, ::-1])


def one_sign(rot: F64) -> F64:
    """Of q and −q the one with w ≥ 0. (R, 4) → (R, 4)"""
    return np.where(rot[:, :1] < 0, -rot, rot) + 0.0


FACING = (-2.47, -2.5, -0.35, -2.2)  # rad, by orientation: the same chair and couch for all


def face_somewhere(wearer: Wearer, plan: Plan, now: Track, rng: np.random.Generator) -> F64:
    """Room → world: the direction that the wearer faces, drifting a little. → (R, 4)"""
    lasting = rng_for(wearer.seed, wearer.name, "heading")
    own = lasting.normal(0, 0.22) + lasting.normal(0, 0.25, len(ORIENTATIONS))
    own += (lasting.random(4) < 0.1) * lasting.uniform(-np.pi, np.pi, 4)  # some turn round
    yaw = by_posture(FACING + own, plan) + rng.normal(0, 0.10, len(plan))
    yaw = yaw[now.recording] + 0.03 * wander(rng, now.start, now.recording, 0.93, 1)[:, 0]
    return q_exp(np.stack([0 * yaw, 0 * yaw, yaw], axis=1))


def measure(wearer: Wearer, plan: Plan, now: Track, rng: np.random.Generator) -> tuple[F64, F64]:
    """Accelerometer and orientation, as quantised by the device. → (R, 3) m/s², (R, 4)"""
    lasting = rng_for(wearer.seed, wearer.name, "accelerometer")
    bias, scale = lasting.normal(0, 0.06, 3), 1 + lasting.normal(0, 0.004, 3)
    acc = scale * now.felt + bias + rng.normal(0, 0.035, now.felt.shape)
    rot = q_mul(face_somewhere(wearer, plan, now, rng), now.rot)
    rot = q_mul(rot, q_exp(np.radians(0.2) * wander(rng, now.start, now.recording, 0.9, 3)))
    rot = np.rint(one_sign(unit(rot)) * 16384) / 16384
    return np.rint(acc * 256) / 256, one_sign(rot)


def record(wearer: Wearer, plan: Plan) -> Signals:
    """All recordings of one subject, nothing missing yet."""
    rng = rng_for(wearer.seed, wearer.name, "record")
    body = pose_body(wearer, plan, rng)
    rest = pose_rest(wearer, plan, body, rng)
    target = pose_target(wearer, plan, body, rng)
    now = track(wearer, plan, rest, target, rng)
    still = [picked(shape, now.recording) for shape in body_shapes(wearer, body, plan)]
    shapes = still + arm_shapes(wearer, plan, body, now, rng)
    slip = habit(wearer, "slip", plan, rng, 3)[now.recording]
    tof, warmth = see(shapes, now, slip, rng)
    thm = thermopiles(wearer, now, warmth, rng)
    acc, rot = measure(wearer, plan, now, rng)
    signals = Signals(acc, rot, thm.astype(np.float32).astype(np.float64), tof)
    signals = mirrored(signals) if wearer.left_handed else signals
    return upside_down(signals) if wearer.upside_down else signals


def lose(x: Signals, wearer: Wearer, plan: Plan, imu_only: npt.NDArray[np.bool_]) -> Signals:
    """Without what the device failed to write: always whole recordings, mostly a wearer's habit.

    imu_only (N): the competition's half of the test set, without ToF and thermopiles.
    """
    rng = rng_for(wearer.seed, wearer.name, "gaps")
    of = np.repeat(np.arange(len(plan)), plan.rows.sum(axis=1))
    most = rng.random(len(plan)) < 0.94
    no_tof = imu_only | (most & ("tof" in wearer.lacks))
    lost_thm = rng.random((len(plan), 5)) < (0.0013, 0.0025, 0.0004, 0.0, 0.0)
    lost_thm[:, 4] |= most & ("thm_5" in wearer.lacks)
    lost_tof = np.repeat(no_tof[:, None], 5, axis=1)
    lost_tof[:, 4] |= most & ("tof_5" in wearer.lacks)
    lost_rot = rng.random((len(plan), 1)) < 0.0064
    return Signals(
        x.acc,
        np.where(lost_rot[of], np.nan, x.rot),
        np.where((lost_thm | no_tof[:, None])[of], np.nan, x.thm),
        np.where(lost_tof[of, :, None], np.uint8(MISSING), x.tof),
    )


# %% [markdown]
# ## 11 Files
#
# Subjects are simulated one by one, each from its own random numbers, then their recordings are
# shuffled into one file, numbered upwards. Files appear under their name when they are complete.

# %%
STARTED = time.monotonic()


def log(what: str, **values: object) -> None:
    """One line an event: seconds since start, what happened, then key=value pairs."""
    pairs = "  ".join(f"{key}={value}" for key, value in values.items())
    print(f"[{time.monotonic() - STARTED:7.1f}s] {what:<12} {pairs}", flush=True)  # noqa: T201


@dataclass(frozen=True, slots=True)
class Session:
    """A subject with everything recorded."""

    wearer: Wearer
    plan: Plan
    signals: Signals


def run_session(wearer: Wearer, count: int, test: bool, cut: bool = False) -> Session:
    """Plan and simulate `count` recordings of one subject.

    `test`: half of them, at random, are IMU only. `cut`: one of them ends before the gesture.
    """
    rng = rng_for(wearer.seed, wearer.name, "plan")
    plan = draw_plan(wearer, count, rng)
    imu_only = test & (rng.permutation(count) < (count + rng.integers(2)) // 2)
    if cut:
        rows = plan.rows.copy()
        rows[rows[:, 0].argmax(), 2] = 0
        plan = replace(plan, rows=rows)
    signals = lose(record(wearer, plan), wearer, plan, imu_only)
    return Session(wearer, plan, signals)


def draw_counts(subjects: int, per_subject: int | None, rng: np.random.Generator) -> list[int]:
    """Recordings of each subject: 102, but for the few who left early."""
    if per_subject is not None:
        return [per_subject] * subjects
    short = rng.permutation(SHORT_SUBJECTS)[: round(subjects * len(SHORT_SUBJECTS) / 81)]
    counts = np.full(subjects, len(PROTOCOL))
    counts[rng.permutation(subjects)[: len(short)]] = short
    return [int(count) for count in counts]


Pick = tuple[Session, int, str]  # one recording of a file: whose, which, sequence_id


def label_table(picks: list[Pick]) -> pl.DataFrame:
    """Everything in a row that is not measured, in the order of the rows."""
    stages = [
        (
            GESTURES[session.plan.gesture[i]].kind,
            name,
            session.wearer.name,
            ORIENTATIONS[session.plan.orientation[i]],
            (MOVES, RELAXES)[session.plan.relaxes[i]] if stage == 0 else BEHAVIORS[1 + stage],
            "Gesture" if stage == 2 else "Transition",
            NAMES[session.plan.gesture[i]],
        )
        for session, i, name in picks
        for stage in range(3)
    ]
    rows = np.stack([session.plan.rows[i] for session, i, _ in picks])
    counter = np.concatenate([np.arange(n) for n in rows.sum(axis=1)])
    names = ["sequence_type", "sequence_id", "subject", *LABELS]
    table = pl.DataFrame(stages, schema=names, orient="row")
    table = table.select(pl.all().gather(np.repeat(np.arange(rows.size), rows.ravel())))
    number = pl.col("sequence_counter").cast(pl.String).str.zfill(6)
    return table.with_columns(pl.Series("sequence_counter", counter)).with_columns(
        pl.concat_str("sequence_id", pl.lit("_"), number).alias("row_id")
    )


def table_of(picks: list[Pick], columns: list[str]) -> pl.DataFrame:
    """Rows of some recordings, with the file's columns in the file's order."""
    parts = [(session.signals, session.plan.start[i : i + 2]) for session, i, _ in picks]
    imu = np.concatenate([np.hstack([x.acc[a:b], x.rot[a:b], x.thm[a:b]]) for x, (a, b) in parts])
    tof = np.concatenate([x.tof[a:b].reshape(b - a, -1) for x, (a, b) in parts]).T
    pixels = np.where(tof == NOTHING, np.float32(-1), tof.astype(np.float32))
    pixels[tof == MISSING] = np.nan
    measured = np.ascontiguousarray(imu.T + 0.0)  # + 0.0: a minus zero becomes a zero
    series = [pl.Series(name, x) for name, x in zip(SENSORS[:12], measured, strict=True)]
    series += [pl.Series(name, x) for name, x in zip(TOF, pixels, strict=True)]
    frame = label_table(picks).with_columns(series)
    return frame.with_columns(pl.col(SENSORS).fill_nan(None)).select(columns)


def write_parts(path: Path, parts: Iterable[pl.DataFrame], columns: list[str]) -> None:
    """Append frames to one CSV; it gets its name once it is complete."""
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        file.write((",".join(columns) + "\n").encode())
        for part in parts:
            part.write_csv(file, include_header=False)
    unfinished.replace(path)


def write_side(
    out: Path, name: str, columns: list[str], picks: list[Pick], wearers: list[Wearer]
) -> None:
    """NAME.csv and NAME_demographics.csv."""
    chunks = (table_of(picks[i : i + 128], columns) for i in range(0, len(picks), 128))
    write_parts(out / f"{name}.csv", chunks, columns)
    write_parts(out / f"{name}_demographics.csv", [demographics(wearers)], DEMOGRAPHICS)


def demographics(wearers: list[Wearer]) -> pl.DataFrame:
    kinds = (pl.String, pl.Int64, pl.Int64, pl.Int64, pl.Int64, pl.Float64, pl.Int64, pl.Float64)
    rows = [
        (
            *(w.name, int(w.adult), w.age, int(w.male), int(not w.left_handed)),
            *(round(100 * w.height, 1), round(100 * w.arm), round(100 * w.forearm, 1)),
        )
        for w in wearers
    ]
    return pl.DataFrame(rows, schema=dict(zip(DEMOGRAPHICS, kinds, strict=True)), orient="row")


def simulate(
    out: Path,
    subjects: int = 81,
    test_subjects: int = 34,
    seed: int = 1,
    recordings_per_subject: int | None = None,
    workers: int = 2,
    log: Callable[..., None] = log,
) -> None:
    """Write the five files into `out`; the same arguments, but for the last two, give the same.

    Other releases of numpy may differ in the last digit of some rows.
    recordings_per_subject: a random part of the protocol's 102; None: all of it, with the few
    subjects who did less.
    """
    check_arguments(subjects, test_subjects, recordings_per_subject)
    out.mkdir(parents=True, exist_ok=True)
    train = draw_wearers("train", subjects, seed)
    test = draw_wearers("test", test_subjects, seed, [w.name for w in train])
    rng = rng_for(seed, "files")
    counts = draw_counts(subjects, recordings_per_subject, rng)
    counts += [recordings_per_subject or len(PROTOCOL)] * test_subjects
    is_test = [False] * subjects + [True] * test_subjects
    cut = np.arange(len(counts)) == (0 if subjects >= 40 else -1)  # one real recording is
    with ThreadPoolExecutor(workers) as pool:
        sessions = list(pool.map(run_session, train + test, counts, is_test, cut.tolist()))
    log("simulated", subjects=len(sessions), recordings=sum(counts))
    pairs = [(s, i) for s, count in enumerate(counts) for i in range(count)]
    numbers = np.sort(rng.choice(np.arange(1, 6 * len(pairs)), len(pairs), replace=False))
    sides: dict[bool, list[Pick]] = {False: [], True: []}
    for j, number in zip(rng.permutation(len(pairs)), numbers, strict=True):
        s, i = pairs[j]
        sides[is_test[s]].append((sessions[s], i, f"SEQ_{number:06d}"))
    write_side(out, "train", TRAIN_COLUMNS, sides[False], train)
    write_side(out, "test", TEST_COLUMNS, sides[True], test)
    answers = [(name, NAMES[session.plan.gesture[i]]) for session, i, name in sides[True]]
    kinds = {"sequence_id": pl.String, "gesture": pl.String}
    truth = pl.DataFrame(answers, schema=kinds, orient="row")
    write_parts(out / "test_truth.csv", [truth], truth.columns)


def check_arguments(subjects: int, test_subjects: int, per_subject: int | None) -> None:
    if not 1 <= subjects <= 10_000 or not 0 <= test_subjects <= 10_000:
        raise ValueError(
            f"subjects={subjects}, test_subjects={test_subjects}: give 1…10000 and 0…10000."
        )
    if per_subject is not None and not 1 <= per_subject <= len(PROTOCOL):
        n = len(PROTOCOL)
        raise ValueError(f"{per_subject} recordings a subject: the protocol has {n}, give 1…{n}.")


# %% [markdown]
# ## 12 Check
#
# The same figures of a folder as published for the real files (cmi_stats.json), side by side. Only
# train.csv is looked at; ToF is read sensor by sensor, which keeps the full size under 2 GB.

# %%
IN_RECORDING = "sequence_id"
MAD, JERK = "mad_of_acc_magnitude_by_gesture", "jerk_mean_norm_diff_acc_by_gesture"


def folder_figures(folder: Path) -> dict[str, float]:
    """Figures of FOLDER/train.csv, by name."""
    path = folder / "train.csv"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: python cmi_simulator.py {folder}")
    names = ["sequence_id", "subject", "behavior", "phase", "gesture"]
    kinds: dict[str, Any] = dict.fromkeys(ACC + ROT + THM, pl.Float64)
    frame = pl.read_csv(path, columns=names + ACC + ROT + THM, schema_overrides=kinds)
    figures = length_figures(frame) | value_figures(frame) | motion_figures(frame)
    return figures | image_figures(path, frame.get_column("phase") == "Gesture")


def length_figures(frame: pl.DataFrame) -> dict[str, float]:
    """Sizes, and lengths of recordings and behaviours in rows."""
    rows = frame.group_by(IN_RECORDING).agg(pl.len(), pl.first("subject"))
    by_subject = rows.group_by("subject").agg(pl.mean("len")).get_column("len").to_numpy()
    figures = {"rows": len(frame), "recordings": len(rows), "subjects": len(by_subject)}
    figures["sd of subjects' mean length"] = by_subject.std()
    pieces = frame.group_by(IN_RECORDING, "behavior").agg(pl.len())
    parts = {b: pieces.filter(pl.col("behavior") == b) for b in BEHAVIORS}
    for what, part in {"recording": rows, **parts}.items():
        x = part.get_column("len").to_numpy()
        figures |= {f"mean rows of {what}": x.mean(), f"sd rows of {what}": x.std()}
        figures[f"median rows of {what}"] = np.median(x)
    return {name: float(value) for name, value in figures.items()}


def value_figures(frame: pl.DataFrame) -> dict[str, float]:
    """Mean, spread and gaps of acc, rot and thm."""
    figures: dict[str, float] = {}
    for name in (*ACC, *ROT, "thm_1", "thm_2"):
        x = frame.get_column(name).drop_nulls().to_numpy()
        figures |= {f"mean {name}": float(x.mean()), f"sd {name}": float(x.std())}
    length = np.linalg.norm(frame.select(ACC).to_numpy(), axis=1)
    figures |= {"mean |acc|": float(length.mean()), "sd |acc|": float(length.std())}
    for name in ("rot_w", *THM):
        figures[f"missing {name}"] = frame.get_column(name).null_count() / len(frame)
    return figures


def motion_figures(frame: pl.DataFrame) -> dict[str, float]:
    """By gesture, means over recordings: how |acc| spreads about its mean, and |acc[t] − acc[t−1]|.

    These readings of the published names agree with the real rows at hand.
    """
    size = pl.sum_horizontal([pl.col(name) ** 2 for name in ACC]).sqrt()
    step = pl.sum_horizontal([pl.col(name).diff().over(IN_RECORDING) ** 2 for name in ACC]).sqrt()
    frame = frame.with_columns(size.alias("size"))
    mad = (pl.col("size") - pl.col("size").mean().over(IN_RECORDING)).abs()
    first = pl.col(ACC[0]).diff().over(IN_RECORDING).is_null()
    jerk = pl.when(first).then(None).otherwise(step)
    each = frame.select(IN_RECORDING, "gesture", mad.alias("mad"), jerk.alias("jerk"))
    each = each.group_by(IN_RECORDING, "gesture").agg(pl.mean("mad", "jerk"))
    figures: dict[str, float] = {}
    for name, mad_of, jerk_of in each.group_by("gesture").agg(pl.mean("mad", "jerk")).iter_rows():
        figures |= {f"mad |acc| {name}": float(mad_of), f"jerk {name}": float(jerk_of)}
    return dict(sorted(figures.items()))


def image_figures(path: Path, gesture: pl.Series) -> dict[str, float]:
    """Shares of "nothing in range", distances, and how much a frame of all sensors sees."""
    figures, seen, total = {}, np.zeros(len(gesture)), np.zeros(len(gesture))
    complete, empty, pixels = np.ones(len(gesture), dtype=bool), 0, 0
    for s in range(5):
        names = TOF[64 * s : 64 * s + 64]
        kinds = dict.fromkeys(names, pl.Float32)
        x = pl.read_csv(path, columns=names, schema_overrides=kinds).to_numpy()
        missing, valid = np.isnan(x[:, 0]), x >= 0
        here, nothing = 64 * int((~missing).sum()), int((x == -1).sum())
        figures[f"missing tof_{s + 1}"] = float(missing.mean())
        figures[f"nothing tof_{s + 1}"] = nothing / max(here, 1)
        figures[f"distance tof_{s + 1}"] = float(x[valid].mean()) if valid.any() else np.nan
        seen, total = seen + valid.sum(axis=1), total + np.where(valid, x, 0).sum(axis=1)
        complete, empty, pixels = complete & ~missing, empty + nothing, pixels + here
    figures |= {"nothing tof": empty / max(pixels, 1), "distance tof": total.sum() / seen.sum()}
    for phase, of in (("Transition", ~gesture.to_numpy()), ("Gesture", gesture.to_numpy())):
        some = of & complete
        near = some & (seen > 0)
        figures[f"valid pixels {phase}"] = float(seen[some].mean())
        figures[f"distance {phase}"] = float((total[near] / seen[near]).mean())
    return figures


def reference_figures(path: Path) -> dict[str, float]:
    """The published figures under the names of folder_figures."""
    known = json.loads(path.read_text())
    figures = {name: known[name] for name in ("rows", "subjects")}
    figures["recordings"] = known["sequences"]
    keys = {"mean rows": "mean", "sd rows": "std", "median rows": "p50"}
    of = {"recording": known["sequence_length"]} | known["behavior_length"]
    figures |= {f"{name} of {what}": of[what][key] for what in of for name, key in keys.items()}
    figures["sd of subjects' mean length"] = known["subject_mean_length"]["std"]
    for name, values in known["describe"].items():
        plain = "|acc|" if name == "acc_magnitude" else name
        figures |= {f"mean {plain}": values["mean"], f"sd {plain}": values["std"]}
    gaps = known["nan_fraction"]
    figures |= {f"missing {'rot_w' if name == 'rot' else name}": gaps[name] for name in gaps}
    figures |= {f"mad |acc| {name}": both[0] for name, both in known[MAD].items()}
    figures |= {f"jerk {name}": both[0] for name, both in known[JERK].items()}
    for s, share in known["tof_minus1_by_sensor_of_nonNaN"].items():
        figures[f"nothing tof_{s}"] = share
        figures[f"distance tof_{s}"] = known["tof_valid_mean_by_sensor"][s]
    figures["nothing tof"] = known["tof_minus1_fraction"]
    figures["distance tof"] = known["tof_valid_mean"]
    for phase, values in known["tof_by_phase"].items():
        figures[f"valid pixels {phase}"] = values["valid_pixels"][0]
        figures[f"distance {phase}"] = values["mean_distance"][0]
    return {name: float(value) for name, value in figures.items()}


def comparison(folder: Path, reference: Path) -> str:
    """A table: figure, simulated, real."""
    if not reference.exists():
        raise FileNotFoundError(f"{reference} does not exist. Give the path of cmi_stats.json.")
    ours, real = folder_figures(folder), reference_figures(reference)
    lines = ["| figure | simulated | real |", "|---|---|---|"]
    lines += [f"| {n} | {ours[n]:.4g} | {real[n]:.4g} |" for n in ours if n in real]
    return "\n".join(lines)


# %% [markdown]
# ## 13 Entry


# %%
def main(arguments: list[str]) -> int:
    """The command line; a wrong argument is one line and exit status 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the files")
    parser.add_argument("--subjects", type=int, default=81, help="in train (81)")
    parser.add_argument("--test-subjects", type=int, default=34, help="in test (34)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--recordings", type=int, help="a subject: a random part of the 102")
    parser.add_argument("--workers", type=int, default=2, help="threads; no effect on the files")
    parser.add_argument(
        "--check", type=Path, metavar="JSON", help="make nothing: compare OUT with these figures"
    )
    given = parser.parse_args(arguments)
    try:
        if given.check:
            sys.stdout.write(comparison(given.out, given.check) + "\n")
        else:
            sizes = given.subjects, given.test_subjects
            simulate(given.out, *sizes, given.seed, given.recordings, given.workers)
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"cmi_simulator: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
