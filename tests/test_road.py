"""The whole road in real processes on small simulated data: train, reuse, refuse, serve."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import cmi_pipeline as cmi

ROOT = Path(cmi.__file__).parent
SMALL = {
    "SIM_SUBJECTS": "5",
    "SIM_TEST_SUBJECTS": "1",
    "SIM_RECORDINGS": "16",
    "N_FOLDS": "2",
    "LGBM_ROUNDS": "30",
    "LGBM_LR": "0.1",
    "TORCH_MAX_EPOCHS": "2",
    "KERAS_MAX_EPOCHS": "2",
    "STRICT": "1",
}
QUICK = {"USE_TORCH": "0", "USE_KERAS": "0"}


def clean_environment() -> dict[str, str]:
    """The environment without any setting of the pipeline."""
    names = {f.name.upper() for f in cmi.dataclasses.fields(cmi.Config)} | {"MODEL_PATH"}
    return {k: v for k, v in os.environ.items() if k not in names}


def run(out: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "cmi_pipeline.py")], cwd=out.parent, text=True, timeout=500,
        capture_output=True, env={**clean_environment(), **SMALL, "OUTPUT_PATH": str(out), **settings},
    )  # fmt: skip


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def plan_of(stdout: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(member, mode) → (action, why)"""
    lines = re.findall(r"plan +member=(\w+) +mode=(\w+) +action=(\w+) .*?why=(.*?)  path=", stdout)
    return {(member, mode): (action, why) for member, mode, action, why in lines}


def check_submission(out: Path, test_csv: Path) -> None:
    answer = pl.read_parquet(out / "submission.parquet")
    asked = pl.read_csv(test_csv, columns=["sequence_id"])["sequence_id"].unique().to_list()
    assert answer.columns == ["sequence_id", "gesture"]
    assert sorted(answer["sequence_id"]) == sorted(asked)
    assert set(answer["gesture"]) <= set(cmi.GESTURES)


@pytest.fixture
def copy(road: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the full run's folder, to be damaged."""
    shutil.copytree(road[0], tmp_path / "out")
    return tmp_path / "out"


def test_one_command_reaches_the_submission(road: tuple[Path, str]) -> None:
    out, printed = road
    (data,) = out.glob("simulated-*")
    check_submission(out, data / "test.csv")
    assert "CMI_DATA_DIR is not set" in printed
    plan = plan_of(printed)
    both = {(member, mode) for member in cmi.MEMBERS for mode in ("all", "imu")}
    assert set(plan) == both | {("lgbm", "norot")}
    assert {action for action, _ in plan.values()} == {"train"}
    for name in (
        *cmi.MEMBERS,
        r"blend \(optimistic\)",
        r"blend \(nested\)",
        r"blend \+ assignment",
    ):
        assert re.search(rf"result +what={name} +all=0\.\d+ +imu=0\.\d+ +mixed=0\.\d+", printed)


def test_out_of_fold_files_are_full_and_beat_chance(road: tuple[Path, str]) -> None:
    out, _ = road
    truth = np.load(out / "oof" / "y_true.npy")
    folds = pl.read_csv(out / "folds.csv")
    assert len(truth) == len(folds) == 80
    for member in cmi.MEMBERS:
        for mode in ("all", "imu"):
            proba = np.load(out / "oof" / f"oof_{member}_{mode}_proba.npy")
            assert proba.shape == (80, 18)
            np.testing.assert_allclose(proba.sum(axis=1), 1, atol=1e-4)
            assert (proba >= 0).all()
    lgbm = np.load(out / "oof" / "oof_lgbm_all_proba.npy")
    assert (lgbm.argmax(axis=1) == truth).mean() > 3 / 18


def test_artefacts_lie_where_the_design_says(road: tuple[Path, str]) -> None:
    out, _ = road
    for member in cmi.MEMBERS:
        bundle = json.loads((out / f"{member}_models" / "bundle.json").read_text())
        modes = {"all", "imu", "norot"} if member == "lgbm" else {"all", "imu"}
        assert bundle["modes"] == {mode: ["fold00", "fold01"] for mode in modes}
        assert len(bundle["labels"]) > 50
        for mode in ("all", "imu"):
            assert (out / f"{member}_models" / mode / "fold01.json").is_file()
    assert (out / "feature_importance.csv").is_file()
    weights = json.loads((out / "ensemble" / "weights.json").read_text())
    for mode in ("all", "imu"):
        assert sum(weights["modes"][mode]["weights"]) == pytest.approx(1)
    assert not list(out.rglob("*.part"))


def test_the_second_run_reuses_everything(road: tuple[Path, str], copy: Path) -> None:
    printed = good(run(copy))
    assert set(plan_of(printed).values()) == {("reuse", "everything matches")}
    assert "fit  " not in printed
    for path in sorted((road[0] / "oof").glob("*.npy")):
        np.testing.assert_allclose(np.load(copy / "oof" / path.name), np.load(path), atol=1e-6)


def planned(out: Path, **settings: str) -> dict[tuple[str, str], tuple[str, str]]:
    return plan_of(good(run(out, PLAN_ONLY="1", **settings)))


def test_a_setting_that_does_not_matter_retrains_nothing(copy: Path) -> None:
    plan = planned(
        copy, LOG_EVERY_STEPS="7", ENSEMBLE_TRIALS="10", SUBJECT_ASSIGNMENT="0", TORCH_AMP="0"
    )
    assert {action for action, _ in plan.values()} == {"reuse"}


def test_a_setting_that_matters_is_named_and_retrains_its_member_only(copy: Path) -> None:
    plan = planned(copy, LGBM_LEAVES="5")
    assert plan["lgbm", "all"] == ("train", "LGBM_LEAVES 20 → 5")
    assert {action for (member, _), (action, _) in plan.items() if member != "lgbm"} == {"reuse"}


def test_switches_force_and_skip(copy: Path) -> None:
    plan = planned(copy, FORCE_TRAIN_LGBM="1", USE_TORCH="0")
    assert plan["lgbm", "imu"] == ("train", "FORCE_TRAIN_LGBM=1")
    assert plan["torch", "all"] == ("skip", "USE_TORCH=0")
    assert plan["keras", "all"][0] == "reuse"


def test_one_changed_byte_is_noticed(copy: Path) -> None:
    path = copy / "lgbm_models" / "all" / "fold01.txt"
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 1
    path.write_bytes(raw)
    plan = planned(copy)
    assert plan["lgbm", "all"] == ("resume", "fold01.txt is absent or was changed after training")
    assert plan["lgbm", "imu"][0] == "reuse"


def test_a_lost_fold_is_trained_again_alone(road: tuple[Path, str], copy: Path) -> None:
    """And equals the same fold of the full run, to the last byte."""
    for path in (copy / "lgbm_models" / "imu").glob("fold00*"):
        path.unlink()
    printed = good(run(copy, **QUICK))
    assert printed.count("fit  ") == 1
    assert "fit          job=lgbm/imu/fold00" in printed
    name = Path("lgbm_models", "imu", "fold00.txt")
    assert (copy / name).read_bytes() == (road[0] / name).read_bytes()


def test_other_data_retrain_and_say_so(copy: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(next(copy.glob("simulated-*")), data)
    lines = (data / "train.csv").read_text().splitlines()
    (data / "train.csv").write_text("\n".join(lines[:-1]) + "\n")
    plan = planned(copy, CMI_DATA_DIR=str(data))
    assert {action for action, _ in plan.values()} == {"train"}
    assert all("data differ" in why for _, why in plan.values())


def test_a_bundle_from_elsewhere_is_reused_in_place(road: tuple[Path, str], tmp_path: Path) -> None:
    data = next(road[0].glob("simulated-*"))
    bundle = road[0] / "lgbm_models"
    for named in (bundle, bundle / "bundle.json"):
        out = tmp_path / named.name / "new"
        out.parent.mkdir()
        printed = good(run(out, CMI_DATA_DIR=str(data), MODEL_PATH=str(named), **QUICK))
        assert plan_of(printed)["lgbm", "all"] == ("reuse", "everything matches")
        check_submission(out, data / "test.csv")
        assert not (out / "lgbm_models").exists()


def test_a_bundle_path_that_does_not_exist_says_what_was_looked_for(copy: Path) -> None:
    done = run(copy, MODEL_PATH=str(copy / "nowhere"))
    assert done.returncode != 0
    assert f"looked for {copy / 'nowhere' / 'bundle.json'}" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_runs_on_one_folder(copy: Path) -> None:
    with cmi.only_run(copy):
        done = run(copy, PLAN_ONLY="1")
    assert done.returncode != 0
    assert f"Another run is writing to {copy}" in done.stderr
    assert planned(copy)  # the lock is gone with its holder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"N_FOLDS": "9"}, "5 subjects cannot fill 9 folds; set N_FOLDS=5."),
        ({"N_FOLDS": "three"}, "N_FOLDS='three' cannot be read as int (default 5)."),
        ({"CMI_DATA_DIR": "/nowhere"}, "CMI_DATA_DIR=/nowhere: looked for test.csv in it"),
        ({"ENSEMBLE_WEIGHTS": "lgbm:-1"}, "must not be negative"),
        ({"USE_LGBM": "0", "USE_TORCH": "0", "USE_KERAS": "0"}, "No member takes part"),
    ],
)
def test_the_users_mistakes_are_one_clear_line(
    copy: Path, settings: dict[str, str], message: str
) -> None:
    done = run(copy, **settings)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def frames_of_test(out: Path) -> list[tuple[pl.DataFrame, pl.DataFrame]]:
    data = next(out.glob("simulated-*"))
    test = pl.read_csv(data / "test.csv", infer_schema_length=None)
    person = pl.read_csv(data / "test_demographics.csv")
    return [(part, person) for _, part in test.group_by("sequence_id", maintain_order=True)]


def test_served_alone_is_what_is_answered_at_once(road: tuple[Path, str]) -> None:
    """Every member and fold takes part with its weight: recomputed here from the models' files."""
    cfg = cmi.Config(output_path=road[0], strict=True, upside_down=False)
    served = cmi.load_served(cfg)
    frames = [f for f in frames_of_test(road[0]) if f[0]["thm_1"].null_count() < len(f[0])]
    raw = cmi.to_recordings(pl.concat([f for f, _ in frames]), frames[0][1])
    inputs = cmi.Inputs(cmi.canonical(raw, np.zeros(len(raw), bool)))
    blend, opinion = served.blends["all"], {}
    for part in blend.parts:
        name, mode = part.split("/")
        member = cmi.MEMBERS[name]
        models = [
            member.load(road[0] / f"{name}_models" / mode, [stem], served.table, cfg)
            for stem in ("fold00", "fold01")
        ]
        opinion[part] = np.mean(
            [member.predict(m, member.prepare(inputs, mode))[0] for m in models], axis=0
        )
    at_once = blend.mix(opinion, served.table)
    predictor = cmi.Predictor(cfg)
    predictor.served = served
    alone = [predictor.composite(cmi.to_recordings(f, p))[0] for f, p in frames]
    np.testing.assert_allclose(alone, at_once, atol=2e-5)


def test_a_recording_without_rotation_is_answered_by_models_that_never_saw_any(
    road: tuple[Path, str],
) -> None:
    cfg = cmi.Config(output_path=road[0], strict=True)
    predictor = cmi.Predictor(cfg)
    predictor.served = served = cmi.load_served(cfg)
    whole, person = frames_of_test(road[0])[0]
    blind = whole.with_columns(pl.lit(None, pl.Float64).alias(f"rot_{a}") for a in "wxyz")
    table = cmi.feature_table(cmi.to_recordings(blind, person))
    folder = road[0] / "lgbm_models" / "norot"
    model = cmi.load_lgbm(folder, ["fold00", "fold01"], served.table, cfg)
    expected = cmi.predict_lgbm(model, table).mean(axis=0)
    answer = predictor.composite(cmi.to_recordings(blind, person))
    np.testing.assert_allclose(answer, expected, atol=1e-5)
    one_row = whole.with_row_index().with_columns(
        pl.when(pl.col("index") == 3).then(f"rot_{a}").alias(f"rot_{a}") for a in "wxyz"
    )
    assert cmi.route_of(cmi.to_recordings(one_row, person), cmi.ROUTES) in cmi.MODES
    assert cmi.route_of(cmi.to_recordings(blind, person), cmi.MODES) in cmi.MODES


def test_imu_recordings_are_answered_by_imu_models(road: tuple[Path, str]) -> None:
    cfg = cmi.Config(output_path=road[0], strict=True)
    predictor = cmi.Predictor(cfg)
    predictor.served = cmi.load_served(cfg)
    blank, person = next(
        f for f in frames_of_test(road[0]) if f[0]["tof_1_v0"].null_count() == len(f[0])
    )
    parts = [p for p in predictor.served.models if p.endswith("/all")]
    for part in parts:
        predictor.served.models.pop(part)
    assert predictor.predict(blank, person) in cmi.GESTURES


def test_predict_answers_whatever_it_is_given(
    road: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    frame, person = frames_of_test(road[0])[0]
    lenient, strict = (
        cmi.Predictor(cmi.Config(output_path=road[0], strict=s)) for s in (False, True)
    )
    broken = {
        "no rows": frame.clear(),
        "two recordings": pl.concat([frame, frame.with_columns(sequence_id=pl.lit("SEQ_X"))]),
        "no id": frame.drop("sequence_id"),
    }
    for i, bad in enumerate(broken.values()):
        assert lenient.predict(bad, person) in cmi.GESTURES
        assert lenient.fallbacks.total() == i + 1
        with pytest.raises((ValueError, LookupError, pl.exceptions.PolarsError)):
            strict.predict(bad, person)
    assert "fallback" in capsys.readouterr().out
    odd = {
        "one row": frame.head(1),
        "text": frame.with_columns(pl.col(c).cast(pl.String) for c in frame.columns[4:]),
        "all null": frame.with_columns(pl.lit(None).alias(c) for c in frame.columns[4:]),
        "fewer columns": frame.drop("tof_1_v0", "rot_w"),
        "huge": frame.with_columns(acc_x=pl.lit(1e30)),
        "long": pl.concat([frame] * 60),
        "nobody": frame.with_columns(subject=pl.lit("SUBJ_unknown")),
    }
    for name, bad in odd.items():
        answer = strict.predict(bad, person)
        assert type(answer) is str, name
        assert answer in cmi.GESTURES, name


def test_a_retry_is_answered_from_memory(road: tuple[Path, str]) -> None:
    frame, person = frames_of_test(road[0])[0]
    predictor = cmi.Predictor(cmi.Config(output_path=road[0], strict=True, upside_down=False))
    first = predictor.predict(frame, person)
    assert predictor.served is not None
    predictor.served.models.clear()
    assert predictor.predict(frame, person) == first


def test_a_member_that_fails_is_left_out_and_counted(
    road: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frame, person = frames_of_test(road[0])[0]
    predictor = cmi.Predictor(cmi.Config(output_path=road[0]))

    def fail(*_: object) -> None:
        raise ValueError("planted")

    broken = cmi.dataclasses.replace(cmi.MEMBERS["torch"], predict=fail)
    monkeypatch.setitem(cmi.MEMBERS, "torch", broken)
    for blend in (predictor.load().blends["all"], predictor.load().blends["imu"]):
        assert blend.parts
    assert predictor.predict(frame, person) in cmi.GESTURES
    assert all("planted" in cause for cause in predictor.fallbacks)


@pytest.mark.skipif(not os.environ.get("CMI_REAL_DATA"), reason="CMI_REAL_DATA is not set")
def test_the_real_rows_take_the_whole_road(tmp_path: Path) -> None:
    """15 recordings of 14 subjects: most classes are missing from most folds."""
    real = Path(os.environ["CMI_REAL_DATA"])
    good(run(tmp_path / "out", CMI_DATA_DIR=str(real), N_FOLDS="5"))
    check_submission(tmp_path / "out", real / "test.csv")


@pytest.mark.skipif(not os.environ.get("CMI_REAL_DATA"), reason="CMI_REAL_DATA is not set")
def test_a_simulated_bundle_serves_the_real_test_file(copy: Path, tmp_path: Path) -> None:
    real, data = Path(os.environ["CMI_REAL_DATA"]), tmp_path / "test_only"
    data.mkdir()
    for name in ("test.csv", "test_demographics.csv"):
        shutil.copy(real / name, data / name)
    printed = good(run(copy, CMI_DATA_DIR=str(data)))
    assert "action=serve" in printed
    check_submission(copy, data / "test.csv")


def dry_run(script: Path, data: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """The script as Kaggle's hidden re-run would start it, questioned by a gateway in another process."""
    command = [sys.executable, "-m", "kaggle_evaluation.dry_run", "--test-dir", str(data)]
    return subprocess.run(
        [*command, "--truth", str(data / "test_truth.csv"), str(script)], cwd=ROOT, text=True,
        capture_output=True, timeout=500, env={**clean_environment(), **SMALL, **settings},
    )  # fmt: skip


def test_the_hidden_rerun_is_served_by_the_bundles(road: tuple[Path, str]) -> None:
    done = dry_run(
        ROOT / "cmi_pipeline.py", next(road[0].glob("simulated-*")), OUTPUT_PATH=str(road[0])
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_rerun_without_a_bundle_trains_lightgbm_in_the_first_call(
    road: tuple[Path, str], tmp_path: Path
) -> None:
    data = next(road[0].glob("simulated-*"))
    out = tmp_path / "fresh"
    done = dry_run(ROOT / "cmi_pipeline.py", data, OUTPUT_PATH=str(out), CMI_DATA_DIR=str(data))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "lgbm_models" / "bundle.json").is_file()
    assert not (out / "torch_models").exists()


@pytest.mark.parametrize(
    "below",
    [
        "competitions/cmi-detect-behavior-with-sensor-data",
        pytest.param("cmi-detect-behavior-with-sensor-data", marks=pytest.mark.slow),
    ],
)
def test_on_kaggle_the_file_alone_finds_everything(
    road: tuple[Path, str], tmp_path: Path, below: str
) -> None:
    """Data and kaggle_evaluation are attached; last week's bundle too; nothing else is there."""
    folder = tmp_path / "input" / below
    shutil.copytree(next(road[0].glob("simulated-*")), folder)
    shutil.copytree(ROOT / "kaggle_evaluation", folder / "kaggle_evaluation")
    bundle = tmp_path / "input" / "last-week"
    for name in ("lgbm_models", "ensemble"):
        shutil.copytree(road[0] / name, bundle / name)
    (tmp_path / "working").mkdir()
    shutil.copy(ROOT / "cmi_pipeline.py", tmp_path / "working")
    script = (
        "from pathlib import Path; import cmi_pipeline as cmi\n"
        f"cmi.KAGGLE_INPUT, cmi.KAGGLE_WORKING = Path({str(tmp_path / 'input')!r}), Path({str(tmp_path / 'working')!r})\n"
        f"cmi.main({SMALL | QUICK!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "working", env=clean_environment(),
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    printed = good(done)
    assert plan_of(printed)["lgbm", "all"] == ("reuse", "everything matches")
    check_submission(tmp_path / "working", folder / "test.csv")


@pytest.mark.slow  # test_machines and test_faults compare one worker with two every time
@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_two_workers_train_the_same_models(
    road: tuple[Path, str], tmp_path: Path, backend: str
) -> None:
    data = next(road[0].glob("simulated-*"))
    out = tmp_path / "out"
    good(run(out, CMI_DATA_DIR=str(data), CMI_WORKERS="2", CMI_BACKEND=backend, **QUICK))
    for mode in ("all", "imu"):
        for name in ("fold00.txt", "fold01.txt", "fold01_orientation.txt"):
            path = Path("lgbm_models", mode, name)
            trees = [
                (folder / path).read_text().split("\nparameters:")[0] for folder in (out, road[0])
            ]
            assert trees[0] == trees[1], path
