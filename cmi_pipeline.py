# %% [markdown]
"""Tell hair-pulling from hand-waving with a wrist sensor: train, blend and serve.

One file for Kaggle's "CMI - Detect Behavior with Sensor Data": script, notebook and module in one.

    python cmi_pipeline.py                       # plan, train or reuse, blend, gateway, submission
    python cmi_pipeline.py PLAN_ONLY=1           # stop after the plan; NAME=value is a setting
    python cmi_pipeline.py CMI_DATA_DIR=…        # the real files instead of a simulation
    python cmi_pipeline.py --help                # every setting, its default and today's value
    python cmi_pipeline.py --help-features       # every feature, its unit and meaning

The road, from top to bottom; predict is the same functions for one recording:

    settings, environment ─► Config
    CSV or a frame ─► Recordings ─► canonical ─► extract_features ─┬─► FeatureTable ─► LightGBM ──┐
                                                                   └─► Frames ─► Batches          │
                                                                         └─► Torch, Keras ────────┤
    folds ─► jobs (member, mode, seed, fold) ─► fit what the plan says ─► out-of-fold rows ◄──────┘
    out-of-fold rows ─► Blend ─► Assignment ─► report, weights.json ─► Predictor

Sections
     1 Configuration               7 Batches             12 Members, plan and jobs
     2 Log and artefacts           8 LightGBM            13 Blend and assignment
     3 Gestures, score and folds   9 Network training    14 Report
     4 Recordings                 10 Torch               15 Serving
     5 Motion and wearer          11 Keras               16 Entry
     6 Features and frames

Axes of arrays
    N recordings    R rows of all recordings, end to end    T rows of one recording after padding
    C channels      F features    K gestures (18)           L composite labels (at most 102)
    B recordings of a batch       D numbers a row that a network is given

Units are SI: acceleration in m/s², angular velocity in rad/s, time in s, temperature in °C.
Quaternions are (w, x, y, z), as in the files, and turn the device frame into the world (z up).
"""

# %%
from __future__ import annotations

import atexit
import base64
import collections
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import html
import importlib.machinery
import io
import itertools
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from configparser import ConfigParser
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl


class LazyModule(types.ModuleType):
    """Stands for a package until something of it is used: importing torch alone takes seconds."""

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.__name__), attribute)


fcntl, resource = LazyModule("fcntl"), LazyModule("resource")  # there are none on Windows
joblib, keras, lgb, special = map(LazyModule, ("joblib", "keras", "lightgbm", "scipy.special"))
linear_model, mpl_figure = LazyModule("sklearn.linear_model"), LazyModule("matplotlib.figure")
optimize, transform = LazyModule("scipy.optimize"), LazyModule("scipy.spatial.transform")
matplotlib, tf, torch, tqdm = map(LazyModule, ("matplotlib", "tensorflow", "torch", "tqdm.auto"))
nn: Any = LazyModule("torch.nn")
Tensor = Any  # of torch
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Str = npt.NDArray[np.str_]
Arrays = dict[str, npt.NDArray[Any]]

# %%
# What stands here counts as the environment, which wins: {"PLAN_ONLY": "1"} stops after the plan,
# {"USE_KERAS": "0"} leaves a member out, {"FORCE_TRAIN_TORCH": "1"} trains one anew.
SETTINGS: dict[str, str] = {}


# %% [markdown]
# ## 1 Configuration
#
# In: the environment, and NAME=value arguments. Out: one frozen Config. Every setting is one field,
# which the variable of its name in capitals overrides; nothing else reads the environment. Change a
# setting, and exactly the members that it `retrains` are trained again.

# %%
LGBM, TORCH, KERAS = ("lgbm",), ("torch",), ("keras",)
NETWORKS, EVERY = TORCH + KERAS, LGBM + TORCH + KERAS
KAGGLE_INPUT = Path("/kaggle/input")  # data sets are attached below it, at depths that change
KAGGLE_WORKING = Path("/kaggle/working")
COUNT, SIZE = (1, 10**6), (0, 10**7)  # at least one, or none as well
SWITCH = ("auto", "0", "1")
POLICIES = ("", "float32", "mixed_float16", "mixed_bfloat16")
READERS: dict[str, Callable[[str], Any]] = {
    **{"int": int, "float": float, "str": str, "Path": lambda text: Path(text).expanduser()},
    "bool": lambda text: ConfigParser.BOOLEAN_STATES[text.lower()],  # 1 yes true on, 0 no false off
}


class ConfigError(ValueError):
    """A setting whose value cannot be read, or a path it names that does not exist."""


class DataError(ValueError):
    """An input file that cannot be used; the text says what, where and what to do."""


def setting(default: Any, text: str, retrains: Sequence[str] = (), allowed: Any = ()) -> Any:
    """One field; `allowed` are its words, or the least and the greatest number that it may be."""
    about = {"help": text, "retrains": retrains, "allowed": allowed}
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True, slots=True)
class Config:
    """All settings. Derived values are properties; nothing changes after it was made."""

    cmi_data_dir: Path | None = setting(None, "folder of the four CSV files; found, else simulated")
    output_path: Path | None = setting(None, "output folder; /kaggle/working, else ./cmi_output")
    ckpt_base_dir: Path | None = setting(None, "caches and checkpoints; OUTPUT_PATH/checkpoints")
    lgbm_bundle_path: Path | None = setting(None, "bundle to reuse, or its bundle.json; MODEL_PATH")
    torch_bundle_path: Path | None = setting(None, "bundle to reuse: a folder or its bundle.json")
    keras_bundle_path: Path | None = setting(None, "bundle to reuse: a folder or its bundle.json")

    plan_only: bool = setting(False, "stop after the plan")
    serve_only: bool = setting(False, "serve the bundles that are there, train nothing")
    strict: bool = setting(False, "predict raises instead of answering with a fallback")
    seed: int = setting(42, "every random number follows from it", EVERY, (0, 2**31 - 1))
    n_folds: int = setting(5, "folds, grouped by subject", EVERY, (2, 50))
    use_lgbm: bool = setting(True, "LightGBM takes part")
    use_torch: bool = setting(True, "Torch takes part")
    use_keras: bool = setting(True, "Keras takes part")
    no_rotation: str = setting("auto", "models for recordings without rotation", (), SWITCH)
    force_train_lgbm: bool = setting(False, "train LightGBM although a bundle fits")
    force_train_torch: bool = setting(False, "train Torch although a bundle fits")
    force_train_keras: bool = setting(False, "train Keras although a bundle fits")
    resume: bool = setting(True, "go on from checkpoints")
    resume_torch: bool = setting(True, "go on from Torch checkpoints")
    resume_keras: bool = setting(True, "go on from Keras checkpoints")
    fail_if_torch_missing: bool = setting(False, "1: Torch not installed is an error")
    fail_if_keras_missing: bool = setting(False, "1: Keras or TensorFlow not installed is an error")
    kaggle_is_competition_rerun: str | None = setting(None, "set by Kaggle: serve the hidden test")
    sim_subjects: int = setting(12, "training subjects of the simulation", (), (2, 10**4))
    sim_test_subjects: int = setting(2, "test subjects of the simulation", (), (1, 10**4))
    sim_recordings: int = setting(102, "recordings a simulated subject, at most 102", (), (1, 102))

    fixed_pad_len: int = setting(144, "last rows networks see; 0: percentile", NETWORKS, (0, 5000))
    pad_len_percentile: float = setting(95.0, "of lengths if FIXED_PAD_LEN=0", NETWORKS, (1, 100))
    modality_dropout_prob: float = setting(0.3, "share that loses ToF, THM, both", EVERY, (0, 1))
    frame_cache: bool = setting(True, "keep frames in memory; 0: always mapped from disk")
    frame_cache_max_mb: int = setting(2048, "frames above this are mapped from disk", (), SIZE)
    frame_cache_max_items: int = setting(1600, "recordings that predict remembers", (), SIZE)
    upside_down: bool = setting(True, "detect devices worn turned by 180°, turn them back", EVERY)

    lgbm_rounds: int = setting(350, "boosting rounds at most", LGBM, (1, 10**5))
    lgbm_lr: float = setting(0.07, "learning rate", LGBM, (1e-6, 10))
    lgbm_leaves: int = setting(20, "leaves of a tree", LGBM, (2, 10**4))
    lgbm_es_rounds: int = setting(50, "rounds without gain until it stops; 0: never", LGBM, SIZE)
    lgbm_feature_fraction: float = setting(0.1, "features that a tree is shown", LGBM, (0.001, 1))
    lgbm_extra_trees: bool = setting(True, "thresholds drawn at random, not searched", LGBM)
    lgbm_top_features: int = setting(0, "K best features of an earlier run; 0: all", LGBM, SIZE)

    stretch_prob: float = setting(0.5, "share stretched in time", NETWORKS, (0, 1))
    shift_prob: float = setting(0.5, "share that ends a few rows early", NETWORKS, (0, 1))
    jitter_prob: float = setting(0.5, "share whose wristband is turned", NETWORKS, (0, 1))
    mixup_prob: float = setting(0.0, "share that is mixed with another", NETWORKS, (0, 1))
    time_mask_prob: float = setting(0.2, "share that loses some rows", NETWORKS, (0, 1))
    channel_mask_prob: float = setting(0.1, "share that loses some channels", NETWORKS, (0, 1))

    torch_max_epochs: int = setting(20, "epochs at most", TORCH, COUNT)
    torch_batch_size: int = setting(0, "recordings a step; 0: 1/100 of all, 16 to 64", TORCH, SIZE)
    torch_accum_steps: int = setting(1, "micro-batches a step", TORCH, COUNT)
    torch_lr: float = setting(2e-3, "peak learning rate", TORCH, (0, 1))
    torch_weight_decay: float = setting(1e-2, "weight decay", TORCH, (0, 10))
    torch_dropout: float = setting(0.2, "dropout", TORCH, (0, 0.95))
    torch_label_smoothing: float = setting(0.05, "label smoothing", TORCH, (0, 0.95))
    torch_es_patience: int = setting(0, "epochs without gain until it stops; 0: never", TORCH, SIZE)
    torch_es_min_delta: float = setting(1e-4, "least gain in log loss that counts", TORCH, (0, 1))
    torch_amp: bool = setting(True, "mixed precision where a GPU has it")
    torch_seeds: int = setting(1, "networks a fold, averaged", (), (1, 100))
    torch_data_parallel: bool = setting(False, "split batches over all cards, not a fold a card")
    use_focal_loss: bool = setting(False, "focal instead of cross-entropy loss", TORCH)
    torch_width: int = setting(64, "channels of the first block", TORCH, (8, 1024))
    torch_tof_images: bool = setting(False, "a 2-D network over each ToF frame", TORCH)
    torch_ema: float = setting(0.99, "averaged weights kept at a step; 0: off", TORCH, (0, 1))
    torch_threads: int = setting(1, "CPU threads of one network", (), (1, 256))
    dl_num_workers: int = setting(0, "kept for old notebooks: no effect, batches need no workers")

    keras_max_epochs: int = setting(20, "epochs at most", KERAS, COUNT)
    keras_batch_size: int = setting(64, "recordings a step, at most 1/16 of all", KERAS, COUNT)
    keras_lr: float = setting(3e-3, "peak learning rate", KERAS, (0, 1))
    keras_weight_decay: float = setting(1e-2, "weight decay", KERAS, (0, 10))
    keras_dropout: float = setting(0.2, "dropout", KERAS, (0, 0.95))
    keras_label_smoothing: float = setting(0.1, "label smoothing", KERAS, (0, 0.95))
    keras_width: int = setting(64, "channels of the first block", KERAS, (16, 1024))
    keras_es_patience: int = setting(0, "epochs without gain until it stops; 0: never", KERAS, SIZE)
    keras_mp: bool = setting(True, "mixed precision where a GPU has it")
    keras_policy: str = setting("", "forces a dtype policy", (), POLICIES)
    keras_jit: bool = setting(False, "XLA")
    keras_threads: int = setting(2, "CPU threads of one network", (), (1, 256))

    ensemble_weights: str = setting("", 'fixed shares, "lgbm:0.4,torch:0.6"; fitted if empty')
    ensemble_w_lgbm: float | None = setting(None, "share; fitted, .20 without rows", (), SIZE)
    ensemble_w_torch: float | None = setting(None, "share; fitted, .45 without rows", (), SIZE)
    ensemble_w_keras: float | None = setting(None, "share; fitted, .35 without rows", (), SIZE)
    ensemble_search: str = setting("logloss", "what weights are best", (), ("logloss", "score"))
    ensemble_trials: int = setting(256, "weights tried for the best score", (), COUNT)
    ensemble_temperature: float | None = setting(None, "of fixed shares; fitted", (), (0.01, 100))
    subject_assignment: str = setting("auto", "labels once a subject", (), SWITCH)

    log_every_steps: int = setting(50, "rounds of LightGBM between two lines of logs/", (), COUNT)
    print_every_steps: int = setting(100, "steps of a network between two lines", (), COUNT)
    feature_log_every: int = setting(2000, "recordings between two lines", (), COUNT)
    save_jsonl: bool = setting(True, "write logs/*.jsonl")
    use_tqdm: bool = setting(False, "progress bars on a terminal")

    cmi_workers: int = setting(1, "jobs side by side", (), (1, 10**4))
    cmi_backend: str = setting("loky", "joblib's backend", (), ("loky", "threading", "dask", "ray"))
    dask_scheduler: str = setting("", "address of a running Dask scheduler")
    ray_address: str = setting("", "address of a running Ray cluster")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, allowed = getattr(self, f.name), f.metadata["allowed"]
            if not allowed or value is None:
                continue
            if isinstance(allowed[0], str):
                good, text = value in allowed, "one of " + ", ".join(filter(None, allowed))
            else:
                good, text = allowed[0] <= value <= allowed[1], f"from {allowed[0]} to {allowed[1]}"
            if not good:
                raise ConfigError(f"{f.name.upper()}={value} must be {text}.")
        if self.keras_width % 16 or self.torch_width % 8:
            raise ConfigError("KERAS_WIDTH must be a multiple of 16, TORCH_WIDTH one of 8.")

    @property
    def out(self) -> Path:
        here = KAGGLE_WORKING if KAGGLE_WORKING.is_dir() else Path("cmi_output")
        return self.output_path or here

    @property
    def data_dir(self) -> Path:
        if self.cmi_data_dir is None:
            raise ConfigError("No competition data was found. Set CMI_DATA_DIR to its folder.")
        return self.cmi_data_dir

    @property
    def checkpoints(self) -> Path:
        return self.ckpt_base_dir or self.out / "checkpoints"

    @property
    def rerun(self) -> bool:
        return self.kaggle_is_competition_rerun is not None  # empty counts, as in Kaggle's package

    def training_settings(self, member: str) -> dict[str, Any]:
        """The settings on which the trained models of `member` depend, by variable."""
        fields = (f for f in dataclasses.fields(self) if member in f.metadata["retrains"])
        return {f.name.upper(): getattr(self, f.name) for f in fields}

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """Defaults, overridden by variables in capitals; empty ones count only for texts."""
        if "MODEL_PATH" in env:
            env = {"LGBM_BUNDLE_PATH": env["MODEL_PATH"], **env}
        values: dict[str, Any] = {}
        for f in dataclasses.fields(cls):
            name, kind = f.name.upper(), str(f.type).split()[0]  # the annotation as it is written
            text = env.get(name, "").strip()
            try:
                if text or (kind == "str" and name in env):
                    values[f.name] = READERS[kind](text)
            except (KeyError, ValueError, RuntimeError):  # the last: ~ without a home
                why = f"cannot be read as {kind} (default {f.default!r})"
                raise ConfigError(f"{name}={env[name]!r} {why}.") from None
        return cls(**values)


def shown(value: object) -> str:
    """A setting's value as it would be written in the environment."""
    return "" if value is None else str(int(value) if isinstance(value, bool) else value)


def settings_table(cfg: Config | None = None) -> list[str]:
    """Every setting, a line each, with its default or, of a Config, its value: docs/settings.md."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for f in dataclasses.fields(Config):
        now, default = shown(getattr(cfg or Config(), f.name)), shown(f.default)
        value = now if now == default else f"{now} (default {default})"
        lines.append(f"| {f.name.upper()} | {value} | {f.metadata['help']} |")
    return lines


ALIASES = {  # likely slips, and names of the first version, that look unlike what is meant
    "EPOCHS": "TORCH_MAX_EPOCHS and KERAS_MAX_EPOCHS",
    "BATCH_SIZE": "TORCH_BATCH_SIZE and KERAS_BATCH_SIZE",
    "USE_LIGHTGBM": "USE_LGBM",
    **dict.fromkeys(("CMI_DATA", "DATA_DIR"), "CMI_DATA_DIR"),
    "OUTPUT_DIR": "OUTPUT_PATH",
    "TORCH_ROTATE_PROB": "JITTER_PROB",
    "KERAS_RLR_PATIENCE": "KERAS_LR, the peak of one cycle",
    **{f"TORCH_{name}_PROB": f"{name}_PROB" for name in ("MIXUP", "STRETCH", "SHIFT")},
}
KNOWN_NAMES = [*(f.name.upper() for f in dataclasses.fields(Config)), "MODEL_PATH"]


def nearest_name(name: str, likeness: float) -> str:
    """The setting that was probably meant by a name that is none; empty if there is no such."""
    near = difflib.get_close_matches(name.upper(), KNOWN_NAMES, n=1, cutoff=likeness)
    return ALIASES.get(name.upper()) or "".join(near)


def environment() -> dict[str, str]:
    return {**SETTINGS, **os.environ}  # which wins


# %% [markdown]
# ## 2 Log and artefacts
#
# In: events and results. Out: lines and files. One function prints, a line an event. An artefact is
# written under a temporary name and renamed: what exists is whole. Only logs grow line by line.

# %%
RUN_LOG: dict[str, Any] = {"began": time.time(), "file": None}  # shared with a run's workers
SPOKEN = [time.time()]  # when the screen was last written to
ALOUD = ("warning", "note", "fallback", "retreat", "resume")  # events that the screen shows too
SILENCE = 25.0  # s; whoever watches a screen should never wonder whether it still runs
STAGES: list[dict[str, Any]] = []  # the parts of this run that are over, for the report
BAD_FILE = (
    *(OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, OverflowError),
    *(RuntimeError, UnpicklingError, zipfile.BadZipFile, zlib.error),
)


def say(text: str, *, on_screen: bool = True) -> None:
    """One line for the screen and for logs/run.log, after the seconds since the run's start."""
    line = f"[{time.time() - RUN_LOG['began']:7.1f}s] {text}".replace("\n", " ")
    if RUN_LOG["file"]:
        with contextlib.suppress(OSError), RUN_LOG["file"].open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    if on_screen:
        SPOKEN[0] = time.time()
        lines = textwrap.fill(line, 138, subsequent_indent=" " * 12, break_on_hyphens=False)
        known = getattr(sys.stdout, "encoding", None) or "utf-8"  # it may lack … and →
        lines = lines.encode(known, "replace").decode(known)
        print(lines, flush=True)  # noqa: T201 in one write, so that no line is torn


def log(event: str, /, **values: object) -> None:
    """One event as key=value pairs, for logs/run.log, or the screen while there is no such file."""
    pairs = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
    say(f"{event:<12} {'  '.join(pairs)}", on_screen=event in ALOUD or not RUN_LOG["file"])


def duration(secs: float) -> str:
    size, unit = (1, "s") if secs < 100 else (60, "min") if secs < 6000 else (3600, "h")
    return f"{secs / size:.{int(size > 1)}f} {unit}"  # 42 s, 3.5 min or 2.1 h


class Progress:
    """A long loop's lines in run.log: one every `every` units and one at the end."""

    def __init__(self, event: str, total: int, every: int, done: int = 0, **names: object) -> None:
        self.event, self.total, self.every, self.names = event, total, every, names
        self.done, self.first, self.began = done, done, time.monotonic()

    def step(self, n: int = 1, values: Callable[[], Mapping[str, object]] = dict) -> None:
        """`n` more units are done. `values` go into the line and are asked for if one is due."""
        before, self.done = self.done, self.done + n
        if self.done // self.every > before // self.every or before < self.total <= self.done:
            rate = (time.monotonic() - self.began) / (self.done - self.first)
            done, left = f"{self.done}/{self.total}", duration(rate * (self.total - self.done))
            log(self.event, **self.names, done=done, **values(), left=left)


@contextlib.contextmanager
def stage(name: str, cfg: Config, note: str = "", state: Callable[[], str] = str) -> Iterator[None]:
    """Keep how long a part of the run takes and how much memory was held at most until its end, and
    break the screen's silence by its `state`. `note` is "reused" where nothing had to be made."""
    began, over = time.time(), threading.Event()

    def break_silence() -> None:
        while not over.wait(1):
            now = time.time()
            if now - SPOKEN[0] > (SILENCE if now - RUN_LOG["began"] < 600 else 60):
                say(f"… {name}, {duration(now - began)} so far  {state()}")

    threading.Thread(target=break_silence, daemon=True).start()
    try:
        yield
    finally:
        over.set()
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts in bytes, Linux in KB
    peak_mb = max(resource.getrusage(who).ru_maxrss for who in whose) / unit
    begin, secs = began - RUN_LOG["began"], time.time() - began
    STAGES.append({"name": name, "secs": secs, "peak_mb": peak_mb, "begin": begin, "note": note})
    log("stage", **STAGES[-1])
    append_jsonl(cfg.out / "logs" / "stages.jsonl", cfg, **STAGES[-1])


def machine_name() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{joblib.cpu_count()} cores, {memory:.1f} GB"


def rng_for(cfg: Config, *path: str | int) -> np.random.Generator:
    """Random numbers of the seed and `path` alone: fold 3 by itself equals fold 3 of a full run."""
    return np.random.default_rng([cfg.seed, *(zlib.crc32(str(p).encode()) for p in path)])


def write_whole(path: Path, content: bytes | memoryview | str | npt.NDArray[Any]) -> None:
    """Write a file, an array as .npy, so that it is either absent, or as before, or complete."""
    if isinstance(content, np.ndarray):
        np.save(array := io.BytesIO(), content, allow_pickle=False)
        content = array.getbuffer()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = str(path)  # a full disk does not say what it had no room for
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold a folder for this run alone. The lock is the system's own and ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            advice = "Wait for it, or set OUTPUT_PATH, and CKPT_BASE_DIR if you use it."
            raise ConfigError(f"Another run is writing to {folder}. {advice}") from None
        except OSError as error:  # no file system of this kind can lock
            log("warning", folder=folder, lock=error.strerror, advice="start no second run on it")
        else:  # what killed runs were writing
            for path in sorted(folder.rglob(".*.[0-9]*.part*")):
                is_folder = path.is_dir() and not path.is_symlink()
                shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)
        yield


def write_arrays(path: Path, arrays: Mapping[str, Any], note: object) -> None:
    """Arrays and a note in JSON as one .npz file, whole or not at all."""
    np.savez(content := io.BytesIO(), note=np.array(json.dumps(note)), **arrays)
    write_whole(path, content.getbuffer())


@contextlib.contextmanager
def refusing(path: Path, what: str) -> Iterator[None]:
    """Whatever is wrong with a file that is read here becomes one clear `DataError`."""
    try:
        yield
    except DataError:
        raise
    except BAD_FILE as error:
        text = f"{path} {what} ({' '.join(str(error).split()):.200})"
        raise DataError(f"{text}. Delete it, or attach its bundle again, and run again.") from None


def read_arrays(path: Path) -> tuple[Arrays, Any]:
    """What `write_arrays` wrote: arrays and note."""
    with refusing(path, "is damaged"), np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
        return arrays, json.loads(str(arrays.pop("note")))


def write_json(path: Path, content: object) -> None:
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    with refusing(path, "is not JSON"):
        return json.loads(path.read_bytes())


def append_jsonl(path: Path, cfg: Config, **values: object) -> None:
    """One more line of a log for machines; nothing with SAVE_JSONL=0."""
    if cfg.save_jsonl:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError), path.open("a") as file:  # as for run.log
            file.write(json.dumps(values) + "\n")


def digest(*parts: object) -> str:
    """Sixteen hex digits that change with any byte of `parts` (arrays, bytes or JSON values)."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, np.ndarray):
            state.update(f"{part.dtype.str}{part.shape}".encode())
            part = np.ascontiguousarray(part).view(np.uint8).data
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True).encode()
        state.update(part)
    return state.hexdigest()


def difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> str:
    """The first entries in which two fingerprints differ, in words; empty if they agree."""
    keys = [k for k in now if k not in then or now[k] != then[k]]
    plain = [k for k in keys if k.isupper() or "version" in k or k == "precision"]
    texts = {k: f"{k} {then.get(k, 'absent')} → {now[k]}" for k in plain}
    return ", ".join([texts.get(k, f"{k} differ") for k in keys][:3])


@functools.cache
def package_version(name: str) -> str:
    """Installed version, without importing the package; empty if it is not installed."""
    for distribution in (name, f"{name}-cpu"):  # TensorFlow has both
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    return ""


# %% [markdown]
# ## 3 Gestures, score and folds
#
# In: names and labels. Out: codes, the competition's own score (two well-known public copies of it
# are wrong), and the fold of each recording. No subject is on both sides of a split.

# %%
TARGETS = (  # those that pull, pinch or scratch the head
    "Above ear - pull hair",
    "Cheek - pinch skin",
    "Eyebrow - pull hair",
    "Eyelash - pull hair",
    "Forehead - pull hairline",
    "Forehead - scratch",
    "Neck - pinch skin",
    "Neck - scratch",
)
GESTURES = (
    *TARGETS,
    "Drink from bottle/cup",
    "Feel around in tray and pull out an object",
    "Glasses on/off",
    "Pinch knee/leg skin",
    "Pull air toward your face",
    "Scratch knee/leg skin",
    "Text on phone",
    "Wave hello",
    "Write name in air",
    "Write name on leg",
)
ORIENTATIONS = (
    "Seated Straight",
    "Seated Lean Non Dom - FACE DOWN",
    "Lie on Back",
    "Lie on Side - Non Dominant",
)
BEHAVIORS = (  # in the order in which they follow each other; a recording starts with one of two
    "Moves hand to target location",
    "Relaxes and moves hand to target location",
    "Hand at target location",
    "Performs gesture",
)
PHASES = ("Transition", "Gesture")
CODES = {"gesture": GESTURES, "orientation": ORIENTATIONS, "behavior": BEHAVIORS, "phase": PHASES}
MODES = ("all", "imu")  # every sensor; ToF and THM never seen
NO_ROTATION = "norot"  # as if no recording had a rotation: for the few that come without
ROUTES = (*MODES, NO_ROTATION)
NON_TARGET = len(TARGETS)  # code of any other gesture among the classes of the score


def score(truth: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """The competition's, of gesture codes (N): half the F1 of target against non-target, half the
    macro F1 over the 8 targets and one class for all the rest, without classes that never occur."""
    return float(f1_of_counts(count_classes(np.asarray(truth), np.asarray(predicted))).mean())


def count_classes(truth: I64, answer: I64, group: I64 | int = 0, n_groups: int = 1) -> F64:
    """Recordings by class of the score, truth first. 2 × (N) → (groups, 9, 9)"""
    cell = 9 * np.minimum(truth, NON_TARGET) + np.minimum(answer, NON_TARGET)
    counts = np.bincount(81 * group + cell, minlength=81 * n_groups)
    return counts.reshape(n_groups, 9, 9).astype(np.float64)


def f1_of_counts(counts: F64) -> F64:
    """Binary and macro F1 of confusion matrices, truth first; 0 if undefined. (…, 9, 9) → (2, …)"""
    hit = np.diagonal(counts, axis1=-2, axis2=-1)  # (…, 9)
    sides = counts.sum(-1) + counts.sum(-2)  # truth + prediction
    f1 = 2 * hit / np.maximum(sides, 1)
    macro = f1.sum(-1) / np.maximum((sides > 0).sum(-1), 1)
    both = counts[..., :8, :8].sum((-2, -1))  # target, and called one
    either = counts[..., :8, :].sum((-2, -1)) + counts[..., :, :8].sum((-2, -1))
    return np.stack([2 * both / np.maximum(either, 1), macro])


@dataclass(frozen=True, slots=True)
class Labels:
    """What is to be learnt of N recordings, as codes into GESTURES, ORIENTATIONS, BEHAVIORS."""

    gesture: I64  # (N)
    orientation: I64  # (N)
    behavior: I64  # (N) of the first row: 0 moves, 1 relaxes and moves
    phase: U8  # (R) 1 where the gesture is performed
    table: I64  # (L, 3) behavior, orientation, gesture of each composite label, sorted
    composite: I64  # (N) row of `table`

    @classmethod
    def of(cls, gesture: I64, orientation: I64, behavior: I64, phase: U8) -> Labels:
        """Derive the composite labels; the protocol is never written down by hand."""
        triples = np.stack([behavior, orientation, gesture], axis=1)
        table, composite = np.unique(triples, axis=0, return_inverse=True)
        return cls(gesture, orientation, behavior, phase, table, composite.reshape(-1))


def gesture_proba(composite: npt.NDArray[Any], table: I64) -> F32:
    """Sum composite probabilities over behavior and orientation. (…, L) → (…, K)"""
    belongs = table[:, 2:] == np.arange(len(GESTURES))  # (L, K)
    return (composite @ belongs.astype(composite.dtype)).astype(np.float32)


def make_folds(subject: Str, cfg: Config) -> I64:
    """Fold of each recording, (N): shuffled subjects, largest first, go to the lightest fold. As
    everybody performs the whole protocol, this is stratified by nature."""
    _, index, counts = np.unique(subject, return_inverse=True, return_counts=True)
    if (n := len(counts)) < cfg.n_folds:
        advice = f"set N_FOLDS={n}" if n > 1 else "it takes the data of several"
        raise ConfigError(f"{n} subjects cannot fill {cfg.n_folds} folds; {advice}.")
    order = rng_for(cfg, "folds").permutation(n)
    load, fold = np.zeros(cfg.n_folds), np.empty(n, np.int64)
    for s in order[np.argsort(-counts[order], kind="stable")]:
        fold[s] = load.argmin()
        load[fold[s]] += counts[s]
    return fold[index]


# %% [markdown]
# ## 4 Recordings
#
# In: CSV files, or the frame that predict receives. Out: Recordings. Recordings differ in length,
# so they are stored end to end: recording i owns the rows start[i]:start[i + 1]. A pixel is one
# byte: 0 … 249 as measured, 254 nothing in range (a value), 255 missing (a gap).

# %%
ACC = ("acc_x", "acc_y", "acc_z")
ROT = ("rot_w", "rot_x", "rot_y", "rot_z")
THM = tuple(f"thm_{i}" for i in range(1, 6))
TOF = tuple(f"tof_{i}_v{j}" for i in range(1, 6) for j in range(64))
TEST_FILES = ("test.csv", "test_demographics.csv")
SENSORS = ACC + ROT + THM + TOF
LENGTHS = ("height_cm", "shoulder_to_wrist_cm", "elbow_to_wrist_cm")
PERSON = ("adult_child", "age", "sex", "handedness", *LENGTHS)
FARTHEST, NOTHING, MISSING = 249, 254, 255  # codes of a ToF pixel; -1 in the files is NOTHING


@dataclass(frozen=True, slots=True)
class Recordings:
    """N recordings of the wrist device, end to end. Arrays are shared, never written to."""

    start: I64  # (N + 1) first row of each recording; the last entry is R
    acc: F32  # (R, 3) m/s², gravity included; NaN: missing
    rot: F32  # (R, 4) quaternion, w first; NaN: missing
    thm: F32  # (R, 5) °C; NaN: missing
    tof: U8  # (R, 5, 8, 8) distance, or NOTHING, or MISSING
    sequence_id: Str  # (N)
    subject: Str  # (N)
    person: F32  # (N, 7) in the order of PERSON; NaN: unknown
    labels: Labels | None = None

    def __len__(self) -> int:
        return len(self.start) - 1

    def part(self, first: int, last: int) -> Recordings:
        """Recordings first … last - 1, as views, without labels."""
        rows = slice(self.start[first], self.start[last])
        start = self.start[first : last + 1] - self.start[first]
        arrays = (self.acc[rows], self.rot[rows], self.thm[rows], self.tof[rows])
        own = (self.sequence_id[first:last], self.subject[first:last], self.person[first:last])
        return Recordings(start, *arrays, *own)


def to_numbers(frame: pl.DataFrame, columns: Sequence[str]) -> F32:
    """Columns as numbers, whatever type they arrived in: Kaggle's gateway hands over all-null ones
    as text. What is absent, or no finite number, is missing, NaN. → (R, len(columns))"""
    names = set(frame.columns)
    there = [i for i, c in enumerate(columns) if c in names]
    out = np.full((len(frame), len(columns)), np.nan, np.float32)
    if there:
        cast = pl.col([columns[i] for i in there]).cast(pl.Float32, strict=False)
        try:  # one expression for all: one for each takes ten times as long
            found = frame.select(cast).to_numpy()
            out[:, there] = np.where(np.isfinite(found), found, np.nan)
        except (pl.exceptions.PolarsError, TypeError) as error:  # a list, a struct, a category
            raise DataError(f"A column of numbers holds something else: {error!s:.200}") from None
    return out


def to_recordings(frame: pl.DataFrame, person: pl.DataFrame) -> Recordings:
    """Rows of whole recordings and their wearers, of whom one unknown counts as right-handed."""
    ids = frame["sequence_id"].cast(pl.String)
    first = np.flatnonzero((ids != ids.shift()).fill_null(value=True).to_numpy())
    texts = (ids, frame["subject"].cast(pl.String))
    sequence_id, subject = (t.gather(first).to_numpy().astype(np.str_) for t in texts)
    tof = np.empty((len(frame), len(TOF)), np.uint8)
    for i in range(0, len(frame), 4096):  # blocks that fit the processor's cache
        raw = to_numbers(frame[i : i + 4096], TOF)
        code = np.where((raw >= 0) & (raw <= FARTHEST), raw, np.where(raw == -1, NOTHING, MISSING))
        tof[i : i + 4096] = code
    names = person["subject"] if "subject" in person.columns else [""] * len(person)
    known = {str(s): row for s, row in zip(names, to_numbers(person, PERSON), strict=True)}
    stranger = np.full(len(PERSON), np.nan, np.float32)
    wearer = np.stack([known.get(str(s), stranger) for s in subject])
    right = PERSON.index("handedness")
    wearer[:, right] = np.where(wearer[:, right] == 0, 0, 1)
    acc, rot, thm = (to_numbers(frame, columns) for columns in (ACC, ROT, THM))
    start = np.r_[first, len(ids)]
    return Recordings(start, acc, rot, thm, tof.reshape(-1, 5, 8, 8), sequence_id, subject, wearer)


def read_table(path: Path, texts: Sequence[str], values: Sequence[str]) -> pl.DataFrame:
    """The named columns of a CSV file, `texts` as String, `values` as Float32."""
    if not path.is_file():
        raise DataError(f"{path} does not exist. Point CMI_DATA_DIR at the competition's folder.")
    types = dict.fromkeys(texts, pl.String) | dict.fromkeys(values, pl.Float32)
    options: dict[str, Any] = {"schema_overrides": types, "truncate_ragged_lines": True}
    read = functools.partial(pl.scan_csv, path, glob=False, **options)
    try:
        absent = sorted(set(types) - set(read().collect_schema()))
        if absent:
            raise DataError(f"{path} has no column {absent[0]} ({len(absent)} absent): wrong file?")
        frame = read().select(*types).collect()
    except pl.exceptions.NoDataError:
        raise DataError(f"{path} is empty. Download it again.") from None
    except pl.exceptions.ComputeError as error:  # some number is none
        log("warning", file=path, says=str(error).split("\n")[0][:300], taken_as="missing")
        frame = read(ignore_errors=True).select(*types).collect()
    if not len(frame):
        raise DataError(f"{path} has a header but no rows. Download it again.")
    if np.memmap(path, mode="r")[-1] == ord("\n"):
        return frame
    log("warning", last_line="cut off", taken_as="absent", file=path)
    return frame.head(-1)


def in_order(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Rows of a recording one after the other, counter rising, each once; as in the file if so."""
    ids, counter = frame["sequence_id"], frame["sequence_counter"].to_numpy()
    new = (ids != ids.shift()).fill_null(value=True).to_numpy()
    back = ~ids.is_first_distinct().to_numpy()  # an id comes again after another one
    wrong = np.where(new, back, np.diff(counter, prepend=-1.0) <= 0)
    if not wrong.any():
        return frame
    fixed = frame.unique(["sequence_id", "sequence_counter"], keep="first", maintain_order=True)
    first_row = pl.col("row").min().over("sequence_id")
    fixed = fixed.with_row_index("row").sort(first_row, "sequence_counter").drop("row")
    row, dropped = int(wrong.argmax()), len(frame) - len(fixed)
    why = "rows of a recording apart, out of order or twice"
    log("warning", file=path, order=why, line=row + 2, recording=ids[row], dropped=dropped)
    return fixed


def read_train(folder: Path) -> Recordings:
    """train.csv and train_demographics.csv of `folder`, with labels."""
    path, codes = folder / "train.csv", []
    frame = read_table(path, ("sequence_id", "subject", *CODES), ("sequence_counter", *SENSORS))
    frame = in_order(frame, path)
    person = read_table(folder / "train_demographics.csv", ("subject",), PERSON)
    rec = to_recordings(frame, person)
    strangers = sorted(set(rec.subject.tolist()) - set(person["subject"].to_list()))
    if strangers:
        log("warning", no_demographics=",".join(strangers[:5]), of=len(strangers))
    told = frame.select("sequence_id", "subject", "gesture", "orientation").unique()
    for ids in (person.unique()["subject"], told["sequence_id"]):
        if len(twice := ids.filter(ids.is_duplicated()).unique().sort()):
            log("warning", contradicts_itself=twice[0], of=len(twice), taken="one of its rows")
    for column, names in CODES.items():
        code = frame[column].cast(pl.Enum(names), strict=False).to_physical()
        if code.null_count():
            odd = frame.filter(code.is_null()).row(0, named=True)
            what = f"{column} {odd[column]!r} of {odd['sequence_id']} is none of the {len(names)}"
            raise DataError(f"{path}: {what} known: {', '.join(names)}.")
        codes.append(code.to_numpy().astype(np.int64))
    gesture, orientation, behavior = (code[rec.start[:-1]] for code in codes[:3])
    labels = Labels.of(gesture, orientation, behavior, phase=codes[3].astype(np.uint8))
    return dataclasses.replace(rec, labels=labels)


def cached_recordings(folder: Path, cfg: Config) -> tuple[Recordings, str]:
    """Training recordings and their digest, from the cache if train.csv is still the same file."""
    files = (folder / "train.csv", folder / "train_demographics.csv")
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]
    form = 3  # raise it when reading changes, and caches are built again
    cache = cfg.checkpoints / "cache" / f"recordings-{digest(form, stats)}.npz"
    with contextlib.suppress(DataError, LookupError, TypeError):  # none yet, or damaged
        arrays, note = read_arrays(cache)
        labels = Labels(**{f.name: arrays.pop(f.name) for f in dataclasses.fields(Labels)})
        log("recordings", action="reuse", path=cache)
        return Recordings(**arrays, labels=labels), str(note["digest"])
    log("recordings", action="read", path=cache)
    rec = read_train(folder)
    for old in cache.parent.glob("recordings-*.npz"):
        old.unlink()
    arrays = dataclasses.asdict(rec)
    arrays |= arrays.pop("labels")
    data_digest = digest(*arrays.values())
    write_arrays(cache, arrays, {"digest": data_digest})
    return rec, data_digest


# %% [markdown]
# ## 5 Motion and wearer
#
# In: recordings. Out: what the wrist does: angular velocity, acceleration without gravity, the
# vertical. Pure functions of whole columns: no loop over recordings, and nothing is ever computed
# across the border of two, which `start` marks. Results are float64 (R, k), column after column in
# memory, so that every step works on contiguous numbers. Where a recording has no rotation, what
# needs one stays NaN: an invented identity would pose as measured. The hot paths are plain
# formulas; scipy fills gaps.
#
# Left-handers are mirrored and devices worn upside down, turned by 180° about z, are turned back,
# by exact maps: signs change and sensors swap, no number is rounded. A small antisymmetric model
# tells who wears it so: its evidence for a recording is exactly minus that for the turned twin, so
# it needs no example of one, of which there are few. It adds up over a wearer's recordings.

# %%
SAMPLE_PERIOD = 0.1  # s; not published, about 10 Hz fits; nothing but scale depends on it
GRAVITY = 9.81  # m/s²
GESTURE_ROWS = 31  # the gesture is at the end of a recording and about 31 rows long
MEDIAN_ROWS = 15  # window of the median that stands in for gravity where there is no rotation
N_ODD = 30  # figures that tell how the device is worn


def gather_rows(start: I64, order: I64) -> tuple[I64, I64]:
    """Rows of the recordings in `order`, end to end, and where each then begins."""
    n = np.diff(start)[order]
    begin = np.r_[0, np.cumsum(n)]
    return np.repeat(start[order] - begin[:-1], n) + np.arange(begin[-1]), begin


def gesture_begin(start: I64) -> I64:
    """First row of each recording's gesture, which is its end. (N + 1) → (N)"""
    return np.maximum(start[:-1], start[1:] - GESTURE_ROWS)


def repair_rotation(rot: npt.NDArray[Any], start: I64) -> F64:
    """Unit quaternions with w ≥ 0. A row counts as missing if a component is, or if all are zero:
    between known ones of its recording it is interpolated, at the ends they are held, and NaN
    remains where a recording has no rotation. (R, 4) → (R, 4)"""
    q = np.ascontiguousarray(rot.T, np.float64).T
    norm = np.linalg.norm(q, axis=1)
    known = norm > 0.1
    q = q / np.where(known, norm, np.nan)[:, None]
    if not known.all():
        row, n = np.arange(len(q)), np.diff(start)
        first = np.repeat(np.minimum.reduceat(np.where(known, row, len(q)), start[:-1]), n)
        last = np.repeat(np.maximum.reduceat(np.where(known, row, -1), start[:-1]), n)
        q = q.T[:, np.where(first <= last, np.clip(row, first, last), row)].T
        between = np.flatnonzero(~known & (first < row) & (row < last))
        if between.size:
            turns = transform.Rotation.from_quat(q[known], scalar_first=True)
            filled = transform.Slerp(np.flatnonzero(known), turns)(between)
            q[between] = filled.as_quat(scalar_first=True)
    return q * np.where(q[:, :1] < 0, -1.0, 1.0)


def world_axes(rot: F64) -> tuple[F64, F64, F64]:
    """North, west and up in the device frame, the rows of the matrix: they have no jumps (Zhou et
    al. 2019), and turning the wristband acts on all of them alike. (R, 4) → 3 × (R, 3)"""
    w, x, y, z = rot.T
    return (
        np.array([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]).T,
        np.array([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]).T,
        np.array([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]).T,
    )


def turn_between(p: F64, q: F64) -> F64:
    """Rotation vector of the shorter turn from p to q, device axes. (R, 4) twice → (R, 3) rad"""
    (a, b, c, d), (w, x, y, z) = p.T, q.T  # p⁻¹ · q
    cosine = (p * q).sum(axis=1)
    i, j = a * x - b * w - c * z + d * y, a * y + b * z - c * w - d * x
    v = np.array([i, j, a * z - b * y + c * x - d * w]).T
    sine = np.linalg.norm(v, axis=1)
    angle = 2 * np.arctan2(sine, np.abs(cosine)) * np.where(cosine < 0, -1.0, 1.0)
    return v * (angle / np.where(sine > 0, sine, 1))[:, None]


def as_rate(step: F64, here: F64, start: I64) -> F64:
    """Change since the row before, per second; a recording's first row gets 0, or NaN where it is
    missing. (R - 1, k), what changed (R, k or 1) → (R, k)"""
    first, rate = start[:-1], np.zeros((step.shape[1], len(here))).T
    rate[1:] = step / SAMPLE_PERIOD
    rate[first] = np.where(np.isnan(here[first]), np.nan, 0.0)
    return rate


def sorted_quantiles(ordered: F64, count: npt.NDArray[Any], q: Sequence[float]) -> F64:
    """Linear interpolation between the `count` values at the front. (C, N, T) → (Q, C, N)"""
    place = np.multiply.outer(np.maximum(count - 1, 0), q)  # (C, N, Q)
    low = place.astype(np.int64)
    high = np.minimum(low + 1, np.maximum(count - 1, 0).astype(np.int64)[..., None])
    below, above = (np.take_along_axis(ordered, i, axis=2) for i in (low, high))
    return np.moveaxis(below + (above - below) * (place - low), -1, 0)


def median_direction(acc: npt.NDArray[Any], start: I64) -> F64:
    """Where the median of 15 rows points, which ignores short bursts: the vertical, guessed. The
    window shrinks at the ends. (R, 3) → (R, 3) unit"""
    first, last = (np.repeat(edge, np.diff(start))[:, None] for edge in (start[:-1], start[1:]))
    window = np.arange(len(acc))[:, None] + np.arange(MEDIAN_ROWS) - MEDIAN_ROWS // 2  # (R, 15)
    values = acc.T[:, np.clip(window, 0, len(acc) - 1)]
    ordered = np.sort(np.where((window >= first) & (window < last), values, np.nan), axis=2)
    median = sorted_quantiles(ordered, (~np.isnan(ordered)).sum(axis=2), [0.5])[0].T
    size = np.linalg.norm(median, axis=1, keepdims=True)
    return median / np.where(size > 1e-6, size, np.nan)


def wrist_motion(rec: Recordings) -> dict[str, F64]:
    """Vectors in device axes (_x, _y, _z; _mag their size): acc as measured, lin without gravity,
    omega the angular velocity, jerk the change of acc, up the vertical, north and west. world_up is
    lin along the vertical, world_flat the size of the rest, world_ahead and world_aside the rest
    along and across the heading of the device's x axis during the gesture. swing is the turn since
    the first row, lean the angle between the vertical and that of the first row.

    Vectors (R, 3), the others (R), in SI units. up is exact with rotation, else guessed.
    """
    start, acc = rec.start, np.ascontiguousarray(rec.acc.T, np.float64).T
    rot, first = repair_rotation(rec.rot, start), start[:-1]
    north, west, up = world_axes(rot)
    without = np.flatnonzero(np.isnan(rot[first, 0]))  # recordings
    if without.size:
        rows, begin = gather_rows(start, without)
        up[rows] = median_direction(acc[rows], begin)
    lin = acc - GRAVITY * up
    omega = as_rate(turn_between(rot[:-1], rot[1:]), rot[:, :1], start)
    made = {"acc": acc, "lin": lin, "omega": omega, "jerk": as_rate(acc[1:] - acc[:-1], acc, start)}
    made |= {f"{name}_mag": np.linalg.norm(v, axis=1) for name, v in made.items()}
    vertical, along_north, along_west = ((lin * axis).sum(axis=1) for axis in (up, north, west))
    flat = np.linalg.norm(lin - vertical[:, None] * up, axis=1)
    made |= {"world_up": vertical, "world_flat": flat}
    gestures = np.stack([gesture_begin(start), start[1:]], axis=1).ravel()
    aim = np.array([np.r_[north[:, 0], 0], np.r_[west[:, 0], 0]])  # (2, R + 1)
    aim = np.add.reduceat(aim, gestures, axis=1)[:, ::2]  # (2, N)
    c, s = np.repeat(aim / np.maximum(np.hypot(*aim), 1e-12), np.diff(start), axis=1)
    made["world_ahead"] = c * along_north + s * along_west
    made["world_aside"] = c * along_west - s * along_north
    rot_then, up_then = (v.T[:, np.repeat(first, np.diff(start))].T for v in (rot, up))
    made["swing"] = np.linalg.norm(turn_between(rot_then, rot), axis=1)
    made["lean"] = 2 * np.arctan2(*np.linalg.norm([up - up_then, up + up_then], axis=2))
    return made | {"up": up, "north": north, "west": west}


class DeviceMap(NamedTuple):
    """What a symmetry of the device does to everything that it measures; twice is the identity."""

    acc: tuple[int, ...]  # signs of the components
    rot: tuple[int, ...]  # signs of the quaternion's components, after …
    order: tuple[int, ...]  # … they were taken from these places
    sensors: tuple[int, ...]  # where each thermopile and ToF sensor comes from
    flips: tuple[tuple[int, ...], ...]  # axes of each ToF image: 0 its rows, 1 its columns


# R → M R M with M = diag(-1, 1, 1). Sensors 3 and 5 are mounted at a right angle to 1, 2 and 4.
# That a device turned by 180° turns every image by 180° means that 3 and 5 are mounted the same way
# round; then the mirror flips their rows. The other variant under discussion flips all columns.
MIRROR = DeviceMap(
    (-1, 1, 1), (1, 1, -1, -1), (0, 1, 2, 3), (0, 1, 4, 3, 2), ((1,), (1,), (0,), (1,), (0,))
)
# R → R · Rz(180°); sensors 2 and 4, and 3 and 5, change places.
HALF_TURN = DeviceMap((-1, -1, 1), (-1, 1, -1, 1), (3, 2, 1, 0), (0, 3, 4, 1, 2), 5 * ((0, 1),))


def apply_map(rec: Recordings, mask: Bool, change: DeviceMap) -> Recordings:
    """The recordings in `mask` (N) as `change` makes them, the others as they are; all copied."""
    rows = np.repeat(mask, np.diff(rec.start))
    acc, rot, thm, tof = rec.acc.copy(), rec.rot.copy(), rec.thm.copy(), rec.tof.copy()
    acc[rows] *= np.array(change.acc, np.float32)
    turned = rec.rot[rows][:, change.order] * np.array(change.rot, np.float32)
    rot[rows] = np.where(turned[:, :1] < 0, -turned, turned)  # w ≥ 0, as in the files
    thm[rows] = rec.thm[rows][:, change.sensors]
    for i, (sensor, axes) in enumerate(zip(change.sensors, change.flips, strict=True)):
        tof[rows, i] = np.flip(rec.tof[rows, sensor], tuple(axis + 1 for axis in axes))
    return dataclasses.replace(rec, acc=acc, rot=rot, thm=thm, tof=tof)


def canonical(rec: Recordings, upside_down: Bool) -> Recordings:
    """As if every wearer were right-handed and wore the device the right way up. To be applied
    once: demographics stay as they are. Arrays are shared where nothing changes."""
    left = rec.person[:, PERSON.index("handedness")] == 0
    for mask, change in ((left, MIRROR), (upside_down, HALF_TURN)):
        if np.any(mask):
            rec = apply_map(rec, mask, change)
    return rec


def odd_features(rec: Recordings) -> F64:
    """Figures that HALF_TURN negates. Of the beginning, the gesture and the whole: means of acc_x
    and acc_y, alone and times even ones; what sensors 2 and 3 see more than 4 and 5, with which
    they change places. (N, 30)"""
    near = (rec.tof <= FARTHEST).mean(axis=(2, 3), dtype=np.float64)  # (R, 5)
    near[(rec.tof == MISSING).all(axis=(2, 3))] = np.nan
    pairs = np.c_[near, rec.thm]
    sides = np.nan_to_num(pairs[:, [1, 2, 6, 7]] - pairs[:, [3, 4, 8, 9]])  # one missing: 0
    total = np.c_[np.nan_to_num(rec.acc) / GRAVITY, sides].cumsum(axis=0)
    total = np.concatenate([np.zeros((1, 7)), total])
    begin, end = rec.start[:-1], rec.start[1:]
    opening, gesture = np.minimum(begin + 10, end), gesture_begin(rec.start)
    parts = []
    for first, last in ((begin, opening), (gesture, end), (begin, end)):
        x, y, z, *side = ((total[last] - total[first]) / (last - first)[:, None]).T
        parts += [x, y, x * z, y * z, x * y * y, y * x * x, *side]
    return np.stack(parts, axis=1)


def fit_wearer(odd: F64) -> dict[str, Any]:
    """A logistic model without intercept that tells `odd` (n, 30) from its negative."""
    scale = np.sqrt((odd**2).mean(axis=0)) + 1e-6
    twins = np.concatenate([odd, -odd]) / scale
    model = linear_model.LogisticRegression(C=0.1, fit_intercept=False, max_iter=1000)
    coefficients = model.fit(twins, np.repeat([1, 0], len(odd))).coef_[0] / scale
    return {"coefficients": [float(f"{c:.8g}") for c in coefficients]}


def find_upside_down(rec: Recordings, fold: I64, cfg: Config) -> tuple[Bool, dict[str, Any] | None]:
    """Which training recordings to turn back (N), and the model that tells for new wearers. Each
    wearer is judged by a model of the other folds, in two rounds: the second learns from data in
    which the first one's finds are turned back."""
    names, who = np.unique(rec.subject, return_inverse=True)
    upside_down = np.zeros(len(rec), bool)
    if not cfg.upside_down or len(names) < 8 or len(rec) < 20 * len(names):
        log("wearer", detector="off", subjects=len(names), recordings=len(rec))
        return upside_down, None
    odd = odd_features(canonical(rec, upside_down))
    for _ in range(2):
        signed = np.where(upside_down[:, None], -odd, odd)
        logit = np.empty(len(rec))
        for k in np.unique(fold):
            logit[fold == k] = odd[fold == k] @ fit_wearer(signed[fold != k])["coefficients"]
        share = (1 + len(set(who[upside_down]))) / (2 + len(names))
        prior = float(np.log((1 - share) / share))
        upside_down = (prior + np.bincount(who, logit) < 0)[who]
    found = ",".join(np.unique(rec.subject[upside_down])) or "none"
    log("wearer", agreeing_recordings=float(((logit > 0) != upside_down).mean()), upside_down=found)
    return upside_down, fit_wearer(np.where(upside_down[:, None], -odd, odd)) | {"prior": prior}


# %% [markdown]
# ## 6 Features and frames
#
# In: canonical recordings. Out: one row of numbers per recording for trees, and channels of every
# row for networks. A family is one function and one line of FEATURES: it receives a Chunk, which
# makes each shared intermediate once, and returns its columns (F, N). Recordings are cut into
# chunks of similar length that fit the processor's cache and run side by side; no result depends on
# the cutting. Statistics are population statistics over the rows that are there, in float64; a
# statistic of nothing, or a shape of something constant, is NaN. A column needs the sensors that
# its name mentions: so a table can lose THM or ToF afterwards, as if they had never been there.

# %%
CHUNK_ROWS = 24_000  # measured: 6,000 take a fifth longer, two threads then wait for one lock
IMAGE_ROWS = 1_000  # ToF rows at a time, as much as the processor's cache holds
FEATURE_THREADS = 2  # they help because numpy lets go of Python's lock
Columns = dict[str, str]  # name → unit


def vector_names(stem: str) -> tuple[str, ...]:
    """Names of the three components of a vector."""
    return tuple(f"{stem}_{axis}" for axis in "xyz")


MOTION_SIGNALS = {
    **dict.fromkeys((*vector_names("acc"), "acc_mag", *vector_names("lin"), "lin_mag"), "m/s²"),
    **dict.fromkeys(("world_ahead", "world_aside", "world_up", "world_flat"), "m/s²"),
    **dict.fromkeys((*vector_names("omega"), "omega_mag"), "rad/s"),
    **dict.fromkeys(vector_names("up"), "1"),
    **{"jerk_mag": "m/s³", "swing": "rad", "lean": "rad"},
}
THM_SIGNALS = dict.fromkeys(THM, "°C")
TOF_SIGNALS = {f"tof_{i}_{n}": u for i in range(1, 6) for n, u in (("near", "1"), ("dist", "raw"))}
SIGNALS = MOTION_SIGNALS | THM_SIGNALS | TOF_SIGNALS
COMPASS = dict.fromkeys((*vector_names("north"), *vector_names("west")), "1")
REGIONS = ("nw", "ne", "sw", "se", "mid")  # quarters of a ToF image, and the 4×4 in its middle
PIXELS = {  # signals of one ToF sensor: name → unit; x to the right, y down, origin in the middle
    **{"near": "1", "dist": "raw", "min": "raw", "sd": "raw", "cx": "pixels", "cy": "pixels"},
    **{"sx": "raw/pixel", "sy": "raw/pixel", "flow": "raw"},  # up to here the networks' too
    **{"xx": "pixels²", "yy": "pixels²", "xy": "pixels²", "asym_x": "1", "asym_y": "1"},
    **{f"{region}_near": "1" for region in REGIONS},
    **{f"{region}_dist": "raw" for region in REGIONS},
}


def signal_index(*names: str) -> list[int]:
    """Rows of Chunk.x."""
    return [[*SIGNALS].index(name) for name in names]


def above_zero(n: npt.NDArray[Any]) -> F64:
    """NaN in place of what is not above zero: a divisor that lets nothing through."""
    return np.where(n > 0, n, np.nan)


def image_sums(image: U8) -> tuple[F64, F64, F64]:
    """Sums over the pixels in range of 1 and of the distance, each times 1, x, y, x², y², x·y (of
    doubled coordinates) and within the REGIONS, and of the squared distance: whole numbers, so
    exact. (n, 64) → (11, n), (11, n), (n)"""
    y, x = 2 * np.mgrid[:8, :8] - 7
    quarters = [(y < 0) & (x < 0), (y < 0) & (x > 0), (y > 0) & (x < 0), (y > 0) & (x > 0)]
    middle = (np.abs(x) < 4) & (np.abs(y) < 4)
    weights = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y, *quarters, middle], axis=2)
    weights = weights.reshape(64, 11).astype(np.float32)
    seen = image <= FARTHEST
    both = np.stack([seen, image * seen]).astype(np.float32)
    sums = np.empty((2, 11, len(image)))
    for i in range(0, len(image), 360):  # so few that the product starts no threads of its own
        sums[..., i : i + 360] = (both[:, i : i + 360] @ weights).transpose(0, 2, 1)
    return sums[0], sums[1], np.einsum("ij,ij->i", both[1], both[1]).astype(np.float64)


def image_signals(image: U8) -> dict[str, F64]:
    """The signals of PIXELS of images, behind those of one row more. (n + 5, 64) → name → (n)"""
    close = (FARTHEST + 1 - image) * (image <= FARTHEST)  # 0 where nothing is in range
    change = np.maximum(close[5:], close[:-5]) - np.minimum(close[5:], close[:-5])
    image = image[5:]
    (n, x, y, xx, yy, xy, *n_region), (d, dx, dy, _, _, _, *d_region), square = image_sums(image)
    valid = above_zero(64.0 - np.einsum("ij->i", (image == MISSING).view(np.uint8)))
    some = above_zero(n)
    var_x, var_y = n * xx - x * x, n * yy - y * y  # n² times the variance, exact
    nw, ne, sw, se, _ = n_region
    signals = {
        "near": n / valid,
        "dist": d / some,
        "min": image.min(axis=1) + 0 * some,
        "sd": np.sqrt(n * square - d * d) / some,
        "cx": x / (2 * some),
        "cy": y / (2 * some),
        "sx": 2 * (n * dx - d * x) / above_zero(var_x),
        "sy": 2 * (n * dy - d * y) / above_zero(var_y),
        "flow": change.sum(axis=1, dtype=np.uint16) / 64,  # of a pixel's closeness, on average
        "xx": var_x / (4 * some * some),
        "yy": var_y / (4 * some * some),
        "xy": (n * xy - x * y) / (4 * some * some),
        "asym_x": (ne + se - nw - sw) / valid,
        "asym_y": (sw + se - nw - ne) / valid,
    }
    for region, count, total in zip(REGIONS, n_region, d_region, strict=True):
        signals[f"{region}_near"] = count / 16 + 0 * valid  # NaN where the sensor is missing
        signals[f"{region}_dist"] = total / above_zero(count)
    return signals


def tof_signals(tof: U8, start: I64) -> F64:
    """What each ToF image shows, in the order of PIXELS: NaN where a sensor is missing, and in the
    spare column. Where it sees nothing, shares and flow are 0, the rest is NaN. A first row has no
    flow, nor has the row behind a missing one. (R, 5, 8, 8) → (5, S, R + 1)"""
    image = np.concatenate([tof[:1], tof]).reshape(-1, 64)
    out = np.full((5, len(PIXELS), len(tof) + 1), np.nan)
    for first in range(0, len(tof), IMAGE_ROWS):
        last = min(first + IMAGE_ROWS, len(tof))
        signals = image_signals(image[5 * first : 5 * last + 5])
        for i, name in enumerate(PIXELS):
            out[:, i, first:last] = signals[name].reshape(-1, 5).T
    flow, gone = out[:, tuple(PIXELS).index("flow")], np.isnan(out[:, 0])
    flow[:, start[:-1]] = np.nan
    flow[:, 1:][gone[:, :-1]] = np.nan
    flow[gone] = np.nan
    return out


class Parts:
    """Signals (C, R + 1), NaN: missing, and statistics (k, C, N) of k parts of each recording. Part
    j of recording i is the rows edges[i, j] … edges[i, j + 1] - 1; the parts fill their recording.
    Signals have a spare column at their end, which lets an edge be R."""

    def __init__(self, x: F64, edges: I64) -> None:
        self.x, self.edges, self.known = x, edges, ~np.isnan(x)
        self.count = self.sum(self.known.astype(np.float32))
        self.mean = self.sum(np.where(self.known, x, 0.0)) / above_zero(self.count)

    @functools.cached_property
    def centred(self) -> F64:
        """x less the mean of its part, 0 where missing. (C, R + 1)"""
        means = self.mean.transpose(1, 2, 0).reshape(len(self.x), -1)
        level = np.repeat(means, np.diff(self.edges).ravel(), axis=1)
        out = np.zeros_like(self.x)
        np.subtract(self.x[:, :-1], level, out=out[:, :-1], where=self.known[:, :-1])
        return out

    @functools.cached_property
    def variance(self) -> F64:
        """Exactly zero where it is but rounding noise about a constant."""
        variance = self.sum(self.centred**2) / above_zero(self.count)
        return np.where(variance <= 1e-14 * self.mean * self.mean, 0.0, variance)

    def sum(self, x: npt.NDArray[Any]) -> F64:
        """Sums over the parts, all in one pass. (C, R + 1) → (k, C, N); of no rows 0"""
        begin, end = self.edges[:, :-1], self.edges[:, 1:]
        total = np.add.reduceat(x, np.append(begin, end[-1, -1]), axis=1)[:, :-1]
        total = total.reshape(len(x), *begin.shape)
        return np.moveaxis(np.where(end > begin, total, 0.0), 2, 0)


class Chunk:
    """What the features of some recordings share; `halves`: before the gesture, and in it."""

    def __init__(self, rec: Recordings) -> None:
        self.rec, self.n_rows = rec, np.diff(rec.start)
        self.first, self.last = rec.start[:-1], rec.start[1:]  # `last` is the row behind each
        self.pixels = tof_signals(rec.tof, rec.start)  # (5, S, R + 1)
        self.signals = dict(zip(THM, rec.thm.T, strict=True))  # name → (R)
        for name, v in wrist_motion(rec).items():
            self.signals |= zip(vector_names(name), v.T, strict=True) if v.ndim == 2 else {name: v}
        for i, shown in enumerate(self.pixels[:, :, :-1], 1):
            self.signals |= {f"tof_{i}_{name}": x for name, x in zip(PIXELS, shown, strict=True)}
        self.x = np.stack([np.append(self.signals[name], np.nan) for name in SIGNALS])  # (C, R + 1)
        for k in signal_index(*vector_names("omega"), "omega_mag", "jerk_mag"):
            self.x[k, self.first] = np.nan  # no row before
        self.step = np.diff(self.x, axis=1, prepend=np.nan)  # from the row before, (C, R + 1)
        self.step[:, rec.start] = np.nan
        self.whole = Parts(self.x, np.c_[self.first, self.last])
        self.halves = Parts(self.x, np.c_[self.first, gesture_begin(rec.start), self.last])

    def inside(self, row: I64) -> I64:
        """Rows of each recording, (N, n); the spare column for those beyond its ends."""
        own = (row >= self.first[:, None]) & (row < self.last[:, None])
        return np.where(own, row, self.rec.start[-1])

    def three_from(self, row: I64) -> F64:
        """Mean of three rows from one of each recording on, as far as they exist. (N) → (C, N)"""
        x = self.x[:, self.inside(row[:, None] + np.arange(3))]
        known = ~np.isnan(x)
        return np.where(known, x, 0.0).sum(axis=2) / above_zero(known.sum(axis=2))

    def gesture(self, x: F64) -> F64:
        """The gesture's rows, NaN in front of shorter recordings. (C, R + 1) → (C, N, 31)"""
        return x[:, self.inside(self.last[:, None] + np.arange(-GESTURE_ROWS, 0))]


def name_columns(signals: Mapping[str, str], stats: Mapping[str, str] | Sequence[str]) -> Columns:
    """Every statistic of every signal; a statistic of no unit, or of "=", has its signal's own."""
    units = stats if isinstance(stats, Mapping) else dict.fromkeys(stats, "=")
    return {f"{s}_{k}": u.replace("=", own) for s, own in signals.items() for k, u in units.items()}


def by_signal(*stats: F64) -> F64:
    """Statistics (C, N) each → columns (C · len(stats), N), signal after signal."""
    return np.stack(stats, axis=1).reshape(-1, stats[0].shape[-1])


def levels(ch: Chunk) -> F64:
    """Mean, standard deviation, skewness and excess kurtosis over the recording."""
    n, var, c = above_zero(ch.whole.count[0]), ch.whole.variance[0], ch.whole.centred
    cube, some = c * c * c, above_zero(var)
    third = ch.whole.sum(cube)[0] / n
    fourth = ch.whole.sum(np.multiply(cube, c, out=cube))[0] / n
    skew, kurtosis = third / some**1.5, fourth / (some * some) - 3
    return by_signal(ch.whole.mean[0], np.sqrt(var), skew, kurtosis)


def quantiles(ch: Chunk) -> F64:
    """Smallest, 10, 25, 50, 75, 90 % quantile, largest value, and interquartile range."""
    n = len(MOTION_SIGNALS)
    row = ch.inside(ch.first[:, None] + np.arange(ch.n_rows.max()))
    ordered = np.sort(ch.x[:n][:, row], axis=2)  # (C, N, T), NaN last
    q = sorted_quantiles(ordered, ch.whole.count[0, :n], [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
    return by_signal(*q, q[4] - q[2])


def course(ch: Chunk) -> F64:
    """Mean of the first and last 3 rows and their difference, of each third, of the rows before
    the gesture and in it (the last 31 rows), with the standard deviations and the change."""
    thirds = Parts(ch.x, ch.first[:, None] + ch.n_rows[:, None] * np.arange(4) // 3)
    opening, end = ch.three_from(ch.first), ch.three_from(ch.last - 3)
    (before, gesture), sd = ch.halves.mean, np.sqrt(ch.halves.variance)
    halves = (before, sd[0], gesture, sd[1], gesture - before)
    return by_signal(opening, end, end - opening, *thirds.mean, *halves)


def step_sizes(ch: Chunk) -> F64:
    """Mean size and standard deviation of the step from row to row; mean size in the gesture."""
    step = Parts(ch.step, ch.whole.edges)
    size = ch.halves.sum(np.where(step.known, np.abs(ch.step), 0.0))
    n = ch.halves.sum(step.known.astype(np.float32))
    mean = size.sum(axis=0) / above_zero(n.sum(axis=0))
    return by_signal(mean, np.sqrt(step.variance[0]), size[1] / above_zero(n[1]))


def gesture_range(ch: Chunk) -> F64:
    """Smallest value, median and largest value in the gesture."""
    ordered = np.sort(ch.gesture(ch.x), axis=2)
    return by_signal(*sorted_quantiles(ordered, ch.halves.count[1], [0, 0.5, 1]))


def compass(ch: Chunk) -> F64:
    """Means of the world's north and west in device axes, before the gesture and in it: where the
    wearer faces. That is no accident of a session: chairs and beds stand where they stand."""
    x = np.stack([np.append(ch.signals[name], np.nan) for name in COMPASS])
    return by_signal(*Parts(x, ch.halves.edges).mean)


SPECTRA = dict.fromkeys((*vector_names("lin"), "lin"), "(m/s²)²") | {"omega": "(rad/s)²"}
SPECTRUM = {f"band{i}": "1" for i in range(1, 5)} | {"centroid": "cycles/row"}
SPECTRUM |= {"rolloff": "cycles/row", "peak": "cycles/row", "entropy": "1", "power": "log10 ="}
SIX = (*vector_names("lin"), *vector_names("omega"))


def welch(x: F64, first: I64, n_rows: I64, n_fft: int) -> F64:
    """Welch's power spectra of n_rows from `first` on: Hann windows of at most `n_fft` rows that
    overlap by half, each freed of its mean; a short recording is one window, filled up with zeros.
    scipy's takes one recording at a time. (C, R + 1), 2 × (N) → (C, N, n_fft // 2 + 1)"""
    window = np.minimum(n_rows, n_fft)
    hop = window - window // 2
    n_windows = (n_rows - window // 2) // hop
    owner = np.repeat(np.arange(len(n_rows)), n_windows)  # (W) recording of each window
    begins = np.cumsum(n_windows) - n_windows
    begin = first[owner] + (np.arange(len(owner)) - begins[owner]) * hop[owner]
    size, time = window[owner][:, None], np.arange(n_fft)
    inside = time < size  # (W, n_fft)
    part = x[:, np.where(inside, begin[:, None] + time, -1)] * inside  # (C, W, n_fft)
    mean = part.sum(axis=2, keepdims=True) / size
    hann = np.where(size > 1, 0.5 - 0.5 * np.cos(2 * np.pi * time / size), 1.0) * inside
    power = np.abs(np.fft.rfft((part - mean) * hann, axis=2)) ** 2
    power /= (hann**2).sum(axis=1)[:, None]
    power[..., 1:-1] *= 2  # both signs of the frequency
    return np.add.reduceat(power, begins, axis=1) / n_windows[:, None]


def spectra(ch: Chunk, last_rows: int | None = None, n_fft: int = 64) -> F64:
    """Welch spectrum over the recording (64 rows a window): share of power in four bands of 1/8
    cycle per row, centroid, 85 % roll-off, strongest frequency, entropy (0 … 1), and log power.

    The sum over three axes is the spectrum of the vector: it does not depend on how the device
    sits. The zero frequency is left out.
    """
    n_rows = np.minimum(ch.n_rows, last_rows or ch.n_rows)
    p = welch(ch.whole.centred[signal_index(*SIX)], ch.last - n_rows, n_rows, n_fft)[..., 1:]
    p = np.concatenate([p[:3], p[:3].sum(axis=0)[None], p[3:].sum(axis=0)[None]])  # (5, N, K)
    total = p.sum(axis=2)
    known = ch.whole.count[0, signal_index(*SIX[:3], "lin_x", "omega_x")] > 0
    total = np.where(known & (total > 1e-12), total, np.nan)
    share = p / total[..., None]
    f = np.arange(1, p.shape[2] + 1) / n_fft
    bands = share.reshape(*total.shape, 4, -1).sum(axis=3)
    rolloff = f[(share.cumsum(axis=2) >= 0.85).argmax(axis=2)] + 0 * total
    strongest = f[(p >= (1 - 1e-9) * p.max(axis=2, keepdims=True)).argmax(axis=2)] + 0 * total
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=2) / np.log(p.shape[2])
    stats = ((share * f).sum(axis=2), rolloff, strongest, entropy, np.log10(total))
    return by_signal(*np.moveaxis(bands, 2, 0), *stats)


def gesture_spectra(ch: Chunk) -> F64:
    """Spectrum of the last 32 rows: share of power in four bands of 1/8 cycle per row, centroid,
    85 % roll-off, strongest frequency, entropy (0 … 1), and log power."""
    return spectra(ch, last_rows=32, n_fft=32)


PAIRS = tuple(
    (f"{s}_{a}", f"{s}_{b}") for s in ("acc", "lin", "omega") for a, b in ("xy", "xz", "yz")
)
PAIRS += tuple((f"lin_{a}", f"omega_{a}") for a in ("x", "y", "z", "mag"))
CORRELATIONS = {f"{part}corr_{a}_{b}": "1" for part in ("", "gesture_") for a, b in PAIRS}


def correlations(ch: Chunk) -> F64:
    """Pearson's correlation of two signals over the recording, and in the gesture."""
    a, b = (ch.x[signal_index(*names)] for names in zip(*PAIRS, strict=True))
    both = ~(np.isnan(a) | np.isnan(b))
    a, b = np.where(both, a, np.nan), np.where(both, b, np.nan)
    columns = []
    for edges in (ch.whole.edges, ch.halves.edges):
        p, q = Parts(a, edges), Parts(b, edges)
        covariance = p.sum(p.centred * q.centred) / above_zero(p.count)
        columns.append((covariance / above_zero(np.sqrt(p.variance * q.variance)))[-1])
    return np.concatenate(columns)


ECHO_SIGNALS = {"lin": SIX[:3], "omega": SIX[3:]} | {n: (n,) for n in ("world_up", "lin_mag")}
ECHO = {f"echo{lag}": "1" for lag in range(1, 9)} | {"echo_period": "rows", "echo_strength": "1"}


def echoes(ch: Chunk) -> F64:
    """Autocorrelation in the gesture at 1 … 8 rows, summed over the axes of a vector; the lag of
    2 … 12 rows at which it is largest, and how large it is there."""
    index = signal_index(*itertools.chain(*ECHO_SIGNALS.values()))
    x = np.nan_to_num(ch.gesture(ch.halves.centred[index]))  # (8, N, 31)
    products = [(x[..., lag:] * x[..., : x.shape[2] - lag]).sum(axis=2) for lag in range(13)]
    bounds = np.cumsum([0, *map(len, ECHO_SIGNALS.values())])[:-1]
    r = np.add.reduceat(np.stack(products), bounds, axis=1)  # (13, 4, N)
    variance = np.add.reduceat(ch.halves.variance[1, index], bounds, axis=0)
    r = np.where(variance > 0, r[1:] / above_zero(r[0]), np.nan)
    best = np.where(np.isnan(r[1:]), -2, r[1:]).argmax(axis=0)  # (4, N)
    strength = np.take_along_axis(r[1:], best[None], axis=0)[0]
    return by_signal(*r[:8], np.where(np.isnan(r[0]), np.nan, best + 2.0), strength)


EDGES = dict.fromkeys(ACC, (-4.0, -1.0, -0.25, 0.25, 1.0, 4.0))  # m/s²
EDGES |= {"omega_mag": (-2.0, -0.5, -0.1, 0.1, 0.5, 2.0)}  # rad/s


def histograms(ch: Chunk) -> F64:
    """Share of the steps from row to row in seven bins with fixed edges: -4, -1, -.25, .25, 1 and
    4 m/s², and half of that in rad/s but for .1 in place of .125."""
    step = ch.step[signal_index(*EDGES)]
    n = ch.whole.sum((~np.isnan(step)).astype(np.float32))[0]  # (4, N)
    below = [(step < edge[:, None]).astype(np.float32) for edge in np.array([*EDGES.values()]).T]
    shares = [ch.whole.sum(mark)[0] / above_zero(n) for mark in below]
    bounds = np.stack([np.zeros_like(n), *shares, np.ones_like(n)], axis=1)  # (4, 8, N)
    return np.diff(bounds, axis=1).reshape(-1, len(ch.n_rows))


def heat(ch: Chunk) -> F64:
    """Gesture less the first 3 rows; slope of a straight line in the gesture; share of the rows of
    the gesture in which this is the warmest sensor."""
    index, halves = signal_index(*THM), ch.halves
    x, known = ch.x[index], halves.known[index]
    row = np.r_[np.arange(x.shape[1] - 1) - np.repeat(ch.first, ch.n_rows), 0]
    time = Parts(np.where(known, row, np.nan), halves.edges).centred
    slope = halves.sum(time * halves.centred[index]) / above_zero(halves.sum(time * time))
    hottest = np.where(known, x, -np.inf).argmax(axis=0) == np.arange(len(x))[:, None]
    wins = halves.sum(np.where(np.any(known, axis=0), hottest, 0.0))[1]
    rise = halves.mean[1, index] - ch.three_from(ch.first)[index]
    return by_signal(rise, slope[1], wins / above_zero(wins.sum(axis=0)))


def tof_details(ch: Chunk) -> F64:
    """What else a ToF sensor sees: mean in the gesture, and its difference to the rows before.
    Of what is in range: smallest distance (min) and its spread (sd), centre (cx, cy), slopes of the
    surface (sx, sy), second moments (xx, yy, xy), right less left and bottom less top (asym); mean
    change of a pixel since the row before (flow); share in range and mean distance in the quarters
    (nw is top left) and in the middle (mid)."""
    columns = []
    for x in ch.pixels[:, 2:]:  # sensor by sensor, as much as the processor's cache holds
        before, gesture = Parts(x, ch.halves.edges).mean
        columns.append(by_signal(gesture, gesture - before))
    return np.concatenate(columns)


def body_measures(ch: Chunk) -> F64:
    """The wearer. Handedness is no column: left-handers were mirrored before."""
    child, age, sex, _, height, arm, forearm = ch.rec.person.T.astype(np.float64)
    ratios = arm / above_zero(height), forearm / above_zero(arm)
    return np.stack([child, age, sex, height, arm, forearm, *ratios])


def presence(ch: Chunk) -> F64:
    """Number of rows; share of the rows in which a sensor was read."""
    rot = np.add.reduceat(np.isfinite(ch.rec.rot).all(axis=1), ch.first, dtype=np.float64)
    far = ch.whole.count[0, signal_index(*THM, *(f"tof_{i}_near" for i in range(1, 6)))]
    return np.vstack([ch.n_rows, rot / ch.n_rows, far / ch.n_rows])


QUANTILES = ("min", "q10", "q25", "q50", "q75", "q90", "max", "iqr")
COURSE = ["first", "last", "delta", "third1", "third2", "third3", "before_mean", "before_sd"]
COURSE += ["gesture_mean", "gesture_sd", "change"]
DETAILS = {f"tof_{i}_{name}": PIXELS[name] for i in range(1, 6) for name in [*PIXELS][2:]}
BODY = {"adult_child": "0/1", "age": "years", "sex": "0/1", **dict.fromkeys(LENGTHS, "cm")}
BODY |= {"arm_to_height": "1", "forearm_to_arm": "1"}
PRESENCE = {"n_rows": "rows", "rot_present": "1"}
PRESENCE |= {f"{s}_{i}_present": "1" for s in ("thm", "tof") for i in range(1, 6)}
FEATURES: tuple[tuple[Callable[[Chunk], F64], Columns], ...] = (  # → (F, N), its F columns
    (levels, name_columns(SIGNALS, {"mean": "=", "sd": "=", "skew": "1", "kurtosis": "1"})),
    (quantiles, name_columns(MOTION_SIGNALS, QUANTILES)),
    (course, name_columns(SIGNALS, COURSE)),
    (step_sizes, name_columns(SIGNALS, ("step", "step_sd", "gesture_step"))),
    (gesture_range, name_columns(SIGNALS, ("gesture_min", "gesture_q50", "gesture_max"))),
    (compass, name_columns(COMPASS, ("before_mean", "gesture_mean"))),
    (spectra, name_columns(SPECTRA, SPECTRUM)),
    (gesture_spectra, name_columns(SPECTRA, {f"gesture_{k}": u for k, u in SPECTRUM.items()})),
    (correlations, CORRELATIONS),
    (echoes, name_columns(dict.fromkeys(ECHO_SIGNALS, "1"), ECHO)),
    (histograms, name_columns(dict.fromkeys(EDGES, "1"), [f"step_bin{i}" for i in range(1, 8)])),
    (heat, name_columns(THM_SIGNALS, {"rise": "°C", "slope": "°C/row", "hottest": "1"})),
    (tof_details, name_columns(DETAILS, ("gesture_mean", "change"))),
    (body_measures, BODY),
    (presence, PRESENCE),
)


def meaning(function: Callable[..., Any]) -> str:
    """The first paragraph of a docstring."""
    return " ".join((function.__doc__ or "").split("\n\n")[0].split())


def feature_help() -> list[tuple[str, str, str]]:
    """Name, unit and meaning of every column; the meaning is its family's docstring."""
    return [(name, u, meaning(make)) for make, columns in FEATURES for name, u in columns.items()]


def print_feature_help() -> None:
    """Every family of columns and what it says, then each column's name and unit."""
    print(f"signals: {meaning(wrist_motion)}")  # noqa: T201
    for make, columns in FEATURES:
        print(f"\n{make.__name__}: {meaning(make)}")  # noqa: T201
        print(*(f"  {name:<28} {unit}" for name, unit in columns.items()), sep="\n")  # noqa: T201


@dataclass(frozen=True, slots=True)
class FeatureTable:
    """Features of N recordings. A modality can be taken away afterwards."""

    names: tuple[str, ...]
    x: F32  # (N, F); NaN: missing

    def needs(self, sensor: str) -> Bool:
        """Which columns need thm or tof. → (F)"""
        return np.array([sensor in name for name in self.names])

    def of_mode(self, mode: str) -> FeatureTable:
        """The same table, without the columns that need ToF or THM in IMU mode."""
        if mode == "all":
            return self
        kept = np.flatnonzero(~(self.needs("thm") | self.needs("tof")))
        return FeatureTable(tuple(self.names[i] for i in kept), self.x[:, kept])

    def take(self, recordings: npt.NDArray[Any]) -> FeatureTable:
        """Some of the recordings, by number or mask, as copies."""
        return dataclasses.replace(self, x=self.x[recordings])

    def without(self, drop_thm: Bool, drop_tof: Bool) -> FeatureTable:
        """As if the recordings marked (N) had come without a sensor, to the last bit."""
        lost = drop_thm[:, None] & self.needs("thm") | drop_tof[:, None] & self.needs("tof")
        blank = [0.0 if name.endswith("_present") else np.nan for name in self.names]
        return dataclasses.replace(self, x=np.where(lost, np.array(blank, np.float32), self.x))


# Channels of a ToF sensor, and what they are where it sees nothing: 250 is one beyond the farthest.
TOF_CHANNELS = dict.fromkeys([*PIXELS][:9], 0.0) | {"dist": 250.0, "min": 250.0}
MOTION_CHANNELS = (*vector_names("lin"), "lin_mag", "world_up", "world_flat")
MOTION_CHANNELS += (*vector_names("omega"), "omega_mag", *vector_names("jerk"), "jerk_mag", "swing")
Groups = tuple[tuple[str, tuple[str, ...]], ...]  # name and channels of each
GROUPS: Groups = (
    ("acc", (*vector_names("acc"), "acc_mag")),
    ("rot", (*vector_names("up"), *vector_names("north"), *vector_names("west"))),
    ("motion", MOTION_CHANNELS),
    ("thm", THM),
    *((f"tof_{i}", tuple(f"tof_{i}_{name}" for name in TOF_CHANNELS)) for i in range(1, 6)),
)
CHANNELS = tuple(name for _, names in GROUPS for name in names)


def vector_triples(names: Sequence[str]) -> I64:
    """Columns of the vectors of the device frame, *_x, *_y, *_z. → (V, 3)"""
    stems = [name[:-2] for name in names if name.endswith("_x")]
    return np.array([[names.index(n) for n in vector_names(stem)] for stem in stems], np.int64)


@dataclass(frozen=True, slots=True)
class Frames:
    """What a network sees of every row of N recordings: named groups of channels. Every triple *_x,
    *_y, *_z is one vector of the device frame: turning the wristband turns all of them alike."""

    start: I64  # (N + 1)
    x: F32  # (R, C) channels, group after group; NaN: missing
    groups: Groups  # in the order of x
    tof: U8 | None = None  # (R, 5, 8, 8) the images themselves; None in IMU mode

    def __len__(self) -> int:
        return len(self.start) - 1

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for _, names in self.groups for name in names)

    def take(self, recordings: npt.NDArray[Any]) -> Frames:
        """Some of the recordings, by number or mask, as copies."""
        rows, start = gather_rows(self.start, np.arange(len(self))[recordings])
        tof = None if self.tof is None else self.tof[rows]
        return Frames(start, self.x[rows], self.groups, tof)

    def of_mode(self, mode: str) -> Frames:
        """The same frames, without ToF and THM, which come last, in IMU mode."""
        if mode == "all":
            return self
        kept = tuple(g for g in self.groups if not g[0].startswith(("thm", "tof")))
        width = sum(len(names) for _, names in kept)
        return Frames(self.start, np.ascontiguousarray(self.x[:, :width]), kept)


def row_channels(ch: Chunk) -> F32:
    """The channels of every row. → (R, C)"""
    signals = ch.signals.copy()
    for name in vector_names("up"):  # guessed: the whole group rot tells that rotation is missing
        signals[name] = signals[name] + 0 * signals["swing"]
    for i in range(1, 6):
        there = ~np.isnan(ch.signals[f"tof_{i}_near"])  # else the sensor is missing
        for channel, nothing in TOF_CHANNELS.items():
            x = signals[f"tof_{i}_{channel}"]
            signals[f"tof_{i}_{channel}"] = np.where(np.isnan(x) & there, nothing, x)
    return np.stack([signals[name].astype(np.float32) for name in CHANNELS], axis=1)


def extract_features(
    rec: Recordings, progress: Progress | None = None, *, table: bool = True, frames: bool = True
) -> tuple[FeatureTable, Frames]:
    """Features of every recording and channels of every row of recordings, which must be canonical.
    What they share is worked out once; what is not wanted stays empty."""
    names = tuple(name for _, columns in FEATURES for name in columns)
    assert len(set(names)) == len(names), "a name occurs twice"
    x = np.empty((table * len(rec), len(names)), np.float32)
    channels = np.empty((frames * len(rec.acc), len(CHANNELS)), np.float32)

    def fill(order: I64) -> None:
        rows, start = gather_rows(rec.start, order)
        arrays = (rec.acc[rows], rec.rot[rows], rec.thm[rows], rec.tof[rows])
        whose = (rec.sequence_id[order], rec.subject[order], rec.person[order])
        with np.errstate(invalid="ignore", over="ignore"):
            chunk = Chunk(Recordings(start, *arrays, *whose))
            if table:
                x[order] = np.concatenate([make(chunk) for make, _ in FEATURES]).T
            if frames:
                channels[rows] = row_channels(chunk)

    n_rows = np.diff(rec.start)
    order = np.argsort(n_rows, kind="stable")  # recordings of similar length make one chunk
    cuts = np.flatnonzero(np.diff(np.cumsum(n_rows[order]) // CHUNK_ROWS)) + 1
    parts = np.split(order, cuts)
    with ThreadPoolExecutor(FEATURE_THREADS) as pool:
        for part, _ in zip(parts, pool.map(fill, parts), strict=True):
            if progress:
                progress.step(len(part))
    return FeatureTable(names, x), Frames(rec.start, channels, GROUPS, rec.tof)


# %% [markdown]
# ## 7 Batches
#
# In: Frames and the settings of a network. Out: batches in numpy, the same for Torch and Keras, in
# training and in serving: the last rows, changed at random (training only), standardised. A sensor
# that is lost in training is NaN before, exactly what a recording without that sensor holds. Rows
# are aligned at the left; the mask says which exist.

# %%
STRETCH = 0.1  # a recording is played up to this much faster or slower
JITTER = 0.15  # rad, spread of the wristband's rotation about each axis
SHIFT, GAP = 6, 12  # rows at most that the end is cut by, and that go missing in the middle
CHANNEL_LOSS, MIXUP_ALPHA = 0.1, 0.4  # share of channels; parameter of the beta law
ALIKE = 4  # batches among which recordings are ordered by length
STRIDE = 8  # both networks halve time three times
PLACE_ROWS = 90.0  # unit of the rows still to come, the same whatever a network is padded to
MAX_DEVIATION = 10.0  # standard deviations; beyond them a channel says no more


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """What a network is made of; equal specs have equal graphs. Stored beside its weights."""

    groups: Groups  # as Frames.groups
    table: tuple[tuple[int, ...], ...]  # (L, 3) behavior, orientation, gesture of each label
    pad_len: int  # rows it sees, the last ones
    width: int  # channels of the first block
    images: bool  # does it see the ToF images themselves?

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> NetworkSpec:
        """From what `dataclasses.asdict` made of it, lists or tuples alike."""
        groups = tuple((str(name), tuple(map(str, names))) for name, names in stored["groups"])
        table = tuple(tuple(map(int, row)) for row in stored["table"])
        pad_len, width = int(stored["pad_len"]), int(stored["width"])
        if not (1 <= pad_len <= 10_000 and 8 <= width <= 1024):
            raise ValueError(f"no network has {pad_len} rows and {width} channels")
        return cls(groups, table, pad_len, width, bool(stored["images"]))


def network_spec(frames: Frames, table: I64, width: int, images: bool, cfg: Config) -> NetworkSpec:
    """The network that fits these frames, labels and settings."""
    longest = np.percentile(np.diff(frames.start), cfg.pad_len_percentile)
    pad_len = cfg.fixed_pad_len or int(np.ceil(longest))
    labels, images = tuple(map(tuple, table.tolist())), images and frames.tof is not None
    return NetworkSpec(frames.groups, labels, pad_len, width, images)


def label_parts(table: I64) -> F32:
    """Gesture, orientation and behavior of each label, one-hot side by side. → (L, K + 4 + 2)"""
    sizes = ((2, len(GESTURES)), (1, len(ORIENTATIONS)), (0, 2))
    return np.hstack([np.eye(n, dtype=np.float32)[table[:, k]] for k, n in sizes])


def standardisation(frames: Frames, index: npt.NDArray[Any]) -> tuple[F32, F32]:
    """Mean and sd of each channel over the rows of some recordings, by number or mask: a fold's
    training recordings. A channel that is always missing gets 0 and 1. → 2 × (C)"""
    x = frames.x[gather_rows(frames.start, np.arange(len(frames))[index])[0]]
    there = ~np.isnan(x)
    n = np.maximum(there.sum(axis=0), 1)
    mean = x.sum(axis=0, dtype=np.float64, where=there) / n
    sd = np.sqrt(np.square(x - mean).sum(axis=0, where=there) / n)
    return mean.astype(np.float32), np.where(sd > 1e-6, sd, 1.0).astype(np.float32)


def dropped_modalities(n: int, rng: np.random.Generator, share: float) -> tuple[Bool, Bool]:
    """Which of n recordings lose THM and which ToF: of a `share` a third one, the other, both."""
    loss = np.where(rng.random(n) < share, rng.integers(1, 4, n), 0)
    return (loss & 1) > 0, (loss & 2) > 0


@dataclass(frozen=True)
class Batch:
    """Input and targets of B recordings."""

    x: F32  # (B, T, D) standardised channels, presence of each group, place, mask
    images: U8 | None = None  # (B, T, 5, 8, 8)
    label: F32 | None = None  # (B, L) probabilities
    phase: F32 | None = None  # (B, T / 8) share of rows in which the gesture is performed

    def __len__(self) -> int:
        return len(self.x)

    def pieces(self, size: int) -> list[Batch]:
        """The same recordings, `size` at a time."""
        own = {name: part for name, part in vars(self).items() if part is not None}
        starts = range(0, len(self), size)
        return [Batch(**{k: v[i : i + size] for k, v in own.items()}) for i in starts]


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """Makes batches of some frames for networks of one spec."""

    frames: Frames
    spec: NetworkSpec
    mean: F32  # (C)
    sd: F32  # (C)
    labels: Labels | None = None

    def plain(self, index: I64) -> Batch:
        """Recordings as they are."""
        last = self.frames.start[index + 1] - 1
        length = np.minimum(last + 1 - self.frames.start[index], self.spec.pad_len)
        row = last[:, None] - self.rows_from_end(length)
        return Batch(self.standardised(self.frames.x[row], length), self.images(row))

    def epoch(
        self, index: I64, n_batches: int, rng: np.random.Generator, cfg: Config
    ) -> Iterator[Batch]:
        """Every recording once, shuffled and changed at random, in batches of nearly equal size. Of
        ALIKE batches at a time the short recordings come together: less padding."""
        drawn = np.array_split(rng.permutation(index), n_batches)
        n_rows = np.diff(self.frames.start)
        for some in (drawn[i : i + ALIKE] for i in range(0, n_batches, ALIKE)):
            ordered = sorted(np.concatenate(some), key=n_rows.__getitem__)
            for part in np.array_split(ordered, len(some)):
                yield self.augmented(part, rng, cfg)

    def augmented(self, index: I64, rng: np.random.Generator, cfg: Config) -> Batch:
        """Recordings changed at random, each change with its own probability."""
        n, start = len(index), self.frames.start
        first, last = start[index], start[index + 1] - 1
        shift = rng.integers(0, SHIFT + 1, n) * (rng.random(n) < cfg.shift_prob)
        last = last - np.minimum(shift, last - first)
        pace = 1 + rng.uniform(-STRETCH, STRETCH, n) * (rng.random(n) < cfg.stretch_prob)
        length = np.minimum(((last - first) / pace).astype(np.int64) + 1, self.spec.pad_len)
        back = np.rint(self.rows_from_end(length) * pace[:, None]).astype(np.int64)
        row = last[:, None] - back  # nearest rows: between two, a rhythm of two rows would be lost
        own = rng.beta(MIXUP_ALPHA, MIXUP_ALPHA, n)
        own = np.where(rng.random(n) < cfg.mixup_prob, np.maximum(own, 1 - own), 1)
        share, partner = own.astype(np.float32), rng.permutation(index)
        x = self.mixed(self.frames.x[row], back, partner, share)
        self.jitter(x, rng, cfg)
        lose_tof = self.lose(x, length, rng, cfg)
        images = self.images(row)
        if images is not None:
            images[lose_tof] = MISSING
        x = self.standardised(x, length)
        assert self.labels is not None
        both = self.labels.composite[np.stack([index, partner])]  # (2, B)
        own, other = np.eye(len(self.labels.table), dtype=np.float32)[both]
        label = other + share[:, None] * (own - other)
        steps = x[..., -1].reshape(n, -1, STRIDE)  # 1 where a row exists
        performed = (self.labels.phase[row].reshape(steps.shape) * steps).sum(axis=2)
        return Batch(x, images, label, performed / np.maximum(steps.sum(axis=2), 1))

    def rows_from_end(self, length: I64) -> I64:
        """How many rows before its last one each row lies; 0 in the padding. (B) → (B, T)"""
        longest = -(-int(length.max()) // STRIDE) * STRIDE  # so that it can be halved three times
        return np.maximum(length[:, None] - 1 - np.arange(longest), 0)

    def images(self, row: I64) -> U8 | None:
        """The ToF images of some rows, for a network that sees them. (B, T) → (B, T, 5, 8, 8)"""
        return self.frames.tof[row] if self.spec.images and self.frames.tof is not None else None

    def mixed(self, x: F32, back: I64, partner: I64, share: F32) -> F32:
        """Mixup: part of another recording's rows, aligned at the end; where it has none, or a
        sensor of either is missing, our own stay."""
        start, some = self.frames.start, np.flatnonzero(share < 1)
        row = start[partner[some] + 1, None] - 1 - back[some]
        other = self.frames.x[np.maximum(row, 0)]
        other[row < start[partner[some], None]] = np.nan
        mixture = other + share[some, None, None] * (x[some] - other)
        x[some] = np.where(np.isnan(mixture), x[some], mixture)
        return x

    def jitter(self, x: F32, rng: np.random.Generator, cfg: Config) -> None:
        """Turn every vector of a recording by one rotation, as a wristband that sits askew."""
        some = np.flatnonzero(rng.random(len(x)) < cfg.jitter_prob)
        angles = rng.normal(0, JITTER, (len(some), 3))
        if some.size:
            turn = transform.Rotation.from_rotvec(angles).as_matrix().astype(np.float32)
            place = np.ix_(some, np.arange(x.shape[1]), vector_triples(self.frames.names).ravel())
            vectors = x[place].reshape(len(some), -1, 3)
            x[place] = (vectors @ turn.transpose(0, 2, 1)).reshape(x[place].shape)

    def lose(self, x: F32, length: I64, rng: np.random.Generator, cfg: Config) -> Bool:
        """Make rows, channels and sensors missing. (B, T, C) → (B) whose ToF images go as well"""
        n, names = len(x), np.array(self.frames.names)
        lose_thm, lose_tof = dropped_modalities(n, rng, cfg.modality_dropout_prob)
        lost = np.outer(lose_thm, np.char.startswith(names, "thm_"))
        lost |= np.outer(lose_tof, np.char.startswith(names, "tof_"))
        unlucky = (rng.random(n) < cfg.channel_mask_prob)[:, None]
        lost |= unlucky & (rng.random(lost.shape) < CHANNEL_LOSS)
        since = np.arange(x.shape[1]) - rng.integers(0, length)[:, None]
        width = rng.integers(1, GAP + 1, n) * (rng.random(n) < cfg.time_mask_prob)
        hole = (since >= 0) & (since < width[:, None])
        x[hole[:, :, None] | lost[:, None]] = np.nan
        return lose_tof

    def standardised(self, x: F32, length: I64) -> F32:
        """What a network is given: channels, the share of each group that is there, how many rows
        are still to come, as the gesture is at the end, and the mask; all zero in the padding.
        (B, T, C) raw, NaN: missing → (B, T, D)"""
        sizes = np.array([len(names) for _, names in self.spec.groups])
        there = ~np.isnan(x)
        z = np.clip((x - self.mean) / self.sd, -MAX_DEVIATION, MAX_DEVIATION)
        counts = np.add.reduceat(there, np.cumsum(sizes) - sizes, axis=2, dtype=np.float32)
        to_come = length[:, None] - 1 - np.arange(x.shape[1])
        ends = np.stack([to_come / PLACE_ROWS, np.ones_like(to_come)], axis=2)
        parts = (np.where(there, z, 0), counts / sizes, ends)
        out = np.concatenate(parts, axis=2, dtype=np.float32)
        out[to_come < 0] = 0
        return out


def prefetched(batches: Iterator[Batch], depth: int = 2) -> Iterator[Batch]:
    """The same batches, made by a thread while a card works on those before."""
    with ThreadPoolExecutor(1) as pool:
        coming = collections.deque(pool.submit(next, batches, None) for _ in range(depth))
        while (batch := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, batches, None))
            yield batch


# %% [markdown]
# ## 8 LightGBM
#
# In: a FeatureTable. Out: boosters as LightGBM's own text. The main booster tells the 18 gestures;
# two small ones tell orientation and initial behavior, so that this member too answers in composite
# labels. Early stopping watches the fold's own validation rows, which flatters the out-of-fold
# score a little; LGBM_ES_ROUNDS=0 trains all rounds instead.


# %%
@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One model to fit: a member in a mode, with a seed, on all folds but one."""

    member: str
    mode: str
    seed: int  # 0 … TORCH_SEEDS - 1
    fold: int
    train: I64  # recordings to learn from
    valid: I64  # recordings to be scored on
    folder: Path  # where the finished model goes: …/torch_models/all
    scratch: Path  # where resumable state goes: CKPT_BASE_DIR/torch/all
    logs: Path  # OUTPUT_PATH/logs

    def __post_init__(self) -> None:
        assert not np.intersect1d(self.train, self.valid).size, "train and valid overlap"

    @property
    def stem(self) -> str:
        """Name of its files without suffix: fold00, fold00_seed1, …"""
        return f"fold{self.fold:02d}" + (f"_seed{self.seed}" if self.seed else "")

    @property
    def name(self) -> str:
        return f"{self.member}/{self.mode}/{self.stem}"

    @property
    def note(self) -> Path:
        """Written last: without it the model's files do not count."""
        return self.folder / f"{self.stem}.json"

    @property
    def checkpoint(self) -> Path:
        """A network's training in progress."""
        return self.scratch / f"{self.stem}.npz"

    def rng(self, cfg: Config, *path: str | int) -> np.random.Generator:
        return rng_for(cfg, self.member, self.mode, self.seed, self.fold, *path)


AUX_TARGETS = {"orientation": len(ORIENTATIONS), "behavior": len(BEHAVIORS)}  # two small boosters
AUX_ROUNDS, AUX_RATE = 60, 0.1
MANY_ROWS = 3000  # with fewer, LightGBM's threads only wait for each other: one takes a job then
TINY = 1e-9  # a probability below it says no more than it


def lgbm_params(cfg: Config, n_classes: int, n_rows: int, seed: int) -> dict[str, Any]:
    """Parameters of a booster. Many features say the same, so a tree is shown only some of them."""
    threads = max(1, joblib.cpu_count() // cfg.cmi_workers) if n_rows >= MANY_ROWS else 1
    task = {"objective": "multiclass", "metric": "multi_logloss", "num_class": n_classes}
    leaf, bag = min(10, 1 + n_rows // 20), 0.8 if n_rows >= 10 else 1.0
    tree = {"num_leaves": cfg.lgbm_leaves, "min_data_in_leaf": leaf, "bagging_freq": 1}
    part = {"feature_fraction": cfg.lgbm_feature_fraction, "bagging_fraction": bag}
    fast = {"extra_trees": cfg.lgbm_extra_trees, "deterministic": True, "force_col_wise": True}
    rest = {"learning_rate": cfg.lgbm_lr, "lambda_l2": 1.0, "max_bin": 63, "seed": seed}
    return task | tree | part | fast | rest | {"num_threads": threads, "verbosity": -1}


def fit_lgbm(job: Job, table: FeatureTable, labels: Labels, cfg: Config) -> dict[str, Any]:
    """Train the boosters of one fold and write them as text; its rounds and score."""
    columns = top_features(job, table, cfg)
    names = [table.names[i] for i in columns]
    share = cfg.modality_dropout_prob
    if job.mode == NO_ROTATION and share:  # no other models answer these recordings without ToF
        share = max(share, 0.5)
    drop_thm, drop_tof = dropped_modalities(len(job.train), job.rng(cfg, "dropout"), share)
    x = table.take(job.train).without(drop_thm, drop_tof).x[:, columns]
    seed, dataset = int(job.rng(cfg).integers(2**31)), lgb.Dataset(x, feature_name=names)
    for target, n_classes in AUX_TARGETS.items():
        params = lgbm_params(cfg, n_classes, len(x), seed) | {"learning_rate": AUX_RATE}
        dataset.set_label(getattr(labels, target)[job.train])  # the columns are binned once
        text = lgb.train(params, dataset, AUX_ROUNDS).model_to_string()
        write_whole(job.folder / f"{job.stem}_{target}.txt", text)
    dataset.set_label(labels.gesture[job.train])
    watched, truth = table.x[job.valid][:, columns], labels.gesture[job.valid]
    params = lgbm_params(cfg, len(GESTURES), len(x), seed)
    booster = boost_gestures(job, params, dataset, lgb.Dataset(watched, truth, dataset), cfg)
    rounds = booster.best_iteration if booster.best_iteration > 0 else booster.current_iteration()
    write_whole(job.folder / f"{job.stem}.txt", booster.model_to_string(num_iteration=rounds))
    if not cfg.lgbm_top_features:  # they are chosen by a model of all features
        kinds = {k: booster.feature_importance(k, iteration=rounds) for k in ("gain", "split")}
        gains = pl.DataFrame({"feature": names, **kinds})
        write_whole(job.folder / f"{job.stem}_importance.csv", gains.write_csv())
    best = booster.best_score["valid_0"]
    return {"rounds": rounds, "score": float(best["score"]), "log_loss": best["multi_logloss"]}


def boost_gestures(job: Job, params: dict[str, Any], train: Any, valid: Any, cfg: Config) -> Any:
    """The main booster, stopped when the validation rows no longer gain. Datasets → Booster"""
    progress = Progress("rounds", cfg.lgbm_rounds, 10**9, job=job.name)
    history: list[dict[str, float]] = []

    def competition_score(proba: F64, rows: Any) -> tuple[str, float, bool]:
        return "score", score(rows.get_label().astype(np.int64), proba.argmax(axis=1)), True

    def log_round(env: Any) -> None:
        values = {name: float(value) for _, name, value, *_ in env.evaluation_result_list}
        progress.step(1, lambda: values)
        if progress.done % cfg.log_every_steps == 0 or progress.done == progress.total:
            where = {"mode": job.mode, "fold": job.fold, "round": progress.done}
            values["train_loss"] = env.model.eval_train()[0][2]
            append_jsonl(job.logs / "lgbm_progress.jsonl", cfg, **where, **values)
            history.append({"round": progress.done, "val_loss": values["multi_logloss"], **values})

    stop = lgb.early_stopping(cfg.lgbm_es_rounds, first_metric_only=True, verbose=False)  # 0: never
    watched = {"valid_sets": [valid], "feval": competition_score, "callbacks": [log_round, stop]}
    booster = lgb.train(params, train, cfg.lgbm_rounds, **watched)
    curve = pl.DataFrame(history, ["round", "train_loss", "val_loss", "score"])
    write_whole(job.folder / f"{job.stem}_train.csv", curve.write_csv())
    return booster


def top_features(job: Job, table: FeatureTable, cfg: Config) -> I64:
    """Columns to train on: all, or the K that gained most in this fold's earlier, full model."""
    n_best, path = cfg.lgbm_top_features, job.folder / f"{job.stem}_importance.csv"
    if not n_best:
        return np.arange(len(table.names))
    if not path.exists():
        raise ConfigError(f"There is no {path} yet. Run once with LGBM_TOP_FEATURES=0.")
    best = [k for k in read_csv(path).sort("gain", descending=True)["feature"] if k in table.names]
    return np.sort([table.names.index(name) for name in best[:n_best]])


def read_csv(path: Path) -> pl.DataFrame:
    """A small CSV file of our own, whatever characters its path holds."""
    return pl.read_csv(io.BytesIO(path.read_bytes()))


def summarise_lgbm(models: Mapping[str, Sequence[Path]], out: Path) -> None:
    """feature_importance.csv: gain and splits of each feature, mean and spread over the folds of
    each mode. The paths of `models` lack their suffix."""
    parts = []
    for mode, stem in ((mode, stem) for mode, stems in models.items() for stem in stems):
        if (path := stem.with_name(f"{stem.name}_importance.csv")).is_file():
            parts.append(read_csv(path).with_columns(mode=pl.lit(mode)))
    if parts:
        pairs = itertools.product(("gain", "split"), ("mean", "std"))
        spread = [getattr(pl, f)(kind).alias(f"{kind}_{f}") for kind, f in pairs]
        whole = pl.concat(parts, how="vertical_relaxed").group_by("mode", "feature").agg(spread)
        order = whole.sort("mode", "gain_mean", "feature", descending=[False, True, False])
        write_whole(out / "feature_importance.csv", order.write_csv())


def load_booster(path: Path, n_classes: int) -> Any:
    """A booster from its text, if that looks whole: LightGBM itself dies of a text that is none.
    One that was forged together with its digest is not withstood."""
    with refusing(path, f"is no whole LightGBM model of {n_classes} classes"):
        text = path.read_text(errors="replace")
        head = dict(re.findall(r"^(\w+)=(.*)$", text.partition("\n\n")[0], re.M))
        n_trees, whole = text.count("\nTree="), "\nend of trees" in text and text[:5] == "tree\n"
        announced = (head["num_class"], len(head["tree_sizes"].split()))
        if not whole or announced != (str(n_classes), n_trees or -1) or n_trees % n_classes:
            raise ValueError(f"{n_trees} trees, announced as {announced}")
        try:
            return lgb.Booster(model_str=text)
        except lgb.basic.LightGBMError as error:
            raise ValueError(str(error)) from None


LgbmFold = tuple[list[Any], tuple[str, ...], I64]  # boosters, their columns, the label table (L, 3)


def load_lgbm(folder: Path, stems: Sequence[str], table: I64, cfg: Config) -> list[LgbmFold]:
    """The boosters of each fold, of gesture, orientation and behavior, from their texts."""
    classes = {"": len(GESTURES)} | {f"_{target}": n for target, n in AUX_TARGETS.items()}
    folds = []
    for stem in stems:
        boosters = [load_booster(folder / f"{stem}{end}.txt", n) for end, n in classes.items()]
        with refusing(folder / f"{stem}.txt", "has other columns than its fold's other boosters"):
            (names,) = {tuple(booster.feature_name()) for booster in boosters}
        folds.append((boosters, names, table))
    return folds


def predict_lgbm(folds: Sequence[LgbmFold], table: FeatureTable) -> F32:
    """Composite probabilities of each fold. → (folds, N, L)

    P(label) = P(gesture) · P(orientation) P(behavior), the latter two within the gesture's labels.
    """
    column, answers = {name: i for i, name in enumerate(table.names)}, []
    for boosters, names, labels in folds:
        behavior, orientation, gesture = labels.T
        x = table.x[:, [column[name] for name in names]]
        proba = [booster.predict(x, num_threads=1, validate_features=False) for booster in boosters]
        aux = proba[1][:, orientation] * proba[2][:, behavior] + TINY  # (N, L)
        within = aux @ (gesture[:, None] == gesture).astype(np.float64)  # the gesture's labels
        joint = np.where(proba[0] < TINY, 0, proba[0])[:, gesture] * aux / within
        answers.append(joint / np.maximum(joint.sum(axis=1, keepdims=True), 1e-30))
    return np.stack(answers).astype(np.float32)


# %% [markdown]
# ## 9 Network training
#
# In: a job, Frames, Labels and a learner. Out: weights in the job's folder. One loop for both
# networks owns epochs, schedule, early stopping, best weights, resume and the retreat from lack of
# memory. After every epoch everything that the next one depends on is in one file; the random
# numbers of an epoch follow from its number, so there is none to be restored.
#
# A learner is what a framework must be able to do with a network and its optimiser: begin_epoch,
# whose noise follows from a seed; train_step; logits; weights, which answer and which save writes;
# state, all that training changes, and restore. It names its device, precision, out_of_memory.

# %%
NETWORK_FORM = 5  # raise it when files or checkpoints of networks change
Logits = Callable[[Batch], tuple[F32, F32]]  # of gesture (B, K) and label (B, L)


def composite_proba(gesture: F32, label: F32, table: I64) -> F32:
    """Probabilities of the labels from logits. (B, K), (B, L), (L, 3) → (B, L), rows sum to 1

    Two heads speak about the gesture, the gesture's own and the sum over the labels; the labels of
    a gesture share the mean of both as the label head divides it.
    """
    code, proba = table[:, 2], special.softmax(label, axis=1)
    summed = gesture_proba(proba, table)  # (B, K)
    mean = (special.softmax(gesture, axis=1) + summed) / 2
    joint = proba / np.maximum(summed, 1e-30)[:, code] * mean[:, code]
    return np.asarray(joint / joint.sum(axis=1, keepdims=True), np.float32)


def predict_network(logits: Logits, batches: Batches, index: I64) -> F32:
    """Composite probabilities of some recordings. → (n, L)"""
    table = np.array(batches.spec.table)
    parts = [index[i : i + 256] for i in range(0, len(index), 256)]
    return np.concatenate([composite_proba(*logits(batches.plain(part)), table) for part in parts])


def log_loss(proba: npt.NDArray[Any], truth: I64) -> float:
    """Mean negative log probability of the truth. (N, K), (N)"""
    right = proba[np.arange(len(truth)), truth].astype(np.float64)
    return float(-np.log(np.maximum(right, 1e-7)).mean())


class Training:
    """One network on its way. A checkpoint is `done`, how far it has come, what the learner holds,
    and the weights that will be written; one that does not fit is named and left behind."""

    def __init__(self, job: Job, learner: Any, batches: Batches, cfg: Config) -> None:
        assert batches.labels is not None
        self.job, self.learner, self.batches, self.cfg = job, learner, batches, cfg
        self.labels, frames, n = batches.labels, batches.frames, len(job.train)
        self.own = {k.removeprefix(f"{job.member}_"): v for k, v in dataclasses.asdict(cfg).items()}
        size = self.own["batch_size"] or min(max(n // 100, 16), 64)
        self.n_batches = -(-n // min(size, max(n // 16, 4), n))  # steps an epoch
        self.size = -(-n // self.n_batches)  # recordings a step
        known = {"frames": digest(frames.start, frames.x, list(frames.names))}
        known["labels"] = digest(self.labels.table, self.labels.composite)
        known["precision"] = learner.precision
        self.settings, arrays, note, why = read_checkpoint(job, cfg, **known)
        micro = -(-self.size // self.own.get("accum_steps", 1))  # recordings at once
        self.done: dict[str, Any] = {"history": [], "best_epoch": 0, "micro": micro}
        self.best: Arrays = {}  # weights after the best epoch; epochs are counted from 1
        if why:
            log("warning", job=job.name, checkpoint="not used", why=why)
        elif note:
            self.done = note["done"]
            self.best = {k[5:]: v for k, v in arrays.items() if k.startswith("best/")}
            learner.restore(arrays)
            log("resume", job=job.name, epoch=len(self.done["history"]))

    def rates(self) -> list[float]:
        """Of the next epoch's steps: over the whole training one cosine up, another down."""
        peak, epoch, n = self.own["lr"], len(self.done["history"]), self.n_batches
        step, last = epoch * n + np.arange(n), self.own["max_epochs"] * n - 1
        top = 0.3 * (last + 1) - 1
        part = np.where(step > top, (last - step) / max(last - top, 1), step / max(top, 1))
        low = np.where(step > top, peak / 25e4, peak / 25)
        return (low + (peak - low) * (1 - np.cos(np.pi * part)) / 2).tolist()

    def run_epoch(self, progress: Progress) -> None:
        """Every training recording once."""
        began, rates = time.monotonic(), self.rates()
        rng = self.job.rng(self.cfg, "epoch", len(self.done["history"]))
        self.learner.begin_epoch(int(rng.integers(2**31)))
        made = self.batches.epoch(self.job.train, self.n_batches, rng, self.cfg)
        coming, losses = made if self.learner.device == "cpu" else prefetched(made), []
        for batch, rate in zip(coming, rates, strict=True):
            losses.append(self.step_that_fits(batch, rate))
            progress.step(1, functools.partial(dict, loss=losses[-1], lr=rate))
        if not np.isfinite(loss := float(np.mean(losses))):
            raise FloatingPointError(
                f"{self.job.name}: the loss is {loss}. Lower {self.job.member.upper()}_LR="
                f"{self.own['lr']:g}, or turn mixed precision off (TORCH_AMP=0, KERAS_MP=0)."
            )
        self.finish_epoch(loss, rates[-1], time.monotonic() - began)

    def step_that_fits(self, batch: Batch, rate: float) -> float:
        """One step of the optimiser. Out of memory: again, in pieces of half the size."""
        try:
            return self.learner.train_step(batch.pieces(self.done["micro"]), rate)
        except self.learner.out_of_memory:
            if self.done["micro"] == 1:
                raise
        self.done["micro"] = -(-self.done["micro"] // 2)
        log("retreat", out_of_memory=True, at_once=self.done["micro"], a_step=len(batch))
        return self.step_that_fits(batch, rate)

    def finish_epoch(self, loss: float, rate: float, secs: float) -> None:
        """Score the validation rows, keep the weights that will be written (the latest, or with
        early stopping those of the lowest validation loss), save everything, and tell."""
        job, history, best = self.job, self.done["history"], self.done["best_epoch"]
        proba = predict_network(self.learner.logits, self.batches, job.valid)
        by_gesture, truth = gesture_proba(proba, self.labels.table), self.labels.gesture[job.valid]
        said = by_gesture.argmax(axis=1)
        binary, macro = f1_of_counts(count_classes(truth, said))[:, 0].tolist()
        epoch = {"train_loss": loss, "val_loss": log_loss(by_gesture, truth), "lr": rate}
        epoch |= {"val_acc": float((said == truth).mean()), "score": (binary + macro) / 2}
        history.append(epoch | {"bin_f1": binary, "macro_f1": macro})
        lowest = history[best - 1]["val_loss"] - self.own.get("es_min_delta", 0) if best else np.inf
        if not self.own["es_patience"] or epoch["val_loss"] < lowest:
            self.best, self.done["best_epoch"] = self.learner.weights(), len(history)
        arrays = self.learner.state() | {f"best/{k}": v for k, v in self.best.items()}
        write_arrays(job.checkpoint, arrays, {"done": self.done, "settings": self.settings})
        where = {"mode": job.mode, "seed": job.seed, "fold": job.fold, "epoch": len(history)}
        where |= {"batch": self.size, "at_once": self.done["micro"], "secs": round(secs, 3)}
        append_jsonl(job.logs / f"{job.member}_progress.jsonl", self.cfg, **where, **history[-1])
        table = pl.DataFrame(history).with_row_index("epoch", 1)
        write_whole(job.folder / f"{job.stem}_train.csv", table.write_csv())


def fit_network(job: Job, learner: Any, batches: Batches, cfg: Config) -> dict[str, Any]:
    """Train one network, or go on where its checkpoint stands, and write it to the job's folder."""
    training = Training(job, learner, batches, cfg)
    done, own, n_batches = training.done, training.own, training.n_batches
    history, patience, last = done["history"], own["es_patience"], own["max_epochs"]
    about = {"device": learner.device, "precision": learner.precision, "train": len(job.train)}
    log("network", job=job.name, **about, a_step=training.size, epoch=f"{len(history)}/{last}")
    counts = (last * n_batches, cfg.print_every_steps, len(history) * n_batches)
    progress = Progress("steps", *counts, job=job.name)
    while len(history) < last and not 0 < patience <= len(history) - done["best_epoch"]:
        training.run_epoch(progress)
    learner.save(job.folder / job.stem, training.best)
    scaling = {"mean": batches.mean.tolist(), "sd": batches.sd.tolist()}
    write_json(job.folder / f"{job.stem}_spec.json", dataclasses.asdict(batches.spec) | scaling)
    job.checkpoint.unlink(missing_ok=True)
    best = {"best_epoch": done["best_epoch"], **history[done["best_epoch"] - 1]}
    return {"epochs": len(history), "device": learner.device, **best}


def read_checkpoint(job: Job, cfg: Config, **known: str) -> tuple[dict[str, Any], Arrays, Any, str]:
    """What must be as before for a checkpoint to count, by name, of which the plan does not know
    all; arrays and note of the checkpoint, if there is one; and why it cannot be used."""
    settings = cfg.training_settings(job.member)
    settings |= {"training rows": digest(job.train), "validation rows": digest(job.valid)}
    settings |= {"form of the files": NETWORK_FORM, **known}
    if not (job.checkpoint.is_file() and cfg.resume and getattr(cfg, f"resume_{job.member}")):
        return settings, {}, {}, ""
    try:
        with refusing(job.checkpoint, "is no checkpoint"):
            arrays, note = read_arrays(job.checkpoint)
            return settings, arrays, note, difference(settings, note["settings"])
    except DataError as error:
        return settings, {}, {}, str(error)


def network_resumable(job: Job, cfg: Config) -> str:
    """For the plan: where a training stands that can be resumed, or why it cannot; or nothing."""
    _, _, note, why = read_checkpoint(job, cfg)
    epochs = getattr(cfg, f"{job.member}_max_epochs")
    at = f"resumable at epoch {len(note['done']['history'])} of {epochs}" if note else ""
    return f"not resumable, {why}" if why else at


def read_spec(path: Path, table: I64) -> tuple[NetworkSpec, F32, F32]:
    """Spec, mean and sd of a trained network."""
    with refusing(path, "describes no network"):
        stored = read_json(path)
        spec = NetworkSpec.read(stored)
        mean, sd = scaling = np.array([stored["mean"], stored["sd"]], np.float32)
        n_channels = sum(len(names) for _, names in spec.groups)
        if not (len(mean) == n_channels and np.isfinite(scaling).all() and (sd > 0).all()):
            raise ValueError(f"mean and sd do not fit its {n_channels} channels")
        if not np.array_equal(np.array(spec.table), table):
            raise ValueError(f"it was trained for {len(spec.table)} other labels")
    return spec, mean, sd


@dataclass(frozen=True, slots=True)
class NetworkFold:
    """One trained network, ready to answer."""

    spec: NetworkSpec
    mean: F32
    sd: F32
    logits: Logits


def predict_folds(folds: Sequence[NetworkFold], frames: Frames) -> F32:
    """Composite probabilities by each network. → (folds, N, L)"""
    if frames.groups != folds[0].spec.groups:
        raise ValueError("The networks were trained on other channels than these. Train again.")
    made = ((f.logits, Batches(frames, f.spec, f.mean, f.sd)) for f in folds)
    return np.stack([predict_network(*fold, np.arange(len(frames))) for fold in made])


# %% [markdown]
# ## 10 Torch
#
# In: Batches. Out: logits. A stem per sensor group → residual SE blocks, each halving time → BiLSTM
# → attention that the gesture phase guides → heads. Padding is zero after every layer and enters
# no statistic. All classes stand in one builder, so that importing this file loads no torch.

# %%
STEM_WIDTH = {"acc": 32, "rot": 32, "motion": 32, "thm": 16}  # ToF sensors: TOF_WIDTH each
TOF_WIDTH = IMAGE_WIDTH = 16
STEM_KERNEL, BLOCK_KERNEL = 5, 3
CLIP_NORM = 1.0
TORCH_STATE = ("net", "average", "optimizer", "scaler")  # what a TorchLearner changes


@functools.cache
def torch_classes() -> types.SimpleNamespace:  # noqa: C901 a builder that only holds classes
    """The layers and the network. Rows lie one behind the other, (B, T, C): norms, masks and sums
    then work on whole rows, and so does the library's convolution."""
    F = nn.functional

    class Conv(nn.Conv1d):
        """A convolution along the rows. (B, T, C) → (B, T, W)"""

        def __init__(self, n_in: int, width: int, kernel: int, groups: int = 1) -> None:
            super().__init__(n_in, width, kernel, padding="same", groups=groups, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            image, kernel = x.transpose(1, 2)[:, :, None], self.weight[:, :, None]  # of one line
            reach = (0, self.kernel_size[0] // 2)
            found = F.conv2d(image, kernel, padding=reach, groups=self.groups)
            return found[:, :, 0].transpose(1, 2)

    class MaskedNorm(nn.Module):
        """Batch norm that leaves padding out of its statistics and zero in its output."""

        momentum, eps = 0.1, 1e-5

        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))
            self.bias = nn.Parameter(torch.zeros(width))
            self.register_buffer("running_mean", torch.zeros(width))
            self.register_buffer("running_var", torch.ones(width))

        def forward(self, x: Tensor, there: Tensor) -> Tensor:
            """(B, T, C), numbers of the rows that exist, as in `rows_there` → (B, T, C)"""
            rows = x.flatten(0, 1)
            known = rows.index_select(0, there).float()  # whatever the precision around it
            learnt = (self.running_mean, self.running_var, self.weight, self.bias)
            many = self.training and len(known) > 1  # one row has no statistics of its own
            known = F.batch_norm(known, *learnt, many, self.momentum, self.eps).to(x.dtype)
            return torch.zeros_like(rows).index_copy(0, there, known).view(x.shape)

    class Block(nn.Module):
        """Two convolutions, squeeze and excitation, a shortcut; then time is halved."""

        def __init__(self, n_in: int, width: int) -> None:
            super().__init__()
            self.first = Conv(n_in, width, BLOCK_KERNEL)
            self.second = Conv(width, width, BLOCK_KERNEL)
            self.short = Conv(n_in, width, 1)
            self.norms = nn.ModuleList([MaskedNorm(width) for _ in range(3)])
            self.squeeze = nn.Linear(width, width // 8)
            self.excite = nn.Linear(width // 8, width)

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            """(B, T, C), (B, T, 1) → (B, T/2, W), (B, T/2, 1)"""
            there = rows_there(mask)
            h = F.silu(self.norms[0](self.first(x), there))
            h = self.norms[1](self.second(h), there)
            mean = h.sum(1) / mask.sum(1).clamp(min=1)  # over the rows that exist
            gain = torch.sigmoid(self.excite(F.silu(self.squeeze(mean))))
            h = F.silu(torch.addcmul(self.norms[2](self.short(x), there), h, gain[:, None]))
            h = h.masked_fill(mask == 0, torch.finfo(h.dtype).min)
            h, mask = F.max_pool1d(h.transpose(1, 2), 2).transpose(1, 2), mask[:, ::2]
            return h.masked_fill(mask == 0, 0.0), mask

    class Stem(nn.Module):
        """A convolution of its own for each sensor group, as one where neighbours have one shape,
        and a small 2-D network over each 8 × 8 image, shared by the five sensors."""

        def __init__(self, spec: NetworkSpec) -> None:
            super().__init__()
            names, channels = zip(*spec.groups, strict=True)
            number = np.arange(len(names))
            seen = [n for n in number if spec.images and names[n].startswith("tof_")]
            of_group = [*map(len, channels)]
            inputs = np.r_[np.repeat(number, of_group), number, np.repeat(seen, IMAGE_WIDTH)]
            inputs = inputs.astype(np.int64)  # group of each input
            self.order = np.argsort(inputs, kind="stable").tolist()
            widths = [STEM_WIDTH.get(name, TOF_WIDTH) for name in names]
            runs = itertools.groupby(zip(np.bincount(inputs).tolist(), widths, strict=True))
            shapes = [(len([*run]), *shape) for shape, run in runs]
            convs = [Conv(n * a, n * w, STEM_KERNEL, groups=n) for n, a, w in shapes]
            self.convs, self.norm = nn.ModuleList(convs), MaskedNorm(sum(widths))
            self.width, self.image = sum(widths), None
            if seen:
                first, second = nn.Conv2d(2, 8, 3, 2, 1), nn.Conv2d(8, IMAGE_WIDTH, 4)
                self.image = nn.Sequential(first, nn.SiLU(), second, nn.SiLU())

        def forward(self, x: Tensor, codes: Any, mask: Tensor) -> Tensor:
            """(B, T, inputs), (B, T, 5, 8, 8) bytes → (B, T, W)"""
            if self.image is not None:
                seen = (codes <= FARTHEST).float()
                near = (1 - codes.float() / FARTHEST) * seen  # 1 touching … 0 far away or unseen
                h = self.image(torch.stack([near, seen], 3).flatten(0, 2))  # (B·T·5, W, 1, 1)
                x = torch.cat([x, h.view(*codes.shape[:2], -1) * mask], 2)
            parts = x[..., self.order].split([conv.in_channels for conv in self.convs], 2)
            h = [conv(part) for conv, part in zip(self.convs, parts, strict=True)]
            return F.silu(self.norm(torch.cat(h, 2), rows_there(mask)))

    class Head(nn.Module):
        """Pools the steps and says what was done, in which position, starting how, and when."""

        def __init__(self, spec: NetworkSpec, dropout: float) -> None:
            super().__init__()
            w, self.dropout = spec.width, dropout
            self.phase = nn.Linear(2 * w, 1)
            self.rank = nn.Sequential(nn.Linear(2 * w, w), nn.Tanh(), nn.Linear(w, 1))
            self.guidance = nn.Parameter(torch.ones(()))  # the phase's say in the rank
            self.sizes = (len(GESTURES), len(spec.table), len(ORIENTATIONS), 2)
            self.out = nn.Linear(4 * w, sum(self.sizes))
            parts = torch.from_numpy(label_parts(np.array(spec.table)))  # (L, K + 4 + 2)
            self.register_buffer("parts", parts, persistent=False)

        def forward(self, h: Tensor, mask: Tensor, noise: Any) -> Any:
            """(B, T, W), (B, T) → logits: gesture, label, orientation, behavior; phase by step"""
            phase = self.phase(h)[..., 0]
            rank = self.rank(h)[..., 0] + self.guidance * phase
            lowest = torch.finfo(h.dtype).min
            share = rank.masked_fill(mask == 0, lowest).softmax(1)
            mean = (share[:, None] @ h)[:, 0]
            peak = h.masked_fill((mask == 0)[..., None], lowest).amax(1)
            pooled = drop(torch.cat([mean, peak], 1), self.dropout, noise, self.training)
            gesture, label, orientation, behavior = self.out(pooled).split(self.sizes, 1)
            own = torch.cat([gesture, orientation, behavior], 1)
            label = label + own @ self.parts.T  # a label's logit: its parts' and its own
            return gesture, label, orientation, behavior, phase

    class Network(nn.Module):
        """Rows as Batches gives them → logits of all heads."""

        def __init__(self, spec: NetworkSpec, dropout: float) -> None:
            super().__init__()
            w, self.dropout, self.stem = spec.width, dropout, Stem(spec)
            widths = (self.stem.width + 1, w, w + w // 2, 2 * w)
            self.blocks = nn.ModuleList(Block(a, b) for a, b in itertools.pairwise(widths))
            self.lstms = nn.ModuleList(nn.LSTM(2 * w, w, batch_first=True) for _ in range(2))
            self.head = Head(spec, dropout)

        def forward(self, x: Tensor, images: Any, noise: Any = None) -> Any:
            """(B, T, D), (B, T, 5, 8, 8) → (B, …) five times; STRIDE divides T"""
            place, mask = x[..., -2:-1], x[..., -1:]
            # the place as well: the gesture comes last
            h = torch.cat([self.stem(x[..., :-2], images, mask), place], 2)
            for block in self.blocks:
                h, mask = block(h, mask)
            with torch.autocast(h.device.type, enabled=False):  # the rest is small: float32
                h = drop(h.float(), self.dropout, noise, self.training)
                for layer in self.lstms:
                    layer.flatten_parameters()  # for the copies that DataParallel makes
                there, back = self.lstms
                order = turned_steps(mask[..., 0])
                turned = back(reordered(h, order))[0]
                h = torch.cat([there(h)[0], reordered(turned, order)], 2)
                return self.head(h, mask[..., 0], noise)

    return types.SimpleNamespace(Network=Network)


def rows_there(mask: Tensor) -> Tensor:
    """Numbers of the rows that exist, of all recordings end to end. (B, T, 1) → (R)"""
    return mask.flatten().nonzero()[:, 0]


def turned_steps(mask: Tensor) -> Tensor:
    """Numbers of all steps, end to end, with each recording's own in reverse order and the padding
    still behind them. (B, T) → (B · T)"""
    length, step = mask.sum(1, keepdim=True).long(), torch.arange(mask.shape[1], device=mask.device)
    own = torch.where(step < length, length - 1 - step, step)
    return (own + len(step) * torch.arange(len(mask), device=mask.device)[:, None]).flatten()


def reordered(h: Tensor, order: Tensor) -> Tensor:
    """(B, T, W), (B · T) → (B, T, W)"""
    return h.flatten(0, 1).index_select(0, order).view(h.shape)


def drop(x: Tensor, p: float, noise: Any, training: bool) -> Tensor:
    """Dropout that draws from a generator of its own, so that threads cannot disturb each other."""
    if noise is None or not training:
        return nn.functional.dropout(x, p, training)
    return x * torch.empty_like(x).bernoulli_(1 - p, generator=noise) / (1 - p)


@functools.cache
def working_cards() -> tuple[int, ...]:
    """Cards that do one operation: torch says yes to some for which it brings no kernels."""
    cards = []
    for i in range(torch.cuda.device_count()):
        try:
            torch.ones(8, device=f"cuda:{i}").sum().item()
            cards.append(i)
        except (RuntimeError, AssertionError) as error:
            log("warning", card=f"{i} is there and does not work", why=str(error).split("\n")[0],
                instead="the CPU; free it, choose GPU T4 x2, or another torch")  # fmt: skip
    return tuple(cards)


def device_for(job_number: int, cfg: Config) -> Any:
    """One job a card, in turn, or the CPU, whose number of threads is fixed: the last digits depend
    on it, and a small network that waits for a busy core to join in is slower than without it."""
    if cards := working_cards():
        number = 0 if cfg.torch_data_parallel else job_number  # several cards are led by the first
        return torch.device("cuda", cards[number % len(cards)])
    torch.set_num_threads(cfg.torch_threads)
    return torch.device("cpu")


SMALL_WORK = 3000  # recordings × epochs; a network is then done before a second process is up
WEIGHTS_LOCK = threading.Lock()  # initial weights come from torch's one global generator


def torch_side_by_side(job: Job, cfg: Config) -> int:
    """How many networks should train at once, each in a process: one a card, or one a core."""
    if cards := len(working_cards()):
        return 1 if cfg.torch_data_parallel else cards
    small = len(job.train) * cfg.torch_max_epochs < SMALL_WORK
    return 1 if small else max(1, min(joblib.cpu_count() // cfg.torch_threads, 8))


class TorchLearner:
    """A network, its averaged twin and its optimiser; see Learner."""

    def __init__(self, job: Job, spec: NetworkSpec, cfg: Config, half: Any = None) -> None:
        self.cfg = cfg
        device = device_for(job.seed * cfg.n_folds + job.fold, cfg)
        if half is None and cfg.torch_amp and device.type == "cuda":  # bfloat16 is from Ampere on
            ampere = torch.cuda.get_device_capability(device) >= (8, 0)
            half = torch.bfloat16 if ampere else torch.float16
        with WEIGHTS_LOCK, torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(job.rng(cfg, "weights").integers(2**31)))
            self.net = torch_classes().Network(spec, cfg.torch_dropout)
        self.net.to(device)
        several = cfg.torch_data_parallel and len(working_cards()) > 1
        self.forward = torch.nn.DataParallel(self.net) if several else self.net
        decayed = {"params": [p for p in self.net.parameters() if p.ndim > 1]}
        others = {"params": [p for p in self.net.parameters() if p.ndim <= 1], "weight_decay": 0.0}
        decay = {"weight_decay": cfg.torch_weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW([decayed, others], **decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)
        averaged = functools.partial(torch.optim.swa_utils.AveragedModel, use_buffers=True)
        self.average = averaged(self.net, multi_avg_fn=self.update_ema)
        self.answering = self.average.module if cfg.torch_ema else self.net
        halved = half not in (None, torch.float32)
        self.autocast = functools.partial(torch.autocast, device.type, half, enabled=halved)
        self.device, self.precision = str(device), str(half or "float32").removeprefix("torch.")
        self.out_of_memory = torch.OutOfMemoryError

    def update_ema(self, averaged: Any, current: Any, n_averaged: Tensor) -> None:
        """Move averaged weights a little towards the current ones, faster at the beginning."""
        n = int(n_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(self.cfg.torch_ema, (1 + n) / (10 + n)))

    def begin_epoch(self, seed: int) -> None:
        self.net.train()
        one_device = self.forward is self.net  # a generator lives on one card only
        self.noise = torch.Generator(self.device).manual_seed(seed) if one_device else None

    def train_step(self, pieces: Sequence[Batch], rate: float) -> float:
        """One step over the pieces of a batch, each by its share; the batch's loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)  # also what a step that lacked memory has left
        n, total = sum(map(len, pieces)), torch.zeros((), device=self.device)
        for piece in pieces:
            with self.autocast():
                outputs = self.forward(*to_tensors(piece, self.device), self.noise)
            loss = self.loss(outputs, piece) * (len(piece) / n)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.cfg.torch_ema:
            self.average.update_parameters(self.net)
        return float(total)

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Mean over all heads; targets of a label's parts are sums of the label's."""
        gesture, label, orientation, behavior, phase = outputs
        arrays = (batch.label, batch.phase, batch.x[:, ::STRIDE, -1])  # the last: steps that exist
        target, wanted, mask = (torch.from_numpy(array).to(self.device) for array in arrays)
        sizes = (gesture.shape[1], orientation.shape[1], behavior.shape[1])
        parts = (target @ self.net.head.parts).split(sizes, 1)
        total = self.soft_loss(label, target) + self.soft_loss(gesture, parts[0])
        aux = self.soft_loss(orientation, parts[1]) + self.soft_loss(behavior, parts[2])
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        by_step = entropy(phase, wanted, reduction="none") * mask
        return total + 0.2 * aux + 0.2 * (by_step.sum(1) / mask.sum(1)).mean()

    def soft_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy against smoothed probabilities; or focal, which cares less for the easy."""
        smooth = self.cfg.torch_label_smoothing
        target = target * (1 - smooth) + smooth / logits.shape[1]
        log_p = logits.float().log_softmax(1)
        weight = (1 - log_p.exp()).square() if self.cfg.use_focal_loss else 1.0
        return -(target * weight * log_p).sum(1).mean()

    def logits(self, batch: Batch) -> tuple[F32, F32]:
        return torch_logits(self.answering.eval(), self.device, batch)

    def weights(self) -> Arrays:
        held = self.answering.state_dict()
        return {name: value.cpu().numpy().copy() for name, value in held.items()}

    def state(self) -> Arrays:
        """As torch's own file, which knows how the parts of an optimiser nest."""
        content = io.BytesIO()
        torch.save({name: getattr(self, name).state_dict() for name in TORCH_STATE}, content)
        return {"torch": np.frombuffer(content.getbuffer(), np.uint8)}

    def restore(self, arrays: Arrays) -> None:
        content = io.BytesIO(arrays["torch"].tobytes())
        state = torch.load(content, map_location="cpu", weights_only=True)
        for name in TORCH_STATE:
            getattr(self, name).load_state_dict(state[name])

    def save(self, path: Path, weights: Arrays) -> None:
        content = io.BytesIO()
        torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, content)
        write_whole(path.with_name(f"{path.name}.pt"), content.getvalue())


def to_tensors(batch: Batch, device: Any) -> tuple[Any, Any]:
    """Rows and images on the device."""
    images = None if batch.images is None else torch.from_numpy(batch.images).to(device)
    return torch.from_numpy(batch.x).to(device), images


def torch_logits(net: Any, device: Any, batch: Batch) -> tuple[F32, F32]:
    """Logits of gesture and label in numpy. → (B, K), (B, L)"""
    with torch.inference_mode():
        gesture, label, *_ = net(*to_tensors(batch, device))
    return gesture.float().cpu().numpy(), label.float().cpu().numpy()


def fit_torch(job: Job, frames: Frames, labels: Labels, cfg: Config) -> dict[str, Any]:
    """Train one network and write {stem}.pt."""
    spec = network_spec(frames, labels.table, cfg.torch_width, cfg.torch_tof_images, cfg)
    batches = Batches(frames, spec, *standardisation(frames, job.train), labels)
    return fit_network(job, TorchLearner(job, spec, cfg), batches, cfg)


def load_torch(folder: Path, stems: Sequence[str], table: I64, cfg: Config) -> list[NetworkFold]:
    """The networks of some stems; only tensors are read, nothing is executed."""
    folds, device = [], device_for(0, cfg)
    for stem in stems:
        about, path = read_spec(folder / f"{stem}_spec.json", table), folder / f"{stem}.pt"
        net = torch_classes().Network(about[0], 0.0).eval().requires_grad_(False)
        with refusing(path, "does not hold the network of its spec"):
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        logits = functools.partial(torch_logits, net.to(device), device)
        folds.append(NetworkFold(*about, logits))
    return folds


# %% [markdown]
# ## 11 Keras
#
# In: Batches. Out: logits. The third member, of another architecture: a deep branch for the IMU and
# a light one for ToF and THM meet in a BiGRU, all of Keras's own layers, so that any Keras opens a
# .keras file in safe mode. One compiled step serves all folds of a mode: a trace costs as much as
# several folds of a small run, so a fold only sets the variables anew.

# %%
KERAS_LOCK = threading.RLock()  # compiled steps are shared, so jobs on threads take turns


@functools.cache
def start_keras(threads: int) -> None:
    """Import TensorFlow and Keras without what their libraries print unasked; check the backend.

    Memory grows as needed: Torch may share the card. Torch's compiler, triton, must load before
    TensorFlow: each brings an LLVM, and a triton that is later would end the process.
    """
    os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever else a notebook may wish for
    wanted = {"TF_FORCE_GPU_ALLOW_GROWTH": "true", "TF_CPP_MIN_LOG_LEVEL": "3"}
    wanted |= dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), str(threads))
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    stderr = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("triton")
        backend, listed = keras.backend.backend(), tf.config.list_physical_devices("GPU")
        for card in (cards := tf.config.list_logical_devices("GPU")):
            with tf.device(card.name):
                tf.reduce_sum(tf.ones(8)).numpy()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    if backend != "tensorflow":
        raise ConfigError(f"Keras runs on {backend} here, not tensorflow: restart, or USE_KERAS=0.")
    if len(cards) < len(listed):  # it has no kernels for the others, and does without in silence
        log("warning", cards=f"TensorFlow uses {len(cards)} of {len(listed)}", else_the="CPU")
    keras.config.set_image_data_format("channels_last")  # ~/.keras/keras.json may say otherwise
    keras.config.set_floatx("float32")


def branch_columns(spec: NetworkSpec) -> list[I64]:
    """Columns of a batch that each branch is given: IMU with place, (and ToF with THM)."""
    far = np.array([name.startswith(("thm", "tof")) for name, _ in spec.groups])
    of_column = np.r_[np.repeat(far, [len(names) for _, names in spec.groups]), far, False]
    return [columns for columns in map(np.flatnonzero, (~of_column, of_column)) if columns.size]


def keras_inputs(batch: Batch, spec: NetworkSpec) -> list[Any]:
    """A batch as the network takes it: IMU, (ToF and THM,) mask. → 2 or 3 × (B, T, …)"""
    parts = (*branch_columns(spec), np.array([-1]))  # the last one: the mask
    return [tf.constant(batch.x[..., columns]) for columns in parts]


def residual_block(h: Any, mask: Any, name: str, width: int, kernel: int) -> tuple[Any, Any]:
    """Two convolutions with squeeze-and-excitation around a shortcut, then half the rows.

    Layers are named here and below: TensorFlow orders some sums by names, and Keras's own count on.
    """
    layers = keras.layers
    rows = layers.Reshape((-1,), name=f"{name}_rows")(mask)  # (B, T)

    def convolved(x: Any, n: int) -> Any:
        x = layers.Conv1D(width, kernel, padding="same", use_bias=False, name=f"{name}_conv{n}")(x)
        return layers.BatchNormalization(momentum=0.9, name=f"{name}_norm{n}")(x, mask=rows)

    out = layers.Activation("relu", name=f"{name}_relu1")(convolved(h, 1))
    out = layers.Multiply(name=f"{name}_masked1")([out, mask])
    out = convolved(out, 2)
    squeezed = layers.GlobalAveragePooling1D(keepdims=True, name=f"{name}_mean")(out, mask=rows)
    squeezed = layers.Dense(width // 8, "relu", name=f"{name}_squeeze")(squeezed)
    gain = layers.Dense(width, "sigmoid", name=f"{name}_excite")(squeezed)
    shortcut = layers.Dense(width, use_bias=False, name=f"{name}_shortcut")(h)
    out = layers.Multiply(name=f"{name}_scaled")([out, gain])
    out = layers.Add(name=f"{name}_sum")([out, shortcut])
    out = layers.Activation("relu", name=f"{name}_relu2")(out)
    out = layers.Multiply(name=f"{name}_masked2")([out, mask])  # not below 0: padding never wins
    halved = layers.MaxPooling1D(2, name=f"{name}_pool")(out)
    return halved, layers.MaxPooling1D(2, name=f"{name}_mask")(mask)


def connect_layers(spec: NetworkSpec, dropout: float, policy: str = "float32") -> Any:
    """Two branches, a recurrent layer, attention, two heads: inputs of `keras_inputs` → logits of
    gesture (B, K) and label (B, L), in float32 always. The dtype policy is this network's own."""
    keras.config.set_dtype_policy(policy)
    layers, w = keras.layers, spec.width
    columns = branch_columns(spec)
    inputs = [keras.Input((None, len(c)), name=f"branch{i}") for i, c in enumerate(columns)]
    mask = keras.Input((None, 1), name="mask")
    h, left = inputs[0], mask
    for i, (width, kernel) in enumerate([(w, 3), (2 * w, 5), (2 * w, 5)], start=1):
        h, left = residual_block(h, left, f"imu{i}", width, kernel)
    for far in inputs[1:]:
        side, there = far, mask
        for i in (1, 2, 3):
            side, there = residual_block(side, there, f"far{i}", w // 2, 3)
        h = layers.Concatenate(name="joined")([h, side])
    h = layers.Dropout(dropout, name="dropout")(h)
    steps = layers.Reshape((-1,), name="steps")(left)  # (B, T / 8)
    # not unrolled: Keras would mask the steps of the way back in the order of the way there
    cell = layers.GRU(w, return_sequences=True, use_cudnn=False, name="gru")
    h = layers.Bidirectional(cell, name="bigru")(h, mask=steps)
    scores = layers.Dense(4, name="scores")(layers.Dense(w, "tanh", name="hidden")(h))
    every_head = layers.Permute((2, 1), name="by_step")(layers.RepeatVector(4, name="every")(steps))
    share = layers.Softmax(axis=1, name="share")(scores, mask=every_head)  # (B, T / 8, heads)
    h = layers.Flatten(name="pooled")(layers.Dot((1, 1), name="mean")([share, h]))
    h = layers.Dropout(dropout, name="dropout_pooled")(h)
    h = layers.Dense(2 * w, "relu", name="dense")(h)
    h = layers.Dropout(dropout, name="dropout_dense")(h)
    gesture = layers.Dense(len(GESTURES), dtype="float32", name="gesture")(h)
    label = layers.Dense(len(spec.table), dtype="float32", name="label")(h)
    keras.config.set_dtype_policy("float32")
    return keras.Model([*inputs, mask], [gesture, label], name="cmi_network")


@functools.lru_cache(maxsize=2)
def serving_network(spec: NetworkSpec, jit: bool) -> tuple[Any, Callable[[], Logits]]:
    """A float32 network, and what answers with the values it holds when asked for: one trace."""
    network = connect_layers(spec, 0.0)
    held = [*network.trainable_variables, *network.non_trainable_variables]
    n = len(network.trainable_variables)
    signature = [[tf.TensorSpec(x.shape, x.dtype) for x in xs] for xs in (held, network.inputs)]

    @functools.partial(tf.function, input_signature=signature, jit_compile=jit, autograph=False)
    def compiled(values: list[Any], inputs: list[Any]) -> Any:
        return network.stateless_call(values[:n], values[n:], inputs, training=False)[0]

    def answers(values: list[Any], batch: Batch) -> tuple[F32, F32]:
        gesture, label = compiled(values, keras_inputs(batch, spec))
        return gesture.numpy(), label.numpy()

    return network, lambda: functools.partial(answers, [tf.identity(v.value) for v in held])


@functools.lru_cache(maxsize=1)
def compiled_network(spec: NetworkSpec, policy: str, cfg: Config) -> tuple[Any, ...]:
    """A network, its optimiser, compiled functions and first values: the same for every fold."""
    network = connect_layers(spec, cfg.keras_dropout, policy)
    decay, smoothing = cfg.keras_weight_decay, cfg.keras_label_smoothing
    optimizer = keras.optimizers.AdamW(weight_decay=decay, global_clipnorm=CLIP_NORM)
    if policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    optimizer.build(network.trainable_variables)
    entropy = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
    belongs = label_parts(np.array(spec.table))[:, : len(GESTURES)]
    inputs_of_any_size = [tf.TensorSpec(x.shape, tf.float32) for x in network.inputs]
    signature = [inputs_of_any_size, tf.TensorSpec((None, len(belongs))), tf.TensorSpec(())]
    compiled = functools.partial(tf.function, jit_compile=cfg.keras_jit, autograph=False)

    @compiled(input_signature=signature)
    def gradients(inputs: Any, label: Any, share: Any) -> Any:
        """Of the loss, weighted by the piece's share of the step. → loss, gradients"""
        with tf.GradientTape() as tape:
            logits = network(inputs, training=True)
            loss = entropy(label, logits[1]) + entropy(tf.matmul(label, belongs), logits[0])
            scaled = optimizer.scale_loss(loss * share)
        return loss * share, tape.gradient(scaled, network.trainable_variables)

    @compiled()
    def apply(grads: Any) -> None:
        optimizer.apply(grads, network.trainable_variables)

    initial = keras_values([*network.weights, *optimizer.variables])
    return network, optimizer, gradients, apply, initial


def keras_values(variables: Iterable[Any]) -> Arrays:
    """By number: Keras counts the layers of a process, so paths are others in the next one."""
    return {f"{i:04d}": variable.value.numpy() for i, variable in enumerate(variables)}


class KerasLearner:
    """A compiled network as one job sees it; see Learner."""

    def __init__(self, job: Job, spec: NetworkSpec, cfg: Config) -> None:
        cards = tf.config.list_physical_devices("GPU")[: len(tf.config.list_logical_devices("GPU"))]
        about = map(tf.config.experimental.get_device_details, cards)
        able = [card.get("compute_capability", (0, 0)) >= (7, 0) for card in about]  # to halve
        half = cfg.keras_mp and able and all(able)
        self.precision = cfg.keras_policy or ("mixed_float16" if half else "float32")
        self.spec, self.device = spec, "gpu" if cards else "cpu"
        self.out_of_memory = tf.errors.ResourceExhaustedError
        self.served, self.answer = serving_network(spec, cfg.keras_jit)
        made = compiled_network(spec, self.precision, cfg)
        self.network, self.optimizer, self.gradients, self.apply, initial = made
        # all that training changes, but for the noise of dropout
        self.variables = [*self.network.weights, *self.optimizer.variables]
        self.restore(initial)
        rng = job.rng(cfg, "weights")
        for variable in self.network.trainable_variables:
            if variable.name.endswith("kernel"):  # Glorot's, of this fold's own
                reach = (6 / (np.prod(variable.shape[:-1]) + variable.shape[-1])) ** 0.5
                variable.assign(rng.uniform(-reach, reach, variable.shape).astype(np.float32))

    def begin_epoch(self, seed: int) -> None:
        noisy = [layer for layer in self.network.layers if hasattr(layer, "seed_generator")]
        for i, layer in enumerate(noisy):
            layer.seed_generator.state.assign([seed + i, 0])

    def train_step(self, pieces: Sequence[Batch], rate: float) -> float:
        """As TorchLearner's: gradients of the pieces add up, then one step."""
        self.optimizer.learning_rate = rate
        n, losses, grads = sum(map(len, pieces)), [], []
        for piece in pieces:
            share = tf.constant(len(piece) / n, tf.float32)
            loss, grad = self.gradients(keras_inputs(piece, self.spec), piece.label, share)
            losses.append(float(loss))
            grads.append(grad)
        self.apply([sum(of_one[1:], of_one[0]) for of_one in zip(*grads, strict=True)])
        return sum(losses)

    def logits(self, batch: Batch) -> tuple[F32, F32]:
        """As it will be served, in float32 under any policy."""
        self.served.set_weights(list(self.weights().values()))
        return self.answer()(batch)

    def weights(self) -> Arrays:
        return keras_values(self.network.weights)

    def state(self) -> Arrays:
        return keras_values(self.variables)

    def restore(self, arrays: Arrays) -> None:
        for number, variable in enumerate(self.variables):
            variable.assign(arrays[f"{number:04d}"])

    def save(self, path: Path, weights: Arrays) -> None:
        self.served.set_weights(list(weights.values()))
        partial = path.with_name(f".{path.name}.{os.getpid()}.part.keras")
        self.served.save(partial)
        write_whole(path.with_name(f"{path.name}.keras"), partial.read_bytes())
        partial.unlink()


def fit_keras(job: Job, frames: Frames, labels: Labels, cfg: Config) -> dict[str, Any]:
    """Train one network and write {stem}.keras."""
    with KERAS_LOCK:
        start_keras(cfg.keras_threads)
        spec = network_spec(frames, labels.table, cfg.keras_width, images=False, cfg=cfg)
        batches = Batches(frames, spec, *standardisation(frames, job.train), labels)
        return fit_network(job, KerasLearner(job, spec, cfg), batches, cfg)


def load_keras(folder: Path, stems: Sequence[str], table: I64, cfg: Config) -> list[NetworkFold]:
    """The networks of some stems. Layers are built here: files give numbers only."""
    folds = []
    with KERAS_LOCK:
        start_keras(cfg.keras_threads)
        for stem in stems:
            about, path = read_spec(folder / f"{stem}_spec.json", table), folder / f"{stem}.keras"
            network, answer = serving_network(about[0], cfg.keras_jit)
            with refusing(path, "does not hold the network of its spec"):
                network.load_weights(path)
            folds.append(NetworkFold(*about, answer()))
    return folds


# %% [markdown]
# ## 12 Members, plan and jobs
#
# In: training data and what lies on disk. Out: trained models and complete out-of-fold rows. A
# member is a few functions under a name in MEMBERS; nothing else knows members by name. The plan
# compares what lies on disk with what would be trained now, model by model, and says what will
# happen and why. A model whose fingerprint differs is never used; its note is written last.


# %%
class Inputs:
    """What members are fed: table and frames of the same recordings, made in one pass when first
    asked for. With settings, as in training, progress is told and large frames lie on disk."""

    def __init__(self, rec: Recordings, cfg: Config | None = None, **wanted: Any) -> None:
        self.rec, self.cfg = rec, cfg
        self.wanted = wanted  # table=False or frames=False: nobody will ask for it

    @functools.cached_property
    def extracted(self) -> tuple[FeatureTable, Frames]:
        if (cfg := self.cfg) is None:
            return extract_features(self.rec, **self.wanted)
        progress = Progress("features", len(self.rec), cfg.feature_log_every)
        with stage("features", cfg):
            table, frames = extract_features(self.rec, progress=progress, **self.wanted)
        if not cfg.frame_cache or frames.x.nbytes > cfg.frame_cache_max_mb * 2**20:
            write_whole(path := cfg.checkpoints / "cache" / "frames.npy", frames.x)
            frames = dataclasses.replace(frames, x=np.load(path, mmap_mode="r"))
        return table, frames

    @functools.cached_property
    def without_rotation(self) -> FeatureTable:
        rec = dataclasses.replace(self.rec, rot=np.full_like(self.rec.rot, np.nan))
        return Inputs(rec, self.cfg, frames=False).extracted[0]

    @functools.cached_property
    def probe(self) -> Inputs:
        """The first recording alone: its features tell whether they are made as before."""
        return Inputs(self.rec.part(0, 1))

    def table(self, mode: str) -> FeatureTable:
        return self.without_rotation if mode == NO_ROTATION else self.extracted[0].of_mode(mode)

    def frames(self, mode: str) -> Frames:
        return self.extracted[1].of_mode(mode)


@dataclass(frozen=True, slots=True)
class Member:
    """How one kind of model is fed, trained, loaded and asked."""

    packages: tuple[str, ...]  # without these it cannot take part
    files: tuple[str, ...]  # what fit writes for each fold, after the stem
    prepare: Callable[[Inputs, str], Any]  # input in a mode
    fit: Callable[[Job, Any, Labels, Config], dict[str, Any]]
    load: Callable[[Path, Sequence[str], I64, Config], Any]  # folder, stems, label table
    predict: Callable[[Any, Any], F32]  # loaded models, input → (stems, N, L)
    default_weight: float  # in the blend, when there are no out-of-fold rows
    cost: float = 1.0  # seconds of a fold beside the other members'
    start: Callable[[Config], Any] = lambda cfg: None  # import its packages, check what they need
    side_by_side: Callable[[Job, Config], int] = lambda job, cfg: 1  # jobs that should run at once
    resumable: Callable[[Job, Config], str] = lambda job, cfg: ""  # "resumable …", or why not
    summarise: Callable[[Mapping[str, Sequence[Path]], Path], None] = lambda models, out: None
    modes: tuple[str, ...] = MODES
    form: int = 2  # raise it when what fit writes changes: older models do not count


MEMBERS = {
    "lgbm": Member(
        ("lightgbm",), (".txt", "_orientation.txt", "_behavior.txt"), Inputs.table, fit_lgbm,
        load_lgbm, predict_lgbm, 0.20, start=lambda cfg: lgb.Booster, modes=ROUTES,
        side_by_side=lambda job, cfg: 1 if len(job.train) >= MANY_ROWS else joblib.cpu_count(),
        summarise=summarise_lgbm,
    ),
    "torch": Member(
        ("torch",), (".pt", "_spec.json"), Inputs.frames, fit_torch, load_torch, predict_folds,
        0.45, 3.0, lambda cfg: working_cards(), torch_side_by_side, network_resumable,
        form=NETWORK_FORM,
    ),
    "keras": Member(
        ("keras", "tensorflow"), (".keras", "_spec.json"), Inputs.frames, fit_keras, load_keras,
        predict_folds, 0.35, 3.0, lambda cfg: start_keras(cfg.keras_threads),
        resumable=network_resumable, form=NETWORK_FORM,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """The training data as every job sees it."""

    inputs: Inputs  # canonical recordings
    labels: Labels
    fold: I64  # (N)
    data_digest: str  # of the recordings
    upside_down: str  # digest of which of them were turned back
    wearer: dict[str, Any] | None  # the model that tells a device worn upside down
    needless: Mapping[str, str] = dataclasses.field(default_factory=dict)  # mode → why it is

    def jobs(self, member: str, mode: str, cfg: Config) -> tuple[Job, ...]:
        """One job per seed and fold."""
        places = cfg.out / f"{member}_models" / mode, cfg.checkpoints / member / mode
        seeds, jobs = range(getattr(cfg, f"{member}_seeds", 1)), []
        for seed, k in itertools.product(seeds, range(cfg.n_folds)):
            split = np.flatnonzero(self.fold != k), np.flatnonzero(self.fold == k)
            jobs.append(Job(member, mode, seed, k, *split, *places, cfg.out / "logs"))
        return tuple(jobs)


def note_of(job: Job, data: TrainingData, cfg: Config) -> dict[str, Any]:
    """All that a trained model depends on, by name, so that a difference has one; and rough figures
    of its first input, the same on any machine, which change with a feature's meaning."""
    member = MEMBERS[job.member]
    x = member.prepare(data.inputs.probe, job.mode)
    means = np.nan_to_num(x.x, nan=-999.0).mean(axis=0, dtype=np.float64)
    fingerprint = {
        "form of the files": member.form,
        "data": data.data_digest,
        "upside down": data.upside_down,
        "labels": digest(data.labels.table),
        "training rows": digest(data.inputs.rec.sequence_id[job.train]),
        "columns": digest(list(x.names)),
        **{f"major version of {p}": package_version(p).split(".")[0] for p in member.packages},
        **cfg.training_settings(job.member),
    }
    return {"fingerprint": fingerprint, "probe": [float(f"{v:.5g}") for v in means]}


def spoilt_file(folder: Path, stem: str, ends: Sequence[str]) -> str:
    """The first file of a model that is absent or not as it was written; empty if all are."""
    note = folder / f"{stem}.json"
    if not note.is_file():
        return note.name
    with refusing(note, f"does not name the files {', '.join(stem + end for end in ends)}"):
        digests = read_json(note)["files"]
        written = {folder / f"{stem}{end}": digests[end] for end in ends}
    bad = (p.name for p, was in written.items() if not p.is_file() or digest(p.read_bytes()) != was)
    return next(bad, "")


def why_not_reusable(job: Job, folder: Path, data: TrainingData, cfg: Config) -> str:
    """Why the model of a job in `folder` does not count; empty if it does."""
    path = folder / job.note.name
    if not path.exists():
        return "none yet"
    try:
        with refusing(path, "cannot be used"):
            then, now = read_json(path), note_of(job, data, cfg)
            if other := difference(now["fingerprint"], then["fingerprint"]):
                return other
            if not np.allclose(now["probe"], then["probe"], rtol=1e-2, atol=1e-3):
                return "its input is computed in another way now"
        spoilt = spoilt_file(folder, job.stem, MEMBERS[job.member].files)
    except DataError as error:
        return str(error)
    return f"{spoilt} is absent or was changed after training" if spoilt else ""


def find_below(folder: Path, name: str) -> list[Path]:
    """What has that name at most six folders below, links followed, in order of the paths."""
    return sorted(path for depth in range(7) for path in folder.glob("*/" * depth + name))


def bundle_folders(member: str, cfg: Config) -> list[Path]:
    """Where models of a member may lie: the named bundle and ours, else ours and attached ones."""
    own, named = cfg.out / f"{member}_models", getattr(cfg, f"{member}_bundle_path")
    if named is None:
        return [own, *(p.parent for p in find_below(KAGGLE_INPUT, f"{own.name}/bundle.json"))]
    bundle = named if named.name == "bundle.json" else named / "bundle.json"
    if not bundle.is_file():
        advice = f"Name a folder written by an earlier run, such as …/{own.name}."
        raise ConfigError(f"{member.upper()}_BUNDLE_PATH={named}: looked for {bundle}. {advice}")
    return [bundle.parent, own]


def why_absent(member: str, cfg: Config) -> str:
    """Why a member takes no part; empty if it does. A missing package is an error if so set."""
    name, packages = member.upper(), MEMBERS[member].packages
    if not getattr(cfg, f"use_{member}"):
        return f"USE_{name}=0"
    missing = next((f"{p} is not installed" for p in packages if not package_version(p)), "")
    if missing and getattr(cfg, f"fail_if_{member}_missing", False):
        raise ConfigError(f"{missing}, FAIL_IF_{name}_MISSING=1. Install it, or set USE_{name}=0.")
    return missing


@dataclass(frozen=True, slots=True)
class PlanItem:
    """What will happen to one member in one mode."""

    member: str
    mode: str
    action: str  # reuse | resume | train | skip
    why: str
    folder: Path  # where its models lie, or will lie
    jobs: tuple[Job, ...]
    todo: tuple[Job, ...]  # those to be trained
    passed_over: tuple[str, ...] = ()  # other bundles, and why they do not fit

    @property
    def stems(self) -> list[str]:
        return [job.stem for job in self.jobs]

    def model_secs(self) -> list[float]:
        """Seconds of each model that is there, shared with those that ran beside it."""
        notes = [path for s in self.stems if (path := self.folder / f"{s}.json").is_file()]
        with contextlib.suppress(*BAD_FILE):  # the plan says which is damaged
            return [n["info"]["secs"] / n["workers"] for n in map(read_json, notes)]
        return []


def plan_item(member: str, mode: str, data: TrainingData, cfg: Config) -> PlanItem:
    """Reuse what fits entirely, wherever it lies; else train what is missing in our own folder."""
    jobs = data.jobs(member, mode, cfg)
    own = jobs[0].folder
    item = functools.partial(PlanItem, member, mode, jobs=jobs, folder=own, todo=jobs)
    if absent := why_absent(member, cfg) or data.needless.get(mode):
        return item("skip", absent, todo=())
    if getattr(cfg, f"force_train_{member}"):
        return item("train", f"FORCE_TRAIN_{member.upper()}=1")
    unfit: dict[Path, dict[Job, str]] = {}
    for folder in (bundle / mode for bundle in bundle_folders(member, cfg)):
        unfit[folder] = {j: w for j in jobs if (w := why_not_reusable(j, folder, data, cfg))}
        if not unfit[folder]:
            return item("reuse", "everything matches", folder=folder, todo=())
    reasons = {f: collections.Counter(w.values()).most_common(1)[0][0] for f, w in unfit.items()}
    why = next(iter(reasons.values()))  # of the named bundle, or of our own folder
    if not (cfg.resume and getattr(cfg, f"resume_{member}", True)):
        return item("train", f"{why}; RESUME=0")
    begun = [note for job in unfit[own] if (note := MEMBERS[member].resumable(job, cfg))]
    resumes = len(unfit[own]) < len(jobs) or any(text.startswith("resumable") for text in begun)
    others = tuple(f"{f}: {w}" for f, w in reasons.items() if f != own and w != "none yet")
    action, why = "resume" if resumes else "train", "; ".join([why, *begun[:1]])
    return item(action, why, todo=tuple(unfit[own]), passed_over=others)


def make_plan(data: TrainingData, cfg: Config) -> list[PlanItem]:
    """One item per member and mode."""
    plan = [plan_item(name, mode, data, cfg) for name in MEMBERS for mode in MEMBERS[name].modes]
    for item in plan:
        log("plan", member=item.member, mode=item.mode, action=item.action, todo=len(item.todo),
            why=item.why, path=item.folder)  # fmt: skip
    return plan


class Outlook:
    """How much of the training is done, by the cost of models, and how long the rest takes: by the
    seconds of the member that is trained, or at first by those of former runs."""

    def __init__(self, plan: Sequence[PlanItem]) -> None:
        self.left = self.total = sum(MEMBERS[i.member].cost * len(i.todo) for i in plan)
        former = [secs / MEMBERS[i.member].cost for i in plan for secs in i.model_secs()]
        self.unit = float(np.mean(former or [0]))  # s of a model of cost 1; 0: not known

    def __str__(self) -> str:
        if self.left and not self.unit:
            return "how long it takes is known after the first fold"
        share = 1 - self.left / max(self.total, 1)
        return f"{share:.0%} trained, about {duration(self.left * self.unit)} to go"


def show_plan(plan: Sequence[PlanItem]) -> None:
    """The plan as a table of members and modes, why, and how long it will take."""
    modes = list(dict.fromkeys(item.mode for item in plan))
    say("plan    " + "".join(f"{mode:<14}" for mode in modes) + "why")
    for member, own in itertools.groupby(plan, key=lambda item: item.member):
        cells, reasons = dict.fromkeys(modes, ""), collections.defaultdict[str, list[str]](list)
        for item in own:
            cells[item.mode] = item.action + f" {len(item.todo)}/{len(item.jobs)}" * bool(item.todo)
            reasons[item.why].append(item.mode)
        several = len(reasons) > 1
        why = "; ".join(w + f" ({', '.join(of)})" * several for w, of in reasons.items())
        say(f"{member:<8}" + "".join(f"{cell:<14}" for cell in cells.values()) + why)
    for text in dict.fromkeys(text for item in plan for text in item.passed_over):
        say(f"passed over: {text}")
    say(f"        {Outlook(plan)}")


def run_job(
    job: Job, x: Any, labels: Labels, note: Any, shared: dict[str, Any], cfg: Config
) -> tuple[Job, Any]:
    """Train one model and write its note last."""
    RUN_LOG.update(shared)
    member, began = MEMBERS[job.member], time.monotonic()
    log("fit", job=job.name, train=len(job.train), valid=len(job.valid))
    job.note.unlink(missing_ok=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    info = member.fit(job, x, labels, cfg)
    files = {end: digest((job.folder / f"{job.stem}{end}").read_bytes()) for end in member.files}
    info["secs"] = round(time.monotonic() - began, 1)
    write_json(job.note, {**note, "files": files, "info": info})
    return job, info


def run_jobs(jobs: Sequence[Job], data: TrainingData, outlook: Outlook, cfg: Config) -> None:
    """Train all, one by one or side by side; each result is on disk as soon as it is made."""
    name, member = jobs[0].member, MEMBERS[jobs[0].member]
    inputs = {mode: member.prepare(data.inputs, mode) for mode in {job.mode: None for job in jobs}}
    fitting = member.side_by_side(jobs[0], cfg) if cfg.cmi_backend in ("loky", "threading") else 1
    workers = min(max(cfg.cmi_workers, fitting), len(jobs))
    backend = dict(joblib_backend(cfg) if workers > 1 else {"backend": "sequential"})
    if "client" in backend:  # of Dask
        backend["scatter"] = list(inputs.values())  # they travel once
    tasks, secs = [], []
    for job in jobs:
        note = note_of(job, data, cfg) | {"workers": workers}
        task = (job, inputs[job.mode], data.labels, note, RUN_LOG, cfg)
        tasks.append(joblib.delayed(run_job)(*task))
    try:
        with joblib.parallel_config(**backend, n_jobs=workers):
            each = "list" if backend["backend"] == "ray" else "generator_unordered"  # Ray cannot
            done = joblib.Parallel(return_as=each)(tasks)
            if cfg.use_tqdm and sys.stderr.isatty() and package_version("tqdm"):
                done = tqdm.tqdm(done, name, len(jobs))
            for job, info in done:
                secs.append(info["secs"] / workers)
                outlook.left -= member.cost
                outlook.unit = float(np.mean(secs)) / member.cost
                score = f"score {info['score']:.3f}  " if "score" in info else ""
                say(f"{job.name:<20}{score}{duration(info['secs'])}  {outlook}")
    except joblib.externals.loky.process_executor.TerminatedWorkerError as error:
        raise DataError(
            f"A worker died while training {name} ({str(error).splitlines()[0]}). If memory ran "
            f"out, set CMI_WORKERS=1. Run again: what is done is kept."
        ) from None


@functools.cache
def joblib_backend(cfg: Config) -> dict[str, Any]:
    """joblib's backend on the machines that CMI_BACKEND names; a cluster serves the whole run."""
    found = importlib.machinery.PathFinder.find_spec(__name__)
    if cfg.cmi_backend != "threading" and (found is None or found.origin != __file__):
        log("note", backend="threading", why="no other process can import what is defined here")
        return {"backend": "threading"}
    try:
        if cfg.cmi_backend == "dask":
            own = {"n_workers": cfg.cmi_workers, "threads_per_worker": 1}
            cluster = {"address": cfg.dask_scheduler} if cfg.dask_scheduler else own
            client = importlib.import_module("distributed").Client(**cluster)
            if cfg.dask_scheduler:
                client.upload_file(__file__)  # its workers run anywhere; Ray has py_modules
            return {"backend": "dask", "client": client}
        if cfg.cmi_backend == "ray":
            ray = importlib.import_module("ray")
            if not ray.is_initialized():
                cpus = None if cfg.ray_address else cfg.cmi_workers
                ours = {"py_modules": [__file__]}
                ray.init(cfg.ray_address or "local", num_cpus=cpus, runtime_env=ours)
            importlib.import_module("ray.util.joblib").register_ray()
    except (ImportError, OSError) as error:  # also a scheduler or cluster that does not answer
        what = "needs a package" if isinstance(error, ImportError) else "does not start"
        raise ConfigError(f"CMI_BACKEND={cfg.cmi_backend} {what}: {error!s:.300}.") from None
    # loky starts a worker anew when its memory has grown, as by importing torch
    warnings.filterwarnings("ignore", "A worker stopped while some jobs were given")
    return {"backend": cfg.cmi_backend}


def bundle_digest(folder: Path, stems: Sequence[str]) -> str:
    """Digest of the notes of some models: says whether these are the ones that something is of."""
    return digest(*((folder / f"{stem}.json").read_bytes() for stem in stems))


def out_of_fold(item: PlanItem, data: TrainingData, cfg: Config) -> F32:
    """Composite probabilities by models that never saw the wearer, (N, L): read if of these models
    and folds. They start as NaN: a recording that no fold scored cannot slip through."""
    path = cfg.out / "oof" / f"oof_{item.member}_{item.mode}_composite.npy"
    of = {"models": bundle_digest(item.folder, item.stems), "folds": digest(data.fold)}
    with contextlib.suppress(DataError, OSError, ValueError):
        if read_json(path.with_suffix(".json")) == of | {"array": digest(path.read_bytes())}:
            return np.asarray(np.load(path, allow_pickle=False), np.float32)
    member, table = MEMBERS[item.member], data.labels.table
    x = member.prepare(data.inputs, item.mode)
    oof = np.full((len(data.fold), len(table)), np.nan, np.float32)
    with stage(f"{item.member}/{item.mode} out of fold", cfg):
        for k in range(cfg.n_folds):
            jobs = [job for job in item.jobs if job.fold == k]
            models = member.load(item.folder, [job.stem for job in jobs], table, cfg)
            proba = member.predict(models, x.take(jobs[0].valid))
            assert len(proba) == len(jobs), (proba.shape, len(jobs))
            oof[jobs[0].valid] = proba.mean(axis=0)
    assert not np.isnan(oof).any(), "some recording was scored by no fold"
    write_whole(path, oof)
    write_whole(path.with_stem(path.stem.replace("composite", "proba")), gesture_proba(oof, table))
    write_json(path.with_suffix(".json"), of | {"array": digest(path.read_bytes())})
    return oof


def write_bundle(name: str, items: Sequence[PlanItem], data: TrainingData, cfg: Config) -> None:
    """bundle.json beside a member's models that lie here, of the modes that are complete, and its
    summary: also if a later job fails, so that a mishap leaves whole bundles."""
    member, own = MEMBERS[name], cfg.out / f"{name}_models"
    whole = [s for s in items if all((s.folder / job.note.name).is_file() for job in s.jobs)]
    member.summarise({s.mode: [s.folder / stem for stem in s.stems] for s in whole}, cfg.out)
    ours = {item.mode: item.stems for item in whole if item.folder.parent == own}
    if ours:  # else reused from elsewhere: their bundle is there
        versions = {p: package_version(p) for p in ("numpy", "polars", *member.packages)}
        write_json(own / "bundle.json", {
            "member": name, "modes": ours, "labels": data.labels.table.tolist(),
            "columns": {mode: member.prepare(data.inputs.probe, mode).names for mode in ours},
            "versions": versions, "settings": cfg.training_settings(name),
        })  # fmt: skip


Oof = Mapping[tuple[str, str], F32]  # out-of-fold rows, such as (N, L) by (member, mode)


def train_members(plan: Sequence[PlanItem], data: TrainingData, cfg: Config) -> Oof:
    """Carry out the plan, all modes of a member in one pool."""
    oof, outlook = {}, Outlook(plan)
    write_whole(cfg.out / "oof" / "y_true.npy", data.labels.gesture)
    for name in MEMBERS:
        items = [item for item in plan if item.member == name and item.action != "skip"]
        todo = [job for item in items for job in item.todo]
        if todo:
            MEMBERS[name].prepare(data.inputs, todo[0].mode)  # features are a stage of their own
        note = "" if todo else "reused" if items else "skipped"
        with stage(f"{name} training", cfg, note, outlook.__str__):
            try:
                if todo:
                    run_jobs(todo, data, outlook, cfg)
            finally:
                write_bundle(name, items, data, cfg)
        for item in items:
            oof[name, item.mode] = out_of_fold(item, data, cfg)
    return oof


# %% [markdown]
# ## 13 Blend and assignment
#
# In: out-of-fold rows. Out: weights.json and scores.json. Per mode a log-linear pool of the
# members, P(label) ∝ Π P_m(label)^w_m, whose weights (their sum is free) give the least log loss;
# IMU members also join the pool of the all-sensor mode. Weights found on the rows they are scored
# on flatter; nested ones come from the other folds. A wearer does each composite label a known
# number of times at most, so labels of a wearer's recordings are assigned together. Recordings of
# one wearer resemble each other: intervals come from draws of wearers.


# %%
@dataclass(frozen=True, slots=True)
class Blend:
    """How to pool the answers of several (member, mode) models in one mode."""

    parts: tuple[str, ...]  # "lgbm/all", "torch/imu", …
    weights: tuple[float, ...]  # ≥ 0, their sum acts as inverse temperature

    def pool(self, composite: Mapping[str, F32]) -> F32:
        """(N, L) of each part → (N, L). The weight of absent parts goes to the others."""
        present = {p: w for p, w in zip(self.parts, self.weights, strict=True) if p in composite}
        weights = np.array([*present.values()])
        if not weights.sum() > 0:  # the weighted ones are all absent: the others count alike
            weights = np.ones(len(present))
        weights = weights * (sum(self.weights) or 1.0) / weights.sum()
        return pool_logs(log_probas([composite[part] for part in present]), weights)


def log_probas(composite: Sequence[F32]) -> F32:
    """M × (N, L) → (M, N, L)"""
    return np.log(np.maximum(np.stack(composite), np.float32(TINY)))


def pool_logs(logs: F32, weights: F64) -> F32:
    """Softmax of the weighted sum of log probabilities. (M, N, L), (M) → (N, L)"""
    return np.asarray(special.softmax(np.tensordot(weights, logs, 1), axis=-1), np.float32)


def fit_weights(logs: F32, same: Bool) -> F64:
    """Weights ≥ 0 of least log loss of the gesture. (M, N, L), (N, L) labels of the truth → (M)"""
    flat, begin = logs.reshape(len(logs), -1), np.full(len(logs), 1 / len(logs))

    def loss(weights: F64) -> tuple[float, F64]:
        proba = special.softmax(np.tensordot(weights, logs, 1), axis=-1)
        right = proba * same
        hit = np.maximum(right.sum(axis=1, keepdims=True), 1e-300)
        slope = (proba - right / hit).ravel().astype(np.float32) / len(same)
        return float(-np.log(hit).mean()), (flat @ slope).astype(np.float64)

    bounds = [(0, 10)] * len(logs)
    found = optimize.minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=bounds).x
    found = found if found.sum() > 1e-3 else begin  # worse than knowing nothing
    least = 0.3  # with a smaller sum, how many labels a gesture has would decide
    return np.asarray(found * max(1, least / found.sum()))


def fixed_shares(parts: Sequence[str], cfg: Config) -> F64 | None:
    """Shares of "member/mode" parts from ENSEMBLE_WEIGHTS or ENSEMBLE_W_…, those of the first
    part's mode; None if weights are to be fitted. → (M), sum 1"""
    shares = {m: w for m in MEMBERS if (w := getattr(cfg, f"ensemble_w_{m}")) is not None}
    try:
        pairs = [item.split(":") for item in cfg.ensemble_weights.split(",") if item.strip()]
        shares |= {member.strip(): float(number) for member, number in pairs}
        if shares.keys() - MEMBERS or not all(0 <= w < np.inf for w in shares.values()):
            raise ValueError
    except ValueError:
        form = f"member:number, …, of {', '.join(MEMBERS)}, and no number negative or infinite"
        raise ConfigError(f"ENSEMBLE_WEIGHTS={cfg.ensemble_weights} must be {form}.") from None
    mode = parts[0].split("/")[1]
    if not shares or mode == NO_ROTATION:
        return None
    weights = np.array([shares.get(part.removesuffix(f"/{mode}"), 0.0) for part in parts])
    if weights.sum() <= 0:
        raise ConfigError(f"Ensemble weights {shares} leave nothing to {', '.join(parts)}.")
    return weights / weights.sum()


def find_weights(parts: Sequence[str], logs: F32, labels: Labels, rows: Any, cfg: Config) -> F64:
    """Weights from some recordings: of least log loss; or of ENSEMBLE_TRIALS random ones of the
    same sum those of the best score; or fixed shares times a fitted scale. (M, N, L) → (M)"""
    logs, truth, table = logs[:, rows], labels.gesture[rows], labels.table
    same, shares = table[:, 2] == truth[:, None], fixed_shares(parts, cfg)
    if shares is not None:
        pooled = np.tensordot(shares, logs, 1).astype(np.float32)[None]
        warm = cfg.ensemble_temperature
        return shares / warm if warm else shares * fit_weights(pooled, same)[0]
    begin, ones = fit_weights(logs, same), np.ones(len(logs))
    if cfg.ensemble_search == "logloss" or len(logs) == 1:
        return begin
    drawn = rng_for(cfg, "blend", *table.shape).dirichlet(ones, cfg.ensemble_trials)
    trials = np.vstack([begin, np.vstack([np.diag(ones), drawn]) * begin.sum()]).astype(np.float32)
    composites = (np.exp(np.tensordot(weights, logs, 1)) for weights in trials)
    scores = [score(truth, gesture_proba(p, table).argmax(axis=1)) for p in composites]
    return trials[np.argmax(scores)].astype(np.float64)


def label_capacities(subject: Str, labels: Labels) -> I64:
    """The largest number of times that any wearer did what each label says. → (L)"""
    n, done = len(labels.table), [labels.composite[subject == s] for s in np.unique(subject)]
    return np.max([np.bincount(label, minlength=n) for label in done], axis=0)


class Assignment:
    """Composite labels of one wearer's recordings so far; each is given as often as it may be."""

    def __init__(self, table: I64, capacity: I64) -> None:
        self.table = table
        self.column = np.repeat(np.arange(len(table)), capacity)  # label of each place
        self.costs: dict[str, F32] = {}  # -log P of each place, by recording

    def gesture(self, recording: str, composite: F32) -> int:
        """Take in a recording (L), tell its gesture; asked again it takes no second place. Judged
        alone: figures that are not finite, or more recordings than places (an unknown protocol)."""
        alone = int(gesture_proba(np.nan_to_num(composite), self.table).argmax())
        if not np.isfinite(composite).all():
            return alone
        self.costs.pop(recording, None)
        self.costs[recording] = -np.log(np.maximum(composite, TINY))[self.column]
        if len(self.costs) > len(self.column):
            return alone
        row, place = optimize.linear_sum_assignment(np.stack(list(self.costs.values())))
        return int(self.table[self.column[place[row.argmax()]], 2])


def replay_assignment(composite: F32, data: TrainingData, cfg: Config, orders: int = 10) -> I64:
    """Answers with assignment if each wearer's recordings arrive in random order. → (orders, N)"""
    rec, answer = data.inputs.rec, np.empty((orders, len(composite)), np.int64)
    fresh = data.labels.table, label_capacities(rec.subject, data.labels)
    for i in range(orders):
        wearers = {subject: Assignment(*fresh) for subject in set(rec.subject)}
        for r in rng_for(cfg, "replay", i).permutation(len(rec)):
            wearer = wearers[rec.subject[r]]
            answer[i, r] = wearer.gesture(str(rec.sequence_id[r]), composite[r])
    return answer


def uses_assignment(gains: bool, cfg: Config) -> bool:
    """SUBJECT_ASSIGNMENT; with auto what gained on out-of-fold rows."""
    return gains if cfg.subject_assignment == "auto" else cfg.subject_assignment == "1"


DRAWS = 1000
Rows = list[dict[str, Any]]  # of the result table


def drawn_scores(answers: Sequence[I64], data: TrainingData, cfg: Config) -> F64:
    """Scores of all recordings, of each fold, and of DRAWS draws of wearers, in this order: means
    over modes and orders of arrival. (N) or (orders, N) of each mode → (1 + folds + DRAWS)"""
    names, first, who = np.unique(data.inputs.rec.subject, return_index=True, return_inverse=True)
    n, fold, found = len(names), data.fold[first], []
    drawn = rng_for(cfg, "bootstrap").multinomial(n, np.full(n, 1 / n), DRAWS)
    times = np.vstack([np.ones(n), np.unique(fold)[:, None] == fold, drawn])  # (…, wearers)
    for answer in np.vstack(answers):
        counts = times @ count_classes(data.labels.gesture, answer, who, n).reshape(n, 81)
        found.append(f1_of_counts(counts.reshape(-1, 9, 9)).mean(axis=0))
    return np.asarray(np.mean(found, axis=0))


def with_interval(scores: F64) -> dict[str, float]:
    """The score of all, and between what 95 % of the draws lie."""
    low, high = np.percentile(scores[-DRAWS:], (2.5, 97.5))
    return {"score": float(scores[0]), "low": float(low), "high": float(high)}


def reliability(proba: F32, truth: I64, bins: int = 10) -> tuple[F64, F64, I64]:
    """By confidence: its mean, the share of right answers (NaN where no recording is), recordings.
    (N, K), (N) → 3 × (bins)"""
    sure = proba.max(axis=1).astype(np.float64)
    place = np.minimum(sure * bins, bins - 1).astype(np.int64)
    n = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, v, bins) for v in (sure, proba.argmax(axis=1) == truth)]
    with np.errstate(invalid="ignore"):
        return sums[0] / n, sums[1] / n, n


def blend_mode(mode: str, oof: Oof, data: TrainingData, cfg: Config) -> tuple[Blend, Oof, I64]:
    """The blend of a mode; gesture probabilities by name and kind of a line of the result table;
    the answers with assignment."""
    pairs = [p for p in oof if p[1] == mode] + [p for p in oof if (mode, p[1]) == MODES]
    parts, logs = tuple(map("/".join, pairs)), log_probas([oof[p] for p in pairs])
    labels, search = data.labels, cfg.ensemble_search
    other = "score" if search == "logloss" else "logloss"
    weights = find_weights(parts, logs, labels, slice(None), cfg)
    nested = {how: np.full(logs.shape[1:], np.nan, np.float32) for how in (search, other)}
    for how, k in itertools.product(nested, np.unique(data.fold)):
        inner, outer = data.fold != k, data.fold == k
        changed = dataclasses.replace(cfg, ensemble_search=how)
        found = find_weights(parts, logs, labels, inner, changed)
        nested[how][outer] = pool_logs(logs[:, outer], found)
    composite = {
        **{(m, "member"): oof[m, of] for m, of in pairs if of == mode},
        ("blend", "nested"): nested[search],
        ("blend", f"nested, {other}"): nested[other],
        ("blend", "optimistic"): pool_logs(logs, weights),
    }
    proba = {key: gesture_proba(p, labels.table) for key, p in composite.items()}
    write_whole(cfg.out / "oof" / f"oof_blend_{mode}_proba.npy", proba["blend", "nested"])
    best = min(log_loss(p, labels.gesture) for (_, kind), p in proba.items() if kind == "member")
    loss = log_loss(proba["blend", "nested"], labels.gesture)
    rounded = dict(zip(parts, np.round(weights, 3).tolist(), strict=True))
    log("blend", mode=mode, log_loss=loss, best_member=best, weights=rounded)
    assigned = replay_assignment(nested[search], data, cfg)
    return Blend(parts, tuple(weights.tolist())), proba, assigned


def score_lines(
    probas: Mapping[str, Oof], assigned: Mapping[str, I64], data: TrainingData, cfg: Config
) -> Rows:
    """Every kind of answer in every mode, and in all and imu alike, beside the nested blend."""
    modes: dict[str, tuple[str, ...]] = {mode: (mode,) for mode in probas}
    modes |= {"mixed": MODES} if set(MODES) <= set(probas) else {}  # half of the test is IMU only
    rows = []
    for mode, of in modes.items():
        answers = {key: [probas[m][key].argmax(axis=1) for m in of] for key in probas[of[0]]}
        answers["blend", "assigned"] = [assigned[m] for m in of]
        scores = {key: drawn_scores(given, data, cfg) for key, given in answers.items()}
        for (name, kind), found in scores.items():
            row = {"name": name, "mode": mode, "kind": kind, **with_interval(found)}
            row |= {"folds": found[1:-DRAWS].tolist(), "log_loss": None, "ece": None}
            if (p := probas.get(mode, {}).get((name, kind))) is not None:
                sure, right, n = reliability(p, data.labels.gesture)
                row["log_loss"] = log_loss(p, data.labels.gesture)
                row["ece"] = float(np.nansum(np.abs(sure - right) * n) / n.sum())
            rows.append(row | {"difference": with_interval(found - scores["blend", "nested"])})
    return rows


def blend_members(oof: Oof, plan: Sequence[PlanItem], data: TrainingData, cfg: Config) -> Rows:
    """Find and write ensemble/weights.json and oof/scores.json, or read what was found for the same
    rows and settings; the lines of the result table."""
    labels, subject = data.labels, data.inputs.rec.subject
    items = [item for item in plan if item.action != "skip"]
    digests = {f"{i.member}/{i.mode}": bundle_digest(i.folder, i.stems) for i in items}
    used = [f.name for f in dataclasses.fields(cfg) if re.match("ensemble_|subject_|seed", f.name)]
    about = digests, data.wearer, [str(getattr(cfg, name)) for name in used]
    of = digest(*oof.values(), data.fold, labels.composite, labels.table, subject, *about)
    modes = [mode for mode in ROUTES if any(pair[1] == mode for pair in oof)]
    path, weights = cfg.out / "oof" / "scores.json", cfg.out / "ensemble" / "weights.json"
    files = [weights, *(path.with_name(f"oof_blend_{mode}_proba.npy") for mode in modes)]
    with contextlib.suppress(DataError, LookupError, TypeError, OSError):
        held = read_json(path)
        if held["of"] == [of, *(digest(file.read_bytes()) for file in files)]:
            return list(held["rows"])
    blends, probas, assigned = {}, {}, {}
    for mode in modes:
        blends[mode], probas[mode], assigned[mode] = blend_mode(mode, oof, data, cfg)
    rows = score_lines(probas, assigned, data, cfg)
    gains = {r["mode"]: r["difference"]["score"] for r in rows if r["kind"] == "assigned"}
    secs = {m: sum(sum(i.model_secs()) for i in items if i.member == m) for m in MEMBERS}
    for row in rows:
        row["secs"] = secs.get(row["name"]) or None
    write_json(weights, {
        "modes": {mode: dataclasses.asdict(blend) for mode, blend in blends.items()},
        "labels": labels.table.tolist(), "capacity": label_capacities(subject, labels).tolist(),
        "assignment": {mode: uses_assignment(gains[mode] > 0, cfg) for mode in blends},
        "digests": digests, "wearer": data.wearer,
    })  # fmt: skip
    write_json(path, {"rows": rows, "of": [of, *(digest(file.read_bytes()) for file in files)]})
    return rows


# %% [markdown]
# ## 14 Report
#
# In: the files of a run. Out: report/index.html, which says how good the run was, where it errs and
# what it cost, in one file that loads nothing. A part is a function whose docstring is its title
# and its text on the page. It is written last of all, so that no mishap in it can cost a run.

# %%
GOLD_RUN = {  # F1 by class on the real data: one run of a gold-medal team
    "all": ".80 .66 .50 .61 .73 .83 .65 .72 .98",
    "imu": ".62 .53 .43 .55 .64 .78 .55 .66 .97",
}
TOP_FEATURES, GALLERY_MISTAKES, GALLERY_RIGHT = 40, 18, 6
COLOURS = ("#0072B2", "#E69F00", "#009E73")  # Okabe and Ito
PICTURE_STYLE = {  # margins are given: a layout that finds them by itself takes twice as long
    **{"figure.figsize": (4.2, 4.2), "savefig.dpi": 130, "savefig.transparent": True},
    **{"figure.subplot.left": 0.16, "figure.subplot.right": 0.97, "figure.subplot.top": 0.93},
    **{"axes.titlesize": 8, "axes.titley": 1, "font.size": 8.5, "legend.frameon": False},
    **{"axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.2, "lines.markersize": 3},
}
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><title>CMI: the run</title>
<meta name="viewport" content="width=device-width,initial-scale=1"/><link rel="icon" href="data:,"/>
<style>
:root{color-scheme:light dark;background:Canvas;font:15px/1.5 system-ui}
@media(prefers-color-scheme:dark){img{filter:invert(1) hue-rotate(180deg)}}
body{max-width:1100px;margin:20px auto;padding:0 16px}
p{max-width:72ch;overflow-wrap:anywhere}
span,article{display:inline-block;margin-right:24px;vertical-align:top}
span b{display:block;font-size:1.5rem}
article{width:min(100%,330px)}
img{display:block;width:100%;max-width:520px}
.scroll{overflow-x:auto;margin:12px 0;background:
 linear-gradient(270deg,Canvas 30px,#0000) 100%/60px 100% no-repeat local,
 linear-gradient(270deg,#8888,#0000) 100%/16px 100% no-repeat}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
section,td,th{border-top:1px solid #8885}
td,th{padding:3px 12px 3px 0;text-align:left;vertical-align:top;white-space:pre-line}
td:first-child{position:sticky;left:0;background:Canvas;min-width:7em}
td div{min-width:14em;overflow-wrap:anywhere}
summary{white-space:nowrap}
td i{display:block;min-width:1.6em;margin-right:-8px;font-style:normal;text-align:right}
</style></head><body>
"""


@contextlib.contextmanager
def leaving_out(what: object, cfg: Config) -> Iterator[None]:
    """What fails within is left out with a warning; with STRICT=1 it is an error."""
    try:
        yield
    except Exception as error:  # packages have errors that derive from nothing narrower
        if cfg.strict:
            raise
        log("warning", left_out=what, why=f"{error!r:.300}")


@dataclass(frozen=True, eq=False)
class Outcome:
    """A training run as the report sees it: what it is handed, and what it reads from the files."""

    rec: Recordings  # canonical
    labels: Labels
    fold: I64  # (N)
    cfg: Config

    @functools.cached_property
    def proba(self) -> dict[str, F32]:
        """Out-of-fold gesture probabilities of "blend/all" (nested), "lgbm/imu", … (N, K) each"""
        blends = read_json(self.cfg.out / "ensemble" / "weights.json")["modes"]
        parts = [p for m in MODES if m in blends for p in (f"blend/{m}", *blends[m]["parts"])]
        files = {p: self.cfg.out / "oof" / f"oof_{p.replace('/', '_')}_proba.npy" for p in parts}
        return {part: np.load(path, allow_pickle=False) for part, path in files.items()}

    @property
    def modes(self) -> list[str]:
        """All and imu, or one of them; figures that are of one mode are of the first."""
        return [mode for mode in MODES if f"blend/{mode}" in self.proba]


class Html(str):
    """Text that is HTML already; all other text is escaped when it is shown."""


def cell_html(value: object) -> str:
    """What a table shows of a value; long texts ask for room."""
    if isinstance(value, Html):
        return value
    if isinstance(value, (list, dict)):
        return "\u00a0".join(map(cell_html, value.values() if isinstance(value, dict) else value))
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
    text = "–" if value is None else html.escape(str(value))
    return f"<div>{text}</div>" if len(text) > 50 else text


def table_html(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows under the names of their values, in a box that scrolls by itself on a narrow page."""
    head = "".join(f"<th>{html.escape(n.replace('_', ' '))}</th>" for row in rows[:1] for n in row)
    lines = ["".join(f"<td>{cell_html(value)}</td>" for value in row.values()) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in (head, *lines))
    return f'<div class="scroll"><table>{body}</table></div>'


def bar_html(begin: float, end: float, colour: str = COLOURS[0]) -> Html:
    """A cell with a bar between two shares of its width."""
    stops = f"#0000 {begin:.1%},{colour} 0 {max(end, begin + 0.005):.1%},#0000 0"
    return Html(f'<div style="background:linear-gradient(90deg,{stops})">\u00a0</div>')


def fold_away(title: str, content: str) -> Html:
    """What a click opens."""
    return Html(f"<details><summary>{html.escape(title)}</summary>{content}</details>")


def image_html(figure: Any, alt: str) -> str:
    """A figure inside the page, its legend above, and words that stand for it."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="upper left", ncols=4)
    figure.savefig(file := io.BytesIO(), format="png")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"/>'


def show_result(run: Outcome) -> str:
    """Result. The competition's score of out-of-fold rows; low and high bound its 95 % interval.
    Mixed is the mean of all and imu. Optimistic weights were found on the rows that they are scored
    on, nested ones on the other folds; a second word is another way to search them. Assigned: with
    labels given to each subject's recordings together. ECE: the error of calibration. Seconds: of
    training, all modes. Difference: to the nested blend, and its bounds. On the real data: private
    board, first .886, gold .858, silver .833, median .798; teams' mixed cross-validation .012 to
    .025 above it; LightGBM on IMU statistics .704, plain 1-D CNN .731 (imu), .816 (all), second
    place's network .832, .891, with assignment .865, .921."""
    weights = [
        {"mode": mode, "part": part, "exponent in the product of probabilities": weight}
        for mode, blend in read_json(run.cfg.out / "ensemble" / "weights.json")["modes"].items()
        for part, weight in zip(blend["parts"], blend["weights"], strict=True)
    ]
    rows = read_json(run.cfg.out / "oof" / "scores.json")["rows"]
    return table_html(rows) + fold_away("Ensemble weights", table_html(weights))


def show_subjects(run: Outcome) -> str:
    """Subjects. A dot for each, the score of its recordings, nested blend, all sensors. Accuracy is
    over the 18 gestures. The worst come first."""
    truth, tables = run.labels.gesture, []
    answer = run.proba[f"blend/{run.modes[0]}"].argmax(axis=1)
    places = np.array(ORIENTATIONS)[run.labels.orientation]
    for name, group in {"orientation": places, "subject": run.rec.subject}.items():
        rows: list[dict[str, Any]] = []
        for value in np.unique(group):
            t, a = truth[group == value], answer[group == value]
            figures = {"recordings": len(t), "accuracy": np.mean(t == a), "score": score(t, a)}
            rows.append({name: value, **figures})
        rows.sort(key=lambda row: float(row["score"]))
        tables.append(table_html(rows))
    folds = [run.fold[run.rec.subject == row["subject"]][0] for row in rows]
    axes = mpl_figure.Figure(figsize=(4.2, 3)).subplots()
    axes.scatter([row["score"] for row in rows], folds, 30)
    axes.set(ylabel="fold", yticks=range(run.cfg.n_folds))
    image = image_html(axes.figure, "Score of each subject, by fold")
    return image + tables[0] + fold_away("Each subject", tables[1])


def show_classes(run: Outcome) -> str:
    """F1 and confusion. Nested blend, recordings by true gesture (rows) and answer (columns). Blue
    is right, orange wrong. To the score, 9 to 18 are one class: errors among them cost nothing, and
    they share an F1. The gold run scored .855 (all) and .810 (imu) on the real data."""
    truth, n, tables = run.labels.gesture, len(GESTURES), []
    for mode in run.modes:
        answer, rows = run.proba[f"blend/{mode}"].argmax(axis=1), []
        nine = count_classes(truth, answer)[0]
        sides = nine.sum(axis=0) + nine.sum(axis=1)
        f1 = [2 * nine[k, k] / total if total else None for k, total in enumerate(sides)]
        counts = np.bincount(n * truth + answer, minlength=n * n).reshape(n, n)
        for i, total in enumerate(counts.sum(axis=1)):
            k = min(i, NON_TARGET)
            known = {"recordings": total, "F1": f1[k], "gold run": GOLD_RUN[mode].split()[k]}
            rows.append({"": f"{i + 1} {GESTURES[i]}", **known})
            for j, share in enumerate(counts[i] / max(total, 1)):
                tint = f"rgba({'0,114,178' if i == j else '213,94,0'},{0.6 * share:.2f})"
                rows[i][str(j + 1)] = Html(f'<i style="background:{tint}">{counts[i, j] or ""}</i>')
        tables.append(table_html(rows))
    return tables[0] + "".join(fold_away("imu mode", table) for table in tables[1:])


def show_calibration(run: Outcome) -> str:
    """Calibration. How often an answer of the nested blend is right that was given with some
    confidence. On the dotted line confidence is honest, above it too modest. Larger marks stand for
    more recordings. The ECE of each part, in the first table, is the mean distance from it."""
    axes = mpl_figure.Figure().subplots()
    axes.plot([0, 1], [0, 1], "k:")
    for mode, colour in zip(run.modes, COLOURS, strict=False):
        sure, right, n = reliability(run.proba[f"blend/{mode}"], run.labels.gesture)
        axes.plot(sure[n > 0], right[n > 0], color=colour)
        axes.scatter(sure, right, 8 + 120 * n / n.sum(), color=colour, label=mode)
    axes.set(xlabel="confidence", ylabel="share of right answers")
    return image_html(axes.figure, "Share of right answers by confidence")


def show_curves(run: Outcome) -> str:
    """Learning curves. A thin line for each fold: the score of its validation rows above; below it
    their loss, and dotted the loss of training. A step is an epoch, or a round of LightGBM."""
    drawn, dashes = "", {"score": ".-", "val_loss": ".-", "train_loss": ".:"}
    for member in dict.fromkeys(part.split("/")[0] for part in run.proba):
        upper, lower = mpl_figure.Figure().subplots(2, sharex=True)
        paths = sorted((run.cfg.out / f"{member}_models").glob("*/fold*_train.csv"))
        for path in (path for path in paths if int(path.name[4:6]) < run.cfg.n_folds):
            curve, mode = read_csv(path).cast(pl.Float64), path.parent.name
            label = mode if path.name == "fold00_train.csv" else None  # once in the legend
            for name, dash in dashes.items():
                axes, colour = upper if name == "score" else lower, COLOURS[ROUTES.index(mode)]
                axes.plot(curve.to_series(), curve[name], dash, color=colour, label=label)
        upper.set(ylabel="score")
        lower.set(ylabel="loss (dotted: training)", xlabel="step")
        if paths:
            image = image_html(upper.figure, f"Training of {member}")
            drawn += f"<article><b>{member}</b>{image}</article>"
    return drawn or "There are no curves here: the models were trained elsewhere."


def show_features(run: Outcome) -> str:
    """Features. The largest gains with all sensors, mean and standard deviation over the folds."""
    path, mode = run.cfg.out / "feature_importance.csv", run.modes[0]
    if f"lgbm/{mode}" not in run.proba or not path.is_file():
        return "No member of this run tells how much its features gained."
    best = read_csv(path).filter(pl.col("mode") == mode).sort("gain_mean", descending=True)
    numbers = pl.col("gain_mean", "gain_std").cast(pl.Float64).fill_null(0)
    known, rows = {name: f"{unit}: {text}" for name, unit, text in feature_help()}, []
    for name, gain, spread in best.select("feature", numbers).head(TOP_FEATURES).iter_rows():
        about = fold_away(name, html.escape(known.get(name, "")))
        bar = bar_html(0, gain / best["gain_mean"].max())
        rows.append({"feature": about, "": bar, "gain": gain, "± sd": spread})
    return table_html(rows)


def recording_html(rec: Recordings, performed: Bool) -> str:
    """Acceleration, angular velocity and ToF images of one recording; the gesture is shaded."""
    rows = np.flatnonzero(performed) if performed.any() else np.arange(len(performed))
    moments = np.r_[rows[0] // 2, np.linspace(rows[0], rows[-1], 7)].round().astype(np.int64)
    seconds = np.arange(len(performed)) * SAMPLE_PERIOD
    *upper, lower = mpl_figure.Figure().subplots(3, height_ratios=(1, 1, 2.2))
    signals: Any = ("m/s²", rec.acc), ("rad/s", wrist_motion(rec)["omega"])
    for axes, (unit, signal) in zip(upper, signals, strict=True):
        axes.axvspan(seconds[rows[0]], seconds[rows[-1]], color="#888", alpha=0.2, lw=0)
        for values, colour, name in zip(signal.T, COLOURS, "xyz", strict=True):
            axes.plot(seconds, values, color=colour, label=name)
        low, high = axes.get_ylim()
        axes.plot(seconds[moments], np.full(8, low), "k^")
        axes.set(title=f"{low:.1f} to {high:.1f} {unit}", xlim=(0, seconds[-1] or 1))
    tof = np.where(rec.tof == MISSING, np.nan, rec.tof)[moments]
    tiles = np.pad(tof, [(0, 0), (0, 0), (0, 1), (0, 1)], constant_values=np.nan)  # (8, 5, 9, 9)
    scale = matplotlib.colormaps["cividis"].with_extremes(over="#8884", bad="#0000")
    lower.imshow(tiles.transpose(1, 2, 0, 3).reshape(45, 72), scale, vmin=0, vmax=FARTHEST)
    times = " ".join(f"{t:.1f}" for t in seconds[moments])
    lower.set(title=f"ToF 1 to 5, downwards, at {times} s")
    for axes in lower.figure.axes:
        axes.axis("off")  # ticks would take most of the time
    return image_html(lower.figure, f"Motion and ToF of {rec.sequence_id[0]}")


def show_gallery(run: Outcome) -> str:
    """Gallery. The mistakes that cost score, the most confident first (truth → answer), then right
    answers by lot; as the members see them, left-handers mirrored. Shaded: the gesture. Triangles:
    the moments of the ToF images, near blue, far yellow, nothing in range grey, missing blank.
    Below: the three likeliest gestures of the nested blend and of each member, the true one ✓."""
    labels, truth, nested = run.labels, run.labels.gesture, run.proba[f"blend/{run.modes[0]}"]
    answer = nested.argmax(axis=1)
    wrong = np.flatnonzero(np.minimum(truth, NON_TARGET) != np.minimum(answer, NON_TARGET))
    wrong = wrong[np.argsort(-nested.max(axis=1)[wrong], kind="stable")]
    right = rng_for(run.cfg, "gallery").permutation(np.flatnonzero(truth == answer))
    chosen = [*wrong[:GALLERY_MISTAKES], *right[:GALLERY_RIGHT]]
    parts, cards = {p: proba for p, proba in run.proba.items() if p.endswith(run.modes[0])}, ""
    for i in map(int, chosen):
        rec, rows = run.rec.part(i, i + 1), []
        for part, proba in parts.items():
            best = np.argsort(-proba[i], kind="stable")[:3]
            texts = [f"{GESTURES[g]} {proba[i, g]:.2f}{' ✓' * int(g == truth[i])}" for g in best]
            rows.append({"": part, "likeliest": "\n".join(texts)})
        performed = labels.phase[run.rec.start[i] : run.rec.start[i + 1]] > 0
        title = " → ".join(GESTURES[g] for g in dict.fromkeys((truth[i], answer[i])))
        about = (rec.sequence_id[0], rec.subject[0], ORIENTATIONS[labels.orientation[i]])
        text = html.escape(" · ".join((*about, f"{len(performed)} rows")))
        drawn = recording_html(rec, performed) + table_html(rows)
        cards += f"<article><b>{title}</b><p>{text}</p>{drawn}</article>"
    return fold_away(f"{len(chosen)} recordings", cards)


def show_timeline(cfg: Config) -> str:
    """Time line. Seconds since the start, most memory held until a stage's end; grey: reused."""
    whole, rows = max((s["begin"] + s["secs"] for s in STAGES), default=1), []
    for s in STAGES:
        colour = "#9aa0a6" if s["note"] else COLOURS[0]
        begin, end = s["begin"] / whole, (s["begin"] + s["secs"]) / whole
        bar = bar_html(min(begin, 0.98), max(end, begin + 0.02), colour)  # short ones are seen too
        rows.append({"name": s["name"], "": bar, **s})
    return table_html(rows)


def read_submission(cfg: Config) -> tuple[pl.DataFrame, float | None]:
    """What was answered, and its own score where the truth lies beside the test file, as in a
    simulation."""
    given = pl.read_parquet((cfg.out / "submission.parquet").read_bytes())
    if not (truth_path := cfg.data_dir / "test_truth.csv").is_file():
        return given, None
    truth = dict(read_csv(truth_path).select("sequence_id", "gesture").iter_rows())
    pairs = [(truth[i], gesture) for i, gesture in given.iter_rows() if i in truth]
    codes = np.array([[*map(GESTURES.index, pair)] for pair in pairs], np.int64)
    return given, score(*codes.reshape(-1, 2).T)


def show_submission(cfg: Config) -> str:
    """Submission. What was answered about the test recordings: by gesture, and the first rows."""
    if not (cfg.out / "submission.parquet").is_file():
        return "No submission.parquet: nothing was served."
    given, value = read_submission(cfg)
    counts = collections.Counter(given["gesture"])
    bars = {g: bar_html(0, counts[g] / max(counts.values(), default=1)) for g in GESTURES}
    rows = [{"gesture": g, "answers": counts[g], "": bar} for g, bar in bars.items()]
    text = f"{len(given):,} rows" + (f", score {value:.4f}" if value is not None else "")
    return text + table_html(rows) + table_html(given.head(5).to_dicts())


def show_setup(cfg: Config) -> str:
    """Set-up. Settings that differ from their defaults, versions, the machine."""
    rows = []
    for f in dataclasses.fields(cfg):
        values = {"value": shown(getattr(cfg, f.name)), "default": shown(f.default)}
        rows.append({"setting": f.name.upper(), **values, "meaning": f.metadata["help"]})
    changed = table_html([row for row in rows if row["value"] != row["default"]])
    packages = (package for member in MEMBERS.values() for package in member.packages)
    names = dict.fromkeys(("numpy", "polars", "scipy", *packages, "matplotlib", "grpcio"))
    here = {"machine": f"{platform.platform()}, {machine_name()}"}
    here |= {"python": platform.python_version()}
    here |= {name: package_version(name) or "not installed" for name in names}
    about = table_html([{"": name, "here": value} for name, value in here.items()])
    return changed + fold_away("All settings", table_html(rows)) + about


def report_html(run: Outcome | None, cfg: Config) -> str:
    """The whole page: the figures that matter, what should be known of them, and all parts."""
    about, tiles, notices = f"{time.strftime('%Y-%m-%d %H:%M %Z')} · {cfg.data_dir}", "", ""
    if run:
        n = len(np.unique(run.rec.subject))
        about += f" · {len(run.rec):,} recordings, {n} subjects, {cfg.n_folds} folds"
        for row in read_json(cfg.out / "oof" / "scores.json")["rows"]:
            if row["kind"] in ("nested", "assigned") and row["mode"] != NO_ROTATION:
                tiles += f"<span><b>{row['score']:.4f}</b>{row['kind']}, {row['mode']}</span>"
    else:
        notices = "Nothing was trained or scored: no train.csv there, or SERVE_ONLY=1. "
    if (cfg.data_dir / "test_truth.csv").is_file():  # the simulator alone tells the truth
        notices += "Simulated data: the scores compare parts, they promise no board."
    of_run: list[Any] = [show_result, show_subjects, show_classes, show_calibration, show_curves]
    of_run += [show_features, show_gallery]
    parts: list[Any] = [(part, run) for part in of_run if run]
    parts += [(part, cfg) for part in (show_timeline, show_submission, show_setup)]
    links, sections = [], ""
    for i, (part, given) in enumerate(parts):
        title, text = str(part.__doc__).split(". ", 1)
        links.append(f'<a href="#part{i}">{title}</a>')
        sections += f'<section id="part{i}"><h2>{title}</h2><p>{text}</p>{part(given)}</section>'
    head = f"<header><h1>Gestures from a wrist sensor: the run</h1><p>{html.escape(about)}</p>"
    nav = f"<p><b>{notices}</b></p>{tiles}</header><nav>{' · '.join(links)}</nav>"
    return f"{HEAD}{head}{nav}{sections}</body></html>\n"


def write_report(run: Outcome | None, cfg: Config) -> None:
    """report/index.html, shown in a notebook as well; a failure is an error with STRICT=1 only."""
    path = cfg.out / "report" / "index.html"
    with leaving_out(path, cfg), matplotlib.rc_context(PICTURE_STYLE):
        write_whole(path, page := report_html(run, cfg))
        say(f"report      {path}, {len(page) / 2**20:.1f} MB")
        notebook = sys.modules.get("IPython")
        if notebook and notebook.get_ipython():  # in a frame, so that its styles stay apart
            frame = [f'srcdoc="{html.escape(page)}"']
            notebook.display.display(notebook.display.IFrame("", "100%", 800, extras=frame))


# %% [markdown]
# ## 15 Serving
#
# In: one recording at a time, in random order, from the gateway. Out: a gesture. Models are read
# while the server starts, which must be up within 15 minutes; the first answer, which waits for
# them, has no deadline. predict never raises; if it falls back, it logs the cause and counts.

# %%
FALLBACK = "Text on phone"  # as common as any gesture of the training data
PATIENCE_WITH_A_MEMBER = 3  # failures in a row after which it is asked no more
FALLBACKS_ALLOWED = 0.1  # share of a local run's answers; more is an error
Found = dict[str, tuple[Path, list[str], I64]]  # by "member/mode": folder, stems, label table
PREDICTOR: list[Predictor] = []  # that answers in this process


def label_table(labels: Any) -> I64:
    """Composite labels from a bundle. → (L, 3)"""
    table, ends = np.array(labels), (len(BEHAVIORS), len(ORIENTATIONS), len(GESTURES))
    if table.dtype != np.int64 or table.shape[1:] != (3,) or ((table < 0) | (table >= ends)).any():
        raise ValueError(f"labels are no rows of three codes: {labels!r:.80}")
    return table


@dataclass(frozen=True, slots=True)
class Ensemble:
    """What weights.json holds: how the members' answers become one. And the members' models."""

    blends: dict[str, Blend]  # by mode
    table: I64  # (L, 3)
    capacity: I64  # (L) how often a wearer does each label at most
    assigned: dict[str, bool]  # by mode: are labels assigned per subject?
    digests: dict[str, str]  # by "member/mode": the models that the weights were found for
    wearer: dict[str, Any] | None  # tells a device that is worn upside down
    models: dict[str, Any] = dataclasses.field(default_factory=dict)  # by "member/mode"

    @classmethod
    def read(cls, path: Path) -> Ensemble:
        """weights.json, checked."""
        with refusing(path, "holds no weights of this file"):
            held = read_json(path)
            table, times = label_table(held["labels"]), np.array(held["capacity"], np.int64)
            blends = {
                mode: Blend(tuple(map(str, b["parts"])), tuple(map(float, b["weights"])))
                for mode, b in held["modes"].items()
            }
            weights = [w for b in blends.values() for w in b.weights]
            wearer = held["wearer"]
            known = [wearer["prior"], *wearer["coefficients"]] if wearer else [0.0] * (1 + N_ODD)
            good = blends and set(blends) <= set(ROUTES) and all(0 <= w < np.inf for w in weights)
            good = good and all(len(b.parts) == len(b.weights) for b in blends.values())
            good = good and times.shape == (len(table),) and 0 < times.min() <= times.max() < 1000
            if not (good and len(known) == 1 + N_ODD and np.isfinite(known).all()):
                raise ValueError("modes, weights, capacity or wearer cannot be right")
            assigned, digests = dict(held["assignment"]), dict(held["digests"])
            return cls(blends, table, times, assigned, digests, wearer)


def find_ensemble(cfg: Config) -> Ensemble | None:
    """The first usable weights.json: of this run, beside the named bundles, attached."""
    named = [n for m in MEMBERS if (n := getattr(cfg, f"{m}_bundle_path"))]
    beside = [cfg.out, *(p for n in named for p in (n.parent, n.parent.parent))]
    folders = (*(b / "ensemble" for b in beside), *find_below(KAGGLE_INPUT, "ensemble"))
    paths = [path for f in dict.fromkeys(folders) if (path := f / "weights.json").is_file()]
    for i, path in enumerate(paths):
        with leaving_out(path, cfg):
            ensemble, others = Ensemble.read(path), ", ".join(map(str, paths[i + 1 :]))
            log("note" if others else "weights", weights=path, passed_over=others)
            return ensemble
    return None


def usable_models(folder: Path, ends: Sequence[str]) -> Found:
    """By mode, the models of a bundle all of whose files are as they were written."""
    path, whole = folder / "bundle.json", {}
    if not path.is_file():
        return {}
    with refusing(path, "is no bundle of this file"):
        bundle = read_json(path)
        modes, table = dict(bundle["modes"]), label_table(bundle["labels"])
        for stem in itertools.chain(*modes.values()):
            if not re.fullmatch(r"fold[0-9]{2}(_seed[0-9]+)?", stem):
                raise ValueError(f"it names a file that no run writes: {stem!r:.100}")
    for mode, stems in ((m, list(s)) for m, s in modes.items() if m in ROUTES and s):
        if spoilt := [n for stem in stems if (n := spoilt_file(folder / mode, stem, ends))]:
            log("warning", left_out=folder / mode, why=f"{spoilt[0]} is absent or was changed")
        else:
            whole[mode] = (folder / mode, stems, table)
    return whole


def find_models(cfg: Config, digests: Mapping[str, str]) -> Found:
    """Usable models: of several bundles the one that the weights were found for, else the first."""
    found: Found = {}
    for member in (m for m in MEMBERS if not why_absent(m, cfg)):
        for folder in bundle_folders(member, cfg):
            with leaving_out(folder, cfg):
                for mode, models in usable_models(folder, MEMBERS[member].files).items():
                    part = f"{member}/{mode}"
                    if part not in found or bundle_digest(*models[:2]) == digests.get(part):
                        found[part] = models
    return found


def blends_of(models: Collection[str], blends: dict[str, Blend], cfg: Config) -> dict[str, Blend]:
    """By mode, the blends in which some model has a part, else the members' default weights; with
    the shares that settings fix, the sum of weights as it was."""
    served = {mode: blend for mode, blend in blends.items() if set(blend.parts) & set(models)}
    if not served:
        weights = tuple(member.default_weight for member in MEMBERS.values())
        modes = [mode for mode in ROUTES if any(part.endswith(f"/{mode}") for part in models)]
        served = {mode: Blend(tuple(f"{m}/{mode}" for m in MEMBERS), weights) for mode in modes}
    for mode, blend in served.items():
        with leaving_out(f"fixed weights in {mode}", cfg):
            if (shares := fixed_shares(blend.parts, cfg)) is not None:
                scale = 1 / (cfg.ensemble_temperature or 1 / sum(blend.weights))
                served[mode] = Blend(blend.parts, tuple((shares * scale).tolist()))
    return served


def load_models(cfg: Config) -> Ensemble:
    """Read what is needed to answer; an error if there is no model at all."""
    began, ensemble = time.monotonic(), find_ensemble(cfg)
    found, models = find_models(cfg, ensemble.digests if ensemble else {}), {}
    tables = [ensemble.table] if ensemble else [labels for *_, labels in found.values()]
    for part, (folder, stems, labels) in found.items():
        with leaving_out(part, cfg):
            if not np.array_equal(labels, tables[0]):
                raise DataError("its labels differ from the ensemble's")
            models[part] = MEMBERS[part.split("/")[0]].load(folder, stems, labels, cfg)
    if not models:
        seen = f"{', '.join(found)} cannot be used, see above" if found else "there is none"
        advice = "Train first, or point LGBM_, TORCH_ or KERAS_BUNDLE_PATH at a bundle"
        raise DataError(f"No model in {cfg.out} or attached: {seen}. {advice}.")
    log("loaded", models=",".join(models), weights="weights.json" if ensemble else "defaults",
        secs=time.monotonic() - began,
        folders=",".join(str(folder) for folder, *_ in found.values()))  # fmt: skip
    once = np.ones(len(tables[0]), np.int64)
    ensemble = ensemble or Ensemble({}, tables[0], once, {}, {}, None)
    blends = blends_of(models, ensemble.blends, cfg)
    return dataclasses.replace(ensemble, blends=blends, models=models)


class Predictor:
    """Answers one recording at a time; remembers what each wearer has been seen to do."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(len(MEMBERS), "member")
        self.loading: Future[Ensemble] | None = None
        self.assignments: dict[str, Assignment] = {}
        self.evidence: dict[str, dict[str, float]] = {}  # subject → recording → log odds
        self.answers: dict[str, F32] = {}  # by content of the recording, the latest last
        self.calls = self.unanswered = 0  # in all; by FALLBACK
        self.fallbacks = collections.Counter[str]()
        self.failures = collections.Counter[str]()  # in a row, by "member/mode"

    def start_loading(self) -> Future[Ensemble]:
        """Read the models in a thread, once; what fails fails in every answer."""
        self.loading = self.loading or self.pool.submit(self.load)
        return self.loading

    def load(self) -> Ensemble:
        """Without any model LightGBM is trained in the re-run: the first call has no deadline."""
        try:
            return load_models(self.cfg)
        except DataError as error:
            if not self.cfg.rerun or self.cfg.serve_only:
                raise
            log("warning", no_bundle=str(error), instead="training LightGBM in this first call")
            alone: dict[str, Any] = {f"use_{m}": m == "lgbm" for m in MEMBERS}
            train_all(dataclasses.replace(self.cfg, **alone))
            return load_models(self.cfg)

    @property
    def ensemble(self) -> Ensemble:
        return self.start_loading().result()

    def predict(self, sequence: pl.DataFrame, demographics: pl.DataFrame) -> str:
        """Gesture of a recording: always one of the 18 strings, a plain str."""
        with self.lock:
            self.calls += 1
            try:
                return GESTURES[self.gesture(sequence, demographics)]
            except Exception as error:
                if self.cfg.strict:
                    raise
                cause = f"{type(error).__name__}: {error}"[:200]
                self.fallbacks[cause] += 1
                self.unanswered += 1
                log("fallback", count=self.unanswered, of=self.calls, answer=FALLBACK)
                if self.fallbacks[cause] == 1:
                    traceback.print_exc()
                return FALLBACK

    def predict_proba(self, sequence: pl.DataFrame, demographics: pl.DataFrame) -> dict[str, float]:
        """Probability of each gesture, before any assignment; raises where predict falls back."""
        with self.lock:
            _, composite = self.composite(sequence, demographics)
            proba = gesture_proba(composite, self.ensemble.table)
        return dict(zip(GESTURES, proba[0].tolist(), strict=True))

    def gesture(self, sequence: pl.DataFrame, demographics: pl.DataFrame) -> int:
        """Code of the gesture of one recording."""
        ensemble, (rec, composite) = self.ensemble, self.composite(sequence, demographics)
        gained = ensemble.assigned.get(route_of(rec, ensemble.blends), True)
        if not uses_assignment(gained, self.cfg):
            return int(gesture_proba(composite, ensemble.table)[0].argmax())
        fresh = Assignment(ensemble.table, ensemble.capacity)
        wearer = self.assignments.setdefault(str(rec.subject[0]), fresh)
        return wearer.gesture(str(rec.sequence_id[0]), composite[0])

    def composite(self, sequence: pl.DataFrame, person: pl.DataFrame) -> tuple[Recordings, F32]:
        """The recording that the gateway sent, and its blended composite probabilities, (1, L),
        remembered by its content."""
        if {type(sequence), type(person)} != {pl.DataFrame}:
            raise DataError(f"predict was handed {type(sequence)}: it needs two of polars.")
        if not len(sequence) or not {"sequence_id", "subject"} <= set(sequence.columns):
            some = f"{len(sequence)} rows of {sequence.columns[:4]} …"
            raise DataError(f"predict was handed {some}: it needs rows, sequence_id and subject.")
        if len(raw := to_recordings(sequence, person)) != 1:
            raise DataError(f"predict was handed {len(raw)} recordings instead of 1.")
        upside_down, blends = self.is_upside_down(raw), self.ensemble.blends
        key = digest(raw.acc, raw.rot, raw.thm, raw.tof, raw.person, upside_down)
        if (pooled := self.answers.pop(key, None)) is None:
            rec, blend = canonical(raw, np.array([upside_down])), blends[route_of(raw, blends)]
            pooled = blend.pool(self.member_probas(rec, blend))
        self.answers[key] = pooled
        while len(self.answers) > self.cfg.frame_cache_max_items:
            del self.answers[next(iter(self.answers))]
        return raw, pooled

    def member_probas(self, rec: Recordings, blend: Blend) -> dict[str, F32]:
        """Composite probabilities by every part of a blend that has weight. (1, L) each

        They are asked side by side, the slowest first. A part that fails is left out, counted and
        logged, and dropped after a few failures in a row; if all fail, the last error is raised.
        """
        known = [p for p in self.ensemble.models if self.failures[p] < PATIENCE_WITH_A_MEMBER]
        parts = {p: w for p, w in zip(blend.parts, blend.weights, strict=True) if p in known}
        asked = [p for p, w in parts.items() if w > 0] or list(parts)
        inputs = Inputs(rec, frames=any(p.split("/")[0] in NETWORKS for p in asked))
        inputs.extracted  # noqa: B018 here, not by several members at once

        def ask(part: str) -> F32:
            name, mode = part.split("/")
            x = MEMBERS[name].prepare(inputs, mode)
            return MEMBERS[name].predict(self.ensemble.models[part], x).mean(axis=0)

        asked.sort(key=lambda p: list(MEMBERS).index(p.split("/")[0]), reverse=True)
        probas, failure = {}, None
        for part, answer in {part: self.pool.submit(ask, part) for part in asked}.items():
            if error := answer.exception():
                if self.cfg.strict:
                    raise error
                failure, self.failures[part] = error, self.failures[part] + 1
                cause = f"{part}: {type(error).__name__}: {error}"[:200]
                self.fallbacks[cause] += 1
                tries = f"{self.failures[part]}/{PATIENCE_WITH_A_MEMBER}"
                log("fallback", cause=cause, in_a_row=tries)
            else:
                probas[part], self.failures[part] = answer.result(), 0
        if not probas:
            raise failure or LookupError(f"No model serves {blend.parts}.")
        return probas

    def is_upside_down(self, raw: Recordings) -> bool:
        """Does the evidence of this wearer's recordings so far say that the device is turned?"""
        wearer = self.ensemble.wearer
        if not wearer or not self.cfg.upside_down:
            return False
        logit = odd_features(canonical(raw, np.zeros(1, bool))) @ wearer["coefficients"]
        seen = self.evidence.setdefault(str(raw.subject[0]), {})
        seen[str(raw.sequence_id[0])] = float(logit[0])
        return bool(wearer["prior"] + sum(seen.values()) < 0)


def route_of(rec: Recordings, routes: Collection[str]) -> str:
    """Which of the blends answers a recording: by its rotation, then by how much of its ToF is
    missing; where there is none for that, the first."""
    if NO_ROTATION in routes and np.isnan(repair_rotation(rec.rot, rec.start)).all():
        return NO_ROTATION
    route = "imu" if (rec.tof == MISSING).mean() > 0.5 else "all"
    return route if route in routes else next(iter(routes))


def inference_server(cfg: Config) -> Any:
    """The class CMIInferenceServer: the competition's own on Kaggle, else ours beside this file."""
    places = [cfg.cmi_data_dir, *(p.parent for p in find_below(KAGGLE_INPUT, "kaggle_evaluation"))]
    extra = [str(p) for p in places if p and (p / "kaggle_evaluation").is_dir()]
    sys.path += [p for p in extra if p not in sys.path]
    module = importlib.import_module("kaggle_evaluation.cmi_inference_server")
    others = [path for path in extra if not str(module.__file__).startswith(path)]
    log("gateway", module=module.__file__, passed_over=",".join(others))
    return module.CMIInferenceServer


def predict(sequence: pl.DataFrame, demographics: pl.DataFrame) -> str:
    """Gesture of one recording, as the gateway asks; by itself, of models the environment names."""
    if not PREDICTOR:
        PREDICTOR.append(Predictor(Config.from_env(environment())))
    return PREDICTOR[0].predict(sequence, demographics)


def serve(cfg: Config) -> None:
    """Answer the hidden test in the re-run; elsewhere a local gateway asks about the test files."""
    PREDICTOR[:] = [predictor := Predictor(cfg)]
    server = inference_server(cfg)(predict)
    predictor.start_loading()
    if cfg.rerun:
        say("serving     the hidden test, as KAGGLE_IS_COMPETITION_RERUN is set, until it is over")
        server.serve()
        return
    files = tuple(str(cfg.data_dir / name) for name in TEST_FILES)
    ours = sys.modules.get("kaggle_evaluation.core.progress")  # its lines become lines of this run
    with stage("serving", cfg), contextlib.chdir(cfg.out), contextlib.ExitStack() as after:
        if ours:
            after.callback(setattr, ours, "log", ours.log)
            vars(ours).update(log=lambda what, text="": say(f"{what:<12} {text}"))
        server.run_local_gateway(files)  # writes submission.parquet
    count, calls = predictor.unanswered, predictor.calls
    causes = "; ".join(f"{n} × {cause}" for cause, n in predictor.fallbacks.most_common(3))
    log("served", recordings=calls, fallbacks=count, causes=causes)
    if count > FALLBACKS_ALLOWED * calls:
        raise DataError(f"{count} fallbacks in {calls} answers of this local run: {causes}")


# %% [markdown]
# ## 16 Entry
#
# In: the environment and arguments. Out: everything. Off Kaggle, without CMI_DATA_DIR, a small data
# set is simulated and takes the same road.


# %%
DEMO = {"n_folds": 3, "fixed_pad_len": 90, "torch_max_epochs": 9, "keras_max_epochs": 9}
COMPETITION = "cmi-detect-behavior-with-sensor-data"


def find_data(cfg: Config) -> Path | None:
    """The competition's folder: named, or attached below /kaggle/input; None: there is none."""
    if folder := cfg.cmi_data_dir:
        if absent := [name for name in TEST_FILES if not (folder / name).is_file()]:
            zipped = " Unpack the .zip there." if [*folder.glob("*.zip")] else ""
            raise ConfigError(f"CMI_DATA_DIR={folder}: looked for {absent[0]}, in vain.{zipped}")
        return folder
    found = [path.parent for path in find_below(KAGGLE_INPUT, TEST_FILES[0])]
    real = [f for f in found if not f.name.startswith("simulated-")]  # of a bundle
    whole = [f for f in real if all((f / name).is_file() for name in TEST_FILES)]
    whole.sort(key=lambda f: (COMPETITION not in f.parts, not (f / "kaggle_evaluation").is_dir()))
    for other in (f for f in found if f not in whole[:1]):
        say(f"passed over: {other} is {'not the competition' if whole else 'incomplete'}")
    attached = ", ".join(sorted(path.name for path in KAGGLE_INPUT.glob("*"))[:10]) or "nothing"
    if KAGGLE_INPUT.is_dir() and not whole and not cfg.rerun:
        files = f"{' and '.join(TEST_FILES)}; attached: {attached}. Attach the competition's data"
        raise DataError(f"No folder below {KAGGLE_INPUT} holds {files}, or set CMI_DATA_DIR.")
    return whole[0] if whole else None


def simulated(cfg: Config) -> Path:
    """A small simulated data set in the competition's schema, made once."""
    size: dict[str, Any] = {"subjects": cfg.sim_subjects, "test_subjects": cfg.sim_test_subjects}
    size |= {"recordings_per_subject": cfg.sim_recordings, "seed": cfg.seed}
    try:
        simulator = importlib.import_module("cmi_simulator")
    except ImportError:
        advice = "set CMI_DATA_DIR, or keep cmi_simulator.py beside this file"
        raise DataError(f"No competition data: {advice}.") from None
    folder = cfg.out / f"simulated-{digest(size, Path(simulator.__file__ or '').read_bytes())}"
    if not (folder / TEST_FILES[0]).is_file():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        with stage("simulation", cfg):
            simulator.simulate(partial, **size, log=log)
        partial.rename(folder)
    return folder


def settle(cfg: Config, env: Mapping[str, str]) -> Config:
    """Make paths absolute and find the data; without any, simulate some and train for less long."""
    folder, short = find_data(cfg), dict[str, Any]()
    if folder is None and not cfg.rerun:
        short = {name: n for name, n in DEMO.items() if name.upper() not in env}
        names = ", ".join(f"{name.upper()}={n}" for name, n in short.items())
        say(f"data        simulated: no competition data, CMI_DATA_DIR is not set; {names}")
        folder = simulated(cfg)
    given = dataclasses.asdict(cfg) | short | {"output_path": cfg.out, "cmi_data_dir": folder}
    paths: dict[str, Any] = {k: v.absolute() for k, v in given.items() if isinstance(v, Path)}
    return Config(**given | paths)


def saved_folds(rec: Recordings, cfg: Config) -> I64:
    """Folds of folds.csv if it is of these recordings and this number of folds, else new ones."""
    path = cfg.out / "folds.csv"
    try:
        saved = read_csv(path)
        fold = saved["fold"].cast(pl.Int64).to_numpy().astype(np.int64)
        if saved["sequence_id"].cast(pl.String).to_list() != rec.sequence_id.tolist():
            raise ValueError("it is of other data")
        if set(fold.tolist()) != set(range(cfg.n_folds)):
            raise ValueError(f"its folds are not 0 … {cfg.n_folds - 1}")
        if len(set(zip(rec.subject, fold, strict=True))) != len(set(rec.subject)):
            raise ValueError("some subject is in two folds")
        return fold
    except (*BAD_FILE, pl.exceptions.PolarsError) as error:
        if path.exists():
            log("warning", folds=f"{path}: {error}", instead="made anew")
    fold = make_folds(rec.subject, cfg)
    frame = pl.DataFrame({"sequence_id": rec.sequence_id, "subject": rec.subject, "fold": fold})
    write_whole(path, frame.write_csv())
    return fold


def make_training_data(cfg: Config) -> TrainingData:
    """Read the training data, find its folds, bring it into canonical form, and see in which modes
    nothing need be trained."""
    with stage("reading", cfg):
        rec, data_digest = cached_recordings(cfg.data_dir, cfg)
    assert rec.labels is not None
    fold = saved_folds(rec, cfg)
    with stage("wearer", cfg):
        upside_down, wearer = find_upside_down(rec, fold, cfg)
    found = ", ".join(np.unique(rec.subject[upside_down])) or "none"
    sizes = f"{len(rec):,} of {len(set(rec.subject))} subjects, {len(rec.acc):,} rows"
    say(f"recordings  {sizes}, {cfg.n_folds} folds; worn upside down: {found}")
    needless = {}
    if (rec.tof == MISSING).all() and np.isnan(rec.thm).all():
        needless["all"] = "no ToF and no THM in the data: imu is the same"
    if cfg.no_rotation == "0":
        needless[NO_ROTATION] = "NO_ROTATION=0"
    elif cfg.no_rotation == "auto":
        known = np.logical_or.reduceat(np.isfinite(rec.rot[:, 0]), rec.start[:-1])
        test = read_table(cfg.data_dir / TEST_FILES[0], ("sequence_id",), ROT[:1])
        of_test = test.group_by("sequence_id").agg(pl.col(ROT[0]).is_not_null().any())[ROT[0]]
        if known.all() and of_test.all():
            needless[NO_ROTATION] = "every recording has a rotation"
    present = {m for m in MEMBERS if not why_absent(m, cfg)}
    wanted = {"table": bool(present - {*NETWORKS}), "frames": bool(present & {*NETWORKS})}
    inputs = Inputs(canonical(rec, upside_down), cfg, **wanted)
    rest = digest(upside_down), wearer, needless
    return TrainingData(inputs, rec.labels, fold, data_digest, *rest)


def check_machine(plan: Sequence[PlanItem], cfg: Config) -> None:
    """Before training: is there room, and do the members that will train start?"""
    todo = collections.Counter(job.member for item in plan for job in item.todo)
    free = shutil.disk_usage(cfg.out).free / 2**20
    needed = 100 + 10 * todo.total() + (cfg.data_dir / "train.csv").stat().st_size / 2**20
    if free < needed:
        log("warning", free_mb=round(free), about_needed_mb=round(needed), folder=cfg.out)
    for name in todo:
        try:
            MEMBERS[name].start(cfg)
        except Exception as error:
            mend = f"Mend that, or USE_{name.upper()}=0."
            raise ConfigError(f"{name} does not start: {error!r:.300}. {mend}") from error
    if cfg.cmi_backend in ("dask", "ray") and cfg.cmi_workers == 1:
        log("warning", cmi_backend=cfg.cmi_backend, unused="CMI_WORKERS=1 trains in this process")
    cards = [torch.cuda.get_device_name(i) for i in working_cards()] if "torch" in todo else []
    say(f"machine     {', '.join((machine_name(), *cards))}")


def show_board(rows: Sequence[Mapping[str, Any]], served: Mapping[str, bool]) -> None:
    """The result table, a line for each kind of answer; out-of-fold rows all."""
    table = {(row["name"], row["kind"], row["mode"]): row for row in rows}
    modes = [mode for mode in (*MODES, "mixed") if any(row["mode"] == mode for row in rows)]
    heads = "".join(f"{text:<22}" for text in ("", *modes))[2:]
    say(f"{heads}{modes[-1]} − blend       training")
    assigned = [mode for mode in served if served[mode]]
    some = f" ({', '.join(assigned)})" if 0 < len(assigned) < len(served) else ""
    for name, kind in dict.fromkeys((row["name"], row["kind"]) for row in rows):
        last, text = table[name, kind, modes[-1]], f"{f'{name} {kind}':<20}"
        cells = [(table[name, kind, mode], "") for mode in modes] + [(last["difference"], "+")]
        for of, sign in cells:
            text += f"{of['score']:{sign}.3f} [{of['low']:{sign}.3f}, {of['high']:{sign}.3f}]  "
        text += duration(last["secs"]) if last["secs"] else ""
        submitted = (name, kind) == ("blend", "assigned" if assigned else "nested")
        say(text + f"← submitted{some}" * submitted)
    for mode in served:
        fair = [r for r in rows if r["mode"] == mode and r["kind"] != "optimistic"]
        best, kind = max(fair, key=lambda r: r["score"]), "assigned" if served[mode] else "nested"
        if best["score"] > table["blend", kind, mode]["score"]:
            log("note", mode=mode, better_than_what_is_submitted=f"{best['name']} {best['kind']}")


def train_all(cfg: Config) -> Outcome | None:
    """Plan, train or reuse, fill the out-of-fold rows, find the weights, print the result table."""
    data = make_training_data(cfg)
    plan = make_plan(data, cfg)
    check_machine(plan, cfg)
    show_plan(plan)
    if cfg.plan_only:
        return None
    oof = train_members(plan, data, cfg)
    with stage("blend", cfg):
        rows = blend_members(oof, plan, data, cfg)
    show_board(rows, read_json(cfg.out / "ensemble" / "weights.json")["assignment"])
    return Outcome(data.inputs.rec, data.labels, data.fold, cfg)


HELP = {"-h", "--help", "--help-features"}


def read_arguments(words: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
    """The environment with NAME=value arguments in it."""
    changed = dict(env)
    for word in (w for w in words if w not in HELP):
        name, is_setting, value = word.partition("=")
        if is_setting and name in KNOWN_NAMES:
            changed[name] = value
            continue
        near = nearest_name(name.strip("-").replace("-", "_"), 0.6)
        hint = f" Did you mean {near}=…?" if near else ""
        raise ConfigError(f"{word!r} is no argument.{hint} Write NAME=value; --help lists them.")
    return changed


def run_here(cfg: Config) -> None:
    """Off the re-run: train, or serve what is there; then the local gateway and the report. What
    would be found out late is found out first: test files, gateway, members, weights."""
    for name, needed in zip(TEST_FILES, (("sequence_id", *ACC), ()), strict=True):
        read_table(cfg.data_dir / name, ("subject", *needed), ())
    present = [f"{m}/all" for m in MEMBERS if not why_absent(m, cfg)]
    if not present:
        raise ConfigError("No member takes part: set USE_LGBM, USE_TORCH or USE_KERAS to 1.")
    fixed_shares(present, cfg)
    inference_server(cfg)
    outcome, train = None, cfg.data_dir / "train.csv"
    if train.is_file() and not cfg.serve_only:
        outcome = train_all(cfg)
    elif find_models(cfg, {}):
        why = "SERVE_ONLY=1" if cfg.serve_only else f"no {train}"
        say(f"plan        serve what is there, train nothing: {why}")
    else:
        hint = next((f" Unpack {p.name} first." for p in cfg.data_dir.glob("*.zip")), "")
        raise DataError(f"There is no {train} to train on and no model to serve.{hint}")
    if cfg.plan_only:
        return
    serve(cfg)
    write_report(outcome, cfg)
    given, value = read_submission(cfg)
    known = "" if value is None else f", score {value:.4f} by test_truth.csv"
    say(f"submission  {cfg.out / 'submission.parquet'}, {len(given):,} rows{known}")
    then = "python make_kaggle_dataset.py packs these models for Kaggle, see README"
    if value is not None:
        then = "this was simulated: CMI_DATA_DIR=… trains on the competition's files"
    elif KAGGLE_WORKING.is_dir():
        then = "Save Version, then Submit; attached to the next version, it is reused"
    say(f"next        {then}")
    took = duration(time.time() - RUN_LOG["began"])
    say(f"done        in {took}; the same command reuses everything")


def main(env: Mapping[str, str], arguments: Sequence[str] = ()) -> None:
    """The whole road, or what of it the settings ask for."""
    cfg = Config.from_env(env := read_arguments(arguments, env))
    if {"-h", "--help"} & {*arguments}:
        print("\n".join([(__doc__ or "").strip(), "", *settings_table(cfg)]))  # noqa: T201
    if "--help-features" in arguments:
        print_feature_help()
    if HELP & {*arguments}:
        return
    STAGES.clear()
    for name in sorted(set(env) - set(KNOWN_NAMES)):
        if meant := nearest_name(name, 0.85):
            log("warning", variable=name, did_you_mean=meant)
    cfg.out.mkdir(parents=True, exist_ok=True)
    folders = {cfg.out.resolve(), cfg.checkpoints.resolve()} if not cfg.rerun else set()
    with contextlib.ExitStack() as held:
        for folder in sorted(folders):
            held.enter_context(only_run(folder))
        (cfg.out / "logs").mkdir(exist_ok=True)
        RUN_LOG.update(began=time.time(), file=cfg.out.absolute() / "logs" / "run.log")
        held.callback(RUN_LOG.update, file=None)
        cfg = settle(cfg, env)
        say(f"output      {cfg.out}, details in logs/run.log; data {cfg.cmi_data_dir}")
        serve(cfg) if cfg.rerun else run_here(cfg)


def start(env: Mapping[str, str], arguments: Sequence[str]) -> str | None:
    """main; a mistake of the user's or of a disk comes back as one line instead of a traceback."""
    stopped = "cmi_pipeline: stopped. What is finished is kept; the same command goes on from it."
    try:
        main(env, arguments)
        print(end="", flush=True)  # noqa: T201
    except BrokenPipeError:  # whoever read the output has stopped, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return None if HELP & {*arguments} else stopped
    except (ConfigError, DataError) as error:
        return f"cmi_pipeline: {error}".replace("\n", " ")
    except OSError as error:
        if not (error.errno and error.filename):
            raise
        what = f"{error.filename}: {os.strerror(error.errno)}. Make room, allow using it"
        return f"cmi_pipeline: {what}, or set OUTPUT_PATH; what is done is kept."
    except KeyboardInterrupt:
        return stopped
    return None


if __name__ == "__main__":
    if os.name == "nt":
        sys.exit("cmi_pipeline: Windows is not supported; use WSL, Linux or macOS.")
    here = Path(globals().get("__file__") or "nowhere").resolve()
    begin, words = start, list[str]()  # in a notebook, whose kernel's own arguments are not ours
    if here.is_file():  # loaded anew as the module that worker processes import
        folder, name = here.parent, "cmi_pipeline"
        if here.name != f"{name}.py":  # a link has that name; on Kaggle it is /kaggle/src/script.py
            folder = Path(tempfile.mkdtemp(prefix="cmi-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            (folder / f"{name}.py").symlink_to(here)
        sys.path[:0] = [str(folder), str(here.parent)]
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        begin, words = importlib.import_module(name).start, sys.argv[1:]
    mistake = begin(environment(), words)
    if mistake:  # a notebook shows any exit as an error, a good one too
        sys.exit(mistake)
