"""Who is radiographed: a frozen `Patient` of plain numbers, drawn by `sample_patient`, altered by the view in `seen`.

Horizontal positions are given in half-widths of the thorax (u), vertical ones in half-heights of the lungs (v, -1 the
apex, +1 the costophrenic angle), so that one set of curves serves a child and an adult.
"""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Patient:
    """One person, as plain numbers: lengths in cm, angles in degrees, the rest relative to a usual value of 1 or 0."""

    age: int
    sex: str
    half_width: float
    half_height: float
    depth: float
    wall: float
    wall_depth: float
    heart: float
    heart_tilt: float
    heart_shift: float
    aorta: float
    mediastinum: float
    thymus: float
    dome_right: float
    dome_left: float
    dome_bulge: float
    taper: float
    rib_drop: float
    rib_bucket: float
    rib_width: float
    bone: float
    shoulder: float
    clavicle_rise: float
    arm_angle: float
    scapula: float
    breast: float
    breast_v: float
    stomach: float
    stomach_u: float
    scoliosis: float
    lung_density: float
    vessels: float
    head: float
    seed: int

    @property
    def child(self) -> bool:
        """Whether the body has a child's proportions."""
        return self.age < 13

    @property
    def scale(self) -> float:
        """Size relative to a usual adult."""
        return self.half_width / 14.0


def _body_size(rng: np.random.Generator, age: int, sex: str) -> tuple[float, float, float]:
    """Half-width and half-height of the lungs and half-depth of the thorax, in cm, for an age in years."""
    # Thoracic diameters grow about linearly to the age of 16, from half an adult's size in the first year.
    growth = min(1.0, 0.48 + 0.52 * age / 16.0)
    adult = 14.4 if sex == "M" else 13.2
    width = adult * growth * float(rng.normal(1.0, 0.05))
    ratio = float(rng.normal(0.97, 0.07)) if age < 13 else float(rng.normal(0.98, 0.08))
    roundness = 0.66 + 0.1 * (1 - growth) / 0.52
    return width, width * float(np.clip(ratio, 0.78, 1.16)), width * roundness * float(rng.normal(1.0, 0.06))


def sample_patient(rng: np.random.Generator, *, child: bool | None = None) -> Patient:
    """Draw a patient.

    Parameters
    ----------
    rng
        Source of randomness.
    child
        True for an age of 1-12 years, False for 18-90, None for one child in four patients.

    Returns
    -------
    Patient
        Parameters that depend on age and sex, never on what will be found.
    """
    is_child = bool(rng.random() < 0.25) if child is None else child
    age = int(rng.integers(1, 13)) if is_child else int(np.clip(rng.normal(50, 17), 18, 90))
    sex = "F" if rng.random() < 0.47 else "M"
    width, height, depth = _body_size(rng, age, sex)
    obesity = float(np.clip(rng.gamma(2.0, 0.42), 0.05, 3.0)) * (0.45 if is_child else 1.0)
    right = float(rng.normal(0.60, 0.07))
    return Patient(
        age=age,
        sex=sex,
        half_width=width,
        half_height=height,
        depth=depth,
        wall=(1.6 + 1.6 * obesity) * width / 14.0,
        wall_depth=(1.7 + 1.1 * obesity) * width / 14.0,
        heart=float(rng.normal(1.10 if is_child else 0.98 + 0.0015 * (age - 50), 0.055)),
        heart_tilt=float(rng.normal(36 - 4 * (obesity - 0.7), 5)),
        heart_shift=float(rng.normal(0, 0.025)),
        aorta=float(rng.normal(0.75 if is_child else 0.9 + 0.005 * (age - 40), 0.09)),
        mediastinum=float(rng.normal(1.15 if is_child else 1.0, 0.09)),
        thymus=float(rng.uniform(0, 1)) if age < 4 else 0.0,
        dome_right=right,
        dome_left=right + float(rng.normal(0.09, 0.04)),
        dome_bulge=float(rng.normal(1.0, 0.12)),
        taper=float(rng.normal(1.12 if is_child else 1.2, 0.17)),
        rib_drop=float(rng.normal(0.80 if is_child else 1.0, 0.10)),
        rib_bucket=float(rng.normal(1.0, 0.25)),
        rib_width=float(rng.normal(1.08 if is_child else 0.92, 0.08)),
        # Children are exposed at 60-70 kV, where bone stands out more: 1.6 times by the coefficients at 40 against 60
        # keV (Hubbell & Seltzer); 2.1 is what matches real films by eye.
        bone=float(np.clip(rng.normal(1.0 - 0.004 * max(0, age - 50), 0.12), 0.6, 1.35)) * (2.1 if is_child else 1.0),
        shoulder=float(rng.normal(0.0, 0.05)),
        clavicle_rise=float(rng.normal(0.09, 0.07)),
        arm_angle=float(rng.normal(11, 7)),
        scapula=float(rng.normal(0.0, 0.05)),
        breast=(float(np.clip(rng.normal(2.6 + obesity, 1.1), 0.5, 6.0)) if sex == "F" and age > 13 else 0.0),
        breast_v=float(rng.normal(0.62, 0.12)),
        stomach=float(np.clip(rng.normal(0.35, 0.45), 0.0, 1.4)),
        stomach_u=float(rng.normal(0.42, 0.08)),
        scoliosis=float(rng.normal(0, 0.035)),
        lung_density=float(rng.normal(1.0, 0.10)),
        vessels=float(rng.normal(1.2 if is_child else 1.0, 0.12)),
        head=float(rng.uniform(1.22, 2.0)) if is_child else float(rng.uniform(1.7, 3.0)),
        seed=int(rng.integers(2**31)),
    )


def seen(patient: Patient, view: str, inspiration: float) -> Patient:
    """Return the patient as a view shows them: a bedside AP film magnifies the heart and catches a shallower breath."""
    if view == "AP":
        patient = replace(
            patient,
            heart=patient.heart * 1.10,
            mediastinum=patient.mediastinum * 1.10,
            arm_angle=patient.arm_angle * 0.7,
            scapula=patient.scapula - 0.12,
            clavicle_rise=patient.clavicle_rise + 0.05,
        )
    return replace(
        patient,
        half_height=patient.half_height * inspiration,
        dome_right=patient.dome_right - (1 - inspiration) * 0.6,
        dome_left=patient.dome_left - (1 - inspiration) * 0.6,
    )
