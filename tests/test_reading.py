"""Reading: the same object from a file and from a frame, and what becomes of damaged input."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import cmi_pipeline as cmi
import cmi_simulator

SENSORS = [
    *("acc_x", "acc_y", "acc_z", "rot_w", "rot_x", "rot_y", "rot_z"),
    *(f"thm_{i}" for i in range(1, 6)),
    *(f"tof_{i}_v{j}" for i in range(1, 6) for j in range(64)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("data") / "sim"
    cmi_simulator.simulate(out, subjects=4, test_subjects=1, recordings_per_subject=6, seed=5)
    return out


def damaged(folder: Path, tmp_path: Path, change: Callable[[list[str]], str]) -> Path:
    """A copy of the folder whose train.csv went through `change`, line by line."""
    for path in folder.glob("*.csv"):
        (tmp_path / path.name).write_text(path.read_text())
    lines = (folder / "train.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text(change(lines))
    return tmp_path


def test_every_value_arrives(folder: Path) -> None:
    """Against a plain loop over the rows that polars reads as text."""
    rec = cmi.read_train(folder)
    raw = pl.read_csv(folder / "train.csv", infer_schema=False)
    row = 0
    for i, (name, part) in enumerate(raw.group_by("sequence_id", maintain_order=True)):
        assert rec.sequence_id[i] == name[0]
        assert rec.start[i] == row
        assert rec.labels is not None
        assert cmi.GESTURES[rec.labels.gesture[i]] == part["gesture"][0]
        assert cmi.ORIENTATIONS[rec.labels.orientation[i]] == part["orientation"][0]
        assert cmi.BEHAVIORS[rec.labels.behavior[i]] == part["behavior"][0]
        for values in part.select(SENSORS).iter_rows():
            numbers = [np.nan if v is None else float(v) for v in values]
            np.testing.assert_array_equal(rec.acc[row], np.float32(numbers[:3]))
            np.testing.assert_array_equal(rec.rot[row], np.float32(numbers[3:7]))
            np.testing.assert_array_equal(rec.thm[row], np.float32(numbers[7:12]))
            pixels = [255 if np.isnan(v) else 254 if v == -1 else int(v) for v in numbers[12:]]
            np.testing.assert_array_equal(rec.tof[row].ravel(), pixels)
            row += 1
    assert row == len(rec.acc)
    assert rec.start[-1] == row


def test_phase_and_demographics_arrive(folder: Path) -> None:
    rec = cmi.read_train(folder)
    raw = pl.read_csv(folder / "train.csv", columns=["phase", "subject"])
    assert rec.labels is not None
    assert (rec.labels.phase == (raw["phase"] == "Gesture").to_numpy()).all()
    person = pl.read_csv(folder / "train_demographics.csv")
    for i in range(len(rec)):
        row = person.row(by_predicate=pl.col("subject") == str(rec.subject[i]), named=True)
        expected = [row[c] for c in cmi.PERSON]
        np.testing.assert_allclose(rec.person[i], expected, rtol=1e-6)


def test_a_recording_from_the_gateway_is_the_one_from_the_file(folder: Path) -> None:
    rec = cmi.read_train(folder)
    frame = pl.read_csv(folder / "train.csv", infer_schema_length=None)
    person = pl.read_csv(folder / "train_demographics.csv")
    for i in (0, 7, len(rec) - 1):
        own = frame.filter(pl.col("sequence_id") == str(rec.sequence_id[i]))
        one = cmi.to_recordings(own, person.filter(pl.col("subject") == str(rec.subject[i])))
        other = rec.part(i, i + 1)
        for name in ("acc", "rot", "thm", "tof", "person", "subject", "sequence_id", "start"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_text_null_and_integer_columns_are_cast(folder: Path) -> None:
    frame = pl.read_csv(folder / "train.csv", infer_schema_length=None)
    frame = frame.filter(pl.col("sequence_id") == frame["sequence_id"][0])
    person = pl.read_csv(folder / "train_demographics.csv")
    plain = cmi.to_recordings(frame, person)
    text = frame.with_columns(pl.col(SENSORS).cast(pl.String))
    np.testing.assert_array_equal(cmi.to_recordings(text, person).acc, plain.acc)
    np.testing.assert_array_equal(cmi.to_recordings(text, person).tof, plain.tof)
    whole = frame.with_columns(pl.col(SENSORS[12:]).cast(pl.Int16))
    np.testing.assert_array_equal(cmi.to_recordings(whole, person).tof, plain.tof)
    for kind in (pl.String, pl.Null, pl.Float64):
        blank = frame.with_columns(pl.lit(None, kind).alias(c) for c in SENSORS[7:])
        rec = cmi.to_recordings(blank, person)
        assert np.isnan(rec.thm).all()
        assert (rec.tof == 255).all()
    fewer = cmi.to_recordings(frame.drop("tof_3_v7", "acc_y"), person)
    assert np.isnan(fewer.acc[:, 1]).all()
    assert (fewer.tof[:, 2, 0, 7] == 255).all()


def test_impossible_values_are_missing() -> None:
    tof = np.array([-1, 0, 249, 250, -2, 1e9, np.nan, np.inf], np.float32)
    assert cmi.pixel_codes(tof).tolist() == [254, 0, 249, 255, 255, 255, 255, 255]
    frame = pl.DataFrame({"a": [1.0, float("inf"), None], "b": ["x", "2.5", None]})
    np.testing.assert_array_equal(
        cmi.numbers(frame, ("a", "b")), np.float32([[1, np.nan], [np.nan, 2.5], [np.nan, np.nan]])
    )


def test_demographics_may_be_absent_double_or_text(folder: Path) -> None:
    frame = pl.read_csv(folder / "test.csv", infer_schema_length=None)
    frame = frame.filter(pl.col("sequence_id") == frame["sequence_id"][0])
    person = pl.read_csv(folder / "test_demographics.csv")
    right = cmi.PERSON.index("handedness")
    for rows in (person.clear(), person.with_columns(subject=pl.lit("SUBJ_XXXXXX"))):
        rec = cmi.to_recordings(frame, rows)
        assert rec.person[0, right] == 1
        assert np.isnan(np.delete(rec.person[0], right)).all()
    words = person.with_columns(age=pl.lit("twelve"))
    assert np.isnan(cmi.to_recordings(frame, words).person[0, cmi.PERSON.index("age")])
    twice = cmi.to_recordings(frame, pl.concat([person, person]))
    np.testing.assert_array_equal(twice.person, cmi.to_recordings(frame, person).person)


def test_a_subject_without_demographics_is_told_and_right_handed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged(folder, tmp_path, lambda lines: "\n".join(lines) + "\n")
    person = pl.read_csv(tmp_path / "train_demographics.csv")
    person[1:].write_csv(tmp_path / "train_demographics.csv")
    rec = cmi.read_train(tmp_path)
    gone = rec.subject == person["subject"][0]
    assert gone.any()
    assert (rec.person[gone, cmi.PERSON.index("handedness")] == 1).all()
    assert f"no_demographics={person['subject'][0]}" in capsys.readouterr().out


def test_a_text_in_a_number_column_becomes_missing_and_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(lines: list[str]) -> str:
        cells = lines[36].split(",")
        cells[9] = "oops"
        return "\n".join([*lines[:36], ",".join(cells), *lines[37:]]) + "\n"

    rec, whole = cmi.read_train(damaged(folder, tmp_path, spoil)), cmi.read_train(folder)
    assert np.isnan(rec.acc[35, 0])
    keep = np.arange(len(whole.acc)) != 35
    np.testing.assert_array_equal(rec.acc[keep], whole.acc[keep])
    assert "line=37  column=acc_x  text='oops'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0], *lines[100:300], *lines[1:100], *lines[300:]],
        lambda lines: [lines[0], *lines[1:40], *lines[60:], *lines[40:60]],
        lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]],
        lambda lines: [*lines[:9], lines[8], *lines[9:]],
    ],
    ids=["cut in two", "end of file", "swapped", "twice"],
)
def test_rows_out_of_order_are_put_right(
    folder: Path,
    tmp_path: Path,
    change: Callable[[list[str]], list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rec = cmi.read_train(damaged(folder, tmp_path, lambda lines: "\n".join(change(lines)) + "\n"))
    whole = cmi.read_train(folder)
    assert "out of order or twice" in capsys.readouterr().out
    assert sorted(rec.sequence_id) == sorted(whole.sequence_id)
    for i, name in enumerate(rec.sequence_id):
        j = int(np.flatnonzero(whole.sequence_id == name)[0])
        np.testing.assert_array_equal(rec.part(i, i + 1).acc, whole.part(j, j + 1).acc)
        np.testing.assert_array_equal(rec.part(i, i + 1).tof, whole.part(j, j + 1).tof)


def test_a_file_cut_off_loses_its_last_row_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rec = cmi.read_train(damaged(folder, tmp_path, lambda lines: "\n".join(lines)[:-900]))
    whole = cmi.read_train(folder)
    np.testing.assert_array_equal(rec.acc, whole.acc[: len(rec.acc)])
    assert len(rec.acc) == len(whole.acc) - 1
    assert "cut off" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: "", "train.csv is empty"),
        (lambda lines: lines[0] + "\n", "has a header but no rows"),
        (
            lambda lines: "\n".join([lines[0].replace("acc_y", "acc_q"), *lines[1:]]),
            "has no column acc_y",
        ),
        (
            lambda lines: "\n".join(lines).replace("Cheek - pinch skin", "Cheek pinch"),
            "gesture 'Cheek pinch' of SEQ_",
        ),
        (lambda lines: "\n".join(lines).replace(",Gesture,", ",Rest,"), "phase 'Rest'"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(
    folder: Path, tmp_path: Path, change: Callable[[list[str]], str], message: str
) -> None:
    with pytest.raises(cmi.DataError, match=message):
        cmi.read_train(damaged(folder, tmp_path, change))


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(cmi.DataError, match=r"train\.csv does not exist\. Point CMI_DATA_DIR"):
        cmi.read_train(tmp_path)


def test_the_cache_gives_the_same_and_notices_another_file(folder: Path, tmp_path: Path) -> None:
    data = damaged(folder, tmp_path, lambda lines: "\n".join(lines) + "\n")
    cfg = cmi.Config(output_path=tmp_path / "out")
    first, mark = cmi.cached_recordings(data, cfg)
    again, same_mark = cmi.cached_recordings(data, cfg)
    assert mark == same_mark
    for (name, a), b in zip(
        cmi.flat_arrays(first).items(), cmi.flat_arrays(again).values(), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=name)
    lines = (data / "train.csv").read_text().splitlines()
    (data / "train.csv").write_text("\n".join(lines[:-1]) + "\n")
    other, other_mark = cmi.cached_recordings(data, cfg)
    assert len(other.acc) == len(first.acc) - 1
    assert other_mark != mark
    assert len(list((cfg.checkpoints / "cache").glob("recordings-*"))) == 1


def test_a_half_written_cache_is_not_read(folder: Path, tmp_path: Path) -> None:
    cfg = cmi.Config(output_path=tmp_path / "out")
    _, mark = cmi.cached_recordings(folder, cfg)
    (cache,) = (cfg.checkpoints / "cache").glob("recordings-*")
    (cache / "meta.json").unlink()
    (cache / "acc.npy").write_bytes(b"half")
    assert cmi.cached_recordings(folder, cfg)[1] == mark


def test_a_changed_byte_of_the_cache_is_noticed(folder: Path, tmp_path: Path) -> None:
    cfg = cmi.Config(output_path=tmp_path / "out")
    first, mark = cmi.cached_recordings(folder, cfg)
    (cache,) = (cfg.checkpoints / "cache").glob("recordings-*")
    raw = bytearray((cache / "thm.npy").read_bytes())
    raw[-1] ^= 1  # still an array of numbers
    (cache / "thm.npy").write_bytes(raw)
    again, same_mark = cmi.cached_recordings(folder, cfg)
    assert same_mark == mark
    np.testing.assert_array_equal(again.thm, first.thm)


def test_an_empty_recording_is_refused(folder: Path) -> None:
    rec = cmi.read_train(folder)
    start = rec.start.copy()
    start[1] = 0
    with pytest.raises(ValueError, match="empty recording"):
        cmi.Recordings(
            start, rec.acc, rec.rot, rec.thm, rec.tof, rec.sequence_id, rec.subject, rec.person
        )


@pytest.mark.skipif(not os.environ.get("CMI_REAL_DATA"), reason="CMI_REAL_DATA is not set")
def test_the_real_rows_are_read() -> None:
    rec = cmi.read_train(Path(os.environ["CMI_REAL_DATA"]))
    assert (len(rec), len(rec.acc), len(set(rec.subject))) == (15, 1000, 14)
    np.testing.assert_allclose(rec.acc[0], [6.68359375, 6.21484375, 3.35546875])
    assert rec.tof[0, 0, 0, :3].tolist() == [131, 134, 132]
    assert set(np.diff(rec.start)) <= set(range(29, 701))
