"""Plants faults in cmi_pipeline.py, one at a time in a copy, and demands that a test notices each.

    python tests/mutate.py                       # all of them
    python tests/mutate.py --random 10 --seed 3  # some, the same ones for the same seed
    python tests/mutate.py --list                # what there is
    python tests/mutate.py "gravity sign"        # by name

A fault is an exact text, which must occur once however its lines are broken, the text that takes its
place, and the tests that should notice: a file, or a function in it. They must pass without a fault.
A fault that a function lets pass meets its whole file. One that survives is a hole: exit status 1.
"""

from __future__ import annotations

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
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FILE = "cmi_pipeline.py"
LIMIT = 600  # s for the tests of one fault; a fault that hangs them is noticed


class Fault(NamedTuple):
    """`old` becomes `new`; `tests`: "score" is a file, "score::test_…" a function in it."""

    name: str
    old: str
    new: str
    tests: str

    @property
    def nodes(self) -> list[str]:
        parts = [test.partition("::") for test in self.tests.split()]
        return [f"tests/test_{file}.py{colons}{name}" for file, colons, name in parts]

    @property
    def files(self) -> list[str]:
        return sorted({node.split("::")[0] for node in self.nodes})


FAULTS = [Fault(*row) for row in (
    # ---- configuration, log, artefacts
    ("bool by truthiness", "return ConfigParser.BOOLEAN_STATES[given.lower()]", "return bool(text)", "settings"),
    ("range without an upper end", "allowed[0] <= value <= allowed[1]", "allowed[0] <= value", "settings"),
    ("words not checked", "good, text = value in allowed,", "good, text = True,", "settings"),
    ("old name wins", '{"LGBM_BUNDLE_PATH": env["MODEL_PATH"], **env}', '{**env, "LGBM_BUNDLE_PATH": env["MODEL_PATH"]}', "settings"),
    ("empty text is nought", "return field.default", "return None", "settings"),
    ("every setting retrains every member", 'if member in f.metadata["retrains"]', 'if f.metadata["retrains"]', "settings"),
    ("random numbers without address", "[cfg.seed, *(zlib.crc32(str(p).encode()) for p in path)]", "[cfg.seed]", "settings"),
    ("slips untold", "if (meant := nearest_name(name, 0.87))]", "if (meant := ALIASES.get(name, str()))]", "settings"),
    ("file written in place", "partial.replace(path)", "path.write_bytes(partial.read_bytes())", "artefacts"),
    ("half-written file left", "partial.unlink(missing_ok=True)", "pass", "artefacts"),
    ("digest without dtype", 'state.update(f"{part.dtype.str}{part.shape}".encode())', "pass", "artefacts"),
    ("difference unnamed", 'return ", ".join([texts.get(k, f"{k} differ") for k in keys][:3])', 'return "" if not keys else "it differs"', "members"),
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
    ("padding not masked", "out[to_come < 0] = 0", "pass", "batches"),
    ("standardised with all rows", "x = frames.x[gather_rows(frames.start, np.arange(len(frames))[index])[0]]", "x = frames.x", "batches"),
    ("mixup without labels", "label = other + share[:, None] * (own - other)", "label = own", "batches"),
    ("jitter turns one vector", "vector_triples(self.spec.channels).ravel()", "vector_triples(self.spec.channels)[0]", "batches"),
    ("lost sensor kept", 'lost |= np.outer(lose_tof, np.char.startswith(names, "tof_"))', "pass", "batches"),
    ("presence forgotten", "counts / sizes", "np.ones_like(counts)", "batches"),
    # ---- LightGBM
    ("joint not normalised", "answers.append(joint / np.maximum(joint.sum(axis=1, keepdims=True), 1e-30))", "answers.append(joint)", "lgbm"),
    ("orientation and behavior swapped", "aux = proba[1][:, orientation] * proba[2][:, behavior] + TINY", "aux = proba[1][:, behavior] * proba[2][:, behavior] + TINY", "lgbm"),
    ("no modality dropout", ".without(drop_thm, drop_tof).x[:, columns]", ".x[:, columns]", "lgbm"),
    ("truncated text accepted", 'if not (whole and n_trees == len(sizes) > 0) or n_trees % n_classes:', "if False:", "lgbm hostile"),
    # ---- networks
    ("one head only", "mean = (softmax(gesture) + summed) / 2", "mean = summed", "networks"),
    ("padding enters the statistics", "there = mask[:, 0] > 0", "there = mask[:, 0] >= 0", "networks"),
    ("no warm-up", "top = 0.3 * (last + 1) - 1", "top = -1.0", "networks"),
    ("plateau never halves", "peak / 2**halved", "peak", "networks"),
    ("last weights in place of the best", 'if not self.own["es_patience"] or val_loss < lowest - self.own.get("es_min_delta", 0):', "if True:", "networks"),
    ("resumed without its optimiser", 'TORCH_STATE = ("net", "average", "optimizer", "scaler")', 'TORCH_STATE = ("net", "average", "scaler")', "networks"),
    ("pieces weigh alike", "loss = self.loss(outputs, piece) * (len(piece) / n)", "loss = self.loss(outputs, piece)", "networks"),
    ("out of memory not met", 'self.done["micro"] = -(-self.done["micro"] // 2)', "raise MemoryError", "networks"),
    ("checkpoint of other settings used", 'return arrays, note, difference(settings, note["settings"])', 'return arrays, note, ""', "networks"),
    ("noise of an epoch by chance", "self.noise = torch.Generator(self.device).manual_seed(seed) if one_device else None", "self.noise = None", "networks"),
    ("norm fused without its shift", "conv.weight, conv.bias = nn.utils.fuse_conv_bn_weights(conv.weight, None, *learnt)", "conv.weight = nn.utils.fuse_conv_bn_weights(conv.weight, None, *learnt)[0]", "networks"),
    ("Keras masks nothing", "h = layers.Multiply(name=\"masked\")([layers.Concatenate(name=\"recurrent\")(both), left])", "h = layers.Concatenate(name=\"recurrent\")(both)", "networks"),
    # ---- members, plan, jobs
    ("trained and scored on the same", "split = np.flatnonzero(self.fold != k), np.flatnonzero(self.fold == k)", "split = np.flatnonzero(self.fold >= 0), np.flatnonzero(self.fold == k)[:0]", "members"),
    ("changed bytes pass", "if not p.is_file() or digest(p.read_bytes()) != was)", "if not p.is_file())", "members"),
    ("data not in the fingerprint", '"data": data.data_digest,', "", "members"),
    ("changed input unseen", "if not np.allclose(figures, then[\"probe\"], rtol=1e-2, atol=1e-3):", "if False:", "members"),
    ("note written first", "job.note.unlink(missing_ok=True)", "pass", "members"),
    ("seeds not averaged", "oof[jobs[0].valid] = proba.mean(axis=0)", "oof[jobs[0].valid] = proba[0]", "members"),
    # ---- blend, assignment, scores
    ("nested on itself", "inner, outer = data.fold != k, data.fold == k", "inner, outer = data.fold == k, data.fold == k", "blend"),
    ("weights below nought", 'bounds = [(0, 10)] * len(logs)', "bounds = [(-10, 10)] * len(logs)", "blend"),
    ("gradient upside down", "slope = (proba - right / hit)", "slope = (right / hit - proba)", "blend"),
    ("shares not normalised", "return weights / weights.sum()", "return weights", "blend"),
    ("each label once", "np.maximum(counts.max(axis=0), 1)", "np.maximum(counts.min(axis=0), 1)", "blend"),
    ("retries take a second place", "self.costs.pop(recording, None)", "recording = f\"{recording}{len(self.costs)}\"", "blend"),
    ("recordings drawn, not subjects", "count_classes(self.truth, answer, self.who, n)", "count_classes(self.truth, answer, np.arange(len(answer)) % n, n)", "blend"),
    ("assignment always served", 'return gains if cfg.subject_assignment == "auto"', 'return True if cfg.subject_assignment == "auto"', "blend serving"),
    # ---- serving, entry
    ("labels lead out of the bundle", 're.fullmatch(r"fold[0-9]{2}(_seed[0-9]+)?", stem)', "stem", "hostile"),
    ("fallback hidden in strict", "if self.cfg.strict: raise answer cause = f\"{type(answer).__name__}: {answer}\"[:200]", "cause = f\"{type(answer).__name__}: {answer}\"[:200]", "serving"),
    ("upside down never noticed", 'return bool(wearer["prior"] + sum(seen.values()) < 0)', "return False", "serving"),
    ("IMU recordings asked of all", 'route = "imu" if (rec.tof == MISSING).mean() > 0.5 else "all"', 'route = "all"', "serving road"),
    ("failing member asked for ever", "if self.failures[p] < PATIENCE_WITH_A_MEMBER]", "if True]", "serving"),
    ("unknown arguments ignored", 'if is_setting and name in KNOWN_NAMES:', "if not is_setting or name in KNOWN_NAMES:", "entry"),
    ("any folder is the competition", "whole = [f for f in real if all((f / name).is_file() for name in TEST_FILES)]", "whole = real", "entry"),
    ("simulating on Kaggle", "if attached and not whole and not cfg.rerun:", "if False:", "entry"),
    # ---- motion
    ("gravity constant", "GRAVITY = 9.81", "GRAVITY = 9.0", "motion::test_gravity_in_known_poses"),
    ("sample period", "SAMPLE_PERIOD = 0.1 ", "SAMPLE_PERIOD = 0.05 ",
     "motion::test_constant_turning_is_measured_in_radians_per_second"),
    ("gravity sign", "np.array([2 * (x * z - w * y), 2 * (y * z + w * x),",
     "np.array([2 * (x * z + w * y), 2 * (y * z - w * x),", "motion::test_gravity_in_known_poses"),
    ("quaternion with w last", "w, x, y, z = rot.T", "x, y, z, w = rot.T",
     "motion::test_gravity_in_known_poses"),
    ("columns for rows of the matrix", "2 * (x * y - w * z), 2 * (x * z + w * y)", "2 * (x * y + w * z), 2 * (x * z - w * y)",
     "motion::test_motion_agrees_with_scipy"),
    ("product in the wrong order", "a * x - b * w - c * z + d * y", "a * x - b * w + c * z - d * y",
     "motion::test_motion_agrees_with_scipy"),
    ("gravity added", "lin = acc - GRAVITY * up", "lin = acc + GRAVITY * up", "motion::test_gravity_in_known_poses"),
    ("longer way round", "np.abs(cosine)) * np.where(cosine < 0, -1.0, 1.0)", "np.abs(cosine))",
     "motion::test_the_shorter_way_round_is_taken"),
    ("rates leak from the recording before", "rate[first] = np.where(np.isnan(here[first]), np.nan, 0.0)", "pass",
     "motion::test_nothing_crosses_a_border"),
    ("gaps filled from the recording before", "~known & (first < row) & (row < last)", "~known & (row > 0) & (row < last)",
     "motion::test_repair_agrees_with_the_reference_and_stays_within_its_recording"),
    ("gaps filled from the recording behind", "~known & (first < row) & (row < last)", "~known & (first < row)",
     "motion::test_repair_agrees_with_the_reference_and_stays_within_its_recording"),
    ("ends not held", "np.where(first <= last, np.clip(row, first, last), row)", "row",
     "motion::test_gaps_are_filled_half_way_and_ends_are_held"),
    ("zero quaternion is a rotation", "known = norm > 0.1", "known = norm >= 0", "motion::test_a_zero_quaternion_is_missing"),
    ("gaps keep the rotation before", "turns)(between)", "turns)(first[between])",
     "motion::test_gaps_are_filled_half_way_and_ends_are_held"),
    ("median looks across the border", "np.where((window >= first) & (window < last), values, np.nan)", "values",
     "motion::test_the_median_stays_within_its_recording"),
    ("median of 13 rows", "MEDIAN_ROWS = 15", "MEDIAN_ROWS = 13", "motion::test_the_median_stays_within_its_recording"),
    ("ahead is aside", "c * along_north + s * along_west", "c * along_west - s * along_north",
     "motion::test_a_push_is_told_by_where_the_device_points"),
    ("heading of the whole recording", "gestures = np.stack([gesture_begin(start), start[1:]], axis=1)",
     "gestures = np.stack([start[:-1], start[1:]], axis=1)", "features::test_the_slow_reference_agrees"),
    # ---- mirror, turn, wearer
    ("mirror flips all images alike", "(0, 1, 4, 3, 2), ((1,), (1,), (0,), (1,), (0,))", "(0, 1, 4, 3, 2), 5 * ((1,),)",
     "motion::test_sensors_and_pixels_change_places"),
    ("mirror swaps 2 and 4", "(0, 1, 4, 3, 2)", "(0, 3, 2, 1, 4)", "motion::test_sensors_and_pixels_change_places"),
    ("mirror of another axis", "(1, 1, -1, -1)", "(1, -1, 1, -1)", "motion::test_the_maps_are_what_the_matrices_say"),
    ("turn leaves sensors where they are", "(0, 3, 4, 1, 2)", "(0, 1, 2, 3, 4)", "motion::test_sensors_and_pixels_change_places"),
    ("turn leaves images upright", "5 * ((0, 1),)", "5 * ((),)", "motion::test_sensors_and_pixels_change_places"),
    ("turn the other side of the product", "(-1, 1, -1, 1)", "(-1, -1, 1, 1)", "motion::test_the_maps_are_what_the_matrices_say"),
    ("negative w", "np.where(turned[:, :1] < 0, -turned, turned)", "turned", "motion::test_twice_is_the_identity"),
    ("right-handers are mirrored", 'left = rec.person[:, PERSON.index("handedness")] == 0',
     'left = rec.person[:, PERSON.index("handedness")] == 1', "motion::test_canonical_changes_only_whom_it_must"),
    ("evidence not antisymmetric", "np.nan_to_num(pairs[:, [1, 2, 6, 7]] - pairs[:, [3, 4, 8, 9]])",
     "np.nan_to_num(pairs[:, [1, 2, 6, 7]] + pairs[:, [3, 4, 8, 9]])",
     "wearer::test_the_evidence_of_a_turned_twin_is_the_negative"),
    ("a missing sensor speaks against its partner", "near[(rec.tof == MISSING).all(axis=(2, 3))] = np.nan", "pass",
     "wearer::test_a_missing_sensor_is_no_evidence"),
    ("evidence of the first half", "opening, gesture = np.minimum(begin + 10, end)", "opening, gesture = np.minimum(begin + 20, end)",
     "wearer::test_evidence_is_means_of_the_beginning_the_gesture_and_the_whole"),
    ("wearers judged by their own data", 'fit_wearer(signed[fold != k])["coefficients"]', 'fit_wearer(signed)["coefficients"]',
     "wearer::test_nobody_is_judged_by_a_model_that_saw_their_fold"),
    ("wearers judged in one round", "for _ in range(2): signed", "for _ in range(1):\n        signed",
     "wearer::test_nobody_is_judged_by_a_model_that_saw_their_fold"),
    ("found wearers stay unturned in the model", 'fit_wearer(np.where(upside_down[:, None], -odd, odd)) | {"prior": prior}',
     'fit_wearer(odd) | {"prior": -prior}', "wearer::test_subjects_that_were_turned_are_found"),
    ("sparse wearers are judged", "or len(rec) < 20 * len(names):", "or not len(rec):",
     "wearer::test_with_few_subjects_nobody_is_turned"),
    ("few wearers are judged", "or len(names) < 8 or", "or", "wearer::test_with_few_subjects_nobody_is_turned"),
    # ---- features
    ("gesture a row too long", "np.maximum(start[:-1], start[1:] - GESTURE_ROWS)",
     "np.maximum(start[:-1], start[1:] - GESTURE_ROWS - 1)", "features::test_statistics_of_a_ramp"),
    ("sample instead of population variance", "self.sum(self.centred**2) / above_zero(self.count)",
     "self.sum(self.centred**2) / above_zero(self.count - 1)", "features::test_statistics_of_a_ramp"),
    ("noise is variance", "np.where(variance <= 1e-14 * self.mean * self.mean, 0.0, variance)", "variance",
     "features::test_a_constant_recording_has_no_shape"),
    ("steps across the border", "d[:, self.rec.start] = np.nan", "d[:, 0] = np.nan",
     "features::test_alone_is_the_same_as_together"),
    ("flow across the border", "flow[:, start[:-1]] = np.nan", "pass", "features::test_alone_is_the_same_as_together"),
    ("flow behind a missing image", "flow[:, 1:][gone[:, :-1]] = np.nan", "pass", "features::test_the_slow_reference_agrees"),
    ("gesture of a short recording takes the one before",
     "own = (row >= self.first[:, None]) & (row < self.last[:, None])", "own = (row >= 0) & (row < self.last[:, None])",
     "features::test_alone_is_the_same_as_together"),
    ("opening of a short recording takes the one behind",
     "own = (row >= self.first[:, None]) & (row < self.last[:, None])", "own = row >= self.first[:, None]",
     "features::test_alone_is_the_same_as_together"),
    ("an empty part takes the row behind", "np.moveaxis(np.where(end > begin, total, 0.0), 2, 0)", "np.moveaxis(total, 2, 0)",
     "features::test_the_slow_reference_agrees"),
    ("frames in the order of the lengths", "channels[rows] = row_channels(chunk)",
     "channels[np.sort(rows)] = row_channels(chunk)", "features::test_alone_is_the_same_as_together"),
    ("highest frequency twice", "power[..., 1:-1] *= 2", "power[..., 1:] *= 2", "features::test_the_slow_reference_agrees"),
    ("left for right in images", "(ne + se - nw - sw) / valid", "(nw + sw - ne - se) / valid",
     "features::test_a_hand_in_a_corner_is_seen_there"),
    ("a missing pixel counts", 'above_zero(64.0 - np.einsum("ij->i", (image == MISSING).view(np.uint8)))', "np.full(len(image), 64.0)",
     "features::test_the_slow_reference_agrees"),
    ("coolest for warmest", "np.where(known, x, -np.inf).argmax(axis=0)", "np.where(known, -x, -np.inf).argmax(axis=0)",
     "features::test_the_warmest_sensor_is_named"),
    ("thermopiles in IMU mode", 'kept = np.flatnonzero(~(self.needs("thm") | self.needs("tof")))', 'kept = np.flatnonzero(~self.needs("tof"))',
     "features::test_imu_mode_has_no_trace_of_tof_and_thm"),
    ("a modality stays when the other goes", '| drop_tof[:, None] & self.needs("tof")', '| drop_tof[:, None] & self.needs("thm")', "features::test_a_dropped_modality_is_as_if_it_had_never_been_there"),
    ("a lost sensor's share of rows is unknown", '0.0 if name.endswith("_present") else np.nan', "np.nan",
     "features::test_a_dropped_modality_is_as_if_it_had_never_been_there"),
    ("thermopiles in IMU frames", 'if not g[0].startswith(("thm", "tof"))', 'if not g[0].startswith("tof")',
     "features::test_imu_mode_has_no_trace_of_tof_and_thm"),
    ("missing sensors see nothing", "np.where(np.isnan(x) & there, nothing, x)", "np.where(np.isnan(x), nothing, x)",
     "features::test_the_slow_reference_agrees"),
    ("guessed vertical in frames", 'signals[name] + 0 * signals["swing"]', "signals[name]",
     "features::test_the_slow_reference_agrees"),
    ("progress counts chunks", "progress.step(len(part))", "progress.step(1)", "features::test_progress_counts_recordings"),
)]  # fmt: skip


def plant(source: str, fault: Fault) -> str:
    """The file with the fault; ValueError if its text does not occur exactly once."""
    pattern = r"\s+".join(map(re.escape, fault.old.split()))
    found = list(re.finditer(pattern, source))
    if len(found) != 1:
        raise ValueError(f"{fault.name!r} is stale: {fault.old!r} occurs {len(found)} times")
    begin, end = found[0].span()
    changed = source[:begin] + fault.new + source[end:]
    try:
        compile(changed, FILE, "exec")
    except SyntaxError as error:
        raise ValueError(f"{fault.name!r} makes no valid file: {error}") from None
    return changed


def run_tests(source: str, nodes: list[str], *options: str) -> tuple[int, str]:
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
        try:
            done = subprocess.run(
                [*command, *nodes], cwd=folder, capture_output=True, text=True, timeout=LIMIT,
                env=env | {"TMPDIR": folder},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return 124, "it took too long"
    return done.returncode, done.stdout + done.stderr


def try_fault(fault: Fault, source: str) -> tuple[Fault, str, float]:
    """Which test noticed the fault (empty: none), and after how many seconds."""
    began = time.monotonic()
    for nodes in dict.fromkeys((tuple(fault.nodes), tuple(fault.files))):
        status, printed = run_tests(source, [*nodes], "-x")
        if status:
            by = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", printed, re.MULTILINE)
            text = by[1] if by else f"pytest {status}: {printed.strip()[-100:]}"
            return fault, text, time.monotonic() - began
    return fault, "", time.monotonic() - began


def main() -> int:  # noqa: PLR0915
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="faults to plant; all if none is named")
    parser.add_argument("--list", action="store_true", help="list the faults and stop")
    parser.add_argument("--random", type=int, metavar="N", help="only N of them")
    parser.add_argument("--of", help="only those that tests of these files should notice")
    parser.add_argument("--seed", default="0", help="which N: the same seed, the same ones")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at once")
    args, began = parser.parse_args(), time.monotonic()
    source = (ROOT / FILE).read_text()
    faults = [f for f in FAULTS if not args.names or f.name in args.names]
    if args.of:
        wanted = {f"tests/test_{name}.py" for name in args.of.split(",")}
        faults = [f for f in faults if set(f.files) <= wanted]
    if args.random is not None:
        faults = random.Random(args.seed).sample(faults, min(args.random, len(faults)))
    if args.list:
        print("\n".join(f"{fault.name:<52} {fault.tests}" for fault in faults))
        return 0
    try:
        planted = {fault.name: plant(source, fault) for fault in FAULTS}  # all: none may be stale
    except ValueError as error:
        sys.exit(f"mutate: {error}")
    nodes = sorted({node for fault in faults for node in fault.nodes})
    status, printed = run_tests(source, nodes)
    if status:
        sys.exit(f"mutate: these tests fail without any fault:\n{printed[-3000:]}")
    print(f"without a fault the tests pass; {time.monotonic() - began:.0f} s", flush=True)
    survived = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for fault, by, secs in pool.map(lambda f: try_fault(f, planted[f.name]), faults):
            survived += not by
            said = f"noticed by {by}" if by else "SURVIVED"
            print(f"{fault.name:<52} {secs:5.1f} s  {said}", flush=True)
    done = time.monotonic() - began
    print(f"{len(faults)} faults, {len(faults) - survived} noticed, {done:.0f} seconds")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
