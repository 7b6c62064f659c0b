"""Plan, training, out-of-fold rows and nested blend with a member that trains in no time.

It writes down what it was shown and answers whether it knows a recording: a leak shows at once.
"""

import dataclasses
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import changed, recordings

import cmi_pipeline as cmi

N, L = 24, 4
SEEN = 0  # the label it gives to a recording that it was trained on
ENDS = (".txt",)  # what it writes for each fold


def prepare(inputs: cmi.Inputs, mode: str) -> cmi.Table:
    """The number in a recording's id."""
    number = [[float(name.split("_")[1])] for name in inputs.rec.sequence_id]
    none = np.zeros(1)
    return cmi.Table((f"number_{mode}",), np.array(number, np.float32), none.astype(np.uint8), none)


def fit(job: cmi.Job, x: cmi.Table, *_: object) -> dict[str, Any]:
    shown = {"rows": x.x[job.train, 0].tolist(), "seed": job.seed}
    cmi.write_json(job.folder / f"{job.stem}.txt", shown)
    return {}


def load(folder: Path, stems: Sequence[str], *_: object) -> list[Any]:
    return [json.loads((folder / f"{stem}.txt").read_text()) for stem in stems]


def predict(model: list[Any], x: cmi.Table) -> cmi.F32:
    """Label 0 for what it knows, else label 1 or, with the second seed, 2."""
    proba = np.zeros((len(model), len(x), L), np.float32)
    for i, stem in enumerate(model):
        known = np.isin(x.x[:, 0], stem["rows"])
        proba[i, np.arange(len(x)), np.where(known, SEEN, 1 + stem["seed"])] = 1
    return proba


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cmi.Config:
    monkeypatch.setattr(cmi, "KAGGLE_INPUT", tmp_path / "nothing")
    parrot = cmi.Member(("numpy",), ENDS, prepare, fit, load, predict, 1.0, ("all",))
    monkeypatch.setattr(cmi, "MEMBERS", {"torch": parrot})
    return cmi.Config(output_path=tmp_path / "out", n_folds=2, torch_seeds=2, strict=True)


def study_of(cfg: cmi.Config, **changes: Any) -> cmi.Study:
    rng = np.random.default_rng(0)
    rec = recordings([5] * N)
    rec = changed(rec, subject=np.array([f"SUBJ_{i % 6}" for i in range(N)]))
    gesture = rng.permutation(np.repeat([0, 5, 9, 12], N // 4))
    still = np.zeros(N, np.int64)
    labels = cmi.Labels.of(gesture, still, still, np.zeros(5 * N, np.uint8))
    fold = cmi.make_folds(rec.subject, cfg)
    study = cmi.Study(cmi.Inputs(rec), labels, fold, "data", "turned", None)
    return dataclasses.replace(study, **changes)


def step_of(study: cmi.Study, cfg: cmi.Config) -> cmi.Step:
    (step,) = cmi.make_plan(study, cfg)
    return step


def trained(cfg: cmi.Config) -> cmi.Study:
    """A study whose every model is on disk."""
    study = study_of(cfg)
    cmi.train_members(cmi.make_plan(study, cfg), study, cfg)
    assert step_of(study, cfg).action == "reuse"
    return study


def test_a_job_cannot_be_scored_on_what_it_learnt(tmp_path: Path) -> None:
    rows = np.arange(5)
    with pytest.raises(AssertionError, match="overlap"):
        cmi.Job("torch", "all", 0, 0, rows, rows[4:], tmp_path, tmp_path, tmp_path)


def test_no_recording_is_scored_by_a_model_that_saw_its_wearer(cfg: cmi.Config) -> None:
    study = study_of(cfg)
    oof = cmi.train_members(cmi.make_plan(study, cfg), study, cfg)["torch", "all"]
    np.testing.assert_array_equal(oof, np.tile([0, 0.5, 0.5, 0], (N, 1)))  # the mean of both seeds
    for path in (cfg.out / "torch_models" / "all").glob("fold*.txt"):
        rows = np.array(json.loads(path.read_text())["rows"], int)
        held_out = study.fold == int(path.stem[4:6])
        assert not set(study.inputs.rec.subject[rows]) & set(study.inputs.rec.subject[held_out])
        assert len(rows) + held_out.sum() == N


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"mark": "other"}, "data differ"),
        ({"turned": "other"}, "turned differ"),
        ({"fold": np.arange(N) % 6 // 3}, "training rows differ"),
    ],
)
def test_what_a_model_depends_on_is_named_when_it_changes(
    cfg: cmi.Config, change: dict[str, Any], why: str
) -> None:
    study = trained(cfg)
    step = step_of(dataclasses.replace(study, **change), cfg)
    assert (step.action, step.why, len(step.todo)) == ("train", why, 4)


def test_models_of_another_form_are_trained_again(
    cfg: cmi.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = trained(cfg)
    newer = dataclasses.replace(cmi.MEMBERS["torch"], form=cmi.MEMBERS["torch"].form + 1)
    monkeypatch.setitem(cmi.MEMBERS, "torch", newer)
    step = step_of(study, cfg)
    assert (step.action, step.why, len(step.todo)) == ("train", "form of the files differ", 4)


def test_an_input_that_is_computed_in_another_way_trains_again(
    cfg: cmi.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = trained(cfg)

    def other(inputs: cmi.Inputs, mode: str) -> cmi.Table:
        table = prepare(inputs, mode)
        return dataclasses.replace(table, x=table.x + 1)

    parrot = dataclasses.replace(cmi.MEMBERS["torch"], prepare=other)
    monkeypatch.setitem(cmi.MEMBERS, "torch", parrot)
    step = step_of(dataclasses.replace(study), cfg)  # another key of the cache
    assert (step.action, step.why) == ("train", "its input is computed in another way now")


def test_one_changed_byte_trains_that_model_alone(cfg: cmi.Config) -> None:
    study = trained(cfg)
    path = cfg.out / "torch_models" / "all" / "fold01_seed1.txt"
    before = path.read_bytes()
    path.write_bytes(before.replace(b"seed", b"sEed"))
    step = step_of(study, cfg)
    assert (step.action, [j.stem for j in step.todo]) == ("resume", ["fold01_seed1"])
    assert "fold01_seed1.txt is absent or was changed" in step.why
    cmi.train_members([step], study, cfg)
    assert path.read_bytes() == before
    forced = dataclasses.replace(cfg, force_train_torch=True)
    assert len(step_of(study, forced).todo) == 4
    assert step_of(study, forced).why == "FORCE_TRAIN_TORCH=1"


def test_a_training_that_fails_takes_its_former_note_along(
    cfg: cmi.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note says that a model counts: it goes first, and comes back last."""
    study = trained(cfg)

    def fail(job: cmi.Job, *_: object) -> dict[str, Any]:
        (job.folder / f"{job.stem}.txt").write_text("half")
        raise RuntimeError("planted")

    broken = dataclasses.replace(cmi.MEMBERS["torch"], fit=fail)
    monkeypatch.setitem(cmi.MEMBERS, "torch", broken)
    job = study.jobs("torch", "all", cfg)[1]
    with pytest.raises(RuntimeError, match="planted"):
        cmi.run_job(job, study, cfg)
    assert not job.note.exists()
    assert cmi.usable_models(cfg.out / "torch_models", ENDS) == {}


def test_threads_side_by_side_leave_the_same_files(cfg: cmi.Config) -> None:
    alone = trained(cfg)
    other = dataclasses.replace(
        cfg, output_path=cfg.out / "other", cmi_workers=3, cmi_backend="threading"
    )
    cmi.train_members(cmi.make_plan(alone, other), alone, other)
    for path in (cfg.out / "torch_models" / "all").glob("fold*.txt"):
        assert (other.out / "torch_models" / "all" / path.name).read_bytes() == path.read_bytes()
    assert threading.active_count() < 50


@pytest.mark.parametrize("name", ["fold00/../../x", "../fold00", "fold00.pt", "fold0", 7])
def test_a_bundle_cannot_name_files_elsewhere(cfg: cmi.Config, name: Any) -> None:
    trained(cfg)
    path = cfg.out / "torch_models" / "bundle.json"
    bundle = json.loads(path.read_text())
    bundle["modes"]["all"][0] = name
    path.write_text(json.dumps(bundle))
    with pytest.raises(cmi.DataError, match="names files that no run writes"):
        cmi.usable_models(path.parent, ENDS)


@pytest.mark.parametrize("files", [{}, {".txt": "", "/../../../secret.txt": ""}, None, [".txt"]])
def test_a_note_names_exactly_the_files_of_its_member(cfg: cmi.Config, files: Any) -> None:
    trained(cfg)
    note = cfg.out / "torch_models" / "all" / "fold00.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"files": files}))
    with pytest.raises(cmi.DataError, match=r"does not name the files fold00\.txt"):
        cmi.usable_models(cfg.out / "torch_models", ENDS)


def test_of_two_bundles_the_one_that_the_weights_were_found_for_is_taken(
    cfg: cmi.Config, tmp_path: Path
) -> None:
    study = trained(cfg)
    named = dataclasses.replace(cfg, output_path=tmp_path / "named", seed=43)
    cmi.train_members(cmi.make_plan(study, named), study, named)
    folders = [c.out / "torch_models" for c in (cfg, named)]
    stems = [job.stem for job in study.jobs("torch", "all", cfg)]
    both = dataclasses.replace(cfg, torch_bundle_path=folders[1])
    for folder in folders:
        mark = cmi.bundle_mark(folder / "all", stems)
        assert cmi.find_models(both, {"torch/all": mark})["torch/all"][0] == folder / "all"
    assert cmi.find_models(both, {})["torch/all"][0] == folders[1] / "all"


# ---- folds.csv -----------------------------------------------------------------------------------


def test_folds_are_kept_and_refused_if_they_are_of_others(cfg: cmi.Config) -> None:
    rec = study_of(cfg).inputs.rec
    fold = cmi.saved_folds(rec, cfg)
    path = cfg.out / "folds.csv"
    path.write_text("\n".join([path.read_text().splitlines()[0]] + [
        f"{i},{s},{1 - f}" for i, s, f in zip(rec.sequence_id, rec.subject, fold, strict=True)
    ]))  # fmt: skip
    np.testing.assert_array_equal(cmi.saved_folds(rec, cfg), 1 - fold)  # what the file says
    lines = path.read_text().splitlines()
    id_, subject, k = lines[1].split(",")
    path.write_text("\n".join([lines[0], f"{id_},{subject},{1 - int(k)}", *lines[2:]]))
    assert cmi.read_folds(path, rec, cfg)[1] == "some subject is in two folds"
    path.write_text("\n".join([lines[0], f"SEQ_X,{subject},{k}", *lines[2:]]))
    assert cmi.read_folds(path, rec, cfg)[1] == "of other data"
    path.write_text("\n".join(lines))
    more = dataclasses.replace(cfg, n_folds=3)
    assert "its folds are not 0 … 2" in cmi.read_folds(path, rec, more)[1]
    np.testing.assert_array_equal(cmi.saved_folds(rec, more), cmi.make_folds(rec.subject, more))


# ---- blend ---------------------------------------------------------------------------------------


def test_imu_models_join_the_blend_of_all_sensors_and_not_the_reverse() -> None:
    present = [("lgbm", "all"), ("lgbm", "imu"), ("lgbm", "norot"), ("torch", "imu")]
    assert cmi.parts_of("all", present) == [("lgbm", "all"), ("lgbm", "imu"), ("torch", "imu")]
    assert cmi.parts_of("imu", present) == [("lgbm", "imu"), ("torch", "imu")]
    assert cmi.parts_of("norot", present) == [("lgbm", "norot")]


def opinions(study: cmi.Study, seed: int) -> cmi.F32:
    """Composite probabilities that know something. → (N, L)"""
    rng = np.random.default_rng(seed)
    logit = rng.normal(0, 1, (N, L))
    logit[np.arange(N), study.labels.composite] += 1
    return cmi.softmax(logit).astype(np.float32)


def test_the_nested_blend_never_looks_at_the_truth_of_its_own_fold(
    cfg: cmi.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other truth in fold 0: its rows are blended as before, those of fold 1 are not."""
    only = {"temperature": cmi.TRANSFORMS["temperature"]}  # fitted to the truth, as the weights are
    monkeypatch.setattr(cmi, "TRANSFORMS", only)
    study = study_of(cfg)
    oof = {("lgbm", "all"): opinions(study, 1), ("torch", "all"): opinions(study, 2)}
    blend, nested, figures = cmi.blend_mode("all", oof, study, cfg)
    first = study.fold == 0
    gesture = study.labels.gesture.copy()
    gesture[first] = np.roll(gesture[first], 5)
    other = dataclasses.replace(study, labels=dataclasses.replace(study.labels, gesture=gesture))
    again_blend, again, _ = cmi.blend_mode("all", oof, other, cfg)
    np.testing.assert_array_equal(again[first], nested[first])
    assert np.abs(again[~first] - nested[~first]).max() > 1e-4
    assert (again_blend.weights, again_blend.knobs) != (blend.weights, blend.knobs)
    proba = cmi.gesture_proba(nested, study.labels.table)
    assert figures["nested"] == cmi.score(study.labels.gesture, proba.argmax(axis=1))


def test_replayed_wearers_share_no_labels(cfg: cmi.Config) -> None:
    """Sure of one label for all: a wearer gets each of the four labels once, whatever the order."""
    study = study_of(cfg)
    sure = np.full((N, L), 0.01, np.float32)
    sure[np.arange(N), study.labels.composite] = 0.97
    by_wearer = [study.labels.composite[study.inputs.rec.subject == f"SUBJ_{i}"] for i in range(6)]
    unique = [len(set(own.tolist())) == len(own) for own in by_wearer]
    assert not all(unique), "the data break the protocol, so some answer must be wrong"
    assert cmi.replay_assignment(sure, study, cfg, 3).max() < 1
    own = np.arange(N) // 6 % L  # each wearer performs every label once
    gesture = study.labels.table[own, 2]
    labels = cmi.Labels.of(gesture, 0 * own, 0 * own, study.labels.phase)
    right = np.full((N, L), 0.01, np.float32)
    right[np.arange(N), labels.composite] = 0.97
    np.testing.assert_array_equal(
        cmi.replay_assignment(right, dataclasses.replace(study, labels=labels), cfg, 3), 1
    )


def test_a_mode_trained_here_has_a_bundle_though_another_is_reused(
    cfg: cmi.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (member,) = cmi.MEMBERS.values()
    monkeypatch.setattr(cmi, "MEMBERS", {"torch": dataclasses.replace(member, modes=cmi.MODES)})
    study = study_of(cfg)
    away = dataclasses.replace(cfg, output_path=tmp_path / "away")
    cmi.train_members(cmi.make_plan(study, away), study, away)
    next((away.out / "torch_models" / "imu").glob("fold00*.txt")).write_text("damaged")
    named = dataclasses.replace(cfg, torch_bundle_path=away.out / "torch_models")
    cmi.train_members(cmi.make_plan(study, named), study, named)
    found = cmi.find_models(named, {})
    assert found["torch/all"][0] == away.out / "torch_models" / "all"
    assert found["torch/imu"][0] == cfg.out / "torch_models" / "imu"


def test_a_mode_that_is_done_has_a_bundle_before_the_next_one_fails(
    cfg: cmi.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(job: cmi.Job, *rest: Any) -> dict[str, Any]:
        if job.mode == "imu":
            raise RuntimeError("planted")
        return fit(job, *rest)

    (member,) = cmi.MEMBERS.values()
    broken = dataclasses.replace(member, modes=cmi.MODES, fit=failing)
    monkeypatch.setattr(cmi, "MEMBERS", {"torch": broken})
    study = study_of(cfg)
    with pytest.raises(RuntimeError, match="planted"):
        cmi.train_members(cmi.make_plan(study, cfg), study, cfg)
    assert list(cmi.find_models(cfg, {})) == ["torch/all"]


def test_a_mistake_in_the_weights_shows_before_training(
    cfg: cmi.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = dataclasses.replace(cfg, ensemble_weights="keras:1")
    study = study_of(wrong)
    monkeypatch.setattr(cmi, "make_study", lambda _: study)
    with pytest.raises(cmi.ConfigError, match="is no member"):
        cmi.train_all(wrong)
    assert not (cfg.out / "torch_models").exists()
