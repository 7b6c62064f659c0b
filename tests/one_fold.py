"""Train one fold of one member on simulated recordings, by default as many as the competition's, and
print its score, with a 95 % interval by bootstrap over the subjects of the fold, and its cost.

    python tests/one_fold.py torch imu SEED=2 TORCH_BATCH_SIZE=64
    python tests/one_fold.py lgbm all --subjects 12 --fold 1

NAME=value are the pipeline's settings; recordings and folds are the same for every SEED.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import fit_fold, training_data
from compare_runs import mean_score

import cmi_pipeline as cmi


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("member", choices=[*cmi.MEMBERS])
    parser.add_argument("mode", choices=cmi.MODES)
    parser.add_argument("settings", nargs="*", metavar="NAME=value")
    parser.add_argument("--subjects", type=int, default=81)
    parser.add_argument("--fold", type=int, default=0)
    options = parser.parse_args()
    member = cmi.MEMBERS[options.member]
    with tempfile.TemporaryDirectory() as scratch:
        env = {"OUTPUT_PATH": scratch, **dict(word.split("=", 1) for word in options.settings)}
        data = training_data(options.subjects, cfg := cmi.Config.from_env(env))
        job, x, (secs, used) = fit_fold(options.member, options.mode, options.fold, data, cfg)
        models = member.load(job.folder, [job.stem], data.labels.table, cfg)
        composite = member.predict(models, x.take(job.valid))[0]
    proba, truth = cmi.gesture_proba(composite, data.labels.table), data.labels.gesture[job.valid]
    names, who = np.unique(data.inputs.rec.subject[job.valid], return_inverse=True)
    n = len(names)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), cmi.DRAWS)
    counts = cmi.count_classes(truth, proba.argmax(axis=1), who, n)  # (subjects, 9, 9)
    found = cmi.with_interval(mean_score(counts[None], np.vstack([np.ones(n, int), draws])))
    took = f"{len(job.train):,} recordings, {secs:.0f} s, processor {used:.0f} s"
    print(f"{' '.join(sys.argv[1:])}: {took}; scored on {len(truth):,} of {n} others")
    print(f"score {found['score']:.4f} [{found['low']:.3f}, {found['high']:.3f}]", end="  ")
    print(f"log loss {cmi.log_loss(proba, truth):.3f}")


if __name__ == "__main__":
    main()
