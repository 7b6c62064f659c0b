"""One worker against two, in turns on the same data: prints the table of README's "More than one machine".

    python tests/benchmark_machines.py [TURNS]

Seconds from the plan, or the member before, to a member's out-of-fold score; the least of the turns,
because whatever else runs on the machine only ever adds to them.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import cmi_pipeline as cmi

SETTINGS = {"SIM_SUBJECTS": "12", "SIM_TEST_SUBJECTS": "1", "SIM_RECORDINGS": "40", "N_FOLDS": "4",
            "LGBM_ROUNDS": "60", "TORCH_MAX_EPOCHS": "2", "USE_KERAS": "0"}  # fmt: skip


def run(out: Path, **settings: str) -> dict[str, float]:
    """Seconds of each member, both modes together, in a run with nothing to reuse."""
    known = {f.name.upper() for f in cmi.dataclasses.fields(cmi.Config)} | {"MODEL_PATH"}
    env = {k: v for k, v in os.environ.items() if k not in known}
    done = subprocess.run(
        [sys.executable, cmi.__file__], cwd=out.parent, text=True, capture_output=True, check=True,
        env={**env, **SETTINGS, "OUTPUT_PATH": str(out), **settings},
    )  # fmt: skip
    secs: dict[str, float] = {}
    before = 0.0
    events = re.findall(r"^\[ *([\d.]+)s\] (plan|member) +member=(\w+)", done.stdout, re.M)
    for now, event, member in ((float(s), event, member) for s, event, member in events):
        if event == "member":
            secs[member] = secs.get(member, 0.0) + now - before
        before = now
    return secs


def main(turns: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder, "data"), PLAN_ONLY="1")
        data = str(next(Path(folder, "data").glob("simulated-*")))
        taken: dict[tuple[str, int], list[float]] = {}
        for turn in range(turns):
            for workers in (1, 2):
                out = Path(folder, f"turn{turn}-{workers}")
                secs = run(out, CMI_DATA_DIR=data, CMI_WORKERS=str(workers))
                for member, value in secs.items():
                    taken.setdefault((member, workers), []).append(value)
                print(
                    f"turn {turn}  workers {workers}  load {os.getloadavg()[0]:.1f}  {secs}",
                    flush=True,
                )
    print("| | 1 worker | 2 workers | ratio |\n|---|---|---|---|")
    for member in dict.fromkeys(m for m, _ in taken):
        one, two = min(taken[member, 1]), min(taken[member, 2])
        print(f"| {member} | {one:.1f} s | {two:.1f} s | {one / two:.2f} × |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
