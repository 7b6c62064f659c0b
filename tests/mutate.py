"""Plants faults in cmi_pipeline.py, one at a time in a copy, and demands that a test notices each.

    python tests/mutate.py                       # all of them
    python tests/mutate.py --random 10 --seed 3  # some, the same ones for the same seed
    python tests/mutate.py "gravity sign"        # by name

A fault is a text that must occur once, however its lines are broken, the text that takes its place,
and the files of tests that should notice: "score" is tests/test_score.py. Exit status 1: one survived.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FILE = "cmi_pipeline.py"
LIMIT = 600  # s for the tests of one fault; a fault that hangs them is noticed


class Fault(NamedTuple):
    """`old` becomes `new`, and one of `tests` fails."""

    name: str
    old: str
    new: str
    tests: str

    @property
    def files(self) -> list[str]:
        return [f"tests/test_{name}.py" for name in self.tests.split()]


FAULTS = [Fault(*row) for row in (
    # ---- configuration, log, artefacts
    ("bool by truthiness", "ConfigParser.BOOLEAN_STATES[text.lower()]", "bool(text)", "settings"),
    ("range without an upper end", "allowed[0] <= value <= allowed[1]", "allowed[0] <= value", "settings"),
    ("words not checked", "good, text = value in allowed,", "good, text = True,", "settings"),
    ("old name wins", '{"LGBM_BUNDLE_PATH": env["MODEL_PATH"], **env}', '{**env, "LGBM_BUNDLE_PATH": env["MODEL_PATH"]}', "settings"),
    ("empty text is nought", 'if text or (kind == "str" and name in env):', "if name in env:", "settings"),
    ("every setting retrains every member", 'if member in f.metadata["retrains"]', 'if f.metadata["retrains"]', "settings"),
    ("random numbers without address", "[cfg.seed, *(zlib.crc32(str(p).encode()) for p in path)]", "[cfg.seed]", "settings"),
    ("slips untold", "if meant := nearest_name(name, 0.85):", "if meant := ALIASES.get(name):", "settings"),
    ("file written in place", "partial.replace(path)", "path.write_bytes(partial.read_bytes())", "artefacts"),
    ("half-written file left", "partial.unlink(missing_ok=True)", "pass", "artefacts"),
    ("digest without dtype", 'state.update(f"{part.dtype.str}{part.shape}".encode())', "pass", "artefacts"),
    # ---- gestures, score, folds
    ("macro over all classes", "macro = f1.sum(-1) / np.maximum((sides > 0).sum(-1), 1)", "macro = f1.sum(-1) / 9", "score"),
    ("non-targets told apart", "cell = 9 * np.minimum(truth, NON_TARGET) + np.minimum(answer, NON_TARGET)", "cell = 9 * np.minimum(truth, NON_TARGET) + np.minimum(answer + 1, NON_TARGET)", "score"),
    ("subjects split", "fold[s] = load.argmin()", "fold[s] = s % 2 if s else 0", "score"),
    ("gesture of the wrong column", "belongs = table[:, 2:] == np.arange(len(GESTURES))", "belongs = table[:, :1] == np.arange(len(GESTURES))", "score blend"),
    # ---- recordings
    ("nothing in range is a gap", "np.where(raw == -1, NOTHING, MISSING)", "np.where(raw == -1, MISSING, MISSING)", "reading"),
    ("infinite numbers kept", "np.where(np.isfinite(found), found, np.nan)", "found", "reading"),
    ("strangers are left-handed", "wearer[:, right] = np.where(wearer[:, right] == 0, 0, 1)", "wearer[:, right] = np.where(wearer[:, right] == 1, 1, 0)", "reading"),
    ("order of rows ignored", "if not wrong.any():", "if True:", "reading"),
    ("cut-off row kept", "return frame.head(-1)", "return frame", "reading"),
    ("stale cache", "stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]", "stats = [f.name for f in files]", "reading"),
    # ---- batches
    ("first rows kept", "row = last[:, None] - self.rows_from_end(length)", "row = self.frames.start[index][:, None] + self.rows_from_end(length)", "batches"),
    ("always the same batches", "drawn = np.array_split(rng.permutation(index), n_batches)", "drawn = np.array_split(index, n_batches)", "batches"),
    ("padding not masked", "out[to_come < 0] = 0", "pass", "batches"),
    ("standardised with all rows", "x = frames.x[gather_rows(frames.start, np.arange(len(frames))[index])[0]]", "x = frames.x", "batches"),
    ("mixup without labels", "label = other + share[:, None] * (own - other)", "label = own", "batches"),
    ("jitter turns one vector", "vector_triples(self.frames.names).ravel()", "vector_triples(self.frames.names)[0]", "batches"),
    ("lost sensor kept", 'lost |= np.outer(lose_tof, np.char.startswith(names, "tof_"))', "pass", "batches"),
    ("presence forgotten", "counts / sizes", "np.ones_like(counts)", "batches"),
    # ---- LightGBM
    ("joint not normalised", "answers.append(joint / np.maximum(joint.sum(axis=1, keepdims=True), 1e-30))", "answers.append(joint)", "lgbm"),
    ("orientation and behavior swapped", "aux = proba[1][:, orientation] * proba[2][:, behavior] + TINY", "aux = proba[1][:, behavior] * proba[2][:, behavior] + TINY", "lgbm"),
    ("no modality dropout", ".without(drop_thm, drop_tof).x[:, columns]", ".x[:, columns]", "lgbm"),
    ("truncated text accepted", 'if not whole or announced != (str(n_classes), n_trees or -1) or n_trees % n_classes:', "if False:", "lgbm hostile"),
    # ---- networks
    ("one head only", "mean = (special.softmax(gesture, axis=1) + summed) / 2", "mean = summed", "networks"),
    ("padding enters the statistics", "return mask.flatten().nonzero()[:, 0]", "return (mask >= 0).flatten().nonzero()[:, 0]", "networks"),
    ("no warm-up", "top = 0.3 * (last + 1) - 1", "top = -1.0", "networks"),
    ("a cycle for each epoch", "epoch * n + np.arange(n)", "np.arange(n)", "networks"),
    ("last weights in place of the best", 'if not self.own["es_patience"] or epoch["val_loss"] < lowest:', "if True:", "networks"),
    ("resumed without its optimiser", 'TORCH_STATE = ("net", "average", "optimizer", "scaler")', 'TORCH_STATE = ("net", "average", "scaler")', "networks"),
    ("pieces weigh alike", "loss = self.loss(outputs, piece) * (len(piece) / n)", "loss = self.loss(outputs, piece)", "networks"),
    ("out of memory not met", 'self.done["micro"] = -(-self.done["micro"] // 2)', "raise MemoryError", "networks"),
    ("checkpoint of other settings used", 'return settings, arrays, note, difference(settings, note["settings"])', 'return settings, arrays, note, ""', "networks"),
    ("noise of an epoch by chance", "self.noise = torch.Generator(self.device).manual_seed(seed) if one_device else None", "self.noise = None", "networks"),
    ("way back from the padding", "own = torch.where(step < length, length - 1 - step, step)", "own = mask.shape[1] - 1 - step + 0 * length", "networks"),
    ("Keras masks nothing", 'share = layers.Softmax(axis=1, name="share")(scores, mask=every_head)', 'share = layers.Softmax(axis=1, name="share")(scores)', "networks"),
    # ---- members, plan, jobs
    ("trained and scored on the same", "split = np.flatnonzero(self.fold != k), np.flatnonzero(self.fold == k)", "split = np.flatnonzero(self.fold >= 0), np.flatnonzero(self.fold == k)[:0]", "members"),
    ("changed bytes pass", "if not p.is_file() or digest(p.read_bytes()) != was)", "if not p.is_file())", "faults"),
    ("data not in the fingerprint", '"data": data.data_digest,', "", "members"),
    ("changed input unseen", "if not np.allclose(now[\"probe\"], then[\"probe\"], rtol=1e-2, atol=1e-3):", "if False:", "members"),
    ("note written first", "job.note.unlink(missing_ok=True)", "pass", "members"),
    ("seeds not averaged", "oof[jobs[0].valid] = proba.mean(axis=0)", "oof[jobs[0].valid] = proba[0]", "members"),
    # ---- blend, assignment, scores
    ("nested on itself", "inner, outer = data.fold != k, data.fold == k", "inner, outer = data.fold == k, data.fold == k", "blend"),
    ("weights below nought", "bounds = [(0, 10)] * len(logs)", "bounds = [(-10, 10)] * len(logs)", "blend"),
    ("gradient upside down", "slope = (proba - right / hit)", "slope = (right / hit - proba)", "blend"),
    ("shares not normalised", "return weights / weights.sum()", "return weights", "blend"),
    ("each label once", "return np.max([np.bincount(label", "return np.min([np.bincount(label", "blend"),
    ("retries take a second place", "self.costs.pop(recording, None)", "recording = f\"{recording}{len(self.costs)}\"", "blend"),
    ("recordings drawn, not subjects", "count_classes(data.labels.gesture, answer, who, n)", "count_classes(data.labels.gesture, answer, np.arange(len(answer)) % n, n)", "blend"),
    ("assignment always served", 'return gains if cfg.subject_assignment == "auto"', 'return True if cfg.subject_assignment == "auto"', "blend serving"),
    # ---- serving, entry
    ("labels lead out of the bundle", 're.fullmatch(r"fold[0-9]{2}(_seed[0-9]+)?", stem)', "stem", "hostile"),
    ("fallback hidden in strict", "if self.cfg.strict: raise cause = f\"{type(error).__name__}: {error}\"[:200]", "cause = f\"{type(error).__name__}: {error}\"[:200]", "serving"),
    ("upside down never noticed", 'return bool(wearer["prior"] + sum(seen.values()) < 0)', "return False", "serving"),
    ("IMU recordings asked of all", 'route = "imu" if (rec.tof == MISSING).mean() > 0.5 else "all"', 'route = "all"', "serving road"),
    ("failing member asked for ever", "if self.failures[p] < PATIENCE_WITH_A_MEMBER]", "if True]", "serving"),
    ("unknown arguments ignored", "if is_setting and name in KNOWN_NAMES:", "if not is_setting or name in KNOWN_NAMES:", "entry"),
    ("any folder is the competition", "whole = [f for f in real if all((f / name).is_file() for name in TEST_FILES)]", "whole = real", "entry"),
    ("simulating on Kaggle", "if KAGGLE_INPUT.is_dir() and not whole and not cfg.rerun:", "if False:", "entry"),
    # ---- motion
    ("gravity constant", "GRAVITY = 9.81", "GRAVITY = 9.0", "motion"),
    ("sample period", "SAMPLE_PERIOD = 0.1 ", "SAMPLE_PERIOD = 0.05 ", "motion"),
    ("gravity sign", "np.array([2 * (x * z - w * y), 2 * (y * z + w * x),", "np.array([2 * (x * z + w * y), 2 * (y * z - w * x),", "motion"),
    ("product in the wrong order", "a * x - b * w - c * z + d * y", "a * x - b * w + c * z - d * y", "features"),
    ("longer way round", "np.abs(cosine)) * np.where(cosine < 0, -1.0, 1.0)", "np.abs(cosine))", "motion"),
    ("rates leak from the recording before", "rate[first] = np.where(np.isnan(here[first]), np.nan, 0.0)", "pass", "features"),
    ("gaps filled from the recording before", "~known & (first < row) & (row < last)", "~known & (row > 0) & (row < last)", "motion"),
    ("ends not held", "np.where(first <= last, np.clip(row, first, last), row)", "row", "motion"),
    ("zero quaternion is a rotation", "known = norm > 0.1", "known = norm >= 0", "motion"),
    ("median looks across the border", "np.where((window >= first) & (window < last), values, np.nan)", "values", "features"),
    ("ahead is aside", "c * along_north + s * along_west", "c * along_west - s * along_north", "motion"),
    ("heading of the whole recording", "gestures = np.stack([gesture_begin(start), start[1:]], axis=1)", "gestures = np.stack([start[:-1], start[1:]], axis=1)", "features"),
    # ---- mirror, turn, wearer
    ("mirror flips all images alike", "(0, 1, 4, 3, 2), ((1,), (1,), (0,), (1,), (0,))", "(0, 1, 4, 3, 2), 5 * ((1,),)", "motion"),
    ("mirror of another axis", "(1, 1, -1, -1)", "(1, -1, 1, -1)", "motion"),
    ("turn leaves sensors where they are", "(0, 3, 4, 1, 2)", "(0, 1, 2, 3, 4)", "motion"),
    ("negative w", "np.where(turned[:, :1] < 0, -turned, turned)", "turned", "motion"),
    ("right-handers are mirrored", 'left = rec.person[:, PERSON.index("handedness")] == 0', 'left = rec.person[:, PERSON.index("handedness")] == 1', "motion"),
    ("evidence not antisymmetric", "np.nan_to_num(pairs[:, [1, 2, 6, 7]] - pairs[:, [3, 4, 8, 9]])", "np.nan_to_num(pairs[:, [1, 2, 6, 7]] + pairs[:, [3, 4, 8, 9]])", "wearer"),
    ("a missing sensor speaks against its partner", "near[(rec.tof == MISSING).all(axis=(2, 3))] = np.nan", "pass", "wearer"),
    ("wearers judged by their own data", 'fit_wearer(signed[fold != k])["coefficients"]', 'fit_wearer(signed)["coefficients"]', "wearer"),
    ("found wearers stay unturned in the model", 'fit_wearer(np.where(upside_down[:, None], -odd, odd)) | {"prior": prior}', 'fit_wearer(odd) | {"prior": -prior}', "wearer"),
    ("few wearers are judged", "or len(names) < 8 or", "or", "wearer"),
    # ---- features
    ("gesture a row too long", "np.maximum(start[:-1], start[1:] - GESTURE_ROWS)", "np.maximum(start[:-1], start[1:] - GESTURE_ROWS - 1)", "features"),
    ("sample instead of population variance", "self.sum(self.centred**2) / above_zero(self.count)", "self.sum(self.centred**2) / above_zero(self.count - 1)", "features"),
    ("noise is variance", "np.where(variance <= 1e-14 * self.mean * self.mean, 0.0, variance)", "variance", "features"),
    ("steps across the border", "self.step[:, rec.start] = np.nan", "self.step[:, 0] = np.nan", "features"),
    ("flow across the border", "flow[:, start[:-1]] = np.nan", "pass", "features"),
    ("flow behind a missing image", "flow[:, 1:][gone[:, :-1]] = np.nan", "pass", "features"),
    ("gesture of a short recording takes the one before", "own = (row >= self.first[:, None]) & (row < self.last[:, None])", "own = (row >= 0) & (row < self.last[:, None])", "features"),
    ("opening of a short recording takes the one behind", "own = (row >= self.first[:, None]) & (row < self.last[:, None])", "own = row >= self.first[:, None]", "features"),
    ("an empty part takes the row behind", "np.moveaxis(np.where(end > begin, total, 0.0), 2, 0)", "np.moveaxis(total, 2, 0)", "features"),
    ("frames in the order of the lengths", "channels[rows] = row_channels(chunk)", "channels[np.sort(rows)] = row_channels(chunk)", "features"),
    ("highest frequency twice", "power[..., 1:-1] *= 2", "power[..., 1:] *= 2", "features"),
    ("left for right in images", "(ne + se - nw - sw) / valid", "(nw + sw - ne - se) / valid", "features"),
    ("a missing pixel counts", 'above_zero(64.0 - np.einsum("ij->i", (image == MISSING).view(np.uint8)))', "np.full(len(image), 64.0)", "features"),
    ("coolest for warmest", "np.where(known, x, -np.inf).argmax(axis=0)", "np.where(known, -x, -np.inf).argmax(axis=0)", "features"),
    ("thermopiles in IMU mode", 'kept = np.flatnonzero(~(self.needs("thm") | self.needs("tof")))', 'kept = np.flatnonzero(~self.needs("tof"))', "features"),
    ("a modality stays when the other goes", '| drop_tof[:, None] & self.needs("tof")', '| drop_tof[:, None] & self.needs("thm")', "features"),
    ("a lost sensor's share of rows is unknown", '0.0 if name.endswith("_present") else np.nan', "np.nan", "features"),
    ("thermopiles in IMU frames", 'if not g[0].startswith(("thm", "tof"))', 'if not g[0].startswith("tof")', "features"),
    ("missing sensors see nothing", "np.where(np.isnan(x) & there, nothing, x)", "np.where(np.isnan(x), nothing, x)", "features"),
    ("guessed vertical in frames", 'signals[name] + 0 * signals["swing"]', "signals[name]", "features"),
)]  # fmt: skip


def plant(source: str, fault: Fault) -> str:
    """The file with the fault; ends the program if its text does not occur exactly once."""
    found = list(re.finditer(r"\s+".join(map(re.escape, fault.old.split())), source))
    if len(found) != 1:
        sys.exit(f"mutate: {fault.name!r} is stale: {fault.old!r} occurs {len(found)} times")
    changed = source[: found[0].start()] + fault.new + source[found[0].end() :]
    try:
        compile(changed, FILE, "exec")
    except SyntaxError as error:
        sys.exit(f"mutate: {fault.name!r} makes no valid file: {error}")
    return changed


def run_tests(source: str, files: list[str], *options: str) -> tuple[int, str]:
    """Exit status and output of pytest on a copy of what git would track, with another file."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CMI_REAL_DATA")}
    with tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as folder:
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        (Path(folder) / FILE).write_text(source)
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *options]
        how: Any = {"cwd": folder, "env": env | {"TMPDIR": folder}, "timeout": LIMIT}
        try:
            done = subprocess.run([*command, *files], capture_output=True, text=True, **how)
        except subprocess.TimeoutExpired:
            return 124, "it took too long"
    return done.returncode, done.stdout + done.stderr


def try_fault(fault: Fault, source: str) -> str:
    """Which test noticed the fault; empty: none."""
    status, printed = run_tests(source, fault.files, "-x")
    by = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", printed, re.MULTILINE)
    return (by[1] if by else f"pytest {status}: {printed.strip()[-100:]}") if status else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="faults to plant; all if none is named")
    parser.add_argument("--random", type=int, metavar="N", help="only N of them")
    parser.add_argument("--of", help="only those that tests of these files should notice")
    parser.add_argument("--seed", default="0", help="which N: the same seed, the same ones")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at once")
    args, began = parser.parse_args(), time.monotonic()
    source = (ROOT / FILE).read_text()
    faults = [f for f in FAULTS if not args.names or f.name in args.names]
    if args.of:
        faults = [f for f in faults if set(f.tests.split()) <= set(args.of.split(","))]
    if args.random is not None:
        faults = random.Random(args.seed).sample(faults, min(args.random, len(faults)))
    planted = {fault.name: plant(source, fault) for fault in FAULTS}  # all: none may be stale
    status, printed = run_tests(source, sorted({file for fault in faults for file in fault.files}))
    if status:
        sys.exit(f"mutate: these tests fail without any fault:\n{printed[-3000:]}")
    print(f"without a fault the tests pass; {time.monotonic() - began:.0f} s", flush=True)
    survived = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        noticed = pool.map(lambda f: try_fault(f, planted[f.name]), faults)
        for fault, by in zip(faults, noticed, strict=True):
            survived += not by
            said = f"noticed by {by}" if by else "SURVIVED"
            print(f"{time.monotonic() - began:5.0f} s  {fault.name:<52} {said}", flush=True)
    print(f"{len(faults)} faults, {len(faults) - survived} noticed")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
