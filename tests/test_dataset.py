"""The dataset folder: what is packed is whole, is found when attached, and overwrites nothing."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_road import QUICK, ROOT, SMALL, check_submission, clean_environment, good, plan_of, run

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
import make_kaggle_dataset as maker

SLUG = "some-one/cmi-bundles"


def pack(out: Path, target: Path, slug: str = SLUG) -> str:
    """The command in a process of its own; what it printed."""
    script = str(ROOT / "make_kaggle_dataset.py")
    command = [sys.executable, script, str(out), str(target), "--slug", slug]
    done = subprocess.run(command, cwd=target.parent, text=True, capture_output=True, timeout=100)
    return good(done)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message with which the command stops."""
    with pytest.raises(SystemExit) as end:
        maker.main([str(a) for a in arguments])
    capsys.readouterr()
    return str(end.value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small real run of one member, and the data it was trained on, which lie elsewhere."""
    out = tmp_path_factory.mktemp("trained") / "out"
    good(run(out, **QUICK))
    data = out.parent / "data"
    shutil.copytree(next(out.glob("simulated-*")), data)
    return out, data


@pytest.fixture(scope="module")
def dataset(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("dataset") / "bundles"
    printed = pack(trained[0], target)
    command = re.search(r"kaggle datasets create (.*)", printed)
    assert command
    assert shlex.split(command[1]) == ["-p", str(target), "--dir-mode", "zip", "--keep-tabular"]
    return target


@pytest.fixture
def copy(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    skip = shutil.ignore_patterns("checkpoints", "simulated-*")
    return Path(shutil.copytree(trained[0], tmp_path / "out", ignore=skip))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_folder_holds_the_models_and_nothing_else(
    trained: tuple[Path, Path], dataset: Path
) -> None:
    expected = {"dataset-metadata.json", "folds.csv", "ensemble/weights.json"}
    expected.add("lgbm_models/bundle.json")
    ends = (".json", ".txt", "_orientation.txt", "_behavior.txt")
    for mode in ("all", "imu", "norot"):
        expected |= {f"lgbm_models/{mode}/fold0{k}{end}" for k in (0, 1) for end in ends}
    packed = contents(dataset)
    assert set(packed) == expected
    metadata = json.loads(packed.pop("dataset-metadata.json"))
    assert metadata == {"title": "Cmi bundles", "id": SLUG, "licenses": [{"name": "MIT"}]}
    assert all((trained[0] / name).read_bytes() == raw for name, raw in packed.items())


def attached(dataset: Path, folder: Path) -> Path:
    """The dataset as Kaggle shows it: every folder went up as an archive and was unpacked there."""
    for part in dataset.iterdir():
        if part.is_dir():
            archive = shutil.make_archive(str(folder.parent / part.name), "zip", part)
            shutil.unpack_archive(archive, folder / part.name)
        elif part.name != "dataset-metadata.json":
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(part, folder)
    return folder


def test_an_attached_dataset_is_found_reused_and_served(
    trained: tuple[Path, Path], dataset: Path, tmp_path: Path
) -> None:
    below = tmp_path / "input" / "datasets" / "some-one"
    below.mkdir(parents=True)
    attached(dataset, below / "cmi-bundles")
    (tmp_path / "working").mkdir()
    script = (
        "from pathlib import Path; import cmi_pipeline as cmi\n"
        f"cmi.KAGGLE_INPUT, cmi.KAGGLE_WORKING = Path({str(tmp_path / 'input')!r}), Path({str(tmp_path / 'working')!r})\n"
        f"cmi.main({SMALL | QUICK | {'CMI_DATA_DIR': str(trained[1])}!r})\n"
    )
    env = clean_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "working", env=env,
                          capture_output=True, text=True, timeout=500)  # fmt: skip
    plan = plan_of(good(done))
    for mode in ("all", "imu"):
        assert plan["lgbm", mode] == ("reuse", "everything matches")
    check_submission(tmp_path / "working", trained[1] / "test.csv")
    assert not list((tmp_path / "working").glob("*_models"))


def serve_alone(dataset: Path, data: Path, folder: Path, named: dict[str, str]) -> list[str]:
    """Serve a test file with nothing but the dataset; the models that answered."""
    test_only = folder / "data"
    test_only.mkdir(parents=True)
    for name in ("test.csv", "test_demographics.csv"):
        shutil.copy(data / name, test_only)
    printed = good(run(folder / "out", CMI_DATA_DIR=str(test_only), **named))
    assert "action=serve" in printed
    loaded = re.search(r"loaded +models=(\S+)  weights=(\S+)", printed)
    assert loaded
    assert loaded[2] == str(dataset / "ensemble" / "weights.json")
    check_submission(folder / "out", test_only / "test.csv")
    return sorted(loaded[1].split(","))


def test_a_named_bundle_serves_with_the_packed_weights(
    trained: tuple[Path, Path], dataset: Path, tmp_path: Path
) -> None:
    for named in (dataset / "lgbm_models", dataset / "lgbm_models" / "bundle.json"):
        where = {"LGBM_BUNDLE_PATH": str(named), **QUICK}
        answered = serve_alone(dataset, trained[1], tmp_path / named.name, where)
        assert answered == ["lgbm/all", "lgbm/imu", "lgbm/norot"]


@pytest.mark.slow
def test_all_members_are_packed_and_serve(tmp_path: Path) -> None:
    out, target = tmp_path / "out", tmp_path / "bundles"
    good(run(out))
    pack(out, target)
    members = ("keras", "lgbm", "torch")
    named = {f"{m.upper()}_BUNDLE_PATH": str(target / f"{m}_models") for m in members}
    data = next(out.glob("simulated-*"))
    answered = serve_alone(target, data, tmp_path / "served", named)
    both = [f"{m}/{mode}" for m in members for mode in ("all", "imu")]
    assert answered == sorted([*both, "lgbm/norot"])


def change_a_byte(out: Path) -> None:
    path = out / "lgbm_models" / "imu" / "fold01_behavior.txt"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def lose_a_fold(out: Path) -> None:
    """As after a run that was ended and whose bundle.json names what is there."""
    path = out / "lgbm_models" / "bundle.json"
    bundle = json.loads(path.read_text())
    bundle["modes"]["all"].remove("fold01")
    path.write_text(json.dumps(bundle))


def other_weights(out: Path) -> None:
    path = out / "ensemble" / "weights.json"
    weights = json.loads(path.read_text())
    weights["marks"]["lgbm/all"] = "0" * 16
    weights["marks"]["torch/imu"] = "1" * 16  # of a bundle that lies elsewhere
    path.write_text(json.dumps(weights))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_a_byte, "lgbm_models/imu is damaged or incomplete"),
        (lambda out: (out / "lgbm_models/all/fold00.txt").unlink(), "lgbm_models/all is damaged"),
        (lambda out: (out / "lgbm_models/imu/fold00.json").unlink(), "lgbm_models/imu is damaged"),
        (lose_a_fold, "lgbm_models/all has not the 2 folds of folds.csv"),
        (other_weights, r"found with other models than lie in .*: lgbm/all, torch/imu\."),
        (lambda out: shutil.rmtree(out / "lgbm_models"), "other models .*: lgbm/all, lgbm/imu"),
        (lambda out: (out / "ensemble/weights.json").unlink(), r"weights\.json does not exist"),
        (lambda out: (out / "folds.csv").unlink(), r"folds\.csv does not exist"),
        (lambda out: shutil.rmtree(out), "out does not exist"),
        (lambda out: (out / "lgbm_models/bundle.json").write_text("{"), "is not JSON"),
    ],
)
def test_a_damaged_or_incomplete_run_is_refused(
    copy: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], message: str
) -> None:
    damage(copy)
    target = copy.parent / "bundles"
    assert re.search(message, refusal(capsys, copy, target, "--slug", SLUG))
    assert [p.name for p in copy.parent.iterdir() if p.name != "out"] == []


def test_a_running_run_is_not_packed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with maker.cmi.only_run(copy):
        text = refusal(capsys, copy, copy.parent / "bundles", "--slug", SLUG)
    assert "Another run is writing" in text


def test_a_foreign_folder_is_left_alone(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign, other, own = tmp_path / "foreign", tmp_path / "other", tmp_path / "own"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years")
    pack(copy, other, "some-one/other-bundles")
    pack(copy, own)
    (own / "notes.txt").write_text("mine")
    before = [contents(folder) for folder in (foreign, other, own)]
    for folder, why in (
        (foreign, "no earlier package"),
        (other, "no earlier package"),
        (own, "notes"),
    ):
        assert why in refusal(capsys, copy, folder, "--slug", SLUG)
    assert [contents(folder) for folder in (foreign, other, own)] == before


def test_an_earlier_package_is_replaced_as_a_whole(
    dataset: Path, copy: Path, tmp_path: Path
) -> None:
    target = tmp_path / "bundles"
    target.mkdir()  # an empty folder will do
    pack(copy, target)
    (target / "lgbm_models" / "all" / "fold07.txt").write_text("of an earlier run")
    pack(copy, target)
    assert contents(target) == contents(dataset)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "bundles"}


def test_a_full_disk_leaves_the_earlier_package(
    dataset: Path, copy: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    target = Path(shutil.copytree(dataset, tmp_path / "bundles"))
    copied: list[object] = []
    copyfile = shutil.copyfile

    def fill_up(source: Path, to: Path) -> None:
        copied.append(to)
        if len(copied) > 3:
            raise OSError("No space left on device")
        copyfile(source, to)

    monkeypatch.setattr(shutil, "copyfile", fill_up)
    assert "No space left" in refusal(capsys, copy, target, "--slug", SLUG)
    assert contents(target) == contents(dataset)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "bundles"}


@pytest.mark.parametrize(
    ("slug", "title", "message"),
    [
        ("cmi-bundles", None, "write user/name"),
        ("some-one/CMI-bundles", None, "write user/name"),
        ("some-one/cmi_bundles", None, "write user/name"),
        ("some-one/cmi--bundles", None, "write user/name"),
        ("a/b/cmi-bundles", None, "write user/name"),
        ("some-one/cmi-5", None, "the name in --slug has 5 characters"),
        ("some-one/cmi-66", "Five5", "--title has 5 characters"),
        ("some-one/cmi-66", "", "--title has 0 characters"),
        ("some-one/cmi-66", "x" * 51, "--title has 51 characters"),
        ("some-one/cmi-66", "x" * 50, ""),
        ("some-one/cmi-66", "Six 66", ""),
        ("Some-One/cmi-66", None, ""),
        ("some-one/" + "x" * 51, "A title", "the name in --slug has 51 characters"),
    ],
)
def test_what_kaggle_would_refuse_is_refused_here(
    copy: Path, capsys: pytest.CaptureFixture[str], slug: str, title: str | None, message: str
) -> None:
    target = copy.parent / "bundles"
    titled = [] if title is None else ["--title", title]
    if message:
        assert message in refusal(capsys, copy, target, "--slug", slug, *titled)
        assert not target.exists()
        return
    maker.main([str(copy), str(target), "--slug", slug, *titled])
    metadata = json.loads((target / "dataset-metadata.json").read_text())
    assert metadata["id"] == slug
    assert 6 <= len(metadata["title"]) <= 50
