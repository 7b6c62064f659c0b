"""How a run is started: names and places of the file, what is attached on Kaggle or missing."""

import dataclasses
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from runs import ALIKE, PLAIN, QUICK, SCRIPT, copied, data_of, plan_of, run_here

import cmi_pipeline as cmi

Printed = pytest.CaptureFixture[str]


def test_an_argument_wins_over_the_environment(
    plain: Path, tmp_path: Path, capsys: Printed
) -> None:
    where = {"CMI_DATA_DIR": str(data_of(plain)), "PLAN_ONLY": "off"}
    words = ("PLAN_ONLY=yes", "LGBM_LR=0.5")
    assert run_here(copied(plain, tmp_path / "out"), *words, **where, **QUICK) is None
    printed = capsys.readouterr().out
    assert plan_of(printed)["lgbm", "all"] == ("train", "LGBM_LR 0.1 → 0.5")
    assert "fit  " not in printed
    assert "--plan" in (run_here(tmp_path / "no", "--plan") or "")  # refused
    assert not (tmp_path / "no").exists()


def broken(folder: Path, package: str) -> str:
    """A search path on which a package that is installed cannot be imported."""
    folder.mkdir()
    (folder / f"{package}.py").write_text("raise OSError('a library of it is missing')\n")
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"USE_TORCH": "1", "PYTHONPATH": "torch"}, "torch does not start: .*missing.*USE_TORCH=0"),
     ({"USE_LGBM": "0"}, "No member takes part"),
     ({"ENSEMBLE_WEIGHTS": "catboost:1"}, "ENSEMBLE_WEIGHTS.*lgbm, torch, keras")],
)  # fmt: skip
def test_what_would_be_found_out_late_is_found_out_by_the_plan(
    plain: Path, tmp_path: Path, settings: dict[str, str], said: str
) -> None:
    if package := settings.get("PYTHONPATH"):
        settings = settings | {"PYTHONPATH": broken(tmp_path / "path", package)}
    where = {"CMI_DATA_DIR": str(data_of(plain)), "PLAN_ONLY": "1", **QUICK}
    done = runs.run(tmp_path / "out", **(where | settings))
    assert done.returncode == 1
    assert re.search(said, done.stderr.splitlines()[-1]), done.stderr
    assert not list(tmp_path.glob("out/*_models"))


# ---- names and places of the file ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["cmi-v0.91.py", "pipeline", "-"])
def test_the_file_runs_under_any_name_from_anywhere(plain: Path, tmp_path: Path, name: str) -> None:
    """With python -P, which looks for no module beside it; from standard input as well. Its jobs
    want processes of their own, which must know the file or be done without."""
    place = tmp_path / "scripts [1]"
    place.mkdir()
    script = shutil.copy(SCRIPT, place / name)
    shutil.copytree(runs.ROOT / "kaggle_evaluation", tmp_path / "kaggle_evaluation")
    two = {"CMI_WORKERS": "2", **QUICK}
    env = runs.environment(tmp_path / "out", CMI_DATA_DIR=str(data_of(plain)), **two)
    env["PYTHONPATH"] += f":{tmp_path}"
    with script.open() as file:
        done = subprocess.run(
            [sys.executable, "-P", "-" if name == "-" else str(script)], stdin=file, cwd=tmp_path,
            env=env, text=True, capture_output=True, timeout=1800,
        )  # fmt: skip
    printed = runs.good(done)
    assert "lgbm/imu/fold01" in printed
    runs.same_answers(plain, tmp_path / "out", "lgbm")
    assert ("backend=threading" in printed) == (name == "-")


def test_an_edited_file_is_what_a_second_run_in_one_process_executes(
    tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "cmi_pipeline.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    for module in ("cmi_pipeline", "__main__"):
        monkeypatch.setitem(sys.modules, module, sys.modules[module])
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = SCRIPT.read_text()
    for title in ("first", "second"):
        script.write_text(text.replace("plan, train or reuse", title, 1))
        runpy.run_path(str(script), run_name="__main__")
        assert title in capsys.readouterr().out


# ---- Kaggle --------------------------------------------------------------------------------------


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kaggle's two folders; the one that data sets are attached to."""
    for name in ("input", "working"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(cmi, f"KAGGLE_{name.upper()}", tmp_path / name)
    return tmp_path / "input"


def plan_there(kaggle: Path, capsys: Printed, **settings: str) -> str:
    """What a plan prints; it writes to Kaggle's own folder."""
    where = {"OUTPUT_PATH": "", "PLAN_ONLY": "1", **QUICK}
    assert run_here(kaggle.parent / "unused", **(where | settings)) is None
    assert not (kaggle.parent / "unused").exists()
    return capsys.readouterr().out


COMPETITION = "cmi-detect-behavior-with-sensor-data"


@pytest.mark.parametrize("below", [COMPETITION, f"competitions/{COMPETITION}"])
def test_the_competition_is_found_through_links_and_not_in_a_bundle(
    plain: Path, kaggle: Path, capsys: Printed, below: str
) -> None:
    """What a bundle brings along sorts before it, and has all the files too."""
    (kaggle / below).parent.mkdir(exist_ok=True)
    (kaggle / below).symlink_to(data_of(plain))
    bundle = copied(plain, kaggle / "a-bundle", "lgbm_models", "checkpoints")
    (kaggle / "half").mkdir()
    shutil.copy(data_of(plain) / "test_demographics.csv", kaggle / "half")
    printed = plan_there(kaggle, capsys)
    assert f"data {kaggle / below}" in printed
    assert f"passed over: {data_of(bundle)} " in printed
    assert (kaggle.parent / "working" / "folds.csv").is_file()


@pytest.mark.parametrize("with_bundle", [False, True])
def test_nothing_is_simulated_where_something_is_attached(
    plain: Path, kaggle: Path, with_bundle: bool
) -> None:
    (kaggle / "titanic").mkdir()
    if with_bundle:
        copied(plain, kaggle / "a-bundle")
    line = run_here(kaggle.parent / "out", **QUICK) or ""
    assert "test.csv" in line
    assert "titanic" in line
    assert not list(kaggle.parent.glob("out/*simulated*"))


def test_an_attached_bundle_is_reused_and_one_that_does_not_fit_is_named(
    plain: Path, kaggle: Path, capsys: Printed
) -> None:
    shutil.copytree(data_of(plain), kaggle / COMPETITION)
    for name in ("last-week", "older"):
        copied(plain, kaggle / name, "simulated-*", "checkpoints", "oof")
    (kaggle / "older" / "lgbm_models" / "imu" / "fold01.txt").unlink()
    spoilt = kaggle / "last-week" / "lgbm_models"
    for note in spoilt.glob("*/fold??.json"):
        note.write_text(note.read_text().replace('"LGBM_LEAVES": 20', '"LGBM_LEAVES": 5'))
    printed = plan_there(kaggle, capsys)
    plan = plan_of(printed)
    assert plan["lgbm", "all"] == ("reuse", "everything matches")
    assert plan["lgbm", "imu"][0] == "train"
    assert f"{spoilt / 'imu'}: LGBM_LEAVES 5 → 20" in printed
    older = kaggle / "older" / "lgbm_models" / "imu"
    assert f"{older}: fold01.txt is absent or was changed after training" in printed


def test_serving_alone_trains_nothing(plain: Path, kaggle: Path, capsys: Printed) -> None:
    """The bundle was trained with other settings: no matter."""
    shutil.copytree(data_of(plain), kaggle / COMPETITION)
    copied(plain, kaggle / "bundle", "simulated-*", "checkpoints", "oof")
    printed = plan_there(kaggle, capsys, SERVE_ONLY="1", PLAN_ONLY="0", LGBM_LEAVES="3", **ALIKE)
    assert "serve what is there" in printed
    assert "fit  " not in printed
    assert "weights=weights.json" in printed
    runs.check_submission(kaggle.parent / "working", data_of(plain))
    assert not list((kaggle.parent / "working").glob("*_models"))


# ---- nothing to train on -------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
def test_without_training_data_and_models_a_run_fails(
    plain: Path, tmp_path: Path, zipped: bool
) -> None:
    data = copied(data_of(plain), tmp_path / "data", "train.csv")
    if zipped:
        (data / "train.csv.zip").write_bytes(b"PK")
    line = run_here(tmp_path / "out", CMI_DATA_DIR=str(data), **QUICK) or ""
    assert str(data / "train.csv") in line
    assert ("train.csv.zip" in line) == zipped
    assert not (tmp_path / "out" / "submission.parquet").exists()
    served = copied(plain, tmp_path / "served")
    assert run_here(served, CMI_DATA_DIR=str(data), **QUICK) is None  # with models it serves


def test_a_local_run_whose_answers_are_fallbacks_fails(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise ValueError("planted")

    broken = dataclasses.replace(cmi.MEMBERS["lgbm"], predict=failing)
    monkeypatch.setitem(cmi.MEMBERS, "lgbm", broken)
    out = copied(plain, tmp_path / "out")
    line = run_here(out, SERVE_ONLY="1", CMI_DATA_DIR=str(data_of(plain)), **PLAIN) or ""
    assert "16 fallbacks in 16 answers" in line
    assert "planted" in line
