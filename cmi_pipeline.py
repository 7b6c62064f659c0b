# %% [markdown]
"""Tell hair-pulling from hand-waving with a wrist sensor: train, blend and serve.

One file for Kaggle's "CMI - Detect Behavior with Sensor Data", read from top to bottom. The same
text runs as a script, a notebook or a module:

    python cmi_pipeline.py                       # plan, train or reuse, blend, gateway, submission
    python cmi_pipeline.py PLAN_ONLY=1           # stop after the plan; NAME=value is a setting
    python cmi_pipeline.py CMI_DATA_DIR=…        # the real files instead of a simulation
    python cmi_pipeline.py --help                # every setting, its default and today's value
    python cmi_pipeline.py --help-features       # every feature, its unit and meaning

The road, one direction, from top to bottom; predict is the same functions for one recording:

    settings, environment ─► Config
    CSV or a frame ─► Recordings ─► canonical ─► extract_features ─┬─► FeatureTable ─► LightGBM ──┐
                                                                   └─► Frames ─► Batches          │
                                                                         └─► Torch, Keras ────────┤
    folds ─► jobs (member, mode, seed, fold) ─► fit what the plan says ─► out-of-fold rows ◄──────┘
    out-of-fold rows ─► Blend ─► Assignment ─► report, weights.json ─► Predictor

Sections
     1 Configuration
     2 Log and artefacts
     3 Gestures, score and folds
     4 Recordings
     5 Motion and wearer
     6 Features and frames
     7 Batches
     8 LightGBM
     9 Network training
    10 Torch
    11 Keras
    12 Members, plan and jobs
    13 Blend and assignment
    14 Report
    15 Serving
    16 Entry

Array axes, as written in every shape comment
    N recordings    R rows of all recordings, end to end    T rows of one recording after padding
    C channels      F features    K gestures (18)           L composite labels (at most 102)
    B recordings of a batch       D numbers a row that a network is given

Units are SI: acceleration in m/s², angular velocity in rad/s, time in s, temperature in °C.
Quaternions are (w, x, y, z), as in the files, and turn the device frame into the world (z up).
"""

# %%
from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import html
import importlib
import importlib.machinery
import importlib.util
import io
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
import types
import typing
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl


class LazyModule:
    """Stands for a package until something of it is used: importing torch alone takes seconds."""

    def __init__(self, name: str) -> None:
        self.package = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.package), attribute)


joblib, keras, lgb = (LazyModule(name) for name in ("joblib", "keras", "lightgbm"))
matplotlib, mpl_figure = LazyModule("matplotlib"), LazyModule("matplotlib.figure")
optimize, transform = LazyModule("scipy.optimize"), LazyModule("scipy.spatial.transform")
linear_model, tf = LazyModule("sklearn.linear_model"), LazyModule("tensorflow")
torch = LazyModule("torch")
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
# In: the environment, and NAME=value arguments. Out: one frozen Config. Every setting is one field;
# the variable of the same name in capitals overrides its default. This section is the only reader
# of the environment. `retrains` says whose trained models depend on a setting: change one of those
# and exactly these members are trained again.


# %%
class ConfigError(ValueError):
    """A setting whose value cannot be read, or a path it names that does not exist."""


class DataError(ValueError):
    """An input file that cannot be used; the text says what, where and what to do."""


LGBM, TORCH, KERAS = ("lgbm",), ("torch",), ("keras",)
NETWORKS = TORCH + KERAS
EVERY = LGBM + NETWORKS
KAGGLE_INPUT = Path("/kaggle/input")  # data sets are attached below it, at depths that change
KAGGLE_WORKING = Path("/kaggle/working")
COUNT = (1, 10**6)
POLICIES = ("", "float32", "mixed_float16", "mixed_bfloat16")


def setting(
    default: Any, text: str, retrains: tuple[str, ...] = (), allowed: tuple[Any, ...] = ()
) -> Any:
    """One field: its default, a line of help, the members whose models depend on it, and what it
    may be: one of several words, or a number from the first of `allowed` to the second."""
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

    fixed_pad_len: int = setting(90, "last rows a network sees; 0: percentile", NETWORKS, (0, 5000))
    pad_len_percentile: float = setting(95.0, "of lengths if FIXED_PAD_LEN=0", NETWORKS, (1, 100))
    modality_dropout_prob: float = setting(0.3, "share that loses ToF, THM, both", EVERY, (0, 1))
    frame_cache: bool = setting(True, "keep frames in memory; 0: always mapped from disk")
    frame_cache_max_mb: int = setting(
        2048, "frames above this are mapped from disk", (), (0, 10**7)
    )
    frame_cache_max_items: int = setting(1600, "recordings that predict remembers", (), (0, 10**7))
    upside_down: bool = setting(True, "detect devices worn turned by 180°, turn them back", EVERY)

    lgbm_rounds: int = setting(350, "boosting rounds at most", LGBM, (1, 10**5))
    lgbm_lr: float = setting(0.07, "learning rate", LGBM, (1e-6, 10))
    lgbm_leaves: int = setting(20, "leaves of a tree", LGBM, (2, 10**4))
    lgbm_es_rounds: int = setting(
        50, "rounds without gain until it stops; 0: never", LGBM, (0, 10**5)
    )
    lgbm_feature_fraction: float = setting(0.2, "features that a tree is shown", LGBM, (0.001, 1))
    lgbm_extra_trees: bool = setting(True, "thresholds drawn at random, not searched", LGBM)
    lgbm_top_features: int = setting(
        0, "K best features of an earlier run; 0: all", LGBM, (0, 10**6)
    )

    stretch_prob: float = setting(0.5, "share stretched in time", NETWORKS, (0, 1))
    shift_prob: float = setting(0.5, "share that ends a few rows early", NETWORKS, (0, 1))
    jitter_prob: float = setting(0.5, "share whose wristband is turned", NETWORKS, (0, 1))
    mixup_prob: float = setting(0.0, "share that is mixed with another", NETWORKS, (0, 1))
    time_mask_prob: float = setting(0.2, "share that loses some rows", NETWORKS, (0, 1))
    channel_mask_prob: float = setting(0.1, "share that loses some channels", NETWORKS, (0, 1))

    torch_max_epochs: int = setting(30, "epochs at most", TORCH, COUNT)
    torch_batch_size: int = setting(16, "recordings a step, at most 1/16 of all", TORCH, COUNT)
    torch_accum_steps: int = setting(1, "micro-batches a step", TORCH, COUNT)
    torch_lr: float = setting(1e-3, "peak learning rate", TORCH, (0, 1))
    torch_weight_decay: float = setting(1e-2, "weight decay", TORCH, (0, 10))
    torch_dropout: float = setting(0.2, "dropout", TORCH, (0, 0.95))
    torch_label_smoothing: float = setting(0.05, "label smoothing", TORCH, (0, 0.95))
    torch_es_patience: int = setting(
        0, "epochs without gain until it stops; 0: never", TORCH, (0, 999)
    )
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

    keras_max_epochs: int = setting(40, "epochs at most", KERAS, COUNT)
    keras_batch_size: int = setting(512, "recordings a step, at most 1/16 of all", KERAS, COUNT)
    keras_lr: float = setting(2e-3, "learning rate", KERAS, (0, 1))
    keras_weight_decay: float = setting(1e-2, "weight decay", KERAS, (0, 10))
    keras_dropout: float = setting(0.2, "dropout", KERAS, (0, 0.95))
    keras_label_smoothing: float = setting(0.1, "label smoothing", KERAS, (0, 0.95))
    keras_width: int = setting(64, "channels of the first block", KERAS, (16, 1024))
    keras_es_patience: int = setting(
        5, "epochs without gain until it stops; 0: never", KERAS, (0, 999)
    )
    keras_rlr_patience: int = setting(
        3, "epochs until the rate halves; 0: one cycle", KERAS, (0, 999)
    )
    keras_mp: bool = setting(True, "mixed precision where a GPU has it")
    keras_policy: str = setting("", "forces a dtype policy", (), POLICIES)
    keras_jit: bool = setting(False, "XLA")
    keras_threads: int = setting(2, "CPU threads of one network", (), (1, 256))

    ensemble_weights: str = setting("", 'fixed shares, "lgbm:0.4,torch:0.6"; fitted if empty')
    ensemble_w_lgbm: float | None = setting(None, "share; fitted, .20 without rows", (), (0, 10**6))
    ensemble_w_torch: float | None = setting(
        None, "share; fitted, .45 without rows", (), (0, 10**6)
    )
    ensemble_w_keras: float | None = setting(
        None, "share; fitted, .35 without rows", (), (0, 10**6)
    )
    ensemble_search: str = setting("logloss", "what weights are best", (), ("logloss", "score"))
    ensemble_trials: int = setting(1024, "weights tried for the best score", (), COUNT)
    ensemble_temperature: float | None = setting(None, "of fixed shares; fitted", (), (0.01, 100))
    subject_assignment: str = setting("auto", "labels once a subject", (), ("auto", "0", "1"))

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
        default = KAGGLE_WORKING if KAGGLE_WORKING.is_dir() else Path("cmi_output")
        return self.output_path or default

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
        """Is this Kaggle's hidden re-run? Set but empty counts, as in Kaggle's own package."""
        return self.kaggle_is_competition_rerun is not None

    def training_settings(self, member: str) -> dict[str, Any]:
        """The settings on which the trained models of `member` depend, by variable."""
        fields = (f for f in dataclasses.fields(self) if member in f.metadata["retrains"])
        return {f.name.upper(): getattr(self, f.name) for f in fields}

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """Defaults, overridden by the variables in `env` that carry a field's name in capitals."""
        if "MODEL_PATH" in env and "LGBM_BUNDLE_PATH" not in env:
            env = {**env, "LGBM_BUNDLE_PATH": env["MODEL_PATH"]}
        hints = typing.get_type_hints(cls)
        return cls(
            **{
                f.name: parse_as(hints[f.name], env[f.name.upper()], f.name.upper(), f.default)
                for f in dataclasses.fields(cls)
                if f.name.upper() in env
            }
        )


TRUTHS = dict.fromkeys(("1", "true", "yes", "on"), True)
TRUTHS |= dict.fromkeys(("0", "false", "no", "off"), False)


def parse_as(hint: Any, text: str, name: str, default: object) -> Any:
    """Read `text` as `hint`; an empty text is None where None is allowed, else the default."""
    optional = type(None) in typing.get_args(hint)
    base = next((k for k in typing.get_args(hint) if k is not type(None)), hint)
    if not text.strip() and base is not str:
        return None if optional else default
    try:
        if base is bool:
            return TRUTHS[text.strip().lower()]
        if base is Path:
            return Path(text.strip()).expanduser()
        return base(text if base is str else text.strip())
    except (KeyError, ValueError):
        raise ConfigError(
            f"{name}={text!r} cannot be read as {base.__name__} (default {default!r})."
        ) from None


def shown(value: object) -> str:
    """A setting's value as it would be written in the environment."""
    if isinstance(value, bool):
        return str(int(value))
    return "" if value is None else str(value)


def settings_table(cfg: Config | None = None) -> list[str]:
    """Every setting, a line each, with its default or, of a Config, its value: docs/settings.md."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for f in dataclasses.fields(Config):
        now, default = shown(getattr(cfg or Config(), f.name)), shown(f.default)
        value = now if now == default else f"{now} (default {default})"
        lines.append(f"| {f.name.upper()} | {value} | {f.metadata['help']} |")
    return lines


ALIASES = {  # likely slips, and names of the first version
    "TORCH_EPOCHS": "TORCH_MAX_EPOCHS",
    "KERAS_EPOCHS": "KERAS_MAX_EPOCHS",
    "EPOCHS": "TORCH_MAX_EPOCHS and KERAS_MAX_EPOCHS",
    "BATCH_SIZE": "TORCH_BATCH_SIZE and KERAS_BATCH_SIZE",
    "USE_LIGHTGBM": "USE_LGBM",
    **dict.fromkeys(("CMI_DATA", "DATA_DIR"), "CMI_DATA_DIR"),
    "OUTPUT_DIR": "OUTPUT_PATH",
    "TORCH_ROTATE_PROB": "JITTER_PROB",
    **{f"TORCH_{name}_PROB": f"{name}_PROB" for name in ("MIXUP", "STRETCH", "SHIFT")},
}
KNOWN_NAMES = [*(f.name.upper() for f in dataclasses.fields(Config)), "MODEL_PATH"]


def likely_slips(env: Iterable[str]) -> list[tuple[str, str]]:
    """Variables that nearly carry a setting's name, each with the one that was probably meant."""
    slips = []
    for name in sorted(set(env) - set(KNOWN_NAMES)):
        near = difflib.get_close_matches(name.upper(), KNOWN_NAMES, n=1, cutoff=0.87)
        if meant := ALIASES.get(name.upper()) or next(iter(near), None):
            slips.append((name, meant))
    return slips


# %% [markdown]
# ## 2 Log and artefacts
#
# In: events and results. Out: lines and files. One line per event, printed by one function. Every
# artefact is written under a temporary name and renamed, so that what exists is whole; what a
# killed run left behind is never read. Only logs grow line by line.

# %%
STARTED = time.monotonic()
SILENCE = 20.0  # s; whoever watches a log should never wonder whether it still runs


def log(event: str, /, **values: object) -> None:
    """One line per event: seconds since start, what happened, then key=value pairs."""
    pairs = "  ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()
    ).replace("\n", " ")  # others' errors come in several lines
    line = f"[{time.monotonic() - STARTED:7.1f}s] {event:<12} {pairs}\n"
    print(line, end="", flush=True)  # noqa: T201 one write: lines of several workers stay apart


class Progress:
    """A long loop's lines: one every `every` units, at the end, and after 20 seconds of silence; or
    with USE_TQDM=1, on a terminal, a bar."""

    def __init__(
        self, event: str, total: int, every: int, cfg: Config, done: int = 0, **names: object
    ) -> None:
        self.event, self.total, self.every, self.names = event, total, every, names
        self.done = self.first = done
        self.began = self.spoke = time.monotonic()
        self.bar: Any = None
        if cfg.use_tqdm and sys.stderr.isatty() and package_version("tqdm"):
            about = " ".join((event, *map(str, names.values())))
            bar = importlib.import_module("tqdm.auto").tqdm
            self.bar = bar(total=total, initial=done, desc=about, leave=False)

    def step(self, n: int = 1, values: Callable[[], Mapping[str, object]] = dict) -> None:
        """`n` more units are done. `values` go into the line and are asked for if one is due."""
        before, self.done, now = self.done, self.done + n, time.monotonic()
        if self.bar:
            self.bar.update(n)
        due = self.done // self.every > before // self.every or before < self.total <= self.done
        if self.bar or not (due or now - self.spoke > SILENCE):
            return
        self.spoke = now
        left = (self.total - self.done) * (now - self.began) / max(self.done - self.first, 1)
        done = f"{self.done}/{self.total}"
        log(self.event, **self.names, done=done, **values(), left=f"{left:.0f}s")


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the run that is over."""

    name: str
    begin: float  # seconds since the start of the run
    secs: float
    peak_mb: float  # the most memory that this process, or one of its workers, held until then
    note: str = ""  # "reused" where nothing had to be made


STAGES: list[Stage] = []  # of this run, for the report


@contextlib.contextmanager
def stage(name: str, cfg: Config, note: str = "") -> Iterator[None]:
    """Tell and keep how long a part of the run takes, and what memory."""
    began = time.monotonic()
    log("stage", begins=name)
    yield
    resource = importlib.import_module("resource")  # there is none on Windows
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts in bytes, Linux in KB
    peak_mb = max(resource.getrusage(who).ru_maxrss for who in whose) / unit
    over = Stage(name, began - STARTED, time.monotonic() - began, peak_mb, note)
    STAGES.append(over)
    log("stage", ends=name, secs=over.secs, peak_mb=round(peak_mb))
    append_jsonl(cfg.out / "logs" / "stages.jsonl", cfg, **dataclasses.asdict(over))


def cpu_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def rng_for(cfg: Config, *path: str | int) -> np.random.Generator:
    """Random numbers fixed by the seed and `path` alone, whatever ran before.

    Fold 3 trained by itself therefore equals fold 3 of a full run.
    """
    return np.random.default_rng([cfg.seed, *(zlib.crc32(str(p).encode()) for p in path)])


def write_whole(path: Path, content: bytes | memoryview | str) -> None:
    """Write a file so that it is either absent, or as before, or complete."""
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
    fcntl = importlib.import_module("fcntl")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another run is writing to {folder}. Wait for it, or set OUTPUT_PATH to another "
                f"folder, and CKPT_BASE_DIR too if you use it."
            ) from None
        except OSError as error:  # no file system of this kind can lock
            log("warning", folder=folder, lock=error.strerror, advice="start no second run on it")
        else:  # what killed runs were writing
            for path in sorted(folder.rglob(".*.[0-9]*.part*")):
                log("leftover", removed=path)
                is_folder = path.is_dir() and not path.is_symlink()
                shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)
        yield


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """As a .npy file, whole or not at all."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    write_whole(path, content.getvalue())


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]], note: object) -> None:
    """Arrays and a note in JSON as one .npz file, whole or not at all."""
    content = io.BytesIO()
    np.savez(content, note=np.array(json.dumps(note)), **arrays)  # type: ignore[arg-type]
    write_whole(path, content.getbuffer())


BAD_FILE = (
    *(OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, OverflowError),
    *(RuntimeError, UnpicklingError, zipfile.BadZipFile, zlib.error),
)


@contextlib.contextmanager
def refusing(path: Path, what: str) -> Iterator[None]:
    """Whatever is wrong with a file that is read here becomes one clear `DataError`."""
    try:
        yield
    except DataError:
        raise
    except BAD_FILE as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path} {what} ({reason:.200}). Delete it and run again, or attach its bundle again."
        ) from None


def read_arrays(path: Path) -> tuple[Arrays, Any]:
    """What `write_arrays` wrote: arrays and note."""
    with refusing(path, "is damaged"), np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
        return arrays, json.loads(str(arrays.pop("note")))


def write_json(path: Path, content: object) -> None:
    """As indented JSON, whole or not at all."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a file that must be JSON."""
    with refusing(path, "is not JSON"):
        return json.loads(path.read_text())


def append_jsonl(path: Path, cfg: Config, **values: object) -> None:
    """One more line of a log for machines; nothing with SAVE_JSONL=0."""
    if cfg.save_jsonl:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def digest(*parts: object) -> str:
    """Sixteen hex digits that change with any byte of `parts` (arrays, bytes or JSON values)."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, np.ndarray):
            state.update(f"{part.dtype.str}{part.shape}".encode())
            state.update(np.ascontiguousarray(part).view(np.uint8).data)
        else:
            raw = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
            state.update(raw)
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
    metadata = importlib.import_module("importlib.metadata")
    distributions = {"tensorflow": ("tensorflow", "tensorflow-cpu", "tf-nightly")}
    for distribution in distributions.get(name, (name,)):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return str(metadata.version(distribution))
    return ""


# %% [markdown]
# ## 3 Gestures, score and folds
#
# In: names and labels of the recordings. Out: codes, the score, the fold of each recording. The
# strings are the interface: predict must return one of GESTURES. The score is the competition's
# own; two well-known public copies of it are wrong. A subject is never on both sides of a split,
# and the folds are saved, because scikit-learn's change with its version.

# %%
TARGETS = (
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
MODES = ("all", "imu")  # every sensor; ToF and THM never seen
NO_ROTATION = "norot"  # as if no recording had a rotation: for the few that come without
ROUTES = (*MODES, NO_ROTATION)
NON_TARGET = len(TARGETS)  # code of any non-target among the classes of the score


def score(truth: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """The competition's score of gesture codes (N) against gesture codes (N), 0 … 1.

    Half the F1 of target against non-target, half the macro F1 over the 8 targets and one class
    for all the rest; classes that occur on neither side do not count.
    """
    return sum(score_parts(truth, predicted)) / 2


def score_parts(truth: npt.ArrayLike, predicted: npt.ArrayLike) -> tuple[float, float]:
    """Binary F1 and macro F1, whose mean is the score."""
    binary, macro = f1_of_counts(count_classes(np.asarray(truth), np.asarray(predicted)))
    return float(binary), float(macro)


def count_classes(truth: I64, answer: I64, group: I64 | None = None, n_groups: int = 1) -> F64:
    """Recordings by class of the score, truth first. 2 × (N) → (9, 9), of groups (groups, 9, 9)"""
    cell = 9 * np.minimum(truth, NON_TARGET) + np.minimum(answer, NON_TARGET)
    if group is None:
        return np.bincount(cell, minlength=81).reshape(9, 9).astype(np.float64)
    counts = np.bincount(81 * group + cell, minlength=81 * n_groups)
    return counts.reshape(n_groups, 9, 9).astype(np.float64)


def f1_of_counts(counts: npt.NDArray[Any]) -> tuple[F64, F64]:
    """Binary and macro F1 of confusion matrices of 8 targets and the rest. (…, 9, 9) → 2 × (…)

    Truth comes first. 0 where there is nothing to divide by.
    """
    counts = np.asarray(counts, np.float64)
    hit = np.diagonal(counts, axis1=-2, axis2=-1)  # (…, 9)
    sides = counts.sum(-1) + counts.sum(-2)  # truth + prediction
    f1 = 2 * hit / np.maximum(sides, 1)
    macro = f1.sum(-1) / np.maximum((sides > 0).sum(-1), 1)
    both = counts[..., :8, :8].sum((-2, -1))  # target, and called one
    either = counts[..., :8, :].sum((-2, -1)) + counts[..., :, :8].sum((-2, -1))
    return 2 * both / np.maximum(either, 1), macro


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
    """Fold of each recording, (N). A subject's recordings share one; folds are alike in size.

    Shuffled subjects, largest first, go to the lightest fold. Every subject performs the whole
    protocol, so this is stratified by nature, and the same in every version of every library.
    """
    names, index, counts = np.unique(subject, return_inverse=True, return_counts=True)
    if len(names) < cfg.n_folds:
        raise ConfigError(
            f"{len(names)} subjects cannot fill {cfg.n_folds} folds; set N_FOLDS={len(names)}."
        )
    order = rng_for(cfg, "folds").permutation(len(names))
    load = np.zeros(cfg.n_folds)
    fold = np.empty(len(names), np.int64)
    for s in order[np.argsort(-counts[order], kind="stable")]:
        fold[s] = load.argmin()
        load[fold[s]] += counts[s]
    return fold[index.reshape(-1)]


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
SENSORS = ACC + ROT + THM + TOF
PERSON = (
    "adult_child",
    "age",
    "sex",
    "handedness",
    "height_cm",
    "shoulder_to_wrist_cm",
    "elbow_to_wrist_cm",
)
FARTHEST, NOTHING, MISSING = 249, 254, 255  # codes of a ToF pixel


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

    def __post_init__(self) -> None:
        n_rows = len(self.acc)
        if self.start[0] != 0 or self.start[-1] != n_rows or np.any(np.diff(self.start) < 1):
            raise ValueError(
                f"start must rise strictly from 0 to {n_rows} rows, got {self.start[:3]} … "
                f"{self.start[-3:]}: an empty recording cannot be stored."
            )
        assert self.rot.shape == (n_rows, 4), self.rot.shape
        assert self.thm.shape == (n_rows, 5), self.thm.shape
        assert self.tof.shape == (n_rows, 5, 8, 8), self.tof.shape
        assert self.person.shape == (len(self), 7), self.person.shape

    def __len__(self) -> int:
        return len(self.start) - 1

    def part(self, first: int, last: int) -> Recordings:
        """Recordings first … last - 1, as views, without labels."""
        rows = slice(self.start[first], self.start[last])
        start = self.start[first : last + 1] - self.start[first]
        arrays = (self.acc[rows], self.rot[rows], self.thm[rows], self.tof[rows])
        own = (self.sequence_id[first:last], self.subject[first:last], self.person[first:last])
        return Recordings(start, *arrays, *own)


def pixel_codes(tof: npt.NDArray[Any]) -> U8:
    """Measured values to one byte: -1 → NOTHING, null or out of range → MISSING. Any shape."""
    with np.errstate(invalid="ignore"):
        code = np.where((tof >= 0) & (tof <= FARTHEST), tof, np.where(tof == -1, NOTHING, MISSING))
    return code.astype(np.uint8)


def to_numbers(frame: pl.DataFrame, columns: Sequence[str]) -> F32:
    """Columns as numbers, whatever type they arrived in. → (R, len(columns)), NaN: missing

    Kaggle's gateway hands over all-null columns as text, and then numbers as text with them. A
    column that is absent is missing in every row; so is a value that is no finite number.
    """
    place = {c: i for i, c in enumerate(columns)}
    present = [c for c in frame.columns if c in place]
    out = np.full((len(frame), len(columns)), np.nan, np.float32)
    if not present:
        return out
    try:  # one expression for all: one for each takes ten times as long
        found = frame.select(pl.col(present).cast(pl.Float32, strict=False)).to_numpy()
    except pl.exceptions.PolarsError as error:  # a list, a struct, a category
        raise DataError(f"A column of numbers holds something else: {error!s:.200}") from None
    if found.dtype == object:
        raise DataError(f"Of the columns {columns[:3]} … one holds no numbers.")
    out[:, [place[c] for c in present]] = np.where(np.isfinite(found), found, np.nan)
    return out


def to_recordings(frame: pl.DataFrame, person: pl.DataFrame) -> Recordings:
    """Rows of whole recordings, one after the other, and their wearers' demographics."""
    ids = frame["sequence_id"].cast(pl.String)
    first = np.flatnonzero((ids != ids.shift()).fill_null(value=True).to_numpy())
    subject = frame["subject"].cast(pl.String).gather(first).to_numpy().astype(np.str_)
    tof = np.empty((len(frame), len(TOF)), np.uint8)
    for i in range(0, len(frame), 4096):  # blocks that fit the processor's cache
        tof[i : i + 4096] = pixel_codes(to_numbers(frame[i : i + 4096], TOF))
    return Recordings(
        start=np.r_[first, len(ids)].astype(np.int64),
        acc=to_numbers(frame, ACC),
        rot=to_numbers(frame, ROT),
        thm=to_numbers(frame, THM),
        tof=tof.reshape(-1, 5, 8, 8),
        sequence_id=ids.gather(first).to_numpy().astype(np.str_),
        subject=subject,
        person=demographics_of(subject, person),
    )


def demographics_of(subject: Str, person: pl.DataFrame) -> F32:
    """Demographics of each recording's wearer; an unknown one counts as right-handed. → (N, 7)"""
    names = person["subject"] if "subject" in person.columns else [""] * len(person)
    known = {str(s): row for s, row in zip(names, to_numbers(person, PERSON), strict=True)}
    stranger = np.full(len(PERSON), np.nan, np.float32)
    found = np.stack([known.get(str(s), stranger) for s in subject])
    right = PERSON.index("handedness")
    found[:, right] = np.where(found[:, right] == 0, 0, 1)
    return found


def read_train(folder: Path) -> Recordings:
    """train.csv and train_demographics.csv of `folder`, with labels."""
    path = folder / "train.csv"
    texts = ("sequence_id", "subject", "gesture", "orientation", "behavior", "phase")
    frame = in_order(read_table(path, texts, ("sequence_counter", *SENSORS)), path)
    person = read_table(folder / "train_demographics.csv", ("subject",), PERSON)
    rec = to_recordings(frame, person)
    strangers = sorted(set(rec.subject.tolist()) - set(person["subject"].to_list()))
    if strangers:
        log("warning", no_demographics=",".join(strangers[:5]), of=len(strangers))
    first = rec.start[:-1]
    labels = Labels.of(
        to_codes(frame, "gesture", GESTURES, path)[first],
        to_codes(frame, "orientation", ORIENTATIONS, path)[first],
        to_codes(frame, "behavior", BEHAVIORS, path)[first],
        to_codes(frame, "phase", PHASES, path).astype(np.uint8),
    )
    return dataclasses.replace(rec, labels=labels)


def read_table(path: Path, texts: Sequence[str], values: Sequence[str]) -> pl.DataFrame:
    """The named columns of a CSV file, `texts` as String, `values` as Float32."""
    if not path.is_file():
        raise DataError(f"{path} does not exist. Point CMI_DATA_DIR at the competition's folder.")
    try:
        with path.open("rb") as file:
            present = pl.read_csv(io.BytesIO(file.readline()), infer_schema=False).columns
    except pl.exceptions.NoDataError:
        raise DataError(f"{path} is empty. Download it again.") from None
    absent = [c for c in (*texts, *values) if c not in present]
    if absent:
        raise DataError(
            f"{path} has no column {absent[0]} ({len(absent)} are missing). Is it the right file?"
        )
    types = dict.fromkeys(texts, pl.String) | dict.fromkeys(values, pl.Float32)
    read = functools.partial(
        pl.scan_csv, path, glob=False, schema_overrides=types, truncate_ragged_lines=True
    )
    try:
        frame = read().select(*texts, *values).collect()
    except pl.exceptions.ComputeError as error:  # some number is none
        log("warning", file=path, says=str(error).split("\n")[0][:300], taken_as="missing")
        frame = read(ignore_errors=True).select(*texts, *values).collect()
    if not len(frame):
        raise DataError(f"{path} has a header but no rows. Download it again.")
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            log("warning", file=path, last_line="cut off", taken_as="absent")
            return frame.head(-1)
    return frame


def in_order(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Rows of a recording one after the other, counter rising, each once; as in the file if so."""
    ids, counter = frame["sequence_id"], frame["sequence_counter"].to_numpy()
    new = (ids != ids.shift()).fill_null(value=True).to_numpy()
    broken = ~new & (np.diff(counter, prepend=-1.0) <= 0)
    again = new & ids.is_first_distinct().not_().to_numpy()  # an id comes back after another one
    if not (broken | again).any():
        return frame
    fixed = frame.unique(["sequence_id", "sequence_counter"], keep="first", maintain_order=True)
    first_row = pl.col("row").min().over("sequence_id")
    fixed = fixed.with_row_index("row").sort(first_row, "sequence_counter").drop("row")
    row = int(np.flatnonzero(broken | again)[0])
    why = "rows of a recording apart, out of order or twice"
    dropped = len(frame) - len(fixed)
    log("warning", file=path, order=why, line=row + 2, recording=ids[row], dropped=dropped)
    return fixed


def to_codes(frame: pl.DataFrame, column: str, names: tuple[str, ...], path: Path) -> I64:
    """Strings as codes into `names`; any other string is an error that tells its place. → (R)"""
    code_of = {name: i for i, name in enumerate(names)}
    code = frame[column].replace_strict(code_of, default=None, return_dtype=pl.Int64)
    if code.null_count():
        row = int(code.is_null().arg_max() or 0)
        raise DataError(
            f"{path}: {column} {frame[column][row]!r} of {frame['sequence_id'][row]} "
            f"(row {row + 2}) is none of the {len(names)} known: {', '.join(names)}."
        )
    return code.to_numpy().astype(np.int64)


RECORDINGS_FORM = 2  # raise it when reading changes, and caches are built again


def cached_recordings(folder: Path, cfg: Config) -> tuple[Recordings, str]:
    """Training recordings and their digest, from the cache if train.csv is still the same file."""
    files = (folder / "train.csv", folder / "train_demographics.csv")
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]
    cache = cfg.checkpoints / "cache" / f"recordings-{digest(RECORDINGS_FORM, stats)}.npz"
    if cache.exists():
        try:
            with refusing(cache, "is no cache of recordings"):
                arrays, note = read_arrays(cache)
                labels = {k[6:]: arrays.pop(k) for k in list(arrays) if k.startswith("label_")}
                rec = Recordings(**arrays, labels=Labels(**labels))
            log("recordings", action="reuse", why="train.csv is as it was", path=cache)
            return rec, str(note["digest"])
        except DataError as error:
            log("warning", why=error, instead="read again")
    log("recordings", action="read", why="no cache of this train.csv", path=cache)
    rec = read_train(folder)
    for old in cache.parent.glob("recordings-*.npz"):
        old.unlink()
    arrays = {f.name: getattr(rec, f.name) for f in dataclasses.fields(rec) if f.name != "labels"}
    arrays |= {f"label_{f.name}": getattr(rec.labels, f.name) for f in dataclasses.fields(Labels)}
    data_digest = digest(*arrays.values())
    write_arrays(cache, arrays, {"digest": data_digest})
    return rec, data_digest


# %% [markdown]
# ## 5 Motion and wearer
#
# Recordings come in, what the wrist does comes out: angular velocity, acceleration without gravity,
# the vertical. Pure functions of whole columns: no loop over recordings, input untouched, and
# nothing is ever computed across the border of two recordings, which `start` marks. Results are
# float64 (R, k) whose components lie one after the other in memory, so that every step works on
# contiguous numbers. Where a recording has no rotation, what needs one stays NaN: NaN is the flag,
# an invented identity would pose as measured.

# %%
SAMPLE_PERIOD = 0.1  # s; not published, about 10 Hz fits; nothing but scale depends on it
GRAVITY = 9.81  # m/s²
GESTURE_ROWS = 31  # the gesture is at the end of a recording and about 31 rows long
MEDIAN_ROWS = 15  # window of the median that stands in for gravity where there is no rotation


def as_columns(*parts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Components to vectors. k × (R) → (R, k), a view of k contiguous columns"""
    return np.stack(parts).T


def row_norm(v: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Euclidean length of each row. (R, k) → (R)"""
    return np.sqrt(row_dot(v, v))


def row_dot(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Inner product row by row, a column at a time. (R, k), (R, k) → (R)"""
    return functools.reduce(np.add, [p * q for p, q in zip(a.T, b.T, strict=True)])


def gather_rows(start: I64, order: I64) -> tuple[I64, I64]:
    """Rows of the recordings in `order`, end to end, and where each then begins."""
    n = np.diff(start)[order]
    begin = np.r_[0, np.cumsum(n)]
    return np.repeat(start[order] - begin[:-1], n) + np.arange(begin[-1]), begin


# %% [markdown]
# Rotations. The hot paths are plain formulas; scipy fills gaps, which are rare.


# %%
def nearest_known(known: Bool, start: I64) -> tuple[I64, I64]:
    """Last known row up to each row and first from it on, in its recording. (R) → 2 × (R)

    -1 where there is none.
    """
    row, n = np.arange(len(known)), np.diff(start)
    before = np.maximum.accumulate(np.where(known, row, -1))
    after = np.minimum.accumulate(np.where(known, row, len(known))[::-1])[::-1]
    before = np.where(before >= np.repeat(start[:-1], n), before, -1)
    return before, np.where(after < np.repeat(start[1:], n), after, -1)


def rebuild_component(q: F64, start: I64) -> F64:
    """Put back a single missing component from the unit norm. (R, 4) → (R, 4)

    Its sign is the one that turns least from the nearest complete row, and + where there is none.
    """
    hole = np.isnan(q)
    row = np.flatnonzero(hole.sum(axis=1) == 1)
    before, after = (known[row] for known in nearest_known(~np.any(hole, axis=1), start))
    nearer_before = (before >= 0) & ((after < 0) | (row - before <= after - row))
    partner = np.where(nearer_before, before, after)
    guide = np.where(partner[:, None] < 0, 0, q[partner])  # (n, 4)
    hole, rest = hole[row], np.nan_to_num(q[row])
    size = np.sqrt(np.maximum(1 - (rest * rest).sum(axis=1), 0))
    opposed = (rest * guide).sum(axis=1) * (hole * guide).sum(axis=1) < 0
    out = q.copy(order="K")
    out[row] = np.where(hole, np.where(opposed, -size, size)[:, None], rest)
    return out


def fill_gaps(q: F64, known: Bool, start: I64) -> F64:
    """Missing rotations between two known ones by slerp, at the ends held. (R, 4) → (R, 4)"""
    before, after = nearest_known(known, start)
    gap = np.flatnonzero(~known & ((before >= 0) | (after >= 0)))
    if not gap.size:
        return q
    first = np.where(before < 0, after, before)[gap]
    last = np.where(after < 0, before, after)[gap]  # the same row at an end: no turn to share
    turn, target = (transform.Rotation.from_quat(q[r], scalar_first=True) for r in (first, last))
    share = (gap - first) / np.maximum(last - first, 1)
    step = share[:, None] * (turn.inv() * target).as_rotvec()
    out = q.copy(order="K")
    out[gap] = (turn * transform.Rotation.from_rotvec(step)).as_quat(scalar_first=True)
    return out


def repair_rotation(rot: npt.NDArray[Any], start: I64) -> F64:
    """Unit quaternions with w ≥ 0, gaps filled within their recording. (R, 4) → (R, 4)

    One missing component comes from the unit norm; a zero quaternion counts as missing; missing
    rows are interpolated, or held at the ends. NaN remains where a recording has no rotation.
    """
    q = np.ascontiguousarray(rot.T, np.float64).T
    if np.isnan(q).any():
        q = rebuild_component(q, start)
    norm = row_norm(q)
    known = norm > 0.1
    q = q / np.where(known, norm, np.nan)[:, None]
    if not known.all():
        q = fill_gaps(q, known, start)
    return q * np.where(q[:, :1] < 0, -1.0, 1.0)


def world_axes(rot: F64) -> tuple[F64, F64, F64]:
    """North, west and up in the device frame: the rows of the matrix. (R, 4) → 3 × (R, 3)

    Two of them determine the rotation and have no jumps (Zhou et al. 2019). Rows, not columns:
    turning the wristband then acts on each as one rotation of the device frame.
    """
    w, x, y, z = np.asarray(rot, np.float64).T
    return (
        as_columns(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        as_columns(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        as_columns(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )


def turn_between(p: F64, q: F64) -> F64:
    """Rotation vector of the shorter turn from p to q, device axes. (R, 4) twice → (R, 3) rad"""
    (a, b, c, d), (w, x, y, z) = p.T, q.T  # p⁻¹ · q
    cosine = row_dot(p, q)
    v = as_columns(
        a * x - b * w - c * z + d * y,
        a * y + b * z - c * w - d * x,
        a * z - b * y + c * x - d * w,
    )
    sine = row_norm(v)
    angle = 2 * np.arctan2(sine, np.abs(cosine)) * np.where(cosine < 0, -1.0, 1.0)
    return v * (angle / np.where(sine > 0, sine, 1))[:, None]


def as_rate(step: F64, here: F64, start: I64) -> F64:
    """Change since the row before, per second. (R - 1, k), what changed (R, k or 1) → (R, k)

    A recording's first row has none: it gets 0, or NaN where it is missing.
    """
    first = start[:-1]
    rate = np.zeros((step.shape[1], len(here))).T
    rate[1:] = step / SAMPLE_PERIOD
    rate[first] = np.where(np.isnan(here[first]), np.nan, 0.0)
    return rate


# %% [markdown]
# Without rotation the vertical is guessed: a median ignores short bursts of acceleration.


# %%
def sorted_quantiles(ordered: F64, count: npt.NDArray[Any], q: F64) -> F64:
    """Linear interpolation between the `count` values at the front. (C, N, T) → (Q, C, N)"""
    place = np.maximum(count - 1, 0)[..., None] * q  # (C, N, Q)
    low = place.astype(np.int64)
    high = np.minimum(low + 1, np.maximum(count - 1, 0).astype(np.int64)[..., None])
    below, above = (np.take_along_axis(ordered, i, axis=2) for i in (low, high))
    return np.moveaxis(below + (above - below) * (place - low), -1, 0)


def median_direction(acc: npt.NDArray[Any], start: I64) -> F64:
    """Where the median of 15 rows points; the window shrinks at the ends. (R, 3) → (R, 3) unit"""
    n, row = np.diff(start), np.arange(len(acc))
    first, last = (np.repeat(edge, n)[:, None] for edge in (start[:-1], start[1:]))
    window = row[:, None] + np.arange(MEDIAN_ROWS) - MEDIAN_ROWS // 2  # (R, 15)
    values = np.asarray(acc.T, np.float64)[:, np.clip(window, 0, len(acc) - 1)]
    ordered = np.sort(np.where((window >= first) & (window < last), values, np.nan), axis=2)
    median = sorted_quantiles(ordered, (~np.isnan(ordered)).sum(axis=2), np.array([0.5]))[0].T
    size = row_norm(median)[:, None]
    return median / np.where(size > 1e-6, size, np.nan)


@dataclass(frozen=True, slots=True)
class Motion:
    """What the wrist does, row by row. Vectors are (R, 3) in device axes."""

    acc: F64  # m/s², gravity included
    rot: F64  # (R, 4) repaired
    north: F64  # unit, the world's x axis; where north is means nothing, but it stays there
    west: F64  # unit, the world's y axis
    up: F64  # unit, the vertical: exact with rotation, else guessed
    linear: F64  # m/s², without gravity
    omega: F64  # rad/s
    jerk: F64  # m/s³
    vertical: F64  # (R) m/s², linear acceleration along the vertical
    horizontal: F64  # (R) m/s², size of the rest
    swing: F64  # (R) rad, turn since the first row

    @classmethod
    def of(cls, rec: Recordings) -> Motion:
        acc, first = np.ascontiguousarray(rec.acc.T, np.float64).T, rec.start[:-1]
        rot = repair_rotation(rec.rot, rec.start)
        north, west, up = world_axes(rot)
        without = np.flatnonzero(np.isnan(rot[first, 0]))  # recordings
        if without.size:
            rows, begin = gather_rows(rec.start, without)
            up[rows] = median_direction(acc[rows], begin)
        linear = acc - GRAVITY * up
        vertical = row_dot(linear, up)
        horizontal = row_norm(linear - vertical[:, None] * up)
        origin = rot.T[:, np.repeat(first, np.diff(rec.start))].T
        swing = row_norm(turn_between(origin, rot))
        omega = as_rate(turn_between(rot[:-1], rot[1:]), rot[:, :1], rec.start)
        jerk = as_rate(acc[1:] - acc[:-1], acc, rec.start)
        return cls(acc, rot, north, west, up, linear, omega, jerk, vertical, horizontal, swing)


def world_ahead(m: Motion, start: I64, cut: I64) -> tuple[F64, F64]:
    """Horizontal acceleration along and across the heading of the device's x axis during the
    gesture, which begins in the rows `cut`. → 2 × (R) m/s²

    The compass heading of a wearer means nothing; this frame goes with the wearer.
    """
    pair = np.stack([cut, start[1:]], axis=1).ravel()
    aim = np.stack([np.r_[m.north[:, 0], 0], np.r_[m.west[:, 0], 0]])  # (2, R + 1)
    aim = np.add.reduceat(aim, pair, axis=1)[:, ::2]  # (2, N)
    aim = aim / np.maximum(np.hypot(*aim), 1e-12)
    c, s = np.repeat(aim, np.diff(start), axis=1)
    x, y = row_dot(m.north, m.linear), row_dot(m.west, m.linear)
    return c * x + s * y, c * y - s * x


# %% [markdown]
# Left-handers are mirrored and devices worn upside down are turned back, by exact maps: signs
# change and sensors swap, no number is rounded. Everything after this sees right-handers only.


# %%
@dataclass(frozen=True, slots=True)
class DeviceMap:
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


def mirrored(rec: Recordings, mask: Bool) -> Recordings:
    """The recordings in `mask` (N), seen in a mirror that reverses the device's x axis."""
    return apply_map(rec, mask, MIRROR)


def turned_upright(rec: Recordings, mask: Bool) -> Recordings:
    """The recordings in `mask` (N), as if the device had been worn the other way round."""
    return apply_map(rec, mask, HALF_TURN)


def canonical(rec: Recordings, upside_down: Bool) -> Recordings:
    """As if every wearer were right-handed and wore the device the right way round.

    `upside_down` (N) marks devices worn rotated by 180° about z. Ids, demographics and labels stay
    as they are, so this is applied once. Arrays are shared where nothing changes.
    """
    left = rec.person[:, PERSON.index("handedness")] == 0
    if left.any():
        rec = mirrored(rec, left)
    return turned_upright(rec, upside_down) if np.any(upside_down) else rec


# %% [markdown]
# ### Wearer
#
# Some people wear the device turned by 180° about its z axis. A small antisymmetric model tells:
# its evidence for a recording is exactly minus that for the turned twin, so it needs no example
# of one; nearly all training wearers are right way up. Evidence adds up over a wearer's recordings.

# %%
N_ODD = 30  # figures below


def window_mean(x: F64, first: I64, last: I64) -> F64:
    """Mean of the rows first[i] … last[i] - 1. (R, C) → (N, C)"""
    total = np.zeros((len(x) + 1, x.shape[1]))
    np.cumsum(x, axis=0, out=total[1:])
    return (total[last] - total[first]) / (last - first)[:, None]


def odd_features(rec: Recordings) -> F64:
    """Figures that a turn of the device by 180° about z negates, and leaves else. (N, 30)

    Of the beginning, the end and the whole: means of acc_x and acc_y, alone and times even ones;
    what sensors 2 and 3 see more than 4 and 5, with which they change places.
    """
    near = (rec.tof <= FARTHEST).mean(axis=(2, 3), dtype=np.float64)  # (R, 5)
    near[(rec.tof == MISSING).all(axis=(2, 3))] = np.nan
    pairs = np.c_[near, rec.thm]
    sides = np.nan_to_num(pairs[:, [1, 2, 6, 7]] - pairs[:, [3, 4, 8, 9]])  # one missing: 0
    rows = np.c_[np.nan_to_num(rec.acc) / GRAVITY, sides]
    begin, end = rec.start[:-1], rec.start[1:]
    opening, gesture = np.minimum(begin + 10, end), np.maximum(end - GESTURE_ROWS, begin)
    parts = []
    for first, last in ((begin, opening), (gesture, end), (begin, end)):
        x, y, z, *side = window_mean(rows, first, last).T
        parts += [x, y, x * z, y * z, x * y * y, y * x * x, *side]
    return np.stack(parts, axis=1)


def fit_wearer(odd: F64) -> dict[str, Any]:
    """A logistic model without intercept that tells `odd` (n, 30) from its negative."""
    scale = np.sqrt((odd**2).mean(axis=0)) + 1e-6
    twins = np.concatenate([odd, -odd]) / scale
    upright = np.repeat([1, 0], len(odd))
    model = linear_model.LogisticRegression(C=0.1, fit_intercept=False, max_iter=1000)
    coefficients = model.fit(twins, upright).coef_[0] / scale
    return {"coefficients": [float(f"{c:.8g}") for c in coefficients]}


def wearer_logit(rec: Recordings, wearer: Mapping[str, Any]) -> F64:
    """Log odds that each recording's device is worn the right way up, before any prior. → (N)"""
    return odd_features(rec) @ np.array(wearer["coefficients"])


def find_upside_down(rec: Recordings, fold: I64, cfg: Config) -> tuple[Bool, dict[str, Any] | None]:
    """Which training recordings to turn back (N), and the model that tells for new wearers.

    Each wearer is judged by a model of the other folds. Two rounds: the second learns from data
    in which the first one's finds are turned back.
    """
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
# Canonical recordings come in; out come one row of numbers per recording for trees, and channels of
# every row for networks. A family is one function and one line of FEATURES: it receives a Chunk,
# which makes each shared intermediate once, and returns its columns (F, N). Recordings are cut into
# chunks of similar length that fit the processor's cache and run side by side; no result depends on
# the cutting. Statistics are population statistics over the rows that are there, in float64; a
# statistic of nothing, or a shape of something constant, is NaN.
#
# A column needs the sensors that its name mentions: thm, tof, or both. That is how a table loses a
# modality afterwards, to the last bit as if the sensor had never been there.

# %%
CHUNK_ROWS = 24_000  # measured: 6,000 take a fifth longer, two threads then wait for one lock
IMAGE_ROWS = 1_000  # ToF rows at a time
THM_BIT, TOF_BIT = 1, 2

Columns = dict[str, str]  # name → unit


def vector_names(stem: str) -> tuple[str, ...]:
    """Names of the three components of a vector."""
    return tuple(f"{stem}_{axis}" for axis in "xyz")


MOTION_SIGNALS = {
    **dict.fromkeys((*vector_names("acc"), "acc_mag"), "m/s²"),
    **dict.fromkeys((*vector_names("lin"), "lin_mag"), "m/s²"),
    **dict.fromkeys(("world_ahead", "world_aside", "world_up", "world_flat"), "m/s²"),
    **dict.fromkeys((*vector_names("omega"), "omega_mag"), "rad/s"),
    **dict.fromkeys(vector_names("up"), "1"),
    **{"jerk_mag": "m/s³", "swing": "rad", "lean": "rad"},
}
THM_SIGNALS = dict.fromkeys(THM, "°C")
TOF_SIGNALS = {f"tof_{i}_{n}": u for i in range(1, 6) for n, u in (("near", "1"), ("dist", "raw"))}
SIGNALS = MOTION_SIGNALS | THM_SIGNALS | TOF_SIGNALS


def signal_index(*names: str) -> list[int]:
    """Rows of Chunk.x."""
    order = tuple(SIGNALS)
    return [order.index(name) for name in names]


def above_zero(n: npt.NDArray[Any]) -> F64:
    """NaN in place of what is not above zero: a divisor that lets nothing through."""
    return np.where(n > 0, n, np.nan)


def ratio(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> F64:
    """a / b, NaN where b is not above zero."""
    with np.errstate(invalid="ignore", over="ignore"):
        return a / above_zero(b)


def without_noise(variance: F64, mean: F64) -> F64:
    """Variance with rounding noise about a constant set to exactly zero."""
    with np.errstate(invalid="ignore"):
        return np.where(variance <= 1e-14 * mean * mean, 0.0, variance)


@dataclass(frozen=True, eq=False)
class Parts:
    """Signals cut into k parts of each recording: what a statistic of them needs, made once.

    Part j is the rows edges[j] … edges[j + 1] - 1; together the parts fill their recording. Signals
    have a spare column at their end, which lets an edge be R. Statistics are (k, C, N).
    """

    x: F64  # (C, R + 1) NaN: missing
    edges: tuple[I64, ...]  # k + 1 × (N)

    @functools.cached_property
    def known(self) -> Bool:
        return ~np.isnan(self.x)

    @functools.cached_property
    def count(self) -> F64:
        return self.sum(self.known.astype(np.float32))

    @functools.cached_property
    def mean(self) -> F64:
        return ratio(self.sum(np.where(self.known, self.x, 0.0)), self.count)

    @functools.cached_property
    def centred(self) -> F64:
        """x less the mean of its part, 0 where missing. (C, R + 1)"""
        edges = np.stack(self.edges, axis=1)
        spans = (edges[:, 1:] - edges[:, :-1]).ravel()  # (N · k)
        means = self.mean.transpose(1, 2, 0).reshape(len(self.x), -1)
        out = np.zeros_like(self.x)
        level = np.repeat(means, spans, axis=1)
        np.subtract(self.x[:, :-1], level, out=out[:, :-1], where=self.known[:, :-1])
        return out

    @functools.cached_property
    def variance(self) -> F64:
        return without_noise(ratio(self.sum(self.centred**2), self.count), self.mean)

    def sum(self, x: npt.NDArray[Any]) -> F64:
        """Sums over the parts, all in one pass. (C, R + 1) → (k, C, N); of no rows 0"""
        begin, end = (np.stack(edges, axis=1) for edges in (self.edges[:-1], self.edges[1:]))
        total = np.add.reduceat(x, np.append(begin, end[-1, -1]), axis=1)[:, :-1]
        total = total.reshape(len(x), *begin.shape)
        return np.moveaxis(np.where(end > begin, total, 0.0), 2, 0)


def motion_signals(rec: Recordings, cut: I64) -> dict[str, F64]:
    """Vectors in device axes (_x, _y, _z; _mag their size): acc as measured, lin without gravity,
    omega the angular velocity, jerk the change of acc, up the vertical, north and west. world_up is
    lin along the vertical, world_flat the size of the rest, world_ahead and world_aside the rest
    along and across the heading of the device's x axis during the gesture. swing is the turn since
    the first row, lean the angle between the vertical and that of the first row.

    Recordings, first rows of their gestures → name → (R)
    """
    m, n_rows = Motion.of(rec), np.diff(rec.start)
    vectors = {"acc": m.acc, "lin": m.linear, "omega": m.omega, "jerk": m.jerk}
    signals = {f"{stem}_mag": row_norm(v) for stem, v in vectors.items()}
    for stem, v in (vectors | {"up": m.up, "north": m.north, "west": m.west}).items():
        signals |= zip(vector_names(stem), v.T, strict=True)
    ahead, aside = world_ahead(m, rec.start, cut)
    signals |= {"world_ahead": ahead, "world_aside": aside, "world_up": m.vertical}
    signals |= {"world_flat": m.horizontal, "swing": m.swing}
    begin = m.up.T[:, np.repeat(rec.start[:-1], n_rows)].T
    signals["lean"] = 2 * np.arctan2(row_norm(m.up - begin), row_norm(m.up + begin))
    return signals


class Chunk:
    """Some recordings and what their features share, each made when first needed."""

    def __init__(self, rec: Recordings) -> None:
        self.rec = rec
        self.first, self.last = rec.start[:-1], rec.start[1:]  # `last` is the row behind each
        self.n_rows = np.diff(rec.start)
        self.cut = np.maximum(self.first, self.last - GESTURE_ROWS)  # first row of the gesture

    @functools.cached_property
    def motion(self) -> dict[str, F64]:
        """name → (R)"""
        return motion_signals(self.rec, self.cut)

    @functools.cached_property
    def pixels(self) -> F64:
        """ToF signals in the order of PIXELS. (5, S, R + 1) NaN: missing, or no row before"""
        return tof_signals(self.rec.tof, self.rec.start)

    @functools.cached_property
    def x(self) -> F64:
        """Signals in the order of SIGNALS. (C, R + 1) NaN: missing, no step before the first row"""
        x = np.full((len(SIGNALS), len(self.rec.acc) + 1), np.nan)
        for row, name in zip(x, MOTION_SIGNALS, strict=False):
            row[:-1] = self.motion[name]
        x[signal_index(*THM), :-1] = self.rec.thm.T
        x[signal_index(*TOF_SIGNALS)] = self.pixels[:, :2].reshape(len(TOF_SIGNALS), -1)
        for k in signal_index(*vector_names("omega"), "omega_mag", "jerk_mag"):
            x[k, self.first] = np.nan
        return x

    @functools.cached_property
    def whole(self) -> Parts:
        return Parts(self.x, (self.first, self.last))

    @functools.cached_property
    def halves(self) -> Parts:
        """The rows before the gesture, and the gesture."""
        return Parts(self.x, (self.first, self.cut, self.last))

    @functools.cached_property
    def opening(self) -> F64:
        """Mean of the first three rows. (C, N)"""
        return self.mean_at(self.first[:, None] + np.arange(3))

    @functools.cached_property
    def step(self) -> F64:
        """x less its value in the row before, NaN in the first row. (C, R + 1)"""
        d = np.full_like(self.x, np.nan)
        np.subtract(self.x[:, 1:], self.x[:, :-1], out=d[:, 1:])
        d[:, self.rec.start] = np.nan
        return d

    def inside(self, row: I64) -> I64:
        """Rows of each recording, (N, n); the spare column for those beyond its ends."""
        own = (row >= self.first[:, None]) & (row < self.last[:, None])
        return np.where(own, row, self.rec.start[-1])

    def mean_at(self, row: I64) -> F64:
        """Mean over some rows of each recording, as far as they exist. (N, n) → (C, N)"""
        x = self.x[:, self.inside(row)]
        known = ~np.isnan(x)
        return ratio(np.where(known, x, 0.0).sum(axis=2), known.sum(axis=2))

    def gesture(self, x: F64) -> F64:
        """The gesture's rows, NaN in front of shorter recordings. (C, R + 1) → (C, N, 31)"""
        row = self.last[:, None] + np.arange(-GESTURE_ROWS, 0)
        return x[:, self.inside(row)]


# %% [markdown]
# A ToF image becomes numbers per row by a product with a small table of whole-numbered weights:
# sums over regions and moments of all images at once, exact because every sum is a whole number.

# %%
REGIONS = ("nw", "ne", "sw", "se", "mid")  # quarters, and the 4×4 pixels in the middle
PIXELS = {  # signals of one ToF sensor: name → unit; x to the right, y down, origin in the middle
    **{"near": "1", "dist": "raw", "min": "raw", "sd": "raw", "cx": "pixels", "cy": "pixels"},
    **{"sx": "raw/pixel", "sy": "raw/pixel", "flow": "raw"},  # up to here the networks' too
    **{"xx": "pixels²", "yy": "pixels²", "xy": "pixels²", "asym_x": "1", "asym_y": "1"},
    **{f"{region}_near": "1" for region in REGIONS},
    **{f"{region}_dist": "raw" for region in REGIONS},
}


def pixel_weights() -> F32:
    """1, x, y, x², y², x·y of doubled coordinates, and the five regions. → (11, 64)"""
    y, x = 2.0 * np.mgrid[:8, :8] - 7
    quarters = [(y < 0) & (x < 0), (y < 0) & (x > 0), (y > 0) & (x < 0), (y > 0) & (x > 0)]
    middle = (np.abs(x) < 4) & (np.abs(y) < 4)
    weights = [np.ones_like(x), x, y, x * x, y * y, x * y, *quarters, middle]
    return np.stack(weights).reshape(11, 64).astype(np.float32)


PIXEL_WEIGHTS = pixel_weights()
DISTANCE_WEIGHTS = PIXEL_WEIGHTS[[0, 1, 2, 6, 7, 8, 9, 10]]


def image_sums(image: U8) -> tuple[F64, F64, F64]:
    """Weighted sums over the pixels in range: of 1 with each of PIXEL_WEIGHTS, of the distance with
    DISTANCE_WEIGHTS, and the plain one of its square. (n, 64) → (11, n), (8, n), (n)

    Products take a few hundred images at a time: the linear algebra library then does not start
    threads of its own, which would take longer than the product.
    """
    seen = image <= FARTHEST
    mask, distance = seen.astype(np.float32), (image * seen).astype(np.float32)
    parts = [slice(i, i + 360) for i in range(0, len(image), 360)]
    count = np.concatenate([mask[part] @ PIXEL_WEIGHTS.T for part in parts])
    total = np.concatenate([distance[part] @ DISTANCE_WEIGHTS.T for part in parts])
    square = np.einsum("ij,ij->i", distance, distance)
    return count.T.astype(np.float64, "C"), total.T.astype(np.float64, "C"), square.astype(float)


def pixel_flow(image: U8) -> F64:
    """Mean change of a pixel's closeness since the previous row. (R·5, 64) → (R·5) raw, first 5: 0

    Closeness is 250 less the distance, and 0 where nothing is in range.
    """
    close = (FARTHEST + 1 - image) * (image <= FARTHEST)
    now, past = close[5:], close[:-5]
    change = np.maximum(now, past) - np.minimum(now, past)
    flow = np.zeros(len(image))
    flow[5:] = change.reshape(-1, 16, 4).sum(axis=(1, 2), dtype=np.uint32)
    return flow / 64


def image_signals(image: U8) -> dict[str, F64]:
    """The signals of PIXELS of images (n, 64) but for flow. name → (n)"""
    (n, x, y, xx, yy, xy, *n_region), (d, dx, dy, *d_region), square = image_sums(image)
    lost = (image == MISSING).view(np.uint64).sum(axis=1)  # eight pixels a word, a byte each
    valid = above_zero(64.0 - lost.view(np.uint8).reshape(-1, 8).sum(axis=1))
    some = above_zero(n)
    var_x, var_y = n * xx - x * x, n * yy - y * y  # n² times the variance, exact
    half = np.minimum(image[:, :32], image[:, 32:])  # in two steps, twice as fast
    nw, ne, sw, se, _ = n_region
    signals = {
        "near": n / valid,
        "dist": d / some,
        "min": np.ascontiguousarray(half.T).min(axis=0) + 0 * some,
        "sd": np.sqrt(n * square - d * d) / some,
        "cx": x / (2 * some),
        "cy": y / (2 * some),
        "sx": 2 * (n * dx - d * x) / above_zero(var_x),
        "sy": 2 * (n * dy - d * y) / above_zero(var_y),
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
    """What each ToF image shows, in the order of PIXELS. (R, 5, 8, 8) → (5, S, R + 1)

    All NaN where a sensor is missing, and in the spare column. Where a sensor sees nothing, shares
    and flow are 0 and what describes the things in range is NaN. A first row has no flow, nor has
    the row behind a missing one.
    """
    image = np.ascontiguousarray(tof).reshape(-1, 64)
    out = np.full((5, len(PIXELS), len(tof) + 1), np.nan)
    for first in range(0, len(tof), IMAGE_ROWS):  # as much as the processor's cache holds
        last = min(first + IMAGE_ROWS, len(tof))
        part = image[5 * first : 5 * last]
        flow = pixel_flow(image[max(5 * first - 5, 0) : 5 * last])[-len(part) :]
        signals = image_signals(part) | {"flow": flow}
        for i, name in enumerate(PIXELS):
            out[:, i, first:last] = signals[name].reshape(-1, 5).T
    flow, gone = out[:, tuple(PIXELS).index("flow")], np.isnan(out[:, 0])
    flow[:, start[:-1]] = np.nan
    flow[:, 1:][gone[:, :-1]] = np.nan
    flow[gone] = np.nan
    return out


# %% [markdown]
# The families. A family's docstring says what its columns are; `feature_help` prints it.


# %%
def name_columns(signals: Mapping[str, str], stats: Mapping[str, str]) -> Columns:
    """Every statistic of every signal; a statistic's unit "=" is its signal's own."""
    return {
        f"{signal}_{stat}": unit.replace("=", own)
        for signal, own in signals.items()
        for stat, unit in stats.items()
    }


def by_signal(*stats: F64) -> F64:
    """Statistics (C, N) each → columns (C · len(stats), N), signal after signal."""
    return np.stack(stats, axis=1).reshape(-1, stats[0].shape[-1])


def levels(ch: Chunk) -> F64:
    """Mean, standard deviation, skewness and excess kurtosis over the recording."""
    (n,), (var,), c = ch.whole.count, ch.whole.variance, ch.whole.centred
    cube = c * c * c
    third = ratio(ch.whole.sum(cube)[0], n)
    fourth = ratio(ch.whole.sum(np.multiply(cube, c, out=cube))[0], n)
    skew, kurtosis = ratio(third, var**1.5), ratio(fourth, var * var) - 3
    return by_signal(ch.whole.mean[0], np.sqrt(var), skew, kurtosis)


QUANTILES = {"min": 0.0, "q10": 0.1, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q90": 0.9, "max": 1.0}


def quantiles(ch: Chunk) -> F64:
    """Smallest, 10, 25, 50, 75, 90 % quantile, largest value, and interquartile range."""
    n = len(MOTION_SIGNALS)
    row = ch.inside(ch.first[:, None] + np.arange(ch.n_rows.max()))
    ordered = np.take(ch.x[:n], row, axis=1)  # (C, N, T)
    ordered.sort(axis=2)  # NaN last
    q = sorted_quantiles(ordered, ch.whole.count[0, :n], np.array([*QUANTILES.values()]))
    return by_signal(*q, q[4] - q[2])


COURSE = (
    *("first", "last", "delta", "third1", "third2", "third3"),
    *("before_mean", "before_sd", "gesture_mean", "gesture_sd", "change"),
)


def course(ch: Chunk) -> F64:
    """Mean of the first and last 3 rows and their difference, of each third, of the rows before
    the gesture and in it (the last 31 rows), with the standard deviations and the change."""
    thirds = Parts(ch.x, tuple(ch.first + ch.n_rows * i // 3 for i in range(4)))
    end = ch.mean_at(ch.last[:, None] + np.arange(-3, 0))
    before, gesture = ch.halves.mean
    sd_before, sd_gesture = np.sqrt(ch.halves.variance)
    halves = (before, sd_before, gesture, sd_gesture, gesture - before)
    return by_signal(ch.opening, end, end - ch.opening, *thirds.mean, *halves)


def step_sizes(ch: Chunk) -> F64:
    """Mean size and standard deviation of the step from row to row; mean size in the gesture."""
    step = Parts(ch.step, ch.whole.edges)
    size = ch.halves.sum(np.where(step.known, np.abs(ch.step), 0.0))
    n = ch.halves.sum(step.known.astype(np.float32))
    mean, mean_gesture = ratio(size.sum(axis=0), n.sum(axis=0)), ratio(size[1], n[1])
    return by_signal(mean, np.sqrt(step.variance[0]), mean_gesture)


def gesture_range(ch: Chunk) -> F64:
    """Smallest value, median and largest value in the gesture."""
    ordered = np.sort(ch.gesture(ch.x), axis=2)
    return by_signal(*sorted_quantiles(ordered, ch.halves.count[1], np.array([0.0, 0.5, 1.0])))


COMPASS = dict.fromkeys((*vector_names("north"), *vector_names("west")), "1")


def compass(ch: Chunk) -> F64:
    """Means of the world's north and west in device axes, before the gesture and in it: where the
    wearer faces. That is no accident of a session: chairs and beds stand where they stand."""
    x = np.stack([np.append(ch.motion[name], np.nan) for name in COMPASS])
    return by_signal(*Parts(x, ch.halves.edges).mean)


SPECTRUM_SIGNALS = dict.fromkeys((*vector_names("lin"), "lin"), "(m/s²)²") | {"omega": "(rad/s)²"}
SPECTRUM = {f"band{i}": "1" for i in range(1, 5)} | {"centroid": "cycles/row"}
SPECTRUM |= {"rolloff": "cycles/row", "peak": "cycles/row", "entropy": "1", "power": "log10 ="}
SIX = (*vector_names("lin"), *vector_names("omega"))


def welch(x: F64, start: I64, n_fft: int) -> F64:
    """Welch's power spectra. (C, R + 1) → (C, N, n_fft // 2 + 1)

    Hann windows of at most `n_fft` rows, overlapping by half, each freed of its mean; a short
    recording is one window, filled up with zeros.
    """
    n = np.diff(start)
    window = np.minimum(n, n_fft)
    hop = window - window // 2
    n_windows = (n - window // 2) // hop
    owner = np.repeat(np.arange(len(n)), n_windows)  # (W) recording of each window
    first = np.cumsum(np.r_[0, n_windows])
    begin = start[owner] + (np.arange(len(owner)) - first[owner]) * hop[owner]
    size, time = window[owner][:, None], np.arange(n_fft)
    inside = time < size  # (W, n_fft)
    part = x[:, np.where(inside, begin[:, None] + time, x.shape[1] - 1)] * inside  # (C, W, n_fft)
    mean = part.sum(axis=2, keepdims=True) / size
    hann = np.where(size > 1, 0.5 - 0.5 * np.cos(2 * np.pi * time / size), 1.0) * inside
    power = np.abs(np.fft.rfft((part - mean) * hann, axis=2)) ** 2
    power /= (hann**2).sum(axis=1)[:, None]
    power[..., 1:-1] *= 2  # both signs of the frequency
    return np.add.reduceat(power, first[:-1], axis=1) / n_windows[:, None]


def spectra(ch: Chunk) -> F64:
    """Welch spectrum over the recording (64 rows a window): share of power in four bands of 1/8
    cycle per row, centroid, 85 % roll-off, strongest frequency, entropy (0 … 1), and log power."""
    return spectrum_shape(ch, ch.whole.centred[signal_index(*SIX)], ch.rec.start, 64)


def gesture_spectra(ch: Chunk) -> F64:
    """Spectrum of the last 32 rows: share of power in four bands of 1/8 cycle per row, centroid,
    85 % roll-off, strongest frequency, entropy (0 … 1), and log power."""
    n = np.minimum(ch.n_rows, 32)
    start = np.r_[0, np.cumsum(n)]
    rows = np.repeat(ch.last - start[1:], n) + np.arange(start[-1])
    x = ch.whole.centred[signal_index(*SIX)]
    return spectrum_shape(ch, x[:, np.r_[rows, x.shape[1] - 1]], start, 32)


def spectrum_shape(ch: Chunk, x: F64, start: I64, n_fft: int) -> F64:
    """Statistics of SPECTRUM for the signals of SPECTRUM_SIGNALS. (6, R + 1) → (F, N)

    The sum over three axes is the spectrum of the vector: it does not depend on how the device
    sits. The zero frequency is left out.
    """
    p = welch(x, start, n_fft)[..., 1:]  # (6, N, K)
    p = np.concatenate([p[:3], p[:3].sum(axis=0)[None], p[3:].sum(axis=0)[None]])
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


PAIRS = tuple(
    (f"{s}_{a}", f"{s}_{b}") for s in ("acc", "lin", "omega") for a, b in ("xy", "xz", "yz")
)
PAIRS += tuple((f"lin_{a}", f"omega_{a}") for a in ("x", "y", "z", "mag"))
CORRELATIONS = {f"corr_{a}_{b}": "1" for a, b in PAIRS}


def correlations(ch: Chunk) -> F64:
    """Pearson's correlation of two signals over the recording, and in the gesture."""
    a, b = (ch.x[signal_index(*names)] for names in zip(*PAIRS, strict=True))
    both = ~(np.isnan(a) | np.isnan(b))
    a, b = np.where(both, a, np.nan), np.where(both, b, np.nan)
    columns = []
    for edges in (ch.whole.edges, ch.halves.edges):
        p, q = Parts(a, edges), Parts(b, edges)
        covariance = ratio(p.sum(p.centred * q.centred), p.count)
        columns.append(ratio(covariance, np.sqrt(p.variance * q.variance))[-1])
    return np.concatenate(columns)


ECHO_SIGNALS = {
    "lin": SIX[:3],
    "omega": SIX[3:],
    "world_up": ("world_up",),
    "lin_mag": ("lin_mag",),
}
LAGS = range(1, 13)  # rows
ECHO = {f"echo{lag}": "1" for lag in LAGS[:8]} | {"echo_period": "rows", "echo_strength": "1"}


def echoes(ch: Chunk) -> F64:
    """Autocorrelation in the gesture at 1 … 8 rows, summed over the axes of a vector; the lag of
    2 … 12 rows at which it is largest, and how large it is there."""
    index = signal_index(*(name for group in ECHO_SIGNALS.values() for name in group))
    x = np.nan_to_num(ch.gesture(ch.halves.centred[index]))  # (8, N, 31)
    products = [(x[..., lag:] * x[..., : x.shape[2] - lag]).sum(axis=2) for lag in (0, *LAGS)]
    bounds = np.cumsum([0, *(len(group) for group in ECHO_SIGNALS.values())])[:-1]
    r = np.add.reduceat(np.stack(products), bounds, axis=1)  # (13, 4, N)
    variance = np.add.reduceat(ch.halves.variance[1, index], bounds, axis=0)
    r = np.where(variance > 0, ratio(r[1:], r[0]), np.nan)
    best = np.where(np.isnan(r[1:]), -2, r[1:]).argmax(axis=0)  # (4, N)
    period = np.where(np.isnan(r[0]), np.nan, best + 2.0)
    strength = np.take_along_axis(r[1:], best[None], axis=0)[0]
    return by_signal(*r[:8], period, strength)


EDGES = dict.fromkeys(ACC, (-4.0, -1.0, -0.25, 0.25, 1.0, 4.0))  # m/s²
EDGES |= {"omega_mag": (-2.0, -0.5, -0.1, 0.1, 0.5, 2.0)}  # rad/s
BINS = {f"step_bin{i}": "1" for i in range(1, 8)}


def histograms(ch: Chunk) -> F64:
    """Share of the steps from row to row in seven bins with fixed edges: -4, -1, -.25, .25, 1 and
    4 m/s², and half of that in rad/s but for .1 in place of .125."""
    step = ch.step[signal_index(*EDGES)]
    n = ch.whole.sum((~np.isnan(step)).astype(np.float32))  # (1, 4, N)
    below = [(step < edge[:, None]).astype(np.float32) for edge in np.array([*EDGES.values()]).T]
    shares = [ratio(ch.whole.sum(mark), n)[0] for mark in below]
    bounds = np.stack([np.zeros_like(n[0]), *shares, np.ones_like(n[0])], axis=1)  # (4, 8, N)
    return np.diff(bounds, axis=1).reshape(-1, len(ch.n_rows))


HEAT = {"rise": "°C", "slope": "°C/row", "hottest": "1"}


def heat(ch: Chunk) -> F64:
    """Gesture less the first 3 rows; slope of a straight line in the gesture; share of the rows of
    the gesture in which this is the warmest sensor."""
    index, halves = signal_index(*THM), ch.halves
    x, known = ch.x[index], halves.known[index]
    row = np.r_[np.arange(x.shape[1] - 1) - np.repeat(ch.first, ch.n_rows), 0]
    time = Parts(np.where(known, row, np.nan), halves.edges).centred
    slope = ratio(halves.sum(time * halves.centred[index]), halves.sum(time * time))[1]
    hottest = np.where(known, x, -np.inf).argmax(axis=0) == np.arange(len(x))[:, None]
    wins = halves.sum(np.where(np.any(known, axis=0), hottest, 0.0))[1]
    return by_signal(
        halves.mean[1, index] - ch.opening[index], slope, ratio(wins, wins.sum(axis=0))
    )


DETAILS = {f"tof_{i}_{n}": u for i in range(1, 6) for n, u in [*PIXELS.items()][2:]}


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


BODY = {"adult_child": "0/1", "age": "years", "sex": "0/1", "height_cm": "cm"}
BODY |= {"shoulder_to_wrist_cm": "cm", "elbow_to_wrist_cm": "cm"}
PROPORTIONS = {"arm_to_height": "1", "forearm_to_arm": "1"}


def body_measures(ch: Chunk) -> F64:
    """The wearer. Handedness is no column: left-handers were mirrored before."""
    who = dict(zip(PERSON, ch.rec.person.T.astype(np.float64), strict=True))
    arm, forearm = who["shoulder_to_wrist_cm"], who["elbow_to_wrist_cm"]
    proportions = ratio(arm, who["height_cm"]), ratio(forearm, arm)
    return np.stack([*(who[name] for name in BODY), *proportions])


PRESENCE = {"n_rows": "rows", "rot_present": "1"}
PRESENCE |= {f"{s}_{i}_present": "1" for s in ("thm", "tof") for i in range(1, 6)}


def presence(ch: Chunk) -> F64:
    """Number of rows; share of the rows in which a sensor was read."""
    read = np.zeros((11, len(ch.rec.acc) + 1))
    read[0, :-1] = np.isfinite(ch.rec.rot).all(axis=1)
    read[1:6, :-1], read[6:, :-1] = ~np.isnan(ch.rec.thm.T), ~np.isnan(ch.pixels[:, 0, :-1])
    return np.concatenate([ch.n_rows[None], ch.whole.sum(read)[0] / ch.n_rows])


@dataclass(frozen=True, slots=True)
class Family:
    """Columns of the table that one function makes, in its order."""

    make: Callable[[Chunk], F64]  # → (F, N)
    columns: Columns


FEATURES = (
    Family(
        levels,
        name_columns(SIGNALS, {"mean": "=", "sd": "=", "skew": "1", "kurtosis": "1"}),
    ),
    Family(quantiles, name_columns(MOTION_SIGNALS, dict.fromkeys((*QUANTILES, "iqr"), "="))),
    Family(course, name_columns(SIGNALS, dict.fromkeys(COURSE, "="))),
    Family(step_sizes, name_columns(SIGNALS, {"step": "=", "step_sd": "=", "gesture_step": "="})),
    Family(
        gesture_range,
        name_columns(SIGNALS, {"gesture_min": "=", "gesture_q50": "=", "gesture_max": "="}),
    ),
    Family(compass, name_columns(COMPASS, {"before_mean": "=", "gesture_mean": "="})),
    Family(spectra, name_columns(SPECTRUM_SIGNALS, SPECTRUM)),
    Family(
        gesture_spectra,
        name_columns(SPECTRUM_SIGNALS, {f"gesture_{k}": v for k, v in SPECTRUM.items()}),
    ),
    Family(correlations, CORRELATIONS | {f"gesture_{name}": "1" for name in CORRELATIONS}),
    Family(echoes, name_columns(dict.fromkeys(ECHO_SIGNALS, "1"), ECHO)),
    Family(histograms, name_columns(dict.fromkeys(EDGES, "1"), BINS)),
    Family(heat, name_columns(THM_SIGNALS, HEAT)),
    Family(tof_details, name_columns(DETAILS, {"gesture_mean": "=", "change": "="})),
    Family(body_measures, BODY | PROPORTIONS),
    Family(presence, PRESENCE),
)


def feature_help() -> list[tuple[str, str, str]]:
    """Name, unit and meaning of every column; the meaning is its family's docstring."""
    texts = [" ".join((family.make.__doc__ or "").split("\n\n")[0].split()) for family in FEATURES]
    return [
        (name, unit, text)
        for family, text in zip(FEATURES, texts, strict=True)
        for name, unit in family.columns.items()
    ]


def print_feature_help(cfg: Config) -> None:
    """Every family of columns and what it says, then each column's name and unit."""
    signals = " ".join((motion_signals.__doc__ or "").split("\n\n")[0].split())
    print(f"signals: {signals}")  # noqa: T201
    columns = iter(feature_help())
    for family in FEATURES:
        lines = [next(columns) for _ in family.columns]
        print(f"\n{family.make.__name__}: {lines[0][2]}")  # noqa: T201
        for name, unit, _ in lines:
            print(f"  {name:<28} {unit}")  # noqa: T201


@dataclass(frozen=True, slots=True)
class FeatureTable:
    """Features of N recordings. A modality can be taken away afterwards."""

    names: tuple[str, ...]
    x: F32  # (N, F); NaN: missing
    modality: U8  # (F) THM_BIT, TOF_BIT or both: sensors that the column needs
    blank: F32  # (F) what the column says without them: NaN, or 0 for shares of presence

    def __len__(self) -> int:
        return len(self.x)

    def of_mode(self, mode: str) -> FeatureTable:
        """The same table, without the columns that need ToF or THM in IMU mode."""
        if mode == "all":
            return self
        kept = np.flatnonzero(self.modality == 0)
        names = tuple(self.names[i] for i in kept)
        return FeatureTable(names, self.x[:, kept], self.modality[kept], self.blank[kept])

    def take(self, recordings: npt.NDArray[Any]) -> FeatureTable:
        """Some of the recordings, by number or mask, as copies."""
        return dataclasses.replace(self, x=self.x[recordings])

    def without(self, drop_thm: Bool, drop_tof: Bool) -> FeatureTable:
        """As if the recordings marked (N) had come without a sensor, to the last bit."""
        lost = drop_thm[:, None] & (self.modality & THM_BIT > 0)
        lost |= drop_tof[:, None] & (self.modality & TOF_BIT > 0)
        return dataclasses.replace(self, x=np.where(lost, self.blank, self.x))


@functools.cache
def table_columns() -> tuple[tuple[str, ...], U8, F32]:
    """Names of all columns, the modalities they need, and their values without them."""
    names = [name for family in FEATURES for name in family.columns]
    assert len(set(names)) == len(names), "a name occurs twice"
    needs = [THM_BIT * ("thm" in n) + TOF_BIT * ("tof" in n) for n in names]
    blank = [0.0 if n.endswith("_present") else np.nan for n in names]
    return tuple(names), np.array(needs, np.uint8), np.array(blank, np.float32)


# %% [markdown]
# ### Frames
#
# What a network sees of each row: named groups of channels, NaN where a sensor is missing. Where a
# ToF sensor works but sees nothing, its channels are finite: share 0, distances 250 (one beyond the
# farthest), everything else 0. Every triple *_x, *_y, *_z of the groups acc, rot and motion is one
# vector of the device frame: turning the wristband turns all of them alike.

# %%
TOF_CHANNELS = {  # channels of a ToF sensor, the first of PIXELS: value with nothing in range
    **{"near": 0.0, "dist": 250.0, "min": 250.0, "sd": 0.0, "cx": 0.0, "cy": 0.0},
    **{"sx": 0.0, "sy": 0.0, "flow": 0.0},
}
MOTION_CHANNELS = (
    *(*vector_names("lin"), "lin_mag", "world_up", "world_flat"),
    *(*vector_names("omega"), "omega_mag", *vector_names("jerk"), "jerk_mag", "swing"),
)
GROUPS = (
    ("acc", (*vector_names("acc"), "acc_mag")),
    ("rot", (*vector_names("up"), *vector_names("north"), *vector_names("west"))),
    ("motion", MOTION_CHANNELS),
    ("thm", THM),
    *((f"tof_{i}", tuple(f"tof_{i}_{name}" for name in TOF_CHANNELS)) for i in range(1, 6)),
)


def vector_triples(names: Sequence[str]) -> I64:
    """Columns of the vectors of the device frame, *_x, *_y, *_z. → (V, 3)"""
    assert not any(name.endswith("_w") for name in names), "a quaternion is no vector"
    stems = [n[:-2] for n in names if n.endswith("_x")]
    return np.array(
        [[names.index(name) for name in vector_names(stem)] for stem in stems], np.int64
    )


@dataclass(frozen=True, slots=True)
class Frames:
    """Channels of every row of N recordings, end to end."""

    start: I64  # (N + 1)
    x: F32  # (R, C) channels, group after group; NaN: missing
    groups: tuple[tuple[str, tuple[str, ...]], ...]  # (name, channel names) in the order of x
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
        """The same frames, without ToF and THM in IMU mode."""
        if mode == "all":
            return self
        kept = tuple(g for g in self.groups if not g[0].startswith(("thm", "tof")))
        assert self.groups[: len(kept)] == kept, "IMU groups come first"
        width = sum(len(names) for _, names in kept)
        return Frames(self.start, np.ascontiguousarray(self.x[:, :width]), kept)


def row_channels(ch: Chunk) -> F32:
    """The channels in the order of GROUPS. → (R, C)"""
    signals = ch.motion | dict(zip(THM, ch.rec.thm.T, strict=True))
    for name in vector_names("up"):  # guessed: the whole group rot tells that rotation is missing
        signals[name] = signals[name] + 0 * signals["swing"]
    for i, pixels in enumerate(ch.pixels, 1):
        there = ~np.isnan(pixels[0, :-1])  # the share in range is NaN where the sensor is missing
        for (name, nothing), x in zip(TOF_CHANNELS.items(), pixels[:, :-1], strict=False):
            signals[f"tof_{i}_{name}"] = np.where(np.isnan(x) & there, nothing, x)
    names = [name for _, group in GROUPS for name in group]
    out = np.empty((len(ch.rec.acc), len(names)), np.float32)
    for k, name in enumerate(names):
        out[:, k] = signals[name]
    return out


# %% [markdown]
# ### One pass
#
# Table and frames come from the same chunks, so that what they share is worked out once.


# %%
def reordered(rec: Recordings, order: I64) -> Recordings:
    """The recordings in `order`, without labels."""
    rows, start = gather_rows(rec.start, order)
    arrays = (rec.acc[rows], rec.rot[rows], rec.thm[rows], rec.tof[rows])
    return Recordings(start, *arrays, rec.sequence_id[order], rec.subject[order], rec.person[order])


def extract_features(
    rec: Recordings,
    workers: int = 2,
    progress: Progress | None = None,
    *,
    table: bool = True,
    frames: bool = True,
) -> tuple[FeatureTable, Frames]:
    """Features of every recording and channels of every row of recordings, which must be canonical.

    What is not wanted stays empty. Threads help because numpy lets go of Python's lock.
    """
    names, modality, blank = table_columns()
    n_channels = sum(len(group) for _, group in GROUPS)
    x = np.empty((table * len(rec), len(names)), np.float32)
    rows = np.empty((frames * len(rec.acc), n_channels), np.float32)

    def fill(order: I64) -> None:
        chunk = Chunk(rec if len(rec) == 1 else reordered(rec, order))
        with np.errstate(invalid="ignore"):
            if table:
                x[order] = np.concatenate([family.make(chunk) for family in FEATURES]).T
            if frames:
                rows[gather_rows(rec.start, order)[0]] = row_channels(chunk)

    n_rows = np.diff(rec.start)
    order = np.argsort(n_rows, kind="stable")  # recordings of similar length make one chunk
    cuts = np.flatnonzero(np.diff(np.cumsum(n_rows[order]) // CHUNK_ROWS)) + 1
    parts = np.split(order, cuts)
    with ThreadPoolExecutor(workers) as pool:
        for part, _ in zip(parts, pool.map(fill, parts), strict=True):
            if progress:
                progress.step(len(part))
    return FeatureTable(names, x, modality, blank), Frames(rec.start, rows, GROUPS, rec.tof)


# %% [markdown]
# ## 7 Batches
#
# In: Frames and the settings of a network. Out: batches in numpy, the same for Torch and Keras, in
# training and in serving: gather the last rows, change them at random (training only), standardise.
# A sensor that is lost in training is NaN before standardising, exactly what a recording without
# that sensor holds. Rows are aligned at the left; the mask says which exist.

# %%
STRETCH = 0.1  # a recording is played up to this much faster or slower
JITTER = 0.15  # rad, spread of the wristband's rotation about each axis
SHIFT, GAP = 6, 12  # rows at most that the end is cut by, and that go missing in the middle
CHANNEL_LOSS, MIXUP_ALPHA = 0.1, 0.4  # share of channels; parameter of the beta law
STRIDE = 8  # both networks halve time three times
PLACE_ROWS = 90.0  # unit of the rows still to come, the same whatever a network is padded to
MAX_DEVIATION = 10.0  # standard deviations; beyond them a channel says no more


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """What a network is made of; equal specs have equal graphs. Stored beside its weights."""

    groups: tuple[tuple[str, tuple[str, ...]], ...]  # as Frames.groups
    table: tuple[tuple[int, ...], ...]  # (L, 3) behavior, orientation, gesture of each label
    pad_len: int  # rows it sees, the last ones
    width: int  # channels of the first block
    images: bool  # does it see the ToF images themselves?

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(name for _, names in self.groups for name in names)

    @property
    def n_inputs(self) -> int:
        """D: channels, presence of each group, place, mask."""
        return len(self.channels) + len(self.groups) + 2

    @property
    def n_steps(self) -> int:
        """T: pad_len, rounded up so that it can be halved three times."""
        return -(-self.pad_len // STRIDE) * STRIDE

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
    pad_len = cfg.fixed_pad_len
    if pad_len == 0:
        pad_len = int(np.ceil(np.percentile(np.diff(frames.start), cfg.pad_len_percentile)))
    labels = tuple(tuple(row) for row in table.tolist())
    return NetworkSpec(frames.groups, labels, pad_len, width, images and frames.tof is not None)


def label_parts(table: I64) -> F32:
    """Gesture, orientation and behavior of each label, one-hot side by side. → (L, K + 4 + 2)"""
    sizes = ((2, len(GESTURES)), (1, len(ORIENTATIONS)), (0, 2))
    return np.concatenate([table[:, [k]] == np.arange(n) for k, n in sizes], axis=1).astype(
        np.float32
    )


def standardisation(frames: Frames, index: npt.NDArray[Any]) -> tuple[F32, F32]:
    """Mean and sd of each channel over the rows of some recordings (numbers, or a mask). → 2 × (C)

    Of the training recordings of a fold only. A channel that is always missing gets 0 and 1.
    """
    x = frames.x[gather_rows(frames.start, np.arange(len(frames))[index])[0]]
    there = ~np.isnan(x)
    n = np.maximum(there.sum(axis=0), 1)
    mean = np.where(there, x, 0).sum(axis=0, dtype=np.float64) / n
    square = np.where(there, x - mean, 0.0) ** 2
    sd = np.sqrt(square.sum(axis=0) / n)
    return mean.astype(np.float32), np.where(sd > 1e-6, sd, 1.0).astype(np.float32)


def dropped_modalities(n: int, rng: np.random.Generator, share: float) -> tuple[Bool, Bool]:
    """Which of n recordings lose THM and which ToF: of a `share` a third one, the other, both."""
    loss = np.where(rng.random(n) < share, rng.integers(1, 4, n), 0)
    return (loss & 1) > 0, (loss & 2) > 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Input and targets of B recordings."""

    x: F32  # (B, T, D) standardised channels, presence of each group, place, mask
    length: I64  # (B) rows that exist
    images: U8 | None = None  # (B, T, 5, 8, 8)
    label: F32 | None = None  # (B, L) probabilities
    phase: F32 | None = None  # (B, T / 8) share of rows in which the gesture is performed

    def __len__(self) -> int:
        return len(self.x)

    def pieces(self, size: int) -> list[Batch]:
        """The same recordings, `size` at a time."""
        names = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]
        return [
            Batch(**{name: getattr(self, name)[i : i + size] for name in names})
            for i in range(0, len(self), size)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """Makes batches of some frames for networks of one spec."""

    frames: Frames
    spec: NetworkSpec
    mean: F32  # (C)
    sd: F32  # (C)
    labels: Labels | None = None
    whole: bool = False  # always T = n_steps, for networks whose graph has a fixed length

    def plain(self, index: I64) -> Batch:
        """Recordings as they are."""
        last = self.frames.start[index + 1] - 1
        length = np.minimum(last + 1 - self.frames.start[index], self.spec.pad_len)
        row = last[:, None] - self.rows_from_end(length)
        images = self.frames.tof[row] if self.spec.images and self.frames.tof is not None else None
        return Batch(self.standardised(self.frames.x[row], length), length, images)

    def epoch(
        self, index: I64, n_batches: int, rng: np.random.Generator, cfg: Config
    ) -> Iterator[Batch]:
        """Every recording once, shuffled and changed at random, in batches of nearly equal size."""
        for part in np.array_split(rng.permutation(index), n_batches):
            yield self.augmented(part, rng, cfg)

    def augmented(self, index: I64, rng: np.random.Generator, cfg: Config) -> Batch:
        """Recordings changed at random, each change with its own probability."""
        n, start = len(index), self.frames.start
        first, last = start[index], start[index + 1] - 1
        shift = rng.integers(0, SHIFT + 1, n) * (rng.random(n) < cfg.shift_prob)
        last = last - np.minimum(shift, last - first)
        stretch = rng.uniform(-STRETCH, STRETCH, n) * (rng.random(n) < cfg.stretch_prob)
        length = ((last - first) / (1 + stretch)).astype(np.int64) + 1
        length = np.minimum(length, self.spec.pad_len)
        back = np.rint(self.rows_from_end(length) * (1 + stretch)[:, None]).astype(np.int64)
        row = last[:, None] - back  # nearest rows: between two, a rhythm of two rows would be lost
        x = self.frames.x[row]
        own = rng.beta(MIXUP_ALPHA, MIXUP_ALPHA, n)
        own = np.where(rng.random(n) < cfg.mixup_prob, np.maximum(own, 1 - own), 1)
        share: F32 = own.astype(np.float32)
        partner = rng.permutation(index)
        x = self.mixed(x, back, partner, share)
        x = self.jittered(x, rng, cfg)
        lose_thm, lose_tof = dropped_modalities(n, rng, cfg.modality_dropout_prob)
        x[self.silenced(length, x.shape[1], lose_thm, lose_tof, rng, cfg)] = np.nan
        images = None
        if self.spec.images and self.frames.tof is not None:
            images = np.where(lose_tof[:, None, None, None, None], MISSING, self.frames.tof[row])
        x = self.standardised(x, length)
        return Batch(x, length, images, *self.targets(index, partner, share, row, x[..., -1]))

    def rows_from_end(self, length: I64) -> I64:
        """How many rows before its last one each row lies; 0 in the padding. (B) → (B, T)"""
        longest = self.spec.n_steps if self.whole else -(-int(length.max()) // STRIDE) * STRIDE
        return np.maximum(length[:, None] - 1 - np.arange(longest), 0)

    def mixed(self, x: F32, back: I64, partner: I64, share: F32) -> F32:
        """Mixup: part of another recording's rows, aligned at the end; where it has none, or a
        sensor of either is missing, our own stay."""
        some = np.flatnonzero(share < 1)
        start = self.frames.start
        row = start[partner[some] + 1, None] - 1 - back[some]
        there = row >= start[partner[some], None]
        other = self.frames.x[np.maximum(row, 0)]
        mixture = other + share[some, None, None] * (x[some] - other)
        x[some] = np.where(there[..., None] & ~np.isnan(mixture), mixture, x[some])
        return x

    def jittered(self, x: F32, rng: np.random.Generator, cfg: Config) -> F32:
        """Turn every vector of a recording by one rotation, as a wristband that sits askew."""
        some = np.flatnonzero(rng.random(len(x)) < cfg.jitter_prob)
        angles = rng.normal(0, JITTER, (len(some), 3))
        if some.size:
            turn = transform.Rotation.from_rotvec(angles).as_matrix().astype(np.float32)
            triples = vector_triples(self.spec.channels)
            vectors = x[some][:, :, triples]  # (n, T, V, 3)
            turned = vectors @ turn.transpose(0, 2, 1)[:, None]
            x[some[:, None, None, None], np.arange(x.shape[1])[:, None, None], triples] = turned
        return x

    def silenced(
        self, length: I64, n_steps: int, lose_thm: Bool, lose_tof: Bool,
        rng: np.random.Generator, cfg: Config,
    ) -> Bool:  # fmt: skip
        """Rows and channels that go missing. → (B, T, C)"""
        n, names = len(length), np.array(self.spec.channels)
        lost = np.outer(lose_thm, np.char.startswith(names, "thm_"))
        lost |= np.outer(lose_tof, np.char.startswith(names, "tof_"))
        unlucky = (rng.random(n) < cfg.channel_mask_prob)[:, None]
        lost |= unlucky & (rng.random(lost.shape) < CHANNEL_LOSS)
        begin = rng.integers(0, length)[:, None]
        width = rng.integers(1, GAP + 1, n) * (rng.random(n) < cfg.time_mask_prob)
        steps = np.arange(n_steps)
        hole = (steps >= begin) & (steps < begin + width[:, None])
        return hole[:, :, None] | lost[:, None]

    def standardised(self, x: F32, length: I64) -> F32:
        """What a network is given; zero in the padding. (B, T, C) raw, NaN: missing → (B, T, D)

        After the channels the share of each group that is there, how many rows are still to come
        (the gesture is at the end), and the mask.
        """
        sizes = [len(names) for _, names in self.spec.groups]
        there = ~np.isnan(x)
        to_come = length[:, None] - 1 - np.arange(x.shape[1])
        out = np.empty((*x.shape[:2], self.spec.n_inputs), np.float32)
        z = np.clip((x - self.mean) / self.sd, -MAX_DEVIATION, MAX_DEVIATION)
        out[..., : x.shape[2]] = np.where(there, z, 0)
        begins = np.cumsum([0, *sizes[:-1]])
        counts = np.add.reduceat(there, begins, axis=2, dtype=np.float32)
        out[..., x.shape[2] : -2] = counts / np.array(sizes, np.float32)
        out[..., -2] = to_come / PLACE_ROWS
        out[..., -1] = 1
        out[to_come < 0] = 0
        return out

    def targets(self, index: I64, partner: I64, share: F32, row: I64, mask: F32) -> tuple[F32, F32]:
        """Label probabilities, and how much of each step is gesture. → (B, L), (B, T / 8)"""
        assert self.labels is not None
        one_hot = np.eye(len(self.labels.table), dtype=np.float32)
        own, other = one_hot[self.labels.composite[index]], one_hot[self.labels.composite[partner]]
        label = other + share[:, None] * (own - other)
        steps = (len(index), -1, STRIDE)
        performed = (self.labels.phase[row] * mask).reshape(steps).sum(axis=2)
        return label, performed / np.maximum(mask.reshape(steps).sum(axis=2), 1)


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

    def rng(self, cfg: Config, *path: str | int) -> np.random.Generator:
        return rng_for(cfg, self.member, self.mode, self.seed, self.fold, *path)


AUX_TARGETS = {"orientation": len(ORIENTATIONS), "behavior": len(BEHAVIORS)}  # two small boosters
AUX_ROUNDS, AUX_RATE = 60, 0.1
TINY = 1e-9  # a probability below it says no more than it


def lgbm_params(cfg: Config, n_classes: int, n_rows: int, seed: int) -> dict[str, Any]:
    """Parameters of a booster. Many features say the same, so a tree is shown only some of them."""
    threads = max(1, cpu_cores() // max(1, cfg.cmi_workers))
    return {
        "objective": "multiclass",
        "metric": "multi_logloss",
        "num_class": n_classes,
        "learning_rate": cfg.lgbm_lr,
        "num_leaves": cfg.lgbm_leaves,
        "min_data_in_leaf": min(10, 1 + n_rows // 20),
        "bagging_fraction": 0.8 if n_rows >= 10 else 1.0,
        "bagging_freq": 1,
        "feature_fraction": cfg.lgbm_feature_fraction,
        "extra_trees": cfg.lgbm_extra_trees,
        "lambda_l2": 1.0,
        "max_bin": 63,
        "force_col_wise": True,
        "deterministic": True,
        "num_threads": threads if n_rows >= MANY_ROWS else 1,
        "seed": seed,
        "verbosity": -1,
    }


MANY_ROWS = 3000  # with fewer, LightGBM's threads only wait for each other


def lgbm_side_by_side(job: Job, cfg: Config) -> int:
    """Jobs of few rows take one thread each, so as many run at once as there are cores."""
    return 1 if len(job.train) >= MANY_ROWS else cpu_cores()


def fit_lgbm(job: Job, table: FeatureTable, labels: Labels, cfg: Config) -> dict[str, Any]:
    """Train the boosters of one fold and write them as text; returns the number of rounds."""
    columns = top_features(job, table, cfg)
    names = [table.names[i] for i in columns]
    share = cfg.modality_dropout_prob
    if job.mode == NO_ROTATION and share:  # no other models answer these recordings without ToF
        share = max(share, 0.5)
    drop_thm, drop_tof = dropped_modalities(len(job.train), job.rng(cfg, "dropout"), share)
    x = table.take(job.train).without(drop_thm, drop_tof).x[:, columns]
    seed = int(job.rng(cfg).integers(2**31))
    for target, n_classes in AUX_TARGETS.items():
        params = lgbm_params(cfg, n_classes, len(x), seed) | {"learning_rate": AUX_RATE}
        dataset = lgb.Dataset(x, getattr(labels, target)[job.train], feature_name=names)
        text = lgb.train(params, dataset, AUX_ROUNDS).model_to_string()
        write_whole(job.folder / f"{job.stem}_{target}.txt", text)
    booster = boost_gestures(job, x, table.x[job.valid][:, columns], names, labels, cfg, seed)
    rounds = booster.best_iteration if booster.best_iteration > 0 else booster.current_iteration()
    write_whole(job.folder / f"{job.stem}.txt", booster.model_to_string(num_iteration=rounds))
    if not cfg.lgbm_top_features:  # they are chosen by a model of all features
        kinds = {k: booster.feature_importance(k, iteration=rounds) for k in ("gain", "split")}
        table_of_gains = pl.DataFrame({"feature": names, **kinds})
        write_whole(job.folder / f"{job.stem}_importance.csv", table_of_gains.write_csv())
    return {"rounds": rounds}


def boost_gestures(
    job: Job, x: F32, valid_x: F32, names: list[str], labels: Labels, cfg: Config, seed: int
) -> Any:
    """The main booster: 18 gestures, stopped when the validation rows no longer gain. → Booster"""
    truth = labels.gesture[job.valid]
    dataset = lgb.Dataset(x, labels.gesture[job.train], feature_name=names)
    progress = Progress("rounds", cfg.lgbm_rounds, 10**9, cfg, job=job.name)

    def competition_score(proba: F64, _: object) -> tuple[str, float, bool]:
        return "score", score(truth, proba.argmax(axis=1)), True

    def log_round(env: Any) -> None:
        values = {name: float(value) for _, name, value, *_ in env.evaluation_result_list}
        progress.step(1, lambda: values)
        if progress.done % cfg.log_every_steps == 0 or progress.done == progress.total:
            where = {"mode": job.mode, "fold": job.fold, "round": progress.done}
            append_jsonl(job.logs / "lgbm_progress.jsonl", cfg, **where, **values)

    callbacks = [log_round]
    if cfg.lgbm_es_rounds:
        stop = lgb.early_stopping(cfg.lgbm_es_rounds, first_metric_only=True, verbose=False)
        callbacks.append(stop)
    params = lgbm_params(cfg, len(GESTURES), len(x), seed)
    valid = [lgb.Dataset(valid_x, truth, reference=dataset)]
    rounds, score_too = cfg.lgbm_rounds, competition_score
    return lgb.train(params, dataset, rounds, valid, feval=score_too, callbacks=callbacks)


def top_features(job: Job, table: FeatureTable, cfg: Config) -> I64:
    """Columns to train on: all, or the K that gained most in this fold's earlier, full model."""
    if not cfg.lgbm_top_features:
        return np.arange(len(table.names))
    path = job.folder / f"{job.stem}_importance.csv"
    if not path.exists():
        raise ConfigError(
            f"LGBM_TOP_FEATURES={cfg.lgbm_top_features} needs {path} of an earlier run. "
            f"Run once with LGBM_TOP_FEATURES=0."
        )
    best = read_csv(path).sort("gain", descending=True)["feature"].to_list()
    column = {name: i for i, name in enumerate(table.names)}
    return np.sort([column[name] for name in best if name in column][: cfg.lgbm_top_features])


def read_csv(path: Path) -> pl.DataFrame:
    """A small CSV file of our own, whatever characters its path holds."""
    return pl.read_csv(io.BytesIO(path.read_bytes()))


def summarise_lgbm(models: Mapping[str, Sequence[Path]], out: Path) -> None:
    """feature_importance.csv: gain and splits of each feature, mean and spread over the folds.

    models: by mode, paths without suffix.
    """
    parts = [
        read_csv(path).with_columns(pl.lit(mode).alias("mode"))
        for mode, stems in models.items()
        for stem in stems
        if (path := stem.with_name(f"{stem.name}_importance.csv")).is_file()
    ]
    if parts:
        spread = [
            getattr(pl.col(c), f)().alias(f"{c}_{f}")
            for c in ("gain", "split")
            for f in ("mean", "std")
        ]
        whole = pl.concat(parts, how="vertical_relaxed").group_by("mode", "feature").agg(spread)
        order = whole.sort("mode", "gain_mean", "feature", descending=[False, True, False])
        write_whole(out / "feature_importance.csv", order.write_csv())


@dataclass(frozen=True, slots=True)
class LgbmFold:
    """The boosters of one fold."""

    gesture: Any
    orientation: Any
    behavior: Any
    names: tuple[str, ...]  # the columns they were trained on
    table: I64  # (L, 3) the composite labels


def load_lgbm(folder: Path, stems: Sequence[str], table: I64, cfg: Config) -> list[LgbmFold]:
    """The boosters of the given folds from their texts; those of a fold must agree in columns."""
    classes = {"": len(GESTURES)} | {f"_{target}": n for target, n in AUX_TARGETS.items()}
    folds = []
    for stem in stems:
        gesture, orientation, behavior = (
            load_booster(folder / f"{stem}{end}.txt", n) for end, n in classes.items()
        )
        names = tuple(gesture.feature_name())
        if not names == tuple(orientation.feature_name()) == tuple(behavior.feature_name()):
            raise DataError(f"{folder}: the boosters of {stem} differ in columns. Train again.")
        folds.append(LgbmFold(gesture, orientation, behavior, names, table))
    return folds


def load_booster(path: Path, n_classes: int) -> Any:
    """A booster from its text, after a look at whether it is whole: LightGBM itself dies of a text
    that is none. Digests are compared before; a text forged together with them is not withstood."""
    with refusing(path, f"is no whole LightGBM model of {n_classes} classes"):
        text = path.read_text(errors="replace")
        head = dict(re.findall(r"^(\w+)=(.*)$", text.partition("\n\n")[0], re.M))
        n_trees, sizes = text.count("\nTree="), head.get("tree_sizes", "").split()
        if not (text.startswith("tree\n") and "\nend of trees" in text):
            raise ValueError("its beginning or end is missing")
        if not n_trees == len(sizes) > 0 or n_trees % n_classes:
            raise ValueError(f"{n_trees} trees, {len(sizes)} announced")
        if head.get("num_class") != str(n_classes):
            raise ValueError(f"num_class={head.get('num_class')}")
        try:
            return lgb.Booster(model_str=text)
        except lgb.basic.LightGBMError as error:
            raise ValueError(str(error)) from None


def predict_lgbm(folds: Sequence[LgbmFold], table: FeatureTable) -> F32:
    """Composite probabilities of each fold. → (folds, N, L)

    P(label) = P(gesture) · P(orientation) P(behavior), the latter two within the gesture's labels.
    """
    behavior, orientation, gesture = folds[0].table.T
    same_gesture = (gesture[:, None] == gesture).astype(np.float64)  # (L, L)
    column = {name: i for i, name in enumerate(table.names)}
    answers = []
    for fold in folds:
        x = table.x[:, [column[name] for name in fold.names]]
        proba = [
            np.asarray(booster.predict(x, num_threads=1, validate_features=False))
            for booster in (fold.gesture, fold.orientation, fold.behavior)
        ]
        aux = proba[1][:, orientation] * proba[2][:, behavior] + TINY  # (N, L)
        joint = np.where(proba[0] < TINY, 0, proba[0])[:, gesture] * aux / (aux @ same_gesture)
        answers.append(joint / np.maximum(joint.sum(axis=1, keepdims=True), 1e-30))
    return np.stack(answers).astype(np.float32)


# %% [markdown]
# ## 9 Network training
#
# In: a job, Batches and a learner: what a framework must be able to do. Out: weights in the job's
# folder. One loop for both networks owns epochs, schedule, early stopping, best weights, resume and
# the retreat from lack of memory. After every epoch everything that the next one depends on is in
# one file; the random numbers of an epoch follow from its number, so there is none to be restored.


# %%
class Learner(typing.Protocol):
    """What a framework must be able to do with a network and its optimiser."""

    out_of_memory: type[BaseException]
    device: str
    precision: str

    def begin_epoch(self, seed: int) -> None: ...  # the noise of dropout follows from the seed
    def train_step(self, pieces: Sequence[Batch], rate: float) -> float: ...  # → loss
    def logits(self, batch: Batch) -> tuple[F32, F32]: ...  # of gesture (B, K), label (B, L)
    def weights(self) -> Arrays: ...  # what answers, and what `save` writes
    def state(self) -> Arrays: ...  # all that training changes
    def restore(self, state: Arrays) -> None: ...
    def save(self, path: Path, weights: Arrays) -> None: ...  # the path lacks its suffix
    def free_memory(self) -> None: ...  # what a step that failed has left


NETWORK_FORM = 2  # raise it when files or checkpoints of networks change
MIN_RATE = 1e-6


def softmax(raw: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Over the last axis. (…, K) → (…, K)"""
    power = np.exp(raw - raw.max(axis=-1, keepdims=True))
    return np.asarray(power / power.sum(axis=-1, keepdims=True))


def composite_proba(gesture: F32, label: F32, table: I64) -> F32:
    """Probabilities of the labels from logits. (B, K), (B, L), (L, 3) → (B, L), rows sum to 1

    Two heads speak about the gesture, the gesture's own and the sum over the labels; the labels of
    a gesture share the mean of both as the label head divides it.
    """
    belongs = (table[:, 2:] == np.arange(len(GESTURES))).astype(np.float32)  # (L, K)
    proba = softmax(label)
    summed = proba @ belongs
    mean = (softmax(gesture) + summed) / 2
    joint = proba / np.maximum(summed @ belongs.T, 1e-30) * (mean @ belongs.T)
    return np.asarray(joint / joint.sum(axis=1, keepdims=True), np.float32)


def predict_network(
    logits: Callable[[Batch], tuple[F32, F32]], batches: Batches, index: I64, size: int = 256
) -> F32:
    """Composite probabilities of some recordings. → (n, L)"""
    table = np.array(batches.spec.table)
    parts = [index[i : i + size] for i in range(0, len(index), size)]
    return np.concatenate([composite_proba(*logits(batches.plain(part)), table) for part in parts])


def log_loss(proba: npt.NDArray[Any], truth: I64) -> float:
    """Mean negative log probability of the truth. (N, K), (N)"""
    right = proba[np.arange(len(truth)), truth].astype(np.float64)
    return float(-np.log(np.maximum(right, 1e-7)).mean())


class Training:
    """One network on its way: how it learns, how far it has come, and its checkpoint."""

    def __init__(self, job: Job, learner: Learner, batches: Batches, cfg: Config) -> None:
        self.job, self.learner, self.batches, self.cfg = job, learner, batches, cfg
        n = len(job.train)
        size = min(self.own("batch_size"), max(n // 16, 4), n)
        self.n_batches = -(-n // size)  # steps an epoch
        self.size = -(-n // self.n_batches)  # recordings a step
        self.micro = -(-size // self.own("accum_steps", 1))  # recordings at once
        self.max_epochs, self.patience = self.own("max_epochs"), self.own("es_patience")
        self.history: list[dict[str, float]] = []
        self.best: Arrays = {}  # the weights that will be written
        self.best_epoch = 0  # counted from 1
        frames, labels = batches.frames, batches.labels
        assert labels is not None
        self.labels = labels
        self.settings = checkpoint_settings(job, cfg) | {  # what must be as before to go on
            "frames": digest(frames.start, frames.x, list(frames.names)),
            "labels": digest(labels.table, labels.composite),
            "precision": learner.precision,
        }

    def own(self, name: str, default: Any = 0) -> Any:
        """A setting of the job's member; one that a member lacks is off."""
        return getattr(self.cfg, f"{self.job.member}_{name}", default)

    @property
    def step(self) -> int:
        """Steps that the finished epochs took."""
        return len(self.history) * self.n_batches

    @property
    def is_over(self) -> bool:
        """All epochs done, or so many gone by without a lower validation loss."""
        stopped = 0 < self.patience <= len(self.history) - self.best_epoch and self.history
        return bool(stopped) or len(self.history) >= self.max_epochs

    def rate(self, step: int) -> float:
        """Learning rate: halved whenever RLR_PATIENCE epochs have gone by without a lower
        validation loss; without that a cosine up to the peak, another down to nothing."""
        peak, patience, total = (
            self.own("lr"),
            self.own("rlr_patience"),
            self.max_epochs * self.n_batches,
        )
        if patience:
            rate, best, waited = peak, np.inf, 0
            for loss in (epoch["val_loss"] for epoch in self.history):
                waited = 0 if loss < best else waited + 1
                best = min(best, loss)
                if waited >= patience:
                    rate, waited = max(rate / 2, MIN_RATE), 0
            return float(rate)
        top = 0.3 * total - 1
        low, part = peak / 25, step / max(top, 1)
        if step > top:
            low, part = peak / 25e4, (total - 1 - step) / max(total - 1 - top, 1)
        return float(low + (peak - low) * (1 - np.cos(np.pi * part)) / 2)

    def run_epoch(self, progress: Progress) -> float:
        """Every training recording once; the mean loss."""
        rng = self.job.rng(self.cfg, "epoch", len(self.history))
        self.learner.begin_epoch(int(rng.integers(2**31)))
        losses: list[float] = []
        made = self.batches.epoch(self.job.train, self.n_batches, rng, self.cfg)
        for batch in prefetched(made) if self.learner.device != "cpu" else made:
            rate = self.rate(self.step + len(losses))
            losses.append(self.step_that_fits(batch, rate))
            progress.step(1, functools.partial(dict, loss=losses[-1], lr=rate))
        mean = float(np.mean(losses))
        if not np.isfinite(mean):
            raise FloatingPointError(
                f"{self.job.name}: the loss of epoch {len(self.history) + 1} is {mean}. Lower "
                f"{self.job.member.upper()}_LR={self.own('lr'):g}, or turn mixed precision off "
                f"(TORCH_AMP=0, KERAS_MP=0)."
            )
        return mean

    def step_that_fits(self, batch: Batch, rate: float) -> float:
        """One step of the optimiser. Out of memory: again, in pieces of half the size."""
        while True:
            try:
                return self.learner.train_step(batch.pieces(self.micro), rate)
            except self.learner.out_of_memory:
                if self.micro <= 1:
                    raise
            self.micro = -(-self.micro // 2)
            self.learner.free_memory()
            log("retreat", out_of_memory=True, at_once=self.micro, a_step=len(batch))

    def finish_epoch(self, loss: float, secs: float) -> None:
        """Score the validation rows, keep the weights that will be written (the latest, or with
        early stopping those of the lowest validation loss), log, and save everything."""
        job, labels, lr = self.job, self.labels, self.rate(self.step + self.n_batches - 1)
        proba = predict_network(self.learner.logits, self.batches, job.valid)
        by_gesture, truth = gesture_proba(proba, labels.table), labels.gesture[job.valid]
        binary, macro = score_parts(truth, by_gesture.argmax(axis=1))
        epoch = {"train_loss": loss, "val_loss": log_loss(by_gesture, truth), "lr": lr}
        epoch["val_acc"] = float((by_gesture.argmax(axis=1) == truth).mean())
        epoch |= {"score": (binary + macro) / 2, "bin_f1": binary, "macro_f1": macro}
        lowest = self.history[self.best_epoch - 1]["val_loss"] if self.best_epoch else np.inf
        self.history.append(epoch)
        if not self.patience or epoch["val_loss"] < lowest - self.own("es_min_delta"):
            self.best, self.best_epoch = self.learner.weights(), len(self.history)
        self.save_checkpoint()
        where = {"mode": job.mode, "seed": job.seed, "fold": job.fold, "epoch": len(self.history)}
        rounded = {name: float(f"{value:.5g}") for name, value in epoch.items()}
        more = {"batch": self.size, "at_once": self.micro, "secs": round(secs, 3)}
        path = job.logs / f"{job.member}_progress.jsonl"
        append_jsonl(path, self.cfg, **where, **rounded, **more)
        table = pl.DataFrame(self.history).with_row_index("epoch", 1)
        write_whole(job.folder / f"{job.stem}_train.csv", table.write_csv())

    def save_checkpoint(self) -> None:
        """One file with everything."""
        parts = {"state": self.learner.state(), "best": self.best}
        arrays = {f"{part}/{k}": v for part, held in parts.items() for k, v in held.items()}
        note = {"history": self.history, "micro": self.micro, "best_epoch": self.best_epoch}
        write_arrays(checkpoint_path(self.job), arrays, note | {"settings": self.settings})

    def restore(self) -> None:
        """Go on from a checkpoint that fits; one that does not is named and left behind."""
        arrays, note, why = read_checkpoint(self.job, self.settings, self.cfg)
        if why:
            log("warning", job=self.job.name, checkpoint="not used", why=why)
        if note and not why:
            self.learner.restore({k[6:]: v for k, v in arrays.items() if k.startswith("state/")})
            self.best = {k[5:]: v for k, v in arrays.items() if k.startswith("best/")}
            self.history, self.micro, self.best_epoch = (
                note[name] for name in ("history", "micro", "best_epoch")
            )
            log("resume", job=self.job.name, epoch=len(self.history))


def fit_network(job: Job, learner: Learner, batches: Batches, cfg: Config) -> dict[str, Any]:
    """Train one network, or go on where its checkpoint stands, and write it to the job's folder."""
    training = Training(job, learner, batches, cfg)
    training.restore()
    total = training.max_epochs * training.n_batches
    log("network", job=job.name, device=learner.device, precision=learner.precision,
        train=len(job.train), a_step=training.size,
        epoch=f"{len(training.history)}/{training.max_epochs}")  # fmt: skip
    progress = Progress("steps", total, cfg.print_every_steps, cfg, training.step, job=job.name)
    while not training.is_over:
        began = time.monotonic()
        loss = training.run_epoch(progress)
        training.finish_epoch(loss, time.monotonic() - began)
    learner.save(job.folder / job.stem, training.best)
    scaling = {"mean": batches.mean.tolist(), "sd": batches.sd.tolist()}
    write_json(job.folder / f"{job.stem}_spec.json", dataclasses.asdict(batches.spec) | scaling)
    checkpoint_path(job).unlink(missing_ok=True)
    best = {"best_epoch": training.best_epoch, **training.history[training.best_epoch - 1]}
    return {"epochs": len(training.history), "device": learner.device, **best}


def checkpoint_path(job: Job) -> Path:
    """Where a training in progress is kept."""
    return job.scratch / f"{job.stem}.npz"


def checkpoint_settings(job: Job, cfg: Config) -> dict[str, Any]:
    """What the plan can say of what must be as before for a checkpoint to count, by name."""
    index = {"training rows": digest(job.train), "validation rows": digest(job.valid)}
    return cfg.training_settings(job.member) | index | {"form of the files": NETWORK_FORM}


def read_checkpoint(job: Job, settings: Mapping[str, Any], cfg: Config) -> tuple[Arrays, Any, str]:
    """Arrays and note of a checkpoint, and why it cannot be used; empty if there is none."""
    path = checkpoint_path(job)
    if not (path.is_file() and cfg.resume and getattr(cfg, f"resume_{job.member}")):
        return {}, {}, ""
    try:
        with refusing(path, "is no checkpoint"):
            arrays, note = read_arrays(path)
            return arrays, note, difference(settings, note["settings"])
    except DataError as error:
        return {}, {}, str(error)


def network_resumable(job: Job, cfg: Config) -> str:
    """For the plan: where a training stands that can be resumed, or why it cannot; or nothing."""
    _, note, why = read_checkpoint(job, checkpoint_settings(job, cfg), cfg)
    epochs = getattr(cfg, f"{job.member}_max_epochs")
    at = f"resumable at epoch {len(note['history'])} of {epochs}" if note else ""
    return f"not resumable, {why}" if why else at


def read_spec(path: Path, table: I64) -> tuple[NetworkSpec, F32, F32]:
    """Spec, mean and sd of a trained network."""
    with refusing(path, "describes no network"):
        stored = read_json(path)
        spec = NetworkSpec.read(stored)
        mean, sd = (np.array(stored[name], np.float32) for name in ("mean", "sd"))
        fit = mean.shape == sd.shape == (len(spec.channels),)
        if not (fit and np.isfinite([mean, sd]).all() and (sd > 0).all()):
            raise ValueError(
                f"mean {mean.shape} and sd {sd.shape} of {len(spec.channels)} channels"
            )
        if not np.array_equal(np.array(spec.table), table):
            raise ValueError(f"it was trained for {len(spec.table)} other labels")
    return spec, mean, sd


@dataclass(frozen=True, slots=True)
class NetworkFold:
    """One trained network, ready to answer."""

    logits: Callable[[Batch], tuple[F32, F32]]
    spec: NetworkSpec
    mean: F32
    sd: F32
    whole: bool  # batches of fixed length


def predict_folds(folds: Sequence[NetworkFold], frames: Frames) -> F32:
    """Composite probabilities by each network. → (folds, N, L)"""
    if frames.groups != folds[0].spec.groups:
        raise ValueError("The networks were trained on other channels than these. Train again.")
    index = np.arange(len(frames))
    return np.stack(
        [
            predict_network(f.logits, Batches(frames, f.spec, f.mean, f.sd, whole=f.whole), index)
            for f in folds
        ]
    )


# %% [markdown]
# ## 10 Torch
#
# In: Batches. Out: logits. A stem per sensor group → residual SE blocks, each halving time → BiLSTM
# → GRU → attention that the gesture phase guides → heads. Padding is zero after every layer and
# enters no statistic. All classes stand in one builder, so that importing this file loads no torch.

# %%
STEM_WIDTH = {"acc": 32, "rot": 32, "motion": 32, "thm": 16}  # ToF sensors: TOF_WIDTH each
TOF_WIDTH = IMAGE_WIDTH = 16
STEM_KERNEL, BLOCK_KERNEL = 5, 3
CLIP_NORM = 1.0


@functools.cache
def torch_classes() -> types.SimpleNamespace:  # noqa: C901 a builder that only holds classes
    """The layers and the network."""
    F = nn.functional

    class MaskedNorm(nn.Module):
        """Batch norm that leaves padding out of its statistics and zero in its output."""

        def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
            super().__init__()
            self.momentum, self.eps = momentum, eps
            self.fused = False  # into the convolution before it, see `fuse_norms`
            self.weight = nn.Parameter(torch.ones(width))
            self.bias = nn.Parameter(torch.zeros(width))
            self.register_buffer("running_mean", torch.zeros(width))
            self.register_buffer("running_var", torch.ones(width))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            """(B, C, T), (B, 1, T) → (B, C, T)"""
            if self.fused:
                return x * mask
            if not self.training:
                learnt = (self.running_mean, self.running_var, self.weight, self.bias)
                return F.batch_norm(x, *learnt, eps=self.eps) * mask
            known = x.float() * mask  # in float32, whatever the precision around it
            share = mask.sum() / mask.numel()  # of the rows that exist
            var_all, mean_all = torch.var_mean(known, (0, 2), correction=0)  # zeros included
            mean = mean_all / share
            var = (var_all + mean_all.square()) / share - mean.square()
            with torch.no_grad():
                n = mask.sum()
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * n / (n - 1).clamp(min=1), self.momentum)
            scale = self.weight * (var.clamp(min=0) + self.eps).rsqrt()
            shift = self.bias - mean * scale
            return (torch.addcmul(shift[:, None], known, scale[:, None]) * mask).to(x.dtype)

    class Block(nn.Module):
        """Two convolutions, squeeze and excitation, a shortcut; then time is halved."""

        def __init__(self, n_in: int, width: int) -> None:
            super().__init__()
            same = {"padding": BLOCK_KERNEL // 2, "bias": False}
            self.first = nn.Conv1d(n_in, width, BLOCK_KERNEL, **same)
            self.second = nn.Conv1d(width, width, BLOCK_KERNEL, **same)
            self.short = nn.Conv1d(n_in, width, 1, bias=False)
            self.norms = nn.ModuleList([MaskedNorm(width) for _ in range(3)])
            self.squeeze = nn.Linear(width, width // 8)
            self.excite = nn.Linear(width // 8, width)

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            """(B, C, T), (B, 1, T) → (B, W, T/2), (B, 1, T/2)"""
            h = F.silu(self.norms[0](self.first(x), mask))
            h = self.norms[1](self.second(h), mask)
            mean = h.sum(2) / mask.sum(2).clamp(min=1)  # over the rows that exist
            gain = torch.sigmoid(self.excite(F.silu(self.squeeze(mean))))
            h = F.silu(torch.addcmul(self.norms[2](self.short(x), mask), h, gain[:, :, None]))
            h = h.masked_fill(mask == 0, torch.finfo(h.dtype).min)
            mask = F.max_pool1d(mask, 2)
            return F.max_pool1d(h, 2).masked_fill(mask == 0, 0.0), mask

    class ImageStem(nn.Module):
        """A small 2-D network over each 8 × 8 image, shared by the five sensors."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(2, 8, 3, padding=1, stride=2)
            self.second = nn.Conv2d(8, IMAGE_WIDTH, 4)

        def forward(self, codes: Tensor) -> Tensor:
            """(B, T, 5, 8, 8) bytes → (B, 5, W, T)"""
            seen = (codes <= FARTHEST).float()
            near = (1 - codes.float() / FARTHEST) * seen  # 1 touching … 0 far away or unseen
            planes = torch.stack([near, seen], dim=3).flatten(0, 2)  # (B·T·5, 2, 8, 8)
            h = F.silu(self.second(F.silu(self.first(planes))))
            return h.view(*codes.shape[:3], -1).permute(0, 2, 3, 1)

    class Stem(nn.Module):
        """A convolution of its own for each sensor group, all in one with zeros between groups."""

        def __init__(self, spec: NetworkSpec) -> None:
            super().__init__()
            names = [name for name, _ in spec.groups]
            sizes = np.array([len(channels) for _, channels in spec.groups])
            sees = np.array([spec.images and name.startswith("tof_") for name in names])
            widths = np.array([STEM_WIDTH.get(name, TOF_WIDTH) for name in names])
            numbers = np.arange(len(names))
            of_input = np.r_[np.repeat(numbers, sizes), numbers]  # group of each input
            of_input = np.r_[of_input, np.repeat(numbers, IMAGE_WIDTH * sees)]
            block = of_input == np.repeat(numbers, widths)[:, None]  # (W, inputs)
            self.width = int(widths.sum())
            self.image = ImageStem() if sees.any() else None
            self.conv = nn.Conv1d(
                len(of_input), self.width, STEM_KERNEL, padding=STEM_KERNEL // 2, bias=False
            )
            self.norm = MaskedNorm(self.width)
            self.register_buffer("block", torch.tensor(block)[:, :, None].float(), persistent=False)
            with torch.no_grad():  # as layers of their own would begin
                reach = (self.block.sum(1, keepdim=True) * STEM_KERNEL).rsqrt()
                self.conv.weight.uniform_(-1, 1).mul_(self.block * reach)

        def forward(self, x: Tensor, images: Any, mask: Tensor) -> Tensor:
            """(B, inputs, T), (B, T, 5, 8, 8) → (B, W, T)"""
            if self.image is not None:
                x = torch.cat([x, self.image(images).flatten(1, 2) * mask], 1)
            weight = self.conv.weight * self.block
            h = F.conv1d(x, weight, self.conv.bias, padding=STEM_KERNEL // 2)
            return F.silu(self.norm(h, mask))

    class Head(nn.Module):
        """Pools the steps and says what was done, in which position, starting how, and when."""

        def __init__(self, spec: NetworkSpec, dropout: float) -> None:
            super().__init__()
            n_in = 2 * spec.width
            self.dropout = dropout
            self.phase = nn.Linear(n_in, 1)
            self.rank = nn.Sequential(
                nn.Linear(n_in, spec.width), nn.Tanh(), nn.Linear(spec.width, 1)
            )
            self.guidance = nn.Parameter(torch.ones(()))  # the phase's say in the rank
            self.sizes = (len(GESTURES), len(spec.table), len(ORIENTATIONS), 2)
            self.out = nn.Linear(2 * n_in, sum(self.sizes))
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
            self.dropout = dropout
            self.stem = Stem(spec)
            w = spec.width
            widths = (self.stem.width + 1, w, w + w // 2, 2 * w)
            self.blocks = nn.ModuleList(Block(a, b) for a, b in itertools.pairwise(widths))
            self.lstm = nn.LSTM(2 * w, w, batch_first=True, bidirectional=True)
            self.gru = nn.GRU(2 * w, 2 * w, batch_first=True)
            self.head = Head(spec, dropout)

        def forward(self, x: Tensor, images: Any, length: Any, noise: Any = None) -> Any:
            """(B, T, D), (B, T, 5, 8, 8), (B) → (B, …) five times; STRIDE divides T"""
            x = x.transpose(1, 2)
            place, mask = x[:, -2:-1], x[:, -1:]
            h = torch.cat([self.stem(x[:, :-2], images, mask), place], 1)  # the gesture comes last
            for block in self.blocks:
                h, mask = block(h, mask)
            with torch.autocast(h.device.type, enabled=False):  # the rest is small: float32
                h = drop(h.float().transpose(1, 2), self.dropout, noise, self.training)
                return self.head(self.remember(h, length), mask[:, 0], noise)

        def remember(self, h: Tensor, length: Any) -> Tensor:
            """BiLSTM → GRU over the steps that exist. (B, T, W) → (B, T, W)"""
            if len(h) == 1:
                return self.gru(self.lstm(h)[0])[0]
            self.lstm.flatten_parameters()  # for the copies that DataParallel makes
            self.gru.flatten_parameters()
            steps = (length.cpu() + STRIDE - 1) // STRIDE
            pack = torch.nn.utils.rnn.pack_padded_sequence
            packed = pack(h, steps, batch_first=True, enforce_sorted=False)
            packed = self.gru(self.lstm(packed)[0])[0]
            unpack = torch.nn.utils.rnn.pad_packed_sequence
            return unpack(packed, batch_first=True, total_length=h.shape[1])[0]

    return types.SimpleNamespace(MaskedNorm=MaskedNorm, Block=Block, Stem=Stem, Network=Network)


def drop(x: Tensor, p: float, noise: Any, training: bool) -> Tensor:
    """Dropout that draws from a generator of its own, so that threads cannot disturb each other."""
    if not training or p == 0:
        return x
    if noise is None:
        return torch.nn.functional.dropout(x, p)
    return x * torch.empty_like(x).bernoulli_(1 - p, generator=noise) / (1 - p)


# %% [markdown]
# ### Learner
#
# A card that is there need not work: torch says yes to cards for which it brings no kernels.


# %%
@functools.cache
def working_cards() -> tuple[int, ...]:
    """Cards on which torch computes: each is asked to do one operation."""
    cards = []
    for i in range(torch.cuda.device_count()):
        try:
            torch.ones(8, device=f"cuda:{i}").sum().item()
            cards.append(i)
        except (RuntimeError, AssertionError) as error:
            log("warning", card=i, left_out=str(error).split("\n")[0][:200], instead="the CPU")
    return tuple(cards)


def device_for(job_number: int, cfg: Config) -> Any:
    """One job a card, in turn, or the CPU; TORCH_DATA_PARALLEL=1: every job is led by the first.

    On the CPU the number of threads is fixed, whatever the machine: the last digits depend on it,
    and a network of this size that waits for a busy core to join in is slower than without it.
    """
    if cards := working_cards():
        chosen = 0 if cfg.torch_data_parallel else job_number % len(cards)
        return torch.device("cuda", cards[chosen])
    torch.set_num_threads(cfg.torch_threads)
    return torch.device("cpu")


SMALL_WORK = 3000  # recordings × epochs; a network is then done before a second process is up
WEIGHTS_LOCK = threading.Lock()  # initial weights come from torch's one global generator


def torch_side_by_side(job: Job, cfg: Config) -> int:
    """How many networks should train at once, each in a process: one a card, or one a core."""
    if cards := len(working_cards()):
        return 1 if cfg.torch_data_parallel else cards
    small = len(job.train) * cfg.torch_max_epochs < SMALL_WORK
    return 1 if small else max(1, min(cpu_cores() // cfg.torch_threads, 8))


def half_precision(device: Any, cfg: Config) -> Any:
    """bfloat16 where the card computes in it (from Ampere on), else float16; float32 if neither."""
    if not cfg.torch_amp or device.type != "cuda":
        return torch.float32
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if ampere else torch.float16


class TorchLearner:
    """A network, its averaged twin and its optimiser; see Learner."""

    def __init__(self, job: Job, spec: NetworkSpec, cfg: Config, half: Any = None) -> None:
        self.cfg = cfg
        device = device_for(job.seed * cfg.n_folds + job.fold, cfg)
        self.half = half or half_precision(device, cfg)
        with WEIGHTS_LOCK, torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(job.rng(cfg, "weights").integers(2**31)))
            self.net = torch_classes().Network(spec, cfg.torch_dropout)
        self.net.to(device)
        several = cfg.torch_data_parallel and len(working_cards()) > 1
        self.forward = torch.nn.DataParallel(self.net) if several else self.net
        decayed = [p for p in self.net.parameters() if p.ndim > 1]
        others = [p for p in self.net.parameters() if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": cfg.torch_weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.torch_lr, fused=True)
        scales = self.half is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=scales)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.net, multi_avg_fn=self.update_ema, use_buffers=True
        )
        halved = self.half is not torch.float32
        self.autocast = functools.partial(
            torch.autocast, device.type, self.half if halved else torch.bfloat16, enabled=halved
        )
        self.noise: Any = None
        self.device, self.precision = str(device), str(self.half).removeprefix("torch.")
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
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
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
        target = torch.from_numpy(batch.label).to(self.device)
        sizes = (gesture.shape[1], orientation.shape[1], 2)
        parts = (target @ self.net.head.parts).split(sizes, 1)
        total = self.soft_loss(label, target) + self.soft_loss(gesture, parts[0])
        aux = self.soft_loss(orientation, parts[1]) + self.soft_loss(behavior, parts[2])
        wanted = torch.from_numpy(batch.phase).to(self.device)
        mask = torch.from_numpy(batch.x[:, ::STRIDE, -1]).to(self.device)  # steps that exist
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
        net = self.average.module if self.cfg.torch_ema else self.net
        return torch_logits(net.eval(), self.device, batch)

    def weights(self) -> Arrays:
        net = self.average.module if self.cfg.torch_ema else self.net
        return {name: value.cpu().numpy().copy() for name, value in net.state_dict().items()}

    def state(self) -> Arrays:
        parts = {"net": self.net.state_dict(), "average": self.average.state_dict()}
        parts |= {
            f"optimizer/{i}": values for i, values in self.optimizer.state_dict()["state"].items()
        }
        flat = {f"{part}/{k}": v for part, values in parts.items() for k, v in values.items()}
        arrays = {name: value.cpu().numpy().copy() for name, value in flat.items()}
        return arrays | {f"scaler/{k}": np.array(v) for k, v in self.scaler.state_dict().items()}

    def restore(self, state: Arrays) -> None:
        nested: dict[str, dict[str, Any]] = collections.defaultdict(dict)
        for name, array in state.items():
            part, _, rest = name.partition("/")
            nested[part][rest] = torch.from_numpy(array) if part != "scaler" else array.item()
        self.net.load_state_dict(nested["net"])
        self.average.load_state_dict(nested["average"])
        moments: dict[int, dict[str, Any]] = collections.defaultdict(dict)
        for name, value in nested["optimizer"].items():
            number, _, key = name.partition("/")
            moments[int(number)][key] = value
        whole = self.optimizer.state_dict() | {"state": dict(moments)}
        self.optimizer.load_state_dict(whole)
        if nested["scaler"]:
            self.scaler.load_state_dict(nested["scaler"])

    def save(self, path: Path, weights: Arrays) -> None:
        content = io.BytesIO()
        torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, content)
        write_whole(path.with_name(f"{path.name}.pt"), content.getvalue())

    def free_memory(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def to_tensors(batch: Batch, device: Any) -> tuple[Any, Any, Any]:
    """Rows and images on the device, lengths on the host."""
    images = None if batch.images is None else torch.from_numpy(batch.images).to(device)
    return torch.from_numpy(batch.x).to(device), images, torch.from_numpy(batch.length)


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


def fuse_norms(net: Any) -> Any:
    """A network that only answers: each norm becomes part of the convolution before it."""
    fuse = importlib.import_module("torch.nn.utils.fusion").fuse_conv_bn_weights

    def fused(conv: Any, norm: Any, weight: Tensor) -> Any:
        learnt = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        conv.weight, conv.bias = fuse(weight, None, *learnt)
        norm.fused = True

    fused(net.stem.conv, net.stem.norm, net.stem.conv.weight * net.stem.block)
    for block in net.blocks:
        for conv, norm in zip((block.first, block.second, block.short), block.norms, strict=True):
            fused(conv, norm, conv.weight)
    return net


def load_torch(folder: Path, stems: Sequence[str], table: I64, cfg: Config) -> list[NetworkFold]:
    """Read and check the networks of a mode; only tensors are read, nothing is executed."""
    return [load_torch_fold(folder, stem, table, device_for(0, cfg)) for stem in stems]


def load_torch_fold(folder: Path, stem: str, table: I64, device: Any) -> NetworkFold:
    """One network, its norms fused."""
    spec, mean, sd = read_spec(folder / f"{stem}_spec.json", table)
    path = folder / f"{stem}.pt"
    net = torch_classes().Network(spec, 0.0)
    with refusing(path, "does not hold the network of its spec"):
        raw = io.BytesIO(path.read_bytes())
        net.load_state_dict(torch.load(raw, map_location="cpu", weights_only=True))
    net = fuse_norms(net.eval().requires_grad_(False)).to(device)
    logits = functools.partial(torch_logits, net, device)
    return NetworkFold(logits, spec, mean, sd, whole=False)


# %% [markdown]
# ## 11 Keras
#
# In: Batches. Out: logits. The third member, of another architecture: a deep branch for the IMU and
# a light one for ToF and THM meet in a BiLSTM and a BiGRU, all of Keras's own layers, so that any
# Keras opens a .keras file in safe mode. One compiled step serves all folds of a mode: a trace
# costs as much as several folds, so a fold only sets the variables anew.

# %%
KERAS_LOCK = threading.RLock()  # compiled steps are shared, so jobs on threads take turns


@functools.cache
def start_keras(threads: int) -> None:
    """Import TensorFlow and Keras without their noise; check the backend.

    Memory grows as needed, which must be said before the first operation: Torch may share the card.
    Torch's compiler, triton, must load before TensorFlow: each brings an LLVM, and the later
    triton, which Torch loads with its first optimiser, would end the process.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with silent_stderr():
        with contextlib.suppress(ImportError):
            importlib.import_module("triton")
        backend = keras.backend.backend()
        with contextlib.suppress(RuntimeError):  # somebody else in this process was first
            for card in tf.config.list_physical_devices("GPU"):
                tf.config.experimental.set_memory_growth(card, enable=True)
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(threads)
    if backend != "tensorflow":
        raise ConfigError(
            f"KERAS_BACKEND={backend}: training and serving need tensorflow. Unset KERAS_BACKEND, "
            f"or set USE_KERAS=0."
        )
    keras.config.set_image_data_format("channels_last")  # ~/.keras/keras.json may say otherwise
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Nothing on the process's standard error: TensorFlow's libraries write there unasked."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def branch_columns(spec: NetworkSpec) -> tuple[I64, I64]:
    """Columns of a batch that each branch is given: IMU with place, and ToF with THM. → 2 × (…)"""
    names, n = [name for name, _ in spec.groups], len(spec.channels)
    far = np.array([name.startswith(("thm", "tof")) for name in names])
    of_channel = np.repeat(far, [len(channels) for _, channels in spec.groups])
    column = np.arange(n + len(names))
    of_column = np.r_[of_channel, far]
    return np.r_[column[~of_column], spec.n_inputs - 2], column[of_column]


def keras_inputs(batch: Batch, spec: NetworkSpec) -> list[Any]:
    """A batch as the network takes it: IMU, (ToF and THM,) mask. → 2 or 3 × (B, T, …)"""
    parts = [batch.x[..., columns] for columns in branch_columns(spec) if columns.size]
    return [tf.constant(part) for part in (*parts, batch.x[..., -1:])]


def keras_logits(answer: Any, spec: NetworkSpec, batch: Batch) -> tuple[F32, F32]:
    """Logits of gesture and label in numpy. → (B, K), (B, L)"""
    gesture, label = answer(keras_inputs(batch, spec))
    return gesture.numpy(), label.numpy()


def residual_block(h: Any, mask: Any, name: str, width: int, kernel: int) -> tuple[Any, Any]:
    """Two convolutions with squeeze-and-excitation around a shortcut, then half the rows."""
    layers = keras.layers
    rows = layers.Reshape((h.shape[1],), name=f"{name}_rows")(mask)  # (B, T)

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


def keras_network(spec: NetworkSpec, dropout: float, policy: str = "float32") -> Any:
    """Inputs of `keras_inputs` → logits of gesture (B, K) and label (B, L), in float32 always.

    The dtype policy is this network's own: the process's is put back.
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        return connect_layers(spec, dropout)
    finally:
        keras.config.set_dtype_policy(before)


def connect_layers(spec: NetworkSpec, dropout: float) -> Any:
    """The graph: two branches, recurrent layers, attention, two heads."""
    layers, w = keras.layers, spec.width
    sizes = [len(columns) for columns in branch_columns(spec)]
    imu, far = (keras.Input((spec.n_steps, n), name=f"branch{i}") for i, n in enumerate(sizes))
    mask = keras.Input((spec.n_steps, 1), name="mask")
    h, left = imu, mask
    for i, (width, kernel) in enumerate([(w, 3), (2 * w, 5), (2 * w, 5)], start=1):
        h, left = residual_block(h, left, f"imu{i}", width, kernel)
    if sizes[1]:
        side, there = far, mask
        for i in (1, 2, 3):
            side, there = residual_block(side, there, f"far{i}", w // 2, 3)
        h = layers.Concatenate(name="joined")([h, side])
    h = layers.Dropout(dropout, name="dropout")(h)
    steps = layers.Reshape((spec.n_steps // STRIDE,), name="steps")(left)  # (B, T / 8)
    both = []
    for kind in (layers.LSTM, layers.GRU):
        # unrolled, Keras masks the steps of the way back in the order of the way there
        cell = kind(w, return_sequences=True, use_cudnn=False, name=kind.__name__.lower())
        both.append(layers.Bidirectional(cell, name=f"bi{cell.name}")(h, mask=steps))
    h = layers.Multiply(name="masked")([layers.Concatenate(name="recurrent")(both), left])
    scores = layers.Dense(4, name="scores")(layers.Dense(w, "tanh", name="hidden")(h))
    scores = layers.Permute((2, 1), name="by_head")(scores)  # (B, heads, T / 8)
    every_head = layers.RepeatVector(4, name="every_head")(steps)
    share = layers.Softmax(name="share")(scores, mask=every_head)
    h = layers.Flatten(name="pooled")(layers.Dot((2, 1), name="mean")([share, h]))
    h = layers.Dropout(dropout, name="dropout_pooled")(h)
    h = layers.Dense(2 * w, "relu", name="dense")(h)
    h = layers.Dropout(dropout, name="dropout_dense")(h)
    gesture = layers.Dense(len(GESTURES), dtype="float32", name="gesture")(h)
    label = layers.Dense(len(spec.table), dtype="float32", name="label")(h)
    inputs = [imu, far, mask] if sizes[1] else [imu, mask]
    return keras.Model(inputs, [gesture, label], name="cmi_network")


# %% [markdown]
# ### Learner


# %%
@dataclass(frozen=True, slots=True, eq=False)
class CompiledNetwork:
    """A network with its compiled functions; the next fold of a mode gets the same object."""

    network: Any
    optimizer: Any
    gradients: Any  # inputs, label probabilities, share of the step → loss, gradients
    apply: Any  # gradients → a step of the optimiser
    answer: Any  # inputs → logits
    initial: Arrays  # values before the first step

    @property
    def variables(self) -> dict[str, Any]:
        """Everything that training changes, numbered, but for the noise of dropout: Keras counts
        the layers of a process, so that their paths are others in the next one."""
        return number_variables((*self.network.weights, *self.optimizer.variables))


def number_variables(variables: Iterable[Any]) -> dict[str, Any]:
    """Variables of Keras by their place."""
    return {f"{i:04d}": variable for i, variable in enumerate(variables)}


@functools.lru_cache(maxsize=1)
def compiled_network(spec: NetworkSpec, policy: str, cfg: Config) -> CompiledNetwork:
    """Network, optimiser and compiled functions."""
    network = keras_network(spec, cfg.keras_dropout, policy)
    optimizer = keras.optimizers.AdamW(
        weight_decay=cfg.keras_weight_decay, global_clipnorm=CLIP_NORM, name="adamw"
    )
    if policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, name="scaled")
    optimizer.build(network.trainable_variables)
    smoothing = cfg.keras_label_smoothing
    entropy = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
    belongs = label_parts(np.array(spec.table))[:, : len(GESTURES)]
    inputs_of_any_size = [tf.TensorSpec(x.shape, tf.float32) for x in network.inputs]
    signature = [inputs_of_any_size, tf.TensorSpec((None, len(belongs))), tf.TensorSpec(())]
    compiled = functools.partial(tf.function, jit_compile=cfg.keras_jit, autograph=False)

    @compiled(input_signature=signature)
    def gradients(inputs: Any, label: Any, share: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = network(inputs, training=True)
            loss = entropy(label, logits[1]) + entropy(tf.matmul(label, belongs), logits[0])
            scaled = optimizer.scale_loss(loss * share)
        return loss * share, tape.gradient(scaled, network.trainable_variables)

    @compiled()
    def apply(grads: Any) -> None:
        optimizer.apply(grads, network.trainable_variables)

    @compiled(input_signature=signature[:1])
    def answer(inputs: Any) -> Any:
        return network(inputs, training=False)

    done = CompiledNetwork(network, optimizer, gradients, apply, answer, {})
    done.initial.update({k: v.value.numpy() for k, v in done.variables.items()})
    return done


class KerasLearner:
    """A compiled network as one job sees it; see Learner."""

    def __init__(self, job: Job, spec: NetworkSpec, cfg: Config) -> None:
        self.spec = spec
        self.device = "gpu" if tf.config.list_physical_devices("GPU") else "cpu"
        self.precision = dtype_policy(cfg)
        self.out_of_memory = tf.errors.ResourceExhaustedError
        self.compiled = compiled_network(spec, self.precision, cfg)
        self.restore(self.compiled.initial)
        rng = job.rng(cfg, "weights")
        for variable in self.compiled.network.trainable_variables:
            if variable.name.endswith("kernel"):  # Glorot's, of this fold's own
                fan = float(np.prod(variable.shape[:-1]) + variable.shape[-1])
                reach = (6 / fan) ** 0.5
                variable.assign(rng.uniform(-reach, reach, variable.shape).astype(np.float32))

    def begin_epoch(self, seed: int) -> None:
        noisy = [x for x in self.compiled.network.layers if hasattr(x, "seed_generator")]
        for i, layer in enumerate(noisy):
            layer.seed_generator.state.assign([seed + i, 0])

    def train_step(self, pieces: Sequence[Batch], rate: float) -> float:
        n = sum(map(len, pieces))
        self.compiled.optimizer.learning_rate = rate
        total, summed = 0.0, None
        for piece in pieces:
            inputs = keras_inputs(piece, self.spec)
            share = tf.constant(len(piece) / n, tf.float32)
            loss, grads = self.compiled.gradients(inputs, tf.constant(piece.label), share)
            total += float(loss)
            summed = (
                grads if summed is None else [a + b for a, b in zip(summed, grads, strict=True)]
            )
        self.compiled.apply(summed)
        return total

    def logits(self, batch: Batch) -> tuple[F32, F32]:
        return keras_logits(self.compiled.answer, self.spec, batch)

    def weights(self) -> Arrays:
        numbered = number_variables(self.compiled.network.weights)
        return {number: v.value.numpy() for number, v in numbered.items()}

    def state(self) -> Arrays:
        return {number: v.value.numpy() for number, v in self.compiled.variables.items()}

    def restore(self, state: Arrays) -> None:
        variables = self.compiled.variables
        for number, value in state.items():
            variables[number].assign(value)

    def save(self, path: Path, weights: Arrays) -> None:
        """In float32 under any policy, by Keras itself."""
        network = keras_network(self.spec, 0.0)
        network.set_weights([weights[number] for number in number_variables(network.weights)])
        partial = path.with_name(f".{path.name}.{os.getpid()}.part.keras")
        network.save(partial)
        write_whole(path.with_name(f"{path.name}.keras"), partial.read_bytes())
        partial.unlink()

    def free_memory(self) -> None:
        """TensorFlow gives memory back by itself."""


def dtype_policy(cfg: Config) -> str:
    """KERAS_POLICY, else half precision where every card has units for it, else float32."""
    if cfg.keras_policy:
        return cfg.keras_policy
    cards = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(card) for card in cards]
    able = [d.get("compute_capability", (0, 0)) >= (7, 0) for d in details]
    return "mixed_float16" if cfg.keras_mp and able and all(able) else "float32"


def fit_keras(job: Job, frames: Frames, labels: Labels, cfg: Config) -> dict[str, Any]:
    """Train one network and write {stem}.keras."""
    with KERAS_LOCK:
        start_keras(cfg.keras_threads)
        spec = network_spec(frames, labels.table, cfg.keras_width, images=False, cfg=cfg)
        batches = Batches(frames, spec, *standardisation(frames, job.train), labels, whole=True)
        return fit_network(job, KerasLearner(job, spec, cfg), batches, cfg)


@functools.lru_cache(maxsize=2)
def serving_network(spec: NetworkSpec, jit: bool) -> tuple[Any, Any]:
    """A float32 network, and a compiled function of any such network's values and inputs: traced
    once for all folds of a mode."""
    network = keras_network(spec, 0.0)
    n = len(network.trainable_variables)

    held = (*network.trainable_variables, *network.non_trainable_variables)
    signature = [
        [tf.TensorSpec(v.shape, v.dtype) for v in held],
        [tf.TensorSpec(x.shape, tf.float32) for x in network.inputs],
    ]

    @functools.partial(tf.function, input_signature=signature, jit_compile=jit, autograph=False)
    def answer(values: list[Any], inputs: list[Any]) -> Any:
        return network.stateless_call(values[:n], values[n:], inputs, training=False)[0]

    return network, answer


def load_keras(folder: Path, stems: Sequence[str], table: I64, cfg: Config) -> list[NetworkFold]:
    """The networks of some stems. Layers are built here: files give numbers only."""
    with KERAS_LOCK:
        start_keras(cfg.keras_threads)
        return [load_keras_fold(folder, stem, table, cfg) for stem in stems]


def load_keras_fold(folder: Path, stem: str, table: I64, cfg: Config) -> NetworkFold:
    """One network."""
    spec, mean, sd = read_spec(folder / f"{stem}_spec.json", table)
    network, answer = serving_network(spec, cfg.keras_jit)
    path = folder / f"{stem}.keras"
    with refusing(path, "does not hold the network of its spec"):
        network.load_weights(path)
    variables = (*network.trainable_variables, *network.non_trainable_variables)
    answer = functools.partial(answer, [tf.identity(v.value) for v in variables])
    return NetworkFold(functools.partial(keras_logits, answer, spec), spec, mean, sd, whole=True)


# %% [markdown]
# ## 12 Members, plan and jobs
#
# In: training data and what lies on disk. Out: trained models and complete out-of-fold rows. A
# member is a few functions joined under a name in MEMBERS; plan, blend and serving know no member
# by name. The plan compares what lies on disk with what would be trained now, model by model, and
# says what will happen and why. A model whose fingerprint differs is never used.


# %%
class Inputs:
    """What members are fed: table and frames of the same recordings, made in one pass when first
    asked for. With settings, as in training, progress is told and large frames lie on disk."""

    def __init__(
        self, rec: Recordings, cfg: Config | None = None, *, table: bool = True, frames: bool = True
    ) -> None:
        self.rec, self.cfg = rec, cfg
        self.wanted: dict[str, Any] = {"table": table, "frames": frames}

    @functools.cached_property
    def extracted(self) -> tuple[FeatureTable, Frames]:
        cfg = self.cfg
        if cfg is None:
            return extract_features(self.rec, **self.wanted)
        progress = Progress("features", len(self.rec), cfg.feature_log_every, cfg)
        with stage("features", cfg):
            table, frames = extract_features(self.rec, progress=progress, **self.wanted)
        if cfg.frame_cache and frames.x.nbytes <= cfg.frame_cache_max_mb * 2**20:
            return table, frames
        path = cfg.checkpoints / "cache" / "frames.npy"
        write_array(path, frames.x)
        log("frames", mb=frames.x.nbytes / 2**20, mapped_from=path)
        x = np.load(path, mmap_mode="r", allow_pickle=False)
        return table, dataclasses.replace(frames, x=x)

    @functools.cached_property
    def without_rotation(self) -> FeatureTable:
        """The table of the same recordings, as if none had a rotation."""
        rec = dataclasses.replace(self.rec, rot=np.full_like(self.rec.rot, np.nan))
        return Inputs(rec, self.cfg, frames=False).extracted[0]

    def table(self, mode: str) -> FeatureTable:
        """The features that a mode may see."""
        return self.without_rotation if mode == NO_ROTATION else self.extracted[0].of_mode(mode)

    def frames(self, mode: str) -> Frames:
        """The channels that a mode may see."""
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
    side_by_side: Callable[[Job, Config], int] = lambda job, cfg: 1  # jobs that should run at once
    resumable: Callable[[Job, Config], str] = lambda job, cfg: ""  # "resumable …", or why not
    summarise: Callable[[Mapping[str, Sequence[Path]], Path], None] = lambda models, out: None
    modes: tuple[str, ...] = MODES
    form: int = 2  # raise it when what fit writes changes: older models do not count


LGBM_FILES = (".txt", "_orientation.txt", "_behavior.txt")
MEMBERS = {
    "lgbm": Member(
        ("lightgbm",), LGBM_FILES, Inputs.table, fit_lgbm, load_lgbm, predict_lgbm, 0.20,
        lgbm_side_by_side, summarise=summarise_lgbm, modes=ROUTES,
    ),
    "torch": Member(
        ("torch",), (".pt", "_spec.json"), Inputs.frames, fit_torch, load_torch, predict_folds,
        0.45, torch_side_by_side, network_resumable, form=NETWORK_FORM,
    ),
    "keras": Member(
        ("keras", "tensorflow"), (".keras", "_spec.json"), Inputs.frames, fit_keras, load_keras,
        predict_folds, 0.35, resumable=network_resumable, form=NETWORK_FORM,
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

    def jobs(self, member: str, mode: str, cfg: Config) -> list[Job]:
        """One job per seed and fold."""
        folder, scratch = cfg.out / f"{member}_models" / mode, cfg.checkpoints / member / mode
        jobs = []
        for seed, k in itertools.product(
            range(getattr(cfg, f"{member}_seeds", 1)), range(cfg.n_folds)
        ):
            split = np.flatnonzero(self.fold != k), np.flatnonzero(self.fold == k)
            jobs.append(Job(member, mode, seed, k, *split, folder, scratch, cfg.out / "logs"))
        return jobs


@functools.lru_cache(maxsize=16)
def probe_input(data: TrainingData, member: str, mode: str) -> tuple[tuple[str, ...], list[float]]:
    """Columns of a member's input, and rough figures of the first recording that hold on any
    machine: they tell a feature that was changed under its old name from one that was not."""
    x = MEMBERS[member].prepare(Inputs(data.inputs.rec.part(0, 1)), mode)
    means = np.nan_to_num(x.x, nan=-999.0).mean(axis=0, dtype=np.float64)
    return x.names, [float(f"{v:.5g}") for v in means]


def fingerprint(job: Job, data: TrainingData, cfg: Config) -> dict[str, Any]:
    """All that the trained model of a job depends on, by name, so that a difference has one."""
    packages = MEMBERS[job.member].packages
    return {
        "form of the files": MEMBERS[job.member].form,
        "data": data.data_digest,
        "upside down": data.upside_down,
        "labels": digest(data.labels.table),
        "training rows": digest(data.inputs.rec.sequence_id[job.train]),
        "columns": digest(list(probe_input(data, job.member, job.mode)[0])),
        **{f"major version of {p}": package_version(p).split(".")[0] for p in packages},
        **cfg.training_settings(job.member),
    }


def why_not_reusable(job: Job, folder: Path, data: TrainingData, cfg: Config) -> str:
    """Why the model of a job in `folder` does not count; empty if it does."""
    path = folder / f"{job.stem}.json"
    if not path.exists():
        return "none yet"
    try:
        with refusing(path, "cannot be used"):
            then = read_json(path)
            other = difference(fingerprint(job, data, cfg), then["fingerprint"])
            figures = probe_input(data, job.member, job.mode)[1]
            same = other or np.allclose(figures, then["probe"], rtol=1e-2, atol=1e-3)
        spoilt = spoilt_file(folder, job.stem, MEMBERS[job.member].files)
    except DataError as error:
        return str(error)
    changed = f"{spoilt} is absent or was changed after training" if spoilt else ""
    return other or ("" if same else "its input is computed in another way now") or changed


def spoilt_file(folder: Path, stem: str, ends: Sequence[str]) -> str:
    """The first file of a model that is absent or not as it was written; empty if all are."""
    note = folder / f"{stem}.json"
    if not note.is_file():
        return note.name
    with refusing(note, f"does not name the files {', '.join(stem + end for end in ends)}"):
        digests = dict(read_json(note)["files"])
        if set(digests) != set(ends):
            raise ValueError(f"but {list(digests)}")
    paths = {end: folder / f"{stem}{end}" for end in ends}
    whole = {e: p.is_file() and digest(p.read_bytes()) == digests[e] for e, p in paths.items()}
    return next((paths[end].name for end in ends if not whole[end]), "")


def find_below(folder: Path, name: str, depth: int = 6) -> list[Path]:
    """Files and folders of that name below a folder, links followed, in order of their paths."""
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        if len(Path(root).relative_to(folder).parts) >= depth:
            folders.clear()
        if name in folders or name in files:
            found.append(Path(root) / name)
    return sorted(found)


def bundle_folders(member: str, cfg: Config) -> list[Path]:
    """Where models of a member may lie: the named bundle and ours, else ours and attached ones."""
    named: Path | None = getattr(cfg, f"{member}_bundle_path")
    own = cfg.out / f"{member}_models"
    if named is None:
        attached = find_below(KAGGLE_INPUT, f"{member}_models")
        return [own, *(path for path in attached if (path / "bundle.json").is_file())]
    folder = named.parent if named.name == "bundle.json" else named
    if not (folder / "bundle.json").is_file():
        raise ConfigError(
            f"{member.upper()}_BUNDLE_PATH={named}: looked for {folder / 'bundle.json'}, which "
            f"does not exist. Name a folder written by an earlier run, such as …/{member}_models."
        )
    return [folder, own]


def why_absent(member: str, cfg: Config) -> str:
    """Why a member takes no part; empty if it does. A missing package is an error if so set."""
    if not getattr(cfg, f"use_{member}"):
        return f"USE_{member.upper()}=0"
    missing = [f"{p} is not installed" for p in MEMBERS[member].packages if not package_version(p)]
    if missing and getattr(cfg, f"fail_if_{member}_missing", False):
        name = member.upper()
        raise ConfigError(
            f"{missing[0]} and FAIL_IF_{name}_MISSING=1. Install it, or USE_{name}=0."
        )
    return missing[0] if missing else ""


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

    @property
    def secs(self) -> float:
        """Seconds that the training of the models that are there took; NaN where none tells."""
        with contextlib.suppress(DataError, LookupError, TypeError, ValueError):
            paths = [path for s in self.stems if (path := self.folder / f"{s}.json").is_file()]
            return sum(float(read_json(path)["secs"]) for path in paths) if paths else np.nan
        return np.nan  # the plan says which note is damaged


def make_plan(data: TrainingData, cfg: Config) -> list[PlanItem]:
    """One item per member and mode, told in a line each."""
    pairs = [(name, mode) for name, member in MEMBERS.items() for mode in member.modes]
    plan = [plan_item(*pair, data, cfg) for pair in pairs]
    for item in plan:
        done = len(item.jobs) - len(item.todo) if item.action != "skip" else 0
        models = f"{done}/{len(item.jobs)}"
        log("plan", member=f"{item.member:<6}", mode=item.mode, action=f"{item.action:<6}",
            models=models, why=item.why, path=item.folder, last_secs=item.secs)  # fmt: skip
        for text in item.passed_over:
            log("passed over", bundle=text)
    return plan


def plan_item(member: str, mode: str, data: TrainingData, cfg: Config) -> PlanItem:
    """Reuse what fits entirely, wherever it lies; else train what is missing in our own folder."""
    jobs = tuple(data.jobs(member, mode, cfg))
    own = jobs[0].folder
    if absent := why_absent(member, cfg):
        return PlanItem(member, mode, "skip", absent, own, jobs, ())
    if getattr(cfg, f"force_train_{member}"):
        return PlanItem(member, mode, "train", f"FORCE_TRAIN_{member.upper()}=1", own, jobs, jobs)
    unfit: dict[Path, dict[Job, str]] = {}
    passed_over = []
    for folder in (bundle / mode for bundle in bundle_folders(member, cfg)):
        unfit[folder] = {j: w for j in jobs if (w := why_not_reusable(j, folder, data, cfg))}
        if not unfit[folder]:
            return PlanItem(member, mode, "reuse", "everything matches", folder, jobs, ())
        reason = collections.Counter(unfit[folder].values()).most_common(1)[0][0]
        if folder != own and reason != "none yet":
            passed_over.append(f"{folder}: {reason}")
    first = next(iter(unfit.values()))  # of the named bundle, or of our own folder
    why = collections.Counter(first.values()).most_common(1)[0][0]
    if not (cfg.resume and getattr(cfg, f"resume_{member}", True)):
        return PlanItem(member, mode, "train", f"{why}; RESUME=0", own, jobs, jobs)
    todo = tuple(unfit[own])
    begun = [note for j in todo if (note := MEMBERS[member].resumable(j, cfg))]
    resumes = len(todo) < len(jobs) or any(note.startswith("resumable") for note in begun)
    action, why = "resume" if resumes else "train", "; ".join([why, *begun[:1]])
    return PlanItem(member, mode, action, why, own, jobs, todo, tuple(passed_over))


# %% [markdown]
# ### Jobs
#
# Fit what the plan says, all modes of a member in one pool; then fill the out-of-fold rows, those
# of reused models as well. They start as NaN and must end without one: a recording that no fold
# scored cannot slip through. A note is written last: what has one is never trained again.


# %%
def run_job(
    job: Job, x: Any, labels: Labels, note: Mapping[str, Any], born: float, cfg: Config
) -> str:
    """Train one model and write its note last. Workers too count seconds from the run's start."""
    global STARTED
    STARTED = time.monotonic() - (time.time() - born)
    member, began = MEMBERS[job.member], time.monotonic()
    log("fit", job=job.name, train=len(job.train), valid=len(job.valid))
    job.note.unlink(missing_ok=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    info = member.fit(job, x, labels, cfg)
    files = {end: digest((job.folder / f"{job.stem}{end}").read_bytes()) for end in member.files}
    secs = round(time.monotonic() - began, 1)
    write_json(job.note, {**note, "files": files, "secs": secs, "info": info})
    return job.name


def run_jobs(jobs: Sequence[Job], data: TrainingData, cfg: Config) -> None:
    """Train all, one by one or side by side; each result is on disk as soon as it is made."""
    member = MEMBERS[jobs[0].member]
    inputs = {mode: member.prepare(data.inputs, mode) for mode in {job.mode: None for job in jobs}}
    born = time.time() - (time.monotonic() - STARTED)  # by the clock that machines share
    tasks = []
    for job in jobs:
        figures = probe_input(data, job.member, job.mode)[1]
        note = {"fingerprint": fingerprint(job, data, cfg), "probe": figures}
        tasks.append((job, inputs[job.mode], data.labels, note, born, cfg))
    here = cfg.cmi_backend in ("loky", "threading")
    fitting = member.side_by_side(jobs[0], cfg) if here else 1
    workers = min(max(cfg.cmi_workers, fitting), len(jobs))
    if workers == 1:
        for task in tasks:
            run_job(*task)
        return
    backend = joblib_backend(cfg, list(inputs.values()))
    dead = joblib.externals.loky.process_executor.TerminatedWorkerError
    try:
        with joblib.parallel_config(**backend, n_jobs=workers):
            parallel = joblib.Parallel(return_as="generator_unordered")
            done = parallel(joblib.delayed(run_job)(*task) for task in tasks)
            for n, name in enumerate(done, start=1):
                log("done", job=name, jobs=f"{n}/{len(jobs)}")
    except dead as error:
        raise DataError(
            f"A worker died while training {member.packages[0]} ({str(error).splitlines()[0]}). If "
            f"memory ran out, set CMI_WORKERS=1. Run again: what is done is kept."
        ) from None


def joblib_backend(cfg: Config, large: Sequence[Any]) -> dict[str, Any]:
    """joblib's backend on the machines that CMI_BACKEND names; `large` inputs travel once."""
    found = importlib.machinery.PathFinder.find_spec(__name__)
    if cfg.cmi_backend != "threading" and (found is None or found.origin != __file__):
        log("note", backend="threading", why="no other process can import what is defined here")
        return {"backend": "threading"}
    try:
        if cfg.cmi_backend == "dask":
            return {"backend": "dask", "client": dask_client(cfg), "scatter": list(large)}
        if cfg.cmi_backend == "ray":
            ray = importlib.import_module("ray")
            if not ray.is_initialized():
                address, cpus = cfg.ray_address or "local", cfg.cmi_workers
                ours = {"py_modules": [__file__]}  # so that workers can import it
                ray.init(address, num_cpus=None if cfg.ray_address else cpus, runtime_env=ours)
            importlib.import_module("ray.util.joblib").register_ray()
    except ImportError as error:
        raise ConfigError(f"CMI_BACKEND={cfg.cmi_backend} needs a package: {error}.") from None
    # loky starts a worker anew when its memory has grown, as by importing torch
    warnings.filterwarnings("ignore", "A worker stopped while some jobs were given")
    return {"backend": cfg.cmi_backend}


@functools.cache
def dask_client(cfg: Config) -> Any:
    """The cluster that DASK_SCHEDULER names, else one on this machine until the run ends."""
    client = importlib.import_module("distributed").Client
    if not cfg.dask_scheduler:
        return client(n_workers=cfg.cmi_workers, threads_per_worker=1)
    running = client(cfg.dask_scheduler)
    running.upload_file(__file__)  # so that its workers can import it, wherever they run
    return running


def bundle_digest(folder: Path, stems: Sequence[str]) -> str:
    """Digest of the notes of some models: says whether these are the ones that something is of."""
    return digest(*((folder / f"{stem}.json").read_bytes() for stem in stems))


def out_of_fold(item: PlanItem, data: TrainingData, cfg: Config) -> F32:
    """Composite probabilities of every recording by models that never saw its wearer, (N, L): read
    if they are of these models and folds, else asked for."""
    path = cfg.out / "oof" / f"oof_{item.member}_{item.mode}_composite.npy"
    of = {"models": bundle_digest(item.folder, item.stems), "folds": digest(data.fold)}
    with contextlib.suppress(DataError, OSError, ValueError):
        if read_json(path.with_suffix(".json")) == of | {"array": digest(path.read_bytes())}:
            return np.asarray(np.load(path, allow_pickle=False), np.float32)
    member, x = MEMBERS[item.member], MEMBERS[item.member].prepare(data.inputs, item.mode)
    oof = np.full((len(data.fold), len(data.labels.table)), np.nan, np.float32)
    with stage(f"{item.member}/{item.mode} out of fold", cfg):
        for k in sorted({job.fold for job in item.jobs}):
            jobs = [job for job in item.jobs if job.fold == k]
            stems, valid = [job.stem for job in jobs], jobs[0].valid
            proba = member.predict(
                member.load(item.folder, stems, data.labels.table, cfg), x.take(valid)
            )
            assert len(proba) == len(jobs), (proba.shape, len(jobs))
            oof[valid] = proba.mean(axis=0)
    assert not np.isnan(oof).any(), "some recording was scored by no fold"
    by_gesture = gesture_proba(oof, data.labels.table)
    write_array(path.with_name(path.name.replace("composite", "proba")), by_gesture)
    write_array(path, oof)
    write_json(path.with_suffix(".json"), of | {"array": digest(path.read_bytes())})
    return oof


def train_members(
    plan: Sequence[PlanItem], data: TrainingData, cfg: Config
) -> dict[tuple[str, str], F32]:
    """Carry out the plan; out-of-fold composite probabilities by (member, mode)."""
    oof = {}
    write_array(cfg.out / "oof" / "y_true.npy", data.labels.gesture)
    for name in MEMBERS:
        items = [item for item in plan if item.member == name and item.action != "skip"]
        todo = [job for item in items for job in item.todo]
        if todo:
            MEMBERS[name].prepare(data.inputs, todo[0].mode)  # features are a stage of their own
        with stage(f"{name} training", cfg, "" if todo else "reused" if items else "skipped"):
            try:
                if todo:
                    run_jobs(todo, data, cfg)
            finally:
                write_bundle(name, items, data, cfg)
        for item in items:
            proba = oof[name, item.mode] = out_of_fold(item, data, cfg)
            answer = gesture_proba(proba, data.labels.table).argmax(axis=1)
            log("member", member=name, mode=item.mode, score=score(data.labels.gesture, answer))
    return oof


def write_bundle(name: str, items: Sequence[PlanItem], data: TrainingData, cfg: Config) -> None:
    """bundle.json beside a member's models that lie here, of the modes that are complete, and its
    summary: also if a later job fails, so that a mishap leaves whole bundles."""
    own = cfg.out / f"{name}_models"
    whole = [s for s in items if all((s.folder / job.note.name).is_file() for job in s.jobs)]
    MEMBERS[name].summarise({s.mode: [s.folder / stem for stem in s.stems] for s in whole}, cfg.out)
    ours = [item for item in whole if item.folder.parent == own]
    if ours:  # else reused from elsewhere: their bundle is there
        packages = ("numpy", "polars", *MEMBERS[name].packages)
        write_json(own / "bundle.json", {
            "member": name,
            "modes": {item.mode: item.stems for item in ours},
            "labels": data.labels.table.tolist(),
            "gestures": GESTURES,
            "columns": {item.mode: probe_input(data, name, item.mode)[0] for item in ours},
            "majority": int(np.bincount(data.labels.gesture).argmax()),
            "settings": cfg.training_settings(name),
            "versions": {p: package_version(p) for p in packages},
        })  # fmt: skip


# %% [markdown]
# ## 13 Blend and assignment
#
# In: out-of-fold rows. Out: weights.json and scores.json. Per mode a log-linear pool of the
# members, P(label) ∝ Π P_m(label)^w_m, whose weights (their sum is free) give the least log loss;
# IMU members also join the pool of the all-sensor mode. Weights found on the rows they are scored
# on flatter; nested ones come from the other folds. A wearer performs each composite label a known
# number of times at most, so the labels of a wearer's recordings are assigned together.


# %%
@dataclass(frozen=True, slots=True)
class Blend:
    """How to pool the answers of several (member, mode) models in one mode."""

    parts: tuple[str, ...]  # "lgbm/all", "torch/imu", …
    weights: tuple[float, ...]  # ≥ 0, their sum acts as inverse temperature

    def pool(self, composite: Mapping[str, F32]) -> F32:
        """Composite probabilities of the blend from those of its parts. (N, L) each → (N, L)

        A part that is absent is left out; the weights of the rest grow to the same sum.
        """
        present = [i for i, part in enumerate(self.parts) if part in composite]
        weights = np.array([self.weights[i] for i in present])
        if not weights.sum() > 0:  # the weighted ones are all absent: the others count alike
            weights = np.ones(len(present))
        weights = weights * (sum(self.weights) or 1.0) / weights.sum()
        return pool_logs(log_probas([composite[self.parts[i]] for i in present]), weights)


def log_probas(composite: Sequence[F32]) -> F32:
    """M × (N, L) → (M, N, L)"""
    return np.log(np.maximum(np.stack(composite), np.float32(TINY)))


def pool_logs(logs: F32, weights: npt.NDArray[Any]) -> F32:
    """Softmax of the weighted sum of log probabilities. (M, N, L), (M) → (N, L)"""
    return np.asarray(softmax(np.tensordot(weights, logs, 1)), np.float32)


def fit_weights(logs: F32, same: Bool) -> F64:
    """Weights ≥ 0 of least log loss of the gesture. (M, N, L), (N, L) labels of the truth → (M)"""

    def loss(weights: F64) -> tuple[float, F64]:
        raw = np.tensordot(weights, logs, 1)
        power = np.exp(raw - raw.max(axis=1, keepdims=True))
        right = power * same
        total, hit = power.sum(axis=1), np.maximum(right.sum(axis=1), 1e-300)
        slope = power / total[:, None] - right / hit[:, None]
        gradient = flat @ slope.ravel().astype(np.float32) / len(same)
        return float(np.mean(np.log(total / hit))), gradient.astype(np.float64)

    flat, begin = logs.reshape(len(logs), -1), np.full(len(logs), 1 / len(logs))
    found = optimize.minimize(
        loss, begin, jac=True, method="L-BFGS-B", bounds=[(0, 10)] * len(logs)
    )
    return (
        np.asarray(found.x) if found.x.sum() > 1e-3 else begin / 100
    )  # worse than knowing nothing


def search_weights(
    logs: F32, truth: I64, table: I64, begin: F64, cfg: Config, rng: np.random.Generator
) -> F64:
    """Of ENSEMBLE_TRIALS random weights, those of the best score; never worse than `begin`, whose
    sum all share. (M, N, L), (N), (L, 3), (M) → (M)"""
    trials = rng.dirichlet(np.ones(len(logs)), cfg.ensemble_trials) * begin.sum()
    trials = np.concatenate([begin[None], np.eye(len(logs)) * begin.sum(), trials])
    belongs = (table[:, 2:] == np.arange(len(GESTURES))).astype(np.float32)  # (L, K)
    scores = np.empty(len(trials))
    size = max(1, 4_000_000 // logs[0].size)
    for i in range(0, len(trials), size):
        raw = trials[i : i + size].astype(np.float32) @ logs.reshape(len(logs), -1)
        n = len(raw)
        answer = (np.exp(raw, out=raw).reshape(-1, len(table)) @ belongs).argmax(axis=1)
        group = np.repeat(np.arange(n), len(truth))
        counts = count_classes(np.tile(truth, n), answer, group, n)
        scores[i : i + size] = np.mean(f1_of_counts(counts), axis=0)
    return trials[scores.argmax()]


def fixed_shares(parts: Sequence[str], cfg: Config) -> F64 | None:
    """Shares of "member/mode" parts from ENSEMBLE_WEIGHTS or ENSEMBLE_W_…, those of the first
    part's mode; None if weights are to be fitted. → (M), sum 1"""
    shares = {m: w for m in MEMBERS if (w := getattr(cfg, f"ensemble_w_{m}")) is not None}
    for item in filter(None, (t.strip() for t in cfg.ensemble_weights.split(","))):
        name, _, value = (text.strip() for text in item.partition(":"))
        try:
            shares[name if name in MEMBERS else f"no member {name}"] = float(value)
        except ValueError:
            shares[f"no number {value}"] = 0.0
        if bad := [m for m in shares if m not in MEMBERS]:
            raise ConfigError(
                f"ENSEMBLE_WEIGHTS: {item!r} is not of the form member:number ({bad[0]}); known "
                f"members are {', '.join(MEMBERS)}."
            )
    mode = parts[0].split("/")[1]
    if not shares or mode == NO_ROTATION:
        return None
    if not all(0 <= w < np.inf for w in shares.values()):
        raise ConfigError(f"Ensemble weights must not be negative or infinite, got {shares}.")
    split = [part.split("/") for part in parts]
    weights = np.array([shares.get(m, 0.0) if of == mode else 0.0 for m, of in split])
    if weights.sum() <= 0:
        raise ConfigError(f"Ensemble weights {shares} leave nothing to {', '.join(parts)}.")
    return weights / weights.sum()


def blend_parts(mode: str, present: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Which (member, mode) models join the pool of a mode: its own, then in `all` the IMU ones."""
    present = list(present)
    own = [p for p in present if p[1] == mode]
    return own + [p for p in present if mode == "all" and p[1] == "imu"]


def make_blend(
    parts: Sequence[str], logs: F32, truth: I64, table: I64, search: str, cfg: Config
) -> Blend:
    """Fit the weights, or the one scale of fixed shares. logs: (M, N, L)"""
    same = table[:, 2] == truth[:, None]
    shares = fixed_shares(parts, cfg)
    if shares is None:
        weights = fit_weights(logs, same)
        if search == "score":
            rng = rng_for(cfg, "blend", parts[0])
            weights = search_weights(logs, truth, table, weights, cfg, rng)
    elif cfg.ensemble_temperature:
        weights = shares / cfg.ensemble_temperature
    else:
        pooled: F32 = np.tensordot(shares, logs, 1).astype(np.float32)[None]
        weights = shares * fit_weights(pooled, same)[0]
    return Blend(tuple(parts), tuple(map(float, weights)))


def nested_blend(
    parts: Sequence[str], logs: F32, data: TrainingData, search: str, cfg: Config
) -> F32:
    """Out-of-fold composite probabilities by weights of the other folds. → (N, L)"""
    truth, table = data.labels.gesture, data.labels.table
    pooled = np.full(logs.shape[1:], np.nan, np.float32)
    for k in np.unique(data.fold):
        inner, outer = data.fold != k, data.fold == k
        blend = make_blend(parts, logs[:, inner], truth[inner], table, search, cfg)
        pooled[outer] = pool_logs(logs[:, outer], np.array(blend.weights))
    return pooled


# %% [markdown]
# ### Assignment


# %%
def label_capacities(labels: Labels, subject: Str) -> I64:
    """The largest number of times that any wearer did what each label says. → (L), 1 or more"""
    pairs = np.stack([np.unique(subject, return_inverse=True)[1], labels.composite], axis=1)
    who, counts = np.unique(pairs, axis=0, return_counts=True)
    capacity = np.ones(len(labels.table), np.int64)
    np.maximum.at(capacity, who[:, 1], counts)
    return capacity


class Assignment:
    """Composite labels of one wearer's recordings so far; each is given as often as it may be."""

    def __init__(self, table: I64, capacity: I64) -> None:
        self.table = table
        self.column = np.repeat(np.arange(len(table)), capacity)  # label of each place
        self.costs: dict[str, F32] = {}  # -log P of each place, by recording

    def gesture(self, recording: str, composite: F32) -> int:
        """Take in a recording, tell its gesture; the same recording again takes no second place.

        composite: (L). Without a solution the most probable gesture: more recordings than places
        (an unknown protocol), or figures that are not finite.
        """
        alone = int(gesture_proba(np.nan_to_num(composite)[None], self.table)[0].argmax())
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
    capacity = label_capacities(data.labels, rec.subject)
    for i in range(orders):
        wearers = {str(s): Assignment(data.labels.table, capacity) for s in np.unique(rec.subject)}
        for r in rng_for(cfg, "replay", i).permutation(len(rec)):
            wearer = wearers[str(rec.subject[r])]
            answer[i, r] = wearer.gesture(str(rec.sequence_id[r]), composite[r])
    return answer


# %% [markdown]
# ### How sure is a score
#
# Recordings of one wearer resemble each other, so wearers are drawn, not recordings. From counts
# per wearer a thousand draws take no time; a difference is taken within each draw.

# %%
DRAWS = 1000


class Scorer:
    """Scores with intervals, all of the same draws of subjects."""

    def __init__(self, data: TrainingData, cfg: Config) -> None:
        self.truth, self.fold = data.labels.gesture, data.fold
        names, self.who = np.unique(data.inputs.rec.subject, return_inverse=True)
        self.n = len(names)
        self.draws = rng_for(cfg, "bootstrap").multinomial(
            self.n, np.full(self.n, 1 / self.n), DRAWS
        )

    def sample(self, answers: I64) -> F64:
        """Scores of the draws. (N), or of several orders (orders, N) → (draws)"""
        answers = np.atleast_2d(answers)
        counts = sum(count_classes(self.truth, a, self.who, self.n) for a in answers)
        drawn = (self.draws @ np.reshape(counts, (-1, 81))).reshape(-1, 9, 9)
        return np.mean(f1_of_counts(drawn), axis=0)

    def score(self, answers: I64, mask: Bool | slice = slice(None)) -> float:
        """The mean over orders, of some of the recordings."""
        return float(np.mean([score(self.truth[mask], a[mask]) for a in np.atleast_2d(answers)]))

    def row(
        self, name: str, mode: str, kind: str, answers: I64, proba: F32 | None, nested: I64
    ) -> dict[str, Any]:
        """A line of the result table, compared with the nested blend."""
        drawn, value = self.sample(answers), self.score(answers)
        loss = None if proba is None else log_loss(proba, self.truth)
        ece = None if proba is None else calibration_error(proba, self.truth)
        gap = {"score": value - self.score(nested), **interval(drawn - self.sample(nested))}
        about = {"name": name, "mode": mode, "kind": kind, "score": value, **interval(drawn)}
        about["folds"] = [self.score(answers, self.fold == k) for k in np.unique(self.fold)]
        return about | {"log_loss": loss, "ece": ece, "secs": None, "difference": gap}


def interval(drawn: Any) -> dict[str, float]:
    """Where 95 % of the draws lie."""
    low, high = np.percentile(drawn, (2.5, 97.5))
    return {"low": float(low), "high": float(high)}


def reliability(proba: F32, truth: I64, bins: int = 10) -> tuple[F64, F64, I64]:
    """By confidence: its mean, the share of right answers, recordings. (N, K), (N) → 3 × (bins)

    NaN where no recording is.
    """
    sure = proba.max(axis=1).astype(np.float64)
    place = np.minimum((sure * bins).astype(np.int64), bins - 1)
    n = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, v, bins) for v in (sure, proba.argmax(axis=1) == truth)]
    with np.errstate(invalid="ignore"):
        return sums[0] / n, sums[1] / n, n


def calibration_error(proba: F32, truth: I64) -> float:
    """Expected calibration error: mean distance of confidence from accuracy, by recordings."""
    sure, right, n = reliability(proba, truth)
    return float(np.nansum(np.abs(sure - right) * n) / n.sum())


def blend_mode(
    mode: str, oof: Mapping[tuple[str, str], F32], data: TrainingData, scorer: Scorer, cfg: Config
) -> tuple[Blend, list[dict[str, Any]], dict[tuple[str, str], I64]]:
    """The blend of a mode, its lines of the result table, and the answers of each line."""
    pairs, table, truth = blend_parts(mode, oof), data.labels.table, data.labels.gesture
    parts, logs = ["/".join(p) for p in pairs], log_probas([oof[p] for p in pairs])
    other = "score" if cfg.ensemble_search == "logloss" else "logloss"
    blend = make_blend(parts, logs, truth, table, cfg.ensemble_search, cfg)
    nested = nested_blend(parts, logs, data, cfg.ensemble_search, cfg)
    proba = {
        ("blend", "nested"): gesture_proba(nested, table),
        ("blend", f"nested, {other}"): gesture_proba(
            nested_blend(parts, logs, data, other, cfg), table
        ),
        ("blend", "optimistic"): gesture_proba(pool_logs(logs, np.array(blend.weights)), table),
        **{(m, "member"): gesture_proba(oof[m, of], table) for m, of in pairs if of == mode},
    }
    write_array(cfg.out / "oof" / f"oof_blend_{mode}_proba.npy", proba["blend", "nested"])
    answers = {key: p.argmax(axis=1) for key, p in proba.items()}
    answers["blend", "assigned"] = replay_assignment(nested, data, cfg)
    base = answers["blend", "nested"]
    rows = [scorer.row(n, mode, k, a, proba.get((n, k)), base) for (n, k), a in answers.items()]
    loss = {(r["name"], r["kind"]): r["log_loss"] for r in rows}
    best = min(value for (_, kind), value in loss.items() if kind == "member")
    used = {p: round(w, 3) for p, w in zip(parts, blend.weights, strict=True) if w > 0}
    log("blend", mode=mode, nested=rows[0]["score"], assigned=rows[-1]["score"],
        log_loss=rows[0]["log_loss"], best_members_log_loss=best, weights=used)  # fmt: skip
    return blend, rows, answers


def uses_assignment(gain: float, cfg: Config) -> bool:
    """SUBJECT_ASSIGNMENT, or with auto: does it gain on out-of-fold rows?"""
    return gain > 0 if cfg.subject_assignment == "auto" else cfg.subject_assignment == "1"


def blend_members(
    oof: Mapping[tuple[str, str], F32], plan: Sequence[PlanItem], data: TrainingData, cfg: Config
) -> list[dict[str, Any]]:
    """Find and write ensemble/weights.json and oof/scores.json; the lines of the result table."""
    scorer, rows = Scorer(data, cfg), []
    blends, assigned, answers = {}, {}, {}
    for mode in (route for route in ROUTES if blend_parts(route, oof)):
        blends[mode], lines, answers[mode] = blend_mode(mode, oof, data, scorer, cfg)
        gain = lines[-1]["difference"]["score"]
        assigned[mode] = uses_assignment(gain, cfg)
        log("assignment", mode=mode, gain=gain, served=assigned[mode])
        rows += lines
    both = set(MODES) <= set(answers)
    for row in [r for r in rows if r["mode"] == "all" and both]:  # half of the test is IMU only
        key = row["name"], row["kind"]
        drawn = sum(scorer.sample(answers[mode][key]) for mode in MODES) / len(MODES)
        scores = [r["score"] for r in rows if r["mode"] in MODES and (r["name"], r["kind"]) == key]
        mixed = {"mode": "mixed", "score": float(np.mean(scores)), "folds": [], **interval(drawn)}
        rows.append(row | mixed | dict.fromkeys(("difference", "log_loss", "ece")))
    items = [item for item in plan if item.action != "skip"]
    for row in rows:
        row["secs"] = sum(i.secs for i in items if i.member == row["name"]) or None
    write_json(cfg.out / "oof" / "scores.json", {"rows": rows})
    write_json(cfg.out / "ensemble" / "weights.json", {
        "modes": {mode: dataclasses.asdict(blend) for mode, blend in blends.items()},
        "labels": data.labels.table.tolist(),
        "capacity": label_capacities(data.labels, data.inputs.rec.subject).tolist(),
        "assignment": assigned,
        "majority": int(np.bincount(data.labels.gesture).argmax()),
        "digests": {f"{i.member}/{i.mode}": bundle_digest(i.folder, i.stems) for i in items},
        "wearer": data.wearer,
    })  # fmt: skip
    return rows


# %% [markdown]
# ## 14 Report
#
# In: the files of a run. Out: report/index.html, which says how good the run was, where it errs and
# what it cost, in one file that loads nothing. A part is a function whose docstring is its title
# and its text on the page. It is written last of all, so that no mishap in it can cost a run.

# %%
GOLD_RUN = {  # F1 by class on the real data: one run of a gold-medal team
    "all": (0.80, 0.66, 0.50, 0.61, 0.73, 0.83, 0.65, 0.72, 0.98),
    "imu": (0.62, 0.53, 0.43, 0.55, 0.64, 0.78, 0.55, 0.66, 0.97),
}
SCORE_ANCHORS = {  # on the real data
    "private board, first · second · third": ".8862 · .8788 · .8783",
    "private board, gold · silver · median": ".858 · .833 · .798",
    "best public single notebooks, public board": ".841–.847",
    "mixed cross-validation of seven teams, above their private score": ".012–.025",
    "LightGBM on 108 IMU statistics, imu": ".704",
    "plain 1-D CNN, imu · all": ".731 · .816",
    "the same with grouped stems and SE blocks, imu · all": ".787 · .852",
    "second place's single network of 5 folds, imu · all": ".832 · .891",
    "the same with assignment per subject, imu · all": ".865 · .921",
}
TOP_FEATURES, GALLERY_MISTAKES, GALLERY_RIGHT = 40, 18, 6
COLOURS = ("#0072B2", "#E69F00", "#009E73")  # Okabe and Ito
PICTURE_STYLE = {
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "lines.linewidth": 1.2},
    **{"font.size": 8.5, "text.parse_math": False},
}
STYLE = """
.report{color-scheme:light dark;color:CanvasText;background:Canvas;padding:1px 16px;
 font:15px/1.5 system-ui,sans-serif}
@media(prefers-color-scheme:dark){.report img{filter:invert(1) hue-rotate(180deg)}}
.report>*{max-width:1100px;margin:20px auto}
.report p{max-width:72ch;overflow-wrap:anywhere}
.report .tile{display:inline-block;margin-right:28px}
.report .tile b{display:block;font-size:1.5rem}
.report .notice{border-left:4px solid #e69f00;padding-left:12px}
.report img{display:block;width:100%;max-width:520px}
.report .grid{display:grid;gap:20px;
 grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.report .grid>*{min-width:0}
.report .scroll{overflow-x:auto;margin:12px 0}
.report table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
.report :is(section,td,th){border-top:1px solid #8885}
.report :is(td,th){padding:3px 12px 3px 0;text-align:left;vertical-align:top;white-space:pre-line}
.report td:first-child{position:sticky;left:0;background:Canvas;min-width:7em}
.report td div{min-width:14em;overflow-wrap:anywhere}
.report td i{display:block;min-width:1.6em;margin-right:-8px;font-style:normal;text-align:right}
"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><title>CMI: the run</title>
<meta name="viewport" content="width=device-width,initial-scale=1"/><link rel="icon" href="data:,"/>
<style>:root{{color-scheme:light dark}}body{{margin:0}}</style></head><body>{}</body></html>
"""


@dataclass(frozen=True, eq=False)
class Outcome:
    """A training run as the report sees it: what it is handed, and what it reads from the files."""

    rec: Recordings  # canonical
    labels: Labels
    fold: I64  # (N)
    cfg: Config

    @functools.cached_property
    def scores(self) -> list[dict[str, Any]]:
        """Rows of oof/scores.json: a member or a blend in a mode each."""
        return list(read_json(self.cfg.out / "oof" / "scores.json")["rows"])

    @functools.cached_property
    def modes(self) -> dict[str, dict[str, Any]]:
        """Blend by mode, as in ensemble/weights.json."""
        return dict(read_json(self.cfg.out / "ensemble" / "weights.json")["modes"])

    @functools.cached_property
    def proba(self) -> dict[str, F32]:
        """Out-of-fold gesture probabilities of "blend/all" (nested), "lgbm/imu", … (N, K) each"""
        parts = [f"blend/{mode}" for mode in MODES]
        parts += [part for mode in MODES for part in self.modes[mode]["parts"]]
        files = {p: self.cfg.out / "oof" / f"oof_{p.replace('/', '_')}_proba.npy" for p in parts}
        return {part: np.load(path, allow_pickle=False) for part, path in files.items()}

    def blend_answers(self, mode: str) -> I64:
        """The gesture that the nested blend gives each recording. → (N)"""
        return self.proba[f"blend/{mode}"].argmax(axis=1)


class Html(str):
    """Text that is HTML already; all other text is escaped when it is shown."""


def cell_html(value: object) -> str:
    """What a table shows of a value; long texts ask for room."""
    if isinstance(value, Html):
        return value
    if isinstance(value, Mapping):
        return "\u00a0".join(map(cell_html, value.values()))
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
    text = "–" if value is None else html.escape(str(value))
    return f"<div>{text}</div>" if len(text) > 50 else text


def table_html(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows under the names of their values, in a box that scrolls by itself on a narrow page."""
    names = [name.replace("_", " ") for row in rows[:1] for name in row]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = ["".join(f"<td>{cell_html(value)}</td>" for value in row.values()) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in (head, *lines))
    return f'<div class="scroll"><table>{body}</table></div>'


def fold_away(title: str, content: str) -> str:
    """What a click opens."""
    return f"<details><summary>{title}</summary>{content}</details>"


def picture(draw: Callable[[Any], None], alt: str, height: float) -> str:
    """What `draw` puts on a canvas as wide as a phone, legends above; empty without matplotlib."""
    if not package_version("matplotlib"):
        return ""
    with matplotlib.rc_context(PICTURE_STYLE):
        canvas, file = mpl_figure.Figure(figsize=(4.2, height), layout="constrained"), io.BytesIO()
        draw(canvas)
        for axes in canvas.axes:
            handles, labels = axes.get_legend_handles_labels()
            once = dict(zip(labels, handles, strict=True))
            if once:
                axes.legend(once.values(), once, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
        canvas.savefig(file, format="png", dpi=160, transparent=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"/>'


def draw_bars(names: Sequence[str], widths: Sequence[float], label: str, **how: Any) -> str:
    """A picture of horizontal bars, the first on top."""

    def draw_all(canvas: Any) -> None:
        axes = canvas.subplots()
        axes.barh(range(len(names)), widths, **how)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel=label, ylim=(len(names), -1))

    return picture(draw_all, f"Bars: {label}", 0.7 + 0.17 * len(names))


def show_result(run: Outcome) -> str:
    """Result. The competition's score of out-of-fold rows; low and high bound its 95 % interval.
    Mixed is the mean of all and imu. Optimistic weights were found on the rows that they are scored
    on, nested ones on the other folds; a second word is another way to search them. Assigned: with
    labels given to each subject's recordings together. ECE is the calibration error. Difference: to
    the nested blend, with its interval. Seconds are those of training, all modes."""
    rows = [{name: value for name, value in row.items() if name != "folds"} for row in run.scores]
    anchors = [{"": what, "score": value} for what, value in SCORE_ANCHORS.items()]
    return table_html(rows) + fold_away("Anchors on the real data", table_html(anchors))


def group_rows(run: Outcome, name: str, group: Str) -> list[dict[str, Any]]:
    """Figures of the nested blend in the all mode for each value of `group`, (N)."""
    truth, answer, rows = run.labels.gesture, run.blend_answers("all"), []
    for value in np.unique(group):
        t, a = truth[group == value], answer[group == value]
        accuracy = float(np.mean(t == a))
        rows.append({name: value, "recordings": len(t), "accuracy": accuracy, "score": score(t, a)})
    return rows


def show_subjects(run: Outcome) -> str:
    """Subjects. A dot for each, the score of its recordings, nested blend, all sensors. Accuracy is
    over the 18 gestures."""
    rows = group_rows(run, "subject", run.rec.subject)
    fold = run.fold[np.unique(run.rec.subject, return_index=True)[1]]
    scores = [row["score"] for row in rows]

    def draw_dots(canvas: Any) -> None:
        axes = canvas.subplots()
        axes.scatter(scores, fold, color=[COLOURS[k % 3] for k in fold], alpha=0.7)
        axes.set(xlabel="score", ylabel="fold", yticks=np.unique(fold))
        axes.margins(y=0.2)

    orientations = group_rows(run, "", np.array(ORIENTATIONS)[run.labels.orientation])
    worst = table_html([rows[i] for i in np.argsort(scores, kind="stable")])
    drawn = picture(draw_dots, "Score of each subject, by fold", 0.8 + 0.25 * run.cfg.n_folds)
    return drawn + table_html(orientations) + fold_away("Each subject, the worst first", worst)


def show_f1(run: Outcome) -> str:
    """F1 by class. Nested blend, beside one run of a gold-medal team on the real data, which scored
    .855 (all) and .810 (imu)."""
    rows: list[dict[str, object]] = [{"": name} for name in (*TARGETS, "any other")]
    for mode in MODES:
        counts = count_classes(run.labels.gesture, run.blend_answers(mode))
        n, called = counts.sum(axis=1), counts.sum(axis=0)
        for k, row in enumerate(rows):
            row["recordings"] = int(n[k])
            row[mode] = 2 * counts[k, k] / (n[k] + called[k]) if n[k] + called[k] else None
            row[f"{mode}, gold run"] = GOLD_RUN[mode][k]
    return table_html(rows)


def show_confusion(run: Outcome) -> str:
    """Confusion. Nested blend, recordings by true gesture (rows) and answer (columns), the targets
    first. Blue is right, orange wrong. Errors among the non-targets, 9 to 18, cost nothing."""

    def counts_html(mode: str) -> str:
        counts, rows = np.zeros((len(GESTURES), len(GESTURES)), np.int64), []
        np.add.at(counts, (run.labels.gesture, run.blend_answers(mode)), 1)
        for i, gesture in enumerate(GESTURES):
            rows.append({"": f"{i + 1} {gesture}"})
            for j, share in enumerate(counts[i] / max(counts[i].sum(), 1)):
                tint = f"rgba({'0,114,178' if i == j else '213,94,0'},{0.6 * share:.2f})"
                rows[i][str(j + 1)] = Html(f'<i style="background:{tint}">{counts[i, j] or ""}</i>')
        return table_html(rows)

    return counts_html("all") + fold_away("imu mode", counts_html("imu"))


def show_calibration(run: Outcome) -> str:
    """Calibration. How often an answer of the nested blend is right that was given with some
    confidence. On the dotted line confidence is honest, above it too modest. Larger marks stand for
    more recordings. The ECE of each part, in the first table, is the mean distance from it."""

    def draw_lines(canvas: Any) -> None:
        axes = canvas.subplots()
        axes.plot([0, 1], [0, 1], "k:")
        for mode, marker, colour in zip(MODES, "os", COLOURS, strict=False):
            sure, right, n = reliability(run.proba[f"blend/{mode}"], run.labels.gesture)
            some = n > 0
            axes.plot(sure[some], right[some], color=colour)
            sizes = 8 + 120 * n / n.sum()
            axes.scatter(sure, right, sizes, color=colour, marker=marker, label=mode, zorder=3)
        axes.set(xlabel="confidence", ylabel="share of right answers")

    return picture(draw_lines, "Share of right answers by confidence", 3.4)


def show_weights(run: Outcome) -> str:
    """Ensemble weights. Exponent of each part in the product of probabilities that answers."""
    by_mode = {m: dict(zip(b["parts"], b["weights"], strict=True)) for m, b in run.modes.items()}
    parts = dict.fromkeys(part for own in by_mode.values() for part in own)
    return table_html([{"": p} | {m: own.get(p) for m, own in by_mode.items()} for p in parts])


def learning_curves(path: Path, n_folds: int) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    """The latest run of each mode, seed and fold in a log of several, whatever line was cut off.

    A line puts an end to all earlier ones of its fold that were as far or farther: a new run begins
    at the first step, a resumed one somewhere after it.
    """
    curves: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for text in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            line["x"] = line.get("epoch", line.get("round"))
            key = (line["mode"], line.get("seed", 0), line["fold"])
            curves[key] = [e for e in curves.get(key, []) if e["x"] < line["x"]] + [line]
    return {key: curve for key, curve in sorted(curves.items()) if key[2] < n_folds}


def draw_curves(curves: Mapping[tuple[str, int, int], list[dict[str, Any]]], canvas: Any) -> None:
    """Score above losses, a line per seed and fold, a colour per mode."""
    upper, lower = canvas.subplots(2, 1, sharex=True)
    dashes = {"score": "-", "val_loss": "-", "multi_logloss": "-", "train_loss": ":"}
    for (mode, *_), curve in curves.items():
        x, colour = [line["x"] for line in curve], COLOURS[ROUTES.index(mode)]
        for name, dash in dashes.items():
            y = np.array([line.get(name) for line in curve], np.float64)  # None becomes NaN
            axes, label = (upper, mode) if name == "score" else (lower, None)
            axes.plot(x, y, dash, marker=".", ms=3, color=colour, label=label)
    upper.set_ylabel("score")
    lower.set(ylabel="loss (dotted: training)", xlabel="epoch" if "epoch" in curve[0] else "round")


def show_curves(run: Outcome) -> str:
    """Learning curves. The latest run of each fold, a thin line each: score of its validation rows
    above; below it their loss, and dotted the loss of training."""
    drawn = ""
    for member in dict.fromkeys(part.split("/")[0] for part in run.modes["all"]["parts"]):
        path = run.cfg.out / "logs" / f"{member}_progress.jsonl"
        if curves := learning_curves(path, run.cfg.n_folds):
            draw = functools.partial(draw_curves, curves)
            drawn += f"<div><b>{member}</b>{picture(draw, f'Training of {member}', 4.2)}</div>"
    none = "No lines in logs/: trained elsewhere, or with SAVE_JSONL=0."
    return f'<div class="grid">{drawn or none}</div>'


def show_features(run: Outcome) -> str:
    """Features. The largest gains in the all mode, mean and standard deviation over the folds."""
    path = run.cfg.out / "feature_importance.csv"
    if "lgbm/all" not in run.proba or not path.is_file():
        return "No member of this run tells how much its features gained."
    best = read_csv(path).filter(pl.col("mode") == "all").sort("gain_mean", descending=True)
    numbers = pl.col("gain_mean", "gain_std").cast(pl.Float64).fill_null(0)
    columns = best.select("feature", numbers).head(TOP_FEATURES)
    names, gains, spreads = (column.to_list() for column in columns)
    known = {name: f"{name}, {unit}\n{text}" for name, unit, text in feature_help()}
    rows = [
        {"feature": known.get(name, name), "gain": gain, "± sd": spread}
        for name, gain, spread in zip(names, gains, spreads, strict=True)
    ]
    drawn = draw_bars(names, gains, "gain", xerr=spreads, color=COLOURS[0])
    return drawn + fold_away("What they mean", table_html(rows))


def draw_recording(rec: Recordings, performed: Bool, canvas: Any) -> None:
    """Acceleration, angular velocity and ToF images of one recording; the gesture is shaded."""
    rows = np.flatnonzero(performed) if performed.any() else np.arange(len(performed))
    moments = np.r_[rows[0] // 2, np.linspace(rows[0], rows[-1], 7)].round().astype(np.int64)
    seconds = np.arange(len(performed)) * SAMPLE_PERIOD
    *upper, lower = canvas.subplots(3, 1, height_ratios=(1, 1, 2.2))
    signals: dict[str, Any] = {"m/s²": rec.acc, "rad/s": Motion.of(rec).omega}
    for axes, (unit, signal) in zip(upper, signals.items(), strict=True):
        axes.axvspan(seconds[rows[0]], seconds[rows[-1]], color="#888", alpha=0.2, lw=0)
        for values, colour, name in zip(signal.T, COLOURS, "xyz", strict=True):
            axes.plot(seconds, values, color=colour, label=name if axes is upper[0] else None)
        axes.plot(seconds[moments], np.full(8, axes.get_ylim()[0]), "k^", ms=3)
        axes.set(ylabel=unit, xlim=(0, seconds[-1] or 1))
    tof = np.where(rec.tof == MISSING, np.nan, rec.tof)[moments]
    tiles = np.pad(tof, [(0, 0), (0, 0), (0, 1), (0, 1)], constant_values=np.nan)  # (8, 5, 9, 9)
    scale = matplotlib.colormaps["cividis"].with_extremes(over="#8884", bad="#0000")
    lower.imshow(tiles.transpose(1, 2, 0, 3).reshape(45, 72), cmap=scale, vmin=0, vmax=FARTHEST)
    lower.set_xticks(np.arange(8) * 9 + 3.5, [f"{t:.1f} s" for t in seconds[moments]])
    lower.set_yticks(np.arange(5) * 9 + 3.5, [f"ToF {i}" for i in range(1, 6)])
    lower.grid(visible=False)


def card_html(run: Outcome, i: int) -> str:
    """Recording i, and what the blend and each part of the all mode say of it."""
    rec, labels = run.rec, run.labels
    truth, answer = GESTURES[labels.gesture[i]], GESTURES[run.blend_answers("all")[i]]
    performed = labels.phase[rec.start[i] : rec.start[i + 1]] > 0
    name, place = rec.sequence_id[i], ORIENTATIONS[labels.orientation[i]]
    about = html.escape(f"{name} · {rec.subject[i]} · {place} · {len(performed)} rows")
    rows = []
    for part in (part for part in run.proba if part.endswith("/all")):
        proba = run.proba[part][i]
        best = np.argsort(-proba, kind="stable")[:3]
        texts = [f"{GESTURES[g]} {proba[g]:.2f}{' ✓' * (GESTURES[g] == truth)}" for g in best]
        rows.append({"": part, "likeliest": "\n".join(texts)})
    draw = functools.partial(draw_recording, rec.part(i, i + 1), performed)
    title = html.escape(truth if answer == truth else f"{truth} → {answer}")
    drawn = picture(draw, f"Motion and ToF of {name}", 4.9)
    return f"<article><b>{title}</b><p>{about}</p>{drawn}{table_html(rows)}</article>"


def show_gallery(run: Outcome) -> str:
    """Gallery. The mistakes that cost score, the most confident first (truth → answer), then right
    answers by lot; as the members see them, left-handers mirrored. Shaded: the gesture. Triangles:
    the moments of the ToF images, near blue, far yellow, nothing in range grey, missing blank.
    Below: the three likeliest gestures of the nested blend and of each member, the true one ✓."""
    truth, answer = run.labels.gesture, run.blend_answers("all")
    sure = run.proba["blend/all"].max(axis=1)
    wrong = np.flatnonzero(np.minimum(truth, NON_TARGET) != np.minimum(answer, NON_TARGET))
    wrong = wrong[np.argsort(-sure[wrong], kind="stable")][:GALLERY_MISTAKES]
    right = rng_for(run.cfg, "gallery").permutation(np.flatnonzero(truth == answer))
    cards = [card_html(run, int(i)) for i in (*wrong, *right[:GALLERY_RIGHT])]
    return fold_away(f"{len(cards)} recordings", f'<div class="grid">{"".join(cards)}</div>')


def show_timeline(cfg: Config) -> str:
    """Time line. Seconds since the start, most memory held until a stage's end; grey: reused."""
    names, secs, begins = ([getattr(s, key) for s in STAGES] for key in ("name", "secs", "begin"))
    colours = ["#9aa0a6" if s.note else COLOURS[0] for s in STAGES]
    how: dict[str, Any] = {"left": begins, "color": colours, "ec": colours}
    drawn = draw_bars(names, secs, "seconds since the start", **how)
    return drawn + table_html([dataclasses.asdict(s) for s in STAGES])


def show_submission(cfg: Config) -> str:
    """Submission. What was answered about the test recordings, by gesture."""
    path = cfg.out / "submission.parquet"
    if not path.is_file():
        return "No submission.parquet: nothing was served."
    given = pl.read_parquet(io.BytesIO(path.read_bytes()))["gesture"].to_list()
    counts, value = [given.count(gesture) for gesture in GESTURES], submission_score(cfg)
    text = f"{len(given):,} rows" + (f", score {value:.4f}" if value is not None else "")
    return text + draw_bars(GESTURES, counts, "answers", color=COLOURS[0])


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory, graphics cards and Python, as far as the system tells."""
    info, cards = Path("/proc/cpuinfo"), "none"
    models = re.findall(r"model name\s*:\s*(.+)", info.read_text() if info.is_file() else "")
    memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GB"
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no NVIDIA driver here
        question = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        reply = subprocess.run(question, capture_output=True, text=True, timeout=30, check=True)
        cards = "; ".join(reply.stdout.splitlines()) or "none"
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": str(cpu_cores()),
        "memory": memory,
        "card": cards,
        "python": f"{platform.python_version()}, {platform.platform()}",
    }


def show_setup(cfg: Config) -> str:
    """Set-up. Settings that differ from their defaults, machine and versions."""
    rows = [
        {
            "setting": f"{f.name.upper()}\n{f.metadata['help']}",
            "value": shown(getattr(cfg, f.name)),
            "default": shown(f.default),
        }
        for f in dataclasses.fields(cfg)
    ]
    packages = dict.fromkeys(p for m in MEMBERS.values() for p in m.packages)
    names = ("numpy", "polars", "scipy", *packages, "joblib", "matplotlib", "grpcio", "protobuf")
    about = describe_machine() | {name: package_version(name) or "not installed" for name in names}
    return (
        table_html([row for row in rows if row["value"] != row["default"]])
        + fold_away("All settings", table_html(rows))
        + table_html([{"": name, "here": value} for name, value in about.items()])
    )


QUALITY = (show_result, show_subjects, show_f1, show_confusion, show_calibration)
MODELS = (show_weights, show_curves, show_features, show_gallery)
COSTS = (show_timeline, show_submission, show_setup)
REPORT_ERRORS: tuple[type[Exception], ...] = (ImportError, OSError, ValueError, LookupError)
REPORT_ERRORS += (TypeError, ArithmeticError, RuntimeError, AssertionError)
REPORT_ERRORS += (pl.exceptions.PolarsError,)


def head_html(run: Outcome | None, cfg: Config) -> str:
    """Heading, the figures that matter, and what should be known of them."""
    about, tiles = [time.strftime("%Y-%m-%d %H:%M %Z"), str(cfg.data_dir)], ""
    if run:
        n = len(np.unique(run.rec.subject))
        about.append(f"{len(run.rec):,} recordings, {n} subjects, {cfg.n_folds} folds")
        wanted = (("nested", "all"), ("nested", "imu"), ("nested", "mixed"), ("assigned", "mixed"))
        found = {(row["kind"], row["mode"]): row["score"] for row in run.scores}
        tiles = "".join(
            f'<span class="tile"><b>{found[kind, mode]:.4f}</b>{kind}, {mode}</span>'
            for kind, mode in wanted
            if (kind, mode) in found
        )
    simulated = (cfg.data_dir / "test_truth.csv").is_file()  # the simulator alone tells the truth
    notices = {
        "Simulated data: the scores compare parts, they promise no board.": simulated,
        "matplotlib is not installed: there are no pictures.": not package_version("matplotlib"),
        "Nothing was trained or scored: no train.csv there, or SERVE_ONLY=1.": run is None,
    }
    marked = [f'<p class="notice">{html.escape(t)}</p>' for t, holds in notices.items() if holds]
    lines = f"<h1>Gestures from a wrist sensor: the run</h1><p>{html.escape(' · '.join(about))}</p>"
    return f"<header>{lines}{''.join(marked)}{tiles}</header>"


def report_html(run: Outcome | None, cfg: Config) -> str:
    """All parts, as they stand in the page and in a notebook."""
    made = [(part.__doc__, part(run)) for part in (*QUALITY, *MODELS)] if run else []
    made += [(part.__doc__, part(cfg)) for part in COSTS]
    links, sections = [], ""
    for i, (about, content) in enumerate(made):
        title, text = str(about).split(". ", 1)
        links.append(f'<a href="#part{i}">{title}</a>')
        sections += f'<section id="part{i}"><h2>{title}</h2><p>{text}</p>{content}</section>'
    body = f"{head_html(run, cfg)}<nav>{' · '.join(links)}</nav>{sections}"
    return f'<style>{STYLE}</style><div class="report">{body}</div>'


def write_report(run: Outcome | None, cfg: Config) -> None:
    """report/index.html, shown in a notebook as well; a failure is an error with STRICT=1 only."""
    path = cfg.out / "report" / "index.html"
    try:
        body = report_html(run, cfg)
        write_whole(path, PAGE.format(body))
        notebook = sys.modules.get("IPython")
        if notebook and notebook.get_ipython():
            notebook.display.display(notebook.display.HTML(body))
        log("report", path=path, mb=path.stat().st_size / 2**20)
    except REPORT_ERRORS as error:
        if cfg.strict:
            raise
        log("warning", not_written=path, error=repr(error)[:200])


# %% [markdown]
# ## 15 Serving
#
# In: one recording at a time, in random order, from the gateway. Out: a gesture. Models are read on
# the first question, because the server must be up within 15 minutes and the first answer has no
# deadline. predict never raises and never falls back in silence: it logs the cause and counts.


# %%
@dataclass(frozen=True, slots=True)
class Ensemble:
    """What weights.json holds: how the members' answers become one."""

    blends: dict[str, Blend]  # by mode
    table: I64  # (L, 3)
    capacity: I64  # (L) how often a wearer does each label at most
    assigned: dict[str, bool]  # by mode: are labels assigned per subject?
    majority: int  # the commonest gesture of the training data
    digests: dict[str, str]  # by "member/mode": the models that the weights were found for
    wearer: dict[str, Any] | None  # tells a device that is worn upside down

    @classmethod
    def read(cls, path: Path) -> Ensemble:
        """weights.json, checked."""
        with refusing(path, "holds no weights of this file"):
            content = read_json(path)
            modes = {mode: (b["parts"], b["weights"]) for mode, b in content["modes"].items()}
            blends = {
                m: Blend(tuple(map(str, p)), tuple(map(float, w))) for m, (p, w) in modes.items()
            }
            table, capacity = label_table(content["labels"]), np.array(content["capacity"])
            wearer, majority = content["wearer"], content["majority"]
            known = np.array([wearer["prior"], *wearer["coefficients"]] if wearer else [0.0] * 31)
            checks = {
                "modes": blends and set(blends) <= set(ROUTES),
                "weights": all(
                    len(b.parts) == len(b.weights) and all(0 <= w < np.inf for w in b.weights)
                    for b in blends.values()
                ),
                "capacity": capacity.dtype == np.int64
                and capacity.shape == (len(table),)
                and 1 <= capacity.min() <= capacity.max() <= 1000,
                "wearer": known.shape == (1 + N_ODD,) and np.isfinite(known).all(),
                "majority": type(majority) is int and 0 <= majority < len(GESTURES),
            }
            if bad := [name for name, holds in checks.items() if not holds]:
                raise ValueError(f"{', '.join(bad)} cannot be right")
            digests, assigned = dict(content["digests"]), dict(content["assignment"])
            return cls(blends, table, capacity, assigned, majority, digests, wearer)

    @classmethod
    def default(cls, parts: Iterable[str], table: I64) -> Ensemble:
        """The members' default weights, for bundles without out-of-fold rows."""
        blends = {}
        for mode in ROUTES:
            own = tuple(p for p in parts if p.endswith(f"/{mode}"))
            weights = np.array([MEMBERS[p.split("/")[0]].default_weight for p in own])
            if own:
                blends[mode] = Blend(own, tuple((weights / weights.sum()).tolist()))
        majority = int(np.bincount(table[:, 2]).argmax())
        once = np.ones(len(table), np.int64)
        return cls(blends, table, once, dict.fromkeys(blends, True), majority, {}, None)


def label_table(labels: Any) -> I64:
    """Composite labels from a bundle. → (L, 3)"""
    table = np.array(labels)
    ends = (len(BEHAVIORS), len(ORIENTATIONS), len(GESTURES))
    if table.dtype != np.int64 or table.ndim != 2 or table.shape[1] != 3 or not len(table):
        raise ValueError(f"labels are no table of whole numbers, three a label: {labels!r:.80}")
    if (table < 0).any() or (table >= ends).any():
        raise ValueError(f"labels go up to {table.max(axis=0)}, there are {ends}")
    return table


Found = dict[str, tuple[Path, list[str], I64]]  # by "member/mode": folder, stems, label table


def find_ensemble(cfg: Config) -> Ensemble | None:
    """The first usable weights.json: of this run, beside the named bundles, attached."""
    named = [n for m in MEMBERS if (n := getattr(cfg, f"{m}_bundle_path"))]
    folders = [cfg.out, *(p for n in named for p in (n.parent, n.parent.parent))]
    attached = find_below(KAGGLE_INPUT, "ensemble")
    for path in (f / "weights.json" for f in (*(g / "ensemble" for g in folders), *attached)):
        if path.is_file():
            try:
                return Ensemble.read(path)
            except DataError as error:
                if cfg.strict:
                    raise
                log("warning", left_out=path, why=error)
    return None


def find_models(cfg: Config, digests: Mapping[str, str]) -> Found:
    """Usable models: of several bundles the one that the weights were found for, else the first."""
    found: Found = {}
    for member in (m for m in MEMBERS if not why_absent(m, cfg)):
        for folder in bundle_folders(member, cfg):
            try:
                usable = usable_models(folder, MEMBERS[member].files)
            except DataError as error:
                if cfg.strict:
                    raise
                log("warning", left_out=folder, why=error)
                continue
            for mode, models in usable.items():
                part = f"{member}/{mode}"
                if part not in found or bundle_digest(*models[:2]) == digests.get(part):
                    found[part] = models
    return found


def usable_models(folder: Path, ends: Sequence[str]) -> Found:
    """By mode, the models of a bundle all of whose files are as they were written."""
    path, usable = folder / "bundle.json", {}
    if not path.is_file():
        return {}
    with refusing(path, "is no bundle of this file"):
        bundle = read_json(path)
        modes, table = dict(bundle["modes"]), label_table(bundle["labels"])
        for stems in modes.values():
            if not all(re.fullmatch(r"fold[0-9]{2}(_seed[0-9]+)?", stem) for stem in stems):
                raise ValueError(f"it names files that no run writes: {stems!r:.100}")
    for mode, stems in ((m, list(s)) for m, s in modes.items() if m in ROUTES):
        spoilt = [name for stem in stems if (name := spoilt_file(folder / mode, stem, ends))]
        if spoilt:
            log("warning", left_out=folder / mode, why=f"{spoilt[0]} is absent or was changed")
        elif stems:
            usable[mode] = (folder / mode, stems, table)
    return usable


@dataclass(frozen=True, slots=True)
class LoadedModels:
    """Everything that answers."""

    models: dict[str, Any]  # by "member/mode"
    ensemble: Ensemble


def load_models(cfg: Config) -> LoadedModels:
    """Read what is needed to answer; raises FileNotFoundError if there is no model at all."""
    began = time.monotonic()
    ensemble = find_ensemble(cfg)
    found = find_models(cfg, ensemble.digests if ensemble else {})
    if not found:
        raise FileNotFoundError(
            f"No trained models in {cfg.out} and none attached. Train first, or point "
            f"LGBM_BUNDLE_PATH, TORCH_BUNDLE_PATH or KERAS_BUNDLE_PATH at a bundle."
        )
    table, models = ensemble.table if ensemble else next(iter(found.values()))[2], {}
    for part, (folder, stems, labels) in found.items():
        model: Any = DataError("its labels differ from the ensemble's")
        if np.array_equal(labels, table):
            load = MEMBERS[part.split("/")[0]].load
            model = attempt(functools.partial(load, folder, stems, table, cfg))
        if not isinstance(model, Exception):
            models[part] = model
        elif cfg.strict:
            raise model
        else:
            log("warning", left_out=part, why=f"{model!r:.300}")
    if not models:
        raise DataError(f"None of {', '.join(found)} can be used; the lines above say why.")
    default = Ensemble.default(models, table)
    blends = (ensemble or default).blends
    served = {m: b for m, b in blends.items() if set(b.parts) & set(models)} or default.blends
    blends = {mode: with_shares(blend, cfg) for mode, blend in served.items()}
    source = "weights.json" if ensemble else "defaults"
    log("loaded", models=",".join(models), weights=source, secs=time.monotonic() - began)
    return LoadedModels(models, dataclasses.replace(ensemble or default, blends=blends))


def with_shares(blend: Blend, cfg: Config) -> Blend:
    """A blend with the shares that settings fix, its sum as it was; or as it was."""
    try:
        shares = fixed_shares(blend.parts, cfg)
    except ConfigError as error:
        log("warning", parts=",".join(blend.parts), why=error, instead="weights as found")
        return blend
    if shares is None:
        return blend
    scale = 1 / cfg.ensemble_temperature if cfg.ensemble_temperature else sum(blend.weights)
    return dataclasses.replace(blend, weights=tuple((shares * scale).tolist()))


def attempt(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the error it ends with: packages have errors that derive from nothing
    narrower, and one member's must not cost the others' answer."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 the one place that catches all
        return error


PATIENCE_WITH_A_MEMBER = 3  # failures in a row after which it is asked no more
FALLBACKS_ALLOWED = 0.1  # share of a local run's answers; more is an error


class Predictor:
    """Answers one recording at a time; remembers what each wearer has been seen to do."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(len(MEMBERS), "member")
        self.loaded: LoadedModels | None = None
        self.unusable: Exception | None = None  # why no model could be had; asked for once only
        self.assignments: dict[str, Assignment] = {}
        self.evidence: dict[str, dict[str, float]] = {}  # subject → recording → log odds
        self.answers: collections.OrderedDict[str, F32] = collections.OrderedDict()
        self.calls = self.unanswered = 0  # in all; by the majority alone
        self.fallbacks = collections.Counter[str]()
        self.failures = collections.Counter[str]()  # in a row, by "member/mode"

    def predict(self, sequence: pl.DataFrame, demographics: pl.DataFrame) -> str:
        """Gesture of a recording: always one of the 18 strings, a plain str."""
        with self.lock:
            self.calls += 1
            answer = attempt(lambda: GESTURES[self.gesture(sequence, demographics)])
            if not isinstance(answer, Exception):
                return str(answer)
            if self.cfg.strict:
                raise answer
            cause = f"{type(answer).__name__}: {answer}"[:200]
            self.fallbacks[cause] += 1
            self.unanswered += 1
            log("fallback", count=self.unanswered, of=self.calls, answer="majority")
            if self.fallbacks[cause] == 1:
                traceback.print_exception(answer)
            text_on_phone = GESTURES.index("Text on phone")
            return GESTURES[self.loaded.ensemble.majority if self.loaded else text_on_phone]

    def predict_proba(self, sequence: pl.DataFrame, demographics: pl.DataFrame) -> dict[str, float]:
        """Probability of each gesture, before any assignment; raises where predict falls back."""
        with self.lock:
            composite = self.composite(self.recording(sequence, demographics))
            proba = gesture_proba(composite, self.ready().ensemble.table)
        return dict(zip(GESTURES, proba[0].tolist(), strict=True))

    def gesture(self, sequence: pl.DataFrame, demographics: pl.DataFrame) -> int:
        """Code of the gesture of one recording."""
        ensemble = self.ready().ensemble
        rec = self.recording(sequence, demographics)
        composite = self.composite(rec)
        mode = route_of(rec, ensemble.blends)
        auto = ensemble.assigned.get(mode, True)
        if not (auto if self.cfg.subject_assignment == "auto" else uses_assignment(0, self.cfg)):
            return int(gesture_proba(composite, ensemble.table)[0].argmax())
        fresh = Assignment(ensemble.table, ensemble.capacity)
        wearer = self.assignments.setdefault(str(rec.subject[0]), fresh)
        return wearer.gesture(str(rec.sequence_id[0]), composite[0])

    def recording(self, sequence: pl.DataFrame, demographics: pl.DataFrame) -> Recordings:
        """The one recording that the gateway sent."""
        if not len(sequence) or not {"sequence_id", "subject"} <= set(sequence.columns):
            raise DataError(
                f"predict was handed {len(sequence)} rows of {sequence.columns[:4]} …, no "
                f"recording: it needs rows, sequence_id and subject."
            )
        rec = to_recordings(sequence, demographics)
        if len(rec) != 1:
            raise DataError(f"predict was handed {len(rec)} recordings instead of 1.")
        return rec

    def ready(self) -> LoadedModels:
        """The models, read when first needed. Without any, LightGBM is trained now in the re-run,
        since the first call has no deadline."""
        if self.unusable:
            raise self.unusable.with_traceback(None)
        if self.loaded is None:
            loaded = attempt(self.load)
            if isinstance(loaded, Exception):
                self.unusable = loaded
                raise loaded
            self.loaded = loaded
        assert self.loaded is not None
        return self.loaded

    def load(self) -> LoadedModels:
        try:
            return load_models(self.cfg)
        except (FileNotFoundError, DataError) as error:
            if not self.cfg.rerun or self.cfg.serve_only:
                raise
            log("warning", no_bundle=str(error), instead="training LightGBM in this first call")
            alone: dict[str, Any] = {f"use_{m}": m == "lgbm" for m in MEMBERS}
            train_all(dataclasses.replace(self.cfg, **alone))
            return load_models(self.cfg)

    def composite(self, raw: Recordings) -> F32:
        """Blended composite probabilities of one recording, remembered by its content. → (1, L)"""
        blends = self.ready().ensemble.blends
        upside_down = self.is_upside_down(raw)
        key = digest(raw.acc, raw.rot, raw.thm, raw.tof, raw.person, upside_down)
        if key in self.answers:
            self.answers.move_to_end(key)
            return self.answers[key]
        rec = canonical(raw, np.array([upside_down]))
        blend = blends.get(route_of(raw, blends)) or next(iter(blends.values()))
        self.answers[key] = pooled = blend.pool(self.member_probas(rec, blend))
        while len(self.answers) > self.cfg.frame_cache_max_items:
            self.answers.popitem(last=False)
        return pooled

    def member_probas(self, rec: Recordings, blend: Blend) -> dict[str, F32]:
        """Composite probabilities by every part of a blend that has weight. (1, L) each

        Members answer side by side, the slowest first. A part that fails is left out, counted and
        logged, and dropped after a few failures in a row; if all fail, the last error is raised.
        """
        known = [p for p in self.ready().models if self.failures[p] < PATIENCE_WITH_A_MEMBER]
        weighed = [p for p, w in zip(blend.parts, blend.weights, strict=True) if w > 0]
        asked = [p for p in weighed if p in known] or [p for p in blend.parts if p in known]
        inputs = Inputs(rec, frames=any(p.split("/")[0] in NETWORKS for p in asked))
        attempt(lambda: inputs.extracted)  # here, not by several members at once
        teams = [[p for p in asked if p.split("/")[0] == name] for name in reversed(MEMBERS)]
        answers = self.pool.map(lambda team: [self.ask(p, inputs) for p in team], teams)
        probas, failure = {}, None
        for part, answer in zip(itertools.chain(*teams), itertools.chain(*answers), strict=True):
            if not isinstance(answer, Exception):
                probas[part], self.failures[part] = answer, 0
                continue
            if self.cfg.strict:
                raise answer
            failure = answer
            self.failures[part] += 1
            self.fallbacks[f"{part}: {type(answer).__name__}: {answer}"[:200]] += 1
            dropped = self.failures[part] >= PATIENCE_WITH_A_MEMBER
            log("fallback", part=part, error=repr(answer)[:200], dropped=dropped)
        if not probas:
            raise failure or LookupError(f"No model serves {blend.parts}.")
        return probas

    def ask(self, part: str, inputs: Inputs) -> F32 | Exception:
        """Composite probabilities by one part, or why it has none. → (1, L)"""
        name, mode = part.split("/")
        member, model = MEMBERS[name], self.ready().models[part]
        return attempt(lambda: member.predict(model, member.prepare(inputs, mode)).mean(axis=0))

    def is_upside_down(self, raw: Recordings) -> bool:
        """Does the evidence of this wearer's recordings so far say that the device is turned?"""
        wearer = self.ready().ensemble.wearer
        if not wearer or not self.cfg.upside_down:
            return False
        logit = wearer_logit(canonical(raw, np.zeros(1, bool)), wearer)
        seen = self.evidence.setdefault(str(raw.subject[0]), {})
        seen[str(raw.sequence_id[0])] = float(logit[0])
        return bool(wearer["prior"] + sum(seen.values()) < 0)


def route_of(rec: Recordings, routes: Iterable[str]) -> str:
    """Which blend answers a recording: by its rotation, then by how much of its ToF is missing."""
    if NO_ROTATION in routes and np.isnan(repair_rotation(rec.rot, rec.start)).all():
        return NO_ROTATION
    return "imu" if (rec.tof == MISSING).mean() > 0.5 else "all"


def inference_server(cfg: Config) -> Any:
    """The class CMIInferenceServer: the competition's own on Kaggle, else ours beside this file."""
    places = [cfg.cmi_data_dir, *(p.parent for p in find_below(KAGGLE_INPUT, "kaggle_evaluation"))]
    extra = [str(p) for p in places if p and (p / "kaggle_evaluation").is_dir()]
    sys.path += [p for p in extra if p not in sys.path]
    return importlib.import_module("kaggle_evaluation.cmi_inference_server").CMIInferenceServer


def serve(predictor: Predictor, cfg: Config) -> None:
    """Answer the hidden test in the re-run; elsewhere a local gateway asks about the test files."""

    def predict(sequence: pl.DataFrame, demographics: pl.DataFrame) -> str:
        return predictor.predict(sequence, demographics)

    server = inference_server(cfg)(predict)
    if cfg.rerun:
        log("serving", deadline="none for the first call, in which models load")
        server.serve()
        return
    files = [str(cfg.data_dir / name) for name in ("test.csv", "test_demographics.csv")]
    with stage("serving", cfg), contextlib.chdir(cfg.out):  # submission.parquet is written there
        server.run_local_gateway(tuple(files))
    count = predictor.unanswered
    log("served", recordings=predictor.calls, fallbacks=count, file=cfg.out / "submission.parquet")
    for cause, n in predictor.fallbacks.most_common():
        log("fallback", count=n, cause=cause)
    if count > FALLBACKS_ALLOWED * predictor.calls:
        causes = "; ".join(f"{n} × {cause}" for cause, n in predictor.fallbacks.most_common(3))
        raise DataError(
            f"{count} fallbacks in {predictor.calls} answers of this local run: {causes}"
        )


def submission_score(cfg: Config) -> float | None:
    """The submission's own score, where the truth lies beside the test file, as in a simulation."""
    truth_path, path = cfg.data_dir / "test_truth.csv", cfg.out / "submission.parquet"
    if not (truth_path.is_file() and path.is_file()):
        return None
    code = {name: i for i, name in enumerate(GESTURES)}
    truth = read_csv(truth_path).select("sequence_id", truth="gesture")
    both = pl.read_parquet(io.BytesIO(path.read_bytes())).join(truth, on="sequence_id")
    answers = [both[name].replace_strict(code).to_numpy() for name in ("truth", "gesture")]
    return score(*answers)


# %% [markdown]
# ## 16 Entry
#
# In: the environment and arguments. Out: everything. Off Kaggle, without CMI_DATA_DIR, a small data
# set is simulated and takes the same road.


# %%
DEMO = {"n_folds": 3, "torch_max_epochs": 9, "keras_max_epochs": 9}
COMPETITION = "cmi-detect-behavior-with-sensor-data"
TEST_FILES = ("test.csv", "test_demographics.csv")


def find_data(cfg: Config) -> Path | None:
    """The competition's folder: named, or attached below /kaggle/input; None: there is none."""
    if folder := cfg.cmi_data_dir:
        absent = [name for name in TEST_FILES if not (folder / name).is_file()]
        if absent:
            zipped = " Unpack the .zip there." if [*folder.glob("*.zip")] else ""
            raise ConfigError(
                f"CMI_DATA_DIR={folder}: looked for {absent[0]} in it; there is none.{zipped}"
            )
        return folder
    found = [path.parent for path in find_below(KAGGLE_INPUT, TEST_FILES[0])]
    real = [f for f in found if not f.name.startswith("simulated-")]  # of a bundle
    whole = [f for f in real if all((f / name).is_file() for name in TEST_FILES)]
    whole.sort(key=lambda f: (COMPETITION not in f.parts, not (f / "kaggle_evaluation").is_dir()))
    for other in (f for f in found if f not in whole[:1]):
        log("passed over", folder=other, why="not the competition's" if whole else "incomplete")
    attached = sorted(KAGGLE_INPUT.iterdir()) if KAGGLE_INPUT.is_dir() else []
    if attached and not whole and not cfg.rerun:
        names = ", ".join(path.name for path in attached[:10])
        raise DataError(
            f"No folder below {KAGGLE_INPUT} holds {' and '.join(TEST_FILES)}; attached: {names}. "
            f"Attach the competition's data, or set CMI_DATA_DIR."
        )
    return whole[0] if whole else None


def settle(cfg: Config, env: Mapping[str, str]) -> Config:
    """Make paths absolute and find the data; without any, simulate some and train for less long."""
    out = cfg.out.absolute()
    folder = find_data(cfg)
    if folder is None and not cfg.rerun:
        folder = simulated(cfg, out)
        short: dict[str, Any] = {k: v for k, v in DEMO.items() if k.upper() not in env}
        log("demo", **{k.upper(): v for k, v in short.items()})
        cfg = dataclasses.replace(cfg, **short)
    named = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    paths: dict[str, Any] = {k: v.absolute() for k, v in named.items() if isinstance(v, Path)}
    paths |= {"output_path": out, "cmi_data_dir": folder and folder.absolute()}
    return dataclasses.replace(cfg, **paths)


def simulated(cfg: Config, out: Path) -> Path:
    """A small simulated data set in the competition's schema, made once."""
    size: dict[str, Any] = {"subjects": cfg.sim_subjects, "test_subjects": cfg.sim_test_subjects}
    size |= {"recordings_per_subject": cfg.sim_recordings, "seed": cfg.seed}
    log("data", found="no competition data, CMI_DATA_DIR is not set", instead="simulating", **size)
    try:
        simulator = importlib.import_module("cmi_simulator")
    except ImportError:
        raise DataError(
            "No competition data: set CMI_DATA_DIR, or keep cmi_simulator.py beside this file."
        ) from None
    folder = out / f"simulated-{digest(size, Path(simulator.__file__ or '').read_bytes())}"
    if not (folder / TEST_FILES[0]).is_file():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        simulator.simulate(partial, **size)
        partial.rename(folder)
    return folder


def make_training_data(cfg: Config) -> TrainingData:
    """Read the training data, find its folds and bring it into canonical form."""
    with stage("reading", cfg):
        rec, data_digest = cached_recordings(cfg.data_dir, cfg)
    assert rec.labels is not None
    fold = saved_folds(rec, cfg)
    with stage("wearer", cfg):
        upside_down, wearer = find_upside_down(rec, fold, cfg)
    found = ",".join(np.unique(rec.subject[upside_down])) or "none"
    log("data", folder=cfg.data_dir, recordings=len(rec), rows=len(rec.acc), upside_down=found,
        subjects=len(set(rec.subject)), labels=len(rec.labels.table))  # fmt: skip
    taking_part = [m for m in MEMBERS if not why_absent(m, cfg)]
    wanted = {
        "table": bool(set(taking_part) - set(NETWORKS)),
        "frames": bool(set(taking_part) & set(NETWORKS)),
    }
    inputs = Inputs(canonical(rec, upside_down), cfg, **wanted)
    return TrainingData(inputs, rec.labels, fold, data_digest, digest(upside_down), wearer)


def saved_folds(rec: Recordings, cfg: Config) -> I64:
    """Folds of folds.csv if it is of these recordings and this number of folds, else new ones."""
    path = cfg.out / "folds.csv"
    try:
        with refusing(path, "is not used"):
            saved = read_csv(path)
            fold = saved["fold"].cast(pl.Int64).to_numpy().astype(np.int64)
            if saved["sequence_id"].cast(pl.String).to_list() != rec.sequence_id.tolist():
                raise ValueError("it is of other data")
            if set(fold.tolist()) != set(range(cfg.n_folds)):
                raise ValueError(f"its folds are not 0 … {cfg.n_folds - 1}")
            pairs = set(zip(rec.subject.tolist(), fold.tolist(), strict=True))
            if len(pairs) != len(set(rec.subject)):
                raise ValueError("some subject is in two folds")
            return fold
    except (DataError, pl.exceptions.PolarsError) as error:
        if path.exists():
            log("folds", why=error, instead="made anew")
    fold = make_folds(rec.subject, cfg)
    frame = pl.DataFrame({"sequence_id": rec.sequence_id, "subject": rec.subject, "fold": fold})
    write_whole(path, frame.write_csv())
    return fold


def preflight(cfg: Config) -> None:
    """What would be found out late is found out now: files, gateway, members, weights, disk."""
    tests = ((TEST_FILES[0], ("sequence_id", "subject", *ACC)), (TEST_FILES[1], ("subject",)))
    for name, columns in tests:
        read_table(cfg.data_dir / name, columns, ())
    present = [m for m in MEMBERS if not why_absent(m, cfg)]
    if not present:
        raise ConfigError("No member takes part: set USE_LGBM, USE_TORCH or USE_KERAS to 1.")
    fixed_shares([f"{m}/all" for m in present], cfg)
    inference_server(cfg)
    free = shutil.disk_usage(cfg.out).free / 2**20
    train = cfg.data_dir / "train.csv"
    needed = 200 + (train.stat().st_size / 2**20 if train.is_file() else 0)
    if free < needed:
        log("warning", free_mb=round(free), about_needed_mb=round(needed), folder=cfg.out)
    log("preflight", members=",".join(present), free_mb=round(free), gateway="importable")


def train_all(cfg: Config) -> Outcome | None:
    """Plan, train or reuse, fill the out-of-fold rows, find the weights, print the result table."""
    data = make_training_data(cfg)
    plan = make_plan(data, cfg)
    if cfg.plan_only:
        return None
    oof = train_members(plan, data, cfg)
    with stage("blend", cfg):
        rows = blend_members(oof, plan, data, cfg)
    for name, kind in dict.fromkeys((r["name"], r["kind"]) for r in rows):
        own = [r for r in rows if (r["name"], r["kind"]) == (name, kind)]
        values = {r["mode"]: f"{r['score']:.4f} [{r['low']:.3f}, {r['high']:.3f}]" for r in own}
        log("result", what=f"{name} {kind}", **values)
    return Outcome(data.inputs.rec, data.labels, data.fold, cfg)


def read_arguments(arguments: Sequence[str], env: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The environment with NAME=value arguments in it, and the help that is asked for, if any."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--help-features", action="store_true")
    parser.add_argument("settings", nargs="*")
    known, unknown = parser.parse_known_args(list(arguments))
    changed = dict(env)
    for word in (*unknown, *known.settings):
        name, is_setting, value = word.partition("=")
        if is_setting and name in KNOWN_NAMES:
            changed[name] = value
            continue
        asked = name.strip("-").replace("-", "_").upper()
        near = ALIASES.get(asked) or next(iter(difflib.get_close_matches(asked, KNOWN_NAMES)), None)
        hint = f" Did you mean {near}=…?" if near else ""
        raise ConfigError(
            f"{word!r} is no argument.{hint} Settings are given as NAME=value, or in the "
            f"environment; --help lists them."
        )
    return changed, "help" if known.help else "features" if known.help_features else ""


def main(env: Mapping[str, str], arguments: Sequence[str] = ()) -> None:
    """The whole road, or what of it the settings ask for."""
    env, asked = read_arguments(arguments, env)
    cfg = Config.from_env(env)
    if asked == "help":
        print("\n".join([(__doc__ or "").strip(), "", *settings_table(cfg)]))  # noqa: T201
    if asked == "features":
        print_feature_help(cfg)
    if asked:
        return
    if cfg.dl_num_workers:
        log("note", DL_NUM_WORKERS=cfg.dl_num_workers, effect="none: batches need no workers")
    for name, meant in likely_slips(env):
        log("warning", variable=name, did_you_mean=meant)
    STAGES.clear()
    if cfg.rerun:
        cfg.out.mkdir(parents=True, exist_ok=True)
        cfg = settle(cfg, env)
        serve(Predictor(cfg), cfg)
        return
    with contextlib.ExitStack() as held:
        for folder in sorted({cfg.out.resolve(), cfg.checkpoints.resolve()}):
            held.enter_context(only_run(folder))
        run_here(settle(cfg, env))


def run_here(cfg: Config) -> None:
    """Off the re-run: train, or serve what is there; then the local gateway and the report."""
    preflight(cfg)
    outcome, train = None, cfg.data_dir / "train.csv"
    if train.is_file() and not cfg.serve_only:
        outcome = train_all(cfg)
    elif find_models(cfg, {}):
        log("plan", action="serve", why="SERVE_ONLY=1" if cfg.serve_only else f"no {train}")
    else:
        zipped = [f" Unpack {p.name} first." for p in cfg.data_dir.glob("*.zip")]
        hint = zipped[0] if zipped else ""
        raise DataError(f"There is no {train} to train on and no model to serve.{hint}")
    if cfg.plan_only:
        return
    serve(Predictor(cfg), cfg)
    if (value := submission_score(cfg)) is not None:
        log("result", what="submission, its truth is known", score=value)
    write_report(outcome, cfg)


def start(env: Mapping[str, str], arguments: Sequence[str]) -> str | None:
    """main; a mistake of the user's or of a disk comes back as one line instead of a traceback."""
    try:
        main(env, arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has stopped, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ConfigError, DataError) as error:
        return f"cmi_pipeline: {error}".replace("\n", " ")
    except OSError as error:
        if not (error.errno and error.filename):
            raise
        what = f"{error.filename}: {os.strerror(error.errno)}"
        advice = "Make room or allow writing there, or set OUTPUT_PATH; what is done is kept"
        return f"cmi_pipeline: {what}. {advice}."
    except KeyboardInterrupt:
        return "cmi_pipeline: stopped. What is finished is kept; the same command goes on from it."
    return None


def as_module(path: Path) -> types.ModuleType:
    """This file, loaded anew under the name cmi_pipeline: functions that a worker process is
    handed must belong to a module that it can import."""
    name = "cmi_pipeline"
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


if __name__ == "__main__":
    if os.name == "nt":
        sys.exit("cmi_pipeline: Windows is not supported; use WSL, Linux or macOS.")
    here = Path(globals().get("__file__") or "nowhere").resolve()
    is_script = here.is_file()  # else a notebook, whose kernel's own arguments are not ours
    begin = as_module(here).start if is_script else start
    mistake = begin({**SETTINGS, **os.environ}, sys.argv[1:] if is_script else [])
    if mistake:  # a notebook shows any exit as an error, a good one too
        sys.exit(mistake)
