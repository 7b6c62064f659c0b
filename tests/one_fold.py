"""Train one fold of one member on simulated recordings, by default as many as the competition's, and
print its score, with a 95 % interval by bootstrap over the subjects of the fold, and its cost.

    python tests/one_fold.py torch imu SEED=2 TORCH_BATCH_SIZE=64
    python tests/one_fold.py lgbm all --subjects 12 --fold 1

NAME=value are the pipeline's settings; recordings and folds are the same for every SEED.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import benchmark

import cmi_pipeline as cmi


def train(options: argparse.Namespace) -> tuple[cmi.F32, cmi.I64, cmi.Str, str]:
    """Gesture probabilities of the fold's own recordings, truth, subjects, and what it took."""
    member = cmi.MEMBERS[options.member]
    with tempfile.TemporaryDirectory() as scratch:
        env = {"OUTPUT_PATH": scratch, **dict(word.split("=", 1) for word in options.settings)}
        cfg = cmi.Config.from_env(env)
        rec, _ = cmi.cached_recordings(benchmark.simulated(options.subjects, 102), cfg)
        assert rec.labels is not None
        fold = cmi.make_folds(rec.subject, dataclasses.replace(cfg, seed=42))
        inputs = cmi.Inputs(cmi.canonical(rec, np.zeros(len(rec), bool)))
        data = cmi.TrainingData(inputs, rec.labels, fold, "", "", None)
        job = next(
            j for j in data.jobs(options.member, options.mode, cfg) if j.fold == options.fold
        )
        job.folder.mkdir(parents=True)
        x = member.prepare(inputs, options.mode)
        began, used = time.perf_counter(), time.process_time()
        member.fit(job, x, rec.labels, cfg)
        secs, used = time.perf_counter() - began, time.process_time() - used
        models = member.load(job.folder, [job.stem], rec.labels.table, cfg)
        composite = member.predict(models, x.take(job.valid))[0]
    took = f"{len(job.train):,} recordings, {secs:.0f} s, processor {used:.0f} s"
    proba = cmi.gesture_proba(composite, rec.labels.table)
    return proba, rec.labels.gesture[job.valid], rec.subject[job.valid], took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("member", choices=[*cmi.MEMBERS])
    parser.add_argument("mode", choices=cmi.MODES)
    parser.add_argument("settings", nargs="*", metavar="NAME=value")
    parser.add_argument("--subjects", type=int, default=81)
    parser.add_argument("--fold", type=int, default=0)
    proba, truth, subject, took = train(parser.parse_args())
    said = proba.argmax(axis=1)
    names, who = np.unique(subject, return_inverse=True)
    n = len(names)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 1000)
    counts = cmi.count_classes(truth, said, who, n)  # (subjects, 9, 9)
    scores = cmi.f1_of_counts(np.einsum("ds,sij->dij", draws, counts)).mean(axis=0)
    low, high = np.percentile(scores, (2.5, 97.5))
    print(f"{' '.join(sys.argv[1:])}: {took}; scored on {len(truth):,} of {n} others")
    print(f"score {cmi.score(truth, said):.4f} [{low:.3f}, {high:.3f}]", end="  ")
    print(f"log loss {cmi.log_loss(proba, truth):.3f}")


if __name__ == "__main__":
    main()
