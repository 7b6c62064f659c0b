"""One worker against two, in turns on the same data: README's "More than one machine".

    python tests/benchmark_machines.py [TURNS]

Seconds from the plan, or the member before, to a member's out-of-fold score; the least of the turns,
because whatever else runs on the machine only ever adds to them. The load average before each run
is part of the table: on a machine that is not idle two workers cannot be the faster ones.
"""

import functools
import os
import re
import sys
import tempfile
from pathlib import Path

from measured import Row, cmi, pipeline, report

SETTINGS = {"SIM_SUBJECTS": "12", "SIM_TEST_SUBJECTS": "1", "SIM_RECORDINGS": "40", "N_FOLDS": "4",
            "LGBM_ROUNDS": "60", "TORCH_MAX_EPOCHS": "2", "USE_KERAS": "0"}  # fmt: skip


def member_seconds(printed: str) -> dict[str, float]:
    """Seconds of each member, all modes together, by the lines of a run."""
    secs: dict[str, float] = {}
    before = 0.0
    events = re.findall(r"^\[ *([\d.]+)s\] (plan|member) +member=(\w+)", printed, re.M)
    for now, event, member in ((float(s), event, member) for s, event, member in events):
        if event == "member":
            secs[member] = secs.get(member, 0.0) + now - before
        before = now
    return secs


def machines(turns: int = 3) -> list[Row]:
    """One worker and two, each run with nothing to reuse."""
    taken: dict[tuple[str, int], list[float]] = {}
    loads: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        pipeline(Path(folder, "data"), SETTINGS | {"PLAN_ONLY": "1"})
        data = str(next(Path(folder, "data").glob("simulated-*")))
        for turn in range(turns):
            for workers in loads:
                out = Path(folder, f"turn{turn}-{workers}")
                loads[workers].append(os.getloadavg()[0])
                ours = {"CMI_DATA_DIR": data, "CMI_WORKERS": str(workers)}
                secs = member_seconds(pipeline(out, SETTINGS | ours))
                cmi.log("turn", turn=turn, workers=workers, load=loads[workers][-1], **secs)
                for member, value in secs.items():
                    taken.setdefault((member, workers), []).append(value)
    members = dict.fromkeys(m for m, _ in taken)
    return [
        *(Row(f"{m}, two workers, against one", min(taken[m, 2]), min(taken[m, 1]), "s")
          for m in members),
        *(Row(f"load average before turn {turn + 1}, two workers, and one", two, one)
          for turn, (one, two) in enumerate(zip(loads[1], loads[2], strict=True))),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(report({"machines": functools.partial(machines, *map(int, sys.argv[1:2]))}))
