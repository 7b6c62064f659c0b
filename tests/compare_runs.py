"""Compares the out-of-fold rows of runs on the same data and folds, as a table in markdown.

    python tests/compare_runs.py --before RUN [RUN …] --after RUN [RUN …]

A RUN is an output folder (folds.csv, oof/). Runs of one side are seeds: their mean counts. The interval
is a bootstrap over subjects of the difference, within each draw the same subjects on both sides.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cmi_pipeline as cmi

DRAWS = 2000
NAMES = [f"{name}_{mode}" for name in ("lgbm", "torch", "keras", "blend") for mode in cmi.MODES]


def subject_counts(runs: list[Path], name: str, truth: cmi.I64, subject: cmi.Str) -> cmi.F64:
    """Recordings by subject and class of the score, a table a run. → (runs, S, 9, 9)"""
    names, who = np.unique(subject, return_inverse=True)
    answers = [np.load(run / "oof" / f"oof_{name}_proba.npy").argmax(axis=1) for run in runs]
    return np.stack([cmi.count_classes(truth, a, who, len(names)) for a in answers])


def mean_score(counts: cmi.F64, draws: cmi.I64) -> cmi.F64:
    """Score of each draw of subjects, mean over the runs. (runs, S, 9, 9), (D, S) → (D)"""
    drawn = np.einsum("ds,rsij->drij", draws, counts)
    return np.mean(np.stack(cmi.f1_of_counts(drawn)), axis=(0, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, nargs="+", required=True)
    parser.add_argument("--after", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    sides, first = (options.before, options.after), options.after[0]
    truth, folds = np.load(first / "oof" / "y_true.npy"), pl.read_csv(first / "folds.csv")
    for run in (*options.before, *options.after):
        same = np.array_equal(np.load(run / "oof" / "y_true.npy"), truth)
        if not (same and pl.read_csv(run / "folds.csv").equals(folds)):
            sys.exit(f"{run} is of other data or folds.")
    subject = folds["subject"].to_numpy().astype(str)
    n = len(np.unique(subject))
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS)
    draws[0] = 1  # everybody once: the score itself
    print("| out of fold | before | after | difference | 95 % interval |\n|---|---|---|---|---|")
    for name in NAMES:
        counts = (subject_counts(side, name, truth, subject) for side in sides)
        before, after = (mean_score(own, draws) for own in counts)
        low, high = np.percentile((after - before)[1:], (2.5, 97.5))
        label = name.replace("_", " ") + (" (nested)" if name.startswith("blend") else "")
        change = f"{after[0] - before[0]:+.4f} | {low:+.3f} … {high:+.3f}"
        print(f"| {label} | {before[0]:.4f} | {after[0]:.4f} | {change} |")


if __name__ == "__main__":
    main()
