"""Pack the models of a finished run as a Kaggle dataset, ready to be uploaded and attached.

    python make_kaggle_dataset.py cmi_output cmi_dataset --slug USER/cmi-bundles --title "CMI data"

Copies what serving and the next plan need (the models that bundle.json names, the ensemble weights,
folds.csv), adds dataset-metadata.json and prints what comes next: upload, attach, push, submit. A
bundle that is incomplete, or was changed after training, is refused: on Kaggle nobody would be
there to see it.

Models may be trained on any machine, with a card or without, and serve on any. The kernel that they
are attached to runs on what kernel-metadata.json names: "machine_shape": "NvidiaTeslaT4", which is
T4 x 2. "enable_gpu" alone leaves the card to Kaggle's API, which chose the P100 until the summer of
2026; torch on Kaggle's image has had no kernels for that one since March 2026.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl

import cmi_pipeline as cmi

METADATA = "dataset-metadata.json"
KERNEL = Path(__file__).with_name("kernel-metadata.json")
MACHINE_SHAPE = "NvidiaTeslaT4"
LENGTH = range(6, 51)  # of a title and of a slug's second half, as the kaggle command demands


def checked_metadata(slug: str, title: str) -> dict[str, object]:
    """Content of dataset-metadata.json; a slug or title that Kaggle would refuse is an error."""
    if not re.fullmatch(r"[A-Za-z0-9-]+/[a-z0-9]+(-[a-z0-9]+)*", slug):
        raise ValueError(
            f"--slug {slug}: write user/name; the name in a-z, 0-9 and single hyphens."
        )
    name = slug.split("/")[1]
    for what, text in (("the name in --slug", name), ("--title", title)):
        if len(text) not in LENGTH:
            raise ValueError(f"{what} has {len(text)} characters, Kaggle takes 6 to 50: {text!r}.")
    return {"title": title, "id": slug, "licenses": [{"name": "MIT"}]}


def files_to_pack(out: Path) -> list[Path]:
    """Paths, relative to `out`, of a whole and unchanged run; else an error that says why not."""
    weights, folds = out / "ensemble" / "weights.json", out / "folds.csv"
    for needed in (folds, weights):
        if not needed.is_file():
            raise ValueError(f"{needed} does not exist. Name the OUTPUT_PATH of a finished run.")
    n_folds = pl.read_csv(folds.read_bytes())["fold"].n_unique()
    files, digests = [folds, weights], {}
    for name in (m for m in cmi.MEMBERS if (out / f"{m}_models" / "bundle.json").is_file()):
        for mode, (folder, stems, _) in whole_models(out, name, n_folds).items():
            digests[f"{name}/{mode}"] = cmi.bundle_digest(folder, stems)
            ends = (".json", *cmi.MEMBERS[name].files)
            files += [folder / f"{stem}{end}" for stem in stems for end in ends]
        files.append(out / f"{name}_models" / "bundle.json")
    wanted = cmi.read_json(weights)["digests"]
    other = [part for part in wanted if digests.get(part) != wanted[part]]
    if other or not digests:
        raise ValueError(
            f"{weights} was found with other models than lie in {out}: "
            f"{', '.join(other) or 'none'}. Run the pipeline again; models reused from a bundle "
            f"elsewhere must be copied here first."
        )
    return [path.relative_to(out) for path in files]


def whole_models(out: Path, name: str, n_folds: int) -> dict[str, tuple[Path, list[str], cmi.I64]]:
    """What serving would use of a member, by mode; an error if one is damaged or lacks a fold."""
    member, own = cmi.MEMBERS[name], out / f"{name}_models"
    usable = cmi.usable_models(own, member.files)  # logs what is damaged
    for mode in cmi.read_json(own / "bundle.json")["modes"]:
        if mode not in usable:
            raise ValueError(f"{own / mode} is damaged or incomplete. Run the pipeline again.")
        if len({stem.split("_")[0] for stem in usable[mode][1]}) != n_folds:
            raise ValueError(f"{own / mode} has not the {n_folds} folds of folds.csv.")
    return usable


def check_target(target: Path, slug: object) -> None:
    """Only an empty folder, or an earlier package of the same dataset, may be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    metadata = target / METADATA
    if not (metadata.is_file() and cmi.read_json(metadata).get("id") == slug):
        raise ValueError(f"{target} exists and is no earlier package of {slug}. Name a new folder.")
    known = {METADATA, "folds.csv", "ensemble", *(f"{m}_models" for m in cmi.MEMBERS)}
    strange = sorted(p.name for p in target.iterdir() if p.name not in known)
    if strange:
        raise ValueError(f"{target} holds {strange[0]}, which was not packed here. Move it away.")


def pack(out: Path, target: Path, metadata: dict[str, object]) -> int:
    """Write the dataset folder: absent, or as before, or complete. → bytes"""
    check_target(target, metadata["id"])
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    former = target.with_name(f".{target.name}.{os.getpid()}.former")
    try:
        for path in files_to_pack(out):
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(out / path, partial / path)
        files_to_pack(partial)  # the copy is whole too
        cmi.write_json(partial / METADATA, metadata)
        if target.exists():
            target.rename(former)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if former.exists() and not target.exists():
            former.rename(target)
        shutil.rmtree(former, ignore_errors=True)
    return sum(p.stat().st_size for p in target.rglob("*") if p.is_file())


def next_steps(slug: str, target: Path) -> list[tuple[str, str]]:
    """What to do with the folder, and the command or line that does it."""
    kernel = cmi.read_json(KERNEL) if KERNEL.is_file() else {"id": "/cmi-pipeline"}
    user, name = slug.split("/")[0], str(kernel["id"]).split("/")[-1]
    flags = f"-p {shlex.quote(str(target))} --dir-mode zip --keep-tabular"
    attached = {"dataset_sources": [slug], "machine_shape": MACHINE_SHAPE}
    return [
        ("Upload, first", f"kaggle datasets create {flags}"),
        ("or again", f"kaggle datasets version {flags} -m 'trained again'"),
        ("Attach", f"{json.dumps(attached)} in kernel-metadata.json: the dataset, and T4 x 2"),
        ("Push", "kaggle kernels push    # prints the VERSION; wait until it is complete"),
        (
            "Submit",
            f"kaggle competitions submit {cmi.COMPETITION} -k {user}/{name} -v VERSION "
            "-f submission.parquet -m 'CMI pipeline'",
        ),
    ]


def main(arguments: Sequence[str]) -> None:
    """Read the arguments, pack, say what comes next."""
    about = __doc__ or ""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="OUTPUT_PATH of a finished run")
    parser.add_argument("dataset", type=Path, help="the folder to be written")
    parser.add_argument("--slug", required=True, help="user/name of the dataset on Kaggle")
    parser.add_argument("--title", help="6 to 50 characters; made of the name if left out")
    asked = parser.parse_args(arguments)
    name = asked.slug.partition("/")[2]
    title = asked.title if asked.title is not None else name.replace("-", " ").capitalize()
    target = asked.dataset.absolute()
    try:
        metadata = checked_metadata(asked.slug, title)
        if not asked.output.is_dir():
            raise ValueError(
                f"{asked.output} does not exist. Name the OUTPUT_PATH of a finished run."
            )
        with cmi.only_run(asked.output):
            size = pack(asked.output.absolute(), target, metadata)
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"make_kaggle_dataset: {error}")
    sys.stdout.write(f"Packed {size / 2**20:.1f} MB in {target}: {asked.slug}, {title!r}.\n")
    sys.stdout.writelines(f"{what:<15} {line}\n" for what, line in next_steps(asked.slug, target))


if __name__ == "__main__":
    main(sys.argv[1:])
