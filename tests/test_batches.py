"""Batches, the input of both networks: every column against slow loops, every change undone."""

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from made import GROUPS, changed, random_frames, recordings
from scipy.spatial.transform import Rotation

import cmi_pipeline as cmi

N_CHANNELS, ROW = 23, 3  # acc_mag counts the rows of all recordings
LENGTHS = [1, 7, 8, 9, 24, 25, 60, 33, 40, 12, 50, 31]
CHANGES = ("stretch", "shift", "jitter", "mixup", "time_mask", "channel_mask")
LARGE = 1000.0  # an sd so large that nothing is cut off: raw values are a batch's × LARGE


def config(**shares: Any) -> cmi.Config:
    """No change of recordings but those asked for."""
    shares = dict.fromkeys((*CHANGES, "modality_dropout"), 0.0) | shares
    return cmi.Config(fixed_pad_len=24, **{f"{name}_prob": p for name, p in shares.items()})


def make_frames(*, gaps: bool = False) -> cmi.Frames:
    made, rng = random_frames(LENGTHS), np.random.default_rng(1)
    if gaps:
        made.x[rng.random(made.x.shape) < 0.2] = np.nan
        made.x[made.start[3] : made.start[4], 4:7] = made.x[made.start[5] : made.start[6]] = np.nan
    made.x[:, ROW] = np.arange(len(made.x))
    return made


def make_batches(frames: cmi.Frames, cfg: cmi.Config, **fields: Any) -> Any:
    """Batches of raw values (see LARGE), with images; each recording has a label of its own."""
    n, n_rows, width = len(frames), *frames.x.shape
    phase = np.random.default_rng(1).integers(0, 2, n_rows).astype(np.uint8)
    labels = cmi.Labels.of(np.arange(n), np.arange(n) % 4, np.arange(n) % 2, phase)
    spec = cmi.network_spec(frames, labels.table, 16, images=True, cfg=cfg)
    scaling = {"mean": np.zeros(width, np.float32), "sd": np.full(width, LARGE, np.float32)}
    return cmi.Batches(frames, spec, **(scaling | {"labels": labels} | fields))


def epoch(made: Any, cfg: cmi.Config, n_batches: int = 3, seed: int = 0) -> Iterator[Any]:
    rng = np.random.default_rng(seed)
    return made.epoch(np.arange(len(made.frames)), n_batches, rng, cfg)


def epochs(made: Any, cfg: cmi.Config, n: int) -> Iterator[tuple[int, Any, Any, Any]]:
    """Number, label, rows and images, as given, of every recording in each of n epochs."""
    whose = np.argsort(made.labels.composite)
    for batch in (batch for seed in range(n) for batch in epoch(made, cfg, seed=seed)):
        np.testing.assert_allclose(batch.label.sum(axis=1), 1, atol=1e-6)
        for label, x, images in zip(batch.label, batch.x, batch.images, strict=True):
            length = round(x[:, -1].sum())
            assert (x[length:] == 0).all()
            assert (x[:length, -1] == 1).all()
            yield int(whose[label.argmax()]), label, x[:length], images[:length]


def test_a_batch_is_what_a_slow_loop_makes_of_each_recording() -> None:
    frames, rng = make_frames(gaps=True), np.random.default_rng(2)
    frames.x[3, 0] = 1e7  # as large as anything that a network is ever shown
    mean, sd = rng.normal(size=(2, N_CHANNELS)).astype(np.float32)
    sd = abs(sd) + 1
    mean[ROW], sd[ROW] = 150, 100
    batch = make_batches(frames, config(), mean=mean, sd=sd).plain(np.arange(12))
    assert batch.x.shape == (12, 24, N_CHANNELS + len(GROUPS) + 2)
    for b, end in enumerate(frames.start[1:]):
        n = min(LENGTHS[b], 24)
        assert batch.x[b, :, -1].sum() == n
        assert (batch.x[b, n:] == 0).all(), "padding is zero in every column"
        np.testing.assert_array_equal(batch.images[b, :n], frames.tof[end - n : end])
        for t, row in enumerate(frames.x[end - n : end]):
            wanted, left = [], iter(row)
            for value, m, s in zip(row, mean, sd, strict=True):
                wanted.append(0.0 if np.isnan(value) else min((value - m) / s, 10.0))
            for _, names in GROUPS:
                wanted.append(np.mean([not np.isnan(next(left)) for _ in names]))
            wanted += [(n - 1 - t) / 90, 1.0]
            np.testing.assert_allclose(batch.x[b, t], wanted, rtol=1e-5, atol=1e-6)


def test_standardisation_is_of_the_training_rows_alone() -> None:
    frames, train = make_frames(gaps=True), np.array([1, 3, 4, 6, 11])
    frames.x[:, 8], frames.x[:, 9] = np.nan, 7.0  # never there, and always the same
    rows = frames.take(train).x.astype(float)
    with pytest.warns(RuntimeWarning, match="empty|freedom"):
        mean, sd = np.nanmean(rows, axis=0), np.nanstd(rows, axis=0)
    mean[8], sd[8], sd[9] = 0, 1, 1
    got = cmi.standardisation(frames, train)
    np.testing.assert_allclose(got, [mean, sd], rtol=1e-5, atol=1e-5)
    frames.x[frames.start[0] : frames.start[1]] = 1e9  # no training row
    np.testing.assert_array_equal(cmi.standardisation(frames, train), got)


def test_company_and_neighbours_and_longer_padding_change_nothing() -> None:
    frames = make_frames(gaps=True)  # numpy's 80 % of LENGTHS is 38.6
    cfg = dataclasses.replace(config(), fixed_pad_len=0, pad_len_percentile=80)
    made = make_batches(frames, cfg)
    together = made.plain(np.arange(12)).x
    for i, length in enumerate(LENGTHS):
        lonely = dataclasses.replace(made, frames=frames.take(np.array([i])))
        short = lonely.plain(np.array([0])).x[0]
        assert len(short) == -(-min(length, 39) // 8) * 8
        np.testing.assert_array_equal(short, together[i, : len(short)])


def test_every_recording_comes_once_an_epoch_and_nothing_stored_is_touched() -> None:
    frames, cfg = make_frames(gaps=True), config(**dict.fromkeys(CHANGES, 1), modality_dropout=1)
    for stored in (frames.x, frames.tof):
        stored.flags.writeable = False  # type: ignore[union-attr]
    made = make_batches(frames, cfg)
    for a, b in zip(epoch(made, cfg, 5), epoch(made, cfg, 5), strict=True):
        np.testing.assert_array_equal(a.x, b.x)  # the same random numbers, the same batch
        np.testing.assert_array_equal(a.images, b.images)
    assert [len(batch) for batch in epoch(made, cfg, 5)] == [3, 3, 2, 2, 2]
    index, orders = np.array([2, 3, 5, 7, 8, 9, 10]), []
    for seed in (0, 1):
        drawn = made.epoch(index, 7, np.random.default_rng(seed), config())
        orders.append([code for batch in drawn for code in batch.label.argmax(axis=1)])
        assert sorted(orders[-1]) == sorted(made.labels.composite[index])
    assert orders[0] != orders[1]


def test_of_a_few_batches_the_short_recordings_come_together(monkeypatch: Any) -> None:
    """Two batches of three at a time here; which six these are is a matter of chance."""
    monkeypatch.setattr(cmi, "ALIKE", 2)
    made, sixes = make_batches(random_frames(range(1, 25)), config()), set()
    for seed in range(5):
        drawn = [batch.label.argmax(axis=1) for batch in epoch(made, config(), 8, seed)]
        lengths = [sorted(1 + np.argsort(made.labels.composite)[codes]) for codes in drawn]
        for short, long in zip(lengths[::2], lengths[1::2], strict=True):
            assert len(short) == len(long) == 3
            assert short[-1] < long[0]
            sixes.add((*short, *long))
    assert len(sixes) == 20


@pytest.mark.parametrize("kinds", [("stretch",), ("shift",), ("stretch", "shift")])
def test_stretched_and_shifted_rows_are_those_nearest_to_an_even_pace(kinds: Any) -> None:
    frames, cfg, cuts, paces = make_frames(gaps=True), config(**dict.fromkeys(kinds, 1)), set(), []
    for i, _, x, _ in epochs(make_batches(frames, cfg), cfg, 12):
        place, steps = np.rint(x[:, ROW] * LARGE).astype(int), np.arange(len(x))[::-1]
        wanted = np.nan_to_num(frames.x[place])
        np.testing.assert_allclose(x[:, :N_CHANNELS] * LARGE, wanted, rtol=1e-5, atol=1e-4)
        cuts.add(frames.start[i + 1] - 1 - place[-1])
        left_over = place[0] - frames.start[i]
        assert left_over >= 0, "of the neighbour"
        assert left_over < 1.6 or len(x) == 24
        slow, fast = ((place[-1] - place + half)[:-1] / steps[:-1] for half in (-0.5, 0.5))
        if len(x) == 24:
            paces.append((slow.max() + fast.min()) / 2)
        assert len(x) == 1 or slow.max() <= fast.min() + 1e-9, "one pace fits all rows"
    assert cuts == (set(range(7)) if "shift" in kinds else {0})
    extremes = (0.9, 1.1) if "stretch" in kinds else (1, 1)
    np.testing.assert_allclose((min(paces), max(paces)), extremes, atol=0.03)


def test_jitter_is_what_the_sensors_of_a_wristband_askew_would_tell() -> None:
    """One rotation per recording, found again by scipy, applied to the device and computed anew."""
    rec, cfg, angles = recordings([24, 24, 20, 22], seed=3), config(jitter=1.0), []
    frames = cmi.extract_features(rec, table=False)[1]
    stems = ("acc", "up", "north", "west", "lin", "omega", "jerk")
    columns = [[frames.names.index(f"{stem}_{axis}") for axis in "xyz"] for stem in stems]
    for i, _, x, _ in epochs(make_batches(frames, cfg), cfg, 1):
        plain = make_batches(frames, cfg).plain(np.array([i])).x[0, : len(x)]
        after, before = (rows[:, columns].reshape(-1, 3) * LARGE for rows in (x, plain))
        turn = Rotation.align_vectors(after, before)[0]
        angles.append(turn.magnitude())
        device = Rotation.from_quat(rec.rot, scalar_first=True) * turn.inv()
        quat = device.as_quat(scalar_first=True).astype(np.float32)
        askew = changed(rec, acc=turn.apply(rec.acc).astype(np.float32), rot=quat)
        expected = cmi.extract_features(askew, table=False)[1].take(np.array([i])).x
        given = x[:, : len(frames.names)] * LARGE
        np.testing.assert_allclose(given, expected, rtol=1e-3, atol=5e-3)
    assert len({round(angle, 4) for angle in angles}) == 4
    assert 0.02 < np.median(angles) < 0.6


def test_mixup_mixes_rows_and_labels_alike_and_aligns_the_ends() -> None:
    frames, cfg, shares = make_frames(gaps=True), config(mixup=1.0), []
    made = make_batches(frames, cfg)
    whose = np.argsort(made.labels.composite)
    for own, label, x, _ in epochs(made, cfg, 5):
        share, other = float(label.max()), whose[np.argsort(-label, kind="stable")[1]]
        shares.append(share)
        for back, row in enumerate(x[::-1, :N_CHANNELS] * LARGE):
            wanted = frames.x[frames.start[own + 1] - 1 - back]
            theirs = frames.start[other + 1] - 1 - back
            if share < 1 and theirs >= frames.start[other]:
                mixture = share * wanted + (1 - share) * frames.x[theirs]
                wanted = np.where(np.isnan(mixture), wanted, mixture)
            np.testing.assert_allclose(row, np.nan_to_num(wanted), rtol=1e-4, atol=1e-2)
    assert min(shares) > 0.5 - 1e-6
    assert 35 < sum(share < 0.999 for share in shares) < 60, "some partners are oneself"


def test_masks_make_rows_and_channels_of_the_recording_missing() -> None:
    """A recording in which the same is missing gives the same input, to the bit."""
    frames, cfg = make_frames(), config(modality_dropout=0.5, time_mask=0.8, channel_mask=0.8)
    mean, holes, shares = np.full(N_CHANNELS, 0.3, np.float32), [], []
    for i, _, x, _ in epochs(make_batches(frames, cfg, mean=mean), cfg, 20):
        gone = x[:, :N_CHANNELS] == 0
        silent = gone.all(axis=1)
        holes.append(silent.sum())
        assert np.abs(np.diff(np.r_[0, silent, 0])).sum() in (0, 2), "one gap"
        if not silent.all():
            lost = gone[~silent].all(axis=0)
            np.testing.assert_array_equal(gone, silent[:, None] | lost)
            shares.append(lost[:11].mean())  # of the channels of the IMU
        lonely = frames.take(np.array([i]))
        lonely.x[-len(x) :][gone] = np.nan
        expected = make_batches(lonely, cfg, mean=mean).plain(np.array([0])).x[0]
        np.testing.assert_array_equal(x, expected[: len(x)])
    assert max(holes) == 12
    assert 0.6 < np.mean(np.array(holes) > 0) < 0.95
    assert 0.04 < np.mean(shares) < 0.12


def test_sensors_lost_in_training_look_as_recordings_without_them() -> None:
    """From raw recordings through every channel and the ToF images; a third each way."""
    rec, cfg = recordings([20, 24, 9, 24], seed=6), config(modality_dropout=0.6)
    seen, without = [], {}
    for loss in ((0, 0), (1, 0), (0, 1), (1, 1)):
        thm = np.where(loss[0], np.float32(np.nan), rec.thm)
        tof = np.where(loss[1], np.uint8(255), rec.tof)
        frames = cmi.extract_features(changed(rec, thm=thm, tof=tof), table=False)[1]
        without[loss] = make_batches(frames, cfg).plain(np.arange(4))
    frames = cmi.extract_features(rec, table=False)[1]
    far = [np.char.startswith(frames.names, sensor) for sensor in ("thm_", "tof_")]
    for i, _, x, images in epochs(make_batches(frames, cfg), cfg, 150):
        loss = tuple(int((x[:, : len(own)][:, own] == 0).all()) for own in far)
        seen.append(loss)
        np.testing.assert_array_equal(x, without[loss].x[i, : len(x)])
        np.testing.assert_array_equal(images, without[loss].images[i, : len(x)])
    shares = [seen.count(loss) / len(seen) for loss in without]
    np.testing.assert_allclose(shares, [0.4, 0.2, 0.2, 0.2], atol=0.06)


def test_targets_are_counted_by_hand() -> None:
    phase = np.zeros(59, np.uint8)
    phase[[*range(5, 10), 19, *range(26, 29), *range(53, 59)]] = 1
    codes = (np.array(own) for own in ([4, 4, 9], [0, 1, 1], [1, 0, 0]))
    labels = cmi.Labels.of(*codes, phase=phase)
    assert labels.table.tolist() == [[0, 1, 4], [0, 1, 9], [1, 0, 4]]
    made = make_batches(random_frames([20, 9, 30]), config(), labels=labels)
    batch = next(epoch(made, config(), 1))
    order = np.argsort(batch.label.argmax(axis=1))
    assert batch.label[order].tolist() == np.eye(3).tolist()
    # recordings 1, 2, 0: its 9 rows in steps of 8; its last 24 rows; its 20 rows
    wanted = [[2 / 8, 1, 0], [0, 0, 6 / 8], [3 / 8, 2 / 8, 1 / 4]]
    np.testing.assert_allclose(batch.phase[order], wanted)


def test_prefetched_batches_come_in_order_and_leave_no_thread() -> None:
    made, before = make_batches(make_frames(), config()), threading.active_count()
    direct, ahead = list(epoch(made, config(), 6)), cmi.prefetched(epoch(made, config(), 6))
    for a, b in zip(direct, ahead, strict=True):
        np.testing.assert_array_equal(a.x, b.x)
    stopped: Any = cmi.prefetched(epoch(made, config(), 6))
    next(stopped)
    stopped.close()  # as when a step fails
    assert threading.active_count() == before
