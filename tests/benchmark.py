"""How fast the pipeline is: each figure beside its plain counterpart, measured in the same run.

    python tests/benchmark.py                             # every part: about half an hour
    python tests/benchmark.py features serving            # some
    python tests/benchmark.py serving --bundle cmi_output # models of an earlier run

Prints one markdown table. Times are of this machine: compare the ratios. CMI_BENCHMARK_DIR names the
folder for what is simulated and trained for it. In part `growth` the plain counterpart is what 1/8
of the recordings took, times their number: a ratio of 1 is growth with it, more is better.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runs

import cmi_pipeline as cmi
import cmi_simulator

CACHE = Path(os.environ.get("CMI_BENCHMARK_DIR", "/tmp/cmi_benchmark")).absolute()
PACKAGES = ("numpy", "polars", "lightgbm", "torch", "keras", "tensorflow")
SAMPLE = 40  # recordings of the slow loop
SHORT = {
    "N_FOLDS": "5", "SIM_SUBJECTS": "10", "SIM_TEST_SUBJECTS": "2", "SIM_RECORDINGS": "40",
    "LGBM_ROUNDS": "100", "TORCH_MAX_EPOCHS": "1", "KERAS_MAX_EPOCHS": "1",
}  # fmt: skip
Row = tuple[str, float, float | None, str]  # what, ours, plain, unit
Options = argparse.Namespace
STAGES = {
    "features": "features and frames", "lgbm": "LightGBM, one fold of five",
    "torch": "Torch, one epoch of a fold", "keras": "Keras, one epoch of a fold, compiling included",
    "weights": "weights of six models", "replay": "one replay of the assignment",
}  # fmt: skip


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


def peak_memory() -> float:
    """Of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def simulated(subjects: int, recordings: int) -> Path:
    """The competition's files with simulated recordings, made once."""
    source = cmi.digest(Path(cmi_simulator.__file__).read_bytes())
    folder = CACHE / f"{subjects}x{recordings}-{source}"
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        cmi_simulator.simulate(partial, subjects, 2, seed=1, recordings_per_subject=recordings)
        partial.rename(folder)
    return folder


def one_pass(folder: Path, cfg: cmi.Config) -> dict[str, float]:
    """Table and frames of all recordings in both modes, and of one."""
    rec, _ = cmi.cached_recordings(folder, cfg)
    began = time.perf_counter()
    ours = cmi.canonical(rec, np.zeros(len(rec), bool))
    both = [(part, part.of_mode("imu")) for part in cmi.extract_features(ours)]
    found = {"secs": time.perf_counter() - began, "n": len(rec), "features": len(both[0][0].names)}
    found["peak"] = peak_memory()
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


def training(_: Options) -> list[Row]:
    """Steps of the Torch network, means over the batches of eight, and making these."""
    rec = cmi.read_train(simulated(12, 102))
    frames = cmi.extract_features(cmi.canonical(rec, np.zeros(len(rec), bool)), table=False)[1]
    cfg, index, rng, rows = cmi.Config(), np.arange(len(rec)), np.random.default_rng(0), []
    spec = cmi.network_spec(frames, rec.labels.table, cfg.torch_width, cfg.torch_tof_images, cfg)
    made = cmi.Batches(frames, spec, *cmi.standardisation(frames, index), rec.labels)
    job = cmi.Job("torch", "all", 0, 0, index[16:], index[:16], *[CACHE / "scratch"] * 3)
    learner = cmi.TorchLearner(job, spec, cfg)
    learner.begin_epoch(0)

    def eight(size: int) -> list[cmi.Batch]:
        return list(itertools.islice(made.epoch(index, len(index) // size, rng, cfg), 8))

    def learn(batches: list[cmi.Batch], at_once: int) -> None:
        for batch in batches:
            learner.train_step(batch.pieces(at_once), 1e-4)

    for size in (16, 64):
        calls = [functools.partial(learn, eight(size), n) for n in (size, 1)]
        calls.append(functools.partial(eight, size))
        step, singly, batch = (ms / 8 for ms in medians(*calls, repeats=5))
        what = f"Torch step of {size} recordings"
        rows.append((f"{what}, against one recording at a time", step, singly, "ms"))
        rows.append((f"making the batch of a {what}, against the step", batch, step, "ms"))
    return rows


def training_data(subjects: int, cfg: cmi.Config) -> cmi.TrainingData:
    """Simulated recordings as jobs see them; the same recordings and folds for every SEED."""
    rec, _ = cmi.cached_recordings(simulated(subjects, 102), cfg)
    assert rec.labels is not None
    inputs = cmi.Inputs(cmi.canonical(rec, np.zeros(len(rec), bool)))
    fold = cmi.make_folds(rec.subject, dataclasses.replace(cfg, seed=42))
    return cmi.TrainingData(inputs, rec.labels, fold, "", "", None)


def cost(work: Callable[..., object], *args: Any) -> tuple[float, float]:
    """Seconds, and processor seconds of this process."""
    used = time.process_time()
    return seconds(work, *args), time.process_time() - used


def fit_fold(name: str, mode: str, fold: int, data: cmi.TrainingData, cfg: cmi.Config) -> Any:
    """Train one fold of a member: its job, its input, and what the training alone took."""
    member, job = cmi.MEMBERS[name], data.jobs(name, mode, cfg)[fold]
    member.start(cfg)
    x = member.prepare(data.inputs, mode)
    job.folder.mkdir(parents=True)
    return job, x, cost(member.fit, job, x, data.labels, cfg)


def at_work(name: str, subjects: int) -> tuple[float, float, float]:
    with tempfile.TemporaryDirectory() as scratch:
        cfg = cmi.Config(output_path=Path(scratch), torch_max_epochs=1, keras_max_epochs=1)
        data = training_data(subjects, cfg)
        if name in cmi.MEMBERS:
            *_, took = fit_fold(name, "all", 0, data, cfg)
        elif name == "features":
            took = cost(getattr, data.inputs, "extracted")
        else:
            n, ones = len(data.fold), np.ones(len(data.labels.table))
            said = np.random.default_rng(0).dirichlet(ones, (6, n)).astype(np.float32)
            said[:, np.arange(n), data.labels.composite] += 0.1
            said /= said.sum(axis=2, keepdims=True)
            if name == "weights":
                what = [f"{m}/imu" for m in "abcdef"], cmi.log_probas(said), data.labels
                took = cost(cmi.find_weights, *what, slice(None), cfg)
            else:
                took = cost(cmi.replay_assignment, said[0], data, cfg, 1)
    return *took, peak_memory()


def growth(options: Options) -> list[Row]:
    """Each stage at 1/8 … the whole of the competition's size; from that a whole run's time."""
    rows, used = [], dict[tuple[str, int], float]()
    whole = max(40, round(options.recordings / 102))
    for name, what in STAGES.items():
        first = 0.0
        for part in (8, 4, 2, 1):
            subjects = whole // part
            secs, used[name, part], peak = alone(at_work, name, subjects)
            first = first or secs / subjects
            n = f"{subjects * 102:,} recordings"
            rows.append((f"{what}: {n}, peak {peak:.1f} GB", secs, first * subjects, "s"))
    cfg, total = cmi.Config(), used["lgbm", 1]
    for name, n_epochs in (("torch", cfg.torch_max_epochs), ("keras", cfg.keras_max_epochs)):
        total += n_epochs * 2 * (used[name, 1] - used[name, 2])  # compiling, done once, falls out
    hours = 2 * cfg.n_folds * total / 3600 / 4
    rows.append(("a whole run on four cores: an estimate, not measured", hours, None, "h"))
    return rows


def run_script(out: Path, **settings: str) -> tuple[float, float]:
    """Seconds and processor seconds of README's first command, from an empty folder."""
    env = runs.clean_environment() | {"OUTPUT_PATH": str(out), **settings}
    how: Any = {"cwd": out.parent, "env": env, "check": True, "stdout": subprocess.DEVNULL}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    secs = seconds(functools.partial(subprocess.run, **how), [sys.executable, str(runs.SCRIPT)])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return secs, sum(after[:2]) - sum(before[:2])


def road(_: Options) -> list[Row]:
    """README's first command and the second; 434 recordings with the defaults of a real run."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        out, stages = Path(scratch) / "demo", Path(scratch) / "demo" / "logs" / "stages.jsonl"
        first, _ = run_script(out)
        of_first = [*map(json.loads, stages.open())]
        second, _ = run_script(out)
        rows.append(("README's first command, against the second", second, first, "s"))
        begins = [s["begin"] for s in map(json.loads, stages.open()) if s["name"] == "serving"]
        rows.append(("until it asks the gateway, against the first", *begins[::-1], "s"))
        rows += [(f"first command: {s['name']}", s["secs"], None, "s") for s in of_first]
        data, out = simulated(7, 62), Path(scratch) / "run"
        _, used = run_script(out, CMI_DATA_DIR=str(data), NO_ROTATION="0")
        what = "434 simulated recordings, 5 folds, both modes: processor time"
        rows.append((what, used, None, "s"))
        for name in cmi.MEMBERS:
            own = [json.loads(p.read_text()) for p in out.glob(f"{name}_models/*/fold??.json")]
            took = sum(note["info"]["secs"] / note["workers"] for note in own)
            rows.append((f"the same: {name}, {len(own)} models", took, None, "s"))
    return rows


def serving(options: Options) -> list[Row]:
    """predict, beside every model for itself, one after the other."""
    out = options.bundle or CACHE / f"bundle-{cmi.digest(Path(cmi.__file__).read_bytes())}"
    if not (out / "ensemble" / "weights.json").exists():  # a short run of this very pipeline
        runs.good(runs.run(out, **SHORT))
    data = next(out.glob("simulated-*"), None) or simulated(10, 40)
    test = pl.read_csv(data / "test.csv", infer_schema_length=None)
    person = pl.read_csv(data / "test_demographics.csv")
    asked, cfg, singles = test.partition_by("sequence_id"), cmi.Config(output_path=out), []
    predictor = cmi.Predictor(cfg)
    times = [seconds(predictor.predict, question, person) for question in asked]
    for path in out.glob("*_models/bundle.json"):
        content = json.loads(path.read_text())
        name, labels = content["member"], np.array(content["labels"])
        for mode, stem in ((m, s) for m in ("all", "imu") for s in content["modes"][m]):
            model = cmi.MEMBERS[name].load(path.parent / mode, [stem], labels, cfg)
            singles.append((name, mode, model))

    def plain(question: pl.DataFrame) -> None:
        rec = cmi.canonical(cmi.to_recordings(question, person), np.zeros(1, bool))
        table, frames = cmi.extract_features(rec)
        for name, mode, model in singles:
            x = table if name == "lgbm" else frames
            cmi.MEMBERS[name].predict(model, x.of_mode(mode))

    loop = [seconds(plain, question) for question in asked[:21]]
    rows: list[Row] = [(f"first answer, with loading {len(singles)} models", times[0], None, "s")]
    for q in (50, 95):
        ours, theirs = (1e3 * float(np.percentile(t[1:], q)) for t in (times, loop))
        what = f"predict, {len(singles)} models, {len(times) - 1} recordings, p{q}"
        rows.append((f"{what}, against one model after the other", ours, theirs, "ms"))
    return rows


def main() -> None:
    """Each part's figures as soon as it has them, below what they are measured on."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = {part.__name__: part for part in (features, training, growth, road, serving)}
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    parser.add_argument("--bundle", type=lambda text: Path(text).absolute())
    parser.add_argument("--recordings", type=int, default=8151)
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = re.findall(r"model name\s*:\s*(.+)", info) or [platform.machine()]
    about = f"{versions}, {time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.1f}"
    print(f"{os.cpu_count()} × {models[0]}, {about}\n")
    print("| part | what | ours | plain | ratio |\n|---|---|---|---|---|")
    for name in options.parts or parts:
        for what, ours, plain, unit in alone(parts[name], options):
            other = f"{plain:,.3f} {unit} | {plain / ours:.2f} ×" if plain else " | "
            print(f"| {name} | {what} | {ours:,.3f} {unit} | {other} |", flush=True)


if __name__ == "__main__":
    main()
