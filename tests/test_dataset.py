"""The dataset folder: what is packed is whole, is found when attached, and overwrites nothing."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import ROOT, Patch, Road, call, copied, good

import cmi_pipeline as cmi
import make_kaggle_dataset as maker

SLUG = "some-one/cmi-bundles"
DAMAGES: tuple[tuple[str, Callable[[str], str] | None, str], ...] = (
    ("lgbm_models/imu/fold01_behavior.txt", lambda t: t + " ", "lgbm_models/imu is damaged or inc"),
    ("lgbm_models/all/fold00.txt", None, "lgbm_models/all is damaged"),
    ("lgbm_models/imu/fold00.json", None, "lgbm_models/imu is damaged"),
    ("lgbm_models/bundle.json", lambda _: "{", "is not JSON"),
    ("lgbm_models/bundle.json", None, "found with other models than lie in .*: lgbm/all, lgbm/imu"),
    ("lgbm_models/bundle.json", lambda t: re.sub(r',\s*"fold01"', "", t, count=1),
     "lgbm_models/all has not the 2 folds of folds.csv"),
    ("ensemble/weights.json", lambda t: t.replace('"digests": {', '"digests": {"torch/imu": "0",'),
     r"found with other models than lie in .*: torch/imu\."),
    ("ensemble/weights.json", None, r"weights\.json does not exist"),
    ("folds.csv", None, r"folds\.csv does not exist"),
)  # fmt: skip


def pack(out: Path, target: Path, *words: str) -> None:
    maker.main([str(out), str(target), "--slug", SLUG, *words])


def refusal(out: Path, target: Path, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        pack(out, target, *words)
    return str(end.value)


@pytest.fixture(scope="module")
def dataset(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of all members, packed by the command in a process of its own."""
    target = tmp_path_factory.mktemp("dataset") / "bundles [1]"
    words = road[0], target, "--slug", SLUG
    done = call("python", ROOT / "make_kaggle_dataset.py", *words, cwd=target.parent)
    (upload,) = re.findall(r"kaggle datasets create (.*)", good(done))
    assert shlex.split(upload) == ["-p", str(target), "--dir-mode", "zip", "--keep-tabular"]
    (submit,) = re.findall(r"kaggle competitions submit (.*)", done.stdout)
    told = ["cmi-detect-behavior-with-sensor-data", "-k", "some-one/cmi-pipeline", "-v", "VERSION",
            "-f", "submission.parquet", "-m", "CMI pipeline"]  # fmt: skip
    assert shlex.split(submit) == told
    return target


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return copied(plain, tmp_path / "out", "checkpoints", "simulated-*", "logs")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_folder_holds_models_and_nothing_else(road: Road, dataset: Path) -> None:
    expected = {"dataset-metadata.json", "folds.csv", "ensemble/weights.json"}
    ends = {"lgbm": (".txt", "_orientation.txt", "_behavior.txt"),
            "torch": (".pt", "_spec.json"), "keras": (".keras", "_spec.json")}  # fmt: skip
    for member in ends:
        expected.add(f"{member}_models/bundle.json")
        for mode in ("all", "imu", "norot") if member == "lgbm" else ("all", "imu"):
            stems = [f"{member}_models/{mode}/fold0{k}" for k in (0, 1)]
            expected |= {stem + end for stem in stems for end in (".json", *ends[member])}
    packed = contents(dataset)
    assert set(packed) == expected
    metadata = json.loads(packed.pop("dataset-metadata.json"))
    assert metadata == {"title": "Cmi bundles", "id": SLUG, "licenses": [{"name": "MIT"}]}
    assert all((road[0] / name).read_bytes() == raw for name, raw in packed.items())


def test_a_damaged_or_incomplete_run_is_refused(copy: Path, tmp_path: Path) -> None:
    for name, change, message in DAMAGES:
        whole = (copy / name).read_text()
        (copy / name).unlink()
        if change:
            assert change(whole) != whole
            (copy / name).write_text(change(whole))
        assert re.search(message, refusal(copy, tmp_path / "bundles")), name
        (copy / name).write_text(whole)
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere", tmp_path / "bundles")
    with cmi.only_run(copy):
        assert "Another run is writing" in refusal(copy, tmp_path / "bundles")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    pack(copy, tmp_path / "bundles")


def test_only_an_earlier_package_of_the_same_name_is_replaced(copy: Path, tmp_path: Path) -> None:
    foreign, other, own = tmp_path / "foreign", tmp_path / "other", tmp_path / "own"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years")
    pack(copy, other, "--slug", "some-one/other-bundles")
    own.mkdir()  # an empty folder will do
    pack(copy, own)
    whole = contents(own)
    (own / "lgbm_models" / "all" / "fold07.txt").write_text("of an earlier run")
    pack(copy, own)
    assert contents(own) == whole
    (own / "notes.txt").write_text("mine")
    before = [contents(folder) for folder in (foreign, other, own)]
    for folder, why in ((foreign, "no earlier"), (other, "no earlier"), (own, "notes")):
        assert why in refusal(copy, folder)
    assert [contents(folder) for folder in (foreign, other, own)] == before
    assert {p.name for p in tmp_path.iterdir()} == {"out", "foreign", "other", "own"}


def test_a_full_disk_leaves_the_package(copy: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    target, n_copied, copyfile = tmp_path / "bundles", [], shutil.copyfile
    pack(copy, target)
    before = contents(target)

    def fill_up(source: Path, to: Path) -> None:
        n_copied.append(to)
        if len(n_copied) > 3:
            raise OSError("No space left on device")
        copyfile(source, to)

    monkeypatch.setattr(shutil, "copyfile", fill_up)
    assert "No space left" in refusal(copy, target)
    assert contents(target) == before
    assert {p.name for p in tmp_path.iterdir()} == {"out", "bundles"}


def test_what_kaggle_would_refuse_is_refused_here(copy: Path) -> None:
    target = copy.parent / "bundles"
    wrong = [(slug, "A title", "write user/name") for slug in ("cmi-bundles", "a/CMI--b", "a/b/c")]
    for word in ("five5", "x" * 51):
        wrong.append((f"a/{word}", "A title", f"the name in --slug has {len(word)} characters"))
        wrong.append(("a/cmi-66", word, f"--title has {len(word)} characters"))
    for slug, title, message in wrong:
        assert message in refusal(copy, target, "--slug", slug, "--title", title)
        assert not target.exists()
    pack(copy, target, "--slug", "Some-One/cmi-66", "--title", "x" * 50)
    metadata = json.loads((target / "dataset-metadata.json").read_text())
    assert (metadata["id"], metadata["title"]) == ("Some-One/cmi-66", "x" * 50)
