"""Plants faults in cmi_pipeline.py, one at a time in a copy, and demands that a test notices each.

    python tests/mutate.py                       # all of them
    python tests/mutate.py --random 10 --seed 3  # some, the same ones for the same seed
    python tests/mutate.py --list                # what there is
    python tests/mutate.py "gravity sign"        # by name

A fault is an exact text, which must occur once however its lines are broken, the text that takes its
place, and the tests that should notice. Those tests must pass without the fault. One that survives
them meets the whole files they are in; if it survives these too, the suite has a hole: exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = "cmi_pipeline.py"
LIMIT = 600  # s for the tests of one fault; a fault that hangs them is noticed


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new`; `tests` are functions, each after the name of its file: "score::test_…"."""

    name: str
    old: str
    new: str
    tests: str

    @property
    def nodes(self) -> list[str]:
        return [f"tests/test_{test.replace('::', '.py::')}" for test in self.tests.split()]

    @property
    def files(self) -> list[str]:
        return sorted({node.split("::")[0] for node in self.nodes})


FAULTS = tuple(Fault(*row) for row in (
    # ---- configuration
    ("bool by truthiness", '{"1": True, "true": True, "0": False, "false": False}[text.strip().lower()]',
     "bool(text.strip())", "settings::test_environment_overrides_defaults"),
    ("range without an upper end", "not within[0] <= value <= within[1]", "not within[0] <= value",
     "settings::test_a_value_out_of_range_stops_the_run"),
    ("words not checked", "value not in within if word else", "False if word else",
     "settings::test_a_value_out_of_range_stops_the_run"),
    ("old name wins", 'if "MODEL_PATH" in env and "LGBM_BUNDLE_PATH" not in env:', 'if "MODEL_PATH" in env:',
     "settings::test_the_old_name_of_the_lightgbm_bundle_is_known"),
    ("empty text is nought", "return None if optional else default", "return None",
     "settings::test_an_empty_variable_is_the_default"),
    ("every setting shapes every member", 'if member in f.metadata["shapes"]', 'if f.metadata["shapes"]',
     "settings::test_a_setting_shapes_only_the_members_it_says"),
    ("random numbers without address", "[cfg.seed, *(zlib.crc32(str(p).encode()) for p in path)]", "[cfg.seed]",
     "settings::test_random_numbers_have_an_address_not_an_order"),
    ("seed unused", "[cfg.seed, *(zlib.crc32", "[0, *(zlib.crc32",
     "settings::test_random_numbers_have_an_address_not_an_order"),
    ("typing mistakes untold", "if match and name not in known]", "if match and name in known]",
     "settings::test_likely_typing_mistakes_are_told"),
    # ---- log and artefacts
    ("file written in place", "partial.replace(path)", "path.write_bytes(partial.read_bytes())",
     "artefacts::test_a_file_that_is_being_read_stays_whole_while_it_is_replaced"),
    ("half-written file left", "partial.unlink(missing_ok=True)", "pass",
     "artefacts::test_a_write_that_fails_leaves_the_former_file_and_no_other"),
    ("no wait for the disk", "os.fsync(file.fileno())", "pass",
     "artefacts::test_a_write_that_fails_leaves_the_former_file_and_no_other"),
    ("digest blind to type and shape", 'state.update(f"{part.dtype.str}{part.shape}".encode())', "pass",
     "artefacts::test_a_digest_changes_with_every_byte_type_and_shape"),
    ("digest follows the order of keys", "json.dumps(part, sort_keys=True)", "json.dumps(part)",
     "artefacts::test_a_digest_changes_with_every_byte_type_and_shape"),
    ("lock is shared", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
     "artefacts::test_a_folder_has_one_holder_and_is_free_again_when_it_dies"),
    ("leftovers stay", "clear_leftovers(folder) yield", "yield", "artefacts::test_only_leftovers_are_removed"),
    ("others' files count as leftovers", 'rglob(".*.[0-9]*.part*")', 'rglob("*.part*")',
     "artefacts::test_only_leftovers_are_removed"),
    ("silence after the last line", "or before < self.total <= self.done", "",
     "log::test_a_line_every_so_many_steps_and_at_the_end"),
    ("rate counts resumed steps", "rate = (self.done - self.first)", "rate = self.done",
     "log::test_a_resumed_loop_counts_its_rate_from_where_it_was_taken_up"),
    # ---- score and folds
    ("binary F1 counts non-targets", "counts[..., :8, :8].sum", "counts[..., :8, :].sum",
     "score::test_known_cases"),
    ("absent classes count", "np.maximum((sides > 0).sum(-1), 1)", "9", "score::test_known_cases"),
    ("macro F1 alone", "return sum(score_parts(truth, predicted)) / 2", "return score_parts(truth, predicted)[1]",
     "score::test_random_answers_agree_with_scikit_learn"),
    ("F1 without prediction", "sides = counts.sum(-1) + counts.sum(-2)", "sides = 2 * counts.sum(-1)",
     "score::test_random_answers_agree_with_scikit_learn"),
    ("folds by recording", "return fold[index.reshape(-1)]", "return np.arange(len(subject)) % cfg.n_folds",
     "score::test_no_subject_is_on_both_sides_and_folds_are_alike"),
    ("folds of unlike size", "fold[s] = load.argmin()", "fold[s] = load.argmax()",
     "score::test_no_subject_is_on_both_sides_and_folds_are_alike"),
    ("labels without orientation", "np.stack([behavior, orientation, gesture], axis=1)",
     "np.stack([behavior, 0 * orientation, gesture], axis=1)",
     "score::test_composite_labels_are_those_that_occur"),
    ("gesture read from behavior", "belongs = table[:, 2:] == np.arange(len(GESTURES))",
     "belongs = table[:, :1] == np.arange(len(GESTURES))", "blend::test_a_blend_mixes_gestures_by_weight"),
    # ---- recordings
    ("nothing in range is missing", "np.where(tof == -1, NOTHING, MISSING)", "np.where(tof == -1, MISSING, NOTHING)",
     "reading::test_every_value_arrives"),
    ("codes taken for distances", "(tof >= 0) & (tof <= FARTHEST)", "(tof >= 0) & (tof <= 255)",
     "reading::test_impossible_values_are_missing"),
    ("infinities pass", "= np.where(np.isfinite(found), found, np.nan)", "= found",
     "reading::test_impossible_values_are_missing reading::test_a_text_in_a_number_column_becomes_missing_and_is_named"),
    ("strangers have no hand", "np.where(rows[:, right] == 0, 0, 1)", "rows[:, right]",
     "reading::test_a_subject_without_demographics_is_told_and_right_handed"),
    ("strangers are left-handed", "np.where(rows[:, right] == 0, 0, 1)", "np.where(rows[:, right] == 1, 1, 0)",
     "reading::test_a_subject_without_demographics_is_told_and_right_handed"),
    ("behavior of the last row", "first = rec.start[:-1] labels = Labels.of(",
     "first = rec.start[1:] - 1; labels = Labels.of(", "reading::test_phase_and_demographics_arrive"),
    ("rows sorted by recording only", '.sort("rank", "sequence_counter", maintain_order=True)',
     '.sort("rank", maintain_order=True)', "reading::test_rows_out_of_order_are_put_right"),
    ("rows that occur twice stay", 'frame.unique(key, keep="first", maintain_order=True)', "frame",
     "reading::test_rows_out_of_order_are_put_right"),
    ("half a row is read", "return frame.head(-1) if cut_off(path, len(present)) else frame", "return frame",
     "reading::test_a_file_cut_off_loses_its_last_row_only"),
    ("cache of another file", "(f.name, s.st_size, s.st_mtime_ns)", "(f.name,)",
     "reading::test_the_cache_gives_the_same_and_notices_another_file"),
    ("an old cache stays", 'for old in cache.parent.glob("recordings-*"):', "for old in ():",
     "reading::test_the_cache_gives_the_same_and_notices_another_file"),
    ("spoilt cache is used", 'if mark == read_json(meta)["digest"]:', 'if read_json(meta)["digest"]:',
     "reading::test_a_changed_byte_of_the_cache_is_noticed"),
    ("empty recordings allowed", "or np.any(np.diff(self.start) < 1)", "", "reading::test_an_empty_recording_is_refused"),
    # ---- motion
    ("gravity constant", "GRAVITY = 9.81", "GRAVITY = 9.0", "motion::test_gravity_in_known_poses"),
    ("sample period", "SAMPLE_PERIOD = 0.1 ", "SAMPLE_PERIOD = 0.05 ",
     "motion::test_constant_turning_is_measured_in_radians_per_second"),
    ("gravity sign", "side_by_side(2 * (x * z - w * y), 2 * (y * z + w * x),",
     "side_by_side(2 * (x * z + w * y), 2 * (y * z - w * x),", "motion::test_gravity_in_known_poses"),
    ("quaternion with w last", "w, x, y, z = np.asarray(rot, np.float64).T return side_by_side(2 * (x * z",
     "x, y, z, w = np.asarray(rot, np.float64).T; return side_by_side(2 * (x * z",
     "motion::test_gravity_in_known_poses"),
    ("columns for rows of the matrix", "2 * (x * y - w * z), 2 * (x * z + w * y)", "2 * (x * y + w * z), 2 * (x * z - w * y)",
     "motion::test_turning_the_wristband_turns_every_vector_alike motion::test_the_helpers_agree_with_scipy"),
    ("product in the wrong order", "a * x + b * w + c * z - d * y", "a * x + b * w - c * z + d * y",
     "motion::test_the_helpers_agree_with_scipy"),
    ("world to device", "return v + q[:, :1] * turn + cross(q[:, 1:], turn)",
     "return v - q[:, :1] * turn + cross(q[:, 1:], turn)", "motion::test_a_push_in_the_world_is_found_in_the_world"),
    ("gravity added", "linear = acc - GRAVITY * up", "linear = acc + GRAVITY * up",
     "motion::test_a_device_at_rest_has_no_linear_acceleration"),
    ("longer way round", "np.abs(w)), v * np.where(w < 0, -1.0, 1.0)[:, None]", "np.abs(w)), v",
     "motion::test_the_shorter_way_round_is_taken"),
    ("rate leaks from the recording before", "rate[first] = np.where(np.isnan(q[first, :1]), np.nan, 0.0)", "pass",
     "motion::test_nothing_crosses_a_border"),
    ("jerk leaks from the recording before", "out[:, start[:-1]] = np.where(np.isnan(a[:, start[:-1]]), np.nan, 0.0)",
     "pass", "motion::test_nothing_crosses_a_border"),
    ("gaps filled from the recording before", "before = np.where(before >= np.repeat(start[:-1], n), before, -1)", "pass",
     "motion::test_repair_agrees_with_the_reference_and_stays_within_its_recording"),
    ("rebuilt component always positive", "np.where(agree < 0, -size, size)", "size",
     "motion::test_one_missing_component_is_rebuilt"),
    ("zero quaternion is a rotation", "gone = ~(norm > 0.1) | ~np.isfinite(norm)", "gone = ~np.isfinite(norm)",
     "motion::test_a_zero_quaternion_is_missing"),
    ("median looks across the border", "inside, np.asarray(acc.T, np.float64)[:,", "True, np.asarray(acc.T, np.float64)[:,",
     "motion::test_the_median_stays_within_its_recording"),
    # ---- mirror, turn, wearer
    ("mirror flips all images alike", "MIRROR_FLIPS = (1, 1, 0, 1, 0)", "MIRROR_FLIPS = (1, 1, 1, 1, 1)",
     "motion::test_sensors_and_pixels_change_places"),
    ("mirror swaps 2 and 4", "MIRROR_SENSORS = (0, 1, 4, 3, 2)", "MIRROR_SENSORS = (0, 3, 2, 1, 4)",
     "motion::test_sensors_and_pixels_change_places"),
    ("mirror of another axis", "rec.rot[rows] * np.array([1, 1, -1, -1], np.float32)",
     "rec.rot[rows] * np.array([1, -1, 1, -1], np.float32)", "motion::test_the_maps_are_what_the_matrices_say"),
    ("turn leaves sensors where they are", "TURN_SENSORS = (0, 3, 4, 1, 2)", "TURN_SENSORS = (0, 1, 2, 3, 4)",
     "motion::test_sensors_and_pixels_change_places"),
    ("turn leaves images upright", "rec.tof[rows][:, TURN_SENSORS, ::-1, ::-1]", "rec.tof[rows][:, TURN_SENSORS]",
     "motion::test_sensors_and_pixels_change_places"),
    ("turn the other side of the product", "np.array([-1, 1, -1, 1], np.float32)", "np.array([-1, -1, 1, 1], np.float32)",
     "motion::test_the_maps_are_what_the_matrices_say"),
    ("right-handers are mirrored", 'left = rec.person[:, PERSON.index("handedness")] == 0',
     'left = rec.person[:, PERSON.index("handedness")] == 1', "motion::test_canonical_changes_only_whom_it_must"),
    ("evidence not antisymmetric", "np.nan_to_num(pairs[:, [1, 2, 6, 7]] - pairs[:, [3, 4, 8, 9]])",
     "np.nan_to_num(pairs[:, [1, 2, 6, 7]] + pairs[:, [3, 4, 8, 9]])",
     "wearer::test_the_evidence_of_a_turned_twin_is_the_negative"),
    ("a missing sensor speaks against its partner", "near[(rec.tof == MISSING).all(axis=(2, 3))] = np.nan", "pass",
     "wearer::test_a_missing_sensor_is_no_evidence"),
    ("wearers judged by their own data", 'fit_wearer(signed[fold != k])["coefficients"]', 'fit_wearer(signed)["coefficients"]',
     "wearer::test_nobody_is_judged_by_a_model_that_saw_their_fold"),
    ("wearers judged in one round", "for _ in range(2): signed", "for _ in range(1):\n        signed",
     "wearer::test_nobody_is_judged_by_a_model_that_saw_their_fold"),
    ("sparse wearers are judged", "or len(rec) < 20 * len(names):", "or not len(rec):",
     "wearer::test_with_few_subjects_nobody_is_turned"),
    ("few wearers are judged", "or len(names) < 8 or", "or", "wearer::test_with_few_subjects_nobody_is_turned"),
    # ---- features
    ("gesture a row too long", "np.maximum(self.first, self.last - GESTURE_ROWS)",
     "np.maximum(self.first, self.last - GESTURE_ROWS - 1)",
     "features::test_the_slow_reference_agrees_on_complete_recordings"),
    ("sample instead of population variance",
     "steady(ratio(over(np.add, c * c, self.first, self.last), self.count), self.mean)",
     "steady(ratio(over(np.add, c * c, self.first, self.last), self.count - 1), self.mean)",
     "features::test_statistics_of_a_ramp"),
    ("steps across the border", "d[:, self.rec.start] = np.nan", "d[:, 0] = np.nan",
     "features::test_alone_is_the_same_as_together"),
    ("flow across the border", "flow[:, start[:-1]] = np.nan", "pass", "features::test_frames_across_borders_are_those_alone"),
    ("gesture of a short recording takes the one before",
     "own = (row >= self.first[:, None]) & (row < self.last[:, None])", "own = (row >= 0) & (row < self.last[:, None])",
     "features::test_alone_is_the_same_as_together"),
    ("opening of a short recording takes the one behind",
     "own = (row >= self.first[:, None]) & (row < self.last[:, None])", "own = row >= self.first[:, None]",
     "features::test_alone_is_the_same_as_together"),
    ("an empty part takes the row behind", "out if full.all() else np.where(full, out, 0.0), 2, 0)", "out, 2, 0)",
     "features::test_the_slow_reference_agrees_on_gaps_and_short_recordings"),
    ("frames in the order of the lengths", "rows[row_of(rec.start, order)[0]] = channels(chunk)",
     "rows[np.sort(row_of(rec.start, order)[0])] = channels(chunk)", "features::test_frames_across_borders_are_those_alone"),
    ("highest frequency twice", "power[..., 1:-1] *= 2", "power[..., 1:] *= 2",
     "features::test_the_slow_reference_agrees_on_complete_recordings"),
    ("left for right in images", "(ne + se - nw - sw) / valid", "(nw + sw - ne - se) / valid",
     "features::test_a_hand_in_a_corner_is_seen_there"),
    ("thermopiles in IMU mode", "kept = np.flatnonzero(self.modality == 0)", "kept = np.flatnonzero(self.modality < 2)",
     "features::test_imu_mode_has_no_trace_of_tof_and_thm"),
    ("columns of two sensors survive one's loss", "drop_thm[:, None] & (self.modality & THM_BIT > 0)",
     "drop_thm[:, None] & (self.modality == THM_BIT)",
     "features::test_a_dropped_modality_is_as_if_it_had_never_been_there"),
    ("thermopiles in IMU frames", 'if not g[0].startswith(("thm", "tof")))', 'if not g[0].startswith("tof"))',
     "features::test_imu_mode_has_no_trace_of_tof_and_thm"),
    ("standardised on all rows", "which = np.arange(len(frames))[recordings]", "which = np.arange(len(frames))",
     "features::test_standardisation_looks_at_the_training_recordings_only"),
    ("missing sensors see nothing", "where=np.isnan(sight[:, i]) & there", "where=np.isnan(sight[:, i])",
     "features::test_frames_are_missing_exactly_where_a_sensor_is"),
    ("first rows kept", "return start[1:] - kept, kept", "return start[:-1], kept", "features::test_the_last_rows_are_kept"),
    # ---- LightGBM
    ("one loss for both sensors", "return (kind & 1) > 0, (kind & 2) > 0", "return (kind & 1) > 0, (kind & 1) > 0",
     "lgbm::test_modality_dropout_is_drawn_by_recording"),
    ("sides spread over all gestures", "within = (gesture[:, None] == gesture).astype(np.float64)",
     "within = (gesture[:, None] >= 0).astype(np.float64) * np.ones(len(gesture))",
     "lgbm::test_composites_are_the_product_within_a_gesture"),
    ("a value on the threshold goes right", ".take(self.feature) <= self.threshold", ".take(self.feature) < self.threshold",
     "lgbm::test_a_value_on_a_threshold_goes_the_same_way"),
    ("common gestures weigh more", "return len(target) / ((count > 0).sum() * count[target])",
     "return (count > 0).sum() * count[target] / len(target)",
     "lgbm::test_balanced_weights_give_every_class_the_same_sum"),
    ("worst features kept", '.sort("gain", descending=True)', '.sort("gain", descending=False)',
     "lgbm::test_the_best_features_of_an_earlier_run"),
    ("score not watched", 'params["metric"] = "None"', "pass", "lgbm::test_what_is_written_ends_with_the_best_round"),
    ("text of a booster not checked", "check_booster(text, n_classes) except", "pass\n    except",
     "lgbm::test_a_text_that_is_no_model_is_refused"),
    # ---- Torch
    ("padding enters batch norm", "n = mask.sum()", "n = torch.ones_like(mask).sum()",
     "torch::test_batch_norm_leaves_padding_out"),
    ("padding not zero after the norm", "scale[:, None]) * mask", "scale[:, None])", "torch::test_batch_norm_leaves_padding_out"),
    ("halving looks at padding", "h = h.masked_fill(mask == 0, torch.finfo(h.dtype).min)", "pass",
     "torch::test_time_is_halved_without_looking_at_padding"),
    ("attention on padding", "rank.masked_fill(~there, lowest).softmax(2)", "rank.softmax(2)",
     "torch::test_more_padding_changes_no_probability torch::test_a_recording_alone_gives_what_it_gives_in_company"),
    ("peak of padding", "h.masked_fill(~there[..., None], lowest).amax(2, keepdim=True)", "h.amax(2, keepdim=True)",
     "torch::test_more_padding_changes_no_probability torch::test_a_recording_alone_gives_what_it_gives_in_company"),
    ("the way back is read forward", "ahead, back.flip(1)], 2)", "ahead, back], 2)",
     "torch::test_all_networks_in_one_pass_equal_the_plain_loop"),
    ("the gate keeps what is new", "torch.lerp(new, h, kept)", "torch.lerp(h, new, kept)",
     "torch::test_all_networks_in_one_pass_equal_the_plain_loop"),
    ("stems of the first network for all", "torch.block_diag(*(w[i, ..., k]", "torch.block_diag(*(w[0, ..., k]",
     "torch::test_all_networks_in_one_pass_equal_the_plain_loop"),
    ("only one head speaks", "mixed = (own + summed) / 2", "mixed = own", "torch::test_the_composite_is_shared_out_by_hand"),
    ("vectors turned back", "@ turn.mT[:, None]", "@ turn[:, None]",
     "torch::test_turning_the_wristband_turns_every_vector_by_one_rotation"),
    ("only acceleration turned", 'for n in names if n.endswith("_x")]', 'for n in names if n == "acc_x"]',
     "torch::test_turning_the_wristband_turns_every_vector_by_one_rotation"),
    ("mixup beyond the partner", "there = (at >= on(store.first[d.partner])[:, None])[:, :, None]",
     "there = (at >= 0)[:, :, None]", "torch::test_mixup_takes_nothing_from_beyond_the_other_recording"),
    ("mixup forgets the partner's label", "torch.lerp(other.float(), own.float(), on(d.share)[:, None])", "own.float()",
     "torch::test_mixup_mixes_rows_and_labels_alike_and_aligns_the_ends"),
    ("stretching reads the neighbour", "before = on(d.last)[:, None] - back.long() - (part > 0).long()",
     "before = (on(d.last)[:, None] - back.long() - 1).clamp(min=0)",
     "torch::test_a_stretched_recording_takes_no_gap_from_its_neighbour"),
    ("shift runs out of the recording", "shift = np.minimum(shift, rows - 1)", "pass",
     "torch::test_draws_stay_inside_their_recordings"),
    ("ToF channels never dropped", "np.outer(lose_thm, store.thm) | np.outer(lose_tof, store.near)",
     "np.outer(lose_thm, store.thm)", "torch::test_a_dropped_modality_is_a_recording_without_the_sensor"),
    ("ToF images never dropped", "d.blind = lose_tof", "pass",
     "torch::test_a_dropped_modality_is_a_recording_without_the_sensor"),
    ("average follows at once", "slow.lerp_(fast, 1 - keep)", "slow.lerp_(fast, keep)", "torch::test_averaged_weights_follow_slowly"),
    ("schedule starts high", "low, part = peak / 25, step", "low, part = peak / 5, step", "torch::test_the_schedule_is_torchs_one_cycle"),
    ("label smoothing not shared", "smooth / logits.shape[1]", "smooth", "torch::test_losses_are_those_of_torch"),
    ("focal loss not squared", "(1 - log_p.exp()).square()", "(1 - log_p.exp())", "torch::test_losses_are_those_of_torch"),
    ("phase loss over padding", "((by_step * there).sum(1) / there.sum(1)).mean()", "by_step.mean()",
     "torch::test_padding_has_no_part_in_the_loss"),
    ("patience a step too long", 'run.epoch - run.best["epoch"] >= patience', 'run.epoch - run.best["epoch"] > patience',
     "torch::test_early_stopping_keeps_the_best_and_a_fixed_number_the_last"),
    ("latest kept for best", "if not (stopping and run.best) or reached >", "if True or reached >",
     "torch::test_early_stopping_keeps_the_best_and_a_fixed_number_the_last"),
    ("validation rows standardise (Torch)", "mean, sd = standardisation(frames, job.train)",
     "mean, sd = standardisation(frames, np.r_[job.train, job.valid])", "torch::test_only_training_rows_standardise"),
    ("every epoch draws the same", 'job.rng(cfg, "epoch", run.epoch)', 'job.rng(cfg, "epoch")',
     "torch::test_every_epoch_shows_every_training_row_once_and_in_another_order"),
    ("pieces not weighed", "* (len(piece) / len(batch))", "", "torch::test_accumulated_pieces_have_the_gradient_of_the_whole"),
    ("optimiser not resumed", 'for part in ("net", "ema", "optimizer", "scaler"): if state',
     'for part in ("net", "ema", "scaler"):\n            if state', "torch::test_stopped_at_any_moment_and_resumed_it_gives_the_same_bits"),
    ("step not resumed", '"epoch", "step", "best"): setattr', '"epoch", "best"): setattr',
     "torch::test_stopped_at_any_moment_and_resumed_it_gives_the_same_bits"),
    ("asked in training mode", "net.eval() with torch.inference_mode():", "with torch.inference_mode():",
     "torch::test_a_network_that_is_learning_is_asked_as_it_will_be_served"),
    ("code in weights is run", 'map_location="cpu", weights_only=True', 'map_location="cpu", weights_only=False',
     "torch::test_a_file_with_code_in_it_is_refused"),
    ("checkpoint of other settings used", 'if other: log("warning", job=job.name, checkpoint="not used"',
     'if not settings:\n        log("warning", job=job.name, checkpoint="not used"',
     "torch::test_a_checkpoint_of_other_settings_is_refused_by_name"),
    # ---- Keras
    ("padding enters batch norm (Keras)", 'name=f"{name}_norm{n}")(x, mask=steps)', 'name=f"{name}_norm{n}")(x)',
     "keras::test_padding_enters_no_statistic_of_batch_norm"),
    ("gaps are padding (Keras)", "ops.logical_or(ops.flip(later, axis=1) > 0, first)",
     "ops.logical_or(ops.max(there, axis=-1, keepdims=True) > 0, first)", "keras::test_standardise_against_a_slow_loop"),
    ("attention on padding (Keras)", 'ops.where(real > 0, ops.cast(scores, "float32"), lowest)', 'ops.cast(scores, "float32")',
     "keras::test_attention_weighs_real_rows_only"),
    ("only one head speaks (Keras)", "gain = (own + ops.softmax(gesture, axis=-1))", "gain = (own + own)",
     "keras::test_heads_are_combined_as_a_slow_loop_does"),
    ("gates of the GRU swapped", "kept, reset = ops.split(gates, 2, axis=-1)", "reset, kept = ops.split(gates, 2, axis=-1)",
     "keras::test_recurrent_layer_is_keras_own_lstm_and_gru_under_a_mask"),
    ("thermopiles lost too often", "lost = (thm & (chance < 2 / 3))", "lost = (thm & (chance < 1))",
     "keras::test_modality_dropout_takes_the_share_asked_for_and_nothing_else"),
    ("every epoch shuffles the same", "[self.seed, step // self.steps]", "[self.seed, 0]",
     "keras::test_a_step_draws_the_same_wherever_one_begins_and_anew_in_each_epoch"),
    ("played from the start", "back = tf.cast(tf.round(tf.cast(length - 1 - t, tf.float32) * speed), tf.int64)",
     "back = last - first - t", "keras::test_stretching_keeps_the_end_and_turning_keeps_lengths_and_angles"),
    ("rare gestures weigh less", "** cfg.keras_class_weight, 0)", "** -cfg.keras_class_weight, 0)",
     "keras::test_rare_gestures_weigh_more_and_the_mean_weight_is_one"),
    ("validation rows standardise (Keras)", "mean, scale = standardisation(self.frames, job.train)",
     "mean, scale = standardisation(self.frames, np.r_[job.train, job.valid])",
     "keras::test_standardisation_never_sees_validation_rows"),
    ("worst weights kept", 'np.argmin([epoch["val_loss"]', 'np.argmax([epoch["val_loss"]',
     "keras::test_plateaus_early_stop_and_best_weights_survive_a_kill"),
    ("batch not capped", "return min(cfg.keras_batch_size, max(n_train // 16, min(4, n_train)))", "return cfg.keras_batch_size",
     "keras::test_batches_are_capped_at_a_sixteenth_of_the_rows"),
    # ---- plan and training
    ("train and valid may overlap", 'assert not np.intersect1d(self.train, self.valid).size, "train and valid overlap"', "pass",
     "members::test_a_job_cannot_be_scored_on_what_it_learnt"),
    ("a job learns from its own fold", "np.flatnonzero(self.fold != k), np.flatnonzero(self.fold == k)",
     "np.flatnonzero(self.fold == k), np.flatnonzero(self.fold != k)",
     "members::test_no_recording_is_scored_by_a_model_that_saw_its_wearer"),
    ("out-of-fold rows by models that saw them", "model = member.load(step.folder, [job.stem for job in jobs],",
     "model = member.load(step.folder, [j.stem for j in step.jobs if j.fold != k],",
     "members::test_no_recording_is_scored_by_a_model_that_saw_its_wearer"),
    ("only the first seed counts", "oof[jobs[0].valid] = proba.mean(axis=0)", "oof[jobs[0].valid] = proba[0]",
     "members::test_no_recording_is_scored_by_a_model_that_saw_its_wearer"),
    ("fingerprint without the data", '"data": study.mark,', "",
     "members::test_what_a_model_depends_on_is_named_when_it_changes"),
    ("fingerprint without the turned", '"turned": study.turned,', "",
     "members::test_what_a_model_depends_on_is_named_when_it_changes"),
    ("fingerprint without the fold", '"training rows": digest(study.inputs.rec.sequence_id[job.train]),', "",
     "members::test_what_a_model_depends_on_is_named_when_it_changes"),
    ("input computed in another way unnoticed", "if not close:", "if close is None:",
     "members::test_an_input_that_is_computed_in_another_way_trains_again"),
    ("a changed byte unnoticed", "if not path.is_file() or digest(path.read_bytes()) != marks[end]:", "if not path.is_file():",
     "members::test_one_changed_byte_trains_that_model_alone"),
    ("resume trains all again", "todo = tuple(unfit[own])", "todo = jobs", "members::test_one_changed_byte_trains_that_model_alone"),
    ("force is ignored", 'if getattr(cfg, f"force_train_{member}"):', 'if member not in MEMBERS:',
     "members::test_one_changed_byte_trains_that_model_alone"),
    ("old note outlives a failed training", "job.note.unlink(missing_ok=True) job.folder.mkdir", "job.folder.mkdir",
     "members::test_a_training_that_fails_takes_its_former_note_along"),
    ("bundle may name files elsewhere", 're.fullmatch(r"fold', 're.match(r"fold', "members::test_a_bundle_cannot_name_files_elsewhere"),
    ("note may name other files", "or set(marks) != set(ends):", "or not marks:",
     "members::test_a_note_names_exactly_the_files_of_its_member"),
    ("weights of another bundle", "if part not in found or bundle_mark(*models[:2]) == marks.get(part):", "if part not in found:",
     "members::test_of_two_bundles_the_one_that_the_weights_were_found_for_is_taken"),
    ("folds of other data", 'if saved["sequence_id"].to_list() != rec.sequence_id.tolist():', "if not len(saved):",
     "members::test_folds_are_kept_and_refused_if_they_are_of_others"),
    ("a subject in two folds", '"" if len(pairs) == len(set(rec.subject)) else', '"" if pairs else',
     "members::test_folds_are_kept_and_refused_if_they_are_of_others"),
    # ---- blend and assignment
    ("nested blend sees its own fold", "make_blend(parts, proba[:, inner], truth[inner], kind, cfg)",
     "make_blend(parts, proba, truth, kind, cfg)",
     "members::test_the_nested_blend_never_looks_at_the_truth_of_its_own_fold"),
    ("IMU blend takes models of all sensors", 'if mode == "all" and p[1] == "imu"]', 'if mode == "imu" and p[1] == "all"]',
     "members::test_imu_models_join_the_blend_of_all_sensors_and_not_the_reverse"),
    ("weights of absent parts lost", "share /= share.sum()", "pass", "blend::test_an_absent_part_is_left_out_and_the_rest_renormalised"),
    ("weights ignored", "plain = sum(w * composite[self.parts[i]]", "plain = sum(composite[self.parts[i]]",
     "blend::test_a_blend_keeps_the_plain_mean_within_a_gesture"),
    ("temperature upside down", "np.log(np.maximum(proba, TINY)) / temperature", "np.log(np.maximum(proba, TINY)) * temperature",
     "blend::test_half_the_temperature_squares_the_odds"),
    ("worst weights found", "best, best_score = candidates[scores.argmax()], scores.max()",
     "best, best_score = candidates[scores.argmin()], scores.max()", "blend::test_the_search_is_never_worse_than_the_best_part"),
    ("negative weights pass", "if min(weights.values()) < 0 or not", "if not", "blend::test_impossible_weights_are_refused"),
    ("assignment likes the improbable", "self.rows[recording] = -np.log(", "self.rows[recording] = np.log(",
     "blend::test_each_arrival_gets_the_best_joint_label"),
    ("asking twice answers for another", "self.rows.pop(recording, None)", "pass",
     "blend::test_an_earlier_recording_asked_again_gets_its_own_answer"),
    ("more recordings than labels", "if len(self.rows) > len(self.table):", "if not self.rows:",
     "blend::test_one_recording_more_than_there_are_labels_is_judged_alone"),
    ("all wearers share their labels", "state.setdefault(str(rec.subject[r]),", 'state.setdefault("",',
     "members::test_replayed_wearers_share_no_labels"),
    # ---- serving
    ("fallback in strict mode", 'if self.cfg.strict: raise answer cause', 'if False:\n                raise answer\n            cause',
     "serving::test_a_failure_is_counted_and_answered_and_in_strict_mode_raised"),
    ("a part left out in strict mode", "if self.cfg.strict: raise answer self.fallbacks[f", "if False: raise answer\n                self.fallbacks[f",
     "serving::test_in_strict_mode_a_part_that_fails_is_not_left_out"),
    ("fallback not counted", "self.fallbacks[cause] += 1", "pass",
     "serving::test_a_failure_is_counted_and_answered_and_in_strict_mode_raised"),
    ("a failed load is tried again", "self.unusable = loaded", "pass", "serving::test_models_that_cannot_be_had_are_asked_for_once"),
    ("fixed weights not asked for again", "{mode: as_asked(mode, blend, cfg) for", "{mode: blend for",
     "serving::test_fixed_weights_hold_for_bundles_too"),
    ("unweighted members never asked", "or [p for p in blend.parts if p in known]", "",
     "serving::test_who_is_left_answers_though_without_weight"),
    ("predict without a lock", "with self.lock:", "with contextlib.nullcontext():",
     "serving::test_questions_at_once_are_answered_one_after_the_other"),
    ("memory by name", "key = digest(raw.acc, raw.rot, raw.thm, raw.tof, raw.person, turned)",
     "key = str(raw.sequence_id[0])", "serving::test_memory_is_of_content_and_never_grows_beyond_its_size"),
    ("memory without demographics", "raw.tof, raw.person, turned)", "raw.tof, turned)",
     "serving::test_left_handers_reach_the_models_mirrored"),
    ("memory grows for ever", "while len(self.answers) > self.cfg.frame_cache_max_items:", "while False:",
     "serving::test_memory_is_of_content_and_never_grows_beyond_its_size"),
    ("the newest is forgotten", "self.answers.popitem(last=False)", "self.answers.popitem(last=True)",
     "serving::test_memory_is_of_content_and_never_grows_beyond_its_size"),
    ("an empty view is a missing sensor", "(rec.tof == MISSING).mean() > 0.5", "(rec.tof >= NOTHING).mean() > 0.5",
     "serving::test_a_recording_goes_to_the_models_that_know_its_sensors"),
    ("a gap in the rotation is none at all", "np.isnan(repair_rotation(rec.rot, rec.start)).all()", "np.isnan(rec.rot).any()",
     "serving::test_a_recording_goes_to_the_models_that_know_its_sensors"),
    ("left-handers served as they are", "rec = canonical(raw, np.array([turned]))", "rec = raw",
     "serving::test_left_handers_reach_the_models_mirrored"),
    ("only the first fold answers", "member.prepare(inputs, mode)).mean(axis=0))", "member.prepare(inputs, mode))[0])",
     "serving::test_answers_of_all_folds_are_averaged"),
    ("wearers share an assignment", "self.assignments.setdefault(subject,", 'self.assignments.setdefault("",',
     "serving::test_each_wearer_gets_each_label_once"),
    ("assignment cannot be switched off", "if not self.cfg.subject_assignment:", "if not len(composite):",
     "serving::test_each_wearer_gets_each_label_once"),
    ("asking twice is evidence twice", "seen[str(raw.sequence_id[0])] = float(logit[0])",
     "seen[str(len(seen))] = float(logit[0])",
     "serving::test_evidence_of_a_turned_device_adds_up_over_its_wearers_recordings"),
    ("evidence of others", "self.evidence.setdefault(str(raw.subject[0]), {})", 'self.evidence.setdefault("", {})',
     "serving::test_evidence_of_a_turned_device_adds_up_over_its_wearers_recordings"),
    ("upright devices turned", '["prior"] + sum(seen.values()) < 0)', '["prior"] + sum(seen.values()) > 0)',
     "serving::test_evidence_of_a_turned_device_adds_up_over_its_wearers_recordings"),
))  # fmt: skip


def pattern_of(text: str) -> re.Pattern[str]:
    """The text, however its lines are broken and whatever is indented."""
    return re.compile(r"\s+".join(map(re.escape, text.split())))


def planted(source: str, fault: Fault) -> str:
    """The file with the fault; ValueError if its text does not occur exactly once."""
    found = list(pattern_of(fault.old).finditer(source))
    if len(found) != 1:
        raise ValueError(
            f"{fault.name!r} is stale: its text occurs {len(found)} times: {fault.old}"
        )
    begin, end = found[0].span()
    changed = source[:begin] + fault.new + source[end:]
    try:
        compile(changed, FILE, "exec")
    except SyntaxError as error:
        raise ValueError(f"{fault.name!r} makes no valid file: {error}") from None
    return changed


def checked(faults: Sequence[Fault], source: str) -> dict[str, str]:
    """The file with each fault, by name; all that is wrong with the table at once."""
    wrong, files = [], {}
    names = [fault.name for fault in faults]
    wrong += [f"{name!r} occurs twice" for name in sorted({n for n in names if names.count(n) > 1})]
    for fault in faults:
        try:
            files[fault.name] = planted(source, fault)
        except ValueError as error:
            wrong.append(str(error))
        for node in fault.nodes:
            path, test = node.split("::")
            if f"def {test}(" not in (ROOT / path).read_text():
                wrong.append(f"{fault.name!r} names {node}, which does not exist")
    if wrong:
        raise SystemExit("mutate: " + "\nmutate: ".join(wrong))
    return files


@contextlib.contextmanager
def project(source: str) -> Iterator[Path]:
    """A copy of what git would track, with another cmi_pipeline.py, in a folder that goes again."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as folder:
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        (Path(folder) / FILE).write_text(source)
        yield Path(folder)


RUNNING: set[subprocess.Popen[str]] = set()  # to be ended with us


def pytest_in(folder: Path, nodes: Iterable[str], *options: str) -> tuple[int, str]:
    """Exit status and output of pytest; 124 if it takes too long. Its processes end with it."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CMI_REAL_DATA")}
    flags = ("-q", "-n0", "-p", "no:cacheprovider", *options)
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *flags, *nodes], cwd=folder, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env | {"TMPDIR": str(folder)},
    ) as run:  # fmt: skip
        RUNNING.add(run)
        try:
            printed, _ = run.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            end(run)
            return 124, "it took too long"
        finally:
            RUNNING.discard(run)
    return run.returncode, printed


def end(run: subprocess.Popen[str]) -> None:
    """Kill a run and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)


def run_without_fault(file: str, faults: Sequence[Fault], source: str) -> list[str]:
    """What the selected tests of a file say to a file without fault; empty if all pass."""
    nodes = sorted({node for fault in faults for node in fault.nodes if node.startswith(file)})
    with project(source) as folder:
        status, printed = pytest_in(folder, nodes, "-rA")
    passed = set(re.findall(r"^PASSED (\S+?)(?:\[.*)?(?: - .*)?$", printed, re.MULTILINE))
    wrong = [f"{node} does not pass without a fault" for node in nodes if node not in passed]
    if status and not wrong:
        wrong = [f"{file}: pytest ended with {status} without a fault"]
    return wrong and [*wrong, printed[-3000:]]


@dataclass(frozen=True)
class Verdict:
    """Which test noticed a fault, and how long that took."""

    fault: Fault
    noticed: str  # empty: none did
    secs: float


def try_fault(fault: Fault, source: str) -> Verdict:
    """Run the selected tests on a copy with the fault, then the whole files they are in."""
    began = time.monotonic()
    with project(source) as folder:
        for nodes in (fault.nodes, fault.files):
            status, printed = pytest_in(folder, nodes, "-x")
            if status:
                break
    by = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", printed, re.MULTILINE)
    noticed = by[1] if by else f"pytest {status}: {printed.strip()[-100:]}"
    return Verdict(fault, noticed if status else "", time.monotonic() - began)


def chosen(args: argparse.Namespace) -> list[Fault]:
    """The faults that the command line asks for, in the order of the table."""
    known = {fault.name for fault in FAULTS}
    for name in args.names:
        if name not in known:
            raise SystemExit(f"mutate: no fault is called {name!r}; --list shows all.")
    faults = [f for f in FAULTS if not args.names or f.name in args.names]
    if args.random is None:
        return faults
    some = random.Random(args.seed).sample(faults, min(args.random, len(faults)))
    return sorted(some, key=FAULTS.index)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="faults to plant; all if none is named")
    parser.add_argument("--list", action="store_true", help="list the faults and stop")
    parser.add_argument("--random", type=int, metavar="N", help="only N of them")
    parser.add_argument("--seed", default="0", help="which N: the same seed, the same ones")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="at once; one a core"
    )
    return parser.parse_args()


def main() -> int:
    args, began = arguments(), time.monotonic()
    source = (ROOT / FILE).read_text()
    faults = chosen(args)
    if args.list:
        for fault in faults:
            print(f"{fault.name:<52} {fault.tests}")
        return 0
    files = checked(FAULTS, source)
    tests = sorted({file for fault in faults for file in fault.files})
    verdicts = []
    with ThreadPoolExecutor(max(args.jobs, 1)) as pool:
        try:
            alone = pool.map(lambda file: run_without_fault(file, faults, source), tests)
            wrong = [line for lines in alone for line in lines]
            if wrong:
                print("\n".join(wrong), file=sys.stderr)
                return 2
            print(f"without a fault, tests of {len(tests)} files pass; {time.monotonic() - began:.0f} s",
                  flush=True)  # fmt: skip
            for v in pool.map(lambda fault: try_fault(fault, files[fault.name]), faults):
                verdicts.append(v)
                said = f"noticed by {v.noticed}" if v.noticed else "SURVIVED"
                print(f"{v.fault.name:<52} {v.secs:5.1f} s  {said}", flush=True)
        except BaseException:  # Ctrl-C too: nothing goes on without us
            pool.shutdown(wait=False, cancel_futures=True)
            for run in [*RUNNING]:
                end(run)
            raise
    noticed = sum(bool(v.noticed) for v in verdicts)
    print(f"{len(verdicts)} faults, {noticed} noticed, {time.monotonic() - began:.0f} seconds")
    return int(noticed < len(verdicts))


if __name__ == "__main__":
    sys.exit(main())
