"""The whole road on small simulated data: train, reuse, serve; the full run is conftest's."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import runs
from runs import QUICK, Patch, Printed, Road, check_submission, data_of, plan_of, run_here
from test_blend import slow_pool
from test_score import plain_score

import cmi_pipeline as cmi

Served = tuple[cmi.Predictor, dict[str, Any]]
PARTS = {(member, mode) for member in ("lgbm", "torch", "keras") for mode in ("all", "imu")}
STEMS = ["fold00", "fold01"]
REAL = os.environ.get("CMI_REAL_DATA", "")
real = pytest.mark.skipif(not REAL, reason="CMI_REAL_DATA names no folder of real recordings")


def test_one_command_reaches_the_submission(road: Road) -> None:
    out, printed = road
    check_submission(out, data_of(out))
    plan = dict.fromkeys(PARTS | {("lgbm", "norot")}, ("train", "none yet"))
    assert plan_of(printed) == plan
    truth = pl.read_csv(data_of(out) / "test_truth.csv").select("sequence_id", truth="gesture")
    both = pl.read_parquet(out / "submission.parquet", glob=False).join(truth, on="sequence_id")
    codes = [np.array([cmi.GESTURES.index(g) for g in both[c]]) for c in ("truth", "gesture")]
    assert f"score {plain_score(*codes):.4f} by test_truth.csv" in printed


def test_the_screen_shows_plan_folds_and_board_on_few_lines(road: Road) -> None:
    """The board's figures are those of scores.json; what is submitted is marked."""
    out, (screen, _) = road[0], road[1].split("\f")
    lines = screen.splitlines()
    assert len(lines) <= 80
    assert re.search(r"\] plan +all +imu +norot +why$", screen, re.M)
    assert re.search(r"\] torch +train 2/2 +train 2/2 +none yet$", screen, re.M)
    done = re.findall(r"\] (\w+)/\w+/fold0[01] +score 0\.\d+ +\S+ s +(\d+)% trained", screen)
    assert [member for member, _ in done] == ["lgbm"] * 6 + ["torch"] * 4 + ["keras"] * 4
    assert [int(share) for _, share in done] == sorted(int(share) for _, share in done)
    assert done[-1][1] == "100"
    content = json.loads((out / "ensemble" / "weights.json").read_text())
    served = any(content["assignment"].values())
    for row in json.loads((out / "oof" / "scores.json").read_text())["rows"]:
        if row["mode"] in ("all", "imu", "mixed"):
            (line,) = (x for x in lines if f"] {row['name']} {row['kind']} " in x)
            assert f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in line
            submitted = row["kind"] == ("assigned" if served else "nested")
            assert ("submitted" in line) == (row["name"] == "blend" and submitted)
    words = "machine ", "recordings ", "report ", "submission ", "next ", "done ", "simulated"
    for word in words:
        assert re.search(rf"^\[ *[\d.]+s\] .*{word}", screen, re.M), word
    assert "submission.parquet, 16 rows, score" in " ".join(screen.split())
    clock = [float(line[1:8]) for line in lines if re.match(r"\[ *[\d.]+s\]", line)]
    assert np.all(np.diff(clock) > -1), "one clock for all, the gateway's lines as well"


def test_predict_serves_what_the_environment_names(road: Road, monkeypatch: Patch) -> None:
    """As it is registered with the gateway; models load with the first question."""
    monkeypatch.setattr(cmi, "PREDICTOR", [])
    for name, value in {"OUTPUT_PATH": str(road[0]), "USE_KERAS": "0", "STRICT": "1"}.items():
        monkeypatch.setenv(name, value)
    own = cmi.Predictor(cmi.Config(output_path=road[0], use_keras=False, strict=True))
    for question in runs.questions(data_of(road[0]))[:3]:
        assert cmi.predict(*question) == own.predict(*question)


def test_without_tof_and_thm_all_is_imu(road: Road, tmp_path: Path, capsys: Printed) -> None:
    """Nor is the route without rotation where every recording has one."""
    data, far = runs.copied(data_of(road[0]), tmp_path / "data"), ("thm_", "tof_")
    for name in ("train.csv", "test.csv"):
        frame = pl.read_csv((data / name).read_bytes(), infer_schema_length=None)
        gone = [pl.lit(None).alias(c) for c in frame.columns if c.startswith(far)]
        whole = [pl.col(f"rot_{a}").fill_null(float(a == "w")) for a in "wxyz"]
        frame.with_columns(*gone, *whole).write_csv(data / name)
    where = {"CMI_DATA_DIR": str(data), "NO_ROTATION": "auto", "LGBM_ROUNDS": "5"}
    assert run_here(tmp_path / "out", **QUICK, **where) is None
    plan = plan_of(capsys.readouterr().out)
    assert plan["lgbm", "all"] == ("skip", "no ToF and no THM in the data: imu is the same")
    assert plan["lgbm", "norot"] == ("skip", "every recording has a rotation")
    assert plan["lgbm", "imu"] == ("train", "none yet")
    check_submission(tmp_path / "out", data)


def test_files_lie_where_the_design_says_and_are_whole(road: Road) -> None:
    out, _ = road
    truth, folds = np.load(out / "oof" / "y_true.npy"), pl.read_csv(out / "folds.csv")
    assert len(truth) == len(folds) == 80
    assert len(folds.select("subject", "fold").unique()) == 5
    rows = json.loads((out / "oof" / "scores.json").read_text())["rows"]
    scores = {(row["name"], row["mode"]): row["score"] for row in rows if row["kind"] == "member"}
    for member, mode in PARTS:
        proba = np.load(out / "oof" / f"oof_{member}_{mode}_proba.npy")
        assert proba.shape == (80, 18)
        np.testing.assert_allclose(proba.sum(axis=1), 1, atol=1e-4)
        assert scores[member, mode] == pytest.approx(plain_score(truth, proba.argmax(axis=1)))
        bundle = json.loads((out / f"{member}_models" / "bundle.json").read_text())
        assert bundle["modes"][mode] == STEMS
    assert scores["lgbm", "all"] > 0.4  # by chance: 0.3
    weights = json.loads((out / "ensemble" / "weights.json").read_text())
    assert set(weights["modes"]) == set(weights["assignment"]) == {"all", "imu", "norot"}
    assert set(weights["capacity"]) == {1}, "the competition's protocol"
    assert all((out / x).is_file() for x in ("feature_importance.csv", "report/index.html"))
    assert not [*out.rglob("*.part*")]


def test_second_run_reuses(road: Road, tmp_path: Path, monkeypatch: Patch, capsys: Printed) -> None:
    """One array was changed: its models alone are asked again, a fold at a time."""
    loaded: list[tuple[str, int]] = []

    def watched(member: cmi.Member) -> cmi.Member:
        def load(folder: Path, stems: list[str], *rest: Any) -> Any:
            loaded.append((f"{folder.parent.name}/{folder.name}", len(stems)))
            return member.load(folder, stems, *rest)

        return dataclasses.replace(member, load=load, fit=None)  # type: ignore[arg-type]

    for name, member in cmi.MEMBERS.items():
        monkeypatch.setitem(cmi.MEMBERS, name, watched(member))
    out = runs.copied(road[0], tmp_path / "out")
    path = out / "oof" / "oof_torch_imu_composite.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (out / "submission.parquet").unlink()
    assert run_here(out) is None
    assert set(plan_of(capsys.readouterr().out).values()) == {("reuse", "everything matches")}
    assert [part for part, n in loaded if n == 1] == ["torch_models/imu"] * 2
    assert len(loaded) == 2 + 7, "the rest was loaded once, to be served"
    for path in sorted((road[0] / "oof").glob("*.npy")):
        np.testing.assert_allclose(np.load(out / "oof" / path.name), np.load(path), atol=1e-6)
    check_submission(out, data_of(out))


def test_a_bundle_elsewhere_is_reused(road: Road, tmp_path: Path, capsys: Printed) -> None:
    out, bundle = tmp_path / "new", str(road[0] / "lgbm_models")
    settings = {**QUICK, "CMI_DATA_DIR": str(data_of(road[0]))}
    assert run_here(out, MODEL_PATH=f"{bundle}/bundle.json", PLAN_ONLY="1", **settings) is None
    assert plan_of(capsys.readouterr().out)["lgbm", "all"] == ("reuse", "everything matches")
    alone = {"SERVE_ONLY": "1", "LGBM_LEAVES": "3", **settings}  # trained otherwise: no matter
    assert run_here(out, LGBM_BUNDLE_PATH=bundle, **alone) is None
    check_submission(out, data_of(road[0]))
    assert not (out / "lgbm_models").exists()
    line = run_here(out, MODEL_PATH="/no", **settings) or ""
    assert re.fullmatch("cmi_pipeline: .*looked for /no/bundle.json.*", line)


@pytest.fixture(scope="module")
def served(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A predictor of the full run's models, each with a weight of its own; weights.json."""
    content = json.loads((road[0] / "ensemble" / "weights.json").read_text())
    for blend in content["modes"].values():
        n = len(blend["parts"])
        blend["weights"] = [1.0] if n == 1 else (np.linspace(0.9, 0.3, n) / n).tolist()
    out = tmp_path_factory.mktemp("weighed")
    (out / "ensemble").mkdir()
    (out / "ensemble" / "weights.json").write_text(json.dumps(content))
    bundles: dict[str, Any] = {f"{m}_bundle_path": road[0] / f"{m}_models" for m, _ in PARTS}
    return cmi.Predictor(cmi.Config(output_path=out, strict=True, **bundles)), content


def all_at_once(out: Path, rec: cmi.Recordings, mode: str, weights: dict[str, Any]) -> np.ndarray:
    """Gesture probabilities of all recordings from the models' files, fold by fold. → (N, 18)"""
    table, frames = cmi.extract_features(cmi.canonical(rec, np.zeros(len(rec), bool)))
    labels, blend, folds = np.array(weights["labels"]), weights["modes"][mode], []
    for name, of in (part.split("/") for part in blend["parts"]):
        x = (table if name == "lgbm" else frames).of_mode("all" if of == "norot" else of)
        member, folder = cmi.MEMBERS[name], out / f"{name}_models" / of
        models = [member.load(folder, [stem], labels, cmi.Config()) for stem in STEMS]
        folds.append([member.predict(model, x)[0] for model in models])
    proba = slow_pool(np.mean(folds, axis=1, dtype=np.float64), blend["weights"])
    return np.stack([proba[:, labels[:, 2] == g].sum(axis=1) for g in range(18)], axis=1)


@pytest.mark.parametrize("mode", ["all", "imu", "norot"])
def test_served_alone_is_all_at_once(road: Road, served: Served, mode: str) -> None:
    """Every member and fold takes part with its weight; without rotation models that saw none."""
    asked = runs.questions(data_of(road[0]))
    blind = [pl.lit(None, pl.Float64).alias(f"rot_{a}") for a in "wxyz" if mode == "norot"]
    frames = [frame.with_columns(blind) for frame, _ in asked]
    if not blind:
        sees = [frame["tof_1_v0"].null_count() < len(frame) for frame in frames]
        frames = [f for f, tof in zip(frames, sees, strict=True) if tof == (mode == "all")]
    assert len(frames) > 3
    person = asked[0][1]  # of the only test subject
    alone = [list(served[0].predict_proba(frame, person).values()) for frame in frames]
    expected = all_at_once(road[0], cmi.to_recordings(pl.concat(frames), person), mode, served[1])
    np.testing.assert_allclose(alone, expected, atol=1e-5)
    np.testing.assert_allclose(np.sum(alone, axis=1), 1, atol=1e-6)


@real
def test_the_real_rows_take_the_whole_road(tmp_path: Path) -> None:
    """15 recordings of 14 subjects: most classes are missing from most folds."""
    runs.good(runs.run(tmp_path / "out", CMI_DATA_DIR=REAL, N_FOLDS="3", USE_KERAS="0"))
    check_submission(tmp_path / "out", Path(REAL))


@real
def test_a_simulated_bundle_serves_real_files(road: Road, tmp_path: Path, capsys: Printed) -> None:
    (data := tmp_path / "test_only").mkdir()
    for name in ("test.csv", "test_demographics.csv"):
        shutil.copy(Path(REAL, name), data / name)
    out = runs.copied(road[0], tmp_path / "out")
    assert run_here(out, CMI_DATA_DIR=str(data)) is None
    printed = capsys.readouterr().out
    assert "serve what is there" in printed
    assert "fallbacks=0" in printed
    check_submission(out, data)


def test_the_hidden_rerun_is_served_without_any_bundle(road: Road, tmp_path: Path) -> None:
    data, out = data_of(road[0]), tmp_path / "out"
    env = runs.environment(out, CMI_DATA_DIR=str(data), STRICT="1")
    runs.good(runs.dry_run(data, "--truth", data / "test_truth.csv", runs.SCRIPT, env=env))
    assert (out / "lgbm_models" / "bundle.json").is_file()
    assert not (out / "torch_models").exists()
