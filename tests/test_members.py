"""Plan, training, out-of-fold rows and serving with a member that knows what it was shown."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from made import changed, recordings
from runs import Patch
from test_serving import frame_of

import cmi_pipeline as cmi

Data = cmi.TrainingData
N, L = 24, 4
ENDS = (".txt",)  # what it writes for each fold


def prepare(inputs: cmi.Inputs, mode: str, more: int = 0) -> cmi.FeatureTable:
    number = [[float(name.split("_")[1]) + more] for name in inputs.rec.sequence_id]
    return cmi.FeatureTable((f"number_{mode}",), np.array(number, np.float32))


def fit(job: cmi.Job, x: cmi.FeatureTable, *_: object) -> dict[str, Any]:
    shown = {"rows": x.x[job.train, 0].tolist(), "seed": job.seed}
    cmi.write_json(job.folder / f"{job.stem}.txt", shown)
    return {}


def load(folder: Path, stems: Sequence[str], *_: object) -> list[Any]:
    return [json.loads((folder / f"{stem}.txt").read_text()) for stem in stems]


def predict(model: list[Any], x: cmi.FeatureTable) -> cmi.F32:
    """Label 0 for what it was trained on, else label 1 or, with the second seed, 2."""
    proba = np.zeros((len(model), len(x.x), L), np.float32)
    for i, stem in enumerate(model):
        known = np.isin(x.x[:, 0], stem["rows"])
        proba[i, np.arange(len(x.x)), np.where(known, 0, 1 + stem["seed"])] = 1
    return proba


PARROT = cmi.Member(
    packages=("numpy",), files=ENDS, prepare=prepare, fit=fit, load=load, predict=predict,
    default_weight=1.0, modes=("all",),
)  # fmt: skip


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: Patch) -> cmi.Config:
    monkeypatch.setattr(cmi, "KAGGLE_INPUT", tmp_path / "nothing")
    monkeypatch.setattr(cmi, "MEMBERS", {"torch": PARROT})
    return cmi.Config(output_path=tmp_path / "out", n_folds=2, torch_seeds=2, strict=True)


def made(cfg: cmi.Config) -> Data:
    rec = changed(recordings([5] * N), subject=np.array([f"SUBJ_{i % 6}" for i in range(N)]))
    gesture = np.random.default_rng(0).permutation(np.repeat([0, 5, 9, 12], N // 4))
    still = np.zeros(N, np.int64)
    labels = cmi.Labels.of(gesture, still, still, np.zeros(5 * N, np.uint8))
    fold = cmi.make_folds(rec.subject, cfg)
    return cmi.TrainingData(cmi.Inputs(rec), labels, fold, "data", "turned", None)


def item_of(data: Data, cfg: cmi.Config) -> cmi.PlanItem:
    (item,) = cmi.make_plan(data, cfg)
    return item


def train(data: Data, cfg: cmi.Config) -> cmi.F32:
    (oof,) = cmi.train_members(cmi.make_plan(data, cfg), data, cfg).values()
    return oof


@pytest.fixture
def data(cfg: cmi.Config) -> Data:
    data = made(cfg)
    train(data, cfg)
    assert item_of(data, cfg).action == "reuse"
    return data


def test_no_recording_is_scored_by_a_model_that_saw_its_wearer(cfg: cmi.Config) -> None:
    data = made(cfg)
    oof = train(data, cfg)
    np.testing.assert_array_equal(oof, np.tile([0, 0.5, 0.5, 0], (N, 1)))  # the mean of both seeds
    for path in (cfg.out / "torch_models" / "all").glob("fold*.txt"):
        rows = np.array(json.loads(path.read_text())["rows"], int)
        held_out = data.fold == int(path.stem[4:6])
        assert not set(data.inputs.rec.subject[rows]) & set(data.inputs.rec.subject[held_out])
        assert len(rows) + held_out.sum() == N
    more = item_of(data, dataclasses.replace(cfg, torch_seeds=3))  # what is there is kept
    assert [job.stem for job in more.todo] == ["fold00_seed2", "fold01_seed2"]
    rows = np.arange(5)
    with pytest.raises(AssertionError, match="overlap"):
        cmi.Job("torch", "all", 0, 0, rows, rows[4:], cfg.out, cfg.out, cfg.out)


def test_what_a_model_depends_on_is_named(cfg: cmi.Config, data: Data, monkeypatch: Patch) -> None:
    other = functools.partial(prepare, more=1)
    changes: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"data_digest": "other"}, {}, "data differ"),
        ({"upside_down": "other"}, {}, "upside down differ"),
        ({"fold": np.arange(N) % 6 // 3}, {}, "training rows differ"),
        ({}, {"form": 99}, "form of the files differ"),
        ({}, {"packages": ("numpy", "scipy")}, "major version of scipy absent → 1"),
        ({}, {"prepare": other}, "its input is computed in another way now"),
    ]
    for of_data, of_member, why in changes:
        monkeypatch.setitem(cmi.MEMBERS, "torch", dataclasses.replace(PARROT, **of_member))
        item = item_of(dataclasses.replace(data, **of_data), cfg)
        assert (item.action, item.why, len(item.todo)) == ("train", why, 4)


def test_after_a_failure_done_modes_count(cfg: cmi.Config, data: Data, monkeypatch: Patch) -> None:
    """The note says that a model counts: it goes first, and comes back last."""

    def failing(job: cmi.Job, *rest: Any) -> dict[str, Any]:
        if job.mode == "imu":
            (job.folder / f"{job.stem}.txt").write_text("half")
            raise RuntimeError("planted")
        return fit(job, *rest)

    both = dataclasses.replace(PARROT, modes=cmi.MODES)
    monkeypatch.setitem(cmi.MEMBERS, "torch", both)
    cmi.train_members(cmi.make_plan(data, cfg), data, cfg)
    monkeypatch.setitem(cmi.MEMBERS, "torch", dataclasses.replace(both, fit=failing))
    plan = cmi.make_plan(data, dataclasses.replace(cfg, force_train_torch=True))
    with pytest.raises(RuntimeError, match="planted"):
        cmi.train_members(plan, data, cfg)
    bundle = json.loads((cfg.out / "torch_models" / "bundle.json").read_text())
    assert list(bundle["modes"]) == ["all"]
    monkeypatch.setitem(cmi.MEMBERS, "torch", both)
    todo = [job.name for item in cmi.make_plan(data, cfg) for job in item.todo]
    assert todo == ["torch/imu/fold00"]


def test_of_two_bundles_the_weights_choose(cfg: cmi.Config, data: Data, tmp_path: Path) -> None:
    """Asked about a recording that one of two folds was trained on: label 0 by half. The other half
    says label 1, or label 2 by the second seed, which only one of the bundles has."""
    there = dataclasses.replace(cfg, output_path=tmp_path / "there", torch_seeds=1)
    train(data, there)
    both = dataclasses.replace(cfg, torch_bundle_path=there.out / "torch_models")
    table = data.labels.table
    for of, expected in ((cfg, [0.5, 0.25, 0.25, 0]), (there, [0.5, 0.5, 0, 0])):
        notes = [job.note.read_bytes() for job in data.jobs("torch", "all", of)]
        cmi.write_json(cfg.out / "ensemble" / "weights.json", {
            "modes": {"all": {"parts": ["torch/all"], "weights": [1.0]}},
            "labels": table.tolist(), "capacity": [1] * L, "assignment": {"all": True},
            "digests": {"torch/all": cmi.digest(*notes)}, "wearer": None,
        })  # fmt: skip
        frame, person = frame_of(0, rec=data.inputs.rec), pl.DataFrame({"subject": ["SUBJ_1"]})
        proba = cmi.Predictor(both).predict_proba(frame, person)
        got = [proba[cmi.GESTURES[gesture]] for gesture in table[:, 2]]
        np.testing.assert_allclose(got, expected, atol=1e-4)
