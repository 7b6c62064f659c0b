# %% [markdown]
"""Tell hair-pulling from hand-waving with a wrist sensor: train, blend and serve.

One file for Kaggle's "CMI - Detect Behavior with Sensor Data", read from top to bottom. The same
text runs as a script, a notebook or a module:

    python cmi_pipeline.py                       # plan, train or reuse, blend, gateway, submission
    PLAN_ONLY=1 python cmi_pipeline.py           # stop after the plan
    CMI_DATA_DIR=… python cmi_pipeline.py        # the real files instead of a simulation
    python cmi_pipeline.py --help                # every setting, its default and today's value
    python cmi_pipeline.py --help-features       # every feature, its unit and meaning

Sections
     1 Configuration
     2 Log and artefacts
     3 Gestures, score and folds
     4 Recordings
     5 Motion and wearer
     6 Features and frames
     7 LightGBM
     8 Torch
     9 Keras
    10 Members, plan and training
    11 Blend and assignment
    12 Serving
    13 Report
    14 Entry

Array axes, as written in every shape comment
    N recordings    R rows of all recordings, end to end    T time steps after padding
    C channels      F features    K gestures (18)           L composite labels (at most 102)

Units are SI: acceleration in m/s², angular velocity in rad/s, time in s, temperature in °C.
Quaternions are (w, x, y, z), as in the files, and turn the device frame into the world frame (z up).
"""

# %%
from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import difflib
import errno
import functools
import hashlib
import html
import importlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import sys
import threading
import time
import traceback
import typing
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

if TYPE_CHECKING:  # heavy; imported for real inside the functions that need them
    import torch

    Outputs = tuple[torch.Tensor, ...]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Str = npt.NDArray[np.str_]

# %% [markdown]
# ## 1 Configuration
#
# Every knob is one field of Config; the variable of the same name in capitals overrides its
# default. This section is the only reader of the environment. Everything below receives a Config
# and never looks back. `shapes` says whose trained models depend on a setting: change one of
# those and exactly these members are trained again.


# %%
class ConfigError(ValueError):
    """A setting whose value cannot be read, or a path it names that does not exist."""


class DataError(ValueError):
    """An input file that cannot be used; the text says what, where and what to do."""


LGBM, TORCH, KERAS = ("lgbm",), ("torch",), ("keras",)
NETS = TORCH + KERAS
EVERY = LGBM + NETS
KAGGLE_INPUT = Path("/kaggle/input")  # data sets are attached below it, at depths that change
KAGGLE_WORKING = Path("/kaggle/working")


def setting(
    default: Any, group: str, text: str, shapes: tuple[str, ...] = (), within: tuple[Any, ...] = ()
) -> Any:
    """One knob: default, group, a line of help, the members whose models depend on it, and what it
    may be: one of several words, or a number from the first of `within` to the second."""
    about = {"group": group, "help": text, "shapes": shapes, "within": within}
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True, slots=True)
class Config:
    """All settings. Derived values are properties; nothing changes after it was made."""

    # fmt: off
    cmi_data_dir: Path | None = setting(None, "files", "folder with train.csv, test.csv and both demographics files; found on Kaggle, else simulated")
    output_path: Path | None = setting(None, "files", "everything is written here; /kaggle/working on Kaggle, else ./cmi_output")
    ckpt_base_dir: Path | None = setting(None, "files", "caches and resumable state; OUTPUT_PATH/checkpoints")
    lgbm_bundle_path: Path | None = setting(None, "files", "LightGBM bundle to reuse: a folder or its bundle.json (also MODEL_PATH)")
    torch_bundle_path: Path | None = setting(None, "files", "Torch bundle to reuse: a folder or its bundle.json")
    keras_bundle_path: Path | None = setting(None, "files", "Keras bundle to reuse: a folder or its bundle.json")

    plan_only: bool = setting(False, "run", "stop after the plan")
    strict: bool = setting(False, "run", "predict raises instead of answering with a fallback")
    seed: int = setting(42, "run", "every random number follows from it", EVERY, (0, 2**31 - 1))
    n_folds: int = setting(5, "run", "folds, grouped by subject", EVERY, (2, 50))
    use_lgbm: bool = setting(True, "run", "LightGBM takes part")
    use_torch: bool = setting(True, "run", "Torch takes part")
    use_keras: bool = setting(True, "run", "Keras takes part")
    force_train_lgbm: bool = setting(False, "run", "train LightGBM although a bundle fits")
    force_train_torch: bool = setting(False, "run", "train Torch although a bundle fits")
    force_train_keras: bool = setting(False, "run", "train Keras although a bundle fits")
    resume: bool = setting(True, "run", "go on from checkpoints")
    resume_torch: bool = setting(True, "run", "go on from Torch checkpoints")
    resume_keras: bool = setting(True, "run", "go on from Keras checkpoints")
    fail_if_torch_missing: bool = setting(False, "run", "1: Torch not installed is an error")
    fail_if_keras_missing: bool = setting(False, "run", "1: Keras or TensorFlow not installed is an error")
    kaggle_is_competition_rerun: str | None = setting(None, "run", "set by Kaggle: serve the hidden test")
    sim_subjects: int = setting(12, "run", "training subjects of the simulation that stands in for missing data", (), (2, 10**4))
    sim_test_subjects: int = setting(2, "run", "its test subjects", (), (1, 10**4))
    sim_recordings: int = setting(102, "run", "its recordings a subject, 102 at most", (), (1, 102))

    fixed_pad_len: int = setting(90, "input", "rows a network sees, the last ones; 0 = PAD_LEN_PERCENTILE of the lengths", NETS, (0, 5000))
    pad_len_percentile: float = setting(95.0, "input", "percentile of the lengths if FIXED_PAD_LEN=0", NETS, (1, 100))
    modality_dropout_prob: float = setting(0.3, "input", "share of training recordings that lose ToF, THM or both", EVERY, (0, 1))
    frame_cache: bool = setting(True, "input", "keep frames in memory; 0: always mapped from disk")
    frame_cache_max_mb: int = setting(2048, "input", "frames above this size are mapped from disk", (), (0, 10**7))
    frame_cache_max_items: int = setting(1600, "input", "recordings that predict remembers", (), (0, 10**7))
    upside_down: bool = setting(True, "input", "detect wearers of a device turned by 180° and turn it back", EVERY)

    lgbm_rounds: int = setting(1024, "lgbm", "boosting rounds at most", LGBM, (1, 100000))
    lgbm_lr: float = setting(0.025, "lgbm", "learning rate", LGBM, (1e-6, 10))
    lgbm_leaves: int = setting(20, "lgbm", "leaves of a tree", LGBM, (2, 10000))
    lgbm_es_rounds: int = setting(50, "lgbm", "rounds without improvement before it stops; 0 = all rounds", LGBM, (0, 10**5))
    lgbm_es_metric: str = setting("logloss", "lgbm", "what early stopping watches: logloss or score", LGBM, ("logloss", "score"))
    lgbm_feature_fraction: float = setting(0.1, "lgbm", "share of the features that a tree is shown", LGBM, (0.001, 1))
    lgbm_class_weights: bool = setting(False, "lgbm", "all gestures weigh the same", LGBM)
    lgbm_top_features: int = setting(0, "lgbm", "train on the K best features of an earlier run; 0 = all", LGBM, (0, 10**6))

    torch_max_epochs: int = setting(30, "torch", "epochs at most", TORCH, (1, 10**5))
    torch_batch_size: int = setting(16, "torch", "recordings a step; capped at a sixteenth of the training rows; 32 scored 0.016 less, 64 0.025", TORCH, (1, 10**6))
    torch_accum_steps: int = setting(1, "torch", "micro-batches a step", TORCH, (1, 10**6))
    torch_lr: float = setting(1e-3, "torch", "peak learning rate", TORCH, (0, 1))
    torch_weight_decay: float = setting(1e-2, "torch", "weight decay", TORCH, (0, 10))
    torch_dropout: float = setting(0.2, "torch", "dropout", TORCH, (0, 0.95))
    torch_label_smoothing: float = setting(0.05, "torch", "label smoothing", TORCH, (0, 0.95))
    torch_es_patience: int = setting(0, "torch", "epochs without improvement before it stops; 0 = fixed number, which is honest and no worse", TORCH, (0, 10**5))
    torch_es_min_delta: float = setting(1e-4, "torch", "smallest improvement that counts", TORCH, (0, 1))
    torch_amp: bool = setting(True, "torch", "mixed precision where a GPU has it")
    torch_seeds: int = setting(1, "torch", "networks a fold, averaged", (), (1, 100))
    torch_data_parallel: bool = setting(False, "torch", "split each batch over all cards instead of one fold a card")
    use_focal_loss: bool = setting(False, "torch", "focal instead of cross-entropy loss", TORCH)
    torch_width: int = setting(64, "torch", "channels of the first block; the later ones have up to twice as many", TORCH, (8, 1024))
    torch_tof_images: bool = setting(False, "torch", "a small 2-D network over each ToF frame", TORCH)
    torch_ema: float = setting(0.99, "torch", "share of the averaged weights kept at each step; 0 = no averaging", TORCH, (0, 1))
    torch_mixup_prob: float = setting(0.5, "torch", "share of training recordings that are mixed with another", TORCH, (0, 1))
    torch_stretch_prob: float = setting(0.5, "torch", "share that is stretched in time", TORCH, (0, 1))
    torch_shift_prob: float = setting(0.5, "torch", "share that ends a few rows early", TORCH, (0, 1))
    torch_rotate_prob: float = setting(0.5, "torch", "share whose wristband is turned a little", TORCH, (0, 1))
    torch_time_mask_prob: float = setting(0.2, "torch", "share that loses some rows", TORCH, (0, 1))
    torch_channel_mask_prob: float = setting(0.1, "torch", "share that loses some channels", TORCH, (0, 1))
    torch_threads: int = setting(1, "torch", "CPU threads of one network; another number changes its last digits", (), (1, 256))
    dl_num_workers: int = setting(0, "torch", "kept for old notebooks; batches need no workers, has no effect")

    keras_max_epochs: int = setting(40, "keras", "epochs at most", KERAS, (1, 10**5))
    keras_batch_size: int = setting(512, "keras", "recordings a step; capped at a sixteenth of the training rows", KERAS, (1, 10**6))
    keras_lr: float = setting(2e-3, "keras", "learning rate; 1e-3 scored 0.01 less on simulated data", KERAS, (0, 1))
    keras_weight_decay: float = setting(1e-2, "keras", "weight decay", KERAS, (0, 10))
    keras_dropout: float = setting(0.2, "keras", "dropout", KERAS, (0, 0.95))
    keras_label_smoothing: float = setting(0.1, "keras", "label smoothing", KERAS, (0, 0.95))
    keras_class_weight: float = setting(0.0, "keras", "weight of a gesture = its count to the power of minus this; 0 = all recordings alike", KERAS, (0, 10))
    keras_augment: bool = setting(True, "keras", "stretch recordings in time and turn the wristband, anew in every epoch", KERAS)
    keras_width: int = setting(64, "keras", "channels of the first block, a multiple of 16; later ones have twice as many", KERAS, (16, 1024))
    keras_es_patience: int = setting(5, "keras", "epochs without improvement before it stops, 0 = fixed number; 3 scored 0.015 less", KERAS, (0, 10**5))
    keras_rlr_patience: int = setting(3, "keras", "epochs without improvement before the learning rate halves; 0 = a cosine over KERAS_MAX_EPOCHS", KERAS, (0, 10**5))
    keras_mp: bool = setting(True, "keras", "mixed precision where a GPU has it")
    keras_policy: str = setting("", "keras", "forces float32, mixed_float16 or mixed_bfloat16, on a CPU too", (), ("", "float32", "mixed_float16", "mixed_bfloat16"))
    keras_jit: bool = setting(False, "keras", "XLA")
    keras_threads: int = setting(2, "keras", "CPU threads of one network; another number changes its last digits", (), (1, 256))

    ensemble_weights: str = setting("", "blend", 'fixed weights, "lgbm:0.4,torch:0.6"; searched if empty')
    ensemble_w_lgbm: float | None = setting(None, "blend", "fixed weight; searched, 0.20 without out-of-fold rows", (), (0, 10**6))
    ensemble_w_torch: float | None = setting(None, "blend", "fixed weight; searched, 0.45 without out-of-fold rows", (), (0, 10**6))
    ensemble_w_keras: float | None = setting(None, "blend", "fixed weight; searched, 0.35 without out-of-fold rows", (), (0, 10**6))
    ensemble_trials: int = setting(1024, "blend", "random weights tried before the refinement", (), (0, 10**6))
    ensemble_temperature: float | None = setting(None, "blend", "temperature of every member; fitted if empty", (), (0.01, 100))
    subject_assignment: bool = setting(True, "blend", "each composite label at most once a subject")

    log_every_steps: int = setting(50, "log", "rounds of LightGBM between two lines", (), (1, 10**6))
    print_every_steps: int = setting(100, "log", "steps of a network between two lines", (), (1, 10**6))
    feature_log_every: int = setting(2000, "log", "recordings between two lines of feature extraction; 200 of them take 0.2 s", (), (1, 10**7))
    save_jsonl: bool = setting(True, "log", "write logs/*.jsonl")
    use_tqdm: bool = setting(False, "log", "progress bars on a terminal")

    cmi_workers: int = setting(1, "machines", "jobs side by side", (), (1, 10**4))
    cmi_backend: str = setting("loky", "machines", "joblib backend: loky, threading, dask or ray", (), ("loky", "threading", "dask", "ray"))
    dask_scheduler: str = setting("", "machines", "address of a running Dask scheduler")
    ray_address: str = setting("", "machines", "address of a running Ray cluster")
    # fmt: on

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
    def threads(self) -> int:
        """LightGBM's threads for one job, so that CMI_WORKERS of them fill the machine."""
        return max(1, len(os.sched_getaffinity(0)) // max(1, self.cmi_workers))

    @property
    def checkpoints(self) -> Path:
        return self.ckpt_base_dir or self.out / "checkpoints"

    @property
    def rerun(self) -> bool:
        """Is this Kaggle's hidden re-run? Set but empty counts, as in Kaggle's own package."""
        return self.kaggle_is_competition_rerun is not None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, within = getattr(self, f.name), f.metadata["within"]
            if not within or value is None:
                continue
            word = isinstance(within[0], str)
            if value not in within if word else not within[0] <= value <= within[1]:
                allowed = (
                    "one of " + ", ".join(within) if word else f"from {within[0]} to {within[1]}"
                )
                raise ConfigError(f"{f.name.upper()}={value} must be {allowed}.")
        if self.keras_width % 16:
            raise ConfigError(f"KERAS_WIDTH={self.keras_width} must be a multiple of 16.")

    def uses(self, member: str) -> bool:
        return bool(getattr(self, f"use_{member}"))

    def shaping(self, member: str) -> dict[str, Any]:
        """The settings on which the trained models of `member` depend."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if member in f.metadata["shapes"]
        }

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Config:
        """Defaults, overridden by the variables in `env` that carry a field's name in capitals."""
        if "MODEL_PATH" in env and "LGBM_BUNDLE_PATH" not in env:
            env = {**env, "LGBM_BUNDLE_PATH": env["MODEL_PATH"]}
        kinds = typing.get_type_hints(cls)
        changes = {
            f.name: read_as(kinds[f.name], env[f.name.upper()], f.name.upper(), f.default)
            for f in dataclasses.fields(cls)
            if f.name.upper() in env
        }
        return cls(**changes)


def read_as(kind: Any, text: str, name: str, default: object) -> Any:
    """Read `text` as `kind`; an empty text is None where None is allowed, else the default."""
    optional = type(None) in typing.get_args(kind)
    base = next((k for k in typing.get_args(kind) if k is not type(None)), kind)
    if not text.strip() and base is not str:
        return None if optional else default
    try:
        if base is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.strip().lower()]
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


def settings_table() -> list[str]:
    """README's table of settings, a line each, groups one after the other."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for f in dataclasses.fields(Config):
        lines.append(f"| {f.name.upper()} | {shown(f.default)} | {f.metadata['help']} |")
    return lines


def print_help(cfg: Config) -> None:
    """Every setting in groups: its value today, its default, a line on what it does."""
    print((__doc__ or "").strip())  # noqa: T201
    for group, members in itertools.groupby(
        dataclasses.fields(Config), lambda f: f.metadata["group"]
    ):
        print(f"\n{group}")  # noqa: T201
        for f in members:
            now, default = shown(getattr(cfg, f.name)), shown(f.default)
            value = now if now == default else f"{now} (default {default})"
            print(f"  {f.name.upper():<28} {value:<14} {f.metadata['help']}")  # noqa: T201


def likely_typos(env: Iterable[str]) -> list[tuple[str, str]]:
    """Variables that nearly carry a setting's name, each with the setting that was probably meant."""
    known = [f.name.upper() for f in dataclasses.fields(Config)] + ["MODEL_PATH"]
    near = [(n, difflib.get_close_matches(n, known, n=1, cutoff=0.87)) for n in sorted(env)]
    return [(name, match[0]) for name, match in near if match and name not in known]


# %% [markdown]
# ## 2 Log and artefacts
#
# One line per event, printed by one function. Every artefact is written under a temporary name and
# renamed, so that what exists is whole; a file that a killed run left behind is never read. Logs,
# among them Keras's foldNN_train.csv, grow line by line.

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
    """A long loop's lines: one every `every` units, at the end, and after 20 seconds of silence.

    With USE_TQDM=1, on a terminal, a bar stands in for the lines.
    """

    def __init__(
        self, event: str, total: int, every: int, cfg: Config, done: int = 0, **names: object
    ) -> None:
        self.event, self.total, self.every, self.names = event, total, every, names
        self.done = self.first = done
        self.began = self.told = time.monotonic()
        self.bar: Any = None
        if cfg.use_tqdm and sys.stderr.isatty() and package_version("tqdm"):
            from tqdm.auto import tqdm

            about = " ".join((event, *map(str, names.values())))
            self.bar = tqdm(total=total, initial=done, desc=about, leave=False)

    def step(self, n: int = 1, values: Callable[[], Mapping[str, object]] = dict) -> None:
        """`n` more units are done. `values` go into the line and are asked for if one is due."""
        before, self.done, now = self.done, self.done + n, time.monotonic()
        if self.bar:
            self.bar.update(n)
        due = self.done // self.every > before // self.every or before < self.total <= self.done
        if self.bar or not (due or now - self.told > SILENCE):
            return
        self.told = now
        rate = (self.done - self.first) / max(now - self.began, 1e-9)
        eta = (self.total - self.done) / rate if rate else float("nan")
        log(
            self.event,
            **self.names,
            done=f"{self.done}/{self.total}",
            **values(),
            per_sec=rate,
            eta=eta,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.close()


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the run that is over."""

    name: str
    secs: float
    peak_mb: float  # the most memory that this process, or one of its workers, held until then


STAGES: list[Stage] = []  # of this run, for the report


@contextlib.contextmanager
def stage(name: str, cfg: Config | None) -> Iterator[None]:
    """Tell and keep how long a part of the run takes, and what memory; nothing without settings."""
    if cfg is None:
        yield
        return
    began = time.monotonic()
    log("stage", begins=name)
    yield
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak_mb = max(resource.getrusage(who).ru_maxrss for who in whose) / 1024  # Linux counts in KB
    over = Stage(name, time.monotonic() - began, peak_mb)
    STAGES.append(over)
    log("stage", ends=name, secs=over.secs, peak_mb=round(peak_mb))
    append_jsonl(cfg.out / "logs" / "stages.jsonl", cfg, **dataclasses.asdict(over))


def rng_for(cfg: Config, *path: str | int) -> np.random.Generator:
    """Random numbers fixed by the seed and `path` alone, whatever ran before.

    Fold 3 trained by itself therefore equals fold 3 of a full run.
    """
    return np.random.default_rng([cfg.seed, *(zlib.crc32(str(p).encode()) for p in path)])


def write_whole(path: Path, content: bytes | str) -> None:
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
    import fcntl

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
        else:
            clear_leftovers(folder)
        yield


def clear_leftovers(folder: Path) -> None:
    """Remove what killed runs were writing. Only for the holder of the folder's lock."""
    for path in sorted(folder.rglob(".*.[0-9]*.part*")):
        log("leftover", removed=path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """As a .npy file, whole or not at all."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    write_whole(path, content.getvalue())


def write_json(path: Path, content: object) -> None:
    """As indented JSON, whole or not at all."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a file that must be JSON; a `DataError` names it if it is not."""
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}). Delete it, or attach it again.") from None


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


# %% [markdown]
# ## 3 Gestures, score and folds
#
# The strings are the interface: predict must return one of GESTURES. The score is the
# competition's own; two well-known public copies of it are wrong. A subject is never on both
# sides of a split, and the assignment is saved, because scikit-learn's changes with its version.

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
BLIND = "norot"  # as if no recording had a rotation: for the few that come without
ROUTES = (*MODES, BLIND)


def score(truth: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """The competition's score of gesture codes (N) against gesture codes (N), 0 … 1.

    Half the F1 of target against non-target, half the macro F1 over the 8 targets and one class
    for all the rest; classes that occur on neither side do not count.
    """
    return sum(score_parts(truth, predicted)) / 2


def score_parts(truth: npt.ArrayLike, predicted: npt.ArrayLike) -> tuple[float, float]:
    """Binary F1 and macro F1, whose mean is the score."""
    t = np.minimum(np.asarray(truth), len(TARGETS))  # code 8: any non-target
    p = np.minimum(np.asarray(predicted), len(TARGETS))
    counts = np.zeros((9, 9))
    np.add.at(counts, (t, p), 1)
    binary, macro = f1_of_counts(counts)
    return float(binary), float(macro)


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
# Recordings differ in length, so they are stored end to end: recording i owns the rows
# start[i]:start[i + 1]. The same constructor takes train.csv and the frame that predict receives.
# A pixel is one byte: 0 … 249 as measured, 254 nothing in range (a value), 255 missing (a gap).

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


def numbers(frame: pl.DataFrame, columns: Sequence[str]) -> F32:
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
        tof[i : i + 4096] = pixel_codes(numbers(frame[i : i + 4096], TOF))
    return Recordings(
        start=np.r_[first, len(ids)].astype(np.int64),
        acc=numbers(frame, ACC),
        rot=numbers(frame, ROT),
        thm=numbers(frame, THM),
        tof=tof.reshape(-1, 5, 8, 8),
        sequence_id=ids.gather(first).to_numpy().astype(np.str_),
        subject=subject,
        person=person_of(subject, person),
    )


def person_of(subject: Str, person: pl.DataFrame) -> F32:
    """Demographics of each recording's wearer. → (N, 7); an unknown wearer counts as right-handed"""
    names = person["subject"] if "subject" in person.columns else [""] * len(person)
    known = {str(s): row for s, row in zip(names, numbers(person, PERSON), strict=True)}
    stranger = np.full(len(PERSON), np.nan, np.float32)
    rows = np.stack([known.get(str(s), stranger) for s in subject])
    right = PERSON.index("handedness")
    rows[:, right] = np.where(rows[:, right] == 0, 0, 1)
    return rows


def read_train(folder: Path) -> Recordings:
    """train.csv and train_demographics.csv of `folder`, with labels."""
    path = folder / "train.csv"
    texts = ("sequence_id", "subject", "gesture", "orientation", "behavior", "phase")
    frame = ordered(read_table(path, texts, ("sequence_counter", *SENSORS)), path)
    person = read_table(folder / "train_demographics.csv", ("subject",), PERSON)
    rec = to_recordings(frame, person)
    strangers = sorted(set(rec.subject.tolist()) - set(person["subject"].to_list()))
    if strangers:
        log(
            "warning",
            no_demographics=",".join(strangers[:5]),
            of=len(strangers),
            taken_as="right-handed",
        )
    first = rec.start[:-1]
    labels = Labels.of(
        codes(frame, "gesture", GESTURES, path)[first],
        codes(frame, "orientation", ORIENTATIONS, path)[first],
        codes(frame, "behavior", BEHAVIORS, path)[first],
        codes(frame, "phase", PHASES, path).astype(np.uint8),
    )
    return dataclasses.replace(rec, labels=labels)


def read_table(path: Path, texts: Sequence[str], values: Sequence[str]) -> pl.DataFrame:
    """The named columns of a CSV file, `texts` as String, `values` as Float32."""
    if not path.is_file():
        raise DataError(f"{path} does not exist. Point CMI_DATA_DIR at the competition's folder.")
    try:
        present = pl.read_csv(path, n_rows=0, infer_schema=False).columns
    except pl.exceptions.NoDataError:
        raise DataError(f"{path} is empty. Download it again.") from None
    absent = [c for c in (*texts, *values) if c not in present]
    if absent:
        raise DataError(
            f"{path} has no column {absent[0]} ({len(absent)} are missing). Is it the right file?"
        )
    types = dict.fromkeys(texts, pl.String) | dict.fromkeys(values, pl.Float32)
    try:
        frame = pl.read_csv(path, columns=[*texts, *values], schema_overrides=types)
    except pl.exceptions.ComputeError:
        frame = read_damaged(path, texts, values)
    if not len(frame):
        raise DataError(f"{path} has a header but no rows. Download it again.")
    return frame.head(-1) if cut_off(path, len(present)) else frame


def read_damaged(path: Path, texts: Sequence[str], values: Sequence[str]) -> pl.DataFrame:
    """Read a file in which some number is none: those values become missing, the first is named."""
    raw = pl.scan_csv(path, infer_schema=False, truncate_ragged_lines=True).select(*texts, *values)
    cast = [pl.col(c).cast(pl.Float32, strict=False).alias(c) for c in values]
    lost = [
        pl.col(c).is_not_null() & pl.col(c).cast(pl.Float32, strict=False).is_null() for c in values
    ]
    first = raw.with_row_index("line", 2).filter(pl.any_horizontal(lost)).head(1).collect()
    for row in first.iter_rows(named=True):
        column, text = next((c, row[c]) for c in values if not readable(row[c]))
        log(
            "warning",
            file=path,
            line=row["line"],
            column=column,
            text=repr(text),
            taken_as="missing",
        )
    return raw.with_columns(cast).collect()


def readable(text: str | None) -> bool:
    """Is this a number, or nothing at all?"""
    return text is None or pl.Series([text]).cast(pl.Float32, strict=False).null_count() == 0


def cut_off(path: Path, n_columns: int) -> bool:
    """Does the file end in the middle of a row? Then its last row is left out, with a warning."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        tail = file.read()
    if tail.endswith(b"\n") or tail.rsplit(b"\n", 1)[-1].count(b",") == n_columns - 1:
        return False
    log("warning", file=path, last_line="cut off", taken_as="absent")
    return True


def ordered(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Rows of a recording one after the other, counter rising, each once; as in the file if it is so."""
    ids, counter = frame["sequence_id"], frame["sequence_counter"].to_numpy()
    new = (ids != ids.shift()).fill_null(value=True).to_numpy()
    broken = ~new & (np.diff(counter, prepend=-1.0) <= 0)
    if new.sum() == ids.n_unique() and not broken.any():
        return frame
    key = ["sequence_id", "sequence_counter"]
    rank = {name: i for i, name in enumerate(ids.unique(maintain_order=True))}
    fixed = (
        frame.unique(key, keep="first", maintain_order=True)
        .with_columns(
            pl.col("sequence_id").replace_strict(rank, return_dtype=pl.Int64).alias("rank")
        )
        .sort("rank", "sequence_counter", maintain_order=True)
        .drop("rank")
    )
    again = new & ids.is_first_distinct().not_().to_numpy()  # an id comes back after another one
    row = int(np.flatnonzero(broken | again)[0])
    log("warning", file=path, order="rows of a recording apart, out of order or twice",
        line=row + 2, recording=ids[row], dropped=len(frame) - len(fixed), taken_as="sorted")  # fmt: skip
    return fixed


def codes(frame: pl.DataFrame, column: str, names: tuple[str, ...], path: Path) -> I64:
    """Strings as codes into `names`; any other string is an error that tells its place. → (R)"""
    at = {name: i for i, name in enumerate(names)}
    code = frame[column].replace_strict(at, default=None, return_dtype=pl.Int64)
    if code.null_count():
        row = int(code.is_null().arg_max() or 0)
        raise DataError(
            f"{path}: {column} {frame[column][row]!r} of {frame['sequence_id'][row]} (row {row + 2}) "
            f"is none of the {len(names)} known: {', '.join(names)}."
        )
    return code.to_numpy().astype(np.int64)


RECORDINGS_FORMAT = 1  # raise it when reading changes, and caches are built again


def cached_recordings(folder: Path, cfg: Config) -> tuple[Recordings, str]:
    """Training recordings and their digest, from the cache if train.csv is still the same file."""
    files = [folder / "train.csv", folder / "train_demographics.csv"]
    stats = [
        (f.name, s.st_size, s.st_mtime_ns) for f in files if (s := f.stat() if f.exists() else None)
    ]
    cache = cfg.checkpoints / "cache" / f"recordings-{digest(RECORDINGS_FORMAT, stats)}"
    meta = cache / "meta.json"
    if meta.exists():
        try:
            rec = load_recordings(cache)
            mark = digest(*flat_arrays(rec).values())
            if mark == read_json(meta)["digest"]:
                log(
                    "plan",
                    what="recordings",
                    action="reuse",
                    why="train.csv is as it was",
                    path=cache,
                )
                return rec, mark
            why = "its arrays are not those that were written"
        except (OSError, EOFError, LookupError, TypeError, ValueError, AssertionError) as error:
            why = str(error)
        log("warning", cache=cache, why=f"{why:.200}", instead="read again")
    log("plan", what="recordings", action="build", why="no cache of this train.csv", path=cache)
    rec = read_train(folder)
    for old in cache.parent.glob("recordings-*"):
        shutil.rmtree(old)
    arrays = flat_arrays(rec)
    for name, array in arrays.items():
        write_array(cache / f"{name}.npy", array)
    mark = digest(*arrays.values())
    write_json(meta, {"digest": mark, "files": stats})  # last: without it the cache does not count
    return rec, mark


def flat_arrays(rec: Recordings) -> dict[str, npt.NDArray[Any]]:
    """All arrays of labelled recordings under unique names."""
    assert rec.labels is not None
    own = {f.name: getattr(rec, f.name) for f in dataclasses.fields(rec) if f.name != "labels"}
    labels = {f"label_{f.name}": getattr(rec.labels, f.name) for f in dataclasses.fields(Labels)}
    return own | labels


def load_recordings(cache: Path) -> Recordings:
    """What `flat_arrays` wrote, put together again."""
    arrays = {p.stem: np.load(p, allow_pickle=False) for p in cache.glob("*.npy")}
    labels = {
        k.removeprefix("label_"): arrays.pop(k) for k in list(arrays) if k.startswith("label_")
    }
    return Recordings(**arrays, labels=Labels(**labels))


# %% [markdown]
# ## 5 Motion and wearer
#
# Pure functions of whole columns: no loop over recordings, no configuration, input untouched.
# `start` keeps recordings apart: nothing is ever computed across the border of two of them.
# Results are float64 (R, k) whose components lie one after the other in memory (`side_by_side`),
# so that every step works on contiguous numbers. A recording without rotation stays NaN in all
# that needs one: NaN is the flag, an invented identity would pose as data.

# %%
SAMPLE_PERIOD = 0.1  # s; not published, about 10 Hz fits; nothing but scale depends on it
GRAVITY = 9.81  # m/s²
GESTURE_ROWS = 31  # the gesture is at the end of a recording and about 31 rows long
SLOW_ROWS = 15  # window of the median that stands in for gravity where there is no rotation


def side_by_side(*parts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Components to vectors. k × (R) → (R, k), a view of k contiguous columns"""
    return np.stack(parts).T


def length(v: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Euclidean length of each row. (R, k) → (R)"""
    return np.sqrt(functools.reduce(np.add, [c * c for c in v.T]))


def dot(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Inner product row by row. (R, k), (R, k) → (R)"""
    return functools.reduce(np.add, [p * q for p, q in zip(a.T, b.T, strict=True)])


def cross(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Vector product row by row. (R, 3), (R, 3) → (R, 3)"""
    (ax, ay, az), (bx, by, bz) = a.T, b.T
    return side_by_side(ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx)


def conjugate(q: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The reverse rotation. (R, 4) → (R, 4)"""
    w, x, y, z = q.T
    return side_by_side(w, -x, -y, -z)


def multiply(p: npt.NDArray[Any], q: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Hamilton product: first q, then p. (R, 4), (R, 4) → (R, 4)"""
    (a, b, c, d), (w, x, y, z) = p.T, q.T
    return side_by_side(
        a * w - b * x - c * y - d * z,
        a * x + b * w + c * z - d * y,
        a * y - b * z + c * w + d * x,
        a * z + b * y - c * x + d * w,
    )


def rotate(q: npt.NDArray[Any], v: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Device frame to world frame. (R, 4), (R, 3) → (R, 3)"""
    turn = 2 * cross(q[:, 1:], v)
    return v + q[:, :1] * turn + cross(q[:, 1:], turn)


def up_seen(rot: npt.NDArray[Any]) -> F64:
    """The world's z axis in the device frame: third row of the matrix. (R, 4) → (R, 3)"""
    w, x, y, z = np.asarray(rot, np.float64).T
    return side_by_side(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y))


def rotation_6d(rot: npt.NDArray[Any]) -> F64:
    """The world's x and y axes in the device frame. (R, 4) → (R, 6)

    Two rows of the matrix determine it and have no jumps (Zhou et al. 2019). Rows, not columns:
    turning the wristband then acts on each triple as one rotation of the device frame.
    """
    w, x, y, z = np.asarray(rot, np.float64).T
    return side_by_side(
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
    )


def known_rows(known: Bool, start: I64) -> tuple[I64, I64]:
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

    Its sign is the one that turns least from the nearest known row, and + where there is none.
    """
    hole = ~np.isfinite(q)
    one = np.flatnonzero(hole.sum(axis=1) == 1)
    before, after = (rows[one] for rows in known_rows(~np.any(hole, axis=1), start))
    near_before = (before >= 0) & ((after < 0) | (one - before <= after - one))
    partner = np.where(near_before, before, after)
    rest = np.where(hole[one], 0, q[one])  # (n, 4)
    size = np.sqrt(np.maximum(1 - (rest * rest).sum(axis=1), 0))
    guide = np.where(partner[:, None] >= 0, q[partner], 0)
    agree = (rest * guide).sum(axis=1) * np.where(hole[one], guide, 0).sum(axis=1)
    out = q.copy(order="K")
    out[one] = np.where(hole[one], np.where(agree < 0, -size, size)[:, None], rest)
    return out


def fill_rows(q: F64, gone: Bool, start: I64) -> F64:
    """Missing rotations between two known ones by slerp, at the ends held. (R, 4) → (R, 4)"""
    rows = np.flatnonzero(gone)
    before, after = (known[rows] for known in known_rows(~gone, start))
    empty = (before < 0) & (after < 0)
    first, last = np.where(before < 0, after, before), np.where(after < 0, before, after)
    p, r = q[first], q[last]
    cosine = (p * r).sum(axis=1)
    r, cosine = np.where(cosine[:, None] < 0, -r, r), np.minimum(np.abs(cosine), 1)
    angle = np.arccos(cosine)[:, None]
    t = ((rows - first) / np.maximum(last - first, 1))[:, None]
    sine = np.where(angle > 1e-6, np.sin(angle), 1)
    a = np.where(angle > 1e-6, np.sin((1 - t) * angle) / sine, 1 - t)
    b = np.where(angle > 1e-6, np.sin(t * angle) / sine, t)
    out = q.copy(order="K")
    out[rows] = np.where(empty[:, None], np.nan, a * p + b * r)
    return out


def repair_rotation(rot: npt.NDArray[Any], start: I64) -> F64:
    """Unit quaternions with w ≥ 0, gaps filled within their recording. (R, 4) → (R, 4)

    One missing component comes from the unit norm; a zero quaternion counts as missing; missing
    rows are interpolated, or held at the ends. NaN remains where a recording has no rotation.
    """
    q = np.ascontiguousarray(rot.T, np.float64).T
    if not np.isfinite(q).all():
        q = rebuild_component(q, start)
    norm = length(q)
    gone = ~(norm > 0.1) | ~np.isfinite(norm)
    with np.errstate(invalid="ignore"):
        q = q / np.where(gone, np.nan, norm)[:, None]
    if gone.any():
        q = fill_rows(q, gone, start)
    return q * np.where(q[:, :1] < 0, -1.0, 1.0)


def continuous_rotation(rot: F64, start: I64) -> F64:
    """Signs chosen so that q does not jump, and w is positive on average. (R, 4) → (R, 4)"""
    step = np.r_[1.0, dot(rot[1:], rot[:-1])]
    smooth = rot * np.cumprod(np.where(step < 0, -1.0, 1.0))[:, None]
    total = np.add.reduceat(smooth[:, 0], start[:-1])
    return smooth * np.repeat(np.where(total < 0, -1.0, 1.0), np.diff(start))[:, None]


def row_of(start: I64, order: I64) -> tuple[I64, I64]:
    """Rows of the recordings in `order`, end to end, and where each then begins."""
    n = np.diff(start)[order]
    begin = np.r_[0, np.cumsum(n)]
    return np.repeat(start[order] - begin[:-1], n) + np.arange(begin[-1]), begin


def slow_direction(acc: npt.NDArray[Any], start: I64) -> F64:
    """Where gravity points, guessed without rotation: median over 15 rows. (R, 3) → (R, 3) unit

    The median ignores short bursts; near the ends of a recording the window shrinks.
    """
    n, row = np.diff(start), np.arange(len(acc))
    window = row[:, None] + np.arange(SLOW_ROWS) - SLOW_ROWS // 2  # (R, 15)
    inside = (window >= np.repeat(start[:-1], n)[:, None]) & (
        window < np.repeat(start[1:], n)[:, None]
    )
    near = np.where(
        inside, np.asarray(acc.T, np.float64)[:, np.clip(window, 0, len(acc) - 1)], np.nan
    )
    near.sort(axis=2)  # (3, R, 15), NaN last
    count = np.isfinite(near).sum(axis=2, keepdims=True)
    low = np.take_along_axis(near, np.maximum(count - 1, 0) // 2, axis=2)
    high = np.take_along_axis(near, np.clip(count // 2, 0, SLOW_ROWS - 1), axis=2)
    slow = (0.5 * (low + high))[..., 0].T  # (R, 3)
    size = length(slow)[:, None]
    return slow / np.where(size > 1e-6, size, np.nan)


def up_direction(acc: npt.NDArray[Any], rot: F64, start: I64) -> F64:
    """The vertical in the device frame: exact with rotation, else by median. → (R, 3) unit"""
    up = up_seen(rot)
    blind = np.flatnonzero(np.isnan(rot[start[:-1], 0]))  # recordings
    if not blind.size:
        return up
    rows, begin = row_of(start, blind)
    up[rows] = slow_direction(acc[rows], begin)
    return up


def turn_between(p: F64, q: F64) -> tuple[F64, F64]:
    """The shorter turn from p to q, device axes: angle, and sin(angle / 2) · axis. → (R), (R, 3)"""
    step = multiply(conjugate(p), q)
    v, w = step[:, 1:], step[:, 0]
    return 2 * np.arctan2(length(v), np.abs(w)), v * np.where(w < 0, -1.0, 1.0)[:, None]


def angular_distance(p: F64, q: F64) -> F64:
    """Angle of the shorter turn from p to q. (R, 4), (R, 4) → (R) rad, 0 … π"""
    return turn_between(p, q)[0]


def angular_velocity(rot: npt.NDArray[Any], start: I64) -> F64:
    """Turning rate since the row before, device axes; 0 in the first row. (R, 4) → (R, 3) rad/s"""
    q = np.asarray(rot, np.float64)
    angle, v = turn_between(q[np.maximum(np.arange(len(q)) - 1, 0)], q)
    sine = length(v)
    rate = v * (angle / np.where(sine > 0, sine, 1) / SAMPLE_PERIOD)[:, None]
    first = start[:-1]
    rate[first] = np.where(np.isnan(q[first, :1]), np.nan, 0.0)
    return rate


def jerk(acc: npt.NDArray[Any], start: I64) -> F64:
    """Change of acceleration since the previous row; 0 in the first row. (R, 3) → (R, 3) m/s³"""
    a = np.ascontiguousarray(acc.T, np.float64)
    out = np.diff(a, axis=1, prepend=a[:, :1]) / SAMPLE_PERIOD
    out[:, start[:-1]] = np.where(np.isnan(a[:, start[:-1]]), np.nan, 0.0)
    return out.T


@dataclass(frozen=True, slots=True)
class Motion:
    """What the wrist does, row by row. Vectors are (R, 3) in device axes unless they say world."""

    acc: F64  # m/s², gravity included
    rot: F64  # (R, 4) repaired
    up: F64  # unit, the vertical
    level: F64  # (R, 6) the world's x and y axes, unit
    linear: F64  # m/s², without gravity
    omega: F64  # rad/s
    jerk: F64  # m/s³
    vertical: F64  # (R) m/s², linear acceleration along the vertical
    horizontal: F64  # (R) m/s², size of the rest
    swing: F64  # (R) rad, turn since the first row

    @classmethod
    def of(cls, rec: Recordings) -> Motion:
        acc = np.ascontiguousarray(rec.acc.T, np.float64).T
        rot = repair_rotation(rec.rot, rec.start)
        up = up_direction(acc, rot, rec.start)
        linear = acc - GRAVITY * up
        vertical = dot(linear, up)
        horizontal = length(linear - vertical[:, None] * up)
        begin = np.repeat(rec.start[:-1], np.diff(rec.start))
        swing = angular_distance(rot.T[:, begin].T, rot)
        omega, jolt = angular_velocity(rot, rec.start), jerk(acc, rec.start)
        level = rotation_6d(rot)
        return cls(acc, rot, up, level, linear, omega, jolt, vertical, horizontal, swing)


def world_ahead(linear: F64, rot: F64, start: I64, cut: I64) -> F64:
    """World acceleration, turned about the vertical so that x is where the device's x axis points
    during the gesture. (R, 3) → (R, 3) m/s²

    The compass heading of a wearer means nothing; this frame goes with the wearer. `cut` is the
    first row of each gesture.
    """
    world, level = rotate(rot, linear), rotation_6d(rot)
    pair = np.stack([cut, start[1:]], axis=1).ravel()
    padded = np.concatenate([level[:, [0, 3]].T, np.zeros((2, 1))], axis=1)
    aim = np.add.reduceat(padded, pair, axis=1)[:, ::2]  # (2, N)
    aim = aim / np.maximum(np.hypot(*aim), 1e-12)
    c, s = np.repeat(aim, np.diff(start), axis=1)
    x, y, z = world.T
    return side_by_side(c * x + s * y, c * y - s * x, z)


# %% [markdown]
# Left-handers are mirrored and devices worn upside down are turned back, by exact maps: signs
# change and sensors swap, no number is rounded. Everything after this sees right-handers only.

# %%
# Which axis of each ToF image a mirrored device x axis flips: 1 columns, 0 rows. Sensors 3 and 5
# are mounted at a right angle to 1, 2 and 4. That a device turned by 180° turns every image by
# 180° means that 3 and 5 are mounted the same way round; then the mirror flips their rows. The
# other variant under discussion is (1, 1, 1, 1, 1).
MIRROR_FLIPS = (1, 1, 0, 1, 0)
MIRROR_SENSORS = (0, 1, 4, 3, 2)  # where thm and ToF come from: 3 ↔ 5
TURN_SENSORS = (0, 3, 4, 1, 2)  # 2 ↔ 4, 3 ↔ 5


def positive_w(rot: F32) -> F32:
    """q or -q, whichever has w ≥ 0, as in the files. (R, 4) → (R, 4)"""
    return np.where(rot[:, :1] < 0, -rot, rot)


def with_rows(rec: Recordings, rows: Bool, **parts: npt.NDArray[Any]) -> Recordings:
    """Copies of the arrays named, with new content in the rows marked (R)."""
    arrays = {name: getattr(rec, name).copy() for name in parts}
    for name, part in parts.items():
        arrays[name][rows] = part
    return dataclasses.replace(rec, **arrays)


def mirrored(rec: Recordings, which: Bool) -> Recordings:
    """The recordings marked (N), seen in a mirror that reverses the device's x axis.

    R → M R M with M = diag(-1, 1, 1), which turns (w, x, y, z) into (w, x, -y, -z).
    """
    rows = np.repeat(which, np.diff(rec.start))
    acc = rec.acc[rows] * np.array([-1, 1, 1], np.float32)
    rot = positive_w(rec.rot[rows] * np.array([1, 1, -1, -1], np.float32))
    tof = rec.tof[rows][:, MIRROR_SENSORS]
    for i, axis in enumerate(MIRROR_FLIPS):
        tof[:, i] = np.flip(tof[:, i], axis=axis + 1).copy()
    thm = rec.thm[rows][:, MIRROR_SENSORS]
    return with_rows(rec, rows, acc=acc, rot=rot, thm=thm, tof=tof)


def turned_back(rec: Recordings, which: Bool) -> Recordings:
    """The recordings marked (N), as if the device had been worn the other way round.

    R → R · Rz(180°), which turns (w, x, y, z) into (-z, y, -x, w).
    """
    rows = np.repeat(which, np.diff(rec.start))
    acc = rec.acc[rows] * np.array([-1, -1, 1], np.float32)
    rot = positive_w(rec.rot[rows][:, [3, 2, 1, 0]] * np.array([-1, 1, -1, 1], np.float32))
    tof = rec.tof[rows][:, TURN_SENSORS, ::-1, ::-1]
    return with_rows(rec, rows, acc=acc, rot=rot, thm=rec.thm[rows][:, TURN_SENSORS], tof=tof)


def canonical(rec: Recordings, turned: Bool) -> Recordings:
    """As if every wearer were right-handed and wore the device the right way round.

    `turned` (N) marks devices worn rotated by 180° about z. Ids, demographics and labels stay as
    they are, so this is applied once. Arrays are shared where nothing changes.
    """
    left = rec.person[:, PERSON.index("handedness")] == 0
    if left.any():
        rec = mirrored(rec, left)
    return turned_back(rec, turned) if np.any(turned) else rec


# %% [markdown]
# ### Wearer
#
# Some people wear the device turned by 180° about its z axis. A small antisymmetric model tells:
# its evidence for a recording is exactly minus that for the turned twin, so it needs no example
# of one; nearly all training wearers are right way up. Evidence adds up over a wearer's recordings.

# %%


def window_mean(x: npt.NDArray[Any], first: I64, last: I64) -> F64:
    """Mean of the rows first[i] … last[i] - 1. (R, C) → (N, C)"""
    total = np.zeros((len(x) + 1, x.shape[1]))
    np.cumsum(x, axis=0, out=total[1:])
    return np.asarray((total[last] - total[first]) / (last - first)[:, None])


N_ODD = 30  # figures below


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
    windows = (
        (begin, np.minimum(begin + 10, end)),
        (np.maximum(end - GESTURE_ROWS, begin), end),
        (begin, end),
    )
    parts = []
    for first, last in windows:
        x, y, z, *side = window_mean(rows, first, last).T
        parts += [x, y, x * z, y * z, x * y * y, y * x * x, *side]
    return np.stack(parts, axis=1)


def fit_wearer(odd: F64) -> dict[str, Any]:
    """A logistic model without intercept that tells `odd` (n, P) from its negative."""
    from sklearn.linear_model import LogisticRegression

    scale = np.sqrt((odd**2).mean(axis=0)) + 1e-6
    twins = np.concatenate([odd, -odd]) / scale
    upright = np.repeat([1, 0], len(odd))
    model = LogisticRegression(C=0.1, fit_intercept=False, max_iter=1000).fit(twins, upright)
    return {"coefficients": [float(f"{c:.8g}") for c in model.coef_[0] / scale]}


def wearer_logit(rec: Recordings, wearer: Mapping[str, Any]) -> F64:
    """Log odds that each recording's device is worn the right way up, before any prior. → (N)"""
    return odd_features(rec) @ np.array(wearer["coefficients"])


def find_turned(rec: Recordings, fold: I64, cfg: Config) -> tuple[Bool, dict[str, Any] | None]:
    """Which training recordings to turn back (N), and the model that tells for new wearers.

    Each wearer is judged by a model of the other folds. Two rounds: the second learns from data
    in which the first one's finds are turned back.
    """
    names, who = np.unique(rec.subject, return_inverse=True)
    turned = np.zeros(len(rec), bool)
    if not cfg.upside_down or len(names) < 8 or len(rec) < 20 * len(names):
        log("wearer", detector="off", subjects=len(names), recordings=len(rec))
        return turned, None
    odd = odd_features(canonical(rec, turned))
    for _ in range(2):
        signed = np.where(turned[:, None], -odd, odd)
        logit = np.empty(len(rec))
        for k in np.unique(fold):
            logit[fold == k] = odd[fold == k] @ fit_wearer(signed[fold != k])["coefficients"]
        share = (1 + len(set(who[turned]))) / (2 + len(names))
        prior = float(np.log((1 - share) / share))
        turned = (prior + np.bincount(who.reshape(-1), logit) < 0)[who.reshape(-1)]
    right = float(((logit > 0) != turned).mean())
    log(
        "wearer",
        recordings_told_right=right,
        turned=",".join(np.unique(rec.subject[turned])) or "none",
    )
    return turned, fit_wearer(np.where(turned[:, None], -odd, odd)) | {"prior": prior}


# %% [markdown]
# ## 6 Features and frames
#
# One row of numbers per recording, for trees. A family is one function and one line of FEATURES;
# it receives a Chunk, which makes each shared intermediate once, and returns its columns (F, N).
# Recordings are cut into chunks of similar length that fit the processor's cache and run side by
# side; no result depends on the cutting. Statistics are population statistics over the rows that
# are there, in float64; a statistic of nothing, or a shape of something constant, is NaN.
#
# A column needs the sensors that its name mentions: thm, tof, or both. That is how a table loses a
# modality afterwards, to the last bit as if the sensor had never been there.

# %%
CHUNK_ROWS = 24_000  # measured: 6,000 take a fifth longer, two threads then wait for one lock
IMAGE_ROWS = 1_000  # ToF rows at a time
THM_BIT, TOF_BIT = 1, 2

MOVES = {  # signals of the motion sensors: name → unit
    **dict.fromkeys(("acc_x", "acc_y", "acc_z", "acc_mag"), "m/s²"),
    **dict.fromkeys(("lin_x", "lin_y", "lin_z", "lin_mag"), "m/s²"),
    **dict.fromkeys(("world_ahead", "world_aside", "world_up", "world_flat"), "m/s²"),
    **dict.fromkeys(("omega_x", "omega_y", "omega_z", "omega_mag"), "rad/s"),
    **dict.fromkeys(("up_x", "up_y", "up_z"), "1"),
    **{"jerk_mag": "m/s³", "swing": "rad", "lean": "rad"},
}
WARMTH = dict.fromkeys(THM, "°C")
SIGHT = {f"tof_{i}_{n}": u for i in range(1, 6) for n, u in (("near", "1"), ("dist", "raw"))}
RICH = MOVES | WARMTH | SIGHT
AT = {name: i for i, name in enumerate(RICH)}  # row of Chunk.x


def at(*names: str) -> list[int]:
    """Rows of Chunk.x."""
    return [AT[name] for name in names]


def over(ufunc: np.ufunc, x: npt.NDArray[Any], first: I64, last: I64) -> F64:
    """`ufunc` over the rows first … last - 1. (C, R + 1), (N), (N) → (C, N)

    The spare column at the end lets `last` be R. An empty window gives 0 when adding, else NaN.
    """
    pairs = np.stack([first, np.maximum(first, last)], axis=-1).ravel()
    out = ufunc.reduceat(x, pairs, axis=1)[:, ::2]
    full = last > first
    return out if full.all() else np.where(full, out, 0.0 if ufunc is np.add else np.nan)


def sums(x: npt.NDArray[Any], *edges: I64) -> F64:
    """Sums over the parts of each recording, all in one pass. (C, R + 1), k + 1 × (N) → (k, C, N)

    Part j is the rows edges[j] … edges[j + 1] - 1; together the parts fill their recording.
    """
    begin, end = np.stack(edges[:-1], axis=-1), np.stack(edges[1:], axis=-1)  # (N, k)
    out = np.add.reduceat(x, np.append(begin, end[-1, -1]), axis=1)[:, :-1]
    out = out.reshape(len(x), *begin.shape)
    full = end > begin
    return np.moveaxis(out if full.all() else np.where(full, out, 0.0), 2, 0)


def ratio(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> F64:
    """a / b, NaN where b is not above zero."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return np.where(b > 0, a / b, np.nan)


def steady(variance: F64, mean: F64) -> F64:
    """Variance with rounding noise about a constant set to exactly zero."""
    with np.errstate(invalid="ignore"):
        return np.where(variance <= 1e-14 * mean * mean, 0.0, variance)


def with_spare(x: npt.NDArray[Any]) -> F64:
    """Append the spare column. (C, R) → (C, R + 1), NaN at the end"""
    return np.concatenate([x, np.full((len(x), 1), np.nan)], axis=1, dtype=np.float64)


@dataclass(frozen=True)
class Chunk:
    """Some recordings and what their features share, each made when first needed."""

    rec: Recordings

    @functools.cached_property
    def first(self) -> I64:
        return self.rec.start[:-1]

    @functools.cached_property
    def last(self) -> I64:
        return self.rec.start[1:]

    @functools.cached_property
    def rows(self) -> I64:
        return np.diff(self.rec.start)

    @functools.cached_property
    def cut(self) -> I64:
        """First row of the gesture."""
        return np.maximum(self.first, self.last - GESTURE_ROWS)

    @functools.cached_property
    def motion(self) -> Motion:
        return Motion.of(self.rec)

    @functools.cached_property
    def halves(self) -> tuple[I64, I64, I64]:
        """Edges of the rows before the gesture and in it."""
        return self.first, self.cut, self.last

    @functools.cached_property
    def pixels(self) -> F64:
        """ToF signals in the order of PIXELS. (5, S, R + 1) NaN: missing, or no row before"""
        return tof_signals(self.rec.tof, self.rec.start)

    @functools.cached_property
    def x(self) -> F64:
        """Signals in the order of RICH. (C, R + 1) NaN: missing, no step before the first row"""
        m, first = self.motion, self.first
        world = world_ahead(m.linear, m.rot, self.rec.start, self.cut)
        begin = m.up.T[:, np.repeat(first, self.rows)].T
        lean = np.arctan2(length(cross(begin, m.up)), dot(begin, m.up))
        rate, jolt = length(m.omega), length(m.jerk)
        moves = [*m.acc.T, length(m.acc), *m.linear.T, length(m.linear)]
        moves += [world[:, 0], world[:, 1], m.vertical, m.horizontal, *m.omega.T, rate]
        moves += [*m.up.T, jolt, m.swing, lean]
        x = np.full((len(RICH), len(rate) + 1), np.nan)
        for row, signal in zip(x, (*moves, *self.rec.thm.T), strict=False):
            row[:-1] = signal
        x[-10:] = self.pixels[:, :2].reshape(10, -1)  # near and dist
        steps = at("omega_x", "omega_y", "omega_z", "omega_mag", "jerk_mag")
        x[np.array(steps)[:, None], first] = np.nan
        return x

    @functools.cached_property
    def there(self) -> Bool:
        return ~np.isnan(self.x)

    @functools.cached_property
    def z(self) -> F64:
        """x with 0 for missing. (C, R + 1)"""
        return np.where(self.there, self.x, 0.0)

    @functools.cached_property
    def patchy(self) -> I64:
        """Signals with a gap anywhere: all others need no counting."""
        return np.flatnonzero(~self.there[:, :-1].all(axis=1))

    @functools.cached_property
    def one(self) -> F32:
        """1 where a patchy signal has a value, else 0."""
        return self.there[self.patchy].astype(np.float32)

    @functools.cached_property
    def half_count(self) -> F64:
        """Values before the gesture and in it. (2, C, N)"""
        return self.counts(*self.halves)

    @functools.cached_property
    def half_sum(self) -> F64:
        """Before the gesture and in it. (2, C, N)"""
        return sums(self.z, *self.halves)

    @functools.cached_property
    def half_mean(self) -> F64:
        """Before the gesture and in it. (2, C, N)"""
        return ratio(self.half_sum, self.half_count)

    @functools.cached_property
    def count(self) -> F64:
        """Values a recording. (C, N)"""
        return self.half_count.sum(axis=0)

    @functools.cached_property
    def mean(self) -> F64:
        return ratio(self.half_sum.sum(axis=0), self.count)

    @functools.cached_property
    def opening(self) -> F64:
        """Mean of the first three rows. (C, N)"""
        return self.mean_at(self.first[:, None] + np.arange(3))

    @functools.cached_property
    def centred(self) -> F64:
        """x less its recording's mean, 0 where missing. (C, R + 1)"""
        mean = np.repeat(self.mean, self.rows, axis=1)
        c = np.zeros_like(self.x)
        np.subtract(self.x[:, :-1], mean, out=c[:, :-1], where=self.there[:, :-1])
        return c

    @functools.cached_property
    def half_centred(self) -> F64:
        """x less the mean before the gesture, or in it, 0 where missing. (C, R + 1)"""
        spans = np.stack([self.cut - self.first, self.last - self.cut], axis=1).ravel()
        means = self.half_mean.transpose(1, 2, 0).reshape(len(self.x), -1)
        c = np.zeros_like(self.x)
        mean = np.repeat(means, spans, axis=1)
        np.subtract(self.x[:, :-1], mean, out=c[:, :-1], where=self.there[:, :-1])
        return c

    @functools.cached_property
    def variance(self) -> F64:
        c = self.centred
        return steady(ratio(over(np.add, c * c, self.first, self.last), self.count), self.mean)

    @functools.cached_property
    def half_variance(self) -> F64:
        """Before the gesture and in it. (2, C, N)"""
        total = sums(self.half_centred**2, *self.halves)
        return steady(ratio(total, self.half_count), self.half_mean)

    @functools.cached_property
    def step(self) -> F64:
        """x less its value in the row before, NaN in the first row. (C, R + 1)"""
        d = np.full_like(self.x, np.nan)
        np.subtract(self.x[:, 1:], self.x[:, :-1], out=d[:, 1:])
        d[:, self.rec.start] = np.nan
        return d

    def counts(self, *edges: I64) -> F64:
        """Values in each part of a recording. k + 1 × (N) → (k, C, N)"""
        spans = np.diff(np.stack(edges), axis=0).astype(np.float64)  # (k, N)
        counts = np.repeat(spans[:, None], len(self.x), axis=1)
        counts[:, self.patchy] = sums(self.one, *edges)
        return counts

    def inside(self, row: I64) -> I64:
        """Rows of each recording, (N, n); the spare column for those beyond its ends."""
        own = (row >= self.first[:, None]) & (row < self.last[:, None])
        return np.where(own, row, self.rec.start[-1])

    def mean_at(self, row: I64) -> F64:
        """Mean over some rows of each recording, as far as they exist. (N, n) → (C, N)"""
        row = self.inside(row)
        return ratio(self.z[:, row].sum(axis=2), self.there[:, row].sum(axis=2))

    def tail(self, rows: Sequence[int], n_rows: int, source: F64) -> F64:
        """The last `n_rows` rows, NaN in front of shorter recordings. → (len(rows), N, n_rows)"""
        row = self.inside(self.last[:, None] + np.arange(-n_rows, 0))
        return source[np.asarray(rows)[:, None, None], row]


# %% [markdown]
# A ToF image becomes numbers per row by a product with a small table of whole-numbered weights:
# sums over regions and moments of all images at once, exact because every sum is a whole number.

# %%
QUARTERS = ("nw", "ne", "sw", "se")
PIXELS = {  # signals of one ToF sensor: name → unit; x to the right, y down, origin in the middle
    **{"near": "1", "dist": "raw", "min": "raw", "sd": "raw", "cx": "pixels", "cy": "pixels"},
    **{"sx": "raw/pixel", "sy": "raw/pixel", "flow": "raw"},  # up to here the networks' too
    **{"xx": "pixels²", "yy": "pixels²", "xy": "pixels²", "asym_x": "1", "asym_y": "1"},
    **dict.fromkeys([f"{q}_near" for q in (*QUARTERS, "mid")], "1"),
    **dict.fromkeys([f"{q}_dist" for q in (*QUARTERS, "mid")], "raw"),
}
AT_PIXELS = {name: i for i, name in enumerate(PIXELS)}


def pixel_weights() -> F32:
    """1, x, y, x², y², x·y of doubled coordinates, four quarters, the middle 4×4. → (11, 64)"""
    y, x = 2.0 * np.mgrid[:8, :8] - 7
    quarters = [(y < 0) & (x < 0), (y < 0) & (x > 0), (y > 0) & (x < 0), (y > 0) & (x > 0)]
    middle = (np.abs(x) < 4) & (np.abs(y) < 4)
    weights = [np.ones_like(x), x, y, x * x, y * y, x * y, *quarters, middle]
    return np.stack(weights).reshape(11, 64).astype(np.float32)


PIXEL_WEIGHTS = pixel_weights()
DISTANCES = PIXEL_WEIGHTS[[0, 1, 2, 6, 7, 8, 9, 10]]  # those that weigh the distance too


def pixels_lost(image: U8) -> F64:
    """Missing pixels of each image. (n, 64) → (n)"""
    lost = (image == MISSING).view(np.uint64).ravel()  # eight pixels a word
    words = np.flatnonzero(lost)
    each = lost[words].view(np.uint8).reshape(-1, 8).sum(axis=1, dtype=np.float64)
    return np.asarray(np.bincount(words // 8, each, len(image)), np.float64)


def above_zero(n: F64) -> F64:
    """NaN in place of what is not above zero: a divisor that lets nothing through."""
    return np.where(n > 0, n, np.nan)


def image_sums(image: U8, scratch: F32) -> tuple[F64, F64, F64]:
    """Weighted sums over the pixels in range: of 1 with each of PIXEL_WEIGHTS, of the distance with
    those of DISTANCES, and the plain one of its square. (n, 64), (2, ≥ n, 64) → (11, n), (8, n), (n)

    Products take a few hundred images at a time: the linear algebra library then does not start
    threads of its own, which would take longer than the product.
    """
    seen = (image <= FARTHEST).view(np.uint8)
    mask, distance = scratch[:, : len(image)]
    mask[:], distance[:] = seen, image * seen
    count, total = (np.empty((len(image), len(w)), np.float32) for w in (PIXEL_WEIGHTS, DISTANCES))
    for i in range(0, len(image), 360):
        part = slice(i, i + 360)
        np.matmul(mask[part], PIXEL_WEIGHTS.T, out=count[part])
        np.matmul(distance[part], DISTANCES.T, out=total[part])
    square = np.einsum("ij,ij->i", distance, distance)
    wide = (np.ascontiguousarray(v.T, np.float64) for v in (count, total))
    return *wide, square.astype(np.float64)


def pixel_flow(image: U8) -> F64:
    """Mean change of a pixel's closeness since the previous row. (R·5, 64) → (R·5) raw, first 5: 0

    Closeness is 250 less the distance, and 0 where nothing is in range.
    """
    close = (FARTHEST + 1 - image) * (image <= FARTHEST)
    now, past = close[5:], close[:-5]
    change = np.maximum(now, past)
    change -= np.minimum(now, past)
    flow = np.zeros(len(image))
    flow[5:] = change.reshape(-1, 16, 4).sum(axis=(1, 2), dtype=np.uint32)
    return flow / 64


def describe_images(image: U8, scratch: F32) -> list[F64]:
    """The signals of PIXELS of images (n, 64) but for flow."""
    (n, x, y, xx, yy, xy, nw, ne, sw, se, mid), (d, dx, dy, *d5), square = image_sums(
        image, scratch
    )
    valid, some = above_zero(64 - pixels_lost(image)), above_zero(n)
    var_x, var_y = n * xx - x * x, n * yy - y * y  # n² times the variance, exact
    half = np.minimum(image[:, :32], image[:, 32:])  # in two steps, twice as fast
    nearest = np.ascontiguousarray(half.T).min(axis=0)
    there = 0 * valid  # makes NaN of the shares where the sensor is missing
    return [
        *(n / valid, d / some, nearest + 0 * some, np.sqrt(n * square - d * d) / some),
        *(x / (2 * some), y / (2 * some)),
        *(2 * (n * dx - d * x) / above_zero(var_x), 2 * (n * dy - d * y) / above_zero(var_y)),
        *(v / (4 * some * some) for v in (var_x, var_y, n * xy - x * y)),
        *((ne + se - nw - sw) / valid, (sw + se - nw - ne) / valid),
        *(part / 16 + there for part in (nw, ne, sw, se, mid)),
        *(a / above_zero(b) for a, b in zip(d5, (nw, ne, sw, se, mid), strict=True)),
    ]


def tof_signals(tof: U8, start: I64) -> F64:
    """What each ToF image shows, in the order of PIXELS. (R, 5, 8, 8) → (5, S, R + 1)

    All NaN where a sensor is missing, and in the spare column. Where a sensor sees nothing, shares
    and flow are 0 and what describes the things in range is NaN. A first row has no flow, nor has
    the row behind a missing one.
    """
    image = np.ascontiguousarray(tof).reshape(-1, 64)
    out = np.full((5, len(PIXELS), len(tof) + 1), np.nan)
    scratch = np.empty((2, 5 * min(IMAGE_ROWS, len(tof)), 64), np.float32)
    for first in range(0, len(tof), IMAGE_ROWS):  # as much as the processor's cache holds
        last = min(first + IMAGE_ROWS, len(tof))
        part = image[5 * first : 5 * last]
        signals = describe_images(part, scratch)
        flow = pixel_flow(image[max(5 * first - 5, 0) : 5 * last])[-len(part) :]
        signals.insert(AT_PIXELS["flow"], flow)
        for i, signal in enumerate(signals):
            out[:, i, first:last] = signal.reshape(-1, 5).T
    flow, gone = out[:, AT_PIXELS["flow"]], np.isnan(out[:, 0])
    flow[:, start[:-1]] = np.nan
    flow[:, 1:][gone[:, :-1]] = np.nan
    flow[gone] = np.nan
    return out


# %% [markdown]
# The families. Names are made from the name of a signal and of a statistic, unit beside them.


# %%
Columns = dict[str, str]  # name → unit


def named(signals: Mapping[str, str], stats: Mapping[str, str]) -> Columns:
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
    c, n, var = ch.centred, ch.count, ch.variance
    cube = c * c * c
    third = ratio(over(np.add, cube, ch.first, ch.last), n)
    fourth = ratio(over(np.add, np.multiply(cube, c, out=cube), ch.first, ch.last), n)
    return by_signal(ch.mean, np.sqrt(var), ratio(third, var**1.5), ratio(fourth, var * var) - 3)


QUANTILES = {"min": 0.0, "q10": 0.1, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q90": 0.9, "max": 1.0}


def quantiles(ch: Chunk) -> F64:
    """Smallest, 10, 25, 50, 75, 90 % quantile, largest value, and interquartile range."""
    row = ch.inside(ch.first[:, None] + np.arange(ch.rows.max()))
    ordered = np.take(ch.x[: len(MOVES)], row, axis=1)  # (C, N, T)
    ordered.sort(axis=2)  # NaN last
    q = quantiles_of(ordered, ch.count[: len(MOVES)], np.array([*QUANTILES.values()]))
    return by_signal(*q, q[4] - q[2])


def quantiles_of(ordered: F64, count: F64, q: F64) -> F64:
    """Linear interpolation between the `count` values at the front. (C, N, T) → (Q, C, N)"""
    place = np.maximum(count - 1, 0)[..., None] * q  # (C, N, Q)
    low = place.astype(np.int64)
    high = np.minimum(low + 1, np.maximum(count - 1, 0).astype(np.int64)[..., None])
    a, b = (np.take_along_axis(ordered, at, axis=2) for at in (low, high))
    return np.moveaxis(a + (b - a) * (place - low), -1, 0)


def course(ch: Chunk) -> F64:
    """Mean of the first and last 3 rows and their difference, of each third, of the rows before
    the gesture and in it, with the standard deviations and the change."""
    thirds = [ch.first + ch.rows * i // 3 for i in range(4)]
    third = ratio(sums(ch.z, *thirds), ch.counts(*thirds))
    end = ch.mean_at(ch.last[:, None] + np.arange(-3, 0))
    before, gesture = ch.half_mean
    sd_before, sd_gesture = np.sqrt(ch.half_variance)
    halves = (before, sd_before, gesture, sd_gesture, gesture - before)
    return by_signal(ch.opening, end, end - ch.opening, *third, *halves)


def steps(ch: Chunk) -> F64:
    """Mean size and standard deviation of the step from row to row; mean size in the gesture."""
    d = ch.step
    there = ~np.isnan(d)
    known = np.where(there, d, 0.0)
    half_n, half_size = (sums(v, *ch.halves) for v in (there.astype(np.float32), np.abs(known)))
    n = half_n.sum(axis=0)
    mean, square = (ratio(sums(v, ch.first, ch.last)[0], n) for v in (known, known * known))
    sd = np.sqrt(steady(np.maximum(square - mean * mean, 0), mean))
    return by_signal(ratio(half_size.sum(axis=0), n), sd, ratio(half_size[1], half_n[1]))


def gesture_range(ch: Chunk) -> F64:
    """Smallest value, median and largest value in the gesture."""
    ordered = ch.tail(range(len(ch.x)), GESTURE_ROWS, ch.x)
    ordered.sort(axis=2)
    return by_signal(*quantiles_of(ordered, ch.half_count[1], np.array([0.0, 0.5, 1.0])))


TURNS = dict.fromkeys(("rot_w", "rot_x", "rot_y", "rot_z"), "1")


def rotation(ch: Chunk) -> F64:
    """Mean and standard deviation of the quaternion over the recording, mean in the gesture."""
    q = with_spare(continuous_rotation(ch.motion.rot, ch.rec.start).T)
    mean = over(np.add, q, ch.first, ch.last) / ch.rows
    square = (q[:, :-1] - np.repeat(mean, ch.rows, axis=1)) ** 2
    sd = np.sqrt(steady(over(np.add, with_spare(square), ch.first, ch.last) / ch.rows, mean))
    return by_signal(mean, sd, over(np.add, q, ch.cut, ch.last) / (ch.last - ch.cut))


ANGLES = dict.fromkeys(("roll", "pitch", "heading"), "rad")
CIRCULAR = {"cos": "1", "sin": "1", "length": "1"}
CIRCULAR |= {f"gesture_{name}": "1" for name in CIRCULAR} | {"change": "rad"}


def circles(ch: Chunk) -> F64:
    """Mean cosine and sine of the Euler angles (z-y-x) and the length of that mean vector, over the
    recording and in the gesture; change of the circular mean into the gesture."""
    up, level = ch.motion.up, ch.motion.level
    plumb = np.hypot(up[:, 1], up[:, 2])
    plane = np.hypot(level[:, 0], level[:, 3])
    flat = [np.where(s > 0, s, 1.0) for s in (plumb, plane)]
    cosine = np.stack([up[:, 2] / flat[0], plumb, level[:, 0] / flat[1]])
    sine = np.stack([up[:, 1] / flat[0], -up[:, 0], level[:, 3] / flat[1]])
    parts = (ch.first, ch.last), (ch.cut, ch.last), (ch.first, ch.cut)
    both = with_spare(np.concatenate([cosine, sine]))
    whole, gesture, before = (ratio(over(np.add, both, a, b), b - a) for a, b in parts)
    turn = np.arctan2(gesture[3:], gesture[:3]) - np.arctan2(before[3:], before[:3])
    turn = turn - 2 * np.pi * np.round(turn / (2 * np.pi))
    stats = [s for m in (whole, gesture) for s in (m[:3], m[3:], np.hypot(m[:3], m[3:]))]
    return by_signal(*stats, turn)


WAVES = {
    "lin_x": "(m/s²)²",
    "lin_y": "(m/s²)²",
    "lin_z": "(m/s²)²",
    "lin": "(m/s²)²",
    "omega": "(rad/s)²",
}
SPECTRUM = {"band1": "1", "band2": "1", "band3": "1", "band4": "1", "centroid": "cycles/row"}
SPECTRUM |= {"rolloff": "cycles/row", "peak": "cycles/row", "entropy": "1", "power": "log10 ="}
SIX = ("lin_x", "lin_y", "lin_z", "omega_x", "omega_y", "omega_z")


def welch(x: F64, start: I64, n_fft: int) -> F64:
    """Welch's power spectra. (C, R + 1) → (C, N, n_fft // 2 + 1)

    Hann windows of at most `n_fft` rows, overlapping by half, each freed of its mean; a short
    recording is one window, filled up with zeros.
    """
    n = np.diff(start)
    window = np.minimum(n, n_fft)
    hop = window - window // 2
    n_windows = (n - window // 2) // hop
    of = np.repeat(np.arange(len(n)), n_windows)  # (W) recording of each window
    first = np.cumsum(np.r_[0, n_windows])
    k = np.arange(len(of)) - first[of]
    inside = np.arange(n_fft) < window[of][:, None]  # (W, n_fft)
    rows = np.where(inside, (start[of] + k * hop[of])[:, None] + np.arange(n_fft), x.shape[1] - 1)
    part = x[:, rows] * inside  # (C, W, n_fft)
    mean = part.sum(axis=2, keepdims=True) / window[of][:, None]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / window[of][:, None])
    hann = np.where(inside, np.where(window[of][:, None] > 1, hann, 1.0), 0.0)
    power = np.abs(np.fft.rfft((part - mean) * hann, axis=2)) ** 2
    power /= (hann**2).sum(axis=1)[:, None]
    power[..., 1:-1] *= 2  # both signs of the frequency
    return np.add.reduceat(power, first[:-1], axis=1) / n_windows[:, None]


def spectra(ch: Chunk) -> F64:
    """Welch spectrum over the recording (64 rows a window): share of power in four bands of 1/8
    cycle per row, centroid, 85 % roll-off, strongest frequency, entropy, and log power."""
    return spectrum_shape(ch, ch.centred[at(*SIX)], ch.rec.start, 64)


def gesture_spectra(ch: Chunk) -> F64:
    """Spectrum of the last 32 rows: shares of four bands, centroid, 85 % roll-off, strongest
    frequency, entropy, and log power."""
    n = np.minimum(ch.rows, 32)
    start = np.r_[0, np.cumsum(n)]
    rows = np.repeat(ch.last - start[1:], n) + np.arange(start[-1])
    x = ch.centred[at(*SIX)]
    return spectrum_shape(ch, np.concatenate([x[:, rows], x[:, -1:]], axis=1), start, 32)


def spectrum_shape(ch: Chunk, x: F64, start: I64, n_fft: int) -> F64:
    """Statistics of SPECTRUM for the signals of WAVES. (6, R + 1) → (F, N)

    The sum over three axes is the spectrum of the vector: it does not depend on how the device
    sits. The zero frequency is left out.
    """
    p = welch(x, start, n_fft)[..., 1:]  # (6, N, K)
    p = np.concatenate([p[:3], p[:3].sum(axis=0)[None], p[3:].sum(axis=0)[None]])
    total = p.sum(axis=2)
    known = ch.count[at("lin_x", "lin_y", "lin_z", "lin_x", "omega_x")] > 0
    total = np.where(known & (total > 1e-12), total, np.nan)
    share = p / total[..., None]
    f = np.arange(1, p.shape[2] + 1) / n_fft
    bands = share.reshape(*total.shape, 4, -1).sum(axis=3)
    rolloff = f[(share.cumsum(axis=2) >= 0.85).argmax(axis=2)] + 0 * total
    strongest = f[(p >= (1 - 1e-9) * p.max(axis=2, keepdims=True)).argmax(axis=2)] + 0 * total
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=2) / np.log(p.shape[2])
    shape = ((share * f).sum(axis=2), rolloff, strongest, entropy, np.log10(total))
    return by_signal(*np.moveaxis(bands, 2, 0), *shape)


PAIRS = tuple(
    (f"{s}_{a}", f"{s}_{b}") for s in ("acc", "lin", "omega") for a, b in ("xy", "xz", "yz")
)
PAIRS += tuple((f"lin_{a}", f"omega_{a}") for a in ("x", "y", "z", "mag"))
CROSS = tuple((f"thm_{i}", f"tof_{i}_near") for i in range(1, 6))
CROSS += tuple(
    (f"tof_{i}_{s}", m) for i in range(1, 6) for s, m in (("dist", "lin_mag"), ("near", "up_z"))
)
CROSS += tuple((f"thm_{i}", "lin_mag") for i in range(1, 6))


def correlation(x: F64, y: F64, first: I64, last: I64) -> F64:
    """Pearson's, over the rows where both are there. (C, R + 1) twice → (C, N)

    `first` … `last` are the rows of whole windows that follow each other without a gap.
    """
    both = ~(np.isnan(x) | np.isnan(y))
    n = over(np.add, both.astype(np.float32), first, last)
    centred, squares = [], []
    spans = np.r_[last - first, 1]
    for v in (x, y):
        mean = ratio(over(np.add, np.where(both, v, 0.0), first, last), n)
        level = np.repeat(np.concatenate([mean, mean[:, :1]], axis=1), spans, axis=1)
        c = np.where(both, v - level, 0.0)
        centred.append(c)
        squares.append(steady(ratio(over(np.add, c * c, first, last), n), mean))
    mixed = ratio(over(np.add, centred[0] * centred[1], first, last), n)
    return ratio(mixed, np.sqrt(squares[0] * squares[1]))


def correlations(ch: Chunk) -> F64:
    """Correlation of two axes over the recording, and in the gesture."""
    a, b = (ch.x[at(*names)] for names in zip(*PAIRS, strict=True))
    whole = correlation(a, b, ch.first, ch.last)
    n = ch.last - ch.cut
    start = np.r_[0, np.cumsum(n)]
    rows = np.repeat(ch.cut - start[:-1], n) + np.arange(start[-1])
    rows = np.r_[rows, a.shape[1] - 1]
    return np.concatenate([whole, correlation(a[:, rows], b[:, rows], start[:-1], start[1:])])


def cross_correlations(ch: Chunk) -> F64:
    """Correlation between a thermopile, a ToF sensor and the motion, over the recording."""
    a, b = (ch.x[at(*names)] for names in zip(*CROSS, strict=True))
    return correlation(a, b, ch.first, ch.last)


BEATS = {"lin_mag": "m/s²", "omega_mag": "rad/s", "world_up": "m/s²", "jerk_mag": "m/s³"}
PEAKS = {
    "peaks": "1/row",
    "gesture_peaks": "1/row",
    "peak_height": "=",
    "peak_gap": "rows",
    "peak_gap_sd": "rows",
}


def peaks(ch: Chunk) -> F64:
    """Rows above the mean that exceed both neighbours: how many a row, in the gesture too; their
    mean height above the mean; mean and standard deviation of the gaps between them."""
    x = ch.x[at(*BEATS)]
    high = np.zeros(x.shape, bool)
    high[:, 1:-1] = (x[:, 1:-1] > x[:, :-2]) & (x[:, 1:-1] > x[:, 2:])
    high[:, np.r_[ch.first, ch.last - 1]] = False
    high &= ch.centred[at(*BEATS)] > 0
    mark = high.astype(np.float64)
    known = np.where(ch.count[at(*BEATS)] > 0, 1.0, np.nan)
    n, n_gesture = (over(np.add, mark, a, ch.last) for a in (ch.first, ch.cut))
    height = ratio(over(np.add, mark * ch.centred[at(*BEATS)], ch.first, ch.last), n)
    mean, sd = gaps(high, ch.rec.start)
    share = n / ch.rows * known, n_gesture / (ch.last - ch.cut) * known
    return by_signal(*share, height, mean, sd)


def gaps(high: Bool, start: I64) -> tuple[F64, F64]:
    """Mean and sd of the distances between marked rows. (C, R + 1) → 2 × (C, N) rows"""
    signal, row = np.nonzero(high)
    box = signal * (len(start) - 1) + np.searchsorted(start, row, side="right") - 1
    same = box[1:] == box[:-1]
    gap, of = np.diff(row)[same], box[1:][same]
    size = len(high) * (len(start) - 1)
    n, total, square = (np.bincount(of, w, size) for w in (None, gap, gap * gap))
    mean = ratio(total, n)
    sd = np.sqrt(np.maximum(ratio(n * square - total * total, 1.0 * n * n), 0))
    return mean.reshape(len(high), -1), sd.reshape(len(high), -1)


ECHOES = {"lin": SIX[:3], "omega": SIX[3:], "world_up": ("world_up",), "lin_mag": ("lin_mag",)}
LAGS = range(1, 13)  # rows
ECHO = {f"echo{lag}": "1" for lag in LAGS if lag <= 8} | {
    "echo_period": "rows",
    "echo_strength": "1",
}


def echoes(ch: Chunk) -> F64:
    """Autocorrelation in the gesture at 1 … 8 rows, summed over the axes of a vector; the lag of
    2 … 12 rows at which it is largest, and how large it is there."""
    names = [name for group in ECHOES.values() for name in group]
    x = ch.tail(at(*names), GESTURE_ROWS, ch.half_centred)  # (8, N, 31)
    x = np.where(np.isnan(x), 0.0, x)
    products = [(x[..., lag:] * x[..., : x.shape[2] - lag]).sum(axis=2) for lag in (0, *LAGS)]
    bounds = np.cumsum([0, *(len(group) for group in ECHOES.values())])[:-1]
    r = np.add.reduceat(np.stack(products), bounds, axis=1)  # (13, 4, N)
    sd = np.add.reduceat(ch.half_variance[1][at(*names)], bounds, axis=0)
    r = np.where(sd > 0, r[1:] / np.where(r[0] > 0, r[0], np.nan), np.nan)
    best = np.where(np.isnan(r[1:]), -2, r[1:]).argmax(axis=0)  # (4, N)
    period = np.where(np.isnan(r[0]), np.nan, best + 2.0)
    strength = np.take_along_axis(r[1:], best[None], axis=0)[0]
    return by_signal(*r[:8], period, strength)


EDGES = dict.fromkeys(ACC, (-4, -1, -0.25, 0.25, 1, 4)) | {
    "omega_mag": (-2, -0.5, -0.1, 0.1, 0.5, 2)
}
BINS = {f"step_bin{i}": "1" for i in range(1, 8)}


def histograms(ch: Chunk) -> F64:
    """Share of the steps from row to row in seven bins with fixed edges."""
    d = ch.step[at(*EDGES)][:, None]
    n = over(np.add, (~np.isnan(d[:, 0])).astype(np.float32), ch.first, ch.last)
    edges = np.array([*EDGES.values()], np.float64)[..., None]  # (4, 6, 1)
    below = (d < edges).astype(np.float32).reshape(-1, d.shape[2])
    total = over(np.add, below, ch.first, ch.last).reshape(len(n), -1, len(ch.rows))
    share = ratio(total, n[:, None])
    nought, whole = np.zeros_like(share[:, :1]), np.ones_like(share[:, :1])
    return np.diff(np.concatenate([nought, share, whole], axis=1), axis=1).reshape(-1, len(ch.rows))


ENERGIES = {"lin": "m²/s⁴", "omega": "rad²/s²", "jerk": "m²/s⁶"}
ENERGY = {"energy_before": "log10 =", "energy_gesture": "log10 =", "energy_rise": "1"}


def energy(ch: Chunk) -> F64:
    """Log of the mean square before the gesture and in it, and the difference; however the device
    sits."""
    size = ch.z[at("lin_mag", "omega_mag", "jerk_mag")] ** 2
    n = ch.half_count[:, at("lin_mag", "omega_mag", "jerk_mag")]
    spans = (ch.first, ch.cut), (ch.cut, ch.last)
    mean = [ratio(over(np.add, size, *span), count) for span, count in zip(spans, n, strict=True)]
    before, gesture = (np.log10(m + 1e-6) for m in mean)
    return by_signal(before, gesture, gesture - before)


SHAPE = {"major": "1", "middle": "1", "minor": "1"}


def shape(ch: Chunk) -> F64:
    """Shares of the three principal axes in the variance in the gesture: a line, a plane or a ball;
    however the device sits."""
    x = ch.half_centred[at(*SIX)].reshape(2, 3, -1)
    i, j = np.triu_indices(3)
    products = (x[:, i] * x[:, j]).reshape(12, -1)
    total = over(np.add, products, ch.cut, ch.last).reshape(2, 6, -1)
    matrix = np.empty((2, len(ch.rows), 3, 3))
    matrix[..., i, j] = matrix[..., j, i] = total.transpose(0, 2, 1)
    size = np.linalg.eigvalsh(matrix).transpose(2, 0, 1)[::-1]  # (3, 2, N), largest first
    size = np.maximum(size, 0)
    steady_still = ch.half_variance[1][at(*SIX)].reshape(2, 3, -1).sum(axis=1) > 0
    return by_signal(*np.where(steady_still, ratio(size, size.sum(axis=0)), np.nan))


SPANS = (4, 8, 16, 32)  # rows
SCALES = {f"rms{w}_{s}": "=" for w in SPANS for s in ("max", "min", "last")}
STRENGTHS = {"lin": "m/s²", "omega": "rad/s"}


def scales(ch: Chunk) -> F64:
    """Root mean square over windows of 4, 8, 16 and 32 rows: largest, smallest, and the last one.

    A window of 2w rows is the sum of two of w rows: no running sum, so nothing drifts.
    """
    total = ch.z[at("lin_mag", "omega_mag")] ** 2
    known = ch.count[at("lin_mag", "omega_mag")] > 0
    stats = []
    for w in (1, 2, 4, 8, 16):
        shifted = np.zeros_like(total)
        shifted[:, w:] = total[:, :-w]
        total = total + shifted  # windows of 2w rows that end here
        if 2 * w in SPANS:
            first = np.minimum(ch.first + 2 * w - 1, ch.last)
            final = np.where(first < ch.last, total[:, ch.last - 1], np.nan)
            ends = [over(f, total, first, ch.last) for f in (np.maximum, np.minimum)]
            stats += [np.where(known, np.sqrt(v / (2 * w)), np.nan) for v in (*ends, final)]
    return by_signal(*stats)


POSES = {"up_x": "1", "up_y": "1", "up_z": "1"}
POSE = {"last8": "=", "last16": "="}


def pose(ch: Chunk) -> F64:
    """Mean direction of the vertical over the last 8 and 16 rows."""
    rows, means = at(*POSES), []
    z, one = ch.z[rows], ch.there[rows].astype(np.float32)
    for w in (8, 16):
        window = np.maximum(ch.last - w, ch.first), ch.last
        means.append(ratio(over(np.add, z, *window), over(np.add, one, *window)))
    return by_signal(*means)


HEAT = {"rise": "°C", "slope": "°C/row", "hottest": "1"}


def heat(ch: Chunk) -> F64:
    """Gesture less the first 3 rows; slope of a straight line in the gesture; share of the rows of
    the gesture in which this is the warmest sensor."""
    rows = at(*THM)
    there = ch.there[rows]
    time = np.r_[np.arange(ch.x.shape[1] - 1) - np.repeat(ch.first, ch.rows), 0] * there
    n = ch.half_count[1][rows]
    middle = ratio(over(np.add, time, ch.cut, ch.last), n)
    middle = np.repeat(np.concatenate([middle, middle[:, :1]], axis=1), np.r_[ch.rows, 1], axis=1)
    time = np.where(there, time - middle, 0.0)
    lever = over(np.add, time * time, ch.cut, ch.last)
    slope = ratio(over(np.add, time * ch.half_centred[rows], ch.cut, ch.last), lever)
    return by_signal(ch.half_mean[1][rows] - ch.opening[rows], slope, winner(ch, ch.x[rows]))


def winner(ch: Chunk, x: F64) -> F64:
    """Share of the gesture's rows in which each signal is the largest. → (C, N)"""
    there = ~np.isnan(x)
    some = np.any(there, axis=0, keepdims=True)
    largest = np.where(there, x, -np.inf).argmax(axis=0)
    mark = (largest == np.arange(len(x))[:, None]) & some
    wins, rows = (over(np.add, m.astype(np.float32), ch.cut, ch.last) for m in (mark, some))
    return ratio(wins, rows)


DETAILS = {f"tof_{i}_{n}": u for i in range(1, 6) for n, u in [*PIXELS.items()][2:]}
DETAIL = {"gesture_mean": "=", "change": "="}


def sights(ch: Chunk) -> F64:
    """What else a ToF sensor sees: mean in the gesture, and its difference to the rows before."""
    columns = []
    for x in ch.pixels[:, 2:]:  # sensor by sensor, as much as the processor's cache holds
        there = ~np.isnan(x)
        z, one = np.where(there, x, 0.0), there.astype(np.float32)
        before, gesture = ratio(sums(z, *ch.halves), sums(one, *ch.halves))
        columns.append(by_signal(gesture, gesture - before))
    return np.concatenate(columns)


NEAREST = {f"tof_{i}_nearest": "1" for i in range(1, 6)}


def nearest(ch: Chunk) -> F64:
    """Share of the rows of the gesture in which this ToF sensor sees the smallest mean distance, of
    those in which any sees something."""
    return winner(ch, -ch.x[at(*(f"tof_{i}_dist" for i in range(1, 6)))])


BODY = {"adult_child": "0/1", "age": "years", "sex": "0/1", "height_cm": "cm"}
BODY |= {
    "shoulder_to_wrist_cm": "cm",
    "elbow_to_wrist_cm": "cm",
    "arm_to_height": "1",
    "forearm_to_arm": "1",
}


def body(ch: Chunk) -> F64:
    """The wearer. Handedness is no column: left-handers were mirrored before."""
    who = dict(zip(PERSON, ch.rec.person.T.astype(np.float64), strict=True))
    arm, forearm = who["shoulder_to_wrist_cm"], who["elbow_to_wrist_cm"]
    plain = [who[name] for name in BODY if name in who]
    return np.stack([*plain, ratio(arm, who["height_cm"]), ratio(forearm, arm)])


PRESENCE = {"n_rows": "rows", "rot_present": "1"}
PRESENCE |= {f"{s}_{i}_present": "1" for s in ("thm", "tof") for i in range(1, 6)}


def presence(ch: Chunk) -> F64:
    """Number of rows; share of the rows in which a sensor was read."""
    read = [np.isfinite(ch.rec.rot).all(axis=1), *~np.isnan(ch.rec.thm.T)]
    seen = ~np.isnan(ch.pixels[:, AT_PIXELS["near"], :-1])
    marks = with_spare(np.concatenate([read, seen]))
    return np.concatenate([ch.rows[None], over(np.add, marks, ch.first, ch.last) / ch.rows])


@dataclass(frozen=True, slots=True)
class Family:
    """Columns of the table that one function makes, in its order."""

    make: Callable[[Chunk], F64]  # → (F, N)
    columns: Columns


OWN = dict.fromkeys(("mean", "sd"), "=") | dict.fromkeys(("skew", "kurtosis"), "1")
COURSE = ("first", "last", "delta", "third1", "third2", "third3", "before_mean", "before_sd")
LINKS = {f"corr_{a}_{b}": "1" for a, b in PAIRS}

FEATURES = (
    Family(levels, named(RICH, OWN)),
    Family(quantiles, named(MOVES, dict.fromkeys((*QUANTILES, "iqr"), "="))),
    Family(
        course, named(RICH, dict.fromkeys((*COURSE, "gesture_mean", "gesture_sd", "change"), "="))
    ),
    Family(steps, named(RICH, dict.fromkeys(("step", "step_sd", "gesture_step"), "="))),
    Family(
        gesture_range,
        named(RICH, dict.fromkeys(("gesture_min", "gesture_q50", "gesture_max"), "=")),
    ),
    Family(rotation, named(TURNS, dict.fromkeys(("mean", "sd", "gesture_mean"), "="))),
    Family(circles, named(ANGLES, CIRCULAR)),
    Family(spectra, named(WAVES, SPECTRUM)),
    Family(gesture_spectra, named(WAVES, {f"gesture_{k}": v for k, v in SPECTRUM.items()})),
    Family(correlations, LINKS | {f"gesture_{name}": "1" for name in LINKS}),
    Family(peaks, named(BEATS, PEAKS)),
    Family(echoes, named(dict.fromkeys(ECHOES, "1"), ECHO)),
    Family(histograms, named(dict.fromkeys(EDGES, "1"), BINS)),
    Family(energy, named(ENERGIES, ENERGY)),
    Family(shape, named({"lin": "1", "omega": "1"}, SHAPE)),
    Family(scales, named(STRENGTHS, SCALES)),
    Family(pose, named(POSES, POSE)),
    Family(heat, named(WARMTH, HEAT)),
    Family(sights, named(DETAILS, DETAIL)),
    Family(nearest, NEAREST),
    Family(cross_correlations, {f"corr_{a}_{b}": "1" for a, b in CROSS}),
    Family(body, BODY),
    Family(presence, PRESENCE),
)


@dataclass(frozen=True, slots=True)
class Table:
    """Features of N recordings. A modality can be taken away afterwards."""

    names: tuple[str, ...]
    x: F32  # (N, F); NaN: missing
    modality: U8  # (F) THM_BIT, TOF_BIT or both: sensors that the column needs
    blank: F32  # (F) what the column says without them: NaN, or 0 for shares of presence

    def __len__(self) -> int:
        return len(self.x)

    def of_mode(self, mode: str) -> Table:
        """The same table, without the columns that need ToF or THM in IMU mode."""
        if mode == "all":
            return self
        kept = np.flatnonzero(self.modality == 0)
        names = tuple(self.names[i] for i in kept)
        return Table(names, self.x[:, kept], self.modality[kept], self.blank[kept])

    def take(self, recordings: npt.NDArray[Any]) -> Table:
        """Some of the recordings, by number or mask, as copies."""
        return dataclasses.replace(self, x=self.x[recordings])

    def without(self, drop_thm: Bool, drop_tof: Bool) -> Table:
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


def selection(rec: Recordings, order: I64) -> Recordings:
    """The recordings in `order`, without labels."""
    rows, start = row_of(rec.start, order)
    arrays = (rec.acc[rows], rec.rot[rows], rec.thm[rows], rec.tof[rows])
    return Recordings(start, *arrays, rec.sequence_id[order], rec.subject[order], rec.person[order])


def on_threads(
    work: Callable[[I64], None], n_rows: I64, order: I64, workers: int, told: Progress | None
) -> None:
    """Do `work` for chunks of the recordings in `order`; numpy lets go of Python's lock."""
    chunk = np.cumsum(n_rows[order]) // CHUNK_ROWS
    parts = np.split(order, np.flatnonzero(np.diff(chunk)) + 1)
    alone = workers < 2 or len(parts) < 2
    with contextlib.nullcontext() if alone else ThreadPoolExecutor(workers) as pool:
        done = pool.map(work, parts) if pool else map(work, parts)
        for part, _ in zip(parts, done, strict=True):
            if told:
                told.step(len(part))


# %% [markdown]
# A name is made of pieces; GLOSSARY says what each means, and `feature_help` puts them together.

# %%
GLOSSARY = {
    "acc": "acceleration as measured, gravity included",
    "lin": "acceleration without gravity",
    "world_ahead": "acceleration along the heading of the device's x axis during the gesture",
    "world_aside": "horizontal acceleration across that heading",
    "world_up": "vertical acceleration",
    "world_flat": "size of the horizontal acceleration",
    "omega": "angular velocity",
    "up": "the vertical in device axes",
    "jerk": "change of acceleration",
    "swing": "turn since the first row",
    "lean": "angle between the vertical and that of the first row, device axes",
    "rot": "quaternion without sign jumps",
    "roll": "Euler angle about x (z-y-x)",
    "pitch": "Euler angle about y (z-y-x)",
    "heading": "Euler angle about z (z-y-x)",
    "thm": "thermopile",
    "tof": "time-of-flight sensor",
    **{a: f"device's {a} axis" for a in "xyz"},
    **{"w": "w", "mag": "size of the vector"},
    **{str(i): f"no. {i}" for i in range(1, 6)},
    "near": "share of pixels in range",
    "dist": "mean distance of what is in range",
    "flow": "mean change of a pixel's closeness since the row before",
    **{f"c{a}": f"centre of what is in range, {a}" for a in "xy"},
    **{a: f"second moment {a} of what is in range" for a in ("xx", "yy", "xy")},
    **{f"s{a}": f"slope of its surface along {a}" for a in "xy"},
    **{"asym_x": "share in range, right less left", "asym_y": "the same, bottom less top"},
    **{"mid": "middle 4×4 pixels", "nw": "top left", "ne": "top right"},
    **{"sw": "bottom left", "se": "bottom right"},
    "gesture": "in the gesture, the last 31 rows (spectra: 32)",
    "before": "in the rows before the gesture",
    "change": "gesture less before",
    **{"mean": "mean", "sd": "standard deviation", "skew": "skewness"},
    **{"kurtosis": "excess kurtosis", "min": "smallest", "max": "largest", "iqr": "q75 less q25"},
    **{f"q{p}": f"{p} % quantile" for p in (10, 25, 50, 75, 90)},
    **{"first": "mean of the first 3 rows", "last": "mean of the last 3 rows"},
    "delta": "last less first",
    **{f"third{i}": f"mean of third {i} of 3" for i in (1, 2, 3)},
    **{
        "step": "mean size of the step from row to row",
        "step_sd": "standard deviation of the step",
    },
    **{f"step_bin{i}": f"share of the steps in bin {i} of 7" for i in range(1, 8)},
    **{"cos": "mean cosine", "sin": "mean sine", "length": "length of the mean unit vector"},
    **{f"band{i}": f"share of power, {i - 1}/8 … {i}/8 cycle per row" for i in range(1, 5)},
    **{"centroid": "mean frequency", "rolloff": "frequency below which 85 % of the power is"},
    **{"peak": "strongest frequency", "entropy": "entropy of the spectrum, 0 … 1"},
    "power": "log10 of the power",
    "corr": "correlation of",
    **{
        "peaks": "rows above the mean and both neighbours, a row",
        "peak_height": "mean height of peaks above the mean",
    },
    **{
        "peak_gap": "mean distance between peaks",
        "peak_gap_sd": "standard deviation of the distances between peaks",
    },
    **{f"echo{lag}": f"autocorrelation at {lag} rows, in the gesture" for lag in range(1, 9)},
    "echo_period": "lag of 2 … 12 rows at which autocorrelation is largest, in the gesture",
    "echo_strength": "autocorrelation at that lag",
    **{f"energy_{n}": f"log10 of the mean square, {n}" for n in ("before", "gesture")},
    "energy_rise": "gesture less before, log10 of the mean squares",
    **{n: f"share of the {n} principal axis in the variance" for n in ("major", "middle", "minor")},
    **{f"rms{w}": f"root mean square over {w} rows" for w in SPANS},
    **{f"last{w}": f"mean of the last {w} rows" for w in (8, 16)},
    **{"rise": "gesture less first 3 rows", "slope": "slope in the gesture"},
    "hottest": "share of the gesture's rows in which this sensor is the warmest",
    "nearest": "share of the gesture's rows in which this sensor has the smallest mean distance",
    "present": "share of the rows that were read",
    **{"n_rows": "number of rows", "adult_child": "1 adult, 0 child", "age": "age"},
    **{"sex": "0 female, 1 male", "height_cm": "height", "arm_to_height": "arm by height"},
    **{"shoulder_to_wrist_cm": "arm", "elbow_to_wrist_cm": "forearm"},
    "forearm_to_arm": "forearm by arm",
}


def meaning(name: str) -> str:
    """What a column means: the meanings of the longest pieces that make up its name."""
    if not name:
        return ""
    cuts = [m.start() for m in re.finditer("_|$", name)]
    piece = next((name[:i] for i in reversed(cuts) if name[:i] in GLOSSARY), name[: cuts[0]])
    rest = meaning(name[len(piece) + 1 :])
    own = GLOSSARY.get(piece, piece)  # a new piece speaks for itself
    return f"{own}; {rest}" if rest else own


def feature_help() -> list[tuple[str, str, str]]:
    """Name, unit and meaning of every column."""
    return [(n, unit, meaning(n)) for family in FEATURES for n, unit in family.columns.items()]


def print_feature_help(cfg: Config) -> None:
    """Every column of the table: name, unit, meaning."""
    for name, unit, text in feature_help():
        print(f"{name:<28} {unit:<14} {text}")  # noqa: T201


# %% [markdown]
# ### Frames
#
# What a network sees of each row: named groups of channels, NaN where a sensor is missing. Where a
# ToF sensor works but sees nothing, its channels are finite: share 0, distances 250 (one beyond the
# farthest), everything else 0. Every triple *_x, *_y, *_z of the groups acc, rot and motion is one
# vector of the device frame: turning the wristband turns all of them alike.

# %%
SEEN = {  # channels of a ToF sensor, the first of PIXELS: value with nothing in range
    **{"near": 0.0, "dist": 250.0, "min": 250.0, "sd": 0.0, "cx": 0.0, "cy": 0.0},
    **{"sx": 0.0, "sy": 0.0, "flow": 0.0},
}


def triple(name: str) -> tuple[str, ...]:
    """Names of the three components of a vector."""
    return tuple(f"{name}_{axis}" for axis in "xyz")


GROUPS = (
    ("acc", (*triple("acc"), "acc_mag")),
    ("rot", (*triple("up"), *triple("north"), *triple("west"))),
    (
        "motion",
        (
            *triple("lin"),
            "lin_mag",
            "world_up",
            "world_flat",
            *triple("omega"),
            "omega_mag",
            *triple("jerk"),
            "jerk_mag",
            "swing",
        ),
    ),
    ("thm", THM),
    *((f"tof_{i}", tuple(f"tof_{i}_{name}" for name in SEEN)) for i in range(1, 6)),
)


def vector_triples(names: Sequence[str]) -> I64:
    """Columns of the vectors of the device frame, *_x, *_y, *_z. → (V, 3)"""
    assert not any(name.endswith("_w") for name in names), "a quaternion is no vector"
    stems = [n[:-2] for n in names if n.endswith("_x")]
    return np.array([[names.index(name) for name in triple(stem)] for stem in stems], np.int64)


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
        rows, start = row_of(self.start, np.arange(len(self))[recordings])
        return Frames(
            start, self.x[rows], self.groups, None if self.tof is None else self.tof[rows]
        )

    def of_mode(self, mode: str) -> Frames:
        """The same frames, without ToF and THM in IMU mode."""
        if mode == "all":
            return self
        kept = tuple(g for g in self.groups if not g[0].startswith(("thm", "tof")))
        width = sum(len(names) for _, names in kept)
        assert self.groups[: len(kept)] == kept, "IMU groups come first"
        return Frames(self.start, np.ascontiguousarray(self.x[:, :width]), kept)


def channels(ch: Chunk) -> F32:
    """The channels in the order of GROUPS. → (R, C)"""
    m = ch.motion
    known = 0 * m.rot[:, :1]  # the whole group rot tells that rotation is missing
    parts = [*m.acc.T, length(m.acc), *(m.up + known).T, *m.level.T, *m.linear.T, length(m.linear)]
    parts += [m.vertical, m.horizontal, *m.omega.T, length(m.omega), *m.jerk.T, length(m.jerk)]
    sight = ch.pixels[:, : len(SEEN), :-1].copy()
    there = ~np.isnan(sight[:, 0])  # the share in range is NaN where the sensor is missing
    for i, value in enumerate(SEEN.values()):
        np.copyto(sight[:, i], value, where=np.isnan(sight[:, i]) & there)
    signals = (*parts, m.swing, *ch.rec.thm.T, *sight.reshape(5 * len(SEEN), -1))
    out = np.empty((len(ch.rec.acc), len(signals)), np.float32)
    for k, signal in enumerate(signals):
        out[:, k] = signal
    return out


def describe(
    rec: Recordings,
    workers: int = 2,
    told: Progress | None = None,
    *,
    table: bool = True,
    frames: bool = True,
) -> tuple[Table, Frames]:
    """Features of every recording and channels of every row of recordings, which must be canonical.

    Both come from the same chunks, so that what they share is worked out once. What is not wanted
    stays empty.
    """
    names, modality, blank = table_columns()
    n_channels = sum(len(group) for _, group in GROUPS)
    x = np.empty((table * len(rec), len(names)), np.float32)
    rows = np.empty((frames * len(rec.acc), n_channels), np.float32)

    def fill(order: I64) -> None:
        chunk = Chunk(rec if len(rec) == 1 else selection(rec, order))
        with np.errstate(invalid="ignore"):
            if table:
                x[order] = np.concatenate([family.make(chunk) for family in FEATURES]).T
            if frames:
                rows[row_of(rec.start, order)[0]] = channels(chunk)

    n_rows = np.diff(rec.start)
    on_threads(fill, n_rows, np.argsort(n_rows, kind="stable"), workers, told)
    return Table(names, x, modality, blank), Frames(rec.start, rows, GROUPS, rec.tof)


def feature_table(rec: Recordings, workers: int = 2) -> Table:
    """The table alone. → (N, F)"""
    return describe(rec, workers, frames=False)[0]


def make_frames(rec: Recordings, workers: int = 2) -> Frames:
    """The frames alone. → (R, C)"""
    return describe(rec, workers, table=False)[1]


def standardisation(frames: Frames, recordings: npt.NDArray[Any]) -> tuple[F32, F32]:
    """Mean and sd of each channel over the rows of some recordings (numbers, or a mask). → 2 × (C)

    Of the training recordings of a fold only. A channel that is always missing gets 0 and 1.
    """
    which = np.arange(len(frames))[recordings]
    x = frames.x[row_of(frames.start, which)[0]]
    there = ~np.isnan(x)
    n = np.maximum(there.sum(axis=0), 1)
    mean = np.where(there, x, 0).sum(axis=0, dtype=np.float64) / n
    square = np.where(there, x - mean, 0.0) ** 2
    sd = np.sqrt(square.sum(axis=0) / n)
    return mean.astype(np.float32), np.where(sd > 1e-6, sd, 1.0).astype(np.float32)


def pad_length(frames: Frames, cfg: Config) -> int:
    """Rows that a network sees: FIXED_PAD_LEN, or a percentile of the lengths."""
    if cfg.fixed_pad_len > 0:
        return cfg.fixed_pad_len
    return max(1, int(np.ceil(np.percentile(np.diff(frames.start), cfg.pad_len_percentile))))


def last_rows(start: I64, n_steps: int) -> tuple[I64, I64]:
    """First row and number of rows of what a network sees, a recording's end. (N + 1) → (N), (N)

    The last row is always among them: a gesture is at the end of its recording. Where the padding
    of shorter ones goes is the network's own choice, since it masks it.
    """
    kept = np.minimum(np.diff(start), n_steps)
    return start[1:] - kept, kept


# %% [markdown]
# ## 7 LightGBM
#
# Boosted trees on the feature table. The main booster tells the 18 gestures; two small ones tell
# orientation and initial behavior, so that this member too answers in composite labels. Models
# are LightGBM's own text. Early stopping watches the fold's own validation rows, which flatters
# the out-of-fold score a little; LGBM_ES_ROUNDS=0 trains all rounds instead.


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

    def rng(self, cfg: Config, *path: str | int) -> np.random.Generator:
        return rng_for(cfg, self.member, self.mode, self.seed, self.fold, *path)

    @property
    def name(self) -> str:
        return f"{self.member}/{self.mode}/{self.stem}"

    @property
    def note(self) -> Path:
        """Written last: without it the model's files do not count."""
        return self.folder / f"{self.stem}.json"


SIDES = {"orientation": len(ORIENTATIONS), "behavior": len(BEHAVIORS)}  # the two small boosters
SIDE_ROUNDS = 60
TINY = 1e-9  # a probability below it says no more than it


def lgbm_params(cfg: Config, n_classes: int, n_rows: int, seed: int) -> dict[str, Any]:
    """Parameters of a booster. Many features say the same, so a tree is shown only some of them."""
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
        "lambda_l2": 1.0,
        "max_bin": 63,
        "force_col_wise": True,
        "deterministic": True,
        "num_threads": cfg.threads if n_rows >= 3000 else 1,  # few rows: threads only wait
        "seed": seed,
        "verbosity": -1,
    }


def fit_lgbm(job: Job, table: Table, labels: Labels, cfg: Config) -> dict[str, Any]:
    """Train the boosters of one fold and write them as text; returns score and rounds."""
    import lightgbm as lgb

    kept = top_features(job, table, cfg)
    names = [table.names[i] for i in kept]
    share = cfg.modality_dropout_prob
    if job.mode == BLIND and share:  # no other models answer these recordings without ToF
        share = max(share, 0.5)
    drop_thm, drop_tof = dropped_modalities(len(job.train), job.rng(cfg, "dropout"), share)
    x = table.take(job.train).without(drop_thm, drop_tof).x[:, kept]
    seed = int(job.rng(cfg).integers(2**31))
    for side, n_classes in SIDES.items():
        params = lgbm_params(cfg, n_classes, len(x), seed) | {"learning_rate": 0.1}
        data = lgb.Dataset(x, getattr(labels, side)[job.train], feature_name=names)
        text = lgb.train(params, data, SIDE_ROUNDS).model_to_string()
        write_whole(job.folder / f"{job.stem}_{side}.txt", text)
    model = boost_gestures(job, x, table.x[job.valid][:, kept], names, labels, cfg, seed)
    rounds = model.best_iteration if model.best_iteration > 0 else model.current_iteration()
    write_whole(job.folder / f"{job.stem}.txt", model.model_to_string(num_iteration=rounds))
    write_importance(job.folder / f"{job.stem}_importance.csv", model, rounds)
    return {"rounds": rounds}


def boost_gestures(
    job: Job, x: F32, valid_x: F32, names: list[str], labels: Labels, cfg: Config, seed: int
) -> Any:
    """The main booster: 18 gestures, stopped when the validation rows no longer gain. → Booster"""
    import lightgbm as lgb

    target, truth = labels.gesture[job.train], labels.gesture[job.valid]
    weight = balanced_weights(target) if cfg.lgbm_class_weights else None
    data = lgb.Dataset(x, target, weight=weight, feature_name=names)
    params = lgbm_params(cfg, len(GESTURES), len(x), seed)
    if cfg.lgbm_es_metric == "score":
        params["metric"] = "None"

    def competition_score(proba: F64, _: object) -> tuple[str, float, bool]:
        return "score", score(truth, proba.argmax(axis=1)), True

    with Progress("rounds", cfg.lgbm_rounds, cfg.log_every_steps, cfg, job=job.name) as progress:
        callbacks = [boosting_log(job, progress, cfg)]
        if cfg.lgbm_es_rounds:
            stop = lgb.early_stopping(cfg.lgbm_es_rounds, first_metric_only=True, verbose=False)
            callbacks.append(stop)
        return lgb.train(
            params, data, cfg.lgbm_rounds, [lgb.Dataset(valid_x, truth, reference=data)], ["valid"],
            feval=competition_score, callbacks=callbacks,
        )  # fmt: skip


def boosting_log(job: Job, progress: Progress, cfg: Config) -> Callable[[Any], None]:
    """A callback that tells every round to `progress`, and every LOG_EVERY_STEPS to a file."""

    def callback(env: Any) -> None:
        values = {name: float(value) for _, name, value, *_ in env.evaluation_result_list}
        secs = round(time.monotonic() - progress.began, 2)
        progress.step(1, lambda: values | {"secs": secs})
        if progress.done % cfg.log_every_steps == 0 or progress.done == progress.total:
            append_jsonl(job.logs / "lgbm_progress.jsonl", cfg, mode=job.mode, fold=job.fold,
                         round=progress.done, secs=secs, **values)  # fmt: skip

    return callback


def balanced_weights(target: I64) -> F64:
    """Weight of each row, so that all classes that occur weigh the same in sum. (n) → (n)"""
    count = np.bincount(target)
    return len(target) / ((count > 0).sum() * count[target])


def dropped_modalities(n: int, rng: np.random.Generator, share: float) -> tuple[Bool, Bool]:
    """Which of n recordings lose THM and which lose ToF: of a `share` a third one, the other, both."""
    kind = np.where(rng.random(n) < share, rng.integers(1, 4, n), 0)
    return (kind & 1) > 0, (kind & 2) > 0


def top_features(job: Job, table: Table, cfg: Config) -> I64:
    """Columns to train on: all, or the K that gained most in this fold's earlier, full model."""
    if not cfg.lgbm_top_features:
        return np.arange(len(table.names))
    path = job.folder / f"{job.stem}_importance.csv"
    if not path.exists():
        raise ConfigError(
            f"LGBM_TOP_FEATURES={cfg.lgbm_top_features} needs {path} of an earlier run. "
            f"Run once with LGBM_TOP_FEATURES=0."
        )
    best = pl.read_csv(path).sort("gain", descending=True)["feature"].to_list()
    at = {name: i for i, name in enumerate(table.names)}
    return np.sort([at[name] for name in best if name in at][: cfg.lgbm_top_features])


def write_importance(path: Path, model: Any, rounds: int) -> None:
    """Gain and number of splits of each feature in one fold's booster, all features of an earlier
    run included, so that LGBM_TOP_FEATURES can be changed at will."""
    columns = {"feature": model.feature_name()} | {
        kind: model.feature_importance(kind, iteration=rounds) for kind in ("gain", "split")
    }
    new = pl.DataFrame(columns)
    if path.exists():
        rest = pl.read_csv(path).filter(~pl.col("feature").is_in(new["feature"].to_list()))
        new = pl.concat([new, rest.select(new.columns)], how="vertical_relaxed")
    write_whole(path, new.write_csv())


def summarise_lgbm(models: Mapping[str, Sequence[Path]], out: Path) -> None:
    """feature_importance.csv: gain and splits of each feature, mean and spread over the folds.

    models: by mode, paths without suffix.
    """
    parts = [
        pl.read_csv(path).with_columns(pl.lit(mode).alias("mode"))
        for mode, stems in models.items()
        for stem in stems
        if (path := stem.with_name(f"{stem.name}_importance.csv")).is_file()
    ]
    if parts:
        spread = [
            getattr(pl.col(c), how)().alias(f"{c}_{how}")
            for c in ("gain", "split")
            for how in ("mean", "std")
        ]
        whole = pl.concat(parts, how="vertical_relaxed").group_by("mode", "feature").agg(spread)
        order = whole.sort("mode", "gain_mean", "feature", descending=[False, True, False])
        write_whole(out / "feature_importance.csv", order.write_csv())


@dataclass(frozen=True, slots=True)
class Forest:
    """The trees of many boosters end to end, to be asked for one row at a time.

    QuickScorer (Lucchese et al., SIGIR 2015) over whole arrays: a split that sends the row to the
    right rules out the leaves on its left; the first leaf that no split rules out is the row's.
    """

    feature: npt.NDArray[np.int32]  # (splits) into the row, three times: NaN as -inf, as inf, as 0
    threshold: F32  # (splits)
    keeps: npt.NDArray[np.uint64]  # (splits) a bit for each leaf that going right leaves possible
    first_split: I64  # (trees)
    first_leaf: I64  # (trees)
    value: F64  # (leaves) from left to right
    slot: I64  # (trees) the output that a tree adds to

    def raw(self, row: F64) -> F64:
        """Sum of the trees of each output, before the softmax. (F) finite or NaN → (slots)"""
        missing = np.isnan(row)
        known = np.concatenate([np.where(missing, v, row) for v in (-np.inf, np.inf, 0)])
        left = known.astype(np.float32).take(self.feature) <= self.threshold
        possible = np.bitwise_and.reduceat(
            self.keeps | (-left.astype(np.int64)).view(np.uint64), self.first_split
        )
        lowest = possible & (~possible + np.uint64(1))
        leaf = np.frexp(lowest.astype(np.float64))[1] - 1
        return np.bincount(self.slot, self.value.take(self.first_leaf + leaf)).astype(np.float64)


def plant(texts: Sequence[str], n_features: int) -> Forest | None:
    """All trees of boosters given as text; None if some tree has more leaves than bits in a word.

    Output slots are the boosters' classes, one booster after the other.
    """
    fields = collections.defaultdict[str, list[str]](list)
    for line in itertools.chain.from_iterable(text.split("\n") for text in texts):
        key, _, value = line.partition("=")
        fields[key].append(value)

    def numbers_of(key: str, kind: type) -> npt.NDArray[Any]:
        return np.fromstring(" ".join(fields[key]), kind, sep=" ")

    leaves = numbers_of("num_leaves", np.int64)
    if leaves.max() > 64 or numbers_of("num_cat", np.int64).any():
        return None
    split, decision = numbers_of("split_feature", np.int64), numbers_of("decision_type", np.int64)
    exact = numbers_of("threshold", np.float64)
    rounded = exact.astype(np.float32)  # down, so that a float32 compares as with the exact one
    rounded = np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    rounded = np.minimum(rounded, np.finfo(np.float32).max)  # inf: only what is missing goes right
    nan_goes_left, nan_matters = (decision & 2) > 0, (decision >> 2 & 3) == 2
    row_part = np.where(nan_matters, np.where(nan_goes_left, 0, 1), 2)
    children = np.stack([numbers_of(f"{side}_child", np.int64) for side in ("left", "right")])
    keeps, rank = leaf_masks(leaves, children)
    leaf_value, first_leaf = np.empty(leaves.sum()), np.cumsum(leaves) - leaves
    leaf_value[np.repeat(first_leaf, leaves) + rank] = numbers_of("leaf_value", np.float64)
    counts = [text.count("\nTree=") for text in texts]
    classes = numbers_of("num_class", np.int64)
    bases = np.cumsum([0, *classes])
    slot = [b + np.arange(n) % k for b, n, k in zip(bases, counts, classes, strict=False)]
    splits = np.maximum(leaves - 1, 1)  # a tree without a split gets one that rules out nothing
    first_split = np.cumsum(splits) - splits
    real = np.flatnonzero(np.repeat(leaves > 1, splits))
    feature, threshold = np.zeros(splits.sum(), np.int32), np.zeros(splits.sum(), np.float32)
    all_keeps = np.full(splits.sum(), ~np.uint64(0))
    feature[real], threshold[real], all_keeps[real] = split + row_part * n_features, rounded, keeps
    return Forest(
        feature, threshold, all_keeps, first_split, first_leaf, leaf_value, np.concatenate(slot)
    )


def leaf_masks(leaves: I64, children: I64) -> tuple[npt.NDArray[np.uint64], I64]:
    """For each split the leaves that going right leaves possible; for each leaf its place from the left.

    leaves: (trees); children: (2, splits), left and right, -1 - leaf where it is one. A split's
    number within its tree is smaller than its children's, so trees are walked by that number.
    """
    n_splits = leaves - 1
    base, leaf_base = np.cumsum(n_splits) - n_splits, np.cumsum(leaves) - leaves
    size, place = np.ones(n_splits.sum(), np.int64), np.zeros(n_splits.sum(), np.int64)
    rank = np.zeros(leaves.sum(), np.int64)

    def below(side: int, at: I64, tree: I64) -> I64:
        child = children[side, at]
        return np.where(child < 0, 1, size[np.where(child < 0, 0, base[tree] + child)])

    for i in range(int(n_splits.max(initial=0)) - 1, -1, -1):
        tree = np.flatnonzero(n_splits > i)
        size[base[tree] + i] = below(0, base[tree] + i, tree) + below(1, base[tree] + i, tree)
    on_left = np.ones_like(size)
    for i in range(int(n_splits.max(initial=0))):
        tree = np.flatnonzero(n_splits > i)
        at = base[tree] + i
        on_left[at] = below(0, at, tree)
        for side, offset in ((0, place[at]), (1, place[at] + on_left[at])):
            child = children[side, at]
            inner = child >= 0
            place[(base[tree] + child)[inner]] = offset[inner]
            rank[(leaf_base[tree] - 1 - child)[~inner]] = offset[~inner]
    one = np.uint64(1)
    cleared = ((one << on_left.astype(np.uint64)) - one) << place.astype(np.uint64)
    return ~cleared, rank


def softmax(raw: F64) -> F64:
    """Over the last axis. (…, K) → (…, K)"""
    power = np.exp(raw - raw.max(axis=-1, keepdims=True))
    return np.asarray(power / power.sum(axis=-1, keepdims=True))


@dataclass(frozen=True, slots=True)
class LgbmModel:
    """Boosters of several folds: for each fold gesture, orientation and behavior."""

    boosters: tuple[tuple[Any, ...], ...]
    names: tuple[str, ...]  # the columns they were trained on
    forest: Forest | None  # the same trees for single rows
    table: I64  # (L, 3)

    def proba(self, x: F64) -> tuple[F64, F64, F64]:
        """Probabilities of gesture, orientation and behavior. (N, F) → 3 × (folds, N, classes)"""
        if len(x) == 1 and self.forest is not None:
            raw = self.forest.raw(x[0]).reshape(len(self.boosters), 1, -1)
            cuts = np.cumsum([len(GESTURES), *SIDES.values()])[:-1]
            gesture, orientation, behavior = (
                softmax(part) for part in np.split(raw, cuts, axis=-1)
            )
        else:
            gesture, orientation, behavior = (
                np.stack([b.predict(x, validate_features=False) for b in kind])
                for kind in zip(*self.boosters, strict=True)
            )
        return gesture, orientation, behavior


def load_lgbm(folder: Path, stems: Sequence[str], table: I64, cfg: Config) -> list[LgbmModel]:
    """Boosters of the given folds from their texts, in that order; one model for all neighbours that
    were trained on the same columns (with LGBM_TOP_FEATURES each fold has its own)."""
    import lightgbm as lgb

    classes = {"": len(GESTURES)} | {f"_{side}": n for side, n in SIDES.items()}
    texts = [
        [checked_booster_text(folder / f"{stem}{end}.txt", n) for end, n in classes.items()]
        for stem in stems
    ]
    try:
        folds = [tuple(lgb.Booster(model_str=text) for text in own) for own in texts]
    except (lgb.basic.LightGBMError, ValueError) as error:
        raise DataError(f"{folder}: LightGBM refused a model ({error!s:.200}).") from None
    columns = [tuple(fold[0].feature_name()) for fold in folds]
    if any(
        tuple(b.feature_name()) != c for c, fold in zip(columns, folds, strict=True) for b in fold
    ):
        raise DataError(f"{folder}: the boosters of one fold differ in their columns.")
    models = []
    for names, alike in itertools.groupby(range(len(stems)), columns.__getitem__):
        which = list(alike)
        forest = plant([text for k in which for text in texts[k]], len(names))
        models.append(LgbmModel(tuple(folds[k] for k in which), names, forest, table))
    return models


def checked_booster_text(path: Path, n_classes: int) -> str:
    """The text of a booster; LightGBM itself dies of a text that is none."""
    text = path.read_text(errors="replace")
    try:
        check_booster(text, n_classes)
    except (LookupError, ValueError, Warning) as error:
        raise DataError(
            f"{path} is not a LightGBM model ({error!s:.100}). Delete it, or attach the bundle again."
        ) from None
    return text


OF_A_SPLIT = ("split_feature", "threshold", "decision_type", "left_child", "right_child")
OF_A_LEAF = ("leaf_value", "leaf_weight", "leaf_count")


def require(holds: object, why: str) -> None:
    """A check of what comes from outside: unlike `assert`, it also holds under python -O."""
    if not holds:
        raise ValueError(why)


def check_booster(text: str, n_classes: int) -> None:
    """Make sure that LightGBM, which checks little, stays within its arrays when it walks the trees.

    Whole trees of the announced sizes; a child comes after its parent and is there; so is every
    feature that is asked for.
    """
    body, end, _ = text.partition("\nend of trees")
    head, *trees = body.split("\nTree=")
    about = dict(line.split("=", 1) for line in head.splitlines() if "=" in line)
    require(text.startswith("tree\n"), "it does not begin with tree")
    require(end, "its end is missing")
    of_a_round = {about["num_class"], about["num_tree_per_iteration"]}
    require(of_a_round == {str(n_classes)}, f"it has other classes than {n_classes}")
    require(trees, "no trees")
    require(len(trees) % n_classes == 0, "an unfinished round of trees")
    n_features = len(about["feature_names"].split())
    require(int(about["max_feature_idx"]) == n_features - 1, "max_feature_idx and names differ")
    lengths = [len(tree.encode()) + len("\nTree=") for tree in trees]
    sizes = whole_numbers([about["tree_sizes"]])
    require(np.array_equal(sizes, lengths), "tree_sizes and trees differ")
    fields = [tree_fields(tree, i) for i, tree in enumerate(trees)]
    leaves = whole_numbers([f["num_leaves"] for f in fields])
    require(leaves.min() >= 1, "a tree without leaves")
    for keys, wanted in ((OF_A_SPLIT, leaves - 1), (OF_A_LEAF, leaves)):
        for key in keys:
            found = np.array([len(f.get(key, "").split()) for f in fields])
            short = (found != wanted) & (leaves > 1)
            require(
                not short.any(),
                f"{key} of tree {short.argmax()} has {found[short.argmax()]} entries",
            )
    check_walks([f for f in fields if f["num_leaves"] != "1"], leaves[leaves > 1], n_features)


def check_walks(fields: Sequence[Mapping[str, str]], leaves: I64, n_features: int) -> None:
    """Make sure that splits lead to later splits or to leaves of their tree, and ask for features."""
    if not fields:
        return
    splits = leaves - 1
    own = np.arange(splits.sum()) - np.repeat(np.cumsum(splits) - splits, splits)
    for side in ("left_child", "right_child"):
        child = whole_numbers([f[side] for f in fields])
        inner = (child > own) & (child < np.repeat(splits, splits))
        leaf = (child < 0) & (-child <= np.repeat(leaves, splits))
        require((inner | leaf).all(), f"{side} leads nowhere")
    feature = whole_numbers([f["split_feature"] for f in fields])
    require(feature.min() >= 0, "a feature below 0")
    require(feature.max() < n_features, f"it asks for feature {feature.max()} of {n_features}")
    decision = whole_numbers([f["decision_type"] for f in fields])
    require(((decision & 1) == 0).all(), "a categorical split")


def tree_fields(tree: str, i: int) -> dict[str, str]:
    """Lines of a tree by key; the plain trees that this file grows, no other kind."""
    number, *lines = tree.rstrip("\n").split("\n")
    fields = dict(line.split("=", 1) for line in lines)
    require(number == str(i), f"tree {i} is missing")
    require(len(fields) == len(lines), f"tree {i} says something twice")
    require(fields["num_cat"] == fields["is_linear"] == "0", f"tree {i} is of another kind")
    return fields


def whole_numbers(texts: Sequence[str]) -> I64:
    """All numbers of some texts, end to end; anything else is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy only warns of a text that is no number
        return np.fromstring(" ".join(texts), np.int64, sep=" ")


def predict_lgbm(models: Sequence[LgbmModel], table: Table) -> F32:
    """Composite probabilities of each fold. → (folds, N, L)"""
    return np.concatenate([joint_proba(model, table) for model in models])


def joint_proba(model: LgbmModel, table: Table) -> F32:
    """Composite probabilities by the folds of one model. → (folds, N, L)

    P(label) = P(gesture) · P(orientation) P(behavior), the latter two within the gesture's labels.
    """
    behavior, orientation, gesture = model.table.T
    at = {name: i for i, name in enumerate(table.names)}
    x = np.ascontiguousarray(table.x[:, [at[name] for name in model.names]], np.float64)
    p_gesture, p_orientation, p_behavior = model.proba(x)
    side = p_orientation[..., orientation] * p_behavior[..., behavior] + TINY  # (folds, N, L)
    within = (gesture[:, None] == gesture).astype(np.float64)  # (L, L) labels of one gesture
    joint = np.where(p_gesture < TINY, 0, p_gesture)[..., gesture] * side / (side @ within)
    return (joint / np.maximum(joint.sum(axis=-1, keepdims=True), 1e-30)).astype(np.float32)


# %% [markdown]
# ## 8 Torch
#
# A stem per sensor group → residual SE blocks, each halving time → BiLSTM → GRU → attention that
# the gesture phase guides → heads. A network takes raw channels, NaN where a sensor is missing,
# and standardises them itself: to drop a modality in training is to write NaN, exactly what a
# recording without that sensor holds. Padding is zero after every layer and enters no statistic.


# %%
@dataclass(frozen=True, slots=True)
class NetSpec:
    """What a network is made of; stored as primitives beside its weights."""

    groups: tuple[tuple[str, tuple[str, ...]], ...]  # as Frames.groups
    table: tuple[tuple[int, ...], ...]  # (L, 3) behavior, orientation, gesture
    pad_len: int
    width: int  # channels of the first block; the others are multiples
    tof_images: bool

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(name for _, names in self.groups for name in names)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> NetSpec:
        """From what `dataclasses.asdict` made of it, lists or tuples alike."""
        groups = tuple((str(name), tuple(map(str, names))) for name, names in stored["groups"])
        table = tuple(tuple(map(int, row)) for row in stored["table"])
        sizes = {k: int(stored[k]) for k in ("pad_len", "width")}
        if not (1 <= sizes["pad_len"] <= 10_000 and 8 <= sizes["width"] <= 1024):
            raise ValueError(f"no network has the sizes {sizes}")
        return cls(groups, table, **sizes, tof_images=bool(stored["tof_images"]))


@functools.cache
def masked_norm_class() -> type[torch.nn.Module]:
    """Batch norm that leaves padding out of its statistics and zero in its output."""
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    class MaskedNorm(nn.Module):
        def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
            super().__init__()
            self.momentum, self.eps = momentum, eps
            self.fused = False  # into the layer before it, see `fused_trunk`
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
            n = mask.sum()
            mean = known.sum((0, 2)) / n
            var = ((known - mean[:, None]) * mask).square().sum((0, 2)) / n
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * n / (n - 1).clamp(min=1), self.momentum)
            scale = self.weight * (var + self.eps).rsqrt()
            shift = self.bias - mean * scale
            return (torch.addcmul(shift[:, None], known, scale[:, None]) * mask).to(x.dtype)

    return MaskedNorm


@functools.cache
def linear_class() -> type[torch.nn.Module]:
    """Layers of n networks, their weights end to end."""
    from torch import Tensor, nn

    class Linear(nn.Linear):
        def __init__(self, n_in: int, n_out: int, n: int) -> None:
            super().__init__(n_in, n * n_out)
            self.n = n

        def forward(self, x: Tensor) -> Tensor:  # (B, n, T, in) → (B, n, T, out)
            if self.n == 1:
                return super().forward(x)
            weight = self.weight.view(self.n, -1, self.in_features)
            return x @ weight.mT + self.bias.view(self.n, 1, -1)

    return Linear


@functools.cache
def block_class() -> type[torch.nn.Module]:
    """Two convolutions, squeeze and excitation, a shortcut; then time is halved."""
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    norm, linear = masked_norm_class(), linear_class()

    class Block(nn.Module):
        def __init__(self, n_in: int, width: int, n: int = 1, kernel: int = 3) -> None:
            super().__init__()
            self.n = n
            sizes, shape = (n * n_in, n * width), {"groups": n, "bias": False}
            self.first = nn.Conv1d(*sizes, kernel, padding=kernel // 2, **shape)
            self.second = nn.Conv1d(n * width, n * width, kernel, padding=kernel // 2, **shape)
            self.short = nn.Conv1d(*sizes, 1, **shape)
            self.norms = nn.ModuleList([norm(n * width) for _ in range(3)])
            self.squeeze = linear(width, width // 8, n)
            self.excite = linear(width // 8, width, n)

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            """(B, n·C, T), (B, 1, T) → (B, n·W, T/2), (B, 1, T/2)"""
            h = F.silu(self.norms[0](self.first(x), mask))
            h = self.norms[1](self.second(h), mask)
            mean = h.sum(2) / mask.sum(2).clamp(min=1)  # (B, n·W) over rows that exist
            mean = mean.unflatten(1, (self.n, 1, -1))
            h = h * torch.sigmoid(self.excite(F.silu(self.squeeze(mean)))).flatten(1)[:, :, None]
            h = F.silu(h + self.norms[2](self.short(x), mask))
            h = h.masked_fill(mask == 0, torch.finfo(h.dtype).min)
            mask = torch.maximum(mask[:, :, 0::2], mask[:, :, 1::2])
            h = torch.maximum(h[:, :, 0::2], h[:, :, 1::2])
            return h.masked_fill(mask == 0, 0.0), mask

    return Block


@functools.cache
def image_class() -> type[torch.nn.Module]:
    """A small 2-D network over each 8 × 8 frame, shared by the five sensors."""
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    class ImageStem(nn.Module):
        def __init__(self, width: int, n: int) -> None:
            super().__init__()
            self.n = n
            self.first = nn.Conv2d(2, n * 8, 3, padding=1, stride=2)
            self.second = nn.Conv2d(n * 8, n * width, 4, groups=n)

        def forward(self, codes: Tensor) -> Tensor:  # (B, T, 5, 8, 8) bytes → (B, 5, n, W, T)
            seen = (codes <= FARTHEST).float()
            near = (1 - codes.float() / FARTHEST) * seen  # 1 touching … 0 far away or unseen
            planes = torch.stack([near, seen], dim=3).flatten(0, 2)  # (B·T·5, 2, 8, 8)
            h = self.second(F.silu(self.first(planes)))  # (B·T·5, n·W, 1, 1)
            return F.silu(h).reshape(*codes.shape[:3], self.n, -1).permute(0, 2, 3, 4, 1)

    return ImageStem


STEM_WIDTH = {"acc": 32, "rot": 32, "motion": 32, "thm": 16}  # ToF sensors: TOF_WIDTH each
TOF_WIDTH = IMAGE_WIDTH = 16


@functools.cache
def split_conv_class() -> type[torch.nn.Module]:
    """A convolution of its own for each group of channels."""
    import torch
    from torch import Tensor, nn

    class SplitConv(nn.ModuleList):
        def __init__(self, ins: Sequence[int], outs: Sequence[int], n: int) -> None:
            shape = {"padding": 2, "groups": n, "bias": False}
            layers = (nn.Conv1d(n * a, n * b, 5, **shape) for a, b in zip(ins, outs, strict=True))
            super().__init__(layers)
            self.n, self.ins = n, list(ins)

        def forward(self, x: Tensor) -> Tensor:  # (B, n·C, T) → (B, n·W, T)
            groups = zip(self, x.unflatten(1, (self.n, -1)).split(self.ins, 2), strict=True)
            parts = [conv(own.flatten(1, 2)).unflatten(1, (self.n, -1)) for conv, own in groups]
            return torch.cat(parts, 2).flatten(1, 2)

    return SplitConv


@functools.cache
def stems_class() -> type[torch.nn.Module]:
    """Each group of channels, with its presence and its images, through a convolution of its own."""
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    class Stems(nn.Module):
        def __init__(self, spec: NetSpec, n: int) -> None:
            super().__init__()
            self.n = n
            names = [name for name, _ in spec.groups]
            self.sizes = [len(channels) for _, channels in spec.groups]
            self.seeing = [spec.tof_images and name.startswith("tof_") for name in names]
            self.image = image_class()(IMAGE_WIDTH, n) if any(self.seeing) else None
            widths = [STEM_WIDTH.get(name, TOF_WIDTH) for name in names]
            held = [
                size + 1 + IMAGE_WIDTH * sees
                for size, sees in zip(self.sizes, self.seeing, strict=True)
            ]
            self.convolutions = split_conv_class()(held, widths, n)
            self.width = sum(widths)
            self.norm = masked_norm_class()(n * self.width)

        def forward(self, known: Tensor, gone: Tensor, images: Any, mask: Tensor) -> Tensor:
            """(B, n, T, C), (B, T, C), (B, T, 5, 8, 8), (B, 1, T) → (B, n·W, T)"""
            pictures = iter(() if self.image is None else self.image(images).unbind(1))
            known = (known * mask[..., None]).transpose(2, 3)
            there = 1 - gone.float().transpose(1, 2)
            groups = zip(known.split(self.sizes, 2), there.split(self.sizes, 1), strict=True)
            parts = []
            for sees, (x, held) in zip(self.seeing, groups, strict=True):
                share = (held.mean(1, keepdim=True) * mask)[:, None]  # of the group that is there
                parts += [x, share.expand(-1, self.n, -1, -1)]
                parts += [next(pictures) * mask[:, None]] if sees else []
            h = self.convolutions(torch.cat(parts, 2).flatten(1, 2))
            return F.silu(self.norm(h, mask))

    return Stems


@functools.cache
def trunk_class() -> type[torch.nn.Module]:
    """Standardised rows through the stems, then together through the blocks."""
    import torch
    from torch import Tensor, nn

    class Trunk(nn.Module):
        def __init__(self, spec: NetSpec, n: int = 1) -> None:
            super().__init__()
            self.n = n
            self.pad_len = spec.pad_len
            self.register_buffer("mean", torch.zeros(n * len(spec.channels)))
            self.register_buffer("sd", torch.ones(n * len(spec.channels)))
            self.stems = stems_class()(spec, n)
            w = spec.width
            widths = (self.stems.width + 1, w, w + w // 2, 2 * w)
            self.blocks = nn.ModuleList(
                block_class()(a, b, n) for a, b in itertools.pairwise(widths)
            )

        def forward(
            self, rows: Tensor, images: Tensor | None, length: Tensor
        ) -> tuple[Tensor, Tensor]:
            """(B, T, C), (B, T, 5, 8, 8), (B) → (B, n·W, T/8), (B, 1, T/8); 8 divides T"""
            to_end = length[:, None] - 1 - torch.arange(rows.shape[1], device=rows.device)
            mask = (to_end >= 0).float()[:, None]  # (B, 1, T)
            gone = rows.isnan()
            mean, sd = (v.view(self.n, 1, -1) for v in (self.mean, self.sd))
            known = ((rows[:, None] - mean) / sd).masked_fill(gone[:, None], 0.0)
            h = self.stems(known, gone, images, mask).unflatten(1, (self.n, -1))
            end = (to_end[:, None] / self.pad_len * mask)[:, None]  # the gesture comes last
            h = torch.cat([h, end.expand(-1, self.n, -1, -1)], 2).flatten(1, 2)
            for block in self.blocks:
                h, mask = block(h, mask)
            return h, mask

    return Trunk


@functools.cache
def memory_class() -> type[torch.nn.Module]:
    """BiLSTM → GRU over the steps that exist."""
    from torch import Tensor, nn
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    class Memory(nn.Module):
        def __init__(self, width: int, hidden: int) -> None:
            super().__init__()
            self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
            self.gru = nn.GRU(2 * hidden, 2 * hidden, batch_first=True)

        def forward(self, h: Tensor, steps: Tensor) -> Tensor:  # (B, W, T), (B) → (B, T, D)
            x = h.transpose(1, 2)
            self.lstm.flatten_parameters()  # for the copies that DataParallel makes
            self.gru.flatten_parameters()
            packed = pack_padded_sequence(x, steps.cpu(), batch_first=True, enforce_sorted=False)
            packed = self.gru(self.lstm(packed)[0])[0]
            return pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0]

    return Memory


def label_parts(spec: NetSpec) -> torch.Tensor:
    """Which gesture, orientation and behavior each label stands for, one-hot. → (L, K + 4 + 2)"""
    import torch

    table, sizes = torch.tensor(spec.table), (len(GESTURES), len(ORIENTATIONS), 2)
    columns = zip((2, 1, 0), sizes, strict=True)  # of the table: gesture, orientation, behavior
    return torch.cat([(table[:, k : k + 1] == torch.arange(n)).float() for k, n in columns], 1)


@functools.cache
def head_class() -> type[torch.nn.Module]:
    """Pools the steps and says what was done, in which position, starting how, and when."""
    import torch
    from torch import Tensor, nn

    linear = linear_class()

    class Head(nn.Module):
        def __init__(self, spec: NetSpec, dropout: float, n: int = 1) -> None:
            super().__init__()
            n_in = 2 * spec.width
            self.dropout = dropout
            self.phase = linear(n_in, 1, n)
            half = n_in // 2
            self.rank = nn.Sequential(linear(n_in, half, n), nn.Tanh(), linear(half, 1, n))
            self.guidance = nn.Parameter(torch.ones(n).squeeze())  # phase's say in the rank
            self.parts = (len(GESTURES), len(spec.table), len(ORIENTATIONS), 2)
            self.out = linear(2 * n_in, sum(self.parts), n)
            parts_of = label_parts(spec)  # (L, K + 4 + 2)
            self.register_buffer("belongs", parts_of[:, : len(GESTURES)], persistent=False)
            self.register_buffer("parts_of", parts_of, persistent=False)

        def forward(self, h: Tensor, mask: Tensor, noise: torch.Generator | None) -> Outputs:
            """(B, n, T, D), (B, 1, T) → logits (B, n, …): gesture, label, orientation, behavior; phase by step"""
            there = mask > 0
            phase = self.phase(h)[..., 0]
            rank = self.rank(h)[..., 0] + self.guidance.view(-1, 1) * phase
            lowest = torch.finfo(h.dtype).min
            share = rank.masked_fill(~there, lowest).softmax(2)  # (B, n, T)
            mean = share[:, :, None] @ h  # (B, n, 1, D)
            peak = h.masked_fill(~there[..., None], lowest).amax(2, keepdim=True)
            pooled = drop(torch.cat([mean, peak], 3), self.dropout, noise, self.training)
            gesture, label, orientation, behavior = self.out(pooled)[:, :, 0].split(self.parts, 2)
            sides = torch.cat([gesture, orientation, behavior], 2)
            label = label + sides @ self.parts_of.T  # a label's logit: its parts' and its own
            return gesture, label, orientation, behavior, phase

    return Head


@functools.cache
def net_class() -> type[torch.nn.Module]:
    """Raw rows of a batch of recordings → logits. Noise: where dropout draws from, if at all."""
    import torch
    from torch import Tensor, nn

    class Net(nn.Module):
        def __init__(self, spec: NetSpec, dropout: float) -> None:
            super().__init__()
            self.dropout = dropout
            self.trunk = trunk_class()(spec)
            self.memory = memory_class()(2 * spec.width, spec.width)
            self.head = head_class()(spec, dropout)

        def forward(
            self,
            rows: Tensor,
            images: Tensor | None,
            length: Tensor,
            noise: torch.Generator | None = None,
        ) -> Outputs:
            h, mask = self.trunk(rows, images, length.to(rows.device))
            with torch.autocast(rows.device.type, enabled=False):  # the rest is small: float32
                h = drop(h.float(), self.dropout, noise, self.training)
                outputs = self.head(self.memory(h, halved(length))[:, None], mask, noise)
                return tuple(logits[:, 0] for logits in outputs)

    return Net


def halved(length: Any) -> Any:
    """Steps that are left after the three blocks. Rows → steps"""
    return (length + 7) // 8


def drop(x: torch.Tensor, p: float, noise: torch.Generator | None, training: bool) -> torch.Tensor:
    """Dropout that draws from a generator of its own, so that threads cannot disturb each other."""
    import torch

    if not training or p == 0:
        return x
    if noise is None:
        return torch.nn.functional.dropout(x, p)
    return x * torch.empty_like(x).bernoulli_(1 - p, generator=noise) / (1 - p)


def composite_proba(outputs: Outputs, belongs: torch.Tensor) -> torch.Tensor:
    """Probabilities of the labels. belongs: (L, K) which gesture a label is. → (B, L), rows sum to 1

    Two heads speak about the gesture, the gesture's own and the sum over the labels; the labels of
    a gesture share the mean of both as the label head divides it.
    """
    own = outputs[0].float().softmax(1)  # (B, K)
    label = outputs[1].float().softmax(1)  # (B, L)
    summed = label @ belongs  # (B, K)
    mixed = (own + summed) / 2
    share = label / (summed @ belongs.T).clamp(min=1e-30)
    joint = share * (mixed @ belongs.T)
    return joint / joint.sum(1, keepdim=True)


# %% [markdown]
# The recordings lie on the device once, end to end; a batch is an index gather. Augmentation draws
# its few numbers per recording on the host, from an address (job, epoch), and applies them on the
# device to whole batches. Batches are aligned at the left and keep the *last* rows of a recording.


# %%
@dataclass(frozen=True, slots=True)
class Store:
    """Rows of all recordings on the device; where each recording's kept rows lie, on the host."""

    x: torch.Tensor  # (R, C) raw channels
    tof: torch.Tensor | None  # (R, 5, 8, 8) bytes
    phase: torch.Tensor | None  # (R)
    first: I64  # (N) first row of a recording
    last: I64  # (N) its last row
    length: I64  # (N) rows kept, the last ones
    vectors: torch.Tensor  # (V, 3) columns that hold the x, y, z of a vector in the device frame
    thm: Bool  # (C) columns of the thermopiles
    near: Bool  # (C) columns of the ToF sensors

    @classmethod
    def of(
        cls, frames: Frames, spec: NetSpec, device: torch.device, phase: U8 | None = None
    ) -> Store:
        """Copy frames, and phases if there are any, to a device."""
        import torch

        names = spec.channels
        length = last_rows(frames.start, spec.pad_len)[1]
        images = frames.tof if spec.tof_images else None
        return cls(
            torch.tensor(frames.x, device=device),
            None if images is None else torch.tensor(images, device=device),
            None if phase is None else torch.tensor(phase, device=device).float(),
            frames.start[:-1], frames.start[1:] - 1, length,
            torch.tensor(vector_triples(names), device=device),
            np.char.startswith(names, "thm_"), np.char.startswith(names, "tof_"),
        )  # fmt: skip


@dataclass(slots=True)
class Draw:
    """Some recordings and what is done to each; as drawn, still on the host."""

    which: I64  # (B)
    last: I64  # (B) row that comes last
    length: I64  # (B) rows after stretching
    speed: F32  # (B) rows of the recording per row of the batch
    turn: F32  # (B, 3) rotation of the wristband, rad
    lost: Bool  # (B, C) columns that go missing
    blind: Bool  # (B) ToF images that go missing
    gap: I64  # (B, 2) rows from … to that go missing
    partner: I64  # (B) recording that is mixed in
    share: F32  # (B) of the recording itself, 0.5 … 1

    def part(self, chosen: I64) -> Draw:
        """Some of the recordings, with what was drawn for them."""
        return Draw(*(getattr(self, f.name)[chosen] for f in dataclasses.fields(self)))


def plain_draw(store: Store, which: I64) -> Draw:
    """Recordings as they are."""
    n, still = len(which), np.zeros(len(which), np.int64)
    return Draw(
        which, store.last[which], store.length[which], np.ones(n, np.float32), np.zeros((n, 3), np.float32),
        np.zeros((n, store.x.shape[1]), bool), still > 0, np.stack([still, still], 1), which, np.ones(n, np.float32),
    )  # fmt: skip


STRETCH = 0.1  # a recording is played up to this much faster or slower; both kinds of networks
TURN = 0.15  # rad, spread of the wristband's rotation about each axis; both
SHIFT, GAP, LOSS, MIX = 6, 12, 0.1, 0.4  # rows, rows, share of channels, parameter of the beta law


def augmented_draw(
    store: Store, which: I64, pad_len: int, cfg: Config, rng: np.random.Generator
) -> Draw:
    """Recordings changed at random, each change with its own probability. Drawn for an epoch at
    once: its few numbers per recording then cost next to nothing."""
    d, n = plain_draw(store, which), len(which)

    def chosen(p: float) -> Bool:
        return rng.random(n) < p

    rows = d.last - store.first[which] + 1  # (B) all rows of the recordings
    shift = np.where(chosen(cfg.torch_shift_prob), rng.integers(0, SHIFT + 1, n), 0)
    shift = np.minimum(shift, rows - 1)
    d.last = d.last - shift
    d.speed = np.where(
        chosen(cfg.torch_stretch_prob), rng.uniform(1 - STRETCH, 1 + STRETCH, n), 1
    ).astype(np.float32)
    d.length = np.minimum(((rows - shift - 1) / d.speed).astype(np.int64) + 1, pad_len)
    d.turn = np.where(
        chosen(cfg.torch_rotate_prob)[:, None], rng.normal(0, TURN, (n, 3)), 0
    ).astype(np.float32)
    lose_thm, lose_tof = dropped_modalities(n, rng, cfg.modality_dropout_prob)
    d.blind = lose_tof
    d.lost = np.outer(lose_thm, store.thm) | np.outer(lose_tof, store.near)
    d.lost |= chosen(cfg.torch_channel_mask_prob)[:, None] & (rng.random(d.lost.shape) < LOSS)
    begin = rng.integers(0, d.length)
    wide = np.where(chosen(cfg.torch_time_mask_prob), rng.integers(1, GAP + 1, n), 0)
    d.gap = np.stack([begin, begin + wide], 1)
    d.partner = rng.permutation(which)
    share = rng.beta(MIX, MIX, n)
    d.share = np.where(chosen(cfg.torch_mixup_prob), np.maximum(share, 1 - share), 1).astype(
        np.float32
    )
    return d


@dataclass(frozen=True, slots=True)
class Batch:
    """Input and targets of some recordings."""

    rows: torch.Tensor  # (B, T, C)
    images: torch.Tensor | None  # (B, T, 5, 8, 8)
    length: torch.Tensor  # (B) on the host
    label: torch.Tensor | None = None  # (B, L) probabilities
    phase: torch.Tensor | None = None  # (B, T / 8) share of rows in which the gesture is performed

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, chosen: slice) -> Batch:
        images = None if self.images is None else self.images[chosen]
        assert self.label is not None
        assert self.phase is not None
        return Batch(
            self.rows[chosen], images, self.length[chosen], self.label[chosen], self.phase[chosen]
        )


def make_batch(store: Store, d: Draw, composite: I64 | None = None, n_labels: int = 0) -> Batch:
    """Gather the rows of a batch and do to them what was drawn. Padding is the row that comes last."""
    import torch
    from torch.nn.functional import embedding, one_hot

    def on(array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(store.x.device, non_blocking=True)

    steps = torch.arange(-(-int(d.length.max()) // 8) * 8, device=store.x.device)
    back = (on(d.length)[:, None] - 1 - steps).clamp(min=0) * on(d.speed)[:, None]  # (B, T) rows
    at = on(d.last)[:, None] - back.long()
    rows = embedding(at, store.x)  # (B, T, C)
    for marks, change in (
        (d.speed != 1, stretched_rows),
        (d.share < 1, mixed_rows),
        (d.turn.any(axis=1), turned_rows),
        (d.lost.any(axis=1) | (d.gap[:, 0] < d.gap[:, 1]), silenced_rows),
    ):
        if marks.any():  # work on these recordings alone
            some = np.flatnonzero(marks)
            i = on(some)
            rows[i] = change(rows[i], back[i], store, d.part(some), on)
    images = None
    if store.tof is not None:
        images = store.tof.flatten(1).index_select(0, at.flatten()).view(*at.shape, 5, 8, 8)
        images = images.masked_fill(on(d.blind)[:, None, None, None, None], MISSING)
    length = torch.from_numpy(d.length)
    if composite is None or store.phase is None:
        return Batch(rows, images, length)
    own, other = (one_hot(on(composite[w]), n_labels) for w in (d.which, d.partner))
    label = torch.lerp(other.float(), own.float(), on(d.share)[:, None])
    return Batch(rows, images, length, label, phase_share(store.phase[at], on(d.length)))


def stretched_rows(
    rows: torch.Tensor, back: torch.Tensor, store: Store, d: Draw, on: Any
) -> torch.Tensor:
    """Between two rows of a recording that is played faster or slower, a straight line."""
    from torch.nn.functional import embedding

    part = back - back.long()
    before = on(d.last)[:, None] - back.long() - (part > 0).long()
    return rows.lerp(embedding(before, store.x), part[:, :, None])


def mixed_rows(
    rows: torch.Tensor, back: torch.Tensor, store: Store, d: Draw, on: Any
) -> torch.Tensor:
    """Mixup: part of another recording's rows, aligned at the end. Where it has none, our own stay."""
    from torch.nn.functional import embedding

    at = on(store.last[d.partner])[:, None] - back.long()  # (B, T)
    there = (at >= on(store.first[d.partner])[:, None])[:, :, None]
    mixed = embedding(at.clamp(min=0), store.x).lerp(rows, on(d.share)[:, None, None])
    return rows.where(~there | mixed.isnan(), mixed)


def turned_rows(
    rows: torch.Tensor, back: torch.Tensor, store: Store, d: Draw, on: Any
) -> torch.Tensor:
    """Turn every vector of a recording by one rotation, as a wristband that sits askew. (B, T, C)"""
    from scipy.spatial.transform import Rotation

    turn = on(Rotation.from_rotvec(d.turn).as_matrix().astype(np.float32))  # (B, 3, 3)
    columns = store.vectors.flatten()
    found = rows[:, :, columns].unflatten(2, (-1, 3)) @ turn.mT[:, None]  # (B, T, V, 3)
    return rows.index_copy(2, columns, found.flatten(2))


def silenced_rows(
    rows: torch.Tensor, back: torch.Tensor, store: Store, d: Draw, on: Any
) -> torch.Tensor:
    """Rows and channels that go missing."""
    import torch

    steps = torch.arange(rows.shape[1], device=rows.device)
    holes = (steps >= on(d.gap[:, :1])) & (steps < on(d.gap[:, 1:]))  # (B, T)
    return rows.masked_fill_(holes[:, :, None], torch.nan).masked_fill_(
        on(d.lost)[:, None], torch.nan
    )


def phase_share(phase: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Share of each step's rows in which the gesture is performed. (B, T) → (B, T / 8)"""
    import torch

    there = torch.arange(phase.shape[1], device=phase.device) < length[:, None]
    rows = there.float().unflatten(1, (-1, 8)).sum(2)
    return (phase * there).unflatten(1, (-1, 8)).sum(2) / rows.clamp(min=1)


# %% [markdown]
# One training: its whole state is one dict, written after every epoch and read back as one. The
# random numbers of an epoch follow from the epoch's number, so there is none to be restored.


# %%
@functools.cache
def card_works(i: int) -> bool:
    """Does a GPU compute? Torch says yes to cards for which it brings no kernels: try one op."""
    import torch

    try:
        torch.ones(8, device=f"cuda:{i}").sum().item()
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(i)
        log("warning", card=torch.cuda.get_device_name(i), needs=f"sm_{major}{minor}",
            torch_has=",".join(torch.cuda.get_arch_list()), left_out=str(error).split("\n")[0])  # fmt: skip
        return False
    return True


def device_for(index: int, cfg: Config) -> torch.device:
    """One job a card, in turn, or the CPU; TORCH_DATA_PARALLEL=1: every job is led by the first.

    On the CPU the number of threads is fixed, whatever the machine: the last digits depend on it,
    and a network of this size that waits for a busy core to join in is slower than without it.
    """
    import torch

    n_cards = torch.cuda.device_count()
    turn = [(k if cfg.torch_data_parallel else index + k) % n_cards for k in range(n_cards)]
    works = next((i for i in turn if card_works(i)), None)
    if works is not None:
        return torch.device("cuda", works)
    torch.set_num_threads(cfg.torch_threads)
    return torch.device("cpu")


def torch_side_by_side(job: Job, cfg: Config) -> int:
    """How many networks should train at once, each in a process: one a card, or one a core.

    Without a card small networks are done before a second process is up.
    """
    import torch

    cards = sum(card_works(i) for i in range(torch.cuda.device_count()))
    if cards:
        return 1 if cfg.torch_data_parallel else cards
    if len(job.train) < 500:
        return 1
    return max(1, min(len(os.sched_getaffinity(0)) // cfg.torch_threads, 8))


def half_precision(device: torch.device, cfg: Config) -> torch.dtype | None:
    """bfloat16 where the card computes in it (from Ampere on), else float16; None: float32."""
    import torch

    if not cfg.torch_amp or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def one_cycle(step: int, total: int, peak: float) -> float:
    """Learning rate: a cosine up to the peak in 30 % of the steps, another down to nothing."""
    top = 0.3 * total - 1
    if step <= top:
        low, part = peak / 25, step / max(top, 1)
    else:
        low, part = peak / 25e4, (total - 1 - step) / max(total - 1 - top, 1)
    return float(low + (peak - low) * (1 - np.cos(np.pi * part)) / 2)


def torch_batch(n_train: int, cfg: Config) -> int:
    """TORCH_BATCH_SIZE, but at most a sixteenth of the training rows, and 4 where there are few."""
    return min(cfg.torch_batch_size, max(n_train // 16, 4), n_train)


def steps_an_epoch(n_train: int, cfg: Config) -> int:
    """Every recording once; the last step may be smaller."""
    return -(-n_train // torch_batch(n_train, cfg))


@dataclass(slots=True)
class Training:
    """A network while it learns."""

    net: Any
    ema: Any  # its averaged twin; the network itself with TORCH_EMA=0
    optimizer: Any
    scaler: Any
    half: torch.dtype | None
    micro: int  # recordings that go through the network at once
    forward: Callable[..., Outputs]  # the network, or its copies on several cards
    epoch: int = 0
    step: int = 0
    best: dict[str, Any] = dataclasses.field(default_factory=dict)  # epoch, score and state

    @property
    def device(self) -> torch.device:
        return self.net.trunk.mean.device

    def state(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **{k: getattr(self, k) for k in ("micro", "epoch", "step", "best")},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        for part in ("net", "ema", "optimizer", "scaler"):
            if state[part]:  # empty of a scaler that was off
                getattr(self, part).load_state_dict(state[part])
        for k in ("micro", "epoch", "step", "best"):
            setattr(self, k, state[k])


def new_training(job: Job, spec: NetSpec, frames: Frames, cfg: Config) -> Training:
    """An untrained network and all that goes with it."""
    import torch

    device = device_for(job.seed * cfg.n_folds + job.fold, cfg)
    half = half_precision(device, cfg)
    with torch.random.fork_rng(devices=[]), weights_lock():
        torch.manual_seed(int(job.rng(cfg, "weights").integers(2**31)))
        net = net_class()(spec, cfg.torch_dropout)
    mean, sd = standardisation(frames, job.train)
    net.trunk.mean.copy_(torch.from_numpy(mean))
    net.trunk.sd.copy_(torch.from_numpy(sd))
    net.to(device)
    decays = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [
        {"params": decays, "weight_decay": cfg.torch_weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    cards = torch.cuda.device_count() if cfg.torch_data_parallel else 0
    several = cards > 1 and all(card_works(i) for i in range(cards))
    return Training(
        net=net,
        ema=copy.deepcopy(net).eval() if cfg.torch_ema else net,
        optimizer=torch.optim.AdamW(groups, lr=cfg.torch_lr, fused=True),
        scaler=torch.amp.GradScaler(device.type, enabled=half is torch.float16),
        half=half,
        micro=-(-torch_batch(len(job.train), cfg) // max(cfg.torch_accum_steps, 1)),
        forward=torch.nn.DataParallel(net) if several else net,
    )


@functools.cache
def weights_lock() -> threading.Lock:
    """Initial weights are drawn from torch's one global generator, by one job at a time."""
    return threading.Lock()


def torch_loss(outputs: Outputs, batch: Batch, parts_of: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Mean loss of a batch over all heads; targets of a label's parts are sums of the label's."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    gesture, label, orientation, behavior, phase = outputs
    assert batch.label is not None
    sides = (batch.label @ parts_of).split((gesture.shape[1], orientation.shape[1], 2), 1)
    total = soft_loss(label, batch.label, cfg) + soft_loss(gesture, sides[0], cfg)
    total = total + 0.2 * (
        soft_loss(orientation, sides[1], cfg) + soft_loss(behavior, sides[2], cfg)
    )
    steps = halved(batch.length).to(phase.device)
    there = (torch.arange(phase.shape[1], device=phase.device) < steps[:, None]).float()
    by_step = binary_cross_entropy_with_logits(phase, batch.phase, reduction="none")
    return total + 0.2 * ((by_step * there).sum(1) / there.sum(1)).mean()


def soft_loss(logits: torch.Tensor, target: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Cross-entropy against probabilities, smoothed; or focal, which cares less for what is easy."""
    smooth = cfg.torch_label_smoothing
    target = target * (1 - smooth) + smooth / logits.shape[1]
    log_p = logits.float().log_softmax(1)
    weight = (1 - log_p.exp()).square() if cfg.use_focal_loss else 1.0
    return -(target * weight * log_p).sum(1).mean()


def backward(
    run: Training, batch: Batch, noise: torch.Generator | None, cfg: Config
) -> torch.Tensor:
    """Gradient of a batch, in pieces that fit into memory; the loss, still on the device."""
    import torch

    run.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=run.device)
    for i in range(0, len(batch), run.micro):
        piece = batch.part(slice(i, i + run.micro))
        with torch.autocast(
            run.device.type, run.half or torch.bfloat16, enabled=run.half is not None
        ):
            outputs = run.forward(piece.rows, piece.images, piece.length, noise)
        loss = torch_loss(outputs, piece, run.net.head.parts_of, cfg) * (len(piece) / len(batch))
        run.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def train_step(
    run: Training, batch: Batch, noise: torch.Generator | None, cfg: Config
) -> torch.Tensor:
    """One step of the optimiser. Out of memory: again, in pieces of half the size."""
    import torch

    while True:
        try:
            loss = backward(run, batch, noise, cfg)
            break
        except torch.OutOfMemoryError:
            if run.micro <= 1:
                raise
        run.micro = -(-run.micro // 2)
        run.optimizer.zero_grad(set_to_none=True)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        log("retreat", out_of_memory=True, recordings_at_once=run.micro, a_step=len(batch))
    run.scaler.unscale_(run.optimizer)
    torch.nn.utils.clip_grad_norm_(run.net.parameters(), GRADIENT_NORM)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.step += 1
    if run.ema is not run.net:
        follow(run.ema, run.net, min(cfg.torch_ema, (1 + run.step) / (10 + run.step)))
    return loss


GRADIENT_NORM = 1.0


def follow(ema: torch.nn.Module, net: torch.nn.Module, keep: float) -> None:
    """Move averaged weights and statistics a little towards the current ones."""
    import torch

    with torch.no_grad():
        for slow, fast in zip(ema.state_dict().values(), net.state_dict().values(), strict=True):
            slow.lerp_(fast, 1 - keep)


def run_epoch(
    run: Training, store: Store, job: Job, composite: I64, progress: Progress, cfg: Config
) -> float:
    """Every training row once, in batches of nearly equal size; the mean loss."""
    import torch

    rng = job.rng(cfg, "epoch", run.epoch)
    noise = torch.Generator(run.device).manual_seed(int(rng.integers(2**62)))
    steps = steps_an_epoch(len(job.train), cfg)
    n_labels, pad_len = len(run.net.head.parts_of), run.net.trunk.pad_len
    several = run.forward is not run.net  # a generator lives on one card only
    total = torch.zeros((), device=run.device)
    run.net.train()
    draw = augmented_draw(store, rng.permutation(job.train), pad_len, cfg, rng)
    for chosen in np.array_split(np.arange(len(job.train)), steps):
        rate = one_cycle(run.step, steps * cfg.torch_max_epochs, cfg.torch_lr)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        batch = make_batch(store, draw.part(chosen), composite, n_labels)
        loss = train_step(run, batch, None if several else noise, cfg)
        total += loss * len(batch)
        progress.step(1, lambda: {"loss": loss.item(), "lr": rate})  # noqa: B023, asked at once
    run.epoch += 1
    mean = total.item() / len(job.train)
    if not np.isfinite(mean):
        raise FloatingPointError(
            f"{job.name}: the loss of epoch {run.epoch} is {mean}. Lower TORCH_LR={cfg.torch_lr:g}, or set TORCH_AMP=0."
        )
    return mean


def ask(net: torch.nn.Module, store: Store, rows: I64, size: int = 256) -> F32:
    """Composite probabilities of some recordings. → (n, L)"""
    import torch

    net.eval()
    with torch.inference_mode():
        parts = []
        for i in range(0, len(rows), size):
            batch = make_batch(store, plain_draw(store, rows[i : i + size]))
            outputs = net(batch.rows, batch.images, batch.length)
            parts.append(composite_proba(outputs, net.head.belongs))
        return torch.cat(parts).cpu().numpy()


def fit_torch(job: Job, frames: Frames, labels: Labels, cfg: Config) -> dict[str, Any]:
    """Train one network, or go on where its checkpoint stands, and write it to the job's folder."""
    spec = net_spec(frames, labels.table, cfg)
    run = new_training(job, spec, frames, cfg)
    settings = torch_settings(job, frames, cfg) | {"labels": digest(labels.table, labels.composite)}
    resume(run, job, settings, cfg)
    store = Store.of(frames, spec, run.device, labels.phase)
    with torch_progress(run, job, cfg) as progress:
        while run.epoch < cfg.torch_max_epochs and not out_of_patience(run, cfg):
            epoch_began = time.monotonic()
            loss = run_epoch(run, store, job, labels.composite, progress, cfg)
            proba = gesture_proba(ask(run.ema, store, job.valid), labels.table)
            f1 = score_parts(labels.gesture[job.valid], proba.argmax(1))
            remember(run, sum(f1) / 2, cfg)
            note_epoch(run, job, loss, f1, time.monotonic() - epoch_began, cfg)
            write_whole(torch_checkpoint(job), torch_bytes({"settings": settings, **run.state()}))
    content = {"spec": dataclasses.asdict(spec), "state": run.best["state"]}
    write_whole(job.folder / f"{job.stem}.pt", torch_bytes(content))
    torch_checkpoint(job).unlink(missing_ok=True)
    info = {k: run.best[k] for k in ("score", "epoch")}
    return info | {"epochs": run.epoch, "steps": run.step, "device": str(run.device)}


def torch_progress(run: Training, job: Job, cfg: Config) -> Progress:
    """Say what begins, and count time and memory from here."""
    import torch

    n_train = len(job.train)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    log("torch", job=job.name, device=run.device, precision=str(run.half or torch.float32)[6:], train=n_train,
        a_step=torch_batch(n_train, cfg), asked=cfg.torch_batch_size, epoch=f"{run.epoch}/{cfg.torch_max_epochs}")  # fmt: skip
    total = steps_an_epoch(n_train, cfg) * cfg.torch_max_epochs
    return Progress("steps", total, cfg.print_every_steps, cfg, run.step, job=job.name)


def net_spec(frames: Frames, table: I64, cfg: Config) -> NetSpec:
    """The network that fits these frames and labels."""
    images = cfg.torch_tof_images and frames.tof is not None
    rows = tuple(tuple(map(int, row)) for row in table)
    return NetSpec(frames.groups, rows, pad_length(frames, cfg), cfg.torch_width, images)


def out_of_patience(run: Training, cfg: Config) -> bool:
    """With TORCH_ES_PATIENCE: have so many epochs gone by without a better score?"""
    patience = cfg.torch_es_patience
    return patience > 0 and run.epoch > 0 and run.epoch - run.best["epoch"] >= patience


def remember(run: Training, reached: float, cfg: Config) -> None:
    """Keep the weights that will be written: the latest, or with TORCH_ES_PATIENCE the best so far."""
    stopping = cfg.torch_es_patience > 0
    if not (stopping and run.best) or reached > run.best["score"] + cfg.torch_es_min_delta:
        state = {name: value.detach().cpu().clone() for name, value in run.ema.state_dict().items()}
        run.best = {"epoch": run.epoch, "score": reached, "state": state}


def note_epoch(
    run: Training, job: Job, loss: float, f1: tuple[float, float], secs: float, cfg: Config
) -> None:
    """One line of logs/torch_progress.jsonl."""
    import torch

    cuda = run.device.type == "cuda"
    append_jsonl(
        job.logs / "torch_progress.jsonl", cfg,
        mode=job.mode, seed=job.seed, fold=job.fold, epoch=run.epoch, train_loss=round(loss, 5),
        bin_f1=round(f1[0], 5), macro_f1=round(f1[1], 5), score=round(sum(f1) / 2, 5), secs=round(secs, 3),
        max_mem_gb=round(torch.cuda.max_memory_allocated(run.device) / 2**30, 3) if cuda else None,
        lr=run.optimizer.param_groups[0]["lr"], batch=torch_batch(len(job.train), cfg), at_once=run.micro,
    )  # fmt: skip


def torch_bytes(content: Mapping[str, Any]) -> bytes:
    """What `torch.save` would write to a file."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getvalue()


def torch_read(path: Path) -> dict[str, Any]:
    """What `torch_bytes` wrote. Only tensors and plain values are read; nothing is executed."""
    import pickle

    import torch

    raw = io.BytesIO(path.read_bytes())
    damage = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError)
    try:
        content = torch.load(raw, map_location="cpu", weights_only=True)
    except (*damage, AttributeError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(
            f"{path} holds more than weights, or is damaged, and was not read ({reason:.120}). Delete it and train again."
        ) from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds a {type(content).__name__}, no network. Delete it and train again."
        )
    return content


def torch_checkpoint(job: Job) -> Path:
    """Where a training in progress is kept."""
    return job.scratch / f"{job.stem}.ckpt.pt"


def torch_settings(job: Job, frames: Frames | None, cfg: Config) -> dict[str, Any]:
    """On what a training in progress depends, by name."""
    known = {name.upper(): value for name, value in cfg.shaping("torch").items()}
    known |= {"training rows": digest(job.train), "validation rows": digest(job.valid)}
    known["form of the files"] = MEMBERS["torch"].form
    if frames is not None:
        known["frames"] = digest(frames.start, frames.x, list(frames.names))
    return known


def torch_resumable(job: Job, cfg: Config) -> str | None:
    """For the plan: where a training stands that can be resumed, or why it cannot; None: there is none."""
    path = torch_checkpoint(job)
    if not path.is_file() or not (cfg.resume and cfg.resume_torch):
        return None
    try:
        stored = torch_read(path)
    except ValueError:
        return f"{path.name} is damaged"
    other = difference(torch_settings(job, None, cfg), stored.get("settings", {}))
    if other:
        return f"not resumable, {other}"
    return f"resumable at epoch {stored['epoch']} of {cfg.torch_max_epochs}"


def resume(run: Training, job: Job, settings: Mapping[str, Any], cfg: Config) -> None:
    """Take up a checkpoint that fits; one that does not is named and left behind."""
    path = torch_checkpoint(job)
    if not path.is_file() or not (cfg.resume and cfg.resume_torch):
        return
    try:
        stored = torch_read(path)
    except ValueError as error:
        log("warning", job=job.name, checkpoint=str(error), instead="from the start")
        return
    other = difference(settings, stored.get("settings", {}))
    if other:
        log("warning", job=job.name, checkpoint="not used", differs=other, instead="from the start")
        return
    run.restore(stored)
    log("resume", job=job.name, epoch=run.epoch)


# %% [markdown]
# Serving: all networks of a mode answer one recording in one pass. Trunk and head are built for n
# networks side by side, with the weights of all end to end; the recurrent layers take each step together.


# %%
@dataclass(frozen=True, slots=True)
class TorchModel:
    """The networks of a mode, loaded."""

    nets: list[Any]
    spec: NetSpec
    trunk: Any  # of all networks side by side
    lstm: Gates
    gru: Gates
    head: Any

    @classmethod
    def of(cls, nets: Sequence[Any], spec: NetSpec) -> TorchModel:
        """Join networks of one make."""
        import torch

        def side_by_side(whole: Any, parts: Sequence[Any]) -> Any:
            states = [{k: torch.atleast_1d(v) for k, v in p.state_dict().items()} for p in parts]
            state = {name: torch.cat([own[name] for own in states]) for name in states[0]}
            whole.load_state_dict({k: v.view_as(whole.state_dict()[k]) for k, v in state.items()})
            return whole.eval().requires_grad_(False).to(nets[0].trunk.mean.device)

        n = len(nets)
        trunk = fused_trunk(side_by_side(trunk_class()(spec, n), [net.trunk for net in nets]))
        head = side_by_side(head_class()(spec, 0.0, n), [net.head for net in nets])
        lstm = Gates.of([net.memory.lstm for net in nets], ("", "_reverse"))
        return cls(list(nets), spec, trunk, lstm, Gates.of([net.memory.gru for net in nets]), head)


@functools.cache
def matrix_conv_class() -> type[torch.nn.Module]:
    """A convolution and the norm that follows it as one matrix product, for one recording."""
    import torch
    from torch import Tensor, nn
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    class MatrixConv(nn.Module):
        def __init__(self, weight: Tensor, norm: Any, n: int) -> None:
            super().__init__()
            learnt = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            weight, bias = fuse_conv_bn_weights(weight, None, *learnt)  # (n·W, C, k)
            self.n, self.kernel = n, weight.shape[2]
            by_row = weight.detach().unflatten(0, (n, -1)).transpose(2, 3)  # (n, W, k, C)
            self.register_buffer("weight", by_row.flatten(2).contiguous())
            self.register_buffer("bias", bias.detach().view(n, -1, 1))

        def forward(self, x: Tensor) -> Tensor:  # (1, n·C, T) → (1, n·W, T)
            rows, reach = x.view(self.n, -1, x.shape[2]), self.kernel // 2
            if reach:
                padded = nn.functional.pad(rows, (reach, reach))
                rows = torch.cat([padded[..., i : i + x.shape[2]] for i in range(self.kernel)], 1)
            return torch.baddbmm(self.bias, self.weight, rows).view(1, -1, x.shape[2])

    return MatrixConv


def fused_trunk(trunk: Any) -> Any:
    """A trunk that only answers: each convolution with its norm in one product, all stems in one."""
    import torch

    n, stems = trunk.n, trunk.stems

    def fused(weight: torch.Tensor, norm: Any) -> Any:
        norm.fused = True
        return matrix_conv_class()(weight, norm, n)

    groups = [conv.weight.unflatten(0, (n, -1)) for conv in stems.convolutions]  # (n, W, C, 5)
    taps = [[torch.block_diag(*(w[i, ..., k] for w in groups)) for k in range(5)] for i in range(n)]
    whole = torch.stack([torch.stack(own, 2) for own in taps])  # (n, ΣW, ΣC, 5)
    stems.convolutions = fused(whole.flatten(0, 1), stems.norm)
    for block in trunk.blocks:
        for name, norm in zip(("first", "second", "short"), block.norms, strict=True):
            setattr(block, name, fused(getattr(block, name).weight, norm))
    return trunk


@dataclass(frozen=True, slots=True)
class Gates:
    """Recurrent layers that step together: those of n networks, or both ways of each."""

    enter: torch.Tensor  # (S, D, G·H)
    again: torch.Tensor  # (S, H, G·H)
    enter_bias: torch.Tensor  # (S, 1, G·H)
    again_bias: torch.Tensor  # (S, 1, G·H)

    @classmethod
    def of(cls, layers: Sequence[Any], ways: Sequence[str] = ("",)) -> Gates:
        """From layers of torch; of two ways first all forward."""
        import torch

        def stacked(name: str) -> torch.Tensor:
            return torch.stack(
                [getattr(x, f"{name}_l0{way}").detach() for way in ways for x in layers]
            )

        weights = (stacked(f"weight_{kind}").mT.contiguous() for kind in ("ih", "hh"))
        return cls(*weights, *(stacked(f"bias_{kind}")[:, None] for kind in ("ih", "hh")))


def lstm_steps(gates: Gates, x: torch.Tensor) -> torch.Tensor:
    """Hidden states of S LSTMs. (S, T, D) → (S, T, H)"""
    import torch

    enter = torch.baddbmm(gates.enter_bias + gates.again_bias, x, gates.enter)
    h = c = x.new_zeros(len(x), 1, gates.again.shape[1])
    states = []
    for step in enter.split(1, 1):
        raw = torch.baddbmm(step, h, gates.again)
        taken, kept, _, told = raw.sigmoid().chunk(4, 2)
        c = torch.addcmul(kept * c, taken, raw.chunk(4, 2)[2].tanh())
        h = told * c.tanh()
        states.append(h)
    return torch.cat(states, 1)


def gru_steps(gates: Gates, x: torch.Tensor) -> torch.Tensor:
    """Hidden states of S GRUs. (S, T, D) → (S, T, H)"""
    import torch

    enter = torch.baddbmm(gates.enter_bias, x, gates.enter)
    h = x.new_zeros(len(x), 1, gates.again.shape[1])
    states = []
    for step in enter.split(1, 1):
        raw = torch.baddbmm(gates.again_bias, h, gates.again)
        reset, kept, _ = (step + raw).sigmoid().chunk(3, 2)
        new = torch.addcmul(step.chunk(3, 2)[2], reset, raw.chunk(3, 2)[2]).tanh()
        h = torch.lerp(new, h, kept)
        states.append(h)
    return torch.cat(states, 1)


def load_torch(folder: Path, stems: Sequence[str], table: I64, cfg: Config) -> TorchModel:
    """Read and check the networks of a mode; nothing in the files is executed."""
    nets, specs = [], set()
    device = device_for(0, cfg)
    for stem in stems:
        path = folder / f"{stem}.pt"
        stored = torch_read(path)
        try:
            spec = NetSpec.read(stored["spec"])
            net = net_class()(spec, 0.0)
            net.load_state_dict(stored["state"])
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise DataError(
                f"{path} does not describe a network of this file ({error!s:.200}). Train again."
            ) from None
        if not np.array_equal(np.array(spec.table), table):
            raise DataError(
                f"{path} was trained for {len(spec.table)} other labels. Train again, or attach its own bundle."
            )
        specs.add(spec)
        nets.append(net.eval().requires_grad_(False).to(device))
    if len(specs) != 1:
        raise DataError(
            f"The networks in {folder} differ in their input or size; train them again together."
        )
    return TorchModel.of(nets, specs.pop())


def predict_torch(model: TorchModel, frames: Frames) -> F32:
    """Composite probabilities by each network. → (stems, N, L)"""
    if frames.groups != model.spec.groups:
        raise ValueError(
            "The network was trained on other channels than these frames hold. Train again."
        )
    store = Store.of(frames, model.spec, model.nets[0].trunk.mean.device)
    if len(frames) == 1:
        return ask_at_once(model, store)
    return np.stack([ask(net, store, np.arange(len(frames))) for net in model.nets])


def ask_at_once(model: TorchModel, store: Store) -> F32:
    """One recording through all networks. → (stems, 1, L)"""
    import torch

    batch = make_batch(store, plain_draw(store, np.zeros(1, np.int64)))
    with torch.inference_mode():
        length = batch.length.to(batch.rows.device)
        h, mask = model.trunk(batch.rows, batch.images, length)
        x = h.view(len(model.nets), -1, h.shape[2]).mT  # (n, T, W)
        ahead, back = lstm_steps(model.lstm, torch.cat([x, x.flip(1)])).chunk(2)
        h = gru_steps(model.gru, torch.cat([ahead, back.flip(1)], 2))
        outputs = model.head(h[None], mask, None)
        proba = composite_proba(tuple(o[0] for o in outputs[:2]), model.head.belongs)
    return proba[:, None].cpu().numpy()


# %% [markdown]
# ## 9 Keras
#
# The third member, of another architecture: a deep branch for the IMU and a light one for ToF and
# THM meet in a BiLSTM and a BiGRU. The network takes rows as they are, NaN where a sensor is silent
# and behind a short recording, and standardises them itself; its answer is one probability per
# composite label. A batch is a function of the step number alone, so a resumed run draws what an
# undisturbed one would have drawn, and one graph is traced for all folds of a mode.

# %%
KERAS_NAME = "cmi"  # registered classes are called cmi>Standardise, …
RETRAIN_KERAS = "Run with FORCE_TRAIN_KERAS=1, or point KERAS_BUNDLE_PATH at a whole bundle."
KERAS_LOCK = threading.RLock()  # traced graphs are shared, so jobs on threads take turns


@functools.cache
def keras_quietly(threads: int) -> tuple[Any, Any]:
    """TensorFlow and Keras, imported once, without their start-up noise. → (tensorflow, keras)

    Memory grows as needed, which must be said before the first operation: Torch may share the card.
    Torch's compiler, triton, must load before TensorFlow: each brings an LLVM, and the later
    triton, which Torch loads with its first optimiser, would end the process.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with silent_stderr():
        with contextlib.suppress(ImportError):
            import triton  # noqa: F401
        import keras
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # somebody else in this process was first
            for card in tf.config.list_physical_devices("GPU"):
                tf.config.experimental.set_memory_growth(card, enable=True)
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(threads)
    if keras.backend.backend() != "tensorflow":
        raise ConfigError(
            f"KERAS_BACKEND={keras.backend.backend()}: training and serving need tensorflow. Unset "
            f"KERAS_BACKEND, or set USE_KERAS=0."
        )
    return tf, keras


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Nothing on the process's standard error: TensorFlow's libraries write there unasked."""
    sys.stderr.flush()
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


@functools.cache
def standardise_class() -> type[Any]:
    """Rows as measured → channels about 0 ± 1 with presence flags, and which rows are real.

    A row is real if something is measured in it or in a later one; the first always is, so
    that no mean is over nothing. A silent channel is 0 after standardisation, and flagged.
    """
    import keras
    from keras import ops

    @keras.saving.register_keras_serializable(KERAS_NAME)
    class Standardise(keras.layers.Layer):
        def __init__(self, groups: Any, **kwargs: Any) -> None:
            super().__init__(**{**kwargs, "dtype": "float32"})
            self.groups = [(str(name), [str(n) for n in names]) for name, names in groups]

        def build(self, input_shape: Any) -> None:
            shape = {"shape": (input_shape[-1],), "trainable": False}
            self.mean = self.add_weight(name="mean", initializer="zeros", **shape)
            self.scale = self.add_weight(name="scale", initializer="ones", **shape)

        def call(self, rows: Any) -> Any:
            """(B, T, C) → 1 or 2 branches (B, T, …), real (B, T, 1)"""
            there = ops.logical_not(ops.isnan(rows))
            z = ops.clip((rows - self.mean) / self.scale, -8.0, 8.0)
            z, there = ops.where(there, z, ops.zeros_like(z)), ops.cast(there, "float32")
            branches: tuple[list[Any], list[Any]] = ([], [])  # IMU; ToF and THM
            i = 0
            for name, channels in self.groups:
                own = slice(i, i := i + len(channels))
                parts = [z[..., own], ops.max(there[..., own], axis=-1, keepdims=True)]
                branches[name.startswith(("thm", "tof"))].extend(parts)
            later = ops.cumsum(ops.flip(ops.max(there, -1, keepdims=True), 1), axis=1)
            first = ops.reshape(ops.arange(rows.shape[1]) == 0, (1, -1, 1))
            real = ops.cast(ops.logical_or(ops.flip(later, axis=1) > 0, first), "float32")
            return [*(ops.concatenate(own, axis=-1) for own in branches if own), real]

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "groups": self.groups}

    return Standardise


def both_ways(x: Any) -> Any:
    """Steps first, forward and backward side by side. (B, T, C) → (T, 2, B, C)"""
    from keras import ops

    x = ops.transpose(x, (1, 0, 2))
    return ops.stack([x, ops.flip(x, 0)], axis=1)


def lstm_step(enter: Any, h: Any, c: Any, kernel: Any) -> tuple[Any, Any]:
    """One step of an LSTM both ways: (2, B, 4 · U), (2, B, U) twice, (2, U, 4 · U) → h, c"""
    from keras import ops

    u = h.shape[-1]
    gates = enter + ops.matmul(h, kernel)  # in, forget, out, new
    taken, kept, told = ops.split(ops.sigmoid(gates[..., : 3 * u]), 3, axis=-1)
    c = kept * c + taken * ops.tanh(gates[..., 3 * u :])
    return told * ops.tanh(c), c


def gru_step(enter: Any, g: Any, kernel: Any) -> Any:
    """One step of a GRU both ways: (2, B, 3 · U), (2, B, U), (2, U, 3 · U) → g"""
    from keras import ops

    u, own = g.shape[-1], ops.matmul(g, kernel)  # (2, B, 3 · U): keep, reset, new
    gates = ops.sigmoid(enter[..., : 2 * u] + own[..., : 2 * u])
    kept, reset = ops.split(gates, 2, axis=-1)
    new = ops.tanh(enter[..., 2 * u :] + reset * own[..., 2 * u :])
    return new + kept * (g - new)


@functools.cache
def recurrent_class() -> type[Any]:
    """An LSTM and a GRU side by side, both ways: (B, T, C), (B, T, 1) → (B, T, 4 · units).

    One loop runs all four. What enters is zero in padding and the GRU has no recurrent bias, so
    a state at rest stays at rest: padding, which comes first on the way back, changes nothing.
    """
    import keras
    from keras import ops

    @keras.saving.register_keras_serializable(KERAS_NAME)
    class BiLstmGru(keras.layers.Layer):
        def __init__(self, units: int, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.units = units

        def build(self, x_shape: Any, real_shape: Any) -> None:  # noqa: ARG002
            u = self.units
            self.kernel = self.add_weight(name="kernel", shape=(2, x_shape[-1], 7 * u))
            self.bias = self.add_weight(name="bias", shape=(2, 1, 7 * u), initializer="zeros")
            self.lstm = self.add_weight(name="lstm_recurrent_kernel", shape=(2, u, 4 * u))
            self.gru = self.add_weight(name="gru_recurrent_kernel", shape=(2, u, 3 * u))

        def call(self, x: Any, real: Any) -> Any:
            x, real = both_ways(x), both_ways(real)
            enter = (ops.matmul(x, self.kernel) + self.bias) * real
            h = c = g = ops.zeros_like(enter[0, ..., : self.units])  # (2, B, U)
            states = []
            for t in range(x.shape[0]):  # unrolled: pooling has left a dozen steps
                h, c = lstm_step(enter[t, ..., : 4 * self.units], h, c, self.lstm)
                g = gru_step(enter[t, ..., 4 * self.units :], g, self.gru)
                states.append(ops.concatenate([h, g], axis=-1))
            out = ops.stack(states) * real  # (T, 2, B, 2 · U)
            out = ops.concatenate([out[:, 0], ops.flip(out[:, 1], 0)], axis=-1)
            return ops.transpose(out, (1, 0, 2))

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "units": self.units}

    return BiLstmGru


@functools.cache
def attention_class() -> type[Any]:
    """Means over real rows, weighed by each head's own score: (B, T, C) → (B, heads · C)."""
    import keras
    from keras import ops

    @keras.saving.register_keras_serializable(KERAS_NAME)
    class AttentionMean(keras.layers.Layer):
        def call(self, x: Any, scores: Any, real: Any) -> Any:
            lowest = float(np.finfo(np.float32).min)  # of the dtype at hand: -1e9 overflows float16
            scores = ops.where(real > 0, ops.cast(scores, "float32"), lowest)  # (B, T, heads)
            weight = ops.cast(ops.softmax(scores, axis=1), x.dtype)
            mean = ops.matmul(ops.transpose(weight, (0, 2, 1)), x)  # (B, heads, C)
            return ops.reshape(mean, (-1, mean.shape[1] * mean.shape[2]))

    return AttentionMean


@functools.cache
def composite_class() -> type[Any]:
    """Both heads in one answer: (B, K), (B, L) logits → (B, L) probabilities.

    A gesture gets the mean of what the heads say; the composite head shares it out.
    """
    import keras
    from keras import ops

    @keras.saving.register_keras_serializable(KERAS_NAME)
    class CompositeProba(keras.layers.Layer):
        def __init__(self, table: Any, **kwargs: Any) -> None:
            super().__init__(**{**kwargs, "dtype": "float32"})
            self.table = [[int(v) for v in row] for row in table]

        def call(self, gesture: Any, composite: Any) -> Any:
            codes = np.array(self.table)[:, 2:]
            belongs = (codes == np.arange(gesture.shape[-1])).astype(np.float32)  # (L, K)
            proba = ops.softmax(composite, axis=-1)
            own = ops.matmul(proba, belongs)  # (B, K)
            gain = (own + ops.softmax(gesture, axis=-1)) / (2 * ops.maximum(own, 1e-12))
            joint = proba * ops.matmul(gain, belongs.T)
            return joint / ops.sum(joint, axis=-1, keepdims=True)

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "table": self.table}

    return CompositeProba


@dataclass(frozen=True, slots=True)
class KerasSpec:
    """What a network is made of: equal specs have equal graphs."""

    groups: tuple[tuple[str, tuple[str, ...]], ...]  # as in Frames
    table: tuple[tuple[int, ...], ...]  # (L, 3) as in Labels
    rows: int  # T
    width: int  # channels of the first block
    dropout: float

    @classmethod
    def read(cls, path: Path) -> KerasSpec:
        """The spec of a saved network, from its JSON alone; no class named there is looked up."""
        try:
            with zipfile.ZipFile(path) as file, file.open("config.json") as text:
                layers = json.loads(text.read(2**24))["config"]["layers"]
            config = {layer["name"]: layer["config"] for layer in layers}
            groups = tuple((name, tuple(names)) for name, names in config["standardise"]["groups"])
            table = tuple(tuple(row) for row in config["proba"]["table"])
            rows, width = config["rows"]["batch_shape"][1], config["imu1_conv1"]["filters"]
            if not (1 <= rows <= 10_000 and 16 <= width <= 1024):
                raise ValueError(f"no network has {rows} rows and {width} channels")
            return cls(groups, table, rows, width, config["dropout"]["rate"])
        except (
            OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError,
            zipfile.BadZipFile, zlib.error,
        ) as error:  # fmt: skip
            raise DataError(
                f"{path} is no network of this pipeline ({error!r}). Delete it, or attach it again."
            ) from None


def residual_block(h: Any, real: Any, name: str, width: int, kernel: int) -> tuple[Any, Any]:
    """Two convolutions with squeeze-and-excitation around a shortcut, then half the rows."""
    from keras import layers

    steps = layers.Reshape((h.shape[1],), name=f"{name}_steps")(real)  # (B, T)

    def convolved(x: Any, n: int) -> Any:
        x = layers.Conv1D(width, kernel, padding="same", use_bias=False, name=f"{name}_conv{n}")(x)
        return layers.BatchNormalization(momentum=0.9, name=f"{name}_norm{n}")(x, mask=steps)

    out = layers.Activation("relu", name=f"{name}_relu1")(convolved(h, 1))
    out = layers.Multiply(name=f"{name}_real1")([out, real])
    out = convolved(out, 2)
    squeezed = layers.GlobalAveragePooling1D(keepdims=True, name=f"{name}_mean")(out, mask=steps)
    squeezed = layers.Dense(width // 8, "relu", name=f"{name}_squeeze")(squeezed)
    gain = layers.Dense(width, "sigmoid", name=f"{name}_excite")(squeezed)
    shortcut = layers.Dense(width, use_bias=False, name=f"{name}_shortcut")(h)
    out = layers.Multiply(name=f"{name}_scaled")([out, gain])
    out = layers.Add(name=f"{name}_add")([out, shortcut])
    out = layers.Activation("relu", name=f"{name}_relu2")(out)
    out = layers.Multiply(name=f"{name}_real2")([out, real])  # not below 0: padding never wins
    pool = layers.MaxPooling1D(2, padding="same", name=f"{name}_pool")
    return pool(out), layers.MaxPooling1D(2, padding="same", name=f"{name}_real")(real)


def keras_network(spec: KerasSpec, policy: str = "float32") -> Any:
    """Rows as measured, NaN where silent, (B, T, C) → composite probabilities (B, L).

    Its layers `gesture` and `composite` give the logits that training looks at, in float32 under
    any policy. The dtype policy is this network's own: the process's is put back.
    """
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        return connect_layers(spec)
    finally:
        keras.config.set_dtype_policy(before)


def connect_layers(spec: KerasSpec) -> Any:
    """The graph of the network: two branches, recurrent layers, attention, two heads."""
    import keras
    from keras import layers

    w = spec.width
    n_channels = sum(len(names) for _, names in spec.groups)
    rows = keras.Input((spec.rows, n_channels), name="rows", dtype="float32")
    *branches, real = standardise_class()(spec.groups, name="standardise")(rows)
    h, left = branches[0], real
    for i, (width, kernel) in enumerate([(w, 3), (2 * w, 5), (2 * w, 5)], start=1):
        h, left = residual_block(h, left, f"imu{i}", width, kernel)
    if len(branches) > 1:
        side, there = branches[1], real
        for i in (1, 2, 3):
            side, there = residual_block(side, there, f"distant{i}", w // 2, 3)
        h = layers.Concatenate(name="joined")([h, side])
    h = layers.Dropout(spec.dropout, name="dropout")(h)
    h = recurrent_class()(w, name="recurrent")(h, left)
    hidden = layers.Dense(w, "tanh", name="attention_hidden")(h)
    scores = layers.Dense(4, name="attention_scores")(hidden)
    h = attention_class()(name="attention")(h, scores, left)
    h = layers.Dropout(spec.dropout, name="dropout_pooled")(h)
    h = layers.Dense(2 * w, "relu", name="dense")(h)
    h = layers.Dropout(spec.dropout, name="dropout_dense")(h)
    gesture = layers.Dense(len(GESTURES), dtype="float32", name="gesture")(h)
    composite = layers.Dense(len(spec.table), dtype="float32", name="composite")(h)
    proba = composite_class()(spec.table, name="proba")(gesture, composite)
    return keras.Model(rows, proba, name="cmi_network")


# %% [markdown]
# Batches are made in the graph by tf.data, from rows that stay end to end. Everything drawn for
# step s, the shuffle of its epoch, stretches, turns and lost sensors, follows from s and the seed.

# %%
VALID_CHUNK = 512  # recordings asked about at once


def keras_batch(n_train: int, cfg: Config) -> int:
    """Recordings a step: at least sixteen steps make an epoch, unless batches became tiny."""
    return min(cfg.keras_batch_size, max(n_train // 16, min(4, n_train)))


def keras_class_weights(gesture: I64, cfg: Config) -> F32:
    """Weight of a recording of each gesture, (K), 1 on average: the rarer, the heavier."""
    count = np.bincount(gesture, minlength=len(GESTURES))
    weight = np.where(count, 1 / np.maximum(count, 1) ** cfg.keras_class_weight, 0)
    return (weight * len(gesture) / (weight * count).sum()).astype(np.float32)


def turn_vectors(tf: Any, x: Any, turn: Any, triples: I64) -> Any:
    """All vectors of a recording, turned alike. (B, T, C), (B, 3) rotation vectors rad"""
    rest = np.setdiff1d(np.arange(x.shape[-1]), triples)
    v = tf.gather(x, triples, axis=2)  # (B, T, V, 3)
    half = tf.clip_by_norm(turn / 2, 0.5, axes=[1])
    w = tf.sqrt(1 - tf.reduce_sum(half**2, axis=1))[:, None, None, None]
    q = tf.broadcast_to(half[:, None, None, :], tf.shape(v))  # quaternion (w, q)
    twice = 2 * tf.linalg.cross(q, v)
    v = v + w * twice + tf.linalg.cross(q, twice)
    flat = tf.reshape(v, (tf.shape(x)[0], x.shape[1], triples.size))
    back = np.argsort(np.concatenate([triples.ravel(), rest]))
    return tf.gather(tf.concat([flat, tf.gather(x, rest, axis=2)], axis=2), back, axis=2)


def lose_sensors(tf: Any, x: Any, chance: Any, names: Sequence[str], share: float) -> Any:
    """Of `share` of the recordings a third each loses ToF, THM, both. (B, T, C), (B) 0 … 1"""
    tof = np.array([n.startswith("tof") for n in names])
    thm = np.array([n.startswith("thm") for n in names])
    chance = chance[:, None, None] / max(share, 1e-9)
    lost = (thm & (chance < 2 / 3)) | (tof & (chance > 1 / 3) & (chance < 1))
    return tf.where(lost, np.float32(np.nan), x)


@dataclass(frozen=True, slots=True, eq=False)
class BatchMaker:
    """Makes the batch of any step in the graph, from flat tensors."""

    tf: Any
    frames: Frames
    cfg: Config
    triples: I64  # (V, 3) columns of vectors
    rows: int  # T
    size: int  # B
    steps: int  # an epoch has
    n_labels: int  # L
    seed: int
    train: Any  # (n) recordings to draw from; all below are tensors
    x: Any  # (R, C)
    start: Any  # (N + 1)
    gesture: Any  # (N)
    composite: Any  # (N)
    weight: Any  # (K)

    def __call__(self, step: Any) -> tuple[Any, dict[str, Any], Any]:
        """Rows (B, T, C), one-hot labels by head, weights (B)."""
        tf, cfg = self.tf, self.cfg
        which = self.which(step)
        speed = 1 + STRETCH * float(cfg.keras_augment) * (2 * self.uniform(1, step) - 1)
        turn = tf.random.stateless_normal((self.size, 3), [self.seed + 2, step])
        batch = self.played(which, speed)
        batch = turn_vectors(tf, batch, TURN * float(cfg.keras_augment) * turn, self.triples)
        lost = self.uniform(3, step)
        batch = lose_sensors(tf, batch, lost, self.frames.names, cfg.modality_dropout_prob)
        gesture, composite = tf.gather(self.gesture, which), tf.gather(self.composite, which)
        heads = {
            "gesture": tf.one_hot(gesture, len(GESTURES)),
            "composite": tf.one_hot(composite, self.n_labels),
        }
        return batch, heads, tf.gather(self.weight, gesture)

    def uniform(self, what: int, step: Any) -> Any:
        return self.tf.random.stateless_uniform([self.size], [self.seed + what, step])

    def which(self, step: Any) -> Any:
        """Recordings of a step: a part of the epoch's shuffle; its front fills up the last one."""
        tf, n = self.tf, len(self.train)
        order = tf.argsort(tf.random.stateless_uniform([n], [self.seed, step // self.steps]))
        place = (step % self.steps) * self.size + tf.range(self.size, dtype=tf.int64)
        return tf.gather(self.train, tf.gather(order, place % n))

    def played(self, which: Any, speed: Any) -> Any:
        """Last rows of recordings played faster or slower, NaN behind. (B), (B) → (B, T, C)"""
        tf = self.tf
        first, last = tf.gather(self.start, which), tf.gather(self.start, which + 1) - 1
        first, last, speed = first[:, None], last[:, None], speed[:, None]
        length = tf.cast(tf.cast(last - first + 1, tf.float32) / speed, tf.int64)
        length = tf.clip_by_value(length, 1, self.rows)
        t = tf.range(self.rows, dtype=tf.int64)[None, :]
        back = tf.cast(tf.round(tf.cast(length - 1 - t, tf.float32) * speed), tf.int64)
        row = tf.clip_by_value(last - back, first, last)
        return tf.where((t < length)[..., None], tf.gather(self.x, row), np.float32(np.nan))


def keras_batches(run: KerasRun, steps: range) -> Any:
    """A tf.data set of the training batches of these steps."""
    tf, _ = keras_quietly(run.cfg.keras_threads)
    job, labels, cfg = run.job, run.labels, run.cfg
    arrays = (
        job.train, run.frames.x, run.frames.start, labels.gesture, labels.composite,
        keras_class_weights(labels.gesture[job.train], cfg),
    )  # fmt: skip
    with tf.device("/CPU:0"):
        tensors = [tf.constant(array) for array in arrays]
    seed = int(job.rng(cfg, "batches").integers(2**30))
    make = BatchMaker(
        tf, run.frames, cfg, vector_triples(run.frames.names), run.spec.rows, run.size, run.steps,
        len(labels.table), seed, *tensors,
    )  # fmt: skip
    numbers_of_steps = tf.data.Dataset.range(steps.start, steps.stop)
    as_it_is = tf.autograph.experimental.do_not_convert(make.__call__)  # reads no source
    return numbers_of_steps.map(as_it_is, num_parallel_calls=cfg.keras_threads).prefetch(2)


def padded_rows(frames: Frames, which: I64, rows: int) -> F32:
    """The last rows of some recordings, NaN behind short ones. → (B, T, C)"""
    first, length = last_rows(frames.start, rows)
    t = np.arange(rows)
    row = first[which, None] + np.minimum(t, length[which, None] - 1)  # (B, T)
    return np.where((t < length[which, None])[..., None], frames.x[row], np.float32(np.nan))


def ask_in_chunks(ask: Callable[[F32], Any], frames: Frames, which: I64, rows: int) -> F32:
    """Answers of a compiled function, chunk by chunk. → (…, len(which), L)"""
    chunks = [which[i : i + VALID_CHUNK] for i in range(0, len(which), VALID_CHUNK)]
    answers = [np.asarray(ask(padded_rows(frames, chunk, rows))) for chunk in chunks]
    return np.concatenate(answers, axis=-2).astype(np.float32)


# %% [markdown]
# Training. One trainer, that is one traced graph, serves all folds of a mode: a fold only sets its
# variables anew. After every epoch all that the next one depends on is saved in one file.


# %%
@dataclass(frozen=True, slots=True, eq=False)
class KerasTrainer:
    """A network and one compiled step of its training."""

    network: Any  # rows → composite probabilities
    model: Any  # rows → logits of both heads: the same layers, with the optimiser
    step: Callable[..., Any]  # batch, targets by head, weights → loss, accuracy
    initial: dict[str, Any]  # values before the first step

    @property
    def variables(self) -> dict[str, Any]:
        """Everything that training changes, by path, but for the noise of dropout."""
        return {v.path: v for v in (*self.network.weights, *self.model.optimizer.variables)}

    def values(self) -> dict[str, Any]:
        return {path: variable.value.numpy() for path, variable in self.variables.items()}

    def restore(self, values: Mapping[str, Any]) -> None:
        variables = self.variables
        for path, value in values.items():
            variables[path].assign(value)

    def begin(self, rng: np.random.Generator, lr: float, mean: F32, scale: F32) -> None:
        """Back to before the first step, with kernels of this fold's own."""
        self.restore(self.initial)
        for variable in self.network.trainable_variables:
            if variable.name.endswith("kernel"):
                fan = float(np.prod(variable.shape[:-1]) + variable.shape[-1])
                reach = (6 / fan) ** 0.5
                variable.assign(rng.uniform(-reach, reach, variable.shape).astype(np.float32))
        self.network.get_layer("standardise").set_weights([mean, scale])
        self.model.optimizer.learning_rate = lr

    def set_noise(self, seed: int, epoch: int) -> None:
        """Dropout of an epoch follows from its number, whatever ran before."""
        noisy = [layer for layer in self.network.layers if hasattr(layer, "seed_generator")]
        for i, layer in enumerate(noisy):
            layer.seed_generator.state.assign([seed + i, epoch << 16])


@functools.lru_cache(maxsize=1)
def keras_trainer(
    spec: KerasSpec, policy: str, accumulate: int, smoothing: float, decay: float, jit: bool
) -> KerasTrainer:
    """Network, optimiser and step; the next fold of the same mode gets the same object."""
    import keras
    import tensorflow as tf

    network = keras_network(spec, policy)
    heads = {name: network.get_layer(name).output for name in ("gesture", "composite")}
    model = keras.Model(network.input, heads, name="heads")
    optimizer = keras.optimizers.AdamW(
        weight_decay=decay, global_clipnorm=1.0, name="adamw",
        gradient_accumulation_steps=accumulate if accumulate > 1 else None,
    )  # fmt: skip
    if policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, name="scaled")
    optimizer.build(model.trainable_variables)
    model.compile(optimizer)
    entropy = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)

    @functools.partial(tf.function, jit_compile=jit, reduce_retracing=True, autograph=False)
    def step(batch: Any, targets: Any, weight: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = model(batch, training=True)
            loss = sum(entropy(targets[name], logits[name], weight) for name in heads)
            scaled = optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        right = tf.argmax(targets["gesture"], 1) == tf.argmax(logits["gesture"], 1)
        return tf.stack([loss, tf.reduce_mean(tf.cast(right, tf.float32))])

    trainer = KerasTrainer(network, model, step, {})
    trainer.initial.update(trainer.values())
    return trainer


@functools.lru_cache(maxsize=2)
def keras_graph(spec: KerasSpec, jit: bool) -> tuple[Any, Any]:
    """A float32 network, and a compiled function of any such network's values and rows.

    Traced once for all folds: judging, filling out-of-fold rows and serving share it.
    """
    import tensorflow as tf

    network = keras_network(spec)
    n, values = len(network.trainable_variables), values_of(network)
    held = [tf.TensorSpec(v.shape, v.dtype) for v in values]
    signature = [held, tf.TensorSpec(network.input.shape)]

    @functools.partial(tf.function, input_signature=signature, jit_compile=jit, autograph=False)
    def answer(values: list[Any], rows: Any) -> Any:  # (B, T, C) → (B, L)
        return network.stateless_call(values[:n], values[n:], rows, training=False)[0]

    return network, answer


def values_of(network: Any) -> list[Any]:
    """Copies of all its values, in the order that keras_graph expects."""
    import tensorflow as tf

    variables = (*network.trainable_variables, *network.non_trainable_variables)
    return [tf.identity(v.value) for v in variables]


def compiled(spec: KerasSpec, networks: Sequence[list[Any]], jit: bool) -> Callable[[F32], Any]:
    """One function of fixed signature for several networks' values: (B, T, C) → (S, B, L)."""
    import tensorflow as tf

    network, answer = keras_graph(spec, jit)
    shape = tf.TensorSpec(network.input.shape, tf.float32)

    @functools.partial(tf.function, input_signature=[shape], jit_compile=jit, autograph=False)
    def ask(rows: Any) -> Any:
        return tf.stack([answer(values, rows) for values in networks])

    ask.get_concrete_function()  # traced here, under the caller's lock
    return ask


def dtype_policy(cfg: Config) -> str:
    """KERAS_POLICY, else half precision where a card has units for it, else float32."""
    if cfg.keras_policy:
        return cfg.keras_policy
    tf, _ = keras_quietly(cfg.keras_threads)
    cards = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(card) for card in cards]
    able = [d.get("compute_capability", (0, 0)) >= (7, 0) for d in details]
    return "mixed_float16" if cfg.keras_mp and able and all(able) else "float32"


def checkpoint_settings(job: Job, cfg: Config) -> dict[str, Any]:
    """What must be as before for a checkpoint to count, by name."""
    settings = {name.upper(): value for name, value in cfg.shaping("keras").items()}
    rows = {"training rows": digest(job.train), "validation rows": digest(job.valid)}
    return settings | rows | {"form of the files": MEMBERS["keras"].form}


def keras_checkpoint(job: Job) -> Path:
    """Where a training in progress is kept."""
    return job.scratch / f"{job.stem}.npz"


def read_checkpoint(job: Job, cfg: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint notes, and its arrays; both empty if there is none, or none is wanted."""
    path = keras_checkpoint(job)
    if not (path.exists() and cfg.resume and cfg.resume_keras):
        return {}, {}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        return json.loads(str(arrays.pop("note"))), arrays
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). Delete it to train from the start."
        ) from None


def keras_resumable(job: Job, cfg: Config) -> str | None:
    """For the plan: where a training can be resumed, or why it cannot; None if there is none."""
    try:
        note, _ = read_checkpoint(job, cfg)
    except ValueError:
        return f"{keras_checkpoint(job).name} is damaged"
    if not note:
        return None
    other = difference(checkpoint_settings(job, cfg), note["settings"])
    at = f"resumable at epoch {len(note['history'])} of {cfg.keras_max_epochs}"
    return f"not resumable, {other}" if other else at


@dataclass(slots=True, eq=False)
class KerasRun:
    """One job on its way: all that a checkpoint holds, and how it is trained."""

    job: Job
    spec: KerasSpec
    frames: Frames
    labels: Labels
    cfg: Config
    size: int  # recordings of a micro-batch
    accumulate: int = 1  # micro-batches of an optimiser step
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)

    @property
    def trainer(self) -> KerasTrainer:
        cfg = self.cfg
        return keras_trainer(
            self.spec, dtype_policy(cfg), self.accumulate,
            cfg.keras_label_smoothing, cfg.keras_weight_decay, cfg.keras_jit,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """Micro-batches of an epoch, a multiple of `accumulate`."""
        return -(-len(self.job.train) // (self.size * self.accumulate)) * self.accumulate

    @property
    def best(self) -> int:
        """Epoch of the lowest validation loss, from 0."""
        return int(np.argmin([epoch["val_loss"] for epoch in self.history]))

    def best_weights(self, number: str) -> Path:
        return self.job.scratch / f"{self.job.stem}_best{number}.weights.h5"

    @property
    def settings(self) -> dict[str, Any]:
        """What must be as before: settings and rows, what the rows hold, and the machine's precision."""
        held = digest(list(self.frames.names), self.frames.start, self.frames.x)
        learnt = digest(self.labels.table, self.labels.composite)
        own = {"input": held, "labels": learnt, "precision": dtype_policy(self.cfg)}
        return checkpoint_settings(self.job, self.cfg) | own

    def take_up(self) -> None:
        """Learn from the checkpoint how far this job has come; nothing, if it does not fit."""
        note: dict[str, Any] = {}
        other = ""
        try:
            note, _ = read_checkpoint(self.job, self.cfg)
            other = difference(self.settings, note["settings"]) if note else ""
        except ValueError as error:
            other = str(error)
        if other:
            log("refused", job=self.job.name, checkpoint=other)
        if not note or other:
            self.clear()
            return
        self.history, self.size, self.accumulate = note["history"], note["size"], note["accumulate"]
        log("resume", job=self.job.name, epoch=len(self.history))

    def begin(self) -> Any:
        """Variables and callbacks as they are before the next epoch; returns the callbacks."""
        job, cfg, trainer = self.job, self.cfg, self.trainer
        mean, scale = standardisation(self.frames, job.train)
        trainer.begin(job.rng(cfg, "kernels"), cfg.keras_lr, mean, scale)
        callbacks = keras_callbacks(self)
        if self.history:  # of this run, or resumed: RESUME was asked before
            note, values = read_checkpoint(
                job, dataclasses.replace(cfg, resume=True, resume_keras=True)
            )
            own = {p: v for p, v in values.items() if not p.endswith("gradient_accumulator")}
            for path in (p for p in own if p.endswith("/iteration")):  # counts micro-batches
                own[path] = own[path] * self.accumulate // note["accumulate"]
            trainer.restore(own)
        return callbacks

    def save(self) -> None:
        """One file with everything, then remove weights that are no longer the best."""
        note = {
            "settings": self.settings, "history": self.history,
            "size": self.size, "accumulate": self.accumulate,
        }  # fmt: skip
        content = io.BytesIO()
        np.savez(content, note=np.array(json.dumps(note)), **self.trainer.values())
        write_whole(keras_checkpoint(self.job), content.getvalue())
        for old in self.job.scratch.glob(self.best_weights("*").name):
            if old != self.best_weights(f"{self.best + 1:03d}"):
                old.unlink()

    def clear(self) -> None:
        """Nothing of a finished job stays behind."""
        keras_checkpoint(self.job).unlink(missing_ok=True)
        for old in self.job.scratch.glob(self.best_weights("*").name):
            old.unlink()


def cosine_rate(epoch: int, *_: float, cfg: Config) -> float:
    """Learning rate of an epoch: from KERAS_LR towards zero over KERAS_MAX_EPOCHS."""
    return float(cfg.keras_lr * (1 + np.cos(np.pi * epoch / cfg.keras_max_epochs)) / 2)


def keras_callbacks(run: KerasRun) -> Any:
    """Keras's own callbacks, brought to where the history of this run has come.

    They are told of the epochs again, so that none of their inner state has to be stored.
    """
    import keras

    cfg, job, c = run.cfg, run.job, keras.callbacks
    floor = min((epoch["val_loss"] for epoch in run.history), default=None)
    told: list[Any] = [c.CSVLogger(str(job.folder / f"{job.stem}_train.csv"))]
    if cfg.keras_rlr_patience:
        told.append(c.ReduceLROnPlateau("val_loss", 0.5, cfg.keras_rlr_patience, min_lr=1e-6))
    else:
        told.append(c.LearningRateScheduler(functools.partial(cosine_rate, cfg=cfg)))
    keeper: list[Any] = []
    if cfg.keras_es_patience:
        told.append(c.EarlyStopping("val_loss", patience=cfg.keras_es_patience))
        keeper.append(
            c.ModelCheckpoint(
                str(run.best_weights("{epoch:03d}")), "val_loss", save_best_only=True,
                save_weights_only=True, initial_value_threshold=floor,
            )
        )  # fmt: skip
    listed = c.CallbackList([*told, *keeper], model=run.trainer.model)
    run.trainer.model.stop_training = False
    listed.on_train_begin()
    for epoch, logs in enumerate(run.history):
        for callback in told:
            callback.on_epoch_end(epoch, dict(logs))
    return listed


def train_epoch(
    run: KerasRun, batches: Iterator[Any], epoch: int, progress: Progress
) -> dict[str, float]:
    """All steps of one epoch; loss and accuracy over them."""
    cfg, told = run.cfg, []
    for _ in range(run.steps):
        told.append(run.trainer.step(*next(batches)))
        progress.step(1, lambda: {"epoch": epoch + 1, "loss": float(told[-1][0])})
    loss, acc = np.mean(told, axis=0)
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"The loss of {run.job.folder.name}/{run.job.stem} is {loss} in epoch {epoch + 1}. Set "
            f"KERAS_MP=0 or a KERAS_LR below {cfg.keras_lr}."
        )
    return {"loss": float(loss), "acc": float(acc)}


def judge(run: KerasRun) -> dict[str, float]:
    """Loss, accuracy and the competition's score of the validation rows."""
    job, labels = run.job, run.labels
    values = values_of(run.trainer.network)
    _, answer = keras_graph(run.spec, run.cfg.keras_jit)
    proba = ask_in_chunks(functools.partial(answer, values), run.frames, job.valid, run.spec.rows)
    by_gesture, truth = gesture_proba(proba, labels.table), labels.gesture[job.valid]
    right = by_gesture[np.arange(len(truth)), truth]
    answer = by_gesture.argmax(axis=1)
    return {
        "val_loss": float(-np.log(np.maximum(right, 1e-7)).mean()),
        "val_acc": float((answer == truth).mean()),
        "score": score(truth, answer),
    }


def train_keras(run: KerasRun) -> None:
    """Epoch after epoch until a callback or a setting says stop; `run.history` grows."""
    cfg, job, model = run.cfg, run.job, run.trainer.model
    callbacks = run.begin()
    steps = range(len(run.history) * run.steps, cfg.keras_max_epochs * run.steps)
    batches = iter(keras_batches(run, steps))
    noise = int(job.rng(cfg, "noise").integers(2**30))
    total = cfg.keras_max_epochs * run.steps
    with Progress(
        "steps", total, cfg.print_every_steps, cfg, steps.start, job=job.name
    ) as progress:
        while len(run.history) < cfg.keras_max_epochs and not model.stop_training:
            epoch, began = len(run.history), time.monotonic()
            run.trainer.set_noise(noise, epoch)
            callbacks.on_epoch_begin(epoch)
            lr = {"lr": float(model.optimizer.learning_rate.value.numpy())}
            run.history.append(train_epoch(run, batches, epoch, progress) | judge(run) | lr)
            callbacks.on_epoch_end(epoch, dict(run.history[-1]))
            run.save()
            note_keras_epoch(run, time.monotonic() - began)
    callbacks.on_train_end()


def note_keras_epoch(run: KerasRun, secs: float) -> None:
    """One line of logs/keras_progress.jsonl, and one on the screen."""
    job, epoch = run.job, run.history[-1]
    where = {"fold": job.fold, "mode": job.mode, "seed": job.seed, "epoch": len(run.history)}
    since = {"time_from_start_sec": round(time.monotonic() - STARTED, 1)}
    append_jsonl(job.logs / "keras_progress.jsonl", run.cfg, **where, **since, **epoch)
    log("epoch", job=job.name, n=len(run.history), **epoch, secs=secs)


def fit_keras(job: Job, frames: Frames, labels: Labels, cfg: Config) -> dict[str, Any]:
    """Train one fold and write {stem}.keras; goes on from a checkpoint that fits."""
    with KERAS_LOCK:
        tf, _ = keras_quietly(cfg.keras_threads)
        for folder in (job.folder, job.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        table = tuple(tuple(row) for row in labels.table.tolist())
        rows = pad_length(frames, cfg)
        spec = KerasSpec(frames.groups, table, rows, cfg.keras_width, cfg.keras_dropout)
        run = KerasRun(job, spec, frames, labels, cfg, keras_batch(len(job.train), cfg))
        run.take_up()
        asked, policy = cfg.keras_batch_size, dtype_policy(cfg)
        log("batch", job=job.name, asked=asked, size=run.size, steps=run.steps, policy=policy)
        while True:
            try:
                train_keras(run)
                return finish_keras(run)
            except tf.errors.ResourceExhaustedError:
                if run.size == 1:
                    raise
                run.size, run.accumulate = -(-run.size // 2), 2 * run.accumulate
                log("memory", job=job.name, micro_batch=run.size, accumulate=run.accumulate)


def finish_keras(run: KerasRun) -> dict[str, Any]:
    """Write the network with its best weights, or its last if their number is fixed, in float32."""
    job, trainer = run.job, run.trainer
    best = len(run.history) - 1
    if run.cfg.keras_es_patience:
        best = run.best
        trainer.model.load_weights(str(run.best_weights(f"{best + 1:03d}")))
    network = keras_network(run.spec)
    network.set_weights(trainer.network.get_weights())
    partial = job.scratch / f".{job.stem}.{os.getpid()}.part.keras"
    network.save(partial)
    write_whole(job.folder / f"{job.stem}.keras", partial.read_bytes())
    partial.unlink()
    run.clear()
    epochs = {"epochs": len(run.history), "best_epoch": best + 1, "batch": run.size}
    return epochs | run.history[best]


# %% [markdown]
# Serving. The networks of all folds are called in one compiled function; `.keras` files give
# numbers only, the layers are built here. Any Keras can read such a file in safe mode as well.


# %%
@dataclass(frozen=True, slots=True, eq=False)
class KerasEnsemble:
    """All networks of a mode behind one compiled function."""

    ask: Callable[[F32], Any]  # (B, T, C) → (stems, B, L)
    names: tuple[str, ...]  # channels it expects
    rows: int  # T


def load_keras(folder: Path, stems: Sequence[str], table: I64, cfg: Config) -> KerasEnsemble:
    """The networks of some stems, checked against one another and against the label table."""
    specs = {stem: KerasSpec.read(folder / f"{stem}.keras") for stem in stems}
    spec = specs[stems[0]]
    for stem, other in specs.items():
        if other != spec:
            raise DataError(f"{folder}: {stem} is built unlike {stems[0]}. {RETRAIN_KERAS}")
    if not np.array_equal(np.array(spec.table), table):
        raise DataError(f"{folder}: its networks answer with other labels. {RETRAIN_KERAS}")
    with KERAS_LOCK:
        keras_quietly(cfg.keras_threads)
        network, _ = keras_graph(spec, cfg.keras_jit)
        values = []
        for stem in stems:
            try:
                network.load_weights(folder / f"{stem}.keras")
            except (OSError, LookupError, TypeError, ValueError, zipfile.BadZipFile) as error:
                raise DataError(
                    f"{folder / stem}.keras holds other weights than its network has "
                    f"({error!s:.200}). {RETRAIN_KERAS}"
                ) from None
            values.append(values_of(network))
        ask = compiled(spec, values, cfg.keras_jit)
    return KerasEnsemble(ask, tuple(n for _, names in spec.groups for n in names), spec.rows)


def predict_keras(model: KerasEnsemble, frames: Frames) -> F32:
    """Probabilities of every network for each recording. → (stems, N, L)"""
    if frames.names != model.names:
        odd = sorted(set(frames.names) ^ set(model.names))
        raise ValueError(f"Keras was trained on other channels ({odd[:5]}). {RETRAIN_KERAS}")
    return ask_in_chunks(model.ask, frames, np.arange(len(frames)), model.rows)


# %% [markdown]
# ## 10 Members, plan and training
#
# A member is a few functions joined under a name in MEMBERS; plan, blend and serving know no member
# by name. The plan compares what lies on disk with what would be trained now, model by
# model, and says what will happen and why. A model whose fingerprint differs is never used.


# %%
class Inputs:
    """What members learn from: table and frames of the same recordings, made when first asked for.

    With settings, as in training, progress is told and large frames are mapped from disk. A pair is
    made in one pass, where both are going to be asked for.
    """

    def __init__(self, rec: Recordings, cfg: Config | None = None, *, pair: bool = False) -> None:
        self.rec = rec
        self.cfg = cfg
        self.pair = pair

    def described(self, *, table: bool = True, frames: bool = True) -> tuple[Table, Frames]:
        told = None
        if self.cfg:
            told = Progress("features", len(self.rec), self.cfg.feature_log_every, self.cfg)
        with stage("features", self.cfg):
            return describe(self.rec, told=told, table=table, frames=frames)

    @functools.cached_property
    def both(self) -> tuple[Table, Frames]:
        table, frames = self.described()
        return table, self.kept(frames)

    @functools.cached_property
    def table(self) -> Table:
        return self.both[0] if self.pair else self.described(frames=False)[0]

    @functools.cached_property
    def frames(self) -> Frames:
        return self.both[1] if self.pair else self.kept(self.described(table=False)[1])

    @functools.cached_property
    def blind(self) -> Inputs:
        """The same recordings, as if none had a rotation."""
        rot = np.full_like(self.rec.rot, np.nan)
        return Inputs(dataclasses.replace(self.rec, rot=rot), self.cfg)

    def kept(self, frames: Frames) -> Frames:
        """The same frames; where settings ask for it, mapped from disk."""
        if self.cfg is None:
            return frames
        if self.cfg.frame_cache and frames.x.nbytes <= self.cfg.frame_cache_max_mb * 2**20:
            return frames
        path = self.cfg.checkpoints / "cache" / "frames.npy"
        write_array(path, frames.x)
        log("frames", mb=frames.x.nbytes / 2**20, mapped_from=path)
        return dataclasses.replace(frames, x=np.load(path, mmap_mode="r", allow_pickle=False))


def table_of(inputs: Inputs, mode: str) -> Table:
    """The features that a mode may see."""
    return inputs.blind.table if mode == BLIND else inputs.table.of_mode(mode)


def frames_of(inputs: Inputs, mode: str) -> Frames:
    """The channels that a mode may see."""
    return inputs.frames.of_mode(mode)


def nothing_to_resume(job: Job, cfg: Config) -> str | None:
    """Members that keep no checkpoint begin again."""
    return None


def one_by_one(job: Job, cfg: Config) -> int:
    """Members that use all cores themselves run one job at a time."""
    return 1


def nothing_to_summarise(models: Mapping[str, Sequence[Path]], out: Path) -> None:
    """Most members have no summary over folds."""


@dataclass(frozen=True, slots=True)
class Member:
    """How one kind of model is fed, trained, loaded and asked."""

    packages: tuple[str, ...]  # without these it cannot take part
    files: tuple[str, ...]  # what fit writes for each fold, after the stem
    prepare: Callable[[Inputs, str], Any]  # input in a mode
    fit: Callable[[Job, Any, Labels, Config], dict[str, Any]]
    load: Callable[[Path, Sequence[str], I64, Config], Any]  # folder, stems, label table
    predict: Callable[[Any, Any], F32]  # → (stems, N, L)
    default_weight: float  # in the blend, when there are no out-of-fold rows
    modes: tuple[str, ...] = MODES
    form: int = 1  # raise it when what fit writes changes: older models are then trained again
    resumable: Callable[[Job, Config], str | None] = nothing_to_resume  # "resumable …", or why not
    side_by_side: Callable[[Job, Config], int] = one_by_one  # jobs that should run at once
    summarise: Callable[[Mapping[str, Sequence[Path]], Path], None] = nothing_to_summarise


MEMBERS = {
    "lgbm": Member(
        ("lightgbm",), (".txt", "_orientation.txt", "_behavior.txt"),
        table_of, fit_lgbm, load_lgbm, predict_lgbm, 0.20, ROUTES, summarise=summarise_lgbm,
    ),
    "torch": Member(
        ("torch",), (".pt",), frames_of, fit_torch, load_torch, predict_torch, 0.45,
        resumable=torch_resumable, side_by_side=torch_side_by_side,
    ),
    "keras": Member(
        ("keras", "tensorflow"), (".keras",),
        frames_of, fit_keras, load_keras, predict_keras, 0.35, resumable=keras_resumable,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """The training data as every job sees it."""

    inputs: Inputs  # canonical recordings
    labels: Labels
    fold: I64  # (N)
    mark: str  # digest of the recordings
    turned: str  # digest of which of them were turned back
    wearer: dict[str, Any] | None  # the model that tells a device worn upside down

    def jobs(self, member: str, mode: str, cfg: Config) -> list[Job]:
        """One job per seed and fold."""
        seeds = getattr(cfg, f"{member}_seeds", 1)
        return [
            Job(
                member, mode, seed, k, np.flatnonzero(self.fold != k), np.flatnonzero(self.fold == k),
                cfg.out / f"{member}_models" / mode, cfg.checkpoints / member / mode, cfg.out / "logs",
            )
            for seed in range(seeds)
            for k in range(cfg.n_folds)
        ]  # fmt: skip


@functools.lru_cache(maxsize=16)
def probe(study: Study, member: str, mode: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Columns of a member's input, and rough figures of the first recording that hold on any machine.

    The figures tell a feature that was changed under its old name from one that was not.
    """
    x = MEMBERS[member].prepare(Inputs(study.inputs.rec.part(0, 1)), mode)
    means = np.nan_to_num(x.x, nan=-999.0).mean(axis=0, dtype=np.float64)
    return x.names, tuple(float(f"{v:.5g}") for v in means)


def fingerprint(job: Job, study: Study, cfg: Config) -> dict[str, Any]:
    """Everything on which the trained model of a job depends, by name, so that a difference has one."""
    versions = {p: package_version(p).split(".")[0] for p in MEMBERS[job.member].packages}
    return {
        "form of the files": MEMBERS[job.member].form,
        "data": study.mark,
        "turned": study.turned,
        "labels": digest(study.labels.table),
        "training rows": digest(study.inputs.rec.sequence_id[job.train]),
        "columns": digest(list(probe(study, job.member, job.mode)[0])),
        **{f"major version of {name}": version for name, version in versions.items()},
        **{name.upper(): jsonable(value) for name, value in cfg.shaping(job.member).items()},
    }


def jsonable(value: object) -> Any:
    """Paths as text, all else as it is."""
    return str(value) if isinstance(value, Path) else value


def package_version(name: str) -> str:
    """Installed version, without importing the package; empty if it is not installed."""
    from importlib import metadata

    distributions = {"tensorflow": ("tensorflow", "tensorflow-cpu", "tf-nightly")}
    for distribution in distributions.get(name, (name,)):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    return ""


def difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> str:
    """The first entries in which two fingerprints differ, in words; empty if they agree."""
    keys = [k for k in now if k not in then or now[k] != then[k]]
    texts = [
        f"{k} {then.get(k, 'absent')} → {now[k]}"
        if k.isupper() or "version" in k or k == "precision"
        else f"{k} differ"
        for k in keys
    ]
    return ", ".join(texts[:3])


def why_not_reusable(job: Job, folder: Path, study: Study, cfg: Config) -> str:
    """Why the model of a job in `folder` does not count; empty if it does."""
    note = folder / f"{job.stem}.json"
    if not note.exists():
        return "none yet"
    try:
        then = read_json(note)
        other = difference(fingerprint(job, study, cfg), then["fingerprint"])
        if other:
            return other
        figures = probe(study, job.member, job.mode)[1]
        close = np.allclose(figures, then["probe"], rtol=1e-2, atol=1e-3)
        spoilt = spoilt_file(folder, job.stem, MEMBERS[job.member].files)
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        return f"{note.name} cannot be used ({error})"
    if not close:
        return "its input is computed in another way now"
    return f"{spoilt} is absent or was changed after training" if spoilt else ""


@dataclass(frozen=True, slots=True)
class Step:
    """What will happen to one member in one mode."""

    member: str
    mode: str
    action: str  # reuse | resume | train | skip
    why: str
    folder: Path  # where its models lie, or will lie
    jobs: tuple[Job, ...]
    todo: tuple[Job, ...]  # those to be trained
    secs: float  # that its training took last time; NaN if unknown


def make_plan(study: Study, cfg: Config) -> list[Step]:
    """One step per member and mode."""
    pairs = [(name, mode) for name, member in MEMBERS.items() for mode in member.modes]
    return [plan_step(*pair, study, cfg) for pair in pairs]


def plan_step(member: str, mode: str, study: Study, cfg: Config) -> Step:
    """Reuse what fits entirely, wherever it lies; else train what is missing in our own folder."""
    jobs = tuple(study.jobs(member, mode, cfg))
    own = jobs[0].folder
    step = Step(member, mode, "train", "none yet", own, jobs, jobs, last_secs(own, jobs))
    absent = why_absent(member, cfg)
    if absent:
        return dataclasses.replace(step, action="skip", why=absent, todo=())
    if getattr(cfg, f"force_train_{member}"):
        return dataclasses.replace(step, why=f"FORCE_TRAIN_{member.upper()}=1")
    unfit = {}
    for folder in (bundle / mode for bundle in bundle_folders(member, cfg)):
        unfit[folder] = {j: w for j in jobs if (w := why_not_reusable(j, folder, study, cfg))}
        if not unfit[folder]:
            step = dataclasses.replace(step, folder=folder, secs=last_secs(folder, jobs))
            return dataclasses.replace(step, action="reuse", why="everything matches", todo=())
    first = next(iter(unfit.values()))  # of the named bundle, or of our own folder
    why = collections.Counter(first.values()).most_common(1)[0][0]
    if not (cfg.resume and getattr(cfg, f"resume_{member}", True)):
        return dataclasses.replace(step, why=f"{why}; RESUME=0")
    todo = tuple(unfit[own])
    begun = [note for j in todo if (note := MEMBERS[member].resumable(j, cfg))]
    resumes = len(todo) < len(jobs) or any(note.startswith("resumable") for note in begun)
    words = "; ".join([why, *begun[:1]])
    return dataclasses.replace(step, action="resume" if resumes else "train", why=words, todo=todo)


def why_absent(member: str, cfg: Config) -> str:
    """Why a member takes no part; empty if it does. A missing package can be an error by setting."""
    if not cfg.uses(member):
        return f"USE_{member.upper()}=0"
    missing = [p for p in MEMBERS[member].packages if not package_version(p)]
    if missing and getattr(cfg, f"fail_if_{member}_missing", False):
        raise ConfigError(
            f"{missing[0]} is not installed and FAIL_IF_{member.upper()}_MISSING=1. Install it, or set "
            f"USE_{member.upper()}=0."
        )
    return f"{missing[0]} is not installed" if missing else ""


def bundle_folders(member: str, cfg: Config) -> list[Path]:
    """Where models of a member may lie: the named bundle alone, else ours and attached ones."""
    named: Path | None = getattr(cfg, f"{member}_bundle_path")
    if named is None:
        attached = sorted(KAGGLE_INPUT.glob(f"**/{member}_models/bundle.json"))
        return [cfg.out / f"{member}_models", *(path.parent for path in attached)]
    folder = named.parent if named.name == "bundle.json" else named
    if not (folder / "bundle.json").is_file():
        raise ConfigError(
            f"{member.upper()}_BUNDLE_PATH={named}: looked for {folder / 'bundle.json'}, which does not exist. "
            f"Name a folder written by an earlier run, such as …/{member}_models."
        )
    return [folder, cfg.out / f"{member}_models"]


def last_secs(folder: Path, jobs: Sequence[Job]) -> float:
    """Seconds that the models of `jobs` in `folder` took to train; NaN where none tells."""
    paths = [path for job in jobs if (path := folder / job.note.name).is_file()]
    try:
        notes = [float(read_json(path)["secs"]) for path in paths]
    except (LookupError, TypeError, ValueError):  # the plan says which note is damaged
        notes = []
    return sum(notes) if notes else float("nan")


def print_plan(plan: Sequence[Step], cfg: Config) -> None:
    """The plan, a line each."""
    for s in plan:
        models = f"{len(s.jobs) - len(s.todo)}/{len(s.jobs)}" if s.action != "skip" else "0"
        log("plan", member=f"{s.member:<6}", mode=s.mode, action=f"{s.action:<6}", models=models,
            why=s.why, path=s.folder, last_secs=s.secs)  # fmt: skip
    weights = cfg.out / "ensemble" / "weights.json"
    log(
        "plan",
        what="ensemble",
        action="build",
        why="weights follow the out-of-fold rows",
        path=weights,
    )


# %% [markdown]
# ### Training
#
# For each (member, mode, seed, fold): fit if the plan says so, then always fill the out-of-fold
# rows, a reused model its own validation rows as well. They start as NaN and must end without
# one: a recording that no fold scored cannot slip through.


# %%
def run_job(job: Job, study: Study, cfg: Config) -> None:
    """Train one model and write its note last."""
    member, began = MEMBERS[job.member], time.monotonic()
    log("fit", job=job.name, train=len(job.train), valid=len(job.valid))
    job.note.unlink(missing_ok=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    x = member.prepare(study.inputs, job.mode)
    info = member.fit(job, x, study.labels, cfg)
    files = {end: digest((job.folder / f"{job.stem}{end}").read_bytes()) for end in member.files}
    secs = round(time.monotonic() - began, 1)
    mark = {
        "fingerprint": fingerprint(job, study, cfg),
        "probe": probe(study, job.member, job.mode)[1],
    }
    write_json(job.note, mark | {"files": files, "secs": secs, "info": info})


LOST_WORKERS = 3  # so many times a run survives the death of workers


def run_jobs(jobs: Sequence[Job], study: Study, cfg: Config) -> None:
    """Train all, one after the other or side by side; each result is on disk as soon as it is made.

    A worker that dies (no memory left, machine gone) takes no result along: what is not on disk is
    trained again. An error of the training itself is raised at once.
    """
    if not jobs:
        return
    member = MEMBERS[jobs[0].member]
    at_once = jobs_at_once(jobs, cfg)
    if at_once == 1:
        for job in jobs:
            run_job(job, study, cfg)
        return
    member.prepare(study.inputs, jobs[0].mode)  # once, before it is handed out
    for job in jobs:
        job.note.unlink(missing_ok=True)  # from here on, a note is of this run
    todo = list(jobs)
    for _ in range(LOST_WORKERS):
        backend, death = cluster(study, cfg)
        try:
            run_side_by_side(todo, study, cfg, backend, at_once)
        except death as error:
            log("warning", lost_worker=type(error).__name__, says=str(error).split("\n")[0])
        todo = [job for job in jobs if not job.note.exists()]
        if not todo:
            return
        log("warning", without_result=len(todo), of=len(jobs), again=",".join(j.name for j in todo))
    raise DataError(
        f"{len(todo)} of {len(jobs)} jobs lost their worker {LOST_WORKERS} times, {todo[0].name} first. "
        f"If it ran out of memory, lower CMI_WORKERS; if it is another machine, it must see {cfg.out}."
    )


def jobs_at_once(jobs: Sequence[Job], cfg: Config) -> int:
    """CMI_WORKERS, or what the cards and cores of this machine call for; a cluster has its own."""
    here = cfg.cmi_backend in ("loky", "threading")
    fitting = MEMBERS[jobs[0].member].side_by_side(jobs[0], cfg) if here else 1
    return min(max(cfg.cmi_workers, fitting), len(jobs))


def run_side_by_side(
    jobs: Sequence[Job], study: Study, cfg: Config, backend: Mapping[str, Any], at_once: int
) -> None:
    """Hand the jobs to joblib's workers, wherever they are."""
    import joblib

    born = time.time() - (time.monotonic() - STARTED)  # by the clock that machines share
    with watched(jobs, cfg), joblib.parallel_config(**backend, n_jobs=at_once):
        joblib.Parallel()(joblib.delayed(run_job_away)(job, study, cfg, born) for job in jobs)


@contextlib.contextmanager
def watched(jobs: Sequence[Job], cfg: Config) -> Iterator[None]:
    """Tell how many jobs are done: the lines of workers on another machine are not seen here."""
    over = threading.Event()

    def watch() -> None:
        with Progress("jobs", len(jobs), 1, cfg) as progress:
            while not over.wait(1):
                progress.step(sum(job.note.exists() for job in jobs) - progress.done)
            progress.step(sum(job.note.exists() for job in jobs) - progress.done)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def run_job_away(job: Job, study: Study, cfg: Config, born: float) -> None:
    """run_job in a worker, whose log counts seconds from the start of the run."""
    global STARTED
    STARTED = time.monotonic() - (time.time() - born)
    run_job(job, study, cfg)


def cluster(study: Study, cfg: Config) -> tuple[dict[str, Any], tuple[type[Exception], ...]]:
    """joblib's backend on the machines that CMI_BACKEND names, and what it raises if a worker dies.

    Dask gives the jobs of a dead worker to another one by itself, three times at most.
    """
    if __name__ == "__main__" and cfg.cmi_backend != "threading":
        log("note", backend="threading", why="no other process can import what a notebook defines")
        return {"backend": "threading"}, ()
    try:
        if cfg.cmi_backend == "dask":
            return {"backend": "dask", "client": dask_client(cfg), "scatter": [study]}, ()
        if cfg.cmi_backend == "ray":
            return {"backend": "ray"}, connect_ray(cfg)
    except ImportError as error:
        raise ConfigError(f"CMI_BACKEND={cfg.cmi_backend} needs a package: {error}.") from None
    # loky starts a worker anew when its memory has grown, as by importing torch
    warnings.filterwarnings("ignore", "A worker stopped while some jobs were given")
    return {"backend": cfg.cmi_backend}, (BrokenExecutor,)


@functools.cache
def dask_client(cfg: Config) -> Any:
    """The running cluster that DASK_SCHEDULER names, else one on this machine until the run ends."""
    from distributed import Client

    if not cfg.dask_scheduler:
        return Client(n_workers=cfg.cmi_workers, threads_per_worker=1)
    client = Client(cfg.dask_scheduler)
    client.upload_file(__file__)  # so that its workers can import it, wherever they run
    return client


def connect_ray(cfg: Config) -> tuple[type[Exception], ...]:
    """Join the running cluster that RAY_ADDRESS names, else start one; what it raises if a worker dies."""
    import ray
    from ray.util.joblib import register_ray

    if not ray.is_initialized():
        ray.init(
            address=cfg.ray_address or "local",
            num_cpus=None if cfg.ray_address else cfg.cmi_workers,
            runtime_env={"py_modules": [__file__]},  # so that workers can import it
        )
    register_ray()
    return (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError)


def fill_out_of_fold(step: Step, study: Study, cfg: Config) -> F32:
    """Composite probabilities of every recording by models that never saw its wearer. → (N, L)"""
    member = MEMBERS[step.member]
    x = member.prepare(study.inputs, step.mode)
    seeds = {job.seed for job in step.jobs}
    oof = np.full((len(study.fold), len(study.labels.table)), np.nan, np.float32)
    for k in sorted({job.fold for job in step.jobs}):
        jobs = [job for job in step.jobs if job.fold == k]
        model = member.load(step.folder, [job.stem for job in jobs], study.labels.table, cfg)
        proba = member.predict(model, x.take(jobs[0].valid))
        assert len(proba) == len(seeds), (proba.shape, seeds)
        oof[jobs[0].valid] = proba.mean(axis=0)
    assert not np.isnan(oof).any(), "some recording was scored by no fold"
    return oof


def train_members(plan: Sequence[Step], study: Study, cfg: Config) -> dict[tuple[str, str], F32]:
    """Carry out the plan; out-of-fold composite probabilities by (member, mode)."""
    oof = {}
    write_array(cfg.out / "oof" / "y_true.npy", study.labels.gesture)
    for step in plan:
        if step.action == "skip":
            continue
        part = f"{step.member}/{step.mode}"
        MEMBERS[step.member].prepare(study.inputs, step.mode)  # features and frames are stages too
        if step.todo:
            with stage(f"{part} training", cfg):
                run_jobs(step.todo, study, cfg)
        with stage(f"{part} out of fold", cfg):
            proba = fill_out_of_fold(step, study, cfg)
        by_gesture = gesture_proba(proba, study.labels.table)
        stem = f"oof_{step.member}_{step.mode}"
        write_array(cfg.out / "oof" / f"{stem}_proba.npy", by_gesture)
        write_array(cfg.out / "oof" / f"{stem}_composite.npy", proba)
        oof[step.member, step.mode] = proba
        log("member", member=step.member, mode=step.mode,
            score=score(study.labels.gesture, by_gesture.argmax(axis=1)))  # fmt: skip
        finish_member(
            [s for s in plan if s.member == step.member and (s.member, s.mode) in oof], study, cfg
        )
    return oof


def finish_member(steps: Sequence[Step], study: Study, cfg: Config) -> None:
    """Write bundle.json beside a member's models that lie here, and its summary: after each mode, so
    that a later mishap leaves whole bundles."""
    member = steps[0].member
    own = cfg.out / f"{member}_models"
    models = {s.mode: [s.folder / job.stem for job in s.jobs] for s in steps}
    MEMBERS[member].summarise(models, cfg.out)
    steps = [s for s in steps if s.folder.parent == own]
    if not steps:
        return  # reused from elsewhere: their bundle is there
    content = {
        "member": member,
        "modes": {s.mode: [job.stem for job in s.jobs] for s in steps},
        "labels": study.labels.table.tolist(),
        "gestures": GESTURES,
        "columns": {s.mode: probe(study, member, s.mode)[0] for s in steps},
        "majority": int(np.bincount(study.labels.gesture).argmax()),
        "settings": {k: jsonable(v) for k, v in cfg.shaping(member).items()},
        "versions": {p: package_version(p) for p in ("numpy", "polars", *MEMBERS[member].packages)},
    }
    write_json(own / "bundle.json", content)


# %% [markdown]
# ## 11 Blend and assignment
#
# Per mode: how to mix the members' out-of-fold probabilities. IMU members also join the blend of
# the all-sensor mode; recordings without rotation have a blend of their own. Weights found on the
# rows they are scored on flatter; the nested figure takes each fold's weights from the other folds.
# Every wearer performs each composite label at most once, so the labels of a subject's recordings
# are assigned together, anew at each arrival.

# %%


@dataclass(frozen=True, slots=True)
class Blend:
    """How to mix the answers of several (member, mode) models in one mode."""

    parts: tuple[str, ...]  # "lgbm/all", "torch/imu", …
    weights: tuple[float, ...]  # sum 1
    kind: str  # key of TRANSFORMS
    knobs: tuple[Any, ...]  # what the transform of each part needs

    def __post_init__(self) -> None:
        assert abs(sum(self.weights) - 1) < 1e-6, self.weights

    def mix(self, composite: Mapping[str, F32], table: I64) -> F32:
        """Composite probabilities of the blend from those of its parts. (N, L) each → (N, L)

        log P(label) = log P(label) - log P(gesture) of the plain mean + log P(gesture) of the blend.
        A part that is absent is left out and the rest renormalised.
        """
        present = [
            i for i, part in enumerate(self.parts) if part in composite and self.weights[i] > 0
        ]
        if not present:  # the weighted ones are all absent: the others count alike
            present = [i for i, part in enumerate(self.parts) if part in composite]
        share = np.array([max(self.weights[i], TINY) for i in present])
        share /= share.sum()
        plain = sum(w * composite[self.parts[i]] for w, i in zip(share, present, strict=True))
        mixed = sum(
            w * TRANSFORMS[self.kind](gesture_proba(composite[self.parts[i]], table), self.knobs[i])
            for w, i in zip(share, present, strict=True)
        )
        gesture = table[:, 2]
        within = plain / np.maximum(gesture_proba(plain, table)[:, gesture], TINY)
        joint = within * mixed[:, gesture]
        return np.asarray(joint / np.maximum(joint.sum(axis=1, keepdims=True), TINY), np.float32)


def blend_from(content: Mapping[str, Any]) -> Blend:
    """A blend as it stands in weights.json."""
    parts, knobs = tuple(map(str, content["parts"])), tuple(content["knobs"])
    weights = np.array(content["weights"], np.float64)
    if not (weights.shape == (len(parts),) == (len(knobs),) and parts):
        raise ValueError(f"{len(parts)} parts, weights {weights.shape}, {len(knobs)} knobs")
    if not ((weights >= 0).all() and abs(weights.sum() - 1) < 1e-6):
        raise ValueError(f"weights {weights} are not shares of one")
    kind, even = str(content["kind"]), np.full((1, len(GESTURES)), 1 / len(GESTURES), np.float32)
    if kind not in TRANSFORMS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(TRANSFORMS)}")
    for knob in knobs:
        with np.errstate(all="ignore"):
            mixed = TRANSFORMS[kind](even, knob)
        if mixed.shape != even.shape or not np.isfinite(mixed).all():
            raise ValueError(f"{knob!r:.80} is no knob of {kind}")
    return Blend(parts, tuple(weights.tolist()), kind, knobs)


def label_table(labels: Any) -> I64:
    """Composite labels from a bundle. → (L, 3)"""
    table = np.array(labels)
    ends = (len(BEHAVIORS), len(ORIENTATIONS), len(GESTURES))
    if table.dtype != np.int64 or table.ndim != 2 or table.shape[1] != 3 or not len(table):
        raise ValueError(f"labels are no table of whole numbers, three a label: {labels!r:.80}")
    if (table < 0).any() or (table >= ends).any():
        raise ValueError(f"labels go up to {table.max(axis=0)}, there are {ends}")
    return table


def as_it_is(proba: F32, knob: Any) -> F32:
    """Probabilities are blended unchanged."""
    return proba


def at_temperature(proba: F32, temperature: float) -> F32:
    """Softmax of log probabilities divided by a temperature. (N, K) → (N, K)"""
    logit = np.log(np.maximum(proba, TINY)) / temperature
    return np.asarray(softmax(logit), np.float32)


def as_ranks(proba: F32, grid: Sequence[Sequence[float]]) -> F32:
    """Rank of each probability among the out-of-fold ones of its class, rows made to sum to one.

    `grid` holds, per class, the quantiles at equal steps. (N, K) → (N, K)
    """
    steps = np.linspace(0, 1, len(grid[0]))
    ranks = np.stack([np.interp(p, q, steps) for p, q in zip(proba.T, grid, strict=True)], axis=1)
    return np.asarray(ranks / np.maximum(ranks.sum(axis=1, keepdims=True), TINY), np.float32)


def no_knob(proba: F32, truth: I64, cfg: Config) -> None:
    """Nothing to be fitted."""
    return None


def fit_temperature(proba: F32, truth: I64, cfg: Config) -> float:
    """The temperature of least log loss, or ENSEMBLE_TEMPERATURE."""
    from scipy.optimize import minimize_scalar

    if cfg.ensemble_temperature is not None:
        return cfg.ensemble_temperature
    rows = np.arange(len(truth))

    def loss(log_t: float) -> float:
        p = at_temperature(proba, float(np.exp(log_t)))[rows, truth]
        return float(-np.log(np.maximum(p, TINY)).mean())

    found = minimize_scalar(loss, bounds=(np.log(0.2), np.log(5.0)), method="bounded")
    return round(float(np.exp(found.x)), 4)


def fit_ranks(proba: F32, truth: I64, cfg: Config) -> list[list[float]]:
    """The grid of `as_ranks`: 65 quantiles of each class. (N, K) → K × 65"""
    quantiles = np.quantile(proba, np.linspace(0, 1, 65), axis=0)  # (65, K)
    return [[float(f"{v:.6g}") for v in q] for q in quantiles.T]


TRANSFORMS: dict[str, Callable[[F32, Any], F32]] = {
    "probability": as_it_is,
    "temperature": at_temperature,
    "rank": as_ranks,
}
FIT_TRANSFORMS: dict[str, Callable[[F32, I64, Config], Any]] = {
    "probability": no_knob,
    "temperature": fit_temperature,
    "rank": fit_ranks,
}


def scores_of_weights(weights: F64, proba: F32, truth: I64) -> F64:
    """Score of each of W candidate weightings, from counts alone. (W, M), (M, N, K), (N) → (W)"""
    n_parts, n, k = proba.shape
    flat = np.ascontiguousarray(proba.reshape(n_parts, n * k))
    cell = np.minimum(truth, 8) * 9  # row of the 9 × 9 table of counts
    out = np.empty(len(weights))
    size = max(1, 2_000_000 // (n * k))  # candidates whose blends stay in the processor's cache
    for i in range(0, len(weights), size):
        blend = (weights[i : i + size].astype(np.float32) @ flat).reshape(-1, n, k)
        cells = np.minimum(blend.argmax(axis=2), 8) + cell  # (size, N)
        cells += 81 * np.arange(len(cells))[:, None]
        counts = np.bincount(cells.ravel(), minlength=81 * len(cells)).reshape(-1, 9, 9)
        out[i : i + size] = sum(f1_of_counts(counts)) / 2
    return out


def search_weights(proba: F32, truth: I64, cfg: Config, rng: np.random.Generator) -> F64:
    """Weights of the best score: the corners, the mean, random ones, then steps along each axis.

    (M, N, K), (N) → (M). Never worse than the best single part, which is among the candidates.
    """
    n_parts = len(proba)
    start = [np.eye(n_parts), np.full((1, n_parts), 1 / n_parts)]
    random = np.round(rng.dirichlet(np.ones(n_parts), max(cfg.ensemble_trials, 1)), 2)
    candidates = np.concatenate([*start, random[random.sum(axis=1) > 0]])
    candidates /= candidates.sum(axis=1, keepdims=True)
    scores = scores_of_weights(candidates, proba, truth)
    best, best_score = candidates[scores.argmax()], scores.max()
    for step in (0.2, 0.1, 0.05):
        while True:
            moves = np.maximum(best + step * np.r_[np.eye(n_parts), -np.eye(n_parts)], 0)
            moves = moves[moves.sum(axis=1) > 0]
            moves /= moves.sum(axis=1, keepdims=True)
            scores = scores_of_weights(moves, proba, truth)
            if scores.max() <= best_score + 1e-9:
                break
            best, best_score = moves[scores.argmax()], scores.max()
    return best


def fixed_weights(members: Sequence[str], cfg: Config) -> dict[str, float] | None:
    """Weights from ENSEMBLE_WEIGHTS or ENSEMBLE_W_…; None if they are to be searched."""
    single = {m: getattr(cfg, f"ensemble_w_{m}") for m in MEMBERS}
    weights = {m: w for m, w in single.items() if w is not None}
    for item in filter(None, (t.strip() for t in cfg.ensemble_weights.split(","))):
        name, _, value = item.partition(":")
        if name.strip() not in MEMBERS:
            raise ConfigError(
                f"ENSEMBLE_WEIGHTS: {name!r} is no member. Known: {', '.join(MEMBERS)}."
            )
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(
                f"ENSEMBLE_WEIGHTS: {item!r} is not of the form member:number."
            ) from None
    if not weights:
        return None
    if min(weights.values()) < 0 or not np.isfinite(list(weights.values())).all():
        raise ConfigError(f"Ensemble weights must not be negative or infinite, got {weights}.")
    if sum(weights.values()) <= 0:
        raise ConfigError(f"Ensemble weights must not sum to zero, got {weights}.")
    kept = {m: weights.get(m, 0.0) for m in members}
    total = sum(kept.values())
    if total <= 0:
        raise ConfigError(
            f"Ensemble weights {weights} leave nothing to the members present, {members}."
        )
    return {m: w / total for m, w in kept.items()}


def parts_of(mode: str, present: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Which (member, mode) models join the blend of a mode: its own, then in `all` the IMU ones."""
    present = list(present)
    own = [p for p in present if p[1] == mode]
    return own + [p for p in present if mode == "all" and p[1] == "imu"]


def make_blend(
    parts: list[tuple[str, str]], proba: F32, truth: I64, kind: str, cfg: Config
) -> Blend:
    """Fit the transform of each part, then the weights. proba: (M, N, K) gesture probabilities"""
    knobs = tuple(FIT_TRANSFORMS[kind](p, truth, cfg) for p in proba)
    mode = parts[0][1]
    fixed = None if mode == BLIND else fixed_weights([m for m, of in parts if of == mode], cfg)
    if fixed is None:
        mixed = np.stack([TRANSFORMS[kind](p, k) for p, k in zip(proba, knobs, strict=True)])
        weights = search_weights(mixed, truth, cfg, rng_for(cfg, "blend", mode))
    else:
        weights = np.array([fixed[m] if of == mode else 0.0 for m, of in parts])
    return Blend(tuple("/".join(p) for p in parts), tuple(map(float, weights)), kind, knobs)


def blend_mode(
    mode: str, oof: Mapping[tuple[str, str], F32], study: Study, cfg: Config
) -> tuple[Blend, F32, dict[str, float]]:
    """The blend of a mode, its nested out-of-fold composites (N, L), and its figures.

    Of plain, tempered and ranked probabilities the one with the best nested score is taken.
    """
    parts, truth, table = parts_of(mode, oof), study.labels.gesture, study.labels.table
    proba = np.stack([gesture_proba(oof[p], table) for p in parts])
    composite = {"/".join(p): oof[p] for p in parts}
    nested, figures = {}, {}
    for kind in TRANSFORMS if cfg.ensemble_temperature is None else ("temperature",):
        mixed = np.full((len(truth), len(table)), np.nan, np.float32)
        for k in np.unique(study.fold):
            inner, outer = study.fold != k, study.fold == k
            blend = make_blend(parts, proba[:, inner], truth[inner], kind, cfg)
            mixed[outer] = blend.mix({p: c[outer] for p, c in composite.items()}, table)
        nested[kind] = mixed
        figures[kind] = score(truth, gesture_proba(mixed, table).argmax(axis=1))
    kind = max(figures, key=lambda name: figures[name])
    blend = make_blend(parts, proba, truth, kind, cfg)
    optimistic = score(truth, gesture_proba(blend.mix(composite, table), table).argmax(axis=1))
    return blend, nested[kind], figures | {"nested": figures[kind], "optimistic": optimistic}


class Assignment:
    """Composite labels of one wearer's recordings so far; each label is given at most once."""

    def __init__(self, table: I64) -> None:
        self.table = table
        self.rows: dict[str, F32] = {}  # -log P of each label, by recording

    def gesture(self, recording: str, composite: F32) -> int:
        """Take in a recording and tell its gesture; the same recording again takes no second place.

        composite: (L). Without a solution the most probable gesture: more recordings than labels
        (an unknown protocol), or figures that are not finite.
        """
        from scipy.optimize import linear_sum_assignment

        alone = int(gesture_proba(np.nan_to_num(composite)[None], self.table)[0].argmax())
        if not np.isfinite(composite).all():
            return alone
        self.rows.pop(recording, None)
        self.rows[recording] = -np.log(np.maximum(composite, TINY))
        if len(self.rows) > len(self.table):
            return alone
        row, column = linear_sum_assignment(np.stack(list(self.rows.values())))
        return int(self.table[column[row.argmax()], 2])


def replay_assignment(composite: F32, study: Study, cfg: Config, orders: int = 10) -> F64:
    """Score with assignment when each wearer's recordings arrive in random order. → (orders)"""
    rec, scores = study.inputs.rec, np.empty(orders)
    told = Progress("replay", orders, orders, cfg)
    for i in range(orders):
        answer = np.empty(len(rec), np.int64)
        state: dict[str, Assignment] = {}
        for r in rng_for(cfg, "replay", i).permutation(len(rec)):
            wearer = state.setdefault(str(rec.subject[r]), Assignment(study.labels.table))
            answer[r] = wearer.gesture(str(rec.sequence_id[r]), composite[r])
        scores[i] = score(study.labels.gesture, answer)
        told.step()
    return scores


def blend_members(
    oof: Mapping[tuple[str, str], F32], plan: Sequence[Step], study: Study, cfg: Config
) -> dict[str, dict[str, float]]:
    """Find and write ensemble/weights.json; the figures of each mode for the result table."""
    figures, content = {}, {}
    for mode in (route for route in ROUTES if parts_of(route, oof)):
        blend, nested, figure = blend_mode(mode, oof, study, cfg)
        by_gesture = gesture_proba(nested, study.labels.table)
        write_array(cfg.out / "oof" / f"oof_blend_{mode}_proba.npy", by_gesture)
        replay = replay_assignment(nested, study, cfg)
        figure |= {"assigned": float(replay.mean()), "assigned_sd": float(replay.std())}
        figures[mode] = figure
        content[mode] = dataclasses.asdict(blend)
        used = {p: round(w, 3) for p, w in zip(blend.parts, blend.weights, strict=True) if w > 0}
        log("blend", mode=mode, kind=blend.kind, **figure, weights=used)
    write_json(cfg.out / "ensemble" / "weights.json", {
        "modes": content,
        "labels": study.labels.table.tolist(),
        "majority": int(np.bincount(study.labels.gesture).argmax()),
        "marks": {
            f"{s.member}/{s.mode}": bundle_mark(s.folder, [j.stem for j in s.jobs])
            for s in plan if s.action != "skip"
        },
        "wearer": study.wearer,
        "figures": figures,
    })  # fmt: skip
    return figures


# %% [markdown]
# ## 12 Serving
#
# The gateway asks for one recording at a time, in random order. Models are read on the first
# question, because the server must be up within 15 minutes and the first answer has no deadline.
# predict never raises and never falls back in silence: it logs the cause and counts.


# %%
@dataclass(frozen=True, slots=True)
class Served:
    """Everything that answers: one model per (member, mode), the blends and the label table."""

    models: dict[str, Any]  # by "member/mode"
    blends: dict[str, Blend]  # by mode
    table: I64  # (L, 3)
    majority: int  # the commonest gesture of the training data
    wearer: dict[str, Any] | None  # tells a device that is worn upside down


def bundle_mark(folder: Path, stems: Sequence[str]) -> str:
    """Digest of the notes of some models: says whether these are the ones the weights were found for."""
    return digest(*((folder / f"{stem}.json").read_bytes() for stem in stems))


def ensemble_files(cfg: Config) -> list[Path]:
    """weights.json of this run, then of attached bundles."""
    own = cfg.out / "ensemble" / "weights.json"
    named = [getattr(cfg, f"{m}_bundle_path") for m in MEMBERS]
    beside = [n.parent / "ensemble" / "weights.json" for n in named if n]
    beside += [n.parent.parent / "ensemble" / "weights.json" for n in named if n]
    return [
        p
        for p in (own, *beside, *sorted(KAGGLE_INPUT.glob("**/ensemble/weights.json")))
        if p.is_file()
    ]


def find_models(cfg: Config, marks: Mapping[str, str]) -> dict[str, tuple[Path, list[str], I64]]:
    """Folder, stems and label table of each usable (member, mode).

    Of several bundles the one that the weights were found for is taken, else the first.
    """
    found: dict[str, tuple[Path, list[str], I64]] = {}
    for member in (m for m in MEMBERS if not why_absent(m, cfg)):
        for folder in bundle_folders(member, cfg):
            try:
                usable = usable_models(folder, MEMBERS[member].files)
            except (DataError, OSError) as error:
                if cfg.strict:
                    raise
                log("warning", left_out=folder, why=error)
                continue
            for mode, models in usable.items():
                part = f"{member}/{mode}"
                if part not in found or bundle_mark(*models[:2]) == marks.get(part):
                    found[part] = models
    return found


def usable_models(folder: Path, ends: Sequence[str]) -> dict[str, tuple[Path, list[str], I64]]:
    """Folder, stems and label table by mode of a bundle, where all files are as they were written."""
    if not (folder / "bundle.json").is_file():
        return {}
    bundle = read_json(folder / "bundle.json")
    usable = {}
    try:
        modes, table = (
            {mode: bundle["modes"].get(mode, []) for mode in ROUTES},
            label_table(bundle["labels"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder / 'bundle.json'} is no bundle of this file ({error!s:.200})."
        ) from None
    for mode, stems in modes.items():
        check_stems(stems, folder)
        spoilt = [name for stem in stems if (name := spoilt_file(folder / mode, stem, ends))]
        if spoilt:
            log("warning", left_out=folder / mode, why=f"{spoilt[0]} is absent or was changed")
        elif stems:
            usable[mode] = (folder / mode, stems, table)
    return usable


def spoilt_file(folder: Path, stem: str, ends: Sequence[str]) -> str:
    """The first file of a model that is absent or not as it was written; empty if all are."""
    note = folder / f"{stem}.json"
    if not note.is_file():
        return note.name
    content = read_json(note)
    marks = content.get("files") if isinstance(content, dict) else None
    if not isinstance(marks, dict) or set(marks) != set(ends):
        raise DataError(f"{note} does not name the files {', '.join(stem + end for end in ends)}.")
    for end in ends:
        path = folder / f"{stem}{end}"
        if not path.is_file() or digest(path.read_bytes()) != marks[end]:
            return path.name
    return ""


def check_stems(stems: Any, folder: Path) -> None:
    """Refuse names in bundle.json that could lead out of its folder."""
    if not isinstance(stems, list) or not all(
        isinstance(s, str) and re.fullmatch(r"fold[0-9]{2}(_seed[0-9]+)?", s) for s in stems
    ):
        raise DataError(f"{folder / 'bundle.json'} names files that no run writes: {stems!r:.100}.")


def load_served(cfg: Config) -> Served:
    """Read what is needed to answer; raises FileNotFoundError if there is no model at all."""
    began = time.monotonic()
    weights, source = chosen_weights(cfg)
    found = find_models(cfg, weights["marks"] if weights else {})
    if not found:
        raise FileNotFoundError(
            f"No trained models in {cfg.out} and none attached. Train first, or point "
            f"LGBM_BUNDLE_PATH, TORCH_BUNDLE_PATH or KERAS_BUNDLE_PATH at a bundle."
        )
    table = weights["labels"] if weights else next(iter(found.values()))[2]
    models = load_models(found, table, cfg)
    modes = default_modes(list(models))
    blends = {m: blend_from(b) for m, b in modes.items()}
    if weights:  # a mode none of whose parts is there keeps the default weights of what is
        of = {m: b for m, b in weights["blends"].items() if any(p in models for p in b.parts)}
        blends = of or blends
    blends = {mode: as_asked(mode, blend, cfg) for mode, blend in blends.items()}
    log("loaded", models=",".join(models), weights=source, secs=time.monotonic() - began)
    majority = weights["majority"] if weights else int(np.bincount(table[:, 2]).argmax())
    return Served(models, blends, table, majority, weights and weights.get("wearer"))


def load_models(
    found: Mapping[str, tuple[Path, list[str], I64]], table: I64, cfg: Config
) -> dict[str, Any]:
    """Every model that can be loaded, by "member/mode"; those that cannot are named."""
    models = {}
    for part, (folder, stems, labels) in found.items():
        if not np.array_equal(labels, table):
            log("warning", left_out=part, why="its labels differ from the ensemble's")
            continue
        load = MEMBERS[part.split("/")[0]].load
        model = attempt(functools.partial(load, folder, stems, table, cfg))
        if not isinstance(model, Exception):
            models[part] = model
        elif cfg.strict:
            raise model
        else:
            log("warning", left_out=part, why=repr(model)[:300])
    if not models:
        raise DataError(
            f"None of the models {', '.join(found)} can be used; the lines above say why."
        )
    return models


def as_asked(mode: str, blend: Blend, cfg: Config) -> Blend:
    """A blend with the weights that the settings fix, if they do; as it is where they cannot hold."""
    if mode == BLIND:  # as in make_blend
        return blend
    parts = [part.split("/") for part in blend.parts]
    try:
        fixed = fixed_weights([m for m, of in parts if of == mode], cfg)
    except ConfigError as error:
        log("warning", mode=mode, why=error, instead="weights as they were found")
        return blend
    if fixed is None:
        return blend
    weights = tuple(fixed[m] if of == mode else 0.0 for m, of in parts)
    return dataclasses.replace(blend, weights=weights)


def chosen_weights(cfg: Config) -> tuple[dict[str, Any] | None, str]:
    """The first weights.json that can be used, and where it lies; None: the default weights."""
    for path in ensemble_files(cfg):
        try:
            return read_weights(path), str(path)
        except (DataError, OSError) as error:
            if cfg.strict:
                raise
            log("warning", left_out=path, why=error)
    return None, "defaults"


def read_weights(path: Path) -> dict[str, Any]:
    """weights.json, checked: marks, blends by mode, labels (L, 3), majority and wearer."""
    content = read_json(path)
    try:
        blends = {mode: blend_from(content["modes"][mode]) for mode in content["modes"]}
        if not blends or not set(blends) <= set(ROUTES):
            raise ValueError(f"modes {', '.join(blends)}")
        majority, marks, wearer = (content.get(k) for k in ("majority", "marks", "wearer"))
        whole = type(majority) is int  # 3.0 and True equal a code, and are none
        if not (whole and majority in range(len(GESTURES)) and isinstance(marks, dict)):
            raise ValueError(f"majority {majority!r:.80} or marks {marks!r:.80}")
        if wearer is not None:
            known = np.array([wearer["prior"], *wearer["coefficients"]], np.float64)
            if known.shape != (1 + N_ODD,) or not np.isfinite(known).all():
                raise ValueError(f"wearer {wearer!r:.80}")
        table = label_table(content["labels"])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path} holds no weights of this file ({error!s:.200}). Delete it, or attach it again."
        ) from None
    return {
        "blends": blends,
        "majority": majority,
        "marks": marks,
        "wearer": wearer,
        "labels": table,
    }


def default_modes(parts: Sequence[str]) -> dict[str, Any]:
    """Blends of the members' default weights, for bundles without out-of-fold rows."""
    modes = {}
    for mode in ROUTES:
        own = [p for p in parts if p.endswith(f"/{mode}")]
        weight = np.array([MEMBERS[p.split("/")[0]].default_weight for p in own])
        share = (weight / weight.sum()).tolist() if own else []
        modes[mode] = {
            "parts": own,
            "weights": share,
            "kind": "probability",
            "knobs": [None] * len(own),
        }
    return {m: b for m, b in modes.items() if b["parts"]}


def attempt(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the error it ends with: packages have errors that derive from nothing
    narrower, and one member's must not cost the others' answer."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 the one place that catches all
        return error


class Predictor:
    """Answers one recording at a time; remembers what each wearer has been seen to do."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(len(MEMBERS), "member")
        self.served: Served | None = None
        self.unusable: Exception | None = None  # why no model could be had; asked for once only
        self.assignments: dict[str, Assignment] = {}
        self.evidence: dict[
            str, dict[str, float]
        ] = {}  # subject → recording → log odds of upside down
        self.answers: collections.OrderedDict[str, F32] = collections.OrderedDict()
        self.calls = 0
        self.fallbacks = collections.Counter[str]()

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
            log("fallback", count=self.fallbacks.total(), of=self.calls, answer="majority")
            if self.fallbacks[cause] == 1:
                traceback.print_exception(answer)
            majority = self.served.majority if self.served else GESTURES.index("Text on phone")
            return GESTURES[majority]

    def gesture(self, sequence: pl.DataFrame, demographics: pl.DataFrame) -> int:
        """Code of the gesture of one recording."""
        if self.unusable:
            raise self.unusable.with_traceback(None)
        if self.served is None:
            loaded = attempt(self.load)
            if isinstance(loaded, Exception):
                self.unusable = loaded
                raise loaded
            self.served = loaded
        assert self.served is not None
        if not len(sequence) or not {"sequence_id", "subject"} <= set(sequence.columns):
            raise DataError(
                f"predict was handed {len(sequence)} rows of {sequence.columns[:4]} …, no recording: "
                f"it needs rows, sequence_id and subject."
            )
        rec = to_recordings(sequence, demographics)
        if len(rec) != 1:
            raise DataError(f"predict was handed {len(rec)} recordings instead of 1.")
        recording, subject = str(rec.sequence_id[0]), str(rec.subject[0])
        composite = self.composite(rec)
        if not self.cfg.subject_assignment:
            return int(gesture_proba(composite, self.served.table)[0].argmax())
        wearer = self.assignments.setdefault(subject, Assignment(self.served.table))
        return wearer.gesture(recording, composite[0])

    def load(self) -> Served:
        """The bundles; without any, LightGBM is trained now, since the first call has no deadline."""
        try:
            return load_served(self.cfg)
        except (FileNotFoundError, DataError) as error:
            if not self.cfg.rerun:
                raise
            log("warning", no_bundle=str(error), instead="training LightGBM in this first call")
            alone: dict[str, Any] = {f"use_{m}": m == "lgbm" for m in MEMBERS}
            train_all(dataclasses.replace(self.cfg, **alone))
            return load_served(self.cfg)

    def composite(self, raw: Recordings) -> F32:
        """Blended composite probabilities of one recording, remembered by its content. → (1, L)"""
        assert self.served is not None
        turned = self.is_turned(raw)
        key = digest(raw.acc, raw.rot, raw.thm, raw.tof, raw.person, turned)
        if key in self.answers:
            self.answers.move_to_end(key)
            return self.answers[key]
        rec = canonical(raw, np.array([turned]))
        blends = self.served.blends
        blend = blends.get(route_of(raw, blends)) or next(iter(blends.values()))
        mixed = blend.mix(self.opinions(rec, blend), self.served.table)
        self.answers[key] = mixed
        while len(self.answers) > self.cfg.frame_cache_max_items:
            self.answers.popitem(last=False)
        return mixed

    def opinions(self, rec: Recordings, blend: Blend) -> dict[str, F32]:
        """Composite probabilities by every part of a blend that has weight. (1, L) each

        Members answer side by side, the slowest first. A part that fails is left out, counted and
        logged; if all fail, the last error is raised.
        """
        assert self.served is not None
        inputs, opinion, failure = Inputs(rec), {}, None
        weighed = [p for p, w in zip(blend.parts, blend.weights, strict=True) if w > 0]
        known = self.served.models
        asked = [p for p in weighed if p in known] or [p for p in blend.parts if p in known]
        teams = [[p for p in asked if p.split("/")[0] == name] for name in reversed(MEMBERS)]
        answers = self.pool.map(lambda parts: [self.ask(p, inputs) for p in parts], teams)
        for part, answer in zip(itertools.chain(*teams), itertools.chain(*answers), strict=True):
            if isinstance(answer, Exception):
                if self.cfg.strict:
                    raise answer
                self.fallbacks[f"{part}: {type(answer).__name__}: {answer}"[:200]] += 1
                log("fallback", part=part, error=repr(answer)[:200], count=self.fallbacks.total())
                failure = answer
            else:
                opinion[part] = answer
        if not opinion:
            raise failure or LookupError(f"No model serves {blend.parts}.")
        return opinion

    def ask(self, part: str, inputs: Inputs) -> F32 | Exception:
        """Composite probabilities by one part, or why it has none. → (1, L)"""
        assert self.served is not None
        name, mode = part.split("/")
        member, model = MEMBERS[name], self.served.models[part]
        return attempt(lambda: member.predict(model, member.prepare(inputs, mode)).mean(axis=0))

    def is_turned(self, raw: Recordings) -> bool:
        """Does the evidence of this wearer's recordings so far say that the device is upside down?"""
        assert self.served is not None
        if not self.served.wearer or not self.cfg.upside_down:
            return False
        logit = wearer_logit(canonical(raw, np.zeros(1, bool)), self.served.wearer)
        seen = self.evidence.setdefault(str(raw.subject[0]), {})
        seen[str(raw.sequence_id[0])] = float(logit[0])
        return bool(self.served.wearer["prior"] + sum(seen.values()) < 0)


def route_of(rec: Recordings, routes: Iterable[str]) -> str:
    """Which blend answers a recording: by its rotation, then by how much of its ToF is missing."""
    if BLIND in routes and np.isnan(repair_rotation(rec.rot, rec.start)).all():
        return BLIND
    return "imu" if (rec.tof == MISSING).mean() > 0.5 else "all"


def inference_server(cfg: Config) -> Any:
    """The class CMIInferenceServer: the competition's own on Kaggle, else ours beside this file."""
    with contextlib.suppress(ImportError):
        from kaggle_evaluation.cmi_inference_server import CMIInferenceServer

        return CMIInferenceServer
    places = [cfg.cmi_data_dir, *(p.parent for p in KAGGLE_INPUT.glob("**/kaggle_evaluation"))]
    sys.path += [str(p) for p in places if p and (p / "kaggle_evaluation").is_dir()]
    from kaggle_evaluation.cmi_inference_server import CMIInferenceServer

    return CMIInferenceServer


def serve(cfg: Config) -> Predictor:
    """Answer the hidden test in the re-run; elsewhere let a local gateway ask about the test files."""
    predictor = Predictor(cfg)

    def predict(sequence: pl.DataFrame, demographics: pl.DataFrame) -> str:
        return predictor.predict(sequence, demographics)

    server = inference_server(cfg)(predict)
    if cfg.rerun:
        log("serving", deadline="none for the first call, in which models load")
        server.serve()
        return predictor
    folder = cfg.data_dir
    with stage("serving", cfg), contextlib.chdir(cfg.out):  # submission.parquet is written there
        server.run_local_gateway((str(folder / "test.csv"), str(folder / "test_demographics.csv")))
    log("served", recordings=predictor.calls, fallbacks=predictor.fallbacks.total(),
        submission=cfg.out / "submission.parquet")  # fmt: skip
    for cause, count in predictor.fallbacks.most_common():
        log("fallback", count=count, cause=cause)
    return predictor


# %% [markdown]
# ## 13 Report
#
# report/index.html says how good a run was, where it errs and what it cost: one file that holds all
# it shows and loads nothing. Colours are Okabe and Ito's and cividis; plots are as wide as a phone
# and take their ink from the page, light or dark. It is written after everything else, so that no
# mishap in it can cost a run.


# %%
@dataclass(frozen=True, slots=True)
class Result:
    """A line of the result table."""

    name: str
    scores: dict[str, float]  # by mode
    secs: float
    sd: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by mode, over orders

    @property
    def mixed(self) -> float:
        return float(np.mean([self.scores[m] for m in MODES]))


@dataclass(frozen=True, eq=False)
class Outcome:
    """A training run as the report sees it: what it is handed, and what it reads from the files."""

    rec: Recordings  # canonical
    labels: Labels
    results: list[Result]
    cfg: Config

    @functools.cached_property
    def modes(self) -> dict[str, Any]:
        """Blend by mode, as in ensemble/weights.json."""
        return dict(read_json(self.cfg.out / "ensemble" / "weights.json")["modes"])

    @functools.cached_property
    def members(self) -> list[str]:
        return list(dict.fromkeys(part.split("/")[0] for part in self.modes["all"]["parts"]))

    @functools.cached_property
    def proba(self) -> dict[str, F32]:
        """Out-of-fold gesture probabilities of "blend/all" (nested), "lgbm/imu", … (N, K) each"""
        parts = [f"blend/{m}" for m in MODES] + self.modes["all"]["parts"]
        stem = {part: part.replace("/", "_") for part in parts}
        files = {part: self.cfg.out / "oof" / f"oof_{stem[part]}_proba.npy" for part in parts}
        return {part: np.load(path, allow_pickle=False) for part, path in files.items()}

    def counts(self, mode: str) -> I64:
        """Recordings by true gesture and answer of the nested blend. → (K, K)"""
        counts = np.zeros((len(GESTURES), len(GESTURES)), np.int64)
        np.add.at(counts, (self.labels.gesture, self.proba[f"blend/{mode}"].argmax(axis=1)), 1)
        return counts


# F1 of the targets and of the rest on the real data: one run of a gold-medal team, which scored
# .855 with all sensors and .810 with the IMU alone
GOLD_RUN = {
    "all": (0.80, 0.66, 0.50, 0.61, 0.73, 0.83, 0.65, 0.72, 0.98),
    "imu": (0.62, 0.53, 0.43, 0.55, 0.64, 0.78, 0.55, 0.66, 0.97),
}
SCORE_ANCHORS = (  # on the real data
    ("private board, first · second · third", ".8862 · .8788 · .8783"),
    ("private board, gold · silver · median", ".858 · .833 · .798"),
    ("best public single notebooks, public board", ".841–.847"),
    ("mixed cross-validation of seven teams, above their private score", ".012–.025"),
    ("LightGBM on 108 IMU statistics, imu", ".704"),
    ("plain 1-D CNN, imu · all", ".731 · .816"),
    ("the same with grouped stems and SE blocks, imu · all", ".787 · .852"),
    ("second place's single network of 5 folds, imu · all", ".832 · .891"),
    ("the same with assignment per subject, imu · all", ".865 · .921"),
)
REST = len(TARGETS)  # code of any non-target among the classes of the score
INK = "#010203"  # stands for the page's text colour in a plot
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"  # Okabe and Ito
COLOURS = dict(zip(ROUTES, (BLUE, ORANGE, GREEN), strict=True))
TOP_FEATURES, GALLERY_MISTAKES, GALLERY_RIGHT = 40, 18, 6

STYLE = """
.report{--ink:#1b1f24;--soft:#5a6572;--line:#dce1e7;--paper:#fff;--panel:#f4f6f8;--mark:#0072b2;
 color:var(--ink);background:var(--paper);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
@media(prefers-color-scheme:dark){.report{--ink:#e4e8ec;--soft:#9ba6b2;--line:#343c46;--paper:#14181d;--panel:#1d232a;--mark:#56b4e9}}
.report main{max-width:1100px;margin:0 auto;padding:28px 16px 56px;overflow-wrap:anywhere}
.report h1{font-size:1.65rem;line-height:1.2;margin:0 0 4px;font-weight:650}
.report h2{font-size:1.15rem;margin:0 0 2px;font-weight:650}
.report h3{font-size:.95rem;margin:0;font-weight:600;line-height:1.35}
.report p{margin:0 0 12px;color:var(--soft);max-width:72ch}
.report small{color:var(--soft);font-size:.92em}
.report section{border-top:1px solid var(--line);margin-top:32px;padding-top:20px}
.report .notice{border-left:4px solid #e69f00;background:var(--panel);color:var(--ink);padding:8px 12px;margin:14px 0;max-width:none}
.report .tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin-top:16px}
.report .tiles div,.report article{background:var(--panel);border-radius:6px;padding:10px 14px;min-width:0}
.report .tiles div,.report article p{color:var(--soft);font-size:.82rem}
.report .tiles b{display:block;font-size:1.6rem;line-height:1.25;color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.report .scroll{overflow-x:auto;margin:0 0 12px}
.report table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;color:inherit}
.report th,.report td{padding:5px 14px 5px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);white-space:nowrap}
.report thead th{color:var(--soft);font-weight:500;vertical-align:bottom;white-space:normal}
.report .n{text-align:right}
.report .scores tr:nth-last-child(2){font-weight:650}
.report .wide td:nth-child(2),.report .settings td:last-child{white-space:normal;min-width:170px}
.report .bar{position:relative;display:inline-block;width:110px;height:.75em;background:var(--panel)}
.report .bar i{position:absolute;inset:0 auto 0 0;background:var(--mark)}
.report .bar u{position:absolute;top:-.2em;bottom:-.2em;width:3px;margin-left:-1px;background:#e69f00}
.report .confusion th,.report .confusion td{padding:4px 5px;min-width:24px;text-align:right;border:0;font-size:.78rem}
.report .confusion tbody th{text-align:left;font-weight:400;padding-left:0;position:sticky;left:0;background:var(--paper)}
.report .confusion tr>:nth-child(9){border-right:2px solid var(--line)}
.report .confusion tbody tr:nth-child(8)>*{border-bottom:2px solid var(--line)}
.report .hit{background:rgba(0,114,178,var(--share))}
.report .miss{background:rgba(213,94,0,var(--share))}
.report .deep{color:#fff}
.report .plots,.report .gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:16px}
.report svg{display:block;width:100%;height:auto;max-width:520px}
.report .opinions{font-size:.8rem}
.report details{margin-top:12px}
.report summary{cursor:pointer;color:var(--mark);margin-bottom:8px}
@media(max-width:560px){.report th,.report td{padding-right:8px}.report .bar{width:64px}.report .wide .bar{display:none}
 .report .confusion tbody th{white-space:normal;min-width:112px;max-width:112px}}
"""


class Html(str):
    """Text that is HTML already; all other text is escaped when it is shown."""


def cell(value: object, tag: str = "td") -> str:
    """One cell of a table; numbers stand to the right."""
    if isinstance(value, Html):
        return f"<{tag}>{value}</{tag}>"
    if isinstance(value, (int, float)):
        text = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
        return f'<{tag} class="n">{"–" if value != value else text}</{tag}>'
    return f"<{tag}>{html.escape(str(value))}</{tag}>"


def table_html(head: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> Html:
    """A table that scrolls by itself where the page is narrow; the head is aligned as its column."""
    rows = list(rows)
    right = [isinstance(value, (int, float)) for value in rows[0]] if rows else [False] * len(head)
    top = "".join(
        cell(Html(f'<div class="n">{h}</div>') if r else h, "th")
        for h, r in zip(head, right, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    thead = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return Html(
        f'<div class="scroll"><table class="{kind}">{thead}<tbody>{body}</tbody></table></div>'
    )


def bar_html(share: float, anchor: float | None = None) -> Html:
    """A bar from 0 to 1, with a mark at the anchor."""
    mark = "" if anchor is None else f'<u style="left:{100 * anchor:.1f}%"></u>'
    return Html(f'<span class="bar"><i style="width:{100 * share:.1f}%"></i>{mark}</span>')


def plot(draw: Callable[[Any], None], height: float) -> str:
    """What `draw` puts on a figure as wide as a phone, as SVG inside the page; nothing without
    matplotlib."""
    if not package_version("matplotlib"):
        return ""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    own = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = dict.fromkeys(own, INK) | {
        "svg.fonttype": "none", "svg.hashsalt": "cmi", "font.size": 9, "axes.titlesize": 9,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "legend.frameon": False,
        "axes.titlelocation": "left", "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.5,
        "legend.fontsize": 8.5, "lines.linewidth": 1.2,
    }  # fmt: skip
    text = io.StringIO()
    with rc_context(style):
        figure = Figure(figsize=(4.2, height), layout="constrained")
        draw(figure)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"(?s)^.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->", "", text.getvalue())
    svg = re.sub(r' id="[\w.]+_\d+"| xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)  # the page's own letters
    svg = re.sub(r"font-family: [^;\"]*;", "", svg)
    return svg.replace(INK, "currentColor")


# %% [markdown]
# How good, and where it errs: all of it from out-of-fold rows.


# %%
def simulates(cfg: Config) -> bool:
    """Is the data simulated? The simulator alone tells the truth of its test recordings."""
    return (cfg.data_dir / "test_truth.csv").is_file()


def result_part(run: Outcome) -> str:
    """A row per member and blend, and what others reached on the real data."""

    def figure(value: float, sd: float = np.nan) -> Html:
        return Html(f"{value:.4f}" + (f"<br><small>± {sd:.4f}</small>" if sd >= 0 else ""))

    rows = [
        (r.name, *(figure(v, r.sd.get(m, np.nan)) for m, v in r.scores.items()), figure(r.mixed), round(r.secs))
        for r in run.results
    ]  # fmt: skip
    anchors = table_html(("", ""), SCORE_ANCHORS)
    return (
        table_html(("", *MODES, "mixed", "seconds"), rows, "scores")
        + f"<details><summary>Anchors on the real data</summary>{anchors}</details>"
    )


def class_f1(counts: I64) -> F64:
    """F1 of the eight targets and of all the rest as one class. (K, K) → (9); NaN: does not occur"""
    rest = np.minimum(np.arange(len(GESTURES)), REST)
    few = np.zeros((REST + 1, REST + 1))
    np.add.at(few, (rest[:, None], rest), counts)
    sides = few.sum(0) + few.sum(1)
    return np.where(sides > 0, 2 * np.diagonal(few) / np.maximum(sides, 1), np.nan)


def f1_part(run: Outcome) -> str:
    """A row per target and one for all the rest, beside the anchors."""
    own = "simulated" if simulates(run.cfg) else "real"
    head = ["", *(h for m in MODES for h in (f"{m}, {own}", "", "anchor, real")), "recordings"]
    rows: list[list[object]] = [[name] for name in (*TARGETS, "non-target")]
    for mode in MODES:
        for row, f1, anchor in zip(rows, class_f1(run.counts(mode)), GOLD_RUN[mode], strict=True):
            row += [float(f1), bar_html(np.nan_to_num(f1), anchor), anchor]
    n = np.bincount(np.minimum(run.labels.gesture, REST), minlength=REST + 1)
    return table_html(head, [[*row, int(k)] for row, k in zip(rows, n, strict=True)], "f1")


def confusion_part(run: Outcome) -> str:
    """Both modes, imu folded away."""
    imu = f"<details><summary>imu mode</summary>{confusion_html(run.counts('imu'))}</details>"
    return confusion_html(run.counts("all")) + imu


def confusion_html(counts: I64) -> str:
    """Blue is right, orange wrong, the deeper the larger the share of its row."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    def count(i: int, j: int) -> str:
        kind = ("hit" if i == j else "miss") + " deep" * bool(shares[i, j] > 0.5)
        return f'<td class="{kind}" style="--share:{shares[i, j]:.2f}">{counts[i, j] or ""}</td>'

    each = range(len(GESTURES))
    names = [f"{i + 1} {html.escape(gesture)}" for i, gesture in enumerate(GESTURES)]
    head = "".join(f'<th title="{names[j]}">{j + 1}</th>' for j in each)
    rows = [f"<tr><th>{names[i]}</th>{''.join(count(i, j) for j in each)}</tr>" for i in each]
    return f'<div class="scroll"><table class="confusion"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def reliability(proba: F32, truth: I64, bins: int = 10) -> tuple[F64, F64, I64]:
    """By confidence: its mean, the share of right answers, recordings. (N, K), (N) → 3 × (bins)

    NaN where no recording is.
    """
    sure = proba.max(axis=1).astype(np.float64)
    which = np.minimum((sure * bins).astype(np.int64), bins - 1)
    n = np.bincount(which, minlength=bins)
    sums = [np.bincount(which, v, bins) for v in (sure, proba.argmax(axis=1) == truth)]
    with np.errstate(invalid="ignore"):
        return sums[0] / n, sums[1] / n, n


def calibration_error(proba: F32, truth: I64) -> float:
    """Expected calibration error: mean distance of confidence from accuracy, by recordings."""
    sure, right, n = reliability(proba, truth)
    return float(np.nansum(np.abs(sure - right) * n) / n.sum())


def calibration_part(run: Outcome) -> str:
    """Confidence against accuracy of the blend, and the error of every part."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":")
        for mode, mark in zip(MODES, "os", strict=True):
            colour = COLOURS[mode]
            sure, right, n = reliability(run.proba[f"blend/{mode}"], run.labels.gesture)
            axes.plot(sure, right, color=colour, label=mode, zorder=2)
            axes.scatter(sure, right, 8 + 120 * n / n.sum(), color=colour, marker=mark, zorder=3)
        axes.set(xlabel="confidence", ylabel="share of right answers", xlim=(0, 1), ylim=(0, 1))
        axes.legend(loc="upper left")

    rows = [(part, calibration_error(p, run.labels.gesture)) for part, p in run.proba.items()]
    return f'<div class="plots">{plot(draw, 3.2)}{table_html(("", "ECE"), rows, "ece")}</div>'


def weights_part(run: Outcome) -> str:
    """What each part weighs in the blend of each mode."""
    weights = [dict(zip(b["parts"], b["weights"], strict=True)) for b in run.modes.values()]
    rows = [
        [part, *(v for w in weights for v in (w.get(part, 0.0), bar_html(w.get(part, 0.0))))]
        for part in dict.fromkeys(p for b in run.modes.values() for p in b["parts"])
    ]
    head = ["", *(h for mode, b in run.modes.items() for h in (f"{mode}, by {b['kind']}", ""))]
    return table_html(head, rows, "weights")


def learning_curves(path: Path, n_folds: int) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    """The latest run of each mode, seed and fold in a log that holds several, line by line.

    A line puts an end to all earlier ones of its fold that were as far or farther: a new run begins
    at the first step, a resumed one somewhere after it. Lines that were cut off are left out.
    """
    curves: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for text in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            line["x"] = line.get("epoch", line.get("round"))
            key = (line["mode"], line.get("seed", 0), line["fold"])
            curves[key] = [e for e in curves.get(key, []) if e["x"] < line["x"]] + [line]
    return {key: curve for key, curve in sorted(curves.items()) if key[2] < n_folds}


def curves_part(run: Outcome) -> str:
    """A plot per member that wrote a log."""
    logs = {m: run.cfg.out / "logs" / f"{m}_progress.jsonl" for m in run.members}
    curves = {m: learning_curves(path, run.cfg.n_folds) for m, path in logs.items()}
    plots = [plot(functools.partial(draw_curves, m, c), 4.2) for m, c in curves.items() if c]
    none = "<p>No lines in logs/: trained elsewhere, or with SAVE_JSONL=0.</p>"
    return f'<div class="plots">{"".join(plots)}</div>' if plots else none


def draw_curves(member: str, curves: Mapping[Any, list[dict[str, Any]]], figure: Any) -> None:
    """Score above loss, a line per seed and fold, a colour per mode."""
    last = next(iter(curves.values()))[-1]
    loss = next((name for name in last if "loss" in name), "loss")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for (mode, *_), curve in curves.items():
        x = [line["x"] for line in curve]
        for axes, name in ((upper, "score"), (lower, loss)):
            y = [line.get(name, np.nan) for line in curve]  # boosters can watch the score alone
            axes.plot(x, y, "." if len(x) == 1 else "-", color=COLOURS[mode], lw=1, label=mode)
            axes.set_ylabel(name)
    handles = dict(zip(*reversed(upper.get_legend_handles_labels()), strict=True))
    upper.legend(handles.values(), handles.keys())
    lower.set_xlabel("epoch" if "epoch" in last else "round")
    figure.suptitle(member, x=0.02, ha="left", fontsize=10)


def features_part(run: Outcome) -> str:
    """The features that gained most in the all mode, if a member of this run tells."""
    path = run.cfg.out / "feature_importance.csv"
    tells = any(MEMBERS[m].summarise is not nothing_to_summarise for m in run.members)
    if not (tells and path.is_file()):
        return "<p>No member of this run tells how much its features gained.</p>"
    best = pl.read_csv(path).filter(pl.col("mode") == "all").head(TOP_FEATURES)
    rows = [
        (i + 1, Html(f"{html.escape(name)}<br><small>{html.escape(meaning(name))}</small>"),
         bar_html(gain / best["gain_mean"][0]), round(gain), round(sd or 0))
        for i, (_, name, gain, sd, *_) in enumerate(best.iter_rows())
    ]  # fmt: skip
    return table_html(("", "feature", "", "gain", "± sd"), rows, "wide")


# %% [markdown]
# What the members saw and what they made of it.


# %%
def gallery_choice(proba: F32, truth: I64, cfg: Config) -> I64:
    """The most confident of the mistakes that cost score, then some right answers by lot."""
    answer = proba.argmax(axis=1)
    wrong = np.flatnonzero(np.minimum(answer, REST) != np.minimum(truth, REST))
    wrong = wrong[np.argsort(-proba[wrong].max(axis=1), kind="stable")]
    right = rng_for(cfg, "gallery").permutation(np.flatnonzero(answer == truth))
    return np.r_[wrong[:GALLERY_MISTAKES], right[:GALLERY_RIGHT]].astype(np.int64)


def tof_mosaic(tof: U8) -> npt.NDArray[Any]:
    """Images of five sensors, one below the other, as colours. (M, 5, 8, 8) → (45, 9 M, 4)

    Near is dark. Nothing in range is grey, missing is blank.
    """
    from matplotlib import colormaps

    colour = colormaps["cividis"](tof / FARTHEST)
    colour[tof == NOTHING] = (0.5, 0.5, 0.5, 0.28)
    colour[tof == MISSING] = 0
    tiles = np.pad(colour, [(0, 0), (0, 0), (0, 1), (0, 1), (0, 0)])  # (M, 5, 9, 9, 4)
    return tiles.transpose(1, 2, 0, 3, 4).reshape(45, -1, 4)


def draw_recording(rec: Recordings, performed: Bool, figure: Any) -> None:
    """Acceleration, angular velocity and ToF images of one recording; the gesture is shaded."""
    n, rows = len(rec.acc), np.flatnonzero(performed)
    first, last = (rows[0], rows[-1]) if rows.size else (0, n - 1)
    moments = np.r_[first // 2, np.linspace(first, last, 7).round()].astype(np.int64)
    seconds = np.arange(n) * SAMPLE_PERIOD
    *axes, below = figure.subplots(3, 1, height_ratios=(1, 1, 2.2))
    signals: dict[str, npt.NDArray[Any]] = {"m/s²": rec.acc, "rad/s": Motion.of(rec).omega}
    for ax, (unit, vectors) in zip(axes, signals.items(), strict=True):
        ax.axvspan(seconds[first], seconds[last], color="#808080", alpha=0.16, lw=0)
        for values, colour, name in zip(vectors.T, (BLUE, ORANGE, GREEN), "xyz", strict=True):
            ax.plot(seconds, values, color=colour, lw=1, label=name)
        ax.plot(seconds[moments], np.full(8, ax.get_ylim()[0]), "^", ms=3, color=INK, clip_on=False)
        ax.set(ylabel=unit, xlim=(0, seconds[-1] or 1))
    axes[0].tick_params(labelbottom=False)
    axes[0].legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
    below.imshow(tof_mosaic(rec.tof[moments]), interpolation="none")
    below.set_xticks(np.arange(8) * 9 + 3.5, [f"{t:.1f}" for t in seconds[moments]])
    below.set_yticks(np.arange(5) * 9 + 3.5, [f"ToF {i}" for i in range(1, 6)])
    below.set_xlabel("s")
    below.grid(visible=False)
    below.tick_params(length=0)
    below.spines[:].set_visible(False)


def opinion(proba: F32, truth: int) -> Html:
    """The three likeliest gestures, the true one bold. (K)"""
    best = np.argsort(-proba, kind="stable")[:3]
    texts = [f"{html.escape(GESTURES[g])} {proba[g]:.2f}" for g in best]
    bold = (f"<b>{x}</b>" if g == truth else x for g, x in zip(best, texts, strict=True))
    return Html("<br>".join(bold))


def gallery_part(run: Outcome) -> str:
    """A card per recording of `gallery_choice`."""
    blend, parts = run.proba["blend/all"], [p for p in run.proba if p.endswith("/all")]
    chosen = gallery_choice(blend, run.labels.gesture, run.cfg)
    cards = [recording_html(int(i), {p: run.proba[p][i] for p in parts}, run) for i in chosen]
    return f'<div class="gallery">{"".join(cards)}</div>'


def recording_html(i: int, opinions: Mapping[str, F32], run: Outcome) -> str:
    """Recording i, and what each part says of it."""
    rec, labels, blend = run.rec, run.labels, opinions["blend/all"]
    truth, answer = int(labels.gesture[i]), int(blend.argmax())
    performed = labels.phase[rec.start[i] : rec.start[i + 1]] > 0
    title = GESTURES[truth] + (f" → {GESTURES[answer]}" if truth != answer else "")
    verdict = f"{'right' if truth == answer else 'wrong'} with {blend[answer]:.2f}"
    where = ORIENTATIONS[labels.orientation[i]]
    about = (rec.sequence_id[i], rec.subject[i], where, f"{len(performed)} rows", verdict)
    picture = plot(functools.partial(draw_recording, rec.part(i, i + 1), performed), 4.9)
    rows = [(part, opinion(p, truth)) for part, p in opinions.items()]
    return (
        f"<article><h3>{html.escape(title)}</h3><p>{html.escape(' · '.join(about))}</p>"
        f"{picture}{table_html(('', ''), rows, 'opinions')}</article>"
    )


# %% [markdown]
# What the run cost and how it was set up; then all parts in order, and the page.


# %%
def cost_part(cfg: Config) -> str:
    """Time and peak memory of every stage of this run."""
    longest = max((s.secs for s in STAGES), default=1.0)
    rows = [
        (
            s.name,
            Html(f'<div class="n">{s.secs:.1f}</div>'),
            bar_html(s.secs / longest),
            round(s.peak_mb),
        )
        for s in STAGES
    ]
    return table_html(("stage", "seconds", "", "peak MB"), rows, "stages")


def machine() -> list[tuple[str, str]]:
    """Processor, cores, memory and graphics cards."""
    import platform
    import subprocess

    model, cards = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()), "none"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no NVIDIA driver here
        ask_driver = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        told = subprocess.run(ask_driver, capture_output=True, text=True, timeout=30, check=True)
        cards = "; ".join(told.stdout.split("\n")).strip("; ") or "none"
    return [
        ("processor", model[1] if model else platform.machine()),
        ("cores", str(len(os.sched_getaffinity(0)))),
        ("memory", f"{memory:.1f} GB"),
        ("card", cards),
        ("system", platform.platform()),
        ("python", platform.python_version()),
    ]


def setup_part(cfg: Config) -> str:
    """Settings that differ from their defaults, all settings, versions and machine."""
    fields = [(f.name.upper(), shown(getattr(cfg, f.name)), shown(f.default), f.metadata["help"])
              for f in dataclasses.fields(cfg)]  # fmt: skip
    changed = [f[:3] for f in fields if f[1] != f[2]]
    every = table_html(("setting", "value", "default", "meaning"), fields, "settings")
    packages = dict.fromkeys(p for m in MEMBERS.values() for p in m.packages)
    names = ("numpy", "polars", "scipy", *packages, "joblib", "matplotlib", "grpcio", "protobuf")
    versions = [(name, package_version(name) or "not installed") for name in names]
    return (
        table_html(("setting", "value", "default"), changed, "changed")
        + f"<details><summary>All settings</summary>{every}</details>"
        + table_html(("", ""), machine() + versions, "machine")
    )


# fmt: off
TRAINED = (  # parts about training: title, what it shows, how it is made
    ("Result", "The competition's score of out-of-fold rows; mixed is the mean of both modes. Optimistic weights were found on the rows "
     "they are scored on, nested ones on the other folds. The assignment starts from the nested blend and gives each label once a subject: "
     "mean ± sd over random orders. Seconds: of a member's training; of the blend since the start.", result_part),
    ("F1 by class", "Nested blend. The orange mark is the anchor: one run of a gold-medal team on the real data, which scored .855 (all) and "
     ".810 (imu).", f1_part),
    ("Confusion", "Nested blend, recordings by true gesture (rows) and answer (columns), the eight targets first. Blue is right, orange wrong, "
     "deeper for a larger share of the row. Errors among the non-targets cost nothing.", confusion_part),
    ("Calibration", "How often an answer is right that was given with some confidence: on the dotted line confidence is honest, above it too "
     "modest. Marks grow with the number of recordings. ECE is the mean distance from the line.", calibration_part),
    ("Ensemble weights", "Share of each member in the blend that answers. IMU members also join the blend of the all mode.", weights_part),
    ("Learning curves", "Latest run of each fold, a thin line each: the score of its validation rows, below it the loss.", curves_part),
    ("Features", "Those of largest gain in the all mode, mean over the folds.", features_part),
    ("Gallery", "The mistakes that cost score, the most confident first (truth → answer), then some right answers by lot; recordings as the "
     "members see them, left-handers mirrored. Shaded: the gesture. Triangles: the moments of the ToF images, near dark, far light, nothing "
     "in range grey, missing blank. Below, the three likeliest gestures of the nested blend and of each member, the true one bold.", gallery_part),
)
ALWAYS = (
    ("Time and memory", "Seconds of each stage, and the most memory held until its end.", cost_part),
    ("Set-up", "Settings that differ from their defaults, machine and versions.", setup_part),
)
# fmt: on


def top_part(run: Outcome | None, cfg: Config) -> str:
    """Heading, the four figures that matter, and what should be known of them."""
    about, tiles = [time.strftime("%Y-%m-%d %H:%M %Z"), str(cfg.data_dir)], {}
    if run:
        n_subjects = len(np.unique(run.rec.subject))
        about.append(f"{len(run.rec):,} recordings of {n_subjects} subjects, {cfg.n_folds} folds")
        nested, assigned = run.results[-2:]
        tiles = {
            "nested blend, mixed": nested.mixed,
            **nested.scores,
            "assigned, mixed": assigned.mixed,
        }
    notices = {
        "Simulated data. The scores say how parts compare, not what the board will show.": simulates(
            cfg
        ),
        "matplotlib is not installed: this report has no plots.": not package_version("matplotlib"),
        f"No train.csv in {cfg.data_dir}: nothing was trained or scored.": run is None,
    }
    told = "".join(
        f'<p class="notice">{html.escape(n)}</p>' for n, is_so in notices.items() if is_so
    )
    figures = "".join(f"<div><b>{value:.4f}</b>{name}</div>" for name, value in tiles.items())
    return (
        f"<h1>Gestures from a wrist sensor: the run</h1><p>{html.escape(' · '.join(about))}</p>"
        f'{told}<div class="tiles">{figures}</div>'
    )


def report_html(run: Outcome | None, cfg: Config) -> str:
    """All parts, as they stand in the page and in a notebook."""
    parts = [(title, text, make(run)) for title, text, make in TRAINED] if run else []
    parts += [(title, text, make(cfg)) for title, text, make in ALWAYS]
    sections = "".join(
        f"<section><h2>{title}</h2><p>{text}</p>{part}</section>" for title, text, part in parts
    )
    return f'<style>{STYLE}</style><div class="report"><main>{top_part(run, cfg)}{sections}</main></div>'


REPORT_ERRORS = (
    ImportError, OSError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError, AssertionError,
    pl.exceptions.PolarsError,
)  # fmt: skip


def write_report(run: Outcome | None, cfg: Config) -> None:
    """report/index.html, shown in a notebook as well; a failure is an error with STRICT=1 only."""
    path = cfg.out / "report" / "index.html"
    try:
        body = report_html(run, cfg)
        head = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>CMI: the run</title>'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            '<link rel="icon" href="data:,"><style>body{margin:0}</style></head><body>'
        )
        write_whole(path, f"{head}{body}</body></html>\n")
        notebook = sys.modules.get("IPython")
        if notebook and notebook.get_ipython():
            notebook.display.display(notebook.display.HTML(body))
    except REPORT_ERRORS as error:
        if cfg.strict:
            raise
        log("warning", not_written=path, error=repr(error)[:200])
        return
    log("report", path=path, mb=path.stat().st_size / 2**20)


# %% [markdown]
# ## 14 Entry
#
# Off Kaggle, without CMI_DATA_DIR, a small data set is simulated and takes the same road.


# %%
DEMO = {"n_folds": 3, "lgbm_rounds": 250, "torch_max_epochs": 9, "keras_max_epochs": 9}


def find_data(cfg: Config) -> Path | None:
    """The competition's folder: named, or attached anywhere below /kaggle/input."""
    if cfg.cmi_data_dir:
        if not (cfg.cmi_data_dir / "test.csv").is_file():
            raise ConfigError(
                f"CMI_DATA_DIR={cfg.cmi_data_dir}: looked for test.csv in it, which does not exist."
            )
        return cfg.cmi_data_dir
    return next((p.parent for p in sorted(KAGGLE_INPUT.glob("**/test_demographics.csv"))), None)


def settle(cfg: Config, env: Mapping[str, str]) -> Config:
    """Make paths absolute and find the data; without any, simulate some and shorten the training."""
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
    knobs = {"subjects": cfg.sim_subjects, "test_subjects": cfg.sim_test_subjects,
             "recordings_per_subject": cfg.sim_recordings, "seed": cfg.seed}  # fmt: skip
    log("data", found="no competition data, CMI_DATA_DIR is not set", instead="simulating", **knobs)
    try:
        import cmi_simulator
    except ImportError:
        raise DataError(
            "No competition data: set CMI_DATA_DIR, or keep cmi_simulator.py beside this file."
        ) from None
    source = Path(cmi_simulator.__file__).read_bytes()
    folder = out / f"simulated-{digest(knobs, source)}"
    if not (folder / "test.csv").is_file():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        cmi_simulator.simulate(partial, **knobs)
        partial.rename(folder)
    return folder


def make_study(cfg: Config) -> Study:
    """Read the training data, find its folds and bring it into canonical form."""
    with stage("reading", cfg):
        rec, mark = cached_recordings(cfg.data_dir, cfg)
    assert rec.labels is not None
    fold = saved_folds(rec, cfg)
    with stage("wearer", cfg):
        turned, wearer = find_turned(rec, fold, cfg)
    log("data", folder=cfg.data_dir, recordings=len(rec), rows=len(rec.acc), subjects=len(set(rec.subject)),
        labels=len(rec.labels.table), upside_down=",".join(np.unique(rec.subject[turned])) or "none")  # fmt: skip
    fed = {m.prepare for name, m in MEMBERS.items() if not why_absent(name, cfg)}
    inputs = Inputs(canonical(rec, turned), cfg, pair={table_of, frames_of} <= fed)
    return Study(inputs, rec.labels, fold, mark, digest(turned), wearer)


def saved_folds(rec: Recordings, cfg: Config) -> I64:
    """Folds of folds.csv if it is of these recordings and this number of folds, else new ones."""
    path = cfg.out / "folds.csv"
    if path.exists():
        fold, why = read_folds(path, rec, cfg)
        if not why:
            return fold
        log("folds", path=path, why=why, instead="made anew")
    fold = make_folds(rec.subject, cfg)
    frame = pl.DataFrame({"sequence_id": rec.sequence_id, "subject": rec.subject, "fold": fold})
    write_whole(path, frame.write_csv())
    return fold


def read_folds(path: Path, rec: Recordings, cfg: Config) -> tuple[I64, str]:
    """Folds as they stand in a file, (N), and why they cannot be used; empty if they can."""
    try:
        saved = pl.read_csv(path, schema_overrides={"sequence_id": pl.String, "fold": pl.Int64})
        fold = saved["fold"].to_numpy().astype(np.int64)
        if saved["sequence_id"].to_list() != rec.sequence_id.tolist():
            return fold, "of other data"
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        return np.empty(0, np.int64), f"cannot be read ({error!s:.100})"
    if set(fold.tolist()) != set(range(cfg.n_folds)):
        return fold, f"its folds are not 0 … {cfg.n_folds - 1}"
    pairs = set(zip(rec.subject.tolist(), fold.tolist(), strict=True))
    return fold, "" if len(pairs) == len(set(rec.subject)) else "some subject is in two folds"


def train_all(cfg: Config) -> Outcome | None:
    """Plan, train or reuse, fill the out-of-fold rows, find the weights, print the result table."""
    study = make_study(cfg)
    plan = make_plan(study, cfg)
    print_plan(plan, cfg)
    if cfg.plan_only:
        return None
    present = list(dict.fromkeys(step.member for step in plan if step.action != "skip"))
    if not present:
        raise ConfigError("No member takes part: set USE_LGBM, USE_TORCH or USE_KERAS to 1.")
    fixed_weights(present, cfg)  # a mistake in them shows before hours of training
    oof = train_members(plan, study, cfg)
    with stage("blend", cfg):
        figures = blend_members(oof, plan, study, cfg)
    results = result_table(oof, figures, plan, study)
    print_results(results)
    return Outcome(study.inputs.rec, study.labels, results, cfg)


def result_table(
    oof: Mapping[tuple[str, str], F32],
    figures: Mapping[str, Mapping[str, float]],
    plan: Sequence[Step],
    study: Study,
) -> list[Result]:
    """Members, then the blend: out-of-fold scores by mode and seconds of training."""
    truth, table, results = study.labels.gesture, study.labels.table, []
    for member in dict.fromkeys(m for m, _ in oof):
        values = {
            m: score(truth, gesture_proba(oof[member, m], table).argmax(axis=1)) for m in MODES
        }
        secs = sum(last_secs(s.folder, s.jobs) for s in plan if s.member == member)
        results.append(Result(member, values, secs))
    total = time.monotonic() - STARTED
    for name, key in (
        ("blend (optimistic)", "optimistic"),
        ("blend (nested)", "nested"),
        ("blend + assignment", "assigned"),
    ):
        sd = {m: figures[m]["assigned_sd"] for m in MODES if key == "assigned"}
        results.append(Result(name, {m: figures[m][key] for m in MODES}, total, sd))
    return results


def print_results(results: Sequence[Result]) -> None:
    """Members × modes, then the blend, a line each."""
    for r in results:
        values = {m: f"{v:.4f}" for m, v in r.scores.items()}
        log("result", what=f"{r.name:<22}", **values, mixed=f"{r.mixed:.4f}", secs=f"{r.secs:.0f}")


HELP = {"--help": print_help, "--help-features": print_feature_help}


def help_out(word: str, cfg: Config) -> None:
    """Print what a word asks for; whoever reads it may stop early, as `head` does."""
    try:
        HELP[word](cfg)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end


def main(env: Mapping[str, str], arguments: Sequence[str] = ()) -> None:
    """The whole road, or what of it the settings ask for."""
    cfg = Config.from_env(env)
    for word in set(arguments) & set(HELP):
        help_out(word, cfg)
        return
    if cfg.dl_num_workers:
        log("note", DL_NUM_WORKERS=cfg.dl_num_workers, effect="none: batches need no workers")
    for name, meant in likely_typos(env):
        log("warning", variable=name, did_you_mean=meant)
    STAGES.clear()
    if cfg.rerun:
        cfg.out.mkdir(parents=True, exist_ok=True)
        serve(settle(cfg, env))
        return
    with contextlib.ExitStack() as held:
        for folder in sorted({cfg.out.resolve(), cfg.checkpoints.resolve()}):
            held.enter_context(only_run(folder))
        cfg = settle(cfg, env)
        outcome = None
        if (cfg.data_dir / "train.csv").is_file():
            outcome = train_all(cfg)
        else:
            log("plan", action="serve", why=f"no train.csv in {cfg.data_dir}")
        if not cfg.plan_only:
            serve(cfg)
            write_report(outcome, cfg)


FREE, OTHER, MOVE = (
    "Free some space there, or set OUTPUT_PATH to another disk; then run again, what is done is kept.",
    "Allow writing there, or set OUTPUT_PATH to a folder that can be written to.",
    "A file lies where a folder is needed, or the other way round: move it away.",
)
REMEDIES = {errno.ENOSPC: FREE, errno.EDQUOT: FREE, errno.EFBIG: FREE, errno.EROFS: OTHER, errno.EACCES: OTHER,
            errno.EPERM: OTHER, errno.ENOTDIR: MOVE, errno.EEXIST: MOVE, errno.EISDIR: MOVE}  # fmt: skip


def start(env: Mapping[str, str], arguments: Sequence[str]) -> str | None:
    """main; a mistake of the user's or of a disk comes back as one line instead of a traceback."""
    try:
        main(env, arguments)
    except (ConfigError, DataError) as error:
        return f"cmi_pipeline: {error}".replace("\n", " ")
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        place = error.filename or env.get("OUTPUT_PATH") or "the output folder"
        return f"cmi_pipeline: {place}: {os.strerror(error.errno)}. {REMEDIES[error.errno]}"
    return None


if __name__ == "__main__":
    if "__file__" in globals():
        start = importlib.import_module(Path(__file__).stem).start  # workers find classes by name
    mistake = start(os.environ, sys.argv[1:])
    if mistake:  # a notebook shows any exit as an error, a good one too
        sys.exit(mistake)
