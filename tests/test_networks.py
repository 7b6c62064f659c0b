"""What Torch and Keras both promise: one training, one contract, asked through MEMBERS. Keras comes
first: Torch's first optimiser is made after TensorFlow was loaded. One compiled graph serves most."""

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made import frames_to_learn
from runs import Patch

import cmi_pipeline as cmi

if not all(map(importlib.util.find_spec, ("torch", "tensorflow", "keras"))):
    pytest.skip("Torch or Keras is not installed", allow_module_level=True)
import torch

Array = np.ndarray[Any, Any]
LEARNERS: dict[str, Any] = {"torch": cmi.TorchLearner, "keras": cmi.KerasLearner}
ENDS = {"torch": ".pt", "keras": ".keras"}
TINY = {"width": 16, "max_epochs": 8, "lr": 1e-2, "es_patience": 2, "dropout": 0.1}
SELDOM = {"mixup": 0.1, "stretch": 0.2, "jitter": 0.2, "shift": 0.2, "modality_dropout": 0.1}
FRAMES, LABELS = DATA = frames_to_learn()
LOUD = dataclasses.replace(FRAMES, x=np.where(FRAMES.x > 2, FRAMES.x * 1e6, FRAMES.x))
CODES = LABELS.table[:, 2]
both = pytest.mark.parametrize("member", ["keras", "torch"])


def config(member: str, **changes: Any) -> cmi.Config:
    """A tiny network; what is no setting by its own name is one of the member."""
    known = {f.name for f in dataclasses.fields(cmi.Config)}
    own = {k if k in known else f"{member}_{k}": v for k, v in (TINY | changes).items()}
    shares = {f"{name}_prob": share for name, share in SELDOM.items()}
    return cmi.Config(**({"fixed_pad_len": 24, "keras_threads": 1} | shares | own))


def job_in(folder: Path, member: str, fold: int = 1, mode: str = "all", **rows: Any) -> cmi.Job:
    out = np.arange(36) // 4 % 3 == fold
    rows = {"train": np.flatnonzero(~out), "valid": np.flatnonzero(out)} | rows
    places = (folder / f"{member}_models" / mode, folder / "scratch", folder / "logs")
    return cmi.Job(member, mode, 0, fold, rows["train"], rows["valid"], *places)


def fit(job: cmi.Job, cfg: cmi.Config | None = None, data: Any = DATA) -> dict[str, Any]:
    return cmi.MEMBERS[job.member].fit(job, *data, cfg or config(job.member))


def load(job: cmi.Job, table: Array = LABELS.table) -> Any:
    return cmi.MEMBERS[job.member].load(job.folder, [job.stem], table, config(job.member))


def answers(job: cmi.Job, frames: cmi.Frames = FRAMES) -> Array:
    return cmi.MEMBERS[job.member].predict(load(job), frames)[0]


def numbers(job: cmi.Job) -> dict[str, Array]:
    """Everything that a network's file holds, read without this pipeline."""
    path = job.folder / f"{job.stem}{ENDS[job.member]}"
    if job.member == "torch":
        return {k: v.numpy() for k, v in torch.load(path, weights_only=True).items()}
    return {v.path: v.value.numpy() for v in cmi.keras.saving.load_model(path).weights}


def assert_same(one: dict[str, Array], other: dict[str, Array], member: str) -> None:
    """Torch to the bit, Keras to 1e-6."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        atol = 0 if member == "torch" else 1e-6
        np.testing.assert_allclose(value, other[name], rtol=0, atol=atol, err_msg=name)


def progress_of(job: cmi.Job, name: str) -> list[Any]:
    lines = (job.logs / f"{job.member}_progress.jsonl").read_text().splitlines()
    return [line[name] for line in map(json.loads, lines) if line["fold"] == job.fold]


def patch_step(patch: Patch, member: str, change: Any, last: float = 1e9) -> list[Any]:
    """Each step learns the pieces that `change(number, pieces)` gives, or nothing if that is a loss;
    the process is stopped after the `last`. → sizes of the pieces, and rate, of each step"""
    whole, calls = LEARNERS[member].train_step, []

    def train_step(learner: Any, pieces: list[cmi.Batch], rate: float) -> Any:
        calls.append(([len(piece) for piece in pieces], rate))
        if len(calls) > last:
            raise KeyboardInterrupt
        changed = change(len(calls), pieces)
        return changed if isinstance(changed, float) else whole(learner, changed, rate)

    patch.setattr(LEARNERS[member], "train_step", train_step)
    return calls


def fit_stopped(job: cmi.Job, last: int, data: Any = DATA, change: Any = None) -> list[list[int]]:
    with Patch.context() as patch:
        calls = patch_step(patch, job.member, change or (lambda _, pieces: pieces), last)
        with pytest.raises(KeyboardInterrupt):
            fit(job, data=data)
    return [sizes for sizes, _ in calls]


@pytest.fixture(scope="module", params=["keras", "torch"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two folds, trained one after the other, and what the second one said of validation rows."""
    member, folder, said = request.param, tmp_path_factory.mktemp(request.param), []
    other, job, ask = job_in(folder, member, 0), job_in(folder, member), LEARNERS[member].logits
    fit(other)
    with Patch.context() as patch:
        patch.setattr(LEARNERS[member], "logits", lambda *x: said.append(ask(*x)) or said[-1])
        return SimpleNamespace(member=member, other=other, job=job, info=fit(job), said=said)


@pytest.fixture
def eager() -> Iterator[None]:
    """Keras without compiling: for graphs that are used once."""
    cmi.start_keras(1)
    cmi.tf.config.run_functions_eagerly(run_eagerly=True)
    yield
    cmi.tf.config.run_functions_eagerly(run_eagerly=False)


def test_it_learns_and_tells_every_epoch(trained: Any) -> None:
    job, n = trained.job, trained.info["epochs"]
    assert progress_of(job, "epoch") == list(range(1, n + 1))
    assert progress_of(job, "train_loss")[-1] < 0.7 * progress_of(job, "train_loss")[0]
    said = cmi.gesture_proba(answers(job), LABELS.table).argmax(axis=1)
    assert (said == LABELS.gesture)[job.train].mean() > 0.5
    table = np.genfromtxt(job.folder / f"{job.stem}_train.csv", delimiter=",", names=True)
    for name in ("epoch", "train_loss", "val_loss", "val_acc", "score", "bin_f1", "macro_f1", "lr"):
        np.testing.assert_allclose(table[name], progress_of(job, name), rtol=1e-4)
    assert not list(job.scratch.iterdir())


def test_the_file_answers_as_the_network_did_in_training(trained: Any) -> None:
    """Norms fused or not, by the fold's own graph or another's, saved and loaded; heads combined."""
    job, info = trained.job, trained.info
    odds = [np.exp(raw.astype(float)) for raw in trained.said[info["best_epoch"] - 1]]
    gesture, label = (part / part.sum(axis=1, keepdims=True) for part in odds)
    want = np.zeros_like(label)
    for j, code in enumerate(CODES):  # half from its own head, half from its labels, shared out
        summed = label[:, code == CODES].sum(axis=1)
        want[:, j] = label[:, j] / summed * (gesture[:, code] + summed) / 2
    want /= want.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(answers(job)[job.valid], want, rtol=0, atol=1e-5)
    proba, truth = cmi.gesture_proba(want, LABELS.table), LABELS.gesture[job.valid]
    loss = -np.log(proba[np.arange(len(truth)), truth]).mean()
    assert info["val_loss"] == pytest.approx(loss, rel=1e-4)
    assert info["score"] == pytest.approx(cmi.score(truth, proba.argmax(axis=1)))


def test_a_recording_is_answered_alone_as_in_a_crowd(trained: Any) -> None:
    predict, folds = cmi.MEMBERS[trained.member].predict, load(trained.job) + load(trained.other)
    crowd = predict(folds, FRAMES.take(np.arange(300) % 36))
    assert crowd.shape == (2, 300, len(CODES))
    np.testing.assert_allclose(crowd.sum(axis=2), 1, atol=1e-5)
    np.testing.assert_allclose(crowd[:, 252:288], crowd[:, :36], rtol=0, atol=1e-5)
    for i in (0, 13, 35):
        alone = predict(folds, FRAMES.take(np.array([i])))
        np.testing.assert_allclose(alone[:, 0], crowd[:, i], rtol=0, atol=1e-5)
    assert np.abs(crowd[0] - crowd[1]).max() > 1e-3, "two folds are two networks"


def plain_batch(fold: cmi.NetworkFold) -> Any:
    return cmi.Batches(FRAMES, fold.spec, fold.mean, fold.sd).plain(np.arange(36))


def test_padding_to_twice_the_length_changes_no_answer(trained: Any) -> None:
    (fold,) = load(trained.job)
    batch = plain_batch(fold)
    assert batch.x.shape[1] == 24
    wide = cmi.Batch(np.pad(batch.x, ((0, 0), (0, 24), (0, 0))))
    for a, b in zip(fold.logits(batch), fold.logits(wide), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_a_fold_beside_another_is_as_in_a_full_run(trained: Any, tmp_path: Path) -> None:
    jobs = [job_in(tmp_path, trained.member, fold) for fold in (1, 0)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fit, jobs))
    for again, first in zip(jobs, (trained.job, trained.other), strict=True):
        assert_same(numbers(again), numbers(first), trained.member)


def test_resumed_is_as_undisturbed(trained: Any, tmp_path: Path, monkeypatch: Patch) -> None:
    """The validation loss is dictated, so that the fourth epoch is the best."""
    truth, found, weights = LABELS.gesture[trained.job.valid, None], [], []

    def logits(learner: Any, _: cmi.Batch) -> tuple[Array, Array]:
        p = np.exp(-next(losses))  # of the truth, and of the three others what is left
        rise = np.log(3 * p / (1 - p))
        others = np.where(np.isin(np.arange(18), CODES), 0.0, -60.0)
        weights.append(learner.weights())
        return others + rise * (truth == np.arange(18)), rise * (truth == CODES)

    monkeypatch.setattr(LEARNERS[trained.member], "logits", logits)
    for stops in ({}, {14: 2, 20: 5}):  # steps, six an epoch: whole epochs
        job = job_in(tmp_path / str(len(stops)), trained.member)
        losses = iter([1.0, 0.9, 0.95, 0.5, 0.6, 0.7, 0.1])
        for last, done in stops.items():
            fit_stopped(job, last)
            torch.rand(3)  # another process has drawn other random numbers
            noted = cmi.MEMBERS[job.member].resumable(job, config(job.member))
            assert noted == f"resumable at epoch {done} of 8"
        info = fit(job)
        assert (info["epochs"], info["best_epoch"]) == (6, 4)
        assert progress_of(job, "epoch") == [1, 2, 3, 4, 5, 6]
        said = [progress_of(job, name) for name in ("val_loss", "lr", "train_loss")]
        np.testing.assert_allclose(said[0], [1.0, 0.9, 0.95, 0.5, 0.6, 0.7], rtol=1e-4)
        found.append(numbers(job) | {"said": np.array(said)})
    assert_same(*found, trained.member)
    for epoch in (4, 5):
        pairs = zip(found[0].values(), weights[epoch - 1].values(), strict=False)
        assert all(np.array_equal(*pair) for pair in pairs) == (epoch == 4)


def test_an_unfit_checkpoint_is_named_and_left(trained: Any, tmp_path: Path, capsys: Any) -> None:
    member, job = trained.member, job_in(tmp_path, trained.member)
    fit_stopped(job, 8)
    other = dataclasses.replace(job, train=job.train[1:])
    resumable, whole = cmi.MEMBERS[member].resumable, config(member)
    assert resumable(other, whole) == "not resumable, training rows differ"
    lr = f"not resumable, {member.upper()}_LR 0.01 → 0.003"
    assert resumable(job, config(member, lr=3e-3)) == lr
    for name in ("resume", f"resume_{member}"):
        assert resumable(job, config(member, **{name: False})) == ""
    (checkpoint,) = job.scratch.iterdir()
    whole, rolled = checkpoint.read_bytes(), np.roll(LABELS.composite, 4)
    for why, content, data in (
        ("frames differ", whole, (dataclasses.replace(FRAMES, x=FRAMES.x + 1), LABELS)),
        ("labels differ", whole, (FRAMES, dataclasses.replace(LABELS, composite=rolled))),
        ("damaged", whole[: len(whole) // 2], DATA),
    ):
        checkpoint.write_bytes(content)
        fit_stopped(job, 0, data)
        printed = capsys.readouterr().out
        assert why in printed
        assert "resume" not in printed
    fit(job)
    assert_same(numbers(job), numbers(trained.job), member)


def test_lack_of_memory_halves_the_pieces_not_the_step(trained: Any, tmp_path: Path) -> None:
    """From the ninth step on one recording fits; beside it a training that is given single ones."""
    states, asked, lack = [], [], torch.OutOfMemoryError("injected")
    if trained.member == "keras":
        lack = cmi.tf.errors.ResourceExhaustedError(None, None, "injected")

    def tight(number: int, pieces: list[cmi.Batch]) -> list[cmi.Batch]:
        if number > 8 and len(pieces[0]) > 1:
            raise lack
        return pieces

    def in_ones(number: int, pieces: list[cmi.Batch]) -> list[cmi.Batch]:
        return pieces[0].pieces(1) if number > 8 else pieces

    for change, last in ((tight, 14), (in_ones, 12)):
        job = job_in(tmp_path / change.__name__, trained.member)
        asked.append(fit_stopped(job, last, change=change))
        with np.load(next(job.scratch.iterdir())) as file:
            states.append({name: file[name] for name in file if name != "note"})
    assert asked[1] == [[4]] * 13
    assert asked[0] == [[4]] * 9 + [[2, 2]] + [[1, 1, 1, 1]] * 5
    assert_same(*states, trained.member)


def test_a_loss_of_nan_names_the_setting(trained: Any, tmp_path: Path, monkeypatch: Patch) -> None:
    patch_step(monkeypatch, trained.member, lambda *_: float("nan"))
    name = trained.member.upper()
    with pytest.raises(FloatingPointError, match=f"{name}_LR=0.01.*{name}_"):
        fit(job_in(tmp_path, trained.member))


def copied(job: cmi.Job, folder: Path, **changes: Any) -> cmi.Job:
    shutil.copytree(job.folder, folder / "copy", dirs_exist_ok=True)
    note = folder / "copy" / f"{job.stem}_spec.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | changes))
    return dataclasses.replace(job, folder=folder / "copy")


def test_models_of_other_labels_or_channels_are_refused(trained: Any, tmp_path: Path) -> None:
    """tests/test_hostile.py shows files with code and damage."""
    with pytest.raises(cmi.DataError, match=rf"(?s){trained.job.stem}.*(again|FORCE_TRAIN)"):
        load(copied(trained.job, tmp_path, width=32))
    with pytest.raises(cmi.DataError, match="other labels"):
        load(trained.job, LABELS.table[::-1])
    with pytest.raises(ValueError, match="other channels"):
        answers(trained.job, FRAMES.of_mode("imu"))


def learner_of(job: cmi.Job, cfg: cmi.Config, frames: cmi.Frames = FRAMES, **own: Any) -> Any:
    spec = cmi.network_spec(frames, LABELS.table, 16, cfg.torch_tof_images, cfg)
    scaling = cmi.standardisation(frames, job.train)
    batches = cmi.Batches(frames, spec, *scaling, LABELS)
    return LEARNERS[job.member](job, spec, cfg, **own), batches


@both
@pytest.mark.usefixtures("eager")
def test_accumulated_pieces_have_the_gradient_of_the_whole(member: str, tmp_path: Path) -> None:
    """Four recordings thrice under other labels: norms see the same in each piece and the whole."""
    cfg, ends, losses = config(member, dropout=0.0, torch_ema=0.0), [], []
    for size in (12, 8):
        learner, batches = learner_of(job_in(tmp_path, member), cfg)
        rng, before = np.random.default_rng(1), learner.weights()
        four = next(batches.epoch(np.arange(4), 1, rng, cfg))
        label = rng.dirichlet(np.ones(len(CODES)), 12).astype(np.float32)
        phase = rng.random((12, four.phase.shape[1])).astype(np.float32)
        twelve = cmi.Batch(np.tile(four.x, (3, 1, 1)), None, label, phase)
        learner.begin_epoch(1)
        losses.append(learner.train_step(twelve.pieces(size), 1e-3))
        after = learner.weights()
        moved = [k for k in before if "running_" not in k]  # Torch's norms move with every piece
        ends.append(np.concatenate([(after[k] - before[k]).ravel() for k in moved]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert np.median(np.abs(ends[0])) > 5e-4, "the first step of AdamW is about the rate"
    assert np.quantile(np.abs(ends[0] - ends[1]), 0.98) < 2e-5


@both
@pytest.mark.usefixtures("eager")
def test_a_handful_trains_and_no_sensor_leaks_into_imu_mode(member: str, tmp_path: Path) -> None:
    """Labels that training never saw, a sensor that is never there, and ToF images asked for."""
    job = job_in(tmp_path, member, 2, "imu", train=np.arange(6), valid=np.arange(6, 36))
    x, other = FRAMES.x.copy(), FRAMES.x.copy()
    x[:, 4:7], other[:, 4:7], other[:, 11:] = np.nan, np.nan, 1e3
    frames = dataclasses.replace(FRAMES, x=x).of_mode("imu")
    cfg = config(member, max_epochs=1, torch_tof_images=True, fixed_pad_len=8)
    info = fit(job, cfg, (frames, LABELS))
    assert np.isfinite([info["train_loss"], info["val_loss"], info["score"]]).all()
    proba = answers(job, frames)
    np.testing.assert_allclose(proba.sum(axis=1), 1, atol=1e-5)
    changed = dataclasses.replace(FRAMES, x=other, tof=255 - FRAMES.tof).of_mode("imu")
    np.testing.assert_array_equal(answers(job, changed), proba)
    assert [name for name, _ in load(job)[0].spec.groups] == ["acc", "rot", "motion"]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.usefixtures("eager")
def test_mixed_precision_of_keras_is_finite_and_leaks_nowhere(policy: str, tmp_path: Path) -> None:
    job = job_in(tmp_path, "keras", train=np.arange(8), valid=np.arange(8, 14))
    cfg = config("keras", policy=policy, max_epochs=1, fixed_pad_len=8)
    info = fit(job, cfg, (LOUD, LABELS))
    assert np.isfinite([info["train_loss"], info["val_loss"], *answers(job, LOUD).ravel()]).all()
    assert all(np.isfinite(value).all() for value in numbers(job).values())
    assert {value.dtype.name for value in numbers(job).values()} == {"float32"}
    assert cmi.keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_mixed_precision_of_torch_is_finite_and_goes_on(half: Any, tmp_path: Path) -> None:
    job, cfg, losses = job_in(tmp_path, "torch"), config("torch", torch_tof_images=True), []
    for own in ({}, {"half": half}):
        learner, batches = learner_of(job, cfg, LOUD, **own)
        learner.begin_epoch(0)
        pieces = batches.epoch(job.train, 4, np.random.default_rng(0), cfg)
        losses.append([learner.train_step([piece], 1e-3) for piece in pieces])
    again, _ = learner_of(job, cfg, LOUD, half=half)
    again.restore(learner.state())
    said = [each.logits(batches.plain(np.arange(36))) for each in (learner, again)]
    assert np.isfinite(np.concatenate(said[0], axis=1)).all()
    np.testing.assert_array_equal(*(np.concatenate(parts, axis=1) for parts in said))
    assert losses[0] != losses[1], "half the precision was not used"
    np.testing.assert_allclose(*losses, rtol=0.05)


def test_tof_images_take_part_but_for_those_in_the_padding(tmp_path: Path) -> None:
    job = job_in(tmp_path, "torch")
    fit(job, config("torch", torch_tof_images=True, max_epochs=2))
    touched = dataclasses.replace(FRAMES, tof=0 * FRAMES.tof)
    assert np.abs(answers(job, touched) - answers(job)).max() > 1e-4
    fold = load(job)[0]
    batch = plain_batch(fold)
    batch.images[batch.x[..., -1] == 0] = 7
    np.testing.assert_array_equal(fold.logits(batch)[1], fold.logits(plain_batch(fold))[1])


def test_a_card_that_tensorflow_lists_and_cannot_use(monkeypatch: Patch, capsys: Any) -> None:
    """It lists all; it makes devices of those that it has kernels for."""
    import tensorflow as tf

    cmi.start_keras(1)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: ["P100", "T4"])
    devices = [tf.config.list_logical_devices("CPU")[0]]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda _: devices)
    cmi.start_keras.__wrapped__(1)
    assert "TensorFlow uses 1 of 2" in capsys.readouterr().out
    about = {"compute_capability": (7, 5)}
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda _: about)
    cfg = config("keras", max_epochs=1)
    spec = cmi.network_spec(FRAMES, LABELS.table, 16, images=False, cfg=cfg)
    for found, device in ((devices, "gpu"), ([], "cpu")):
        monkeypatch.setattr(tf.config, "list_logical_devices", lambda _, found=found: found)
        policy = {"gpu": "mixed_float16", "cpu": "float32"}[device]
        learner = cmi.KerasLearner(job_in(Path(), "keras"), spec, cfg)
        assert (learner.device, learner.precision) == (device, policy)


@both
def test_one_cycle_is_that_of_torch(member: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """Over the steps, whose size is capped at four for so few recordings and given in pieces."""
    calls = patch_step(monkeypatch, member, lambda *_: 1.0)
    cfg = config(member, max_epochs=5, lr=3e-3, es_patience=0, batch_size=512, torch_accum_steps=2)
    fit(job_in(tmp_path, member), cfg)
    assert [sizes for sizes, _ in calls] == [[2, 2] if member == "torch" else [4]] * 30
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=30)
    for _, rate in calls:
        assert rate == pytest.approx(schedule.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("n", "size"), [(300, 16), (2400, 24), (7000, 64)])
def test_steps_grow_with_the_data(n: int, size: int, tmp_path: Path, monkeypatch: Patch) -> None:
    """A hundredth of the recordings, from 16 to 64, in batches that differ by one at most."""
    calls = patch_step(monkeypatch, "torch", lambda *_: 1.0)
    many = np.arange(n + 36) % 36
    frames, codes = FRAMES.take(many), (LABELS.gesture, LABELS.orientation, LABELS.behavior)
    phase = np.zeros(len(frames.x), np.uint8)
    data = frames, cmi.Labels.of(*(code[many] for code in codes), phase)
    job = job_in(tmp_path, "torch", train=np.arange(n), valid=np.arange(n, n + 36))
    fit(job, config("torch", max_epochs=1), data)
    sizes = [sum(pieces) for pieces, _ in calls]
    assert sum(sizes) == n
    assert {*sizes} <= {size, size - 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the card that is here may compute")
def test_a_card_that_does_not_compute_is_left_out(tmp_path: Path, monkeypatch: Patch) -> None:
    """The CPU then gives what it gives without any, TORCH_DATA_PARALLEL=1 or not."""
    jobs = [job_in(tmp_path / name, "torch") for name in "ab"]
    fit(jobs[0], config("torch", max_epochs=1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cmi, "working_cards", cmi.working_cards.__wrapped__)
    info = fit(jobs[1], config("torch", max_epochs=1, torch_data_parallel=True))
    assert info["device"] == "cpu"
    assert_same(*map(numbers, jobs), "torch")
