"""Runs of the pipeline on small simulated data: in a process or in this one; what they leave."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import cmi_pipeline as cmi

ROOT = Path(cmi.__file__).parent
SCRIPT = ROOT / "cmi_pipeline.py"
SMALL = {
    "SIM_SUBJECTS": "5", "SIM_TEST_SUBJECTS": "1", "SIM_RECORDINGS": "16", "N_FOLDS": "2",
    "LGBM_ROUNDS": "30", "LGBM_LR": "0.1", "TORCH_MAX_EPOCHS": "2", "KERAS_MAX_EPOCHS": "1",
    "FIXED_PAD_LEN": "90", "NO_ROTATION": "1", "STRICT": "1",
}  # fmt: skip
QUICK = {"USE_TORCH": "0", "USE_KERAS": "0"}
ALIKE = {"SUBJECT_ASSIGNMENT": "0"}  # answers do not depend on the order of the questions
PLAIN = {**QUICK, **ALIKE, "CMI_BACKEND": "threading"}
Question = tuple[pl.DataFrame, pl.DataFrame]
Road, Printed, Patch = tuple[Path, str], pytest.CaptureFixture[str], pytest.MonkeyPatch


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [probe.getsockname()[1] for probe in probes]


def clean_environment() -> dict[str, str]:
    """The environment without any setting of the pipeline."""
    names = {name.upper() for name in cmi.Config.__dataclass_fields__} | {"MODEL_PATH"}
    return {k: v for k, v in os.environ.items() if k not in names}


def environment(out: Path, **settings: str) -> dict[str, str]:
    """Of a run that draws no report; with STRICT=1 that would be an error."""
    hidden = {"PYTHONPATH": str(ROOT / "tests" / "without_matplotlib"), "STRICT": "0"}
    return {**clean_environment(), **SMALL, **hidden, "OUTPUT_PATH": str(out), **settings}


class Details:
    def __init__(self, out: Path) -> None:
        self.log = out / "logs" / "run.log"
        self.before = len(self.all())

    def all(self) -> bytes:
        return self.log.read_bytes() if self.log.is_file() else b""

    def __str__(self) -> str:
        return self.all()[self.before :].decode()


def call(*words: object, **how: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own; `python` is this one."""
    command = [sys.executable if word == "python" else str(word) for word in words]
    return subprocess.run(command, text=True, capture_output=True, timeout=1800, **how)


def dry_run(data: Path, *words: object, **how: Any) -> subprocess.CompletedProcess[str]:
    """Of the hidden re-run, as the gateway's own command does it."""
    command = "python", "-m", "kaggle_evaluation.dry_run", "--test-dir", data
    return call(*command, *words, cwd=ROOT, **how)


def run(out: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """In a process, without a report; its output is the screen's, a form feed, and the log's."""
    details = Details(out)
    done = call("python", SCRIPT, cwd=out.parent, env=environment(out, **settings))
    done.stdout += f"\f{details}"
    return done


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_here(out: Path, *words: str, **settings: str) -> str | None:
    """In this process, without a report; the line that it ends with. Its details are printed."""
    env = {**SMALL, "STRICT": "0", "CMI_BACKEND": "threading", "OUTPUT_PATH": str(out), **settings}
    details = Details(Path(env["OUTPUT_PATH"] or cmi.KAGGLE_WORKING))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        line = cmi.start(env, words)
    print(details)
    return line


def config(out: Path, **settings: str) -> cmi.Config:
    """Of a folder that holds its simulated data."""
    own = {"OUTPUT_PATH": str(out), "CMI_BACKEND": "threading"}
    data = {} if "CMI_DATA_DIR" in settings else {"CMI_DATA_DIR": str(data_of(out))}
    return cmi.Config.from_env({**SMALL, **own, **data, **settings})


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, its long lines as one."""
    return " ".join(capsys.readouterr().out.split())


def plan_of(printed: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(member, mode) → (action, why)"""
    lines = re.findall(r"plan +member=(\w+) +mode=(\w+) +action=(\w+) .*?why=(.*?)  path=", printed)
    return {(member, mode): (action, why) for member, mode, action, why in lines}


def data_of(out: Path) -> Path:
    (data,) = out.glob("simulated-*")
    return data


def copied(folder: Path, to: Path, *without: str) -> Path:
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns(*without)))


def questions(data: Path) -> list[Question]:
    """What the gateway asks of a test file."""
    test = pl.read_csv((data / "test.csv").read_bytes(), infer_schema_length=None)
    people = pl.read_csv((data / "test_demographics.csv").read_bytes())
    parts = test.partition_by("sequence_id")
    return [(part, people.filter(subject=part["subject"][0])) for part in parts]


def check_submission(out: Path, data: Path) -> None:
    """Every recording asked about has one of the gestures."""
    answer = pl.read_parquet((out / "submission.parquet").read_bytes())
    asked = {frame["sequence_id"][0] for frame, _ in questions(data)}
    assert answer.columns == ["sequence_id", "gesture"]
    assert sorted(answer["sequence_id"]) == sorted(asked)
    assert set(answer["gesture"]) <= set(cmi.GESTURES)


def same_answers(one: Path, other: Path, *members: str) -> None:
    """Out-of-fold rows of two folders are equal to the last bit; Keras's to 1e-6."""
    kinds = [f"{m}_{mode}_{kind}" for m in members for mode in ("all", "imu")
             for kind in ("proba", "composite")]  # fmt: skip
    for name in ("y_true.npy", *(f"oof_{kind}.npy" for kind in kinds)):
        a, b = (np.load(folder / "oof" / name) for folder in (one, other))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 if "keras" in name else 0, err_msg=name)


def same_outcome(one: Path, other: Path, *members: str) -> None:
    """And so are weights, scores and the submission."""
    same_answers(one, other, *members)
    a, b = (json.loads((f / "ensemble" / "weights.json").read_text()) for f in (one, other))
    for mode in ("all", "imu"):
        assert a["modes"][mode]["parts"] == b["modes"][mode]["parts"]
        assert a["modes"][mode]["weights"] == pytest.approx(b["modes"][mode]["weights"], abs=1e-4)
    for name in ("labels", "capacity", "wearer"):
        assert a[name] == b[name], name
    tables = (json.loads((f / "oof" / "scores.json").read_text()) for f in (one, other))
    a, b = ([row["score"] for row in table["rows"]] for table in tables)
    assert a == pytest.approx(b, abs=1e-6)
    a, b = (pl.read_parquet((f / "submission.parquet").read_bytes()) for f in (one, other))
    assert a.sort("sequence_id").equals(b.sort("sequence_id"))


class Running:
    """A process in a group of its own that writes into a folder."""

    def __init__(self, out: Path, *command: str, **settings: str) -> None:
        self.out, self.output = out, out.with_name(f"{out.name}-printed.txt")
        self.details = Details(out)
        self.before = self.files()
        words, env = command or (sys.executable, str(SCRIPT)), environment(out, **settings)
        how: Any = {"cwd": out.parent, "env": env, "start_new_session": True}
        how |= {"stdin": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with self.output.open("w") as file:
            self.process = subprocess.Popen(words, stdout=file, **how)

    def files(self) -> dict[Path, int]:
        """When each file was written."""
        found = {}
        for folder, folders, names in os.walk(self.out):  # it passes over folders that are gone
            for path in (Path(folder, name) for name in (*folders, *names)):
                with contextlib.suppress(OSError):  # gone meanwhile
                    found[path.relative_to(self.out)] = path.stat().st_mtime_ns
        return found

    @property
    def printed(self) -> str:
        return str(self.details) + self.output.read_text()

    def until(self, *patterns: str, secs: float = 300) -> str:
        """Wait until it has written a file that matches; the pattern."""
        until = time.monotonic() + secs
        while time.monotonic() < until and self.process.poll() is None:
            new = [p for p, at in self.files().items() if self.before.get(p) != at]
            for pattern in patterns:
                if any(path.match(pattern) for path in new):
                    return pattern
            time.sleep(0.01)
        pytest.fail(f"no {' or '.join(patterns)} before it ended:\n{self.printed[-3000:]}")

    def send(self, number: int) -> None:
        """A signal to all of its processes, as a terminal does."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        assert self.process.wait(30) == -signal.SIGKILL, "it had ended by itself"

    def end(self, secs: float = 600) -> str:
        assert self.process.wait(secs) == 0, self.printed[-3000:]
        return self.printed
