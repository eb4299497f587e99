"""The patient without bones: body, lungs, mediastinum, heart, diaphragm, breasts and gas as path lengths in cm.

Horizontal positions are given in half-widths of the thorax (u), vertical ones in half-heights of the lungs (v, -1 the
apex, +1 the costophrenic angle), so that one set of curves serves a child and an adult. Sides: -1 is the image's left
(the patient's right), +1 the image's right.

Attenuation coefficients are those of Hubbell & Seltzer (NISTIR 5632, 2004, ICRU-44 tissues) at 60 keV, about the mean
energy that leaves the tube at 110-125 kVp: soft tissue 0.2048 cm²/g at 1.06 g/cm³, cortical bone 0.3148 cm²/g at 1.92
g/cm³, lung 0.2053 cm²/g at a density of about 0.26 g/cm³ when inflated.
"""

from dataclasses import dataclass

import numpy as np

from cxr_fastai.phantom.canvas import (
    Frame,
    Map,
    Points,
    bins,
    curve,
    ellipsoid,
    noise,
    resize,
    segment_distance,
    smoothstep,
)
from cxr_fastai.phantom.patient import Patient

MU_SOFT = 0.217  # 1/cm
MU_LUNG = 0.053  # 1/cm
MU_BONE = 0.604  # 1/cm, cortical

# Outlines, in half-widths (u) against half-heights (v), read off normal frontal films.
_CAVITY_V = (-1.04, -1.0, -0.96, -0.9, -0.8, -0.6, -0.3, 0.0, 0.4, 0.8, 1.0, 1.3, 3.0)
_CAVITY_U = (0.27, 0.37, 0.47, 0.58, 0.68, 0.80, 0.91, 0.965, 1.0, 1.0, 0.985, 0.93, 0.8)
_MEDIAL_V = (-1.04, -1.0, -0.96, -0.9, -0.8, -0.5, -0.1, 0.1, 3.0)
_MEDIAL_U = (0.34, 0.32, 0.24, 0.185, 0.15, 0.135, 0.115, 0.09, 0.085)
_TRUNK_V = (-3.0, -1.4, -1.15, -0.95, -0.75, -0.45, -0.1, 0.4, 1.0, 1.5, 3.0)
_TRUNK_U = (0.6, 0.85, 1.15, 1.32, 1.30, 1.14, 1.04, 1.0, 1.0, 0.98, 0.95)
_SKIN_U = (-3.0, -1.75, -1.6, -1.5, -1.32, -1.1, -0.85, -0.6, -0.45, -0.36, -0.31, 0.0)
_SKIN_V = (0.5, -0.45, -0.82, -0.99, -1.12, -1.20, -1.27, -1.34, -1.43, -1.6, -2.6, -3.0)
_DEPTH_V = (-3.0, -1.3, -1.0, -0.6, 0.0, 0.6, 1.0, 3.0)
_DEPTH = (0.55, 0.60, 0.66, 0.80, 0.95, 1.0, 1.02, 1.0)
_CAVITY_DEPTH = (0.2, 0.25, 0.42, 0.72, 0.95, 1.0, 0.95, 0.6)


def spine_x(patient: Patient, v: Points) -> Points:
    """Lateral position of the spine in cm at heights `v`."""
    return np.sin(v * np.float32(1.9)) * np.float32(patient.scoliosis * patient.half_width)


def dome_curves(patient: Patient) -> Map:
    """Height v of the diaphragm over signed u, both sides in one curve."""
    sides = []
    for top in (patient.dome_right, patient.dome_left):
        lateral = np.linspace(0.46, 0.99, 14)
        t = (lateral - 0.46) / 0.53
        fall = (1.0 - np.sqrt(np.maximum(1 - t**1.9, 0))) * (1.0 - top) * 1.05
        medial = np.array([0.0, 0.1, 0.2, 0.3, 0.38])
        sides.append(
            (
                np.concatenate([medial, lateral, [3.0]]),
                np.concatenate(
                    [
                        top + np.array([0.10, 0.085, 0.055, 0.022, 0.006]) * patient.dome_bulge,
                        top + fall * (0.9 + 0.1 * patient.dome_bulge),
                        [1.3],
                    ]
                ),
            )
        )
    knots = np.concatenate([-sides[0][0][::-1], sides[1][0] + 1e-6])
    return curve(knots.tolist(), np.concatenate([sides[0][1][::-1], sides[1][1]]).tolist(), smooth=0.03)


@dataclass(frozen=True)
class Thorax:
    """Maps that findings and bones need: coordinates and the lungs' extent.

    `u`, `v` are relative coordinates; `cavity` is the lung's path length in cm before the heart takes its share;
    `lung` after it; `edge` the distance in cm to the lateral wall (positive inside); `above` is 1 above the diaphragm,
    0 below; `heart` is the path length through heart and great vessels in cm; `body` that through the whole body.
    """

    patient: Patient
    frame: Frame
    x: Map
    y: Map
    u: Map
    v: Map
    body: Map
    cavity: Map
    lung: Map
    heart: Map
    edge: Map
    above: Map
    dome: Map
    gas: Map

    @property
    def attenuation(self) -> Map:
        """Line integral of attenuation without bones and vessels, dimensionless."""
        lung = np.float32(MU_SOFT - MU_LUNG * self.patient.lung_density)
        return np.float32(MU_SOFT) * np.maximum(self.body - self.gas, 0.0) - lung * self.lung


CAVITY = curve(_CAVITY_V, _CAVITY_U, 0.04)
_MEDIAL = curve(_MEDIAL_V, _MEDIAL_U, 0.05)
_TRUNK = curve(_TRUNK_V, _TRUNK_U, 0.25)
_SKIN = curve((*_SKIN_U[:-1], 0.0, *[-u for u in _SKIN_U[-2::-1]]), (*_SKIN_V, *_SKIN_V[-2::-1]), 0.12)
_DEPTH_TABLE = curve(_DEPTH_V, _DEPTH, 0.3)
_CAVITY_DEPTH_TABLE = curve(_DEPTH_V, _CAVITY_DEPTH, 0.2)


def cavity_half_width(patient: Patient, v: Points) -> Points:
    """Half-width of the thoracic cavity in cm at heights `v`."""
    return np.interp(v, _CAVITY_V, _CAVITY_U) ** patient.taper * patient.half_width


def heart_path(patient: Patient, x: Map, y: Map) -> Map:
    """Path length in cm through heart, aorta and pulmonary trunk: ellipsoids whose union has the usual arcs."""
    w, h, size = patient.half_width, patient.half_height, patient.heart
    shift = patient.heart_shift * w
    low = 0.5 * (patient.dome_right + patient.dome_left) - 0.60
    depth = 0.55 * patient.depth

    def at(u: float, v: float) -> tuple[float, float]:
        return (u * w + shift, v * h)

    parts = [
        ellipsoid(x, y, at(0.17 * size, 0.40 + low), (0.50 * w * size, 0.35 * w * size, depth), patient.heart_tilt),
        ellipsoid(x, y, at(-0.05, 0.37 + low), (0.235 * w * size, 0.46 * w * size, 0.85 * depth)),
        ellipsoid(x, y, at(0.165, 0.06 + low), (0.38 * w * size, 0.155 * w * size, 0.8 * depth), 68),
        ellipsoid(x, y, at(0.105, -0.43), (0.135 * w * patient.aorta, 0.14 * w * patient.aorta, 0.5 * depth)),
        ellipsoid(x, y, at(-0.06, -0.25), (0.155 * w * patient.mediastinum, 0.42 * h, 0.45 * depth)),
    ]
    if patient.thymus > 0:
        parts.append(ellipsoid(x, y, at(0.0, -0.38), (0.30 * w * patient.thymus, 0.36 * h, 0.45 * depth), 8))
    total = np.zeros_like(x)
    for part in parts:
        total = total + part * part
    return np.sqrt(total)


def _aorta(patient: Patient, x: Map, v: Map) -> Map:
    """Path length through the descending aorta, in cm: a tube beside the spine."""
    radius = 0.095 * patient.half_width * patient.aorta
    off = (x - np.float32(0.105 * patient.half_width)) * np.float32(1 / radius)
    inside = np.sqrt(np.maximum(1.0 - off * off, 0.0))
    return inside * np.float32(1.1 * radius) * smoothstep(v, -0.45, -0.3) * smoothstep(v, 1.6, 0.9)


def _body(patient: Patient, x: Map, y: Map, u: Map, v: Map) -> Map:
    """Path length through trunk, shoulders, neck, arms, head and breasts, in cm."""
    w, h = patient.half_width, patient.half_height
    index = bins(v)
    outer = (_TRUNK * np.float32(w) + np.float32(patient.wall))[index]
    deep = (_DEPTH_TABLE * np.float32(patient.depth + patient.wall_depth))[index]
    across = np.abs(x) / outer
    trunk = 2.0 * deep * np.sqrt(np.maximum(1.0 - across**2 * across**0.5, 0.0))
    skin = (_SKIN + np.float32(patient.shoulder))[bins(u)]
    rise = np.clip((v - skin) * np.float32(h / (0.42 * w)), 0.0, 1.0)
    trunk = trunk * np.sqrt(rise)
    neck_radius = 0.36 * w * (1.08 if patient.child else 1.0)
    neck = 2.0 * np.sqrt(np.maximum(neck_radius**2 - x * x, 0.0)) * np.float32(0.9)
    body = np.maximum(trunk, neck * smoothstep(v, -0.7, -1.1))
    swing = np.tan(np.radians(max(3.0, patient.arm_angle)))
    radius = 0.34 * w + 0.35 * patient.wall
    for side in (-1, 1):
        start = (side * (1.30 * w + 0.5 * patient.wall), -0.80 * h)
        end = (start[0] + side * swing * 3 * w, start[1] + 3 * w)
        arm = np.maximum(radius**2 - segment_distance(x, y, start, end), 0.0)
        # Flesh overlaps where arm and trunk meet, so that they run into each other without an edge.
        body = np.sqrt(body * body + 3.6 * arm)
    skull = ellipsoid(x, y, (0.03 * w, -(patient.head + 0.62) * h), (0.62 * w, 0.62 * h, 0.55 * w))
    body = np.maximum(body, skull * 1.25)
    if patient.breast > 0:
        lean = 0.42 * w + 0.05 * w * patient.breast
        for side in (-1, 1):
            shape = ellipsoid(
                x, y, (side * 0.58 * w, (patient.breast_v - 0.12) * h), (lean, 0.46 * w, patient.breast / 2)
            )
            body = body + shape * smoothstep(v, patient.breast_v - 0.75, patient.breast_v + 0.1) * (across < 1)
    return body


def _gas(patient: Patient, x: Map, y: Map, u: Map, v: Map, dome: Map) -> Map:
    """Path length in cm through the gas under the left dome: the stomach's bubble and loops of bowel."""
    w, h = patient.half_width, patient.half_height
    rng = np.random.default_rng(patient.seed)
    below = smoothstep((v - dome) * np.float32(h), 0.5 * patient.scale, 1.0 * patient.scale)
    top = patient.dome_left * h + (0.9 + 0.17 * w * patient.stomach) * patient.scale
    size = patient.stomach
    axes = (0.27 * w * size + 0.1, 0.16 * w * size + 0.1, 1.9 * size * patient.scale)
    total = ellipsoid(x, y, (patient.stomach_u * w, top), axes, float(rng.normal(5, 10)))
    # Upright, what the stomach holds lies below a level line.
    total = total * smoothstep(
        y - np.float32(top), float(rng.uniform(0.05, 0.22)) * w, float(rng.uniform(-0.05, 0.04)) * w
    )
    for _ in range(int(rng.integers(0, 6))):
        centre = (float(rng.uniform(-0.2, 0.95)) * w, float(rng.uniform(1.0, 1.7)) * h)
        axes = (float(rng.uniform(0.08, 0.22)) * w, float(rng.uniform(0.05, 0.13)) * w, float(rng.uniform(0.1, 0.9)))
        total = np.maximum(total, ellipsoid(x, y, centre, axes, float(rng.uniform(-60, 60))))
    return total * below


def _coordinates(patient: Patient, frame: Frame) -> tuple[Map, Map, Map, Map]:
    """X and y in cm from the spine's midline, and u and v."""
    x, y = frame.grid
    v = y * np.float32(1 / patient.half_height)
    x = x - spine_x(patient, v)
    return x, y, x * np.float32(1 / patient.half_width), v


def soft_tissue(patient: Patient, frame: Frame) -> Thorax:
    """Compute the maps of one patient, without bones and vessels.

    Parameters
    ----------
    patient
        As `seen` by the view.
    frame
        Field of view and size.

    Returns
    -------
    Thorax
        Float32 maps (size, size), path lengths in cm.
    """
    w, h = patient.half_width, patient.half_height
    x, y, u, v = _coordinates(patient, frame)
    index = bins(v)
    wide = (CAVITY**patient.taper * np.float32(w))[index]
    away = np.abs(x)
    ratio = away / wide
    chord = np.sqrt(np.maximum(1.0 - ratio * ratio * np.sqrt(ratio), 0.0))
    cavity = chord * (_CAVITY_DEPTH_TABLE * np.float32(2 * 0.92 * patient.depth))[index]
    curves = dome_curves(patient)
    medial = (_MEDIAL * np.float32(w * patient.mediastinum))[index]
    soft_edge = np.float32(0.085 * w) * (1.0 + 1.1 * smoothstep(v, -0.25, 0.3))
    # Lung meets in front of the mediastinum and behind the heart, so that its shadow is never wholly without air.
    dome = curves[bins(u)]
    floor = (0.13 + 0.17 * smoothstep(v, -0.3, 0.4)) * smoothstep(dome - v, 0.0, 0.4)
    apex = smoothstep(v, -1.05, -0.985)
    cavity = cavity * apex * (floor + (1.0 - floor) * smoothstep((away - medial) / soft_edge, -0.9, 1.1))
    under = (v - dome) * np.float32(h)
    above = smoothstep(under, 0.022 * w, -0.012 * w)
    recess = 0.24 * np.clip(1.0 - under * np.float32(1 / (0.6 * w)), 0.0, 1.0) * smoothstep(away, 0.2 * w, 0.4 * w)
    cavity = cavity * (above + (1.0 - above) * recess)
    heart = heart_path(patient, x, y)
    # Its wall turns away gently and it beats: the border is a ramp rather than the step of a ball's.
    heart = heart * heart / (heart + np.float32(0.22 * patient.depth))
    heart = heart * smoothstep(under, 0.35 * w, 0.0) + _aorta(patient, x, v) * 0.6
    # Body and gas are smooth: half the pixels do.
    half_frame = frame.at((frame.size + 1) // 2)
    half = _coordinates(patient, half_frame)
    flesh = np.random.default_rng(patient.seed + 5)
    lumps = noise(flesh, half_frame, 5.0 * patient.scale) + 0.6 * noise(flesh, half_frame, 1.6 * patient.scale)
    body = resize(_body(patient, *half) * (1.0 + np.float32(0.012) * lumps), frame.size)
    gas = resize(_gas(patient, *half, curves[bins(half[2])]), frame.size)
    return Thorax(
        patient=patient,
        frame=frame,
        x=x,
        y=y,
        u=u,
        v=v,
        body=body,
        cavity=cavity,
        lung=np.maximum(cavity - heart * 1.15, 0.0),
        heart=heart,
        edge=wide - away,
        above=above,
        dome=dome,
        gas=gas,
    )
