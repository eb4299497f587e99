"""Sample a radiograph, then render it: the two public steps of the phantom.

    rng = np.random.default_rng(0)
    film = render(sample(rng, findings=["Effusion"]), size=224)

`sample` draws plain numbers, `render` turns them into pixels and masks without any further chance: the same parameters
give the same film at any size, but for the noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxr_fastai.errors import UsageError
from cxr_fastai.phantom import acquisition as beam
from cxr_fastai.phantom import skeleton
from cxr_fastai.phantom.acquisition import Acquisition, sample_acquisition
from cxr_fastai.phantom.anatomy import Thorax, soft_tissue
from cxr_fastai.phantom.canvas import Map, blur, smoothstep
from cxr_fastai.phantom.findings import FINDINGS, Effect, Finding, alter, apply, sample_finding
from cxr_fastai.phantom.patient import Patient, sample_patient, seen

GENERATOR_VERSION = "1.1"
DIFFICULTIES = {"easy": (0.62, 1.0), "medium": (0.30, 0.95), "hard": (0.03, 0.50)}  # severities drawn from
SIZES = (64, 1024)  # smallest and largest side in pixels


@dataclass(frozen=True)
class Parameters:
    """All that `render` needs: plain numbers in frozen dataclasses."""

    patient: Patient
    acquisition: Acquisition
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Phantom:
    """One radiograph with its truth.

    `pixels` is float32 (size, size) in [0, 1], bone white, air black. `masks` holds a bool (size, size) for each
    finding. `view` is 'PA' or 'AP', `age` in years, `sex` 'M' or 'F'.
    """

    pixels: Map
    masks: dict[str, NDArray[np.bool_]]
    view: str
    age: int
    sex: str


def severity_range(difficulty: float | str) -> tuple[float, float]:
    """Return the lowest and highest severity that a difficulty stands for.

    Raises
    ------
    UsageError
        If it is neither easy, medium nor hard, nor a number from 0 to 1.
    """
    if isinstance(difficulty, str):
        if difficulty not in DIFFICULTIES:
            raise UsageError(f"--difficulty {difficulty!r} is unknown: use one of {', '.join(DIFFICULTIES)}")
        return DIFFICULTIES[difficulty]
    if not 0.0 <= difficulty <= 1.0:
        raise UsageError(f"difficulty {difficulty} is out of range: use a number from 0 (gross) to 1 (barely visible)")
    return (1.0 - difficulty, 1.0 - difficulty)


def sample(
    rng: np.random.Generator,
    *,
    findings: Sequence[str] = (),
    difficulty: float | str = "medium",
    patient: Patient | None = None,
) -> Parameters:
    """Draw the parameters of one film.

    Parameters
    ----------
    rng
        Source of all randomness.
    findings
        Names out of `FINDINGS`, each at most once; empty for a normal film.
    difficulty
        'easy', 'medium' or 'hard', or a number d in [0, 1] that fixes the severity at 1 - d.
    patient
        Someone seen before; None draws a new one.

    Returns
    -------
    film : Parameters
        Patient and exposure do not depend on the findings: the same rng state gives the same ones with and without.

    Raises
    ------
    UsageError
        If a finding or a difficulty is unknown.
    """
    unknown = [name for name in findings if name not in FINDINGS]
    if unknown:
        raise UsageError(f"unknown finding {unknown[0]!r}: use names out of {', '.join(FINDINGS)}")
    if len(set(findings)) < len(findings):
        raise UsageError(f"a finding is named twice in {', '.join(findings)}: name each once")
    low, high = severity_range(difficulty)
    who = patient or sample_patient(rng)
    exposure = sample_acquisition(rng, who)
    drawn = [sample_finding(rng, name, float(rng.uniform(low, high))) for name in findings]
    return Parameters(who, exposure, tuple(drawn))


def _within(thorax: Thorax, effects: list[Effect], lung: Map) -> Map:
    """Attenuation of the vessels, where there is lung around them, as the findings leave them."""
    drawn = skeleton.vessels(thorax) * smoothstep(lung, 0.5, 5.0 * thorax.patient.scale)
    for effect in effects:
        drawn = drawn * effect.vessels
    return drawn


def _log(attenuation: Map, thorax: Thorax, use: Acquisition, fold: int) -> Map:
    """Noise-free log signal on a grid `fold` times coarser than the maps given."""
    body = thorax.body[::fold, ::fold]
    return -np.log(beam.expose(attenuation, body, thorax.frame.pixel * fold, use, thorax.patient))


def render(parameters: Parameters, size: int = 224) -> Phantom:
    """Render a film.

    Parameters
    ----------
    parameters
        From `sample`.
    size
        Side of the square film in pixels, 64 to 1024.

    Returns
    -------
    Phantom
        Pixels, masks, view, age and sex.

    Raises
    ------
    UsageError
        If the size is out of range.
    """
    if not SIZES[0] <= size <= SIZES[1]:
        raise UsageError(f"size {size} is out of range: use {SIZES[0]} to {SIZES[1]} pixels")
    use = parameters.acquisition
    plain = seen(parameters.patient, use.view, use.inspiration)
    patient = plain
    for finding in parameters.findings:
        patient = alter(patient, finding)
    frame = beam.frame_of(plain, use, size)
    thorax = soft_tissue(patient, frame)
    effects = [apply(thorax, finding) for finding in parameters.findings]
    drawn = skeleton.ribs(thorax) + skeleton.spine(thorax) + skeleton.shoulders(thorax) + skeleton.airways(thorax)
    drawn = drawn + beam.devices(thorax, use) + _within(thorax, effects, thorax.lung)
    total = thorax.attenuation + drawn
    for effect in effects:
        total = total + effect.change
    rng = np.random.default_rng(use.seed)
    fluence = beam.expose(total, thorax.body, frame.pixel, use, patient)
    fluence = blur(
        beam.grain(fluence, frame.pixel, use, rng),
        min(0.75, use.unsharp_cm / frame.pixel) if size <= 320 else use.unsharp_cm / frame.pixel,
    )
    signal = -np.log(fluence)
    fold = max(1, size // 56)
    coarse = reference = _log(total[::fold, ::fold], thorax, use, fold)
    if effects:
        normal = thorax.attenuation if patient is plain else soft_tissue(plain, frame.at(-(-size // fold))).attenuation
        if patient is plain:
            normal = normal[::fold, ::fold]
        reference = _log(normal + drawn[::fold, ::fold], thorax, use, fold)
        signal = beam.equalise(signal, coarse, reference)
    inside = reference[thorax.body[::fold, ::fold] > 0.5 * patient.depth]
    low, high = np.quantile(inside, (0.10, 0.90))
    pixels = beam.finish(beam.tone(signal, (float(low), float(high)), frame.pixel, use), use, rng)
    masks = {finding.name: effect.mask for finding, effect in zip(parameters.findings, effects, strict=True)}
    return Phantom(pixels, masks, use.view, parameters.patient.age, parameters.patient.sex)
