"""Write a folder of phantoms: images, labels.csv, masks, dataset.json, with planted defects on request.

    from cxr_fastai.config import GenerateConfig
    from cxr_fastai.phantom import generate
    table = generate(GenerateConfig(out="data/synthetic", n=750, seed=0))

Everything about an image is decided before any is drawn, and each image has a generator of its own, so the bytes do
not depend on the number of worker processes. The folder is built beside its place and renamed into it when it is
whole.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from cxr_fastai.config import GenerateConfig, parse_plant
from cxr_fastai.phantom.film import GENERATOR_VERSION
from cxr_fastai.phantom.findings import FINDINGS
from cxr_fastai.phantom.patient import Patient, sample_patient
from cxr_fastai.phantom.writer import NAME, Job, check_target, open_folder, put_in_place, run

FORMATS = {"png": ".png", "jpeg": ".jpg"}
NORMAL = "No Finding"
COLUMNS = ["path", "label", "patient_id", "findings", "view", "age", "sex", "seed"]


def _labels(config: GenerateConfig, rng: np.random.Generator) -> list[tuple[str, ...]]:
    """Draw the findings of each film, in shuffled order, with the class sizes that the task promises."""
    n = config.n
    if config.task == "multiclass":
        names: list[tuple[str, ...]] = [(), *((name,) for name in FINDINGS)]
        rows = [names[index % len(names)] for index in range(n)]
    else:
        normal = math.ceil(0.4 * n) if config.task == "multilabel" else n - n // 2
        odds = (0.45, 0.35, 0.20) if config.task == "multilabel" else (0.75, 0.20, 0.05)
        rows = [()] * normal
        for index in range(n - normal):
            first = FINDINGS[index % len(FINDINGS)]
            others = [name for name in FINDINGS if name != first]
            more = rng.choice(others, int(rng.choice(3, p=odds)), replace=False)
            rows.append(tuple(sorted((first, *(str(name) for name in more)))))
    return [rows[index] for index in rng.permutation(n)]


def _people(config: GenerateConfig, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Patient number and follow-up of each film: one to three films a patient."""
    more = (config.images_per_patient - 1) / 2
    rows: list[tuple[int, int]] = []
    patient = 0
    while len(rows) < config.n:
        patient += 1
        follow = int(rng.integers(0, 6))
        rows += [(patient, follow + film) for film in range(1 + int(rng.binomial(2, more)))]
    return rows[: config.n]


def _label(task: str, findings: tuple[str, ...]) -> str:
    """Label column of a film with these findings."""
    if task == "binary":
        return "abnormal" if findings else "normal"
    if task == "multiclass":
        return findings[0] if findings else "normal"
    return "|".join(findings) or NORMAL


def _path(config: GenerateConfig, label: str, stem: str, suffix: str) -> str:
    folder = "films" if config.task == "multilabel" else label
    return f"images/{folder}/{stem}{suffix}"


def _plan(config: GenerateConfig, folder: Path) -> list[Job]:
    """Decide every film of a dataset without its defects."""
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(1,)))
    jobs: list[Job] = []
    people: dict[int, Patient] = {}
    for index, (findings, (number, follow)) in enumerate(zip(_labels(config, rng), _people(config, rng), strict=True)):
        if number not in people:
            people[number] = sample_patient(
                np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(2, number)))
            )
        state = np.random.SeedSequence([config.seed, index]).generate_state(1, np.uint64)
        label = _label(config.task, findings)
        jobs.append(
            Job(
                folder=str(folder),
                path=_path(config, label, f"{number:08d}_{follow:03d}", FORMATS[config.format]),
                label=label,
                patient_id=f"{number:08d}",
                findings=findings,
                patient=people[number],
                seed=int(state[0] >> np.uint64(1)),
                size=config.size,
                difficulty=config.difficulty,
            )
        )
    return jobs


def _chosen(rng: np.random.Generator, n: int, fraction: float) -> list[int]:
    return sorted(int(index) for index in rng.permutation(n)[: max(1, round(fraction * n))])


def _plant_mislabel(config: GenerateConfig, jobs: list[Job], fraction: float, rng: np.random.Generator) -> None:
    """Flip labels (and folders) of a fraction of the films in place; the findings stay true."""
    names = {"binary": ("normal", "abnormal"), "multiclass": ("normal", *FINDINGS), "multilabel": (NORMAL, *FINDINGS)}
    for index in _chosen(rng, len(jobs), fraction):
        job = jobs[index]
        wrong = str(rng.choice([name for name in names[config.task] if name != job.label]))
        jobs[index] = replace(job, label=wrong, path=_path(config, wrong, job.stem, Path(job.path).suffix))


def _plant(config: GenerateConfig, jobs: list[Job]) -> tuple[list[Job], list[dict[str, object]]]:
    """Plant the defects asked for: the jobs with them, and a record of what concerns which files."""
    record: list[dict[str, object]] = []
    plants = {kind: (amount, what) for kind, amount, what in map(parse_plant, config.plant)}
    for number, kind in enumerate(("mislabel", "shortcut", "leak")):
        if kind not in plants:
            continue
        amount, what = plants[kind]
        rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(3, number)))
        before = list(jobs)
        if kind == "mislabel":
            _plant_mislabel(config, jobs, amount, rng)
            paths: list[object] = [new.path for old, new in zip(before, jobs, strict=True) if new.label != old.label]
        elif kind == "shortcut":
            jobs = [_with_shortcut(config, job, what, amount, rng) for job in jobs]
            paths = [job.path for job in jobs if job.shortcut]
        else:
            start = max(int(job.patient_id) for job in jobs)
            copies = [
                _copy(config, jobs[index], start + 1 + count, int(rng.integers(2**31)))
                for count, index in enumerate(_chosen(rng, len(jobs), amount))
            ]
            originals = {(job.seed, job.findings): job.path for job in jobs}
            paths = [[originals[(job.seed, job.findings)], job.path] for job in copies]
            jobs = jobs + copies
        entry: dict[str, object] = {"kind": kind, "amount": amount, "paths": paths}
        record.append(entry | ({"what": what} if what else {}))
    return jobs, record


def _with_shortcut(config: GenerateConfig, job: Job, what: str, strength: float, rng: np.random.Generator) -> Job:
    """Give the shortcut to a film: with probability S where its label is abnormal, 1 - S where it is normal."""
    normal = job.label in ("normal", NORMAL)
    carries = bool(rng.random() < (1 - strength if normal else strength))
    if not carries:
        return job
    path = job.path
    if what == "format":
        path = str(Path(path).with_suffix(".jpg" if config.format == "png" else ".png").as_posix())
    return replace(job, path=path, shortcut=what)


def _copy(config: GenerateConfig, job: Job, number: int, seed: int) -> Job:
    stem = f"{number:08d}_{0:03d}"
    path = _path(config, job.label, stem, Path(job.path).suffix)
    return replace(job, path=path, patient_id=f"{number:08d}", copy_seed=seed)


def generate(config: GenerateConfig, progress: Callable[[int, int], None] | None = None) -> pd.DataFrame:
    """Write a dataset of phantoms.

    Parameters
    ----------
    config
        What to write and where.
    progress
        Called after each film with the number done and the number of all.

    Returns
    -------
    DataFrame
        The table written as labels.csv: path, label, patient_id, findings, view, age, sex, seed.

    Raises
    ------
    DataError
        If `out` holds something that is not a generated dataset. It is left as it is.
    """
    out = Path(config.out).resolve()
    check_target(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    built = open_folder(out)
    try:
        jobs, planted = _plant(config, _plan(config, built))
        table = _fill(config, built, jobs, planted, progress)
        put_in_place(built, out)
    finally:
        shutil.rmtree(built, ignore_errors=True)
    return table


def _fill(
    config: GenerateConfig,
    built: Path,
    jobs: list[Job],
    planted: list[dict[str, object]],
    progress: Callable[[int, int], None] | None,
) -> pd.DataFrame:
    """Write films, masks, labels.csv and dataset.json into a folder."""
    (built / "masks").mkdir()
    for folder in sorted({Path(job.path).parent for job in jobs}):
        (built / folder).mkdir(parents=True, exist_ok=True)
    rows = []
    # Closed by name: an interrupt must stop the workers before the folder that they write to is removed.
    with closing(run(jobs, config.workers or os.cpu_count() or 1)) as written:
        for job, (view, age, sex) in zip(jobs, written, strict=True):
            findings = "|".join(job.findings) or NORMAL
            rows.append((job.path, job.label, job.patient_id, findings, view, age, sex, job.seed))
            if progress:
                progress(len(rows), len(jobs))
    table = pd.DataFrame(rows, columns=COLUMNS)
    text = table.to_csv(index=False, lineterminator="\n").encode()
    (built / "labels.csv").write_bytes(text)
    asked = {key: value for key, value in asdict(config).items() if key not in ("out", "workers")}
    about = {
        "generator": NAME,
        "version": GENERATOR_VERSION,
        "config": asked,
        "planted": planted,
        "labels_sha256": hashlib.sha256(text).hexdigest(),
    }
    (built / "dataset.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return table
