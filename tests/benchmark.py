"""How fast the pipeline is: each figure beside its plain counterpart, measured in the same run.

    python tests/benchmark.py                             # every part
    python tests/benchmark.py features serving            # some; benchmark.json keeps the others
    python tests/benchmark.py serving --bundle cmi_output # models of an earlier run

Prints one markdown table of what benchmark.json holds by then. Times are of this machine: compare
the ratios. CMI_BENCHMARK_DIR names the folder for what is simulated and trained for it.
"""

import argparse
import functools
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runs
from made import changed, recordings

import cmi_pipeline as cmi
import cmi_simulator

CACHE = Path(os.environ.get("CMI_BENCHMARK_DIR", "/tmp/cmi_benchmark")).absolute()
RESULTS = Path("benchmark.json")  # in the current folder
PACKAGES = ("numpy", "polars", "lightgbm", "torch", "keras", "tensorflow")
FOLDS = 5
SAMPLE = 40  # recordings of the slow loop
SHORT = {
    "N_FOLDS": str(FOLDS), "SIM_SUBJECTS": "10", "SIM_TEST_SUBJECTS": "2", "SIM_RECORDINGS": "40",
    "LGBM_ROUNDS": "100", "TORCH_MAX_EPOCHS": "1", "KERAS_MAX_EPOCHS": "1",
}  # fmt: skip
Row = tuple[str, float, float | None, str]  # what, ours, plain, unit
Options = argparse.Namespace


def alone(work: Callable[..., Any], *args: Any) -> Any:
    """What `work` returns in a process of its own, which meets nobody's memory and threads."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def seconds(work: Callable[..., object], *args: Any) -> float:
    began = time.perf_counter()
    work(*args)
    return time.perf_counter() - began


def medians(*calls: Callable[[], object], repeats: int = 30) -> list[float]:
    """Milliseconds of each; they take turns, so that all meet the same machine."""
    turns = [[1e3 * seconds(call) for call in calls] for _ in range(repeats + 1)]
    return np.median(turns[1:], axis=0).tolist()


def simulated(subjects: int, recordings: int) -> Path:
    """The competition's files with simulated recordings, made once."""
    source = cmi.digest(Path(cmi_simulator.__file__).read_bytes())
    folder = CACHE / f"{subjects}x{recordings}-{source}"
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        size = {"subjects": subjects, "recordings_per_subject": recordings}
        cmi_simulator.simulate(partial, test_subjects=2, seed=1, **size)
        partial.rename(folder)
    return folder


def one_pass(folder: Path, cfg: cmi.Config) -> dict[str, float]:
    """Table and frames of all recordings in both modes, and of one."""
    rec, _ = cmi.cached_recordings(folder, cfg)
    began = time.perf_counter()
    ours = cmi.canonical(rec, np.zeros(len(rec), bool))
    both = [(part, part.of_mode("imu")) for part in cmi.extract_features(ours)]
    found = {"secs": time.perf_counter() - began, "n": len(rec), "features": len(both[0][0].names)}
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found | {"one": medians(lambda: cmi.extract_features(ours.part(7, 8)))[0]}


def slow_loop(folder: Path, cfg: cmi.Config) -> float:
    """Seconds of a loop with scipy over all recordings, from a few, by their share of the rows."""
    import reference

    rec, _ = cmi.cached_recordings(folder, cfg)
    some = np.random.default_rng(0).choice(len(rec), SAMPLE, replace=False).tolist()
    reference.features(rec, some[0])  # what is loaded on first use does not count
    began = time.perf_counter()
    for i in some:
        reference.features(rec, i)
        reference.channels(rec, i)
    share = float(np.diff(rec.start)[some].sum()) / len(rec.acc)
    return (time.perf_counter() - began) / share


def features(options: Options) -> list[Row]:
    """From train.csv to table and frames; the best of three, what else runs only adds to it."""
    folder = simulated(max(2, round(options.recordings / 102)), 102)
    with tempfile.TemporaryDirectory() as scratch:
        cfg = cmi.Config(output_path=Path(scratch))
        first, *later = (alone(seconds, cmi.cached_recordings, folder, cfg) for _ in range(4))
        csv = min(alone(seconds, pl.read_csv, folder / "train.csv") for _ in range(3))
        passes = [alone(one_pass, folder, cfg) for _ in range(3)]
        plain = alone(slow_loop, folder, cfg)
    best = min(passes, key=lambda found: found["secs"])
    what = f"{best['features']} features and frames of {best['n']:,} recordings, both modes"
    return [
        (f"{what}, against pl.read_csv of the file", best["secs"], csv, "s"),
        (f"{what}, against a loop (from {SAMPLE})", best["secs"], plain, "s"),
        ("peak memory of that process, recordings included", best["peak"], None, "GB"),
        ("features and frames of one recording", best["one"], None, "ms"),
        ("recordings at the second start, against the first", min(later), first, "s"),
    ]


def fitted(name: str, folder: Path) -> SimpleNamespace:
    """A member with models of several folds, all of them copies of one that hardly learnt."""
    rec = cmi.read_train(simulated(4, 51))
    table, frames = cmi.extract_features(cmi.canonical(rec, np.zeros(len(rec), bool)))
    x, labels, index = table if name == "lgbm" else frames, rec.labels, np.arange(len(rec))
    assert labels is not None
    cfg = cmi.Config(lgbm_rounds=300, lgbm_es_rounds=0, torch_max_epochs=1, keras_max_epochs=1)
    member, stems = cmi.MEMBERS[name], [f"fold{k:02d}" for k in range(FOLDS)]
    where = folder / "all", folder / "scratch", folder / "logs"
    job = cmi.Job(name, "all", 0, 0, index[16:], index[:16], *where)
    member.fit(job, x, labels, cfg)
    for end in member.files:
        for stem in stems[1:]:
            shutil.copy(job.folder / f"fold00{end}", job.folder / f"{stem}{end}")
    files = [job.folder / f"{stem}{end}" for stem in stems for end in member.files]
    model = member.load(job.folder, stems, labels.table, cfg)
    asked = {"member": member, "model": model, "x": x, "one": x.take(np.array([7]))}
    return SimpleNamespace(name=name, cfg=cfg, job=job, labels=labels, files=files, **asked)


def batches(f: SimpleNamespace, frames: cmi.Frames, whole: bool) -> cmi.Batches:
    """As its networks are given recordings."""
    about = cmi.read_spec(f.job.folder / "fold00_spec.json", f.labels.table)
    return cmi.Batches(frames, *about, f.labels, whole=whole)


def compared(f: SimpleNamespace, plain: Callable[[], object], other: str) -> Row:
    what = f"one recording through {FOLDS} folds of {f.name}, against {other}"
    return (what, *medians(lambda: f.member.predict(f.model, f.one), plain), "ms")


def lgbm(_: Options) -> list[Row]:
    """300 rounds of 18 classes."""
    import lightgbm

    with tempfile.TemporaryDirectory() as name:
        f = fitted("lgbm", Path(name))
        boosters = [lightgbm.Booster(model_file=str(file)) for file in f.files]
    return [compared(f, lambda: [b.predict(f.one.x) for b in boosters], "Booster.predict")]


def torch(_: Options) -> list[Row]:
    """Answers, and steps of training."""
    import torch

    with tempfile.TemporaryDirectory() as name:
        f = fitted("torch", Path(name))
        made, one, nets = batches(f, f.x, whole=False), batches(f, f.one, whole=False), []
        for file in f.files[::2]:
            nets.append(cmi.torch_classes().Network(made.spec, 0.0).eval())
            nets[-1].load_state_dict(torch.load(file, weights_only=True))

        def plain() -> None:
            with torch.no_grad():
                for net in nets:
                    batch = one.plain(np.array([0]))
                    net(torch.from_numpy(batch.x), None, torch.from_numpy(batch.length))

        rows = [compared(f, plain, "unfused networks one by one")]
    learner, rng = cmi.TorchLearner(f.job, made.spec, f.cfg), np.random.default_rng(0)
    for size in (16, 64):
        index = rng.choice(len(f.x), size, replace=False)
        making = functools.partial(made.augmented, index, rng, f.cfg)
        pieces = [making().pieces(n) for n in (size, 1)]
        learner.begin_epoch(0)
        steps = [functools.partial(learner.train_step, piece, 1e-4) for piece in pieces]
        step, singly, batch = medians(*steps, making, repeats=10)
        what = f"Torch step of {size} recordings"
        rows.append((f"{what}, against one recording at a time", step, singly, "ms"))
        rows.append((f"making the batch of a {what}, against the step", batch, step, "ms"))
    return rows


def keras(_: Options) -> list[Row]:
    """Answers."""
    with tempfile.TemporaryDirectory() as name:
        f = fitted("keras", Path(name))
        networks = [cmi.keras.saving.load_model(file) for file in f.files[::2]]
        one = batches(f, f.one, whole=True)

        def plain() -> None:
            for network in networks:
                inputs = cmi.keras_inputs(one.plain(np.array([0])), one.spec)
                network.predict(inputs, verbose=0)

        return [compared(f, plain, "model.predict")]


def serving(options: Options) -> list[Row]:
    """predict, beside every model for itself, one after the other."""
    out = options.bundle or CACHE / f"bundle-{cmi.digest(Path(cmi.__file__).read_bytes())}"
    if not (out / "ensemble" / "weights.json").exists():  # a short run of this very pipeline
        env = runs.clean_environment() | SHORT | {"OUTPUT_PATH": str(out)}
        subprocess.run([sys.executable, cmi.__file__], check=True, stdout=sys.stderr, env=env)
    data = next(out.glob("simulated-*"), None) or simulated(10, 40)
    test = pl.read_csv(data / "test.csv", infer_schema_length=None)
    person = pl.read_csv(data / "test_demographics.csv")
    asked, cfg, singles = test.partition_by("sequence_id"), cmi.Config(output_path=out), []
    predictor = cmi.Predictor(cfg)
    times = [seconds(predictor.predict, question, person) for question in asked]
    for path in out.glob("*_models/bundle.json"):
        content = json.loads(path.read_text())
        member, labels = cmi.MEMBERS[content["member"]], np.array(content["labels"])
        for mode, stem in ((m, s) for m in ("all", "imu") for s in content["modes"][m]):
            model = member.load(path.parent / mode, [stem], labels, cfg)
            singles.append((member, mode, model))

    def plain(question: pl.DataFrame) -> None:
        rec = cmi.canonical(cmi.to_recordings(question, person), np.zeros(1, bool))
        table, frames = cmi.extract_features(rec)
        for member, mode, model in singles:
            x = table if member is cmi.MEMBERS["lgbm"] else frames
            member.predict(model, x.of_mode(mode))

    loop = [seconds(plain, question) for question in asked[:21]]
    rows: list[Row] = [(f"first answer, with loading {len(singles)} models", times[0], None, "s")]
    for q in (50, 95):
        ours, theirs = (1e3 * float(np.percentile(t[1:], q)) for t in (times, loop))
        what = f"predict, {len(singles)} models, {len(times) - 1} recordings, p{q}"
        rows.append((f"{what}, against one model after the other", ours, theirs, "ms"))
    return rows


def blend(options: Options) -> list[Row]:
    """Weights of six parts, and the replay of the assignment in one order."""
    from scipy import optimize

    rng, n = np.random.default_rng(0), options.recordings
    table = np.array([(b, o, g) for b in (0, 1) for o in range(3) for g in range(17)])
    label, subject = np.arange(n) % 102, np.char.mod("S%d", np.arange(n) // 102)
    logit = rng.normal(0, 1, (6, n, 102)).astype(np.float32)
    logit[:, np.arange(n), label] += 2
    logs = logit - np.log(np.exp(logit).sum(axis=2, keepdims=True))
    same = table[:, 2] == table[label, 2][:, None]

    def loss(weights: np.ndarray) -> float:
        power = np.exp(np.tensordot(weights, logs, 1))
        return -float(np.log((power * same).sum(axis=1) / power.sum(axis=1)).mean())

    fit = seconds(cmi.fit_weights, logs, same)
    plain = seconds(lambda: optimize.minimize(loss, np.full(6, 1 / 6), method="L-BFGS-B"))
    behavior, orientation, gesture = table[label].T
    labels = cmi.Labels.of(gesture, orientation, behavior, np.zeros(n, np.uint8))
    inputs = cmi.Inputs(changed(recordings([1] * n), subject=subject))
    data = cmi.TrainingData(inputs, labels, np.arange(n) % 5, "", "", None)
    replay = seconds(cmi.replay_assignment, np.exp(logs[0]), data, cmi.Config(), 1)
    return [
        (f"weights of 6 parts × {n:,} recordings, against no gradient", fit, plain, "s"),
        (f"assignment of {n:,} recordings, arriving in one order", replay, None, "s"),
    ]


def start(_: Options) -> list[Row]:
    """Importing the file, beside what it needs anyway."""
    run = functools.partial(subprocess.run, cwd=runs.ROOT, check=True)
    names = ("cmi_pipeline", "numpy, polars")
    calls = [functools.partial(run, [sys.executable, "-c", f"import {n}"]) for n in names]
    what = "a process that imports the file, against numpy and polars alone"
    return [(what, *medians(*calls, repeats=5), "ms")]


PARTS: dict[str, Callable[[Options], list[Row]]] = {
    part.__name__: part for part in (start, features, lgbm, torch, keras, serving, blend)
}


def markdown(entries: dict[str, Any]) -> str:
    """All figures, below what they were measured on."""
    lines = sorted({entry["about"] for entry in entries.values()})
    lines += ["", "| part | what | ours | plain | ratio |", "|---|---|---|---|---|"]
    for name, entry in entries.items():
        for what, ours, plain, unit in entry["rows"]:
            other = f"{plain:,.3f} {unit} | {plain / ours:.2f} ×" if plain else " | "
            lines.append(f"| {name} | {what} | {ours:,.3f} {unit} | {other} |")
    return "\n".join(lines)


def main() -> None:
    """Run the parts that are asked for; keep each one's figures as soon as it has them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[*PARTS])
    parser.add_argument("--bundle", type=lambda text: Path(text).absolute())
    parser.add_argument("--recordings", type=int, default=8151)
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = re.findall(r"model name\s*:\s*(.+)", info) or [platform.machine()]
    about = f"{os.cpu_count()} × {models[0]}, {versions}, {time.strftime('%Y-%m-%d')}"
    entries = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.parts:
        load, rows = round(os.getloadavg()[0], 1), alone(PARTS[name], options)
        entries[name] = {"about": about, "load": load, "rows": rows}
        RESULTS.write_text(json.dumps(entries, indent=1) + "\n")
    print(markdown(entries))


if __name__ == "__main__":
    main()
