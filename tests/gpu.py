"""Do training and serving work on this machine's cards, and how fast? One table; exit status.

    python tests/gpu.py                  # at most 6 minutes; needs torch, numpy, polars, scipy
    python tests/gpu.py precision speed  # some parts
    python tests/gpu.py --cpu            # the same parts, tiny, without a card: is this file right?

Everything is asked on simulated recordings. Status 0: all is well, or there is no card; 1: a card
that is there does not work, or a part failed, as one does that was meant for a card and ran on the
CPU. Keras is left out where it is not installed or sees no card.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cmi_pipeline as cmi
import cmi_simulator

LIMIT = 330  # s after which no further part begins
MB = 2**20
Info = dict[str, Any]


class Scale(NamedTuple):
    subjects: int
    recordings: int  # of each subject
    epochs: int
    many: int  # recordings an epoch where time and memory are measured
    sizes: tuple[int, ...]  # recordings a step there
    asked: int  # recordings when serving
    tolerance: float  # by how much a score in half precision may be lower
    same_loss: float  # by how much the loss of a resumed training may differ


ON_CARD = Scale(9, 34, 12, 4096, (16, 64, 256), 100, 0.15, 0.05)
TINY = Scale(4, 9, 4, 64, (4,), 5, 1.0, 1e-5)  # learns too little for a score to mean anything


class Row(NamedTuple):
    """A line of the table; without a verdict it is a measurement, or was left out."""

    part: str
    what: str
    figure: str
    well: bool | None = None


@functools.cache
def data(folder: Path) -> SimpleNamespace:
    """Frames and labels of the simulated recordings in `folder`."""
    rec = cmi.read_train(folder)
    subject = np.unique(rec.subject, return_inverse=True)[1].reshape(-1)
    upright = cmi.canonical(rec, np.zeros(len(rec), bool))
    frames = cmi.extract_features(upright, table=False)[1]
    return SimpleNamespace(subject=subject, frames=frames, labels=rec.labels)


def fit(
    out: Path, source: Path, member: str = "torch", fold: int = 0, many: int = 0, **settings: str
) -> Info:
    """Train on two thirds of the subjects; what the pipeline says of the model, and its epochs."""
    cfg = cmi.Config.from_env({"OUTPUT_PATH": str(out), "LOG_EVERY_STEPS": "1000", **settings})
    own, places = data(source), (out / f"{member}_models" / "all", out / "scratch", out / "logs")
    valid = own.subject % 3 == fold
    train = np.resize(np.flatnonzero(~valid), many or (~valid).sum())
    job = cmi.Job(member, "all", 0, fold, train, np.flatnonzero(valid), *places)
    job.folder.mkdir(parents=True, exist_ok=True)
    info = cmi.MEMBERS[member].fit(job, own.frames, own.labels, cfg)
    return info | {"epochs": epochs_of(out, member)}


def epochs_of(out: Path, member: str) -> list[Info]:
    path = out / "logs" / f"{member}_progress.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


def serve(models: Path, source: Path, asked: int) -> tuple[np.ndarray, list[float]]:
    """Answers of five networks to one recording at a time, and milliseconds of each."""
    own, torch_member = data(source), cmi.MEMBERS["torch"]
    cfg = cmi.Config.from_env({"OUTPUT_PATH": str(models)})
    folder = models / "torch_models" / "all"
    folds = torch_member.load(folder, ["fold00"] * 5, own.labels.table, cfg)
    proba, times = [], []
    for i in np.resize(np.arange(len(own.frames)), asked):
        began = time.perf_counter()
        proba.append(torch_member.predict(folds, own.frames.take(np.array([i]))).mean(axis=0)[0])
        times.append(1e3 * (time.perf_counter() - began))
    return np.array(proba), times


def work(out: Path, source: Path, member: str, together: int = 1, **task: Any) -> None:
    """What a process of its own does, beside others; its result goes to a file."""
    on_card = member == "keras" and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    if on_card and not importlib.import_module("tensorflow").config.list_physical_devices("GPU"):
        (out / "result.json").write_text(json.dumps({"device": "no card"}))
        return
    with (out / "printed.txt").open("a") as file, contextlib.redirect_stdout(file):
        data(source)
        (out / "ready").touch()
        while len(list(out.parent.glob("*/ready"))) < together:
            time.sleep(0.01)
        began = time.time()
        info = fit(out, source, member, **task)
    (out / "result.json").write_text(json.dumps({**info, "began": began, "ended": time.time()}))


class Check:
    """The scale, the folder, the simulated recordings, and the time that is left."""

    def __init__(self, scale: Scale, cpu: bool, folder: Path) -> None:
        self.scale, self.cpu, self.folder, self.began = scale, cpu, folder, time.monotonic()
        self.source = folder / "data"
        self.epochs = {"TORCH_MAX_EPOCHS": str(scale.epochs), "TORCH_BATCH_SIZE": "16"}
        cmi_simulator.simulate(self.source, scale.subjects, 0, 1, scale.recordings)

    def on_card(self, *trainings: Info) -> bool:
        """Did all run where they were meant to? One that was meant for a card may meet a full one."""
        return self.cpu or all(info["device"] != "cpu" for info in trainings)

    def learnt(self, info: Info, base: float) -> tuple[str, bool]:
        """What a training came to, and whether its loss is finite and fell, its score not below base."""
        train, valid = ([own[f"{x}_loss"] for own in info["epochs"]] for x in ("train", "val"))
        well = bool(np.isfinite(train + valid).all()) and train[-1] < train[0]
        well &= info["score"] >= base - self.scale.tolerance and self.on_card(info)
        secs = float(np.median([epoch["secs"] for epoch in info["epochs"]]))
        said = f"score {info['score']:.3f}, loss {train[0]:.2f} → {train[-1]:.2f}"
        return f"{said}, {secs:.2f} s an epoch, {info['device']}", well

    def start(
        self, name: str, member: str = "torch", cards: str | None = None, **task: Any
    ) -> tuple[SpawnProcess, Path]:
        """A process that trains, on the cards that it is shown."""
        out = self.folder / name
        out.mkdir(parents=True, exist_ok=True)
        how: Any = {"args": (out, self.source, member), "kwargs": task, "daemon": True}
        with mock.patch.dict(os.environ, {} if cards is None else {"CUDA_VISIBLE_DEVICES": cards}):
            process = multiprocessing.get_context("spawn").Process(target=work, **how)
            process.start()
        return process, out

    def result(self, process: SpawnProcess, out: Path) -> Info:
        process.join(150)
        if process.exitcode != 0:
            raise RuntimeError(f"its process ended with {process.exitcode}, see the error above")
        return json.loads((out / "result.json").read_text())


def card(check: Check) -> Iterator[Row]:
    """Which cards there are, and whether torch computes on them."""
    if check.cpu:
        yield Row("card", "none", "--cpu: everything below ran on the CPU")
        return
    works = cmi.working_cards()
    for i in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(i)
        said = f"{known.name}, {known.total_memory / 2**30:.0f} GiB, sm_{known.major}{known.minor}"
        yield Row("card", f"{i} computes", said, i in works)
    kernels = " ".join(torch.cuda.get_arch_list())
    yield Row("card", "torch", f"{torch.__version__}, CUDA {torch.version.cuda}: {kernels}")


def precision(check: Check) -> Iterator[Row]:
    """The same training in three precisions: no NaN, and a score beside float32's."""
    base = -1.0
    for name in ("float32", "float16", "bfloat16"):
        learner = functools.partial(cmi.TorchLearner, half=getattr(torch, name))
        with mock.patch.object(cmi, "TorchLearner", learner):
            info = fit(check.folder / name, check.source, **check.epochs)
        base = info["score"] if name == "float32" else base
        yield Row("precision", name, *check.learnt(info, base))


def memory(check: Check) -> Iterator[Row]:
    """The card is filled until a step does not fit: it must be done in pieces, and be the same."""
    settings = {"TORCH_MAX_EPOCHS": "1", "TORCH_BATCH_SIZE": str(check.scale.sizes[-1])}
    if check.cpu:
        yield Row("memory", "retreat", "left out: only a card lacks memory")
        return
    torch.cuda.reset_peak_memory_stats()
    whole = fit(check.folder / "whole", check.source, many=check.scale.many, **settings)
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    taken = torch.cuda.mem_get_info()[0] - int(0.6 * peak)
    ballast = torch.empty(taken, dtype=torch.uint8, device="cuda")
    info = fit(check.folder / "pieces", check.source, many=check.scale.many, **settings)
    del ballast
    torch.cuda.empty_cache()  # or the processes of the next part would find the card full
    (a,), (b,) = whole["epochs"], info["epochs"]
    off = abs(a["train_loss"] - b["train_loss"])
    said = f"{a['at_once']} → {b['at_once']} of {b['batch']} at once, 60 % of {peak / MB:.0f} MB"
    well = b["at_once"] < a["at_once"] == a["batch"] and off < 0.1 * a["train_loss"]
    well &= check.on_card(whole, info)
    yield Row("memory", "retreat", f"{said}; loss {a['train_loss']:.3f}, {off:.3f} off", well)


def jobs(check: Check) -> Iterator[Row]:
    """Two trainings on one card; and one on each, where there are several."""
    n_cards = 0 if check.cpu else torch.cuda.device_count()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    trials = [("two on one card", 2, "" if check.cpu else first, 1)]
    if n_cards > 1:
        trials.append(("one a card", min(n_cards, 3), None, min(n_cards, 3)))
    for what, n, cards, n_devices in trials:
        shared = {"together": n, "cards": cards, **check.epochs}
        begun = [check.start(f"{what}/{k}", fold=k, **shared) for k in range(n)]
        done = [check.result(*job) for job in begun]
        both = min(info["ended"] for info in done) - max(info["began"] for info in done)
        devices = sorted({info["device"] for info in done})
        secs = np.median([epoch["secs"] for info in done for epoch in info["epochs"]])
        said = f"{both:.1f} s side by side, {secs:.2f} s an epoch, {', '.join(devices)}"
        well = both > 0 and len(devices) == n_devices and check.on_card(*done)
        yield Row("jobs", what, said, well)
    if n_cards > 1:
        parallel = {**check.epochs, "TORCH_DATA_PARALLEL": "1"}
        info = fit(check.folder / "parallel", check.source, **parallel)
        yield Row("jobs", "one over all cards", *check.learnt(info, 0.0))


def speed(check: Check) -> Iterator[Row]:
    """Time and memory of an epoch by the number of recordings a step."""
    trials = [(size, "1") for size in check.scale.sizes] + [(check.scale.sizes[-1], "0")]
    for size, amp in trials:
        settings = {"TORCH_MAX_EPOCHS": "2", "TORCH_BATCH_SIZE": str(size), "TORCH_AMP": amp}
        if not check.cpu:
            torch.cuda.reset_peak_memory_stats()
        out = check.folder / f"speed-{size}-{amp}"
        info = fit(out, check.source, many=check.scale.many, **settings)
        epoch = info["epochs"][-1]
        peak = 0 if check.cpu else torch.cuda.max_memory_allocated() / MB
        rate = check.scale.many / epoch["secs"]
        said = f"{epoch['secs']:.2f} s an epoch, {rate:.0f} recordings/s, peak {peak:.0f} MB"
        what = f"{epoch['batch']} a step, {'mixed' if amp == '1' else 'float32'}"
        yield Row("speed", what, said, check.on_card(info))


def serving(check: Check) -> Iterator[Row]:
    """Latency of one recording with five networks; and the CPU's answers beside the card's."""
    models = check.folder / "served"
    info = fit(models, check.source, **check.epochs)
    proba, times = serve(models, check.source, check.scale.asked)
    p50, p95 = np.quantile(times[1:], [0.5, 0.95])
    said = f"p50 {p50:.1f} ms, p95 {p95:.1f} ms, first {times[0]:.0f} ms"
    yield Row("serving", "five networks, one recording", said, check.on_card(info))
    with mock.patch.object(cmi, "working_cards", return_value=()):
        other, _ = serve(models, check.source, check.scale.asked)
    off = float(np.abs(proba - other).max())
    yield Row("serving", "the CPU's answers", f"differ by at most {off:.1e}", off < 1e-2)


def resume(check: Check) -> Iterator[Row]:
    """A training is killed after two epochs and goes on; another is not disturbed."""
    process, out = check.start("killed", **check.epochs)
    until = time.monotonic() + 120
    while len(epochs_of(out, "torch")) < 2 and process.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.join()
    killed, n_done = process.exitcode == -signal.SIGKILL, len(epochs_of(out, "torch"))
    info = check.result(*check.start("killed", **check.epochs))
    other = check.result(*check.start("undisturbed", **check.epochs))
    numbers = [epoch["epoch"] for epoch in info["epochs"]]
    off = abs(info["epochs"][-1]["val_loss"] - other["epochs"][-1]["val_loss"])
    well = killed and sorted(set(numbers)) == list(range(1, check.scale.epochs + 1))
    well &= len(numbers) <= check.scale.epochs + 1 and off < check.scale.same_loss
    well &= check.on_card(info, other)
    yield Row("resume", f"killed after epoch {n_done}", f"its last loss is {off:.1e} off", well)


def keras(check: Check) -> Iterator[Row]:
    """Keras on the card in two precisions, while this process holds some of it."""
    if any(importlib.util.find_spec(name) is None for name in ("keras", "tensorflow")):
        yield Row("keras", "training", "left out: not installed")
        return
    base = -1.0
    for policy in ("float32", "mixed_float16"):
        settings = {"KERAS_POLICY": policy, "KERAS_MAX_EPOCHS": str(check.scale.epochs)}
        info = check.result(*check.start(f"keras-{policy}", "keras", **settings))
        if info["device"] == "no card":
            yield Row("keras", "training", "left out: TensorFlow sees no card")
            return
        yield Row("keras", policy, *check.learnt(info, base))
        base = info["score"] if policy == "float32" else base


def why_no_card() -> tuple[str, int]:
    """Why there is nothing to check, and the exit status; no text if a card works."""
    if cmi.working_cards():
        return "", 0
    built = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none: a CPU build'}"
    if torch.cuda.device_count():
        said = f"{torch.cuda.get_device_name(0)} does not compute: {built} has kernels for"
        return f"{said} {' '.join(torch.cuda.get_arch_list())}.", 1
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if Path("/proc/driver/nvidia/gpus").exists() and not hidden:
        return f"A card is there, but {built} cannot start it.", 1
    return "No card on this machine: nothing was checked. --cpu tries this file itself.", 0


def run_part(part: Callable[[Check], Iterator[Row]], check: Check) -> list[Row]:
    """Its rows; a failure is one of them."""
    rows: list[Row] = []
    try:
        with (check.folder / "printed.txt").open("a") as file, contextlib.redirect_stdout(file):
            rows.extend(part(check))
    except Exception as error:  # noqa: BLE001  # whatever it is, the table must say so
        why = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
        rows.append(Row(part.__name__, "failed", why, well=False))
    for process in multiprocessing.active_children():
        process.kill()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    every = (card, precision, memory, jobs, speed, serving, resume, keras)
    parts = {part.__name__: part for part in every}
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    parser.add_argument("--cpu", action="store_true", help="tiny, on the CPU, to try this file")
    asked = parser.parse_args()
    if asked.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif (found := why_no_card())[0]:
        print(found[0])
        return found[1]
    failed, late = 0, f"left out: {LIMIT} s are over"
    with tempfile.TemporaryDirectory(prefix="gpu_", ignore_cleanup_errors=True) as folder:
        with contextlib.redirect_stdout(None):
            check = Check(TINY if asked.cpu else ON_CARD, asked.cpu, Path(folder))
        print("| part | what | figure | well |\n|---|---|---|---|")
        for name in asked.parts or parts:
            in_time = time.monotonic() - check.began <= LIMIT
            for row in run_part(parts[name], check) if in_time else [Row(name, "all", late)]:
                well = {True: "yes", False: "NO", None: ""}[row.well]
                print(f"| {row.part} | {row.what} | {row.figure} | {well} |", flush=True)
                failed += row.well is False
    print(f"{failed} failed, {time.monotonic() - check.began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
