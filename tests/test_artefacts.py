"""Files are absent, as before, or complete; digests see every byte; leftovers go."""

import os
from pathlib import Path

import numpy as np
import pytest

import cmi_pipeline as cmi


def test_a_file_that_is_being_read_stays_whole_while_it_is_replaced(tmp_path: Path) -> None:
    """A new file takes the old one's name; the old one is never written into."""
    path = tmp_path / "folder" / "a.json"
    cmi.write_whole(path, b"before")
    with path.open("rb") as reader:
        cmi.write_whole(path, "after, and longer")
        assert reader.read() == b"before"
    assert path.read_text() == "after, and longer"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_the_former_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    cmi.write_whole(path, b"before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for owner, step in ((os, "fsync"), (Path, "replace")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, step, full)
            with pytest.raises(OSError, match="No space") as error:
                cmi.write_whole(path, b"after")
        assert error.value.filename == str(path)
        assert path.read_bytes() == b"before"
        assert list(tmp_path.iterdir()) == [path]


def test_arrays_come_back_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    arrays = {"x": np.arange(6.0).reshape(2, 3), "names": np.array(["a", "bc"])}
    cmi.write_arrays(path, arrays, {"of": [1, "two"]})
    again, note = cmi.read_arrays(path)
    assert note == {"of": [1, "two"]}
    assert all((again[name] == arrays[name]).all() for name in arrays)
    whole = path.read_bytes()
    objects = tmp_path / "objects.npz"
    np.savez(objects, note=np.array([print], dtype=object))  # a pickle
    for content in (whole[: len(whole) // 2], b"", b"PK\3\4 nonsense", objects.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(cmi.DataError, match=r"a\.npz is damaged"):
            cmi.read_arrays(path)


def test_a_digest_changes_with_every_byte_type_and_shape() -> None:
    x = np.arange(6, dtype=np.int32)
    others = [x[::-1], x.reshape(2, 3), x.astype(np.uint32), x.astype(np.float32), x[:5]]
    digests = [cmi.digest(a) for a in (x, *others)]
    assert len(set(digests)) == len(digests)
    assert cmi.digest(x[::-1][::-1]) == digests[0], "the same array, another view"
    assert cmi.digest({"a": 1, "b": [2, None]}) == cmi.digest({"b": [2, None], "a": 1})
    assert cmi.digest(b"ab", b"c") != cmi.digest(b"ab", b"d")


def test_only_leftovers_of_our_own_are_removed(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in ("a.part", ".hidden", ".b.c.part", "d.12.part", "e")]
    gone = [tmp_path / ".model.pt.123.part", tmp_path / "deep" / ".fold00.9.part.keras"]
    folder, target = tmp_path / ".simulated-0.77.part", tmp_path / "target"
    for path in (*kept, *gone, folder / "train.csv", target / "kept"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    link = tmp_path / ".link.7.part"
    link.symlink_to(target)
    with cmi.only_run(tmp_path):
        assert all(path.exists() for path in (*kept, target / "kept"))
        assert not any(path.exists() for path in (*gone, folder, link))
