"""Reading: the same object from a file and from a frame, and what becomes of damaged input."""

import functools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from made import PERSON, SENSORS
from runs import Printed

import cmi_pipeline as cmi
import cmi_simulator

OOPS = re.compile(r"^((?:[^,]*,){9})[^,]*")  # the tenth cell
DAMAGE: tuple[tuple[Any, str, tuple[int, int]], ...] = (  # lost rows, lost values
    (lambda x: [x[0], *x[100:300], *x[1:100], *x[300:]], "out of order or twice", (0, 0)),
    (lambda x: [*x[:5], x[6], x[5], *x[7:40], *x[60:], *x[40:60]], "out of order", (0, 0)),
    (lambda x: [*x[:9], x[8], *x[9:]], "out of order or twice", (0, 0)),
    (lambda x: [*x[:-1], x[-1][:-900]], "cut off", (1, 0)),
    (lambda x: [*x[:36], OOPS.sub(r"\1oops", x[36]), *x[37:]], "oops", (0, 1)),
)
SIGNALS = ("acc", "rot", "thm", "tof", "start", "person", "subject", "sequence_id")
read = functools.partial(pl.read_csv, glob=False, infer_schema_length=None)
Lines = list[str]
Change = Callable[[Lines], Lines]
Damaged = Callable[[Change], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("data") / "sim [2025] *"  # no pattern for any reader
    cmi_simulator.simulate(out, subjects=4, test_subjects=1, recordings_per_subject=6, seed=5)
    return out


@pytest.fixture(scope="module")
def rec(folder: Path) -> cmi.Recordings:
    return cmi.read_train(folder)


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Damaged:
    """A copy of the folder whose train.csv, line by line, went through a change."""
    copy = shutil.copytree(folder, tmp_path / "data")
    lines = (folder / "train.csv").read_text().splitlines(keepends=True)

    def changed(change: Change) -> Path:
        (copy / "train.csv").write_text("".join(change(lines)))
        return copy

    return changed


def assert_same(one: cmi.Recordings, other: cmi.Recordings) -> None:
    for name in SIGNALS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_every_value_arrives(folder: Path, rec: cmi.Recordings) -> None:
    """Against a plain loop over the rows that polars reads as text."""
    wearers = {row["subject"]: row for row in read(folder / "train_demographics.csv").to_dicts()}
    raw, labels, row = read(folder / "train.csv", infer_schema=False), rec.labels, 0
    assert labels is not None
    for i, part in enumerate(raw.partition_by("sequence_id")):
        about = part.row(0, named=True)
        assert (rec.sequence_id[i], rec.subject[i]) == (about["sequence_id"], about["subject"])
        assert rec.start[i] == row
        assert cmi.GESTURES[labels.gesture[i]] == about["gesture"]
        assert cmi.ORIENTATIONS[labels.orientation[i]] == about["orientation"]
        assert cmi.BEHAVIORS[labels.behavior[i]] == about["behavior"]
        person = [wearers[about["subject"]][c] for c in PERSON]
        np.testing.assert_array_equal(rec.person[i], np.float32(person))
        for phase, *values in part.select("phase", *SENSORS).iter_rows():
            numbers = [np.nan if v is None else float(v) for v in values]
            pixels = [255 if np.isnan(v) else 254 if v == -1 else int(v) for v in numbers[12:]]
            ours = np.r_[rec.acc[row], rec.rot[row], rec.thm[row], rec.tof[row].ravel()]
            np.testing.assert_array_equal(ours, np.float32([*numbers[:12], *pixels]))
            assert labels.phase[row] == (phase == "Gesture")
            row += 1
    assert row == len(rec.acc) == rec.start[-1]


def test_a_frame_gives_the_same_of_whatever_type_it_is(folder: Path, rec: cmi.Recordings) -> None:
    """As text, whole numbers, nothing at all, or not at all; the same of demographics."""
    frame, person = read(folder / "train.csv"), read(folder / "train_demographics.csv")
    for i in (0, 7, len(rec) - 1):
        own = frame.filter(sequence_id=str(rec.sequence_id[i]))
        whole = own.with_columns(pl.col(SENSORS[12:]).cast(pl.Int16))
        for like in (own, own.with_columns(pl.col(SENSORS).cast(pl.String)), whole):
            assert_same(cmi.to_recordings(like, pl.concat([person, person])), rec.part(i, i + 1))
    blank = [pl.lit(None, pl.Null).alias("thm_1"), pl.lit(None, pl.String).alias("thm_2")]
    fewer = cmi.to_recordings(own.with_columns(blank).drop("tof_3_v7", "acc_y"), person)
    assert np.isnan(fewer.thm[:, :2]).all()
    assert np.isnan(fewer.acc[:, 1]).all()
    assert (fewer.tof[:, 2, 0, 7] == 255).all()
    odd = pl.Series([-1.0, 0, 249, 250, -2, 1e9, np.nan, np.inf])
    one = cmi.to_recordings(own.head(8).with_columns(tof_1_v0=odd), person)
    assert one.tof[:, 0, 0, 0].tolist() == [254, 0, 249, 255, 255, 255, 255, 255]
    endless = cmi.to_recordings(own.with_columns(acc_x=pl.lit(np.inf)), person)
    assert np.isnan(endless.acc[:, 0]).all()
    for rows in (person.clear(), person.with_columns(subject=pl.lit("SUBJ_XXXXXX"))):
        stranger = cmi.to_recordings(own, rows).person[0]
        assert stranger[3] == 1, "right-handed"
        assert np.isnan(np.delete(stranger, 3)).all()
    words = cmi.to_recordings(own, person.with_columns(age=pl.lit("twelve"))).person[0]
    assert np.isnan(words).tolist() == [False, True, *[False] * 5]


@pytest.mark.parametrize(("change", "told", "lost"), DAMAGE)
def test_damage(rec: Any, damaged: Any, capsys: Any, change: Any, told: str, lost: Any) -> None:
    """It is told and costs no more than it must."""
    found = cmi.read_train(damaged(change))
    assert told in capsys.readouterr().out
    assert sorted(found.sequence_id) == sorted(rec.sequence_id)
    more_gaps = np.isnan(found.acc).sum() - np.isnan(rec.acc).sum()
    assert (len(rec.acc) - len(found.acc), more_gaps) == lost
    for i, name in enumerate(found.sequence_id):
        j = int(np.flatnonzero(rec.sequence_id == name)[0])
        one, other = found.part(i, i + 1), rec.part(j, j + 1)
        np.testing.assert_array_equal(one.tof, other.tof[: len(one.tof)])
        known = ~np.isnan(one.acc)
        np.testing.assert_array_equal(one.acc[known], other.acc[: len(one.acc)][known])


def replacing(old: str, new: str) -> Change:
    return lambda lines: [line.replace(old, new) for line in lines]


def test_a_file_that_cannot_be_used_says_why(damaged: Damaged) -> None:
    unusable = (
        (lambda _: [], "train.csv is empty"),
        (lambda lines: lines[:1], "has a header but no rows"),
        (replacing("acc_y", "acc_q"), "has no column acc_y"),
        (replacing("Cheek -", "Cheek:"), "gesture 'Cheek: pinch skin' of SEQ_"),
        (replacing(",Gesture,", ",Rest,"), "phase 'Rest'"),
    )
    for change, message in unusable:
        with pytest.raises(cmi.DataError, match=message):
            cmi.read_train(damaged(change))


def test_marks_of_windows_change_nothing(rec: cmi.Recordings, damaged: Damaged) -> None:
    marked = damaged(lambda lines: ["\ufeff", *(line.replace("\n", "\r\n") for line in lines)])
    assert_same(cmi.read_train(marked), rec)


def test_contradictions_are_told(damaged: Damaged, capsys: Printed) -> None:
    """One person described twice; another gesture in the first recording's last row."""
    data = damaged(lambda lines: lines)
    train, people = read(data / "train.csv"), read(data / "train_demographics.csv")
    older = people[:1].with_columns(age=pl.col("age") + 9)
    pl.concat([people, people, older]).write_csv(data / "train_demographics.csv")
    first, kinds = train["sequence_id"][0], train["gesture"].unique().sort()
    last = pl.int_range(pl.len()) == len(train.filter(sequence_id=first)) - 1
    other = pl.lit(kinds.filter(kinds != train["gesture"][0])[0])
    gesture = pl.when(last).then(other).otherwise("gesture")
    train.with_columns(gesture=gesture).write_csv(data / "train.csv")
    cmi.read_train(data)
    told = re.findall(r"contradicts_itself=(\S+)  of=1 ", capsys.readouterr().out)
    assert told == [people["subject"][0], first]


def test_the_cache_notices_change(rec: Any, damaged: Damaged, tmp_path: Path, capsys: Any) -> None:
    """And a damaged cache."""
    data, cfg = damaged(lambda lines: lines), cmi.Config(output_path=tmp_path / "out")
    (_, digest), (again, same) = (cmi.cached_recordings(data, cfg) for _ in range(2))
    assert "action=reuse" in capsys.readouterr().out
    assert digest == same
    assert_same(again, rec)
    assert again.labels
    np.testing.assert_array_equal(again.labels.composite, rec.labels.composite)
    (cache,) = (tmp_path / "out").rglob("recordings-*")
    cache.write_bytes(cache.read_bytes()[:-999])
    assert_same(cmi.cached_recordings(data, cfg)[0], rec)
    assert "action=reuse" not in capsys.readouterr().out, "a damaged cache is made again"
    damaged(lambda lines: lines[:-1])
    os.utime(data / "train.csv", ns=(0, 0))
    other, changed = cmi.cached_recordings(data, cfg)
    assert (len(other.acc), changed != digest) == (len(rec.acc) - 1, True)
    assert len([*(tmp_path / "out").rglob("recordings-*")]) == 1, "older caches go"
