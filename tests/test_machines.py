"""More than one process: the same artefacts on every backend, and after the death of a worker."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from test_road import ROOT, SMALL, clean_environment

import cmi_pipeline as cmi

FILES = {"lgbm": ("", "_orientation", "_behavior"), "torch": ("",)}  # of the model of a fold
ENDS = {"lgbm": ".txt", "torch": ".pt"}
TWO = {"CMI_WORKERS": "2", "USE_KERAS": "0"}


class Process:
    """A child whose output is collected while it runs, in a working folder far from the repository."""

    def __init__(self, command: list[str], cwd: Path, **env: str) -> None:
        outer = {k: v for k, v in clean_environment().items() if k != "PYTHONPATH"}
        self.child = subprocess.Popen(
            command, cwd=cwd, env={**outer, "HOME": str(cwd), **env}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        assert self.child.stdout
        self.lines.extend(iter(self.child.stdout.readline, ""))

    @property
    def printed(self) -> str:
        return "".join(self.lines)

    def wait_for(self, pattern: str, secs: float = 120) -> re.Match[str]:
        until = time.monotonic() + secs
        while time.monotonic() < until:
            if found := re.search(pattern, self.printed):
                return found
            if self.child.poll() is not None:
                self.reader.join(10)
                break
            time.sleep(0.02)
        found = re.search(pattern, self.printed)
        assert found, f"{pattern!r} was not printed:\n{self.printed[-3000:]}"
        return found

    def end(self, secs: float = 300) -> str:
        """Wait for a good end; what it printed."""
        assert self.child.wait(secs) == 0, self.printed[-3000:]
        self.reader.join(10)
        return self.printed


def start(out: Path, data: Path | None, **settings: str) -> Process:
    """The pipeline as a script."""
    where = {"CMI_DATA_DIR": str(data)} if data else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    return Process([sys.executable, str(ROOT / "cmi_pipeline.py")], out.parent,
                   **{**SMALL, **TWO, **where, "OUTPUT_PATH": str(out), **settings})  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run in one process: its output, and the data it was trained on."""
    out = tmp_path_factory.mktemp("alone") / "out"
    start(out, None, CMI_WORKERS="1").end()
    return out, next(out.glob("simulated-*"))


def artefacts(out: Path, members: tuple[str, ...]) -> dict[str, bytes]:
    """Models and out-of-fold rows, by their path."""
    paths = [
        Path(f"{m}_models", mode, f"fold{k:02d}{part}{ENDS[m]}")
        for m in members
        for mode in ("all", "imu")
        for k in (0, 1)
        for part in FILES[m]
    ]
    paths += [
        Path("oof", f"oof_{m}_{mode}_{of}.npy")
        for m in members
        for mode in ("all", "imu")
        for of in ("proba", "composite")
    ]
    return {str(p): (out / p).read_bytes() for p in [Path("folds.csv"), *paths]}


def assert_same(
    out: Path, other: tuple[Path, Path], members: tuple[str, ...] = ("lgbm", "torch")
) -> None:
    now, then = artefacts(out, members), artefacts(other[0], members)
    assert [name for name in now if now[name] != then[name]] == []
    if len(members) > 1:
        blends = [
            json.loads((o / "ensemble" / "weights.json").read_text()) for o in (out, other[0])
        ]
        assert blends[0]["modes"] == blends[1]["modes"]
    assert (out / "submission.parquet").is_file()


def children(pid: int) -> list[int]:
    """Processes started by a process, directly."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def seconds(line: str) -> float:
    found = re.match(r"\[ *([\d.]+)s\]", line)
    assert found, line
    return float(found[1])


def test_two_processes_give_the_same_bytes(alone: tuple[Path, Path], tmp_path: Path) -> None:
    """And their log lines count from the start of the run, as those of the run itself do."""
    process = start(tmp_path / "out", alone[1])
    printed = process.end()
    assert_same(tmp_path / "out", alone)
    assert "lost_worker" not in printed
    lines = [s for s in printed.splitlines() if re.search(r"\] (plan|fit|member) ", s)]
    fits = [seconds(s) for s in lines if "] fit" in s]
    assert len(fits) == 10  # two members in two modes, LightGBM in a third; two folds
    before, after = (
        max(seconds(s) for s in lines if "] plan" in s),
        max(seconds(s) for s in lines if "] member" in s),
    )
    assert before - 0.2 <= min(fits) <= max(fits) <= after + 0.2


@pytest.mark.parametrize(
    ("member", "begun"),
    [
        ("lgbm", r"\] fit .*lgbm/imu/fold01"),
        pytest.param("torch", r"\] torch .*torch/all/fold00", marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_is_replaced(
    alone: tuple[Path, Path], tmp_path: Path, member: str, begun: str
) -> None:
    others = {f"USE_{m.upper()}": "0" for m in cmi.MEMBERS if m != member}
    process = start(tmp_path / "out", alone[1], **others)
    process.wait_for(begun)
    workers = [pid for pid in children(process.child.pid) if "LokyProcess" in command(pid)]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    printed = process.end()
    assert re.search(r"warning +lost_worker=TerminatedWorkerError", printed)
    assert re.search(rf"warning +without_result=[12]  of=2  again={member}/", printed)
    assert_same(tmp_path / "out", alone, (member,))


@pytest.fixture
def jobs(tmp_path: Path) -> list[cmi.Job]:
    """Three jobs, each with the note of an earlier run."""
    rows = cmi.np.arange(6)
    made = [
        cmi.Job("lgbm", "all", 0, k, rows[rows % 3 != k], rows[rows % 3 == k],
                tmp_path / "models", tmp_path / "scratch", tmp_path / "logs")
        for k in range(3)
    ]  # fmt: skip
    for job in made:
        cmi.write_json(job.note, "stale")
    return made


class Study:
    """What run_jobs asks of a study."""

    class inputs:
        table = type("Table", (), {"of_mode": lambda *_: None})()


def workers_that(
    do: Callable[[int, list[cmi.Job]], None], monkeypatch: pytest.MonkeyPatch
) -> list[list[int]]:
    """Replace the workers; the folds that they were handed, call by call."""
    calls: list[list[int]] = []

    def side_by_side(jobs: list[cmi.Job], *_: Any) -> None:
        calls.append([job.fold for job in jobs])
        do(len(calls), jobs)

    monkeypatch.setattr(cmi, "run_side_by_side", side_by_side)
    return calls


def test_only_what_has_no_result_of_this_run_is_trained_again(
    jobs: list[cmi.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_once(call: int, handed: list[cmi.Job]) -> None:
        for job in handed[:1] if call == 1 else handed:
            cmi.write_json(job.note, "fresh")
        if call == 1:
            raise BrokenProcessPool("killed")

    calls = workers_that(die_once, monkeypatch)
    cmi.run_jobs(jobs, Study, cmi.Config(cmi_workers=2))  # type: ignore[arg-type]
    assert calls == [[0, 1, 2], [1, 2]]
    assert [cmi.read_json(job.note) for job in jobs] == ["fresh"] * 3


def test_a_result_that_is_lost_in_silence_is_noticed(
    jobs: list[cmi.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that does not share OUTPUT_PATH writes elsewhere and reports success."""
    calls = workers_that(lambda *_: None, monkeypatch)
    with pytest.raises(cmi.DataError, match=r"3 of 3 jobs .* it must see"):
        cmi.run_jobs(jobs, Study, cmi.Config(cmi_workers=2))  # type: ignore[arg-type]
    assert calls == [[0, 1, 2]] * 3


def test_an_error_of_the_training_is_raised_at_once(
    jobs: list[cmi.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    calls = workers_that(fail, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        cmi.run_jobs(jobs, Study, cmi.Config(cmi_workers=2))  # type: ignore[arg-type]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("backend", "expected"), [("loky", 3), ("threading", 3), ("dask", 2), ("ray", 2)]
)
def test_only_cmi_workers_says_how_large_a_cluster_is(
    jobs: list[cmi.Job], monkeypatch: pytest.MonkeyPatch, backend: str, expected: int
) -> None:
    """Ray would wait for ever for more workers than it was started with."""
    asked = []

    def side_by_side(jobs: list[cmi.Job], *others: Any) -> None:
        asked.append(others[-1])
        for job in jobs:
            cmi.write_json(job.note, "fresh")

    monkeypatch.setattr(cmi, "cluster", lambda *_: ({}, ()))
    monkeypatch.setattr(cmi, "run_side_by_side", side_by_side)
    cards = cmi.dataclasses.replace(cmi.MEMBERS["lgbm"], side_by_side=lambda *_: 16)
    monkeypatch.setitem(cmi.MEMBERS, "lgbm", cards)
    cmi.run_jobs(jobs, Study, cmi.Config(cmi_workers=2, cmi_backend=backend))  # type: ignore[arg-type]
    assert asked == [expected]


@pytest.mark.parametrize(("backend", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_backend_that_is_not_installed_is_named(
    jobs: list[cmi.Job], monkeypatch: pytest.MonkeyPatch, backend: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        cmi.ConfigError, match=f"CMI_BACKEND={backend} needs a package: .*{package}"
    ):
        cmi.run_jobs(jobs, Study, cmi.Config(cmi_workers=2, cmi_backend=backend))  # type: ignore[arg-type]


def test_jobs_that_start_together_take_different_cards(
    jobs: list[cmi.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of their start, the jobs of three seeds go from card to card."""

    class Turn(Exception):
        pass

    def take(index: int, _: cmi.Config) -> None:
        raise Turn(index)

    monkeypatch.setattr(cmi, "device_for", take)
    turns = []
    for job in (cmi.dataclasses.replace(j, seed=seed) for seed in range(3) for j in jobs):
        with pytest.raises(Turn) as turn:
            cmi.new_training(job, None, None, cmi.Config(n_folds=3))  # type: ignore[arg-type]
        turns.append(turn.value.args[0])
    assert turns == list(range(9))


LOCAL_CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        pids = [worker.pid for worker in cluster.workers.values()]
        print("cluster", cluster.scheduler_address, *pids, flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[tuple[Process, str, int]]:
    """A Dask cluster of two worker processes that knows nothing of the repository.

    The process, the scheduler's address, the process id of a worker.
    """
    pytest.importorskip("distributed")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "local_cluster.py").write_text(LOCAL_CLUSTER)
    process = Process([sys.executable, "local_cluster.py"], folder)
    found = process.wait_for(r"cluster (\S+) (\d+) (\d+)\n")
    yield process, found[1], int(found[2])
    assert process.child.stdin
    process.child.stdin.close()
    process.child.wait(60)


def test_a_running_dask_cluster_gives_the_same_bytes(
    alone: tuple[Path, Path], tmp_path: Path, dask: tuple[Process, str, int]
) -> None:
    out = tmp_path / "here" / "out"
    printed = start(out, alone[1], CMI_BACKEND="dask", DASK_SCHEDULER=dask[1]).end()
    assert_same(out, alone)
    assert "] fit" not in printed
    assert dask[0].printed.count("] fit") == 10


def test_a_killed_dask_worker_is_replaced(
    alone: tuple[Path, Path], tmp_path: Path, dask: tuple[Process, str, int]
) -> None:
    out = tmp_path / "here" / "out"
    process = start(out, alone[1], CMI_BACKEND="dask", DASK_SCHEDULER=dask[1], USE_TORCH="0")
    dask[0].wait_for(r"(?s)\] fit .*\] fit ")  # a job each
    os.kill(dask[2], signal.SIGKILL)
    process.end()
    assert_same(out, alone, ("lgbm",))
    assert dask[0].printed.count("] fit") == 7  # six jobs, one of them twice


@pytest.mark.slow
def test_dask_starts_workers_of_its_own(alone: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    start(tmp_path / "out", alone[1], CMI_BACKEND="dask").end()
    assert_same(tmp_path / "out", alone)


# Ray's workers have niceness 15 otherwise, and starve beside whatever else runs here
NOT_NICE = {"RAY_worker_niceness": "0"}


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A short path: Ray's sockets lie below it."""
    pytest.importorskip("ray")
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def ray_workers(pid: int) -> list[int]:
    """Processes below a process that run a job of a Ray pool."""
    below = children(pid)
    return [p for p in below if "PoolActor.run_batch" in command(p)] + [
        w for p in below for w in ray_workers(p)
    ]


@pytest.mark.slow
def test_a_local_ray_gives_the_same_bytes_though_a_worker_is_killed(
    alone: tuple[Path, Path], ray_folder: Path
) -> None:
    out = ray_folder / "out"
    process = start(
        out, alone[1], CMI_BACKEND="ray", RAY_TMPDIR=str(ray_folder), RAY_DEDUP_LOGS="0", **NOT_NICE
    )
    process.wait_for(r"\] fit .*lgbm/all")
    os.kill(ray_workers(process.child.pid)[0], signal.SIGKILL)
    printed = process.end()
    assert re.search(r"warning +lost_worker=ActorDiedError", printed)
    assert_same(out, alone)


@pytest.mark.slow
def test_a_running_ray_gives_the_same_bytes(alone: tuple[Path, Path], ray_folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = shutil.which("ray", path=str(Path(sys.executable).parent))
    assert ray
    head = Process(
        [ray, "start", "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2",
         "--include-dashboard=false", "--block"],
        ray_folder, RAY_TMPDIR=str(ray_folder), **NOT_NICE,
    )  # fmt: skip
    try:
        head.wait_for("Ray runtime started")
        out = ray_folder / "out"
        start(out, alone[1], CMI_BACKEND="ray", RAY_ADDRESS=f"127.0.0.1:{port}").end()
        assert_same(out, alone)
    finally:
        head.child.terminate()
        head.child.wait(60)
