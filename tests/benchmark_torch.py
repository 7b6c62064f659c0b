"""What the Torch member scores against simpler networks, and how fast it learns and answers.

    python tests/benchmark_torch.py            # about half an hour on two idle cores
    python tests/benchmark_torch.py --speed    # batches and serving only, about a minute
    python tests/benchmark_torch.py --defaults # what other settings score, an hour on one core

Scores are out-of-fold on simulated recordings: 24 subjects, half of the protocol each, two of four
folds. "assigned" lets each subject's recordings take every composite label once. The baselines see
the same batches, losses and schedule; only the network differs.
"""

import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from measured import SCORE, Part, Row, cmi, report, simulated, turns

FOLDS, USED_FOLDS = 4, 2
SEEDS = (1, 2)
SIZE = (24, 51)  # subjects and recordings of each that the scores are of
SPEED_SIZE = (4, 102)
SCORED = cmi.Config(n_folds=FOLDS, save_jsonl=False)


# Simpler networks -----------------------------------------------------------------------------


def plain_cnn_class() -> type:
    """The 1-D CNN of many first notebooks: all channels together, three layers, mean over time."""
    import torch
    from torch import nn

    class PlainCnn(nn.Module):
        def __init__(self, spec: cmi.NetSpec, dropout: float) -> None:
            super().__init__()
            whole = cmi.net_class_of_the_file()(spec, dropout)
            self.trunk, self.head = nn.Module(), nn.Module()  # the names that training looks for
            for name, buffer in (("mean", whole.trunk.mean), ("sd", whole.trunk.sd)):
                self.trunk.register_buffer(name, buffer)
            for name in ("belongs", "parts_of"):
                self.head.register_buffer(name, getattr(whole.head, name), persistent=False)
            self.trunk.pad_len, self.parts = spec.pad_len, whole.head.parts
            widths = (len(spec.channels), 64, 128, 256)
            self.layers = nn.Sequential(*(
                nn.Sequential(nn.Conv1d(a, b, 5, padding=2), nn.BatchNorm1d(b), nn.ReLU(), nn.MaxPool1d(2))
                for a, b in itertools.pairwise(widths)
            ))  # fmt: skip
            for layer in self.layers:
                layer[1].register_buffer("num_batches_tracked", None)  # an integer has no average
            self.dropout = nn.Dropout(dropout)
            self.out = nn.Linear(256, sum(self.parts))

        def forward(self, rows: Any, _images: Any, length: Any, _noise: Any = None) -> Any:
            known = ((rows - self.trunk.mean) / self.trunk.sd).nan_to_num(0.0)
            there = torch.arange(rows.shape[1]) < length[:, None]
            h = self.layers((known * there[:, :, None]).transpose(1, 2))
            logits = self.out(self.dropout(h.mean(2))).split(self.parts, 1)
            return *logits, torch.zeros(h.shape[0], h.shape[2])

    return PlainCnn


@contextmanager
def network(kind: str) -> Iterator[None]:
    """Let the pipeline build another network for a while."""
    ours = cmi.net_class
    if kind == "plain CNN":
        cmi.net_class_of_the_file = ours  # type: ignore[attr-defined]
        cmi.net_class = plain_cnn_class  # type: ignore[assignment]
    cmi.STEM_WIDTH["every"] = 96 + 96  # as wide as all stems of both kinds together
    try:
        yield
    finally:
        cmi.net_class = ours
        del cmi.STEM_WIDTH["every"]


def one_group(frames: cmi.Frames) -> cmi.Frames:
    """The same channels as a single group: one stem for everything."""
    return dataclasses.replace(frames, groups=(("every", frames.names),))


# Scores -----------------------------------------------------------------------------------------


def assigned(proba: cmi.F32, subject: cmi.Str, table: cmi.I64) -> cmi.I64:
    """Gestures when each subject's recordings take every label at most once."""
    from scipy.optimize import linear_sum_assignment

    answer = np.empty(len(proba), np.int64)
    for name in np.unique(subject):
        own = np.flatnonzero(subject == name)
        row, column = linear_sum_assignment(-np.log(np.maximum(proba[own], 1e-9)))
        answer[own[row]] = table[column, 2]
    return answer


def fold_scores(
    rec: cmi.Recordings, frames: cmi.Frames, mode: str, kind: str, cfg: cmi.Config
) -> dict[str, float]:
    """Mean over folds of the score, plain and assigned, and of the processor seconds of a fold."""
    labels, fold = rec.labels, cmi.make_folds(rec.subject, cfg)
    assert labels is not None
    x, found = frames.of_mode(mode), []
    x = one_group(x) if kind == "no stems" else x
    for k in range(USED_FOLDS):
        with tempfile.TemporaryDirectory() as name, network(kind):
            folder = Path(name)
            job = cmi.Job("torch", mode, 0, k, np.flatnonzero(fold != k), np.flatnonzero(fold == k),
                          folder / "models", folder / "scratch", folder / "logs")  # fmt: skip
            began = time.process_time()
            cmi.fit_torch(job, x, labels, cfg)
            secs = time.process_time() - began
            net = networks_of(job.folder / f"{job.stem}.pt")
            store = cmi.Store.of(x, net[1], net[0].trunk.mean.device)
            proba = cmi.ask(net[0], store, job.valid)
        truth = labels.gesture[job.valid]
        plain = cmi.gesture_proba(proba, labels.table).argmax(1)
        other = assigned(proba, rec.subject[job.valid], labels.table)
        found.append([cmi.score(truth, plain), cmi.score(truth, other), secs])
    return dict(
        zip(("score", "assigned", "cpu_secs"), np.mean(found, axis=0).tolist(), strict=True)
    )


def networks_of(path: Path) -> tuple[Any, cmi.NetSpec]:
    """One network and its description, whatever its class."""
    stored = cmi.torch_read(path)
    spec = cmi.NetSpec.read(stored["spec"])
    net = cmi.net_class()(spec, 0.0)
    absent, _ = net.load_state_dict(stored["state"], strict=False)  # torch misses its own counters
    assert not absent
    return net.eval(), spec


def compared(what: str, other: str, ours: dict[str, float], plain: dict[str, float]) -> list[Row]:
    """Two networks or settings on the same folds."""
    secs = ours["cpu_secs"], plain["cpu_secs"]
    return [
        Row(f"score {what}, against {other}", ours["score"], plain["score"], SCORE),
        Row(f"score {what}, assigned, against {other}", ours["assigned"], plain["assigned"], SCORE),
        Row(f"processor time of a fold {what}, against {other}", *secs, "s"),
    ]  # fmt: skip


def torch_scores() -> list[Row]:
    """Our network against two simpler ones, in both modes."""
    rec, out = simulated(*SIZE), []
    frames = cmi.make_frames(rec)
    for mode in cmi.MODES:
        found = {}
        for kind in ("plain CNN", "no stems", "ours"):
            found[kind] = fold_scores(rec, frames, mode, kind, SCORED)
            cmi.log("scored", network=kind, mode=mode, **found[kind])
        out += compared(mode, "a plain 1-D CNN", found["ours"], found["plain CNN"])
        out += compared(mode, "our network without stems", found["ours"], found["no stems"])
    return out


VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "early stopping, patience 6": {"torch_es_patience": 6},
    "batch 32": {"torch_batch_size": 32},
    "batch 64": {"torch_batch_size": 64},
    "no averaged weights": {"torch_ema": 0.0},
    "no mixup": {"torch_mixup_prob": 0.0},
    "no stretch, shift, turn, mixup, masks": {
        f"torch_{name}_prob": 0.0
        for name in ("mixup", "stretch", "shift", "rotate", "time_mask", "channel_mask")
    },
    "focal loss": {"use_focal_loss": True},
}


def torch_defaults() -> list[Row]:
    """What one other setting at a time scores, all sensors: other subjects each seed."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for seed in SEEDS:
        rec = simulated(*SIZE, seed)
        frames = cmi.make_frames(rec)
        for name, changes in VARIANTS.items():
            changed = dataclasses.replace(SCORED, seed=seed, **changes)
            found[name].append(row := fold_scores(rec, frames, "all", "ours", changed))
            cmi.log("scored", seed=seed, settings=name, **row)
    means = {name: {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}
             for name, rows in found.items()}  # fmt: skip
    spread = {name: float(np.std([r["score"] for r in rows])) for name, rows in found.items()}
    ours, what, out = means.pop("as it is"), f"all, mean of {len(SEEDS)} seeds", []
    for name, plain in means.items():
        out += compared(what, name, ours, plain)
        out.append(
            Row(f"spread of the seeds' scores, against {name}", spread["as it is"], spread[name])
        )
    return out


# Speed ------------------------------------------------------------------------------------------


def quartile(*calls: Callable[[], object], repeats: int) -> list[float]:
    """Lower quartile of each call's milliseconds: less moved by what else runs than the median."""
    return np.quantile(turns(*calls, repeats=repeats), 0.25, axis=0).tolist()


def step_speed(rec: cmi.Recordings, cfg: cmi.Config) -> list[Row]:
    """Share of a step that makes its batch, which must not be seen in the step's time."""
    import torch

    labels, frames, everyone = rec.labels, cmi.make_frames(rec), np.arange(len(rec))
    assert labels is not None
    here = Path()
    job = cmi.Job("torch", "all", 0, 0, everyone, everyone[:0], here, here, here)
    spec = cmi.net_spec(frames, labels.table, cfg)
    run = cmi.new_training(job, spec, frames, cfg)
    store = cmi.Store.of(frames, spec, run.device, labels.phase)
    size, rng = cmi.torch_batch(len(rec), cfg), np.random.default_rng(0)
    noise = torch.Generator(run.device).manual_seed(0)
    draw = cmi.augmented_draw(store, rng.permutation(everyone), spec.pad_len, cfg, rng)

    def make() -> cmi.Batch:
        some = draw.part(rng.integers(len(rec), size=size))
        return cmi.make_batch(store, some, labels.composite, len(labels.table))

    batch = make()
    run.net.train()
    making, step = quartile(make, lambda: cmi.train_step(run, batch, noise, cfg), repeats=60)
    return [
        Row("making a batch, against its step", making, step, "ms"),
        Row("share of making a batch in both", 100 * making / (making + step), None, "%"),
    ]


def serving_speed(rec: cmi.Recordings, cfg: cmi.Config) -> list[Row]:
    """One recording through five networks: all at once, and one after the other."""
    labels, frames = rec.labels, cmi.make_frames(rec)
    assert labels is not None
    spec = cmi.net_spec(frames, labels.table, cfg)
    stems = [f"fold{k:02d}" for k in range(5)]
    with tempfile.TemporaryDirectory() as name:
        for stem in stems:
            state = cmi.net_class()(spec, 0.0).state_dict()
            content = cmi.torch_bytes({"spec": dataclasses.asdict(spec), "state": state})
            cmi.write_whole(Path(name) / f"{stem}.pt", content)
        model = cmi.load_torch(Path(name), stems, labels.table, cfg)
    ones = [frames.take(np.array([i])) for i in range(30)]

    def at_once() -> None:
        for x in ones:
            cmi.predict_torch(model, x)

    def loop() -> None:
        for x in ones:
            store = cmi.Store.of(x, spec, model.nets[0].trunk.mean.device)
            for net in model.nets:
                cmi.ask(net, store, np.zeros(1, np.int64))

    stacked, looped = (t / len(ones) for t in quartile(at_once, loop, repeats=10))
    return [Row("one recording through 5 networks, against a loop", stacked, looped, "ms")]


def torch_speed() -> list[Row]:
    """Making batches against learning from them, and five networks at once against a loop."""
    rec = simulated(*SPEED_SIZE)
    return step_speed(rec, cmi.Config()) + serving_speed(rec, cmi.Config())


if __name__ == "__main__":
    parts: dict[str, Part] = {"torch_speed": torch_speed, "torch_scores": torch_scores}
    if "--defaults" in sys.argv:
        parts = {"torch_defaults": torch_defaults}
    elif "--speed" in sys.argv:
        parts = {"torch_speed": torch_speed}
    sys.exit(report(parts))
