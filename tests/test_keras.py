"""The Keras member: layers against oracles, batches against slow loops, fits that stop and go on.

One TensorFlow in this process; two more processes read what was written here, one under another
backend where that is installed. Networks are tiny, and folds share what was traced.
"""

import csv
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmi_pipeline as cmi

if not all(importlib.util.find_spec(name) for name in ("tensorflow", "keras")):
    pytest.skip("TensorFlow and Keras are not installed", allow_module_level=True)

Data = tuple[cmi.Frames, cmi.Labels, np.ndarray]  # frames, labels, subject
Fitted = tuple[Path, cmi.Job, dict[str, Any]]  # folder, job, info of its fit

GROUPS = (
    ("acc", ("acc_x", "acc_y", "acc_z", "acc_mag")),
    ("rot", ("up_x", "up_y", "up_z")),
    ("motion", ("swing", "omega_x", "omega_y", "omega_z")),
    ("thm", ("thm_1", "thm_2")),
    ("tof_1", ("tof_1_near", "tof_1_mean", "tof_1_sx")),
)
N_CHANNELS, VECTORS = 16, ([0, 1, 2], [4, 5, 6], [8, 9, 10])
THM, TOF = [11, 12], [13, 14, 15]
ROWS = 22  # odd after one halving, so that pooling meets every case
GESTURES_USED = np.array([1, 6, 9, 16])  # two targets, two others


def make_data(seed: int = 5, n: int = 96) -> Data:
    """Recordings of 8 subjects whose gesture shows in rhythm and level; frames, labels, subject."""
    rng = np.random.default_rng(seed)
    kind = np.arange(n) % 4
    length = rng.integers(8, 40, n)
    start = np.r_[0, np.cumsum(length)]
    x = rng.normal(0, 0.4, (start[-1], N_CHANNELS)).astype(np.float32)
    orientation, behavior = np.arange(n) // 4 % 2, np.arange(n) // 8 % 2
    for i in range(n):
        t, own = np.arange(length[i]), x[start[i] : start[i + 1]]
        own[:, 7] += 3 * np.sin((0.3 + 0.6 * kind[i]) * t + rng.uniform(0, 6))
        own[:, 3] += 9 + 3 * (kind[i] >= 2)
        own[:, 13] += 3 * (kind[i] % 2)
        own[:, 1] += 3 * orientation[i]
        own[:, 2] += 3 * behavior[i]
        if i % 9 == 4:
            own[:, 11:13] = np.nan
        if i % 11 == 3:
            own[:, 4:7] = np.nan
    phase = np.zeros(len(x), np.uint8)
    labels = cmi.Labels.of(GESTURES_USED[kind], orientation, behavior, phase)
    return cmi.Frames(start, x, GROUPS), labels, np.arange(n) // 12


@pytest.fixture(scope="module")
def data() -> Data:
    return make_data()


def config(**changes: Any) -> cmi.Config:
    """Settings of a tiny network that is trained for a few epochs."""
    small = {
        "keras_width": 16, "keras_max_epochs": 3, "keras_dropout": 0.1, "fixed_pad_len": ROWS,
        "keras_es_patience": 0, "keras_rlr_patience": 0, "keras_lr": 4e-3, "keras_augment": True,
        "modality_dropout_prob": 0.3, "keras_class_weight": 0.0, "keras_label_smoothing": 0.1,
    }  # fmt: skip
    return cmi.Config(**{**small, **changes})


def job_in(folder: Path, subject: np.ndarray, mode: str = "all", fold: int = 0) -> cmi.Job:
    out = subject % 4 == fold
    return cmi.Job(
        "keras", mode, 0, fold, np.flatnonzero(~out), np.flatnonzero(out),
        folder / "keras_models" / mode, folder / "checkpoints" / mode, folder / "logs",
    )  # fmt: skip


@pytest.fixture(scope="module")
def keras() -> Any:
    return cmi.keras_quietly(2)[1]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, data: Data) -> Fitted:
    """Two folds trained undisturbed, with the settings of `config`."""
    folder = tmp_path_factory.mktemp("fitted")
    frames, labels, subject = data
    for fold in (1, 0):
        job = job_in(folder, subject, fold=fold)
        info = cmi.fit_keras(job, frames, labels, config())
    return folder, job, info


def history(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "logs" / "keras_progress.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def network(spec: cmi.KerasSpec, like: Any = None, seed: int = 1) -> Any:
    """A network with lively random values everywhere, or with those of another."""
    made = cmi.keras_network(spec)
    if like is not None:
        made.set_weights(like.get_weights())
        return made
    rng = np.random.default_rng(seed)
    for variable in made.weights:
        around = 1.0 if variable.name in ("gamma", "scale", "moving_variance") else 0.0
        variable.assign(around + 0.15 * rng.normal(size=variable.shape))
    return made


SPEC = cmi.KerasSpec(
    GROUPS,
    tuple((b, o, int(g)) for b in (0, 1) for o in (0, 1) for g in GESTURES_USED),
    ROWS,
    16,
    0.0,
)


def some_rows(seed: int = 2) -> np.ndarray:
    """Rows of five recordings: full, short, one row, rotation missing, nothing at all."""
    x = np.random.default_rng(seed).normal(size=(5, ROWS, N_CHANNELS)).astype(np.float32)
    x[1, 13:] = np.nan
    x[2, 1:] = np.nan
    x[3, :, 4:7] = np.nan
    x[4] = np.nan
    return x


def with_more_padding(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.full_like(x, np.nan)], axis=1)


# ---------------------------------------------------------------- layers


@pytest.mark.usefixtures("keras")
def test_padding_to_twice_the_length_changes_no_answer() -> None:
    net = network(SPEC)
    twice = network(cmi.dataclasses.replace(SPEC, rows=2 * ROWS), like=net)
    x = some_rows()
    p, q = np.asarray(net(x)), np.asarray(twice(with_more_padding(x)))
    assert np.ptp(p, axis=0).max() > 1e-3, "the answers must depend on the input"
    np.testing.assert_allclose(p, q, atol=1e-5)
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-5)


@pytest.mark.usefixtures("keras")
def test_padding_enters_no_statistic_of_batch_norm() -> None:
    net = network(SPEC)
    twice = network(cmi.dataclasses.replace(SPEC, rows=2 * ROWS), like=net)
    x = some_rows()
    p, q = np.asarray(net(x, training=True)), np.asarray(twice(with_more_padding(x), training=True))
    np.testing.assert_allclose(p, q, atol=1e-5)
    before = network(SPEC).get_layer("imu1_norm1").get_weights()[2]
    one, two = (n.get_layer("imu1_norm1").get_weights() for n in (net, twice))
    assert np.abs(one[2] - before).max() > 1e-3, "training must move the means"
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("keras")
def test_rows_in_the_middle_are_no_padding() -> None:
    """A gap inside is a row with every sensor silent; the rows after it keep their place."""
    net, x = network(SPEC), some_rows()[:1]
    gap = x.copy()
    gap[0, 5:8] = np.nan
    closed = np.concatenate([gap[:, :5], gap[:, 8:], np.full((1, 3, N_CHANNELS), np.nan)], axis=1)
    p, q = np.asarray(net(gap)), np.asarray(net(closed.astype(np.float32)))
    assert np.isfinite(p).all()
    assert np.abs(p - q).max() > 1e-4


@pytest.mark.usefixtures("keras")
def test_standardise_against_a_slow_loop() -> None:
    x = some_rows().copy()
    x[0, 5:8] = np.nan  # a gap inside: these rows are real
    layer = cmi.standardise_class()(GROUPS)
    rng = np.random.default_rng(3)
    mean, scale = rng.normal(size=N_CHANNELS), rng.uniform(0.5, 2, N_CHANNELS)
    layer.build(x.shape)
    layer.set_weights([mean, scale])
    imu, distant, real = (np.asarray(part) for part in layer(x))
    n_seen = [ROWS, 13, 1, ROWS, 1]
    for b in range(5):
        for t in range(ROWS):
            assert real[b, t, 0] == (t < n_seen[b])
            want: dict[bool, list[float]] = {False: [], True: []}
            i = 0
            for name, channels in GROUPS:
                own = x[b, t, i : i + len(channels)]
                z = [
                    0.0 if np.isnan(v) else (v - mean[i + j]) / scale[i + j]
                    for j, v in enumerate(own)
                ]
                want[name[0] == "t"] += [*z, float(not np.isnan(own).all())]
                i += len(channels)
            np.testing.assert_allclose(imu[b, t], want[False], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(distant[b, t], want[True], rtol=1e-4, atol=1e-5)


def test_recurrent_layer_is_keras_own_lstm_and_gru_under_a_mask(keras: Any) -> None:
    rng = np.random.default_rng(4)
    n, t, c, u = 3, 6, 5, 4
    x = rng.normal(size=(n, t, c)).astype(np.float32)
    real = np.arange(t)[None, :, None] < np.array([6, 3, 1])[:, None, None]
    layer = cmi.recurrent_class()(u)
    layer.build(x.shape, real.shape)
    kernel, bias, own_lstm, own_gru = (
        rng.normal(size=w.shape).astype(np.float32) for w in layer.weights
    )
    layer.set_weights([kernel, bias, own_lstm, own_gru])
    got = np.asarray(layer(x, real.astype(np.float32)))
    mask = keras.ops.convert_to_tensor(real[..., 0])
    lstm = keras.layers.Bidirectional(keras.layers.LSTM(u, return_sequences=True, use_cudnn=False))
    gru = keras.layers.Bidirectional(keras.layers.GRU(u, return_sequences=True, use_cudnn=False))
    lstm.build(x.shape), gru.build(x.shape)
    ours_to_keras = np.r_[0 : 2 * u, 3 * u : 4 * u, 2 * u : 3 * u]  # in, forget, new, out
    lstm.set_weights([
        w for d in (0, 1)
        for w in (kernel[d][:, ours_to_keras], own_lstm[d][:, ours_to_keras], bias[d, 0, ours_to_keras])
    ])  # fmt: skip
    gru.set_weights([
        w for d in (0, 1)
        for w in (kernel[d][:, 4 * u :], own_gru[d], np.stack([bias[d, 0, 4 * u :], np.zeros(3 * u, np.float32)]))
    ])  # fmt: skip
    a, b = np.asarray(lstm(x, mask=mask)), np.asarray(gru(x, mask=mask))
    want = np.concatenate([a[..., :u], b[..., :u], a[..., u:], b[..., u:]], axis=-1)
    np.testing.assert_allclose(got * real, want * real, atol=2e-5)
    assert (got[~real[..., 0]] == 0).all()


@pytest.mark.usefixtures("keras")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention_weighs_real_rows_only(dtype: str) -> None:
    rng = np.random.default_rng(6)
    x, scores = (
        rng.normal(size=(2, 7, 3)).astype(dtype),
        (50 * rng.normal(size=(2, 7, 2))).astype(dtype),
    )
    real = np.ones((2, 7, 1), dtype)
    real[1, 2:] = 0
    got = np.asarray(cmi.attention_class()(dtype=dtype)(x, scores, real))
    for b in range(2):
        k = int(real[b].sum())
        e = np.exp(scores[b, :k].astype(float) - scores[b, :k].astype(float).max(0))
        want = (e / e.sum(0)).T @ x[b, :k].astype(float)  # (heads, C)
        np.testing.assert_allclose(got[b], want.ravel(), atol=1e-5 if dtype == "float32" else 5e-3)


@pytest.mark.usefixtures("keras")
def test_heads_are_combined_as_a_slow_loop_does() -> None:
    rng = np.random.default_rng(7)
    table = [(0, 0, 3), (0, 1, 3), (0, 0, 7), (1, 2, 12)]
    g, c = rng.normal(size=(4, 18)), 3 * rng.normal(size=(4, 4))
    g[3], c[3] = 0, [-200, -200, 0, 0]  # the composite head is sure that it is not gesture 3
    got = np.asarray(cmi.composite_class()(table)(g.astype(np.float32), c.astype(np.float32)))
    soft = [np.exp(v - v.max(1, keepdims=True)) for v in (g, c)]
    pg, pc = (e / e.sum(1, keepdims=True) for e in soft)
    want = np.zeros((4, 4))
    for i in range(4):
        for j, (_, _, code) in enumerate(table):
            of_gesture = sum(pc[i, m] for m, row in enumerate(table) if row[2] == code)
            if of_gesture > 1e-12:
                want[i, j] = pc[i, j] / of_gesture * (pg[i, code] + of_gesture) / 2
    np.testing.assert_allclose(got, want / want.sum(1, keepdims=True), atol=1e-5)


# ---------------------------------------------------------------- batches


def run_of(data: Data, folder: Path, size: int = 5, **changes: Any) -> cmi.KerasRun:
    frames, labels, subject = data
    table = tuple(tuple(row) for row in labels.table.tolist())
    spec = cmi.KerasSpec(frames.groups, table, ROWS, 16, 0.1)
    return cmi.KerasRun(job_in(folder, subject), spec, frames, labels, config(**changes), size)


def drawn(run: cmi.KerasRun, first: int, last: int) -> list[tuple[np.ndarray, ...]]:
    batches = cmi.keras_batches(run, range(first, last))
    return [(np.asarray(x), np.asarray(y["gesture"]), np.asarray(y["composite"]), np.asarray(w)) for x, y, w in batches]  # fmt: skip


def last_rows_slowly(frames: cmi.Frames, i: int) -> np.ndarray:
    out = np.full((ROWS, N_CHANNELS), np.nan, np.float32)
    own = frames.x[frames.start[i] : frames.start[i + 1]][-ROWS:]
    out[: len(own)] = own
    return out


def test_plain_batches_are_each_recordings_last_rows_once_an_epoch(
    data: Data, tmp_path: Path
) -> None:
    frames, labels, _ = data
    run = run_of(data, tmp_path, keras_augment=False, modality_dropout_prob=0.0)
    assert run.steps == 15  # 72 recordings, 5 a step, the last batch filled up
    known = {last_rows_slowly(frames, i).tobytes(): i for i in range(len(frames))}
    orders = []
    for epoch in range(2):
        found = []
        for x, gesture, composite, weight in drawn(run, epoch * 15, epoch * 15 + 15):
            for row, g, c in zip(x, gesture, composite, strict=True):
                i = known[row.tobytes()]
                found.append(i)
                assert g.argmax() == labels.gesture[i]
                assert c.argmax() == labels.composite[i]
                assert g.sum() == c.sum() == 1
            np.testing.assert_allclose(weight, 1, rtol=1e-5)
        assert sorted(found[:72]) == sorted(run.job.train.tolist())
        orders.append(found)
    assert orders[0] != orders[1]


def test_a_step_draws_the_same_wherever_one_begins_and_anew_in_each_epoch(
    data: Data, tmp_path: Path
) -> None:
    run = run_of(data, tmp_path)
    whole, late = drawn(run, 0, 32), drawn(run, 16, 32)
    for a, b in zip(whole[16:], late, strict=True):
        for one, two in zip(a, b, strict=True):
            np.testing.assert_array_equal(one, two)
    assert not any(np.array_equal(whole[0][0], later[0], equal_nan=True) for later in whole[1:])


def test_stretching_keeps_the_end_and_turning_keeps_lengths_and_angles(
    data: Data, tmp_path: Path
) -> None:
    frames, _, _ = data
    plain = frames.x.copy()
    plain[:, 3] = np.arange(len(plain))  # names the row: no vector, so it is not turned
    marked = cmi.Frames(frames.start, plain, frames.groups)
    run = run_of((marked, *data[1:]), tmp_path, modality_dropout_prob=0.0)
    paces, angles = [], []
    for x, *_ in drawn(run, 0, 15):
        for recording in x:
            rows = recording[~np.isnan(recording[:, 3]), 3].astype(int)
            assert rows[-1] + 1 in frames.start
            i = np.searchsorted(frames.start, rows[-1], side="right") - 1
            assert (rows >= frames.start[i]).all()
            assert (np.diff(rows) >= 0).all()
            if len(rows) > 15:
                paces.append(np.diff(rows).mean())
            before, after = plain[rows], recording[: len(rows)]
            kept = [c for c in range(N_CHANNELS) if c not in np.ravel(VECTORS)]
            np.testing.assert_array_equal(before[:, kept], after[:, kept])
            turns = []
            for v in VECTORS:
                if np.isnan(before[:, v]).any():
                    assert np.isnan(after[:, v]).all()
                    continue
                turn = np.linalg.lstsq(before[:, v], after[:, v], rcond=None)[0]
                if len(rows) >= 6:
                    turns.append(turn)
            for turn in turns:
                np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-3)
                np.testing.assert_allclose(turn, turns[0], atol=1e-3)
                assert np.linalg.det(turn) > 0
                angles.append(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)))
    assert 0.9 < min(paces) < 0.97 < 1.03 < max(paces) < 1.12
    assert 0.05 < np.median(angles) < 0.5


def test_modality_dropout_takes_the_share_asked_for_and_nothing_else(
    data: Data, tmp_path: Path
) -> None:
    frames, labels, subject = data
    whole = cmi.Frames(frames.start, np.nan_to_num(frames.x), frames.groups)
    run = run_of((whole, labels, subject), tmp_path, size=9, modality_dropout_prob=0.6)
    x = np.concatenate([batch[0] for batch in drawn(run, 0, 120)])[:, 0]  # (1080, C) first rows
    thm, tof = (np.isnan(x[:, own]) for own in (THM, TOF))
    assert (thm.all(1) == thm.any(1)).all()
    assert (tof.all(1) == tof.any(1)).all()
    shares = [
        (thm[:, 0] & ~tof[:, 0]).mean(),
        (tof[:, 0] & ~thm[:, 0]).mean(),
        (thm[:, 0] & tof[:, 0]).mean(),
    ]
    np.testing.assert_allclose(shares, 0.2, atol=0.05)
    assert not np.isnan(x[:, :11]).any()


@pytest.mark.parametrize(
    ("asked", "n", "size"), [(512, 6500, 406), (32, 6500, 32), (512, 800, 50), (512, 40, 4), (512, 3, 3), (1, 900, 1)]
)  # fmt: skip
def test_batches_are_capped_at_a_sixteenth_of_the_rows(asked: int, n: int, size: int) -> None:
    assert cmi.keras_batch(n, config(keras_batch_size=asked)) == size


def test_rare_gestures_weigh_more_and_the_mean_weight_is_one() -> None:
    gesture = np.array([2] * 9 + [5])
    weight = cmi.keras_class_weights(gesture, config(keras_class_weight=1.0))
    assert weight[5] / weight[2] == pytest.approx(9)
    assert weight[gesture].mean() == pytest.approx(1)
    half = cmi.keras_class_weights(gesture, config(keras_class_weight=0.5))
    assert half[5] / half[2] == pytest.approx(3)


# ---------------------------------------------------------------- fitting


def answer(
    folder: Path, labels: cmi.Labels, frames: cmi.Frames, stems: tuple[str, ...] = ("fold00",)
) -> Any:
    model = cmi.load_keras(folder / "keras_models" / "all", stems, labels.table, config())
    return cmi.predict_keras(model, frames)


def test_a_fold_learns_writes_its_files_and_predicts_what_it_was_judged_by(
    fitted: Fitted, data: Data
) -> None:
    folder, job, info = fitted
    frames, labels, subject = data
    assert sorted(p.name for p in job.folder.iterdir()) == [
        "fold00.keras", "fold00_train.csv", "fold01.keras", "fold01_train.csv",
    ]  # fmt: skip
    assert list(job.scratch.iterdir()) == []
    proba = answer(folder, labels, frames.take(job.valid), ("fold00", "fold01"))
    assert proba.shape == (2, len(job.valid), len(labels.table))
    assert proba.dtype == np.float32
    np.testing.assert_allclose(proba.sum(axis=2), 1, atol=1e-5)
    guess = cmi.gesture_proba(proba[0], labels.table).argmax(axis=1)
    assert cmi.score(labels.gesture[job.valid], guess) == pytest.approx(info["score"])
    assert (guess == labels.gesture[job.valid]).mean() == pytest.approx(info["val_acc"])
    other = job_in(folder, subject, fold=1).valid
    guess_other = cmi.gesture_proba(
        answer(folder, labels, frames, ("fold01",))[0], labels.table
    ).argmax(axis=1)
    hits = np.r_[guess == labels.gesture[job.valid], guess_other[other] == labels.gesture[other]]
    assert hits.mean() > 0.45, "four gestures: chance is a quarter, with 48 answers never so much"
    assert info["epochs"] == info["best_epoch"] == 3


def test_progress_is_written_line_by_line(fitted: Fitted) -> None:
    folder, job, _ = fitted
    lines = [line for line in history(folder) if line["fold"] == 0]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    want = {
        "fold",
        "epoch",
        "time_from_start_sec",
        "loss",
        "acc",
        "val_loss",
        "val_acc",
        "lr",
        "mode",
        "seed",
        "score",
    }
    assert all(set(line) == want for line in lines)
    assert [line["lr"] for line in lines] == pytest.approx([4e-3, 3e-3, 1e-3]), (
        "a cosine over 3 epochs"
    )
    with (job.folder / "fold00_train.csv").open() as file:
        table = list(csv.DictReader(file))
    for row, line in zip(table, lines, strict=True):
        for name in ("loss", "acc", "val_loss", "val_acc", "score", "lr"):
            assert float(row[name]) == pytest.approx(line[name], rel=1e-6)


def test_one_recording_is_answered_as_in_a_crowd(
    fitted: Fitted,
    data: Data,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _, _ = fitted
    frames, labels, _ = data
    monkeypatch.setattr(cmi, "VALID_CHUNK", 40)  # 96 recordings: two chunks and a rest
    model = cmi.load_keras(
        folder / "keras_models" / "all", ("fold01", "fold00"), labels.table, config()
    )
    crowd = cmi.predict_keras(model, frames)
    for i in (0, 39, 40, 95):
        np.testing.assert_allclose(
            cmi.predict_keras(model, frames.take(np.array([i])))[:, 0], crowd[:, i], atol=1e-5
        )
    assert np.abs(crowd[0] - crowd[1]).max() > 1e-3, "two folds are two networks"
    np.testing.assert_allclose(answer(folder, labels, frames), crowd[1:], atol=1e-6)


def test_standardisation_never_sees_validation_rows(fitted: Fitted, data: Data) -> None:
    _, job, _ = fitted
    frames, _, _ = data
    network, _ = cmi.keras_graph(
        cmi.KerasSpec.read(job.folder / "fold00.keras"), config().keras_jit
    )
    network.load_weights(job.folder / "fold00.keras")
    mean, scale = network.get_layer("standardise").get_weights()
    rows = np.concatenate([frames.x[frames.start[i] : frames.start[i + 1]] for i in job.train])
    np.testing.assert_allclose(mean, np.nanmean(rows.astype(float), axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scale, np.nanstd(rows.astype(float), axis=0), rtol=1e-4)


class Killed(RuntimeError):
    pass


def killed_in(epoch: int, whole: Callable[..., Any]) -> Callable[..., Any]:
    def train_epoch(run: cmi.KerasRun, batches: Iterator[Any], at: int, told: Any) -> Any:
        if at == epoch:
            next(batches)
            raise Killed
        return whole(run, batches, at, told)

    return train_epoch


def ends_at_once(_: cmi.KerasRun) -> None:
    raise Killed


def values_in(path: Path) -> dict[str, np.ndarray]:
    """Every number in a .keras file, by its place."""
    import h5py

    found: dict[str, np.ndarray] = {}
    with (
        zipfile.ZipFile(path) as file,
        file.open("model.weights.h5") as inner,
        h5py.File(inner) as tree,
    ):
        tree.visititems(
            lambda name, node: (
                found.update({name: node[()]}) if isinstance(node, h5py.Dataset) else None
            )
        )
    return found


def test_a_killed_fold_goes_on_and_ends_as_if_undisturbed(
    fitted: Fitted,
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, whole_job, info = fitted
    frames, labels, subject = data
    job = job_in(tmp_path, subject)
    with monkeypatch.context() as patch:
        patch.setattr(cmi, "train_epoch", killed_in(2, cmi.train_epoch))
        with pytest.raises(Killed):
            cmi.fit_keras(job, frames, labels, config())
    assert cmi.keras_resumable(job, config()) == "resumable at epoch 2 of 3"
    assert not (job.folder / "fold00.keras").exists()
    cmi.keras_trainer.cache_clear()  # as in a new process
    again = cmi.fit_keras(job, frames, labels, config())
    assert [line["epoch"] for line in history(tmp_path)] == [1, 2, 3]
    for name, value in info.items():
        assert again[name] == pytest.approx(value, abs=1e-6), name
    want = values_in(whole_job.folder / "fold00.keras")
    got = values_in(job.folder / "fold00.keras")
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-6, err_msg=name)
    whole_csv = (whole_job.folder / "fold00_train.csv").read_text().splitlines()
    resumed_csv = (job.folder / "fold00_train.csv").read_text().splitlines()
    assert len(resumed_csv) == len(whole_csv) == 4
    assert cmi.keras_resumable(job, config()) is None


def test_plateaus_early_stop_and_best_weights_survive_a_kill(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation loss is dictated: best at epoch 2, so the rate halves and training stops."""
    frames, labels, subject = data
    cfg = config(keras_max_epochs=9, keras_es_patience=3, keras_rlr_patience=2)
    losses, judge = [1.0, 0.5, 0.7, 0.8, 0.9, 0.1], cmi.judge
    monkeypatch.setattr(
        cmi, "judge", lambda run: {**judge(run), "val_loss": losses[len(run.history)]}
    )
    infos, rates = [], []
    for kill in (None, 3):
        folder = tmp_path / str(kill)
        job = job_in(folder, subject)
        if kill:
            with monkeypatch.context() as patch:
                patch.setattr(cmi, "train_epoch", killed_in(kill, cmi.train_epoch))
                with pytest.raises(Killed):
                    cmi.fit_keras(job, frames, labels, cfg)
            assert sorted(p.name for p in job.scratch.iterdir()) == [
                "fold00.npz",
                "fold00_best002.weights.h5",
            ]
        infos.append(cmi.fit_keras(job, frames, labels, cfg))
        rates.append([line["lr"] for line in history(folder)])
        assert list(job.scratch.iterdir()) == []
    np.testing.assert_allclose(rates, [[4e-3, 4e-3, 4e-3, 4e-3, 2e-3]] * 2, rtol=1e-5)
    for info in infos:
        assert (info["epochs"], info["best_epoch"], info["val_loss"]) == (5, 2, 0.5)
    proba = [answer(tmp_path / str(kill), labels, frames) for kill in (None, 3)]
    np.testing.assert_allclose(proba[0], proba[1], atol=1e-6)
    job = job_in(tmp_path / "None", subject)
    guess = cmi.gesture_proba(proba[0][0, job.valid], labels.table).argmax(axis=1)
    assert (guess == labels.gesture[job.valid]).mean() == pytest.approx(infos[0]["val_acc"])


def test_a_checkpoint_of_other_settings_or_rows_is_refused_by_name(
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    frames, labels, subject = data
    job = job_in(tmp_path, subject)
    with monkeypatch.context() as patch:
        patch.setattr(cmi, "train_epoch", killed_in(1, cmi.train_epoch))
        with pytest.raises(Killed):
            cmi.fit_keras(job, frames, labels, config())
    state = functools.partial(cmi.keras_resumable, job)
    assert state(config()) == "resumable at epoch 1 of 3"
    assert "KERAS_LR 0.004 → 0.003" in (state(config(keras_lr=3e-3)) or "")
    assert state(config(resume=False)) is None
    assert state(config(resume_keras=False)) is None
    other = cmi.dataclasses.replace(job, train=job.train[1:])
    assert "training rows differ" in (cmi.keras_resumable(other, config()) or "")
    changed = cmi.Frames(frames.start, frames.x + 1, frames.groups)
    capsys.readouterr()
    cmi.fit_keras(job, changed, labels, config())
    printed = capsys.readouterr().out
    assert "refused" in printed
    assert "input differ" in printed
    assert [line["epoch"] for line in history(tmp_path)] == [1, 1, 2, 3]


def test_a_checkpoint_of_another_precision_is_refused_by_name(
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As when a training that began without a card goes on with one."""
    job = job_in(tmp_path, data[2])
    monkeypatch.setattr(cmi, "train_epoch", killed_in(1, cmi.train_epoch))
    with pytest.raises(Killed):
        cmi.fit_keras(job, *data[:2], config())
    monkeypatch.setattr(cmi, "dtype_policy", lambda _: "mixed_bfloat16")
    monkeypatch.setattr(cmi, "train_keras", ends_at_once)
    with pytest.raises(Killed):
        cmi.fit_keras(job, *data[:2], config())
    printed = capsys.readouterr().out
    assert re.search(r"refused .*checkpoint=.?precision float32 → mixed_bfloat16", printed)
    assert not cmi.keras_checkpoint(job).exists()


def test_a_torn_checkpoint_is_named(tmp_path: Path, data: Data) -> None:
    job = job_in(tmp_path, data[2])
    job.scratch.mkdir(parents=True)
    cmi.keras_checkpoint(job).write_bytes(b"PK\x03\x04 torn")
    assert cmi.keras_resumable(job, config()) == "fold00.npz is damaged"
    with pytest.raises(ValueError, match=r"fold00\.npz.*Delete it"):
        cmi.read_checkpoint(job, config())


def test_when_memory_runs_out_micro_batches_halve_and_the_step_stays(
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import tensorflow as tf

    frames, labels, subject = data
    whole, seen = cmi.train_epoch, []

    def train_epoch(run: cmi.KerasRun, batches: Iterator[Any], epoch: int, told: Any) -> Any:
        seen.append((epoch, run.size, run.accumulate, run.steps))
        if epoch >= 1 and run.size > 4:
            raise tf.errors.ResourceExhaustedError(None, None, "injected")
        return whole(run, batches, epoch, told)

    monkeypatch.setattr(cmi, "train_epoch", train_epoch)
    monkeypatch.setattr(cmi, "keras_batch", lambda *_: 8)
    info = cmi.fit_keras(job_in(tmp_path, subject), frames, labels, config(keras_max_epochs=2))
    assert seen == [(0, 8, 1, 9), (1, 8, 1, 9), (1, 4, 2, 18)]
    assert "micro_batch=4  accumulate=2" in capsys.readouterr().out
    assert info["epochs"] == 2
    assert info["batch"] == 4
    assert np.isfinite(info["loss"])


def test_a_retreat_goes_on_from_this_runs_own_epochs_without_resume_too(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorflow as tf

    frames, labels, subject = data
    whole, sums = cmi.train_epoch, []

    def train_epoch(run: cmi.KerasRun, batches: Iterator[Any], epoch: int, told: Any) -> Any:
        if epoch == 1:
            sums.append(float(run.trainer.network.trainable_variables[0].numpy().sum()))
            if run.size > 4:
                raise tf.errors.ResourceExhaustedError(None, None, "injected")
        return whole(run, batches, epoch, told)

    monkeypatch.setattr(cmi, "train_epoch", train_epoch)
    monkeypatch.setattr(cmi, "keras_batch", lambda *_: 8)
    cfg = config(keras_max_epochs=2, resume=False)
    cmi.fit_keras(job_in(tmp_path, subject), frames, labels, cfg)
    assert len(sums) == 2
    assert sums[0] == sums[1], "not back to untrained kernels"


def test_accumulated_micro_batches_are_one_step(data: Data, tmp_path: Path) -> None:
    run = run_of(data, tmp_path, size=4)
    run.accumulate = 2
    assert run.steps == 18
    trainer = run.trainer
    trainer.begin(
        np.random.default_rng(0),
        1e-3,
        np.zeros(N_CHANNELS, np.float32),
        np.ones(N_CHANNELS, np.float32),
    )
    kernel = trainer.network.get_layer("dense").kernel
    moved, before = [], np.asarray(kernel)
    for batch in cmi.keras_batches(run, range(4)):
        trainer.step(*batch)
        moved.append(bool(np.abs(np.asarray(kernel) - before).max() > 1e-7))
        before = np.asarray(kernel)
    assert moved == [False, True, False, True]


def test_a_batch_of_one_trains(data: Data, tmp_path: Path) -> None:
    run = run_of(data, tmp_path, size=1)
    run.accumulate = 2  # as in the test before, which has traced this trainer
    trainer = run.trainer
    trainer.begin(
        np.random.default_rng(0),
        1e-3,
        np.zeros(N_CHANNELS, np.float32),
        np.ones(N_CHANNELS, np.float32),
    )
    told = [np.asarray(trainer.step(*batch)) for batch in cmi.keras_batches(run, range(2))]
    assert np.isfinite(told).all()
    assert all(np.isfinite(v).all() for v in trainer.values().values())


def test_half_precision_stays_finite_and_leaks_nowhere(
    keras: Any, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames, labels, subject = data
    loud = cmi.Frames(frames.start, np.where(frames.x > 2, frames.x * 1e6, frames.x), frames.groups)
    job = job_in(tmp_path, subject)
    info = cmi.fit_keras(
        job, loud, labels, config(keras_policy="mixed_float16", keras_max_epochs=2)
    )
    assert "policy=mixed_float16" in capsys.readouterr().out
    assert all(np.isfinite(v) for v in info.values())
    assert keras.config.dtype_policy().name == "float32"
    values = values_in(job.folder / "fold00.keras")
    assert all(np.isfinite(v).all() for v in values.values())
    assert {v.dtype for v in values.values() if v.dtype.kind == "f"} == {np.dtype("float32")}
    assert np.isfinite(answer(tmp_path, labels, loud)).all()
    net = cmi.keras_network(SPEC, "mixed_float16")
    assert net.get_layer("imu1_conv1").compute_dtype == "float16"
    assert net.get_layer("gesture").compute_dtype == "float32"


def test_imu_mode_and_ten_recordings(data: Data, tmp_path: Path) -> None:
    """A smoke run on few real rows: one branch, tiny batches, labels that training never saw."""
    frames, labels, _ = data
    imu = frames.of_mode("imu")
    assert imu.x.shape[1] == 11
    job = cmi.Job(
        "keras", "imu", 1, 2, np.arange(9), np.arange(9, 14),
        tmp_path / "keras_models" / "imu", tmp_path / "scratch", tmp_path / "logs",
    )  # fmt: skip
    info = cmi.fit_keras(job, imu, labels, config(keras_max_epochs=2, keras_es_patience=1))
    assert info["batch"] == 4
    model = cmi.load_keras(job.folder, ["fold02_seed1"], labels.table, config())
    assert np.isfinite(cmi.predict_keras(model, imu)).all()
    with pytest.raises(ValueError, match=r"other channels.*tof_1"):
        cmi.predict_keras(model, frames)


def test_settings_that_cannot_work_are_named() -> None:
    with pytest.raises(cmi.ConfigError, match=r"KERAS_WIDTH=24.*multiple of 16"):
        config(keras_width=24)
    with pytest.raises(cmi.ConfigError, match=r"KERAS_POLICY=half.*mixed_float16"):
        config(keras_policy="half")
    assert cmi.dtype_policy(config(keras_policy="mixed_bfloat16")) == "mixed_bfloat16"


# ---------------------------------------------------------------- files


def test_files_that_do_not_belong_are_refused(fitted: Fitted, data: Data, tmp_path: Path) -> None:
    _, job, _ = fitted
    _, labels, _ = data
    whole = (job.folder / "fold00.keras").read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "text": b"no zip", "empty": b""}.items():
        (tmp_path / f"{name}.keras").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.keras is no network of this pipeline"):
            cmi.load_keras(tmp_path, [name], labels.table, config())
    with pytest.raises(ValueError, match="other labels"):
        cmi.load_keras(job.folder, ["fold00"], labels.table[::-1], config())
    other = cmi.keras_network(cmi.dataclasses.replace(SPEC, rows=ROWS + 2))
    shutil.copy(job.folder / "fold00.keras", tmp_path / "fold00.keras")
    other.save(tmp_path / "fold01.keras")
    with pytest.raises(ValueError, match="fold01 is built unlike fold00"):
        cmi.load_keras(tmp_path, ["fold00", "fold01"], labels.table, config())


def test_no_class_or_function_named_in_a_file_is_looked_up(
    fitted: Fitted, data: Data, tmp_path: Path
) -> None:
    """Every layer of this file claims to be a function of a module that would run on import."""
    folder, job, _ = fitted
    frames, labels, _ = data
    (tmp_path / "keras_models" / "all").mkdir(parents=True)
    target = tmp_path / "keras_models" / "all" / "fold00.keras"
    with zipfile.ZipFile(job.folder / "fold00.keras") as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config_json = json.loads(content)
                for layer in config_json["config"]["layers"]:
                    layer.update(module="antigravity", class_name="run", registered_name="run")
                content = json.dumps(config_json).encode()
            new.writestr(name, content)
    proba = answer(tmp_path, labels, frames)
    assert "antigravity" not in sys.modules
    np.testing.assert_allclose(proba, answer(folder, labels, frames), atol=1e-6)


READER = """
import os, sys
sys.path.insert(0, {root!r})
import numpy as np
import cmi_pipeline as cmi
assert not {{"keras", "tensorflow", "torch", "jax"}} & set(sys.modules)
if {backend!r} == "tensorflow":
    tf, keras = cmi.keras_quietly(2)
else:
    os.environ["KERAS_BACKEND"] = {backend!r}
    import keras
assert keras.backend.backend() == {backend!r}
for make in (cmi.standardise_class, cmi.recurrent_class, cmi.attention_class, cmi.composite_class):
    make()
net = keras.models.load_model({path!r}, compile=False, safe_mode=True)
rows = np.load({rows!r})
np.save({out!r}, keras.ops.convert_to_numpy(net(rows)))
print("fine")
"""


def test_a_fresh_process_reads_the_file_in_safe_mode_under_every_backend(
    fitted: Fitted, tmp_path: Path
) -> None:
    _, job, _ = fitted
    path = job.folder / "fold00.keras"
    network, _ = cmi.keras_graph(cmi.KerasSpec.read(path), config().keras_jit)
    network.load_weights(path)
    rows = some_rows()
    np.save(tmp_path / "rows.npy", rows)
    want = np.asarray(network(rows))
    env = {
        k: v for k, v in os.environ.items() if k not in ("KERAS_BACKEND", "TF_CPP_MIN_LOG_LEVEL")
    }
    started = {}
    for backend in ("tensorflow", "torch", "jax"):
        if importlib.util.find_spec(backend):
            script = READER.format(
                root=str(Path(cmi.__file__).parent), backend=backend, path=str(path),
                rows=str(tmp_path / "rows.npy"), out=str(tmp_path / f"{backend}.npy"),
            )  # fmt: skip
            started[backend] = subprocess.Popen(
                [sys.executable, "-c", script],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
            )
    for backend, process in started.items():
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        assert out.split() == ["fine"]
        if backend == "tensorflow":
            assert err == "", "start-up noise"
        np.testing.assert_allclose(np.load(tmp_path / f"{backend}.npy"), want, atol=1e-5)


def test_a_file_holds_no_code(fitted: Fitted) -> None:
    _, job, _ = fitted
    with zipfile.ZipFile(job.folder / "fold00.keras") as file:
        text = file.read("config.json").decode()
    classes = {
        layer["registered_name"] or layer["class_name"]
        for layer in json.loads(text)["config"]["layers"]
    }
    assert "Lambda" not in classes
    assert {c for c in classes if ">" in c} == {
        "cmi>Standardise", "cmi>BiLstmGru", "cmi>AttentionMean", "cmi>CompositeProba",
    }  # fmt: skip
    assert "__lambda__" not in text


def test_other_backends_cannot_train(monkeypatch: pytest.MonkeyPatch, keras: Any) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    cmi.keras_quietly.cache_clear()
    with pytest.raises(cmi.ConfigError, match="KERAS_BACKEND=jax"):
        cmi.keras_quietly(2)


def test_torch_still_trains_after_tensorflow() -> None:
    """Both bring an LLVM; loaded in the wrong order the second one ends the process."""
    if not importlib.util.find_spec("torch"):
        pytest.skip("Torch is not installed")
    steps = (
        "import cmi_pipeline as cmi; tf, _ = cmi.keras_quietly(1)",
        "import torch; weights = torch.nn.Parameter(torch.ones(2))",
        "optimizer = torch.optim.AdamW([weights], lr=0.5); weights.sum().backward()",
        "optimizer.step(); print(bool((weights < 1).all()), int(tf.constant(3)))",
    )
    ran = subprocess.run([sys.executable, "-c", "\n".join(steps)], capture_output=True, text=True)
    assert ran.stdout.split() == ["True", "3"], ran.stderr[-2000:]
