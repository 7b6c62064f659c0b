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
    device  x from the wrist to the elbow, y to the thumb, z out of the inner wrist, where all
            five sensors look; so for a right wrist, others are maps of it (section 10)
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
from collections.abc import Iterable, Sequence
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
GRAVITY = 9.74  # m/s², what the real accelerometers show on average
NOTHING, MISSING = 254, 255  # codes of a ToF pixel
TOF_MAX = 249
TOF_UNIT = 0.00135  # m; the real unit is unpublished, this one gives the real distances

# %% [markdown]
# ## 2 Gestures
#
# Three tables, a line a gesture: when it is done, where the hand is, how it moves there. Gestures
# are hard to tell apart where their lines are alike: a wearer's habits (section 4) are of the size
# of the differences.


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
    twist: float  # of the palm about the forearm, from facing the spot
    curl: float  # of the fingers towards the palm: how much of the own hand the sensors see
    normal: Vec3 = (0.0, 0.0, 0.0)  # where the back of the hand looks; head and neck know theirs


@dataclass(frozen=True, slots=True)
class Motion:
    """How the hand moves, along and about the device's axes."""

    rate: float  # cycles per row of the rhythm; 0.5 is the fastest that 10 Hz can show
    push: Vec3  # m/s², amplitude of the rhythm
    turn: Vec3  # degrees, amplitude of the rhythm
    jitter: float  # m/s², movement without a rhythm
    sweep: Vec3 = (0.0, 0.0, 0.0)  # degrees, once or twice in a gesture
    carry: Vec3 = (0.0, 0.0, 0.0)  # m, displacement that goes with the sweep


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
PLACES = (  # part, spot, wrist, swivel, twist, curl, normal; one line for each of GESTURES
    Place("head", (86, 16), (0.42, 0.24, -0.38), 62, 22, 36),
    Place("head", (48, -22), (0.30, 0.50, -0.50), 36, 0, 38),
    Place("head", (24, 14), (0.60, 0.25, -0.35), 60, 0, 42),
    Place("head", (26, 6), (0.60, 0.28, -0.38), 58, 0, 45),
    Place("head", (18, 50), (0.60, 0.20, -0.15), 72, 0, 32),
    Place("head", (14, 34), (0.65, 0.25, -0.20), 68, 0, 25),
    Place("neck", (66, 5), (0.40, 0.46, -0.28), 52, 16, 37),
    Place("neck", (80, 0), (0.50, 0.50, -0.15), 54, 6, 30),
    Place("head", (0, -35), (0.25, 0.75, -0.60), 40, 55, 60),
    Place("tray", (0.05, 0.40, 0.08), (0.25, -0.65, 0.55), 35, 0, 45, (0, 0, 1)),
    Place("head", (60, 4), (0.35, 0.75, -0.25), 48, -25, 35),
    Place("lap", (0.11, 0.36, 0.075), (0.25, -0.60, 0.25), 35, 30, 45, (0, 0, 1)),
    Place("trunk", (0.10, 0.42, 0.16), (0.40, -0.20, -0.60), 35, 0, 25, (0, 1, 0)),
    Place("lap", (0.11, 0.33, 0.075), (0.25, -0.60, 0.25), 38, 33, 25, (0, 0, 1)),
    Place("trunk", (0.02, 0.36, -0.06), (0.50, -0.30, -0.35), 25, 0, 55, (0, 0.5, -0.8)),
    Place("trunk", (0.30, 0.30, 0.30), (0.15, 0.10, -0.85), 45, 0, 5, (0, -1, 0)),
    Place("trunk", (0.15, 0.48, 0.14), (0.25, -0.80, -0.30), 45, 0, 40, (0, -0.2, 1)),
    Place("lap", (0.10, 0.33, 0.075), (0.25, -0.60, 0.20), 35, 35, 42, (0, 0, 1)),
)
MOTIONS = (  # rate, push, turn, jitter, sweep, carry
    Motion(0.20, (0.5, 0.4, 0.9), (5, 2, 3), 0.65),
    Motion(0.13, (0.1, 0.1, 0.1), (1, 1, 1), 0.65),
    Motion(0.27, (0.3, 0.2, 0.4), (3, 1, 2), 0.58),
    Motion(0.25, (0.2, 0.2, 0.3), (3, 1, 1), 0.45),
    Motion(0.30, (0.5, 0.3, 0.9), (6, 2, 2), 0.55),
    Motion(0.46, (0.4, 0.8, 0.4), (2, 1, 4), 0.35),
    Motion(0.16, (0.3, 0.3, 0.5), (4, 2, 3), 0.72),
    Motion(0.46, (0.7, 0.6, 0.6), (2, 2, 4), 0.50),
    Motion(0.05, (0.0, 0.0, 0.0), (0, 0, 0), 0.90, (30, 12, 30), (0.03, 0.02, 0.06)),
    Motion(0.16, (0.4, 0.4, 0.6), (3, 3, 4), 0.65, (12, 10, 16), (0.04, 0.04, 0.06)),
    Motion(0.10, (0.3, 0.2, 0.3), (4, 3, 3), 0.85, (22, 10, 20), (0.05, 0.02, 0.06)),
    Motion(0.14, (0.2, 0.2, 0.2), (2, 2, 2), 0.95),
    Motion(0.13, (1.6, 1.3, 3.2), (18, 6, 10), 1.2),
    Motion(0.46, (1.0, 0.7, 0.9), (2, 2, 4), 0.60),
    Motion(0.33, (0.1, 0.1, 0.2), (1, 1, 1), 0.62),
    Motion(0.22, (1.8, 4.8, 2.6), (8, 4, 22), 1.2),
    Motion(0.19, (1.5, 2.6, 1.4), (6, 5, 8), 1.3, (8, 8, 14), (0.05, 0.04, 0.02)),
    Motion(0.21, (0.5, 0.6, 0.3), (2, 3, 5), 0.65, (4, 4, 9), (0.03, 0.02, 0.0)),
)
# fmt: on


def column(table: Sequence[Gesture | Place | Motion], name: str, gesture: I64) -> F64:
    """One column of a table for each recording. (N) → (N) or (N, 3)"""
    return np.array([getattr(line, name) for line in table], dtype=np.float64)[gesture]


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
    """Standard deviations of one habit: of the wearer, of the wearer's gesture, of a recording."""

    wearer: float
    gesture: float
    recording: float


HABITS = {
    "place": Habit(4.0, 4.0, 2.0),  # degrees on the head
    "approach": Habit(0.08, 0.07, 0.04),  # of a hand's length
    "swivel": Habit(9.0, 5.0, 3.0),  # degrees
    "twist": Habit(8.0, 5.0, 3.0),  # degrees
    "curl": Habit(8.0, 10.0, 4.0),  # degrees
    "strap": Habit(4.0, 0.0, 1.0),  # degrees, how the band sits
    "slip": Habit(0.010, 0.0, 0.002),  # m, of the device on the wrist
    "strength": Habit(0.42, 0.25, 0.18),  # logarithm of the amplitude
    "jitter": Habit(0.40, 0.22, 0.18),  # the same for what has no rhythm
    "rate": Habit(0.10, 0.10, 0.06),  # logarithm
    "axis": Habit(0.15, 0.25, 0.10),  # of the direction of the rhythm
}


def habit(wearer: Wearer, name: str, gesture: I64, rng: np.random.Generator, width: int) -> F64:
    """One habit in each recording: the wearer's, the gesture's and the day's share. → (N, width)"""
    of = HABITS[name]
    lasting = rng_for(wearer.seed, wearer.name, "habit", name)
    own = of.wearer * lasting.standard_normal(width)
    by_gesture = of.gesture * lasting.standard_normal((len(GESTURES), width))
    return own + by_gesture[gesture] + of.recording * rng.standard_normal((len(gesture), width))


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
POSTURES = {STRAIGHT: (-4, 0, -4), LEAN: (-42, -14, -28), BACK: (86, 0, -8), SIDE: (4, -86, -4)}
SWIVEL = {STRAIGHT: 25.0, LEAN: 75.0, BACK: 90.0, SIDE: 0.0}  # degrees more, by posture
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


@dataclass(frozen=True, slots=True)
class Ellipsoid:
    """`squash` turns it into the unit sphere at the origin."""

    centre: F64  # (N or R, 3) room; R once rows are seen
    squash: F64  # (N or R, 3, 3)
    skin: bool  # warm; else clothed


def ellipsoid(centre: F64, axes: F64, radii: F64 | Vec3, skin: bool) -> Ellipsoid:
    return Ellipsoid(centre, axes.swapaxes(-1, -2) / np.asarray(radii)[..., None], skin)


def picked(shape: Ellipsoid, which: I64 | slice) -> Ellipsoid:
    """The ellipsoid of other rows."""
    return replace(shape, centre=shape.centre[which], squash=shape.squash[which])


def along(direction: F64) -> F64:
    """Axes whose third points along `direction`. (…, 3) → (…, 3, 3)"""
    z = unit(direction)
    x = unit(np.cross(z, np.array([0.31, 0.27, -0.91])))
    return np.stack([x, np.cross(z, x), z], axis=-1)


def clothed_shapes(body: Body, plan: Plan) -> list[Ellipsoid]:
    """Torso, shoulders and thighs."""
    k, lying = body.scale, np.isin(plan.orientation, [2, 3])[:, None]
    right, up = body.trunk[..., 0], body.trunk[..., 2]
    ahead = np.where(lying, -up, np.array([0.0, 0.97, -0.1]))
    torso = body.chest - 0.24 * k * up
    shapes = [ellipsoid(torso, body.trunk, k * np.array([0.175, 0.125, 0.31]), skin=False)]
    for side in (0.15, -0.15):
        joint = body.chest + k * (side * right - 0.03 * up)
        shapes.append(ellipsoid(joint, body.trunk, k * np.array([0.09, 0.075, 0.07]), skin=False))
    for side in (0.095, -0.095):
        thigh = k * (side * right + 0.22 * ahead)
        shapes.append(ellipsoid(thigh, along(ahead), k * np.array([0.09, 0.09, 0.30]), skin=False))
    return shapes


def body_shapes(wearer: Wearer, body: Body, plan: Plan) -> list[Ellipsoid]:
    """What keeps still within a recording: body, seat or bed, pillow, tray."""
    k, lying = body.scale, np.isin(plan.orientation, [2, 3])[:, None]
    top = k * np.where(lying, -0.14, np.where(part_is(plan.gesture, "tray")[:, None], 0.02, -0.16))
    middle = 0.5 * body.chest[:, :2] + np.where(lying, 0.0, [0.0, 0.2])
    flat = np.broadcast_to(np.eye(3), body.trunk.shape)
    long = rng_for(wearer.seed, wearer.name, "hair").uniform(0, 1)
    hair = body.skull - k * (0.03 * body.head[..., 1] + (0.01 + 0.07 * long) * body.head[..., 2])
    locks = k * np.array([0.095 + 0.02 * long, 0.095, 0.13 + 0.07 * long])
    pillow = body.skull - np.where(lying, [0.0, 0.0, 0.13], [0.0, 0.0, 9.0]) * k
    return [
        ellipsoid(body.skull, body.head, k * HEAD_RADII, skin=True),
        ellipsoid(body.neck, body.trunk, k * NECK_RADII, skin=True),
        ellipsoid(hair, body.head, locks, skin=False),
        *clothed_shapes(body, plan),
        ellipsoid(np.concatenate([middle, top - 0.05], axis=1), flat, (0.6, 0.6, 0.05), skin=False),
        ellipsoid(pillow, flat, (0.30, 0.24, 0.07), skin=False),
    ]


@dataclass(frozen=True, slots=True)
class Pose:
    """Device in the room."""

    wrist: F64  # (N, 3)
    rot: F64  # (N, 4) device → room


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
    pitch, roll, nod = np.array([POSTURES[o] for o in ORIENTATIONS])[plan.orientation].T
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


def hold_device(wrist: F64, elbow: F64, facing: F64, twist: F64, strap: F64) -> Pose:
    """Device on the inner wrist, palm towards `facing`. (N, 3) …, (N) rad, (N, 3) rad → Pose"""
    x = unit(elbow - wrist)
    z = unit(facing - (facing * x).sum(axis=1, keepdims=True) * x)
    plain = q_from_axes(x, np.cross(z, x), z)
    turn = np.stack([twist, 0 * twist, 0 * twist], axis=1)
    return Pose(wrist, q_mul(plain, q_mul(q_exp(turn), q_exp(strap))))


def pose_target(wearer: Wearer, plan: Plan, body: Body, rng: np.random.Generator) -> Pose:
    """Hand at the gesture's place."""
    g = plan.gesture
    place, normal, axes = touched(body, g, habit(wearer, "place", g, rng, 3))
    approach = column(PLACES, "wrist", g) + habit(wearer, "approach", g, rng, 3)
    hand = 0.128 * body.scale
    wrist = place + hand * unit(0.20 * normal + turn_by(axes, approach))
    twist = column(PLACES, "twist", g) + habit(wearer, "twist", g, rng, 1)[:, 0]
    twist = twist + 14.0 * part_is(g, "head", "neck")  # palms look lower than the place they touch
    swivel = column(PLACES, "swivel", g) + habit(wearer, "swivel", g, rng, 1)[:, 0]
    swivel = swivel + np.array([SWIVEL[o] for o in ORIENTATIONS])[plan.orientation]
    strap = np.radians(habit(wearer, "strap", g, rng, 3))
    elbow = bend_arm(wearer, body, wrist, np.radians(swivel))
    inwards = unit(place - 0.07 * normal - wrist)
    facing = np.where(part_is(g, "head", "neck")[:, None], inwards, -normal)
    return hold_device(wrist, elbow, facing, np.radians(twist), strap)


# wrist at rest in the trunk's axes (m from the chest, at 1.70 m) and where the palm looks there
REST = {
    STRAIGHT: (0.10, 0.20, -0.37),
    LEAN: (0.08, 0.23, -0.29),
    BACK: (0.17, 0.09, -0.40),
    SIDE: (0.02, 0.17, -0.20),
}


def pushed_out(point: F64, shapes: list[Ellipsoid], margin: float) -> F64:
    """Move points out of ellipsoids, away from their centres, to `margin` radii. (N, 3) → (N, 3)"""
    for shape in shapes:
        away = point - shape.centre
        radii = np.linalg.norm(turn_by(shape.squash, away), axis=1, keepdims=True)
        point = shape.centre + away * np.maximum(margin / np.maximum(radii, 1e-3), 1)
    return point


def pose_rest(wearer: Wearer, plan: Plan, body: Body, rng: np.random.Generator) -> Pose:
    """Forearm in the lap or beside the body, palm up."""
    n, lasting = len(plan), rng_for(wearer.seed, wearer.name, "rest")
    own = lasting.normal(0, (0.06, 0.05, 0.06, 0.25, 0.45), (len(ORIENTATIONS), 5))
    change = own[plan.orientation] + rng.normal(0, (0.03, 0.03, 0.03, 0.12, 0.15), (n, 5))
    local = np.array([REST[o] for o in ORIENTATIONS])[plan.orientation] + change[:, :3]
    wrist = body.chest + body.scale * turn_by(body.trunk, local)
    wrist = pushed_out(wrist, clothed_shapes(body, plan), 1.45)
    elbow = bend_arm(wearer, body, wrist, 0.6 + change[:, 3])
    elbow[:, 2] = np.maximum(elbow[:, 2], wrist[:, 2] + 0.09 * body.scale)
    facing = unit(body.chest - wrist) * 0.5 + np.array([0.0, 0.0, 1.0])
    strap = np.radians(habit(wearer, "strap", plan.gesture, rng, 3))
    return hold_device(wrist, elbow, facing, -0.1 + change[:, 4], strap)


# %% [markdown]
# ## 7 Motion
#
# A minimum-jerk reach carries the device from one pose to the other; rhythm, sweep and jitter are
# added where the gesture is performed. Accelerations are analytic: second differences at 10 Hz
# would lose most of a scratch at 4.5 Hz.


# %%
@dataclass(frozen=True, slots=True)
class Track:
    """Device in the room, row by row."""

    position: F64  # (R, 3)
    rot: F64  # (R, 4) device → room
    linear: F64  # (R, 3) m/s² without gravity, device axes
    recording: I64  # (R) index into the plan
    start: I64  # (N + 1)


def minimum_jerk(rows: F64, duration: F64) -> tuple[F64, F64, F64]:
    """0 → 1 within `duration`, with its first and second derivative per row. (R) → 3 × (R)

    Flash and Hogan 1985: 10 τ³ − 15 τ⁴ + 6 τ⁵.
    """
    tau = np.clip(rows / duration, 0, 1)
    value = tau**3 * (10 + tau * (6 * tau - 15))
    slope = 30 * tau**2 * (1 - tau) ** 2 / duration
    bend = 60 * tau * (1 - tau) * (1 - 2 * tau) / duration**2
    return value, slope, bend


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
    """Noise of unit variance that remembers; somewhat more in the first rows. → (R, width)"""
    smooth = lagged(rng.standard_normal((len(recording), width)), start, recording, keep)
    return smooth / np.linalg.norm(fading(keep))


def draw_reach(plan: Plan, rng: np.random.Generator) -> F64:
    """When the hand is halfway: relaxing, arriving, departing; and how long it takes. → (4, N) rows

    Relaxes: from the target to rest and back. Some hands leave before the last row.
    """
    n, moving = len(plan), plan.rows[:, 0].astype(np.float64)
    lasts = rng.uniform(4.0, 7.5, n) * np.where(moving < 12, 0.8, 1.0)
    relax = np.where(plan.relaxes == 1, rng.uniform(2, 5, n), -1e3)
    arrive = moving - 0.5 * lasts - rng.uniform(-0.5, 2, n)
    arrive = np.where(plan.relaxes == 1, np.maximum(arrive, relax + lasts), arrive)
    early = np.where(rng.random(n) < 0.3, rng.uniform(0.5, 2.5, n), 0.0)
    return np.stack([relax, arrive, plan.rows.sum(axis=1) - early + 0.5 * lasts, lasts])


def reach(plan: Plan, of: I64, t: F64, times: F64, longer: float) -> tuple[F64, F64, F64]:
    """Share of the way from rest to target, with both derivatives per row. → 3 × (R)"""
    relax_at, arrive_at, depart_at, lasts = times
    lasts = longer * lasts[of]
    relax, arrive, depart = (
        minimum_jerk(t - at[of] + 0.5 * lasts, lasts) for at in (relax_at, arrive_at, depart_at)
    )
    stays = (plan.relaxes == 1)[of].astype(np.float64)
    # sum of moves: (1 − relax) where it starts at the target, + arrive, − depart
    value = stays * (1 - relax[0]) + arrive[0] - depart[0]
    slope = arrive[1] - stays * relax[1] - depart[1]
    bend = arrive[2] - stays * relax[2] - depart[2]
    return value, slope, bend


def rhythm(
    wearer: Wearer, plan: Plan, of: I64, t: F64, on: F64, rng: np.random.Generator
) -> tuple[F64, F64, F64]:
    """Movement with a beat. → linear (R, 3) m/s², turn (R, 3) rad, shift (R, 3) m

    `on` (R) fades it in. The amplitude breathes, the phase wanders: no hand is a metronome.
    """
    g = plan.gesture
    rate = column(MOTIONS, "rate", g) * np.exp(habit(wearer, "rate", g, rng, 1)[:, 0])
    strength = np.exp(habit(wearer, "strength", g, rng, 1))
    bias = habit(wearer, "axis", g, rng, 6)
    push, turn = column(MOTIONS, "push", g), np.radians(column(MOTIONS, "turn", g))
    push = strength * (push + bias[:, :3] * np.linalg.norm(push, axis=1, keepdims=True))
    turn = strength * (turn + bias[:, 3:] * np.linalg.norm(turn, axis=1, keepdims=True))
    phase = 2 * np.pi * rate[of] * t + np.cumsum(rng.normal(0, 0.35, len(t)))
    breath = on * np.clip(1 + 0.35 * wander(rng, plan.start, of, 0.8, 1)[:, 0], 0.1, None)
    wave, later = (breath * np.cos(phase))[:, None], (breath * np.cos(phase + 1.1))[:, None]
    omega = 2 * np.pi * rate[:, None] / SAMPLE_PERIOD
    return -wave * push[of], later * turn[of], wave * (push / omega**2)[of]


def sweep(
    wearer: Wearer, plan: Plan, of: I64, t: F64, on: F64, rng: np.random.Generator
) -> tuple[F64, F64, F64]:
    """Movement of the whole arm, once or twice in a gesture. Shapes as in rhythm."""
    g = plan.gesture
    size = np.exp(0.5 * habit(wearer, "strength", g, rng, 1))
    carry, turn = size * column(MOTIONS, "carry", g), size * column(MOTIONS, "sweep", g)
    slow = 2 * np.pi * rng.uniform(0.025, 0.065, (len(plan), 1))  # rad per row
    first = rng.uniform(0, 2 * np.pi, (len(plan), 1))
    swing = on[:, None] * np.sin(slow[of] * t[:, None] + first[of])
    linear = -swing * (carry * (slow / SAMPLE_PERIOD) ** 2)[of]
    return linear, swing * np.radians(turn)[of], swing * carry[of]


def restless(
    wearer: Wearer, plan: Plan, of: I64, _t: F64, on: F64, rng: np.random.Generator
) -> tuple[F64, F64, F64]:
    """Movement without a rhythm: work of the fingers, fidgeting, drift. Shapes as in rhythm."""
    g, start = plan.gesture, plan.start
    amount = column(MOTIONS, "jitter", g) * np.exp(habit(wearer, "jitter", g, rng, 1)[:, 0])
    level = (amount[of] * (0.12 + 0.88 * on))[:, None]
    quick, tremble = wander(rng, start, of, 0.25, 3), wander(rng, start, of, 0.5, 3)
    settled = rng.standard_normal((len(plan), 3))[of] * on[:, None]
    drift = settled + wander(rng, start, of, 0.93, 3)
    turn = np.radians(2.2) * drift + np.radians(2.5) * level * tremble
    return level * quick, turn, 0.006 * drift + 0.006 * level * tremble


MOVEMENTS = (rhythm, sweep, restless)


def track(wearer: Wearer, plan: Plan, rest: Pose, target: Pose, rng: np.random.Generator) -> Track:
    """From poses to rows: interpolate, add the movements, differentiate."""
    start = plan.start
    of = np.repeat(np.arange(len(plan)), np.diff(start))
    t = (np.arange(start[-1]) - start[of]).astype(np.float64)
    times = draw_reach(plan, rng)
    turned_by = reach(plan, of, t, times, 1.0)[0][:, None]
    # the wrist turns quickly on a path that takes longer: real reaches show little acceleration
    share, slope, bend = (v[:, None] for v in reach(plan, of, t, times, 2.45))
    begins = plan.rows[:, :2].sum(axis=1)
    on = minimum_jerk(t - begins[of] + 1, np.full(len(t), 3.0))[0]
    way = target.wrist - rest.wrist
    arc = 0.12 * np.linalg.norm(way, axis=1, keepdims=True) * unit(rng.normal(0, 1, way.shape))
    position = rest.wrist[of] + share * way[of] + share * (1 - share) * arc[of]
    pull = bend * way[of] + (bend * (1 - 2 * share) - 2 * slope**2) * arc[of]
    between = q_log(q_mul(q_conj(rest.rot), target.rot))
    rot = q_mul(rest.rot[of], q_exp(turned_by * between[of]))
    parts = [move(wearer, plan, of, t, on, rng) for move in MOVEMENTS]
    linear, turn, shift = (sum(p) for p in zip(*parts, strict=True))
    rot = q_mul(rot, q_exp(turn))
    axes = q_matrix(rot)
    linear = linear + turn_by(axes.swapaxes(-1, -2), pull) / SAMPLE_PERIOD**2
    return Track(position + turn_by(axes, shift), rot, linear, of, start)


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


def sensor_rays() -> tuple[F32, F32]:
    """Where sensors sit and their pixels look, device axes. → (S, 3) m, (S, P, 3) unit vectors

    1 is in the middle, 2 towards the thumb, 4 opposite; 3 towards the hand, 5 towards the elbow.
    Columns of 1, 2 and 4 run along x and rows against y; 3 and 5 are mounted turned by 90°:
    columns run along y, rows along x. So mirroring x flips 1, 2, 4 left–right, 3 and 5 up–down.
    """
    away = np.array([(0, 0, 0), (0, 1, 0), (-1, 0, 0), (0, -1, 0), (1, 0, 0)], dtype=np.float64)
    x, y, z = np.eye(3)
    columns, rows = np.array([x, x, y, x, y]), np.array([-y, -y, x, -y, x])
    ahead = np.cos(TILT) * z + np.sin(TILT) * away
    ahead[0] = z
    spots = (np.arange(8) - 3.5) / 4 * np.tan(FIELD / 2)
    columns = columns - (columns * ahead).sum(axis=1, keepdims=True) * ahead
    rows = rows - (rows * ahead).sum(axis=1, keepdims=True) * ahead
    rays = ahead[:, None, None] + spots[:, None, None] * unit(rows)[:, None, None]
    rays = rays + spots[:, None] * unit(columns)[:, None, None]  # (S, 8, 8, 3)
    places = (SEEN_FROM * away).astype(np.float32)
    return places, unit(rays.reshape(5, 64, 3)).astype(np.float32)


def arm_shapes(
    wearer: Wearer, plan: Plan, body: Body, now: Track, rng: np.random.Generator
) -> list[Ellipsoid]:
    """What moves with the device: the own hand, bent towards the palm, and the upper arm."""
    of, k = now.recording, body.scale
    axes = q_matrix(now.rot)
    curl = column(PLACES, "curl", plan.gesture) + habit(wearer, "curl", plan.gesture, rng, 1)[:, 0]
    bent = np.radians(curl)[of, None]
    fingers = -np.cos(bent) * axes[..., 0] + np.sin(bent) * axes[..., 2]
    hand = now.position + k * (-0.03 * axes[..., 0] - 0.015 * axes[..., 2] + 0.10 * fingers)
    thumb = np.stack([fingers, axes[..., 1], np.cross(fingers, axes[..., 1])], axis=-1)
    elbow = now.position + wearer.forearm * axes[..., 0]
    upper = body.shoulder[of] - elbow
    return [
        ellipsoid(hand, thumb, k * np.array([0.075, 0.042, 0.020]), skin=True),
        ellipsoid(elbow + 0.5 * upper, along(upper), (0.05, 0.05, 0.17), skin=False),
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
    """Images, and how warm a view each sensor has. → (R, S, P) bytes, (R, S, 2) skin, clothes

    `slip` (R, 3) m moves the unit from where it should sit on the wrist, device axes.
    """
    places, rays = sensor_rays()
    squares = (rays[..., :, None] * rays[..., None, :]).reshape(5, 64, 9).swapaxes(-1, -2)
    images = np.empty((len(now.rot), 5, 64), dtype=np.uint8)
    warmth = np.empty((len(now.rot), 5, 2), dtype=np.float32)
    axes = q_matrix(now.rot)
    eyes = (now.position + turn_by(axes, slip))[:, None] + places @ axes.swapaxes(-1, -2)
    for first in range(0, len(eyes), 512):
        rows = slice(first, first + 512)
        nearest = dict.fromkeys((True, False), np.array(np.inf, dtype=np.float32))
        for shape in shapes:
            found = distances(picked(shape, rows), eyes[rows], axes[rows], rays, squares)
            nearest[shape.skin] = np.minimum(nearest[shape.skin], found)
        image, warm = expose(nearest[True], nearest[False], rng)
        images[rows], warmth[rows] = image.swapaxes(0, 1), warm.swapaxes(0, 1)
    return images, warmth


def expose(skin: F32, clothes: F32, rng: np.random.Generator) -> tuple[U8, F32]:
    """Distances to bytes, with noise and lost echoes. 2 × (S, B, P) m → bytes, (S, B, 2)

    Far and grazing surfaces send little light back: a pixel is lost the likelier the farther.
    """
    metres = np.minimum(skin, clothes)
    glow = np.exp(-metres / np.float32(0.25))
    warm = np.stack([(glow * (skin <= clothes)).mean(axis=-1), glow.mean(axis=-1)], axis=-1)
    warm[..., 1] -= warm[..., 0]
    noise = rng.standard_normal(metres.shape, dtype=np.float32)
    units = metres / np.float32(TOF_UNIT) * (1 + np.float32(0.025) * noise) + 2 * noise
    lost = rng.random(metres.shape, dtype=np.float32) < np.float32(0.01) + metres**2
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
    """(R, S, 2) views → (R, S) °C"""
    lasting = rng_for(wearer.seed, wearer.name, "thermopiles")
    room = lasting.normal(24.0, 1.3)
    skin, clothes = lasting.normal(34.3, 1.3), lasting.normal(29.0, 1.0)
    offset, gain = lasting.normal(0, 0.3, 5), lasting.normal(1.9, 0.15, 5)
    day = rng.normal(0, 0.4, (len(now.start) - 1, 1))[now.recording]
    seen = np.minimum(gain * warmth.sum(axis=-1), 1)
    share = warmth[..., 0] / np.maximum(warmth.sum(axis=-1), 1e-6)
    there = share * skin + (1 - share) * clothes
    flat = room + day + seen * (there - room - day)
    slow = lagged(flat, now.start, now.recording, 0.55)
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


FACING = 4.3  # rad; all subjects sat in the same room
BED_TURN = {STRAIGHT: 0.0, LEAN: 0.1, BACK: 1.0, SIDE: -1.0}  # rad, from the chair's direction


def face_somewhere(wearer: Wearer, plan: Plan, now: Track, rng: np.random.Generator) -> F64:
    """Room → world: the direction that the wearer faces, drifting a little. → (R, 4)"""
    lasting = rng_for(wearer.seed, wearer.name, "heading")
    own = lasting.normal(FACING, 0.40) + lasting.normal(0, 0.15, len(ORIENTATIONS))
    yaw = own + np.array([BED_TURN[o] for o in ORIENTATIONS])
    yaw = yaw[plan.orientation] + rng.normal(0, 0.10, len(plan))
    yaw = yaw[now.recording] + 0.03 * wander(rng, now.start, now.recording, 0.93, 1)[:, 0]
    return q_exp(np.stack([0 * yaw, 0 * yaw, yaw], axis=1))


def measure(wearer: Wearer, plan: Plan, now: Track, rng: np.random.Generator) -> tuple[F64, F64]:
    """Accelerometer and orientation, as quantised by the device. → (R, 3) m/s², (R, 4)"""
    lasting = rng_for(wearer.seed, wearer.name, "accelerometer")
    bias, scale = lasting.normal(0, 0.06, 3), 1 + lasting.normal(0, 0.004, 3)
    up = q_matrix(now.rot)[..., 2, :]  # the room's z in device axes
    acc = scale * (now.linear + GRAVITY * up) + bias + rng.normal(0, 0.03, up.shape)
    rot = q_mul(face_somewhere(wearer, plan, now, rng), now.rot)
    rot = q_mul(rot, q_exp(np.radians(0.6) * wander(rng, now.start, now.recording, 0.9, 3)))
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
    slip = habit(wearer, "slip", plan.gesture, rng, 3)[now.recording]
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
    log("written", file=f"{name}.csv", subjects=len(wearers), recordings=len(picks))


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
) -> None:
    """Write the five files into `out`; the same arguments, but for `workers`, give the same files.

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
        raise ValueError(
            f"{per_subject} recordings a subject: the protocol has {len(PROTOCOL)}, give 1…"
            f"{len(PROTOCOL)}."
        )


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
        raise FileNotFoundError(
            f"{path} does not exist. Make it with: python cmi_simulator.py {folder}"
        )
    names = ["sequence_id", "subject", "behavior", "phase", "gesture"]
    kinds: dict[str, Any] = dict.fromkeys(ACC + ROT + THM, pl.Float64)
    frame = pl.read_csv(path, columns=names + ACC + ROT + THM, schema_overrides=kinds)
    figures = length_figures(frame) | value_figures(frame) | motion_figures(frame)
    return figures | image_figures(path, frame.get_column("phase") == "Gesture")


def length_figures(frame: pl.DataFrame) -> dict[str, float]:
    """Sizes, and lengths of recordings and behaviours in rows."""
    rows = frame.group_by(IN_RECORDING).agg(pl.len(), pl.first("subject"))
    count = rows.get_column("len")
    by_subject = rows.group_by("subject").agg(pl.mean("len")).get_column("len")
    figures = {"rows": len(frame), "recordings": len(rows), "subjects": len(by_subject)}
    found = {f"{name} of recording": value for name, value in spread(count).items()}
    found["sd of subjects' mean length"] = float(np.std(by_subject.to_numpy()))
    pieces = frame.group_by(IN_RECORDING, "behavior").agg(pl.len())
    for behavior in BEHAVIORS:
        some = pieces.filter(pl.col("behavior") == behavior).get_column("len")
        found |= {f"{name} of {behavior}": value for name, value in spread(some).items()}
    return {name: float(value) for name, value in figures.items()} | found


def spread(values: pl.Series) -> dict[str, float]:
    x = values.to_numpy()
    figures = {"mean rows": x.mean(), "sd rows": x.std(), "median rows": np.median(x)}
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
