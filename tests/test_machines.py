"""More than one process: the same files on every backend, and a clear end when a worker dies."""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import runs
from runs import ALIKE, PLAIN, QUICK, Patch, Road, Running, data_of, run_here

SLOW = ("loky", "1"), ("threading", "1"), ("dask", "0"), ("ray", "0")
SLOW = [pytest.param(*words, marks=pytest.mark.slow) for words in SLOW]
PACKAGES = {"dask": "distributed", "ray": "ray"}
CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        print("cluster", cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


def start(road: Road, out: Path, **settings: str) -> Running:
    two = {"CMI_WORKERS": "2", "USE_KERAS": "0", "CMI_DATA_DIR": str(data_of(road[0]))}
    return Running(out, **{**two, **settings})


def assert_same(road: Road, out: Path, *members: str) -> None:
    """Models and out-of-fold rows are those of the full run, to the last byte; Keras's nearly."""
    runs.same_answers(road[0], out, *members)
    models = {p for end in ("txt", "pt") for p in out.glob(f"*_models/*/fold*.{end}")}
    assert len(models) >= 18 + 4 * ("torch" in members)
    for path in models:
        assert path.read_bytes() == (road[0] / path.relative_to(out)).read_bytes(), path
    assert (out / "submission.parquet").is_file()


@pytest.mark.parametrize(("backend", "keras"), [("loky", "0"), *SLOW])
def test_two_workers_leave_the_same(road: Road, tmp_path: Path, backend: str, keras: str) -> None:
    """Their log lines count from the start of the run, as those of the run itself do."""
    pytest.importorskip(PACKAGES.get(backend, "joblib"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as short:  # for Ray's sockets
        rays = {"RAY_TMPDIR": short, "RAY_worker_niceness": "0"}  # not to starve beside others
        running = start(road, tmp_path / "out", USE_KERAS=keras, CMI_BACKEND=backend, **rays)
        lines = str(running.details).splitlines() if running.end() else []
    assert_same(road, tmp_path / "out", *("lgbm", "torch", "keras")[: 2 + int(keras)])
    if backend not in PACKAGES:
        words = ("] plan  ", "] fit  ", "] blend  ")
        plan, fit, blend = ([float(s[1:8]) for s in lines if word in s] for word in words)
        assert max(plan) - 0.2 <= min(fit) <= max(fit) <= max(blend) + 0.2


def test_a_dead_worker_is_one_clear_line(road: Road, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = start(road, out, **QUICK, **ALIKE)
    running.until("lgbm_models/*/fold??.json")
    tasks = Path(f"/proc/{running.process.pid}/task").glob("*/children")
    children = [child for task in tasks for child in task.read_text().split()]
    workers = [c for c in children if "LokyProcess" in Path(f"/proc/{c}/cmdline").read_text()]
    os.kill(int(workers[0]), signal.SIGKILL)
    assert running.process.wait(600) == 1
    line = running.printed.strip().splitlines()[-1]
    assert line.startswith("cmi_pipeline: A worker died while training lgbm")
    assert "Run again: what is done is kept" in line
    assert "Traceback" not in running.printed
    done = {p: p.stat().st_mtime_ns for p in out.glob("lgbm_models/*/fold??.json")}
    assert 0 < len(done) < 6
    assert run_here(out, CMI_DATA_DIR=str(data_of(plain)), **PLAIN) is None
    assert all(path.stat().st_mtime_ns == at for path, at in done.items())
    runs.same_outcome(plain, out, "lgbm")


def test_a_backend_that_is_absent_is_named(plain: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    where = {"CMI_DATA_DIR": str(data_of(plain)), "CMI_WORKERS": "2"}
    for backend, package in PACKAGES.items():
        monkeypatch.setitem(sys.modules, package, None)
        line = run_here(tmp_path / "out", CMI_BACKEND=backend, **QUICK, **where) or ""
        assert line.startswith(f"cmi_pipeline: CMI_BACKEND={backend} needs a package: ")
        assert package in line


def test_a_dask_cluster_gives_the_same_bytes(road: Road, tmp_path: Path) -> None:
    """Of two worker processes that start in another folder and know nothing of the repository."""
    pytest.importorskip("distributed", reason="Dask is not installed (pip install distributed)")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "cluster.py").write_text(CLUSTER)
    cluster = Running(tmp_path / "elsewhere" / "out", sys.executable, "cluster.py", PYTHONPATH="")
    while "cluster tcp" not in cluster.printed:
        assert cluster.process.poll() is None, cluster.printed
        time.sleep(0.1)
    scheduler, out = cluster.printed.split("cluster ")[1].split()[0], tmp_path / "out"
    printed = start(road, out, CMI_BACKEND="dask", DASK_SCHEDULER=scheduler, **QUICK).end()
    assert_same(road, out, "lgbm")
    assert "] fit" in printed  # its workers reach the log of the run
    assert cluster.process.stdin
    cluster.process.stdin.close()
    cluster.process.wait(600)
