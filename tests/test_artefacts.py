"""Files are absent, as before, or complete; digests see every byte; a folder has one holder."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cmi_pipeline as cmi

ROOT = Path(cmi.__file__).parent


def test_a_file_that_is_being_read_stays_whole_while_it_is_replaced(tmp_path: Path) -> None:
    """A new file takes the old one's name; the old one is never written into."""
    path = tmp_path / "folder" / "a.json"
    cmi.write_whole(path, b"before")
    with path.open("rb") as reader:
        cmi.write_whole(path, "after, and longer")
        assert reader.read() == b"before"
    assert path.read_text() == "after, and longer"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_former_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.bin"
    cmi.write_whole(path, b"before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="No space") as error:
        cmi.write_whole(path, b"after")
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_digest_changes_with_every_byte_type_and_shape() -> None:
    x = np.arange(6, dtype=np.int32)
    others = [x[::-1], x.reshape(2, 3), x.astype(np.uint32), x.astype(np.float32), x[:5]]
    marks = [cmi.digest(a) for a in (x, *others)]
    assert len(set(marks)) == len(marks)
    assert cmi.digest(x[::-1][::-1]) == marks[0], "the same array, another view"
    assert cmi.digest({"a": 1, "b": [2, None]}) == cmi.digest({"b": [2, None], "a": 1})
    assert cmi.digest(b"ab", b"c") != cmi.digest(b"ab", b"d")
    assert len(marks[0]) == 16


def test_a_folder_has_one_holder_and_is_free_again_when_it_dies(tmp_path: Path) -> None:
    """The other holder is another process, ended without a chance to clean up."""
    hold = (
        "import cmi_pipeline as cmi, pathlib, sys\n"
        "with cmi.only_run(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(cmi.ConfigError, match="Another run is writing"),
            cmi.only_run(tmp_path),
        ):
            pass
        other.kill()
    with cmi.only_run(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_only_leftovers_are_removed(tmp_path: Path) -> None:
    kept = [tmp_path / "a.part", tmp_path / ".b.c.part", tmp_path / "d.12.part", tmp_path / "e"]
    gone = [tmp_path / ".model.pt.123.part", tmp_path / "deep" / ".fold00.9.part.keras"]
    folder = tmp_path / ".simulated-0.77.part"
    folder.mkdir()
    (tmp_path / "deep").mkdir()
    for path in (*kept, *gone, folder / "train.csv"):
        path.write_text("x")
    with cmi.only_run(tmp_path):
        assert all(p.exists() for p in kept)
        assert not any(p.exists() for p in (*gone, folder))
