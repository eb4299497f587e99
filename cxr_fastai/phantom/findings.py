"""The eight findings: what each changes in the patient and in the attenuation, and where.

A finding acts in two steps. `alter` changes the patient (a larger heart, a risen diaphragm); `apply` returns its
change of the line integral of attenuation and its mask. Severity runs from 0, barely visible, to 1, gross. Names are
those of NIH ChestX-ray14 (Wang et al., CVPR 2017).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cxr_fastai.phantom.anatomy import MU_LUNG, MU_SOFT, Thorax
from cxr_fastai.phantom.canvas import Layer, Map, blur, noise, smoothstep
from cxr_fastai.phantom.patient import Patient

FINDINGS = ("Consolidation", "Effusion", "Pneumothorax", "Nodule", "Mass", "Cardiomegaly", "Edema", "Atelectasis")

_FILL = MU_SOFT - MU_LUNG  # what a centimetre of lung gains when fluid or tissue takes the air's place, 1/cm
_FOCAL = ("Consolidation", "Nodule", "Mass")
_PATCHY, _INTERSTITIAL = 0.5, 0.85  # forms of a consolidation from which on it is patchy, and mostly interstitial


@dataclass(frozen=True)
class Finding:
    """One finding as plain numbers.

    `side` is -1 (image's left), +1 (right) or 0 (both). `u` (0 midline to 1 chest wall) and `v` (-1 apex to +1
    costophrenic angle) place its centre. `form` in [0, 1) chooses among its shapes; `seed` fixes its texture.
    """

    name: str
    severity: float
    side: int
    u: float
    v: float
    form: float
    seed: int


@dataclass(frozen=True)
class Effect:
    """What a finding does to the film.

    `change` is added to the line integral (float32, dimensionless). `mask` is true where the finding is. `vessels`
    multiplies the vessels' attenuation (a map or 1).
    """

    change: Map
    mask: NDArray[np.bool_]
    vessels: Map | float = 1.0


def sample_finding(rng: np.random.Generator, name: str, severity: float) -> Finding:
    """Draw a finding of a given name and severity: side, place and shape."""
    side = -1 if rng.random() < 0.5 else 1
    if name in ("Edema", "Cardiomegaly") or (name == "Effusion" and rng.random() < 0.2):
        side = 0
    v = float(rng.uniform(-0.62, 0.45)) if name in _FOCAL else float(rng.uniform(0.25, 0.6))
    # The heart would hide what lies behind it.
    inner = 0.62 if side > 0 and v > -0.1 else 0.40
    u, form, seed = float(rng.uniform(inner, 0.80)), float(rng.random()), int(rng.integers(2**31))
    if name == "Consolidation" and form >= _PATCHY and rng.random() < 0.55:
        side = 0
    return Finding(name=name, severity=severity, side=side, u=u, v=v, form=form, seed=seed)


def alter(patient: Patient, finding: Finding) -> Patient:
    """Return the patient with the finding's change of anatomy, if it has one."""
    if finding.name == "Cardiomegaly":
        return replace(patient, heart=patient.heart * (1.14 + 0.38 * finding.severity))
    if finding.name == "Atelectasis" and finding.form >= 0.45:
        lift = 0.05 + 0.20 * finding.severity
        pull = finding.side * (0.01 + 0.07 * finding.severity)
        if finding.side < 0:
            return replace(patient, dome_right=patient.dome_right - lift, heart_shift=patient.heart_shift + pull)
        return replace(patient, dome_left=patient.dome_left - lift, heart_shift=patient.heart_shift + pull)
    return patient


def _half(thorax: Thorax, side: int) -> Map:
    """1 on the lung of a side, 0 on the other; 1 everywhere for both."""
    return (thorax.x * side > 0).astype(np.float32) if side else np.ones_like(thorax.x)


def _polar(thorax: Thorax, finding: Finding, aspect: float = 1.0) -> tuple[Map, Map]:
    """Distance in cm from the finding's centre, and the angle around it."""
    w, h = thorax.patient.half_width, thorax.patient.half_height
    dx = thorax.x - np.float32((finding.side or 1) * finding.u * w)
    dy = (thorax.y - np.float32(finding.v * h)) * np.float32(aspect)
    return np.sqrt(dx * dx + dy * dy), np.arctan2(dy, dx)


def _consolidation(thorax: Thorax, finding: Finding) -> Effect:
    """Airspace opacity: denser towards its middle, with air bronchograms, cut off by a fissure or not; or patches."""
    if finding.form >= _PATCHY:
        return _bronchopneumonia(thorax, finding)
    rng = np.random.default_rng(finding.seed)
    frame, scale, s = thorax.frame, thorax.patient.scale, finding.severity
    distance, _ = _polar(thorax, finding, float(rng.uniform(0.75, 1.25)))
    radius = (2.3 + 4.2 * s) * scale
    field = noise(rng, frame, 2.6 * scale) + 0.6 * noise(rng, frame, 1.2 * scale)
    fine = noise(rng, frame, 0.6 * scale)
    core = smoothstep(distance / radius + 0.24 * field, 1.25, 0.25)
    if finding.form < 0.4:
        # A fissure bounds the lobe: the opacity ends along a straight, slightly oblique line.
        line = thorax.v + 0.12 * np.abs(thorax.u) - np.float32(finding.v + 0.06)
        core = core * smoothstep(line * (1.0 if finding.form < 0.2 else -1.0), 0.02, -0.02)
    texture = np.clip(0.85 + 0.15 * field + 0.12 * fine, 0.2, 1.3)
    bronchi = Layer(frame)
    hilum = np.array([(finding.side or 1) * 0.2 * thorax.patient.half_width, -0.05 * thorax.patient.half_height])
    away = (
        np.array([(finding.side or 1) * finding.u * thorax.patient.half_width, finding.v * thorax.patient.half_height])
        - hilum
    )
    steps = np.linspace(0.35, 1.25, 5)[None, :, None]
    bow = np.sin(np.pi * steps) * rng.normal(0, 0.5, (7, 1, 2)) * scale
    paths = hilum + steps * (away + rng.normal(0, 0.9, (7, 1, 2)) * scale) + bow
    bronchi.lines(paths, 0.26 * scale, 0.8)
    share = 0.22 + 0.45 * s
    opacity = core * texture * (1.0 - 0.38 * blur(bronchi.array(), 0.05 / frame.pixel))
    lung = np.minimum(thorax.lung, 11 * scale) * _half(thorax, finding.side)
    change = opacity * lung * np.float32(share * _FILL)
    return Effect(change, (core * lung > 0.35 * 4 * scale), 1.0 - 0.6 * core)


def _bronchopneumonia(thorax: Thorax, finding: Finding) -> Effect:
    """Three to seven soft patches in one lung or both, mostly perihilar and basal, along thickened bronchi.

    The interstitial form has fainter patches, more bronchial walls and a fine net around the hila.
    """
    rng = np.random.default_rng(finding.seed)
    frame, patient, s = thorax.frame, thorax.patient, finding.severity
    w, h, scale = patient.half_width, patient.half_height, patient.scale
    interstitial = finding.form >= _INTERSTITIAL
    count = int(rng.integers(3, 8))
    sides = np.full(count, finding.side) if finding.side else rng.choice([-1, 1], count)
    across, down = rng.uniform(0.22, 0.72, count), np.clip(rng.normal(0.2, 0.27, count), -0.6, 0.6)
    centre = np.stack([sides * across * w, down * h], axis=1)
    patches = np.zeros_like(thorax.x)
    for (x, y), weight in zip(centre, rng.uniform(0.55, 1.0, count), strict=True):
        reach = rng.uniform(1.0, 2.2 + 1.6 * s, 2) * scale
        dx = (thorax.x - np.float32(x)) * np.float32(1 / reach[0])
        dy = (thorax.y - np.float32(y)) * np.float32(1 / reach[1])
        patch = np.exp(-(dx * dx + dy * dy)) * np.float32(weight)
        patches = patches + patch * (1 - patches)
    field = noise(rng, frame, 1.5 * scale) + 0.7 * noise(rng, frame, 0.6 * scale)
    texture = np.clip(0.95 + 0.30 * field, 0.1, 1.6)
    walls = Layer(frame)
    hila = np.stack([sides * 0.2 * w, np.full(count, -0.05 * h)], 1)
    ends = centre + rng.normal(0, 0.8, (3 if interstitial else 1, count, 2)) * scale
    steps = np.linspace(0.1, 1.15, 5)[:, None]
    bow = np.sin(np.pi * steps) * rng.normal(0, 0.4, (*ends.shape[:2], 1, 2)) * scale
    paths = (hila[:, None] + steps * (ends - hila)[:, :, None] + bow).reshape(-1, 5, 2)
    other = paths + np.array([0.3, 0.1]) * scale
    walls.lines(np.concatenate([paths, other]), 0.13 * scale, 0.7)
    lines = walls.array() * np.float32((0.25 + 0.5 * s) * scale)
    share = 0.14 + 0.46 * s
    if interstitial:
        net = np.maximum(1.0 - 1.3 * np.abs(noise(rng, frame, 0.5 * scale)), 0.0)
        near = np.exp(-(((np.abs(thorax.u) - 0.38) / 0.3) ** 2) - ((thorax.v - 0.1) / 0.5) ** 2)
        patches = np.maximum(patches, near * np.float32(0.75)) * _half(thorax, finding.side)
        texture, share = np.maximum(0.5 + 0.45 * net + 0.22 * field, 0.1), 0.85 * share
        lines = lines * np.float32(1.5)
    # What lies behind the heart shows through it.
    room = np.clip(thorax.cavity - 0.6 * thorax.heart, 0.0, 11 * scale) * thorax.above * _half(thorax, finding.side)
    fluid = patches * texture * room * np.float32(share) + lines * smoothstep(room, 0.0, 2 * scale)
    mask = (patches > 0.4) & (room > 1.2 * scale)
    if not mask.any():
        shown = patches * room
        mask = shown == shown.max()
    return Effect(fluid * np.float32(_FILL), mask, 1.0 - 0.4 * patches)


def _effusion(thorax: Thorax, finding: Finding) -> Effect:
    """Fluid that blunts the costophrenic angle and climbs along the chest wall as a meniscus."""
    patient, s = thorax.patient, finding.severity
    rng = np.random.default_rng(finding.seed)
    total = np.zeros_like(thorax.x)
    for side in (-1, 1) if finding.side == 0 else (finding.side,):
        amount = s if side == finding.side or rng.random() < 0.5 else 0.6 * s
        level = 0.84 - 0.90 * amount**1.2 + float(rng.normal(0, 0.02))
        out = np.clip(np.abs(thorax.u), 0.0, 1.05)
        # The meniscus: fluid is drawn up where the pleural space is narrow, laterally more than medially.
        climb = (0.10 + 0.20 * amount) * np.exp((out - 1.0) * 6.0) + 0.05 * amount * np.exp(-(out - 0.15) * 12.0)
        depth = (thorax.v - level + climb) * np.float32(patient.half_height)
        fluid = smoothstep(depth, -0.12 * patient.half_width, (0.10 + 0.12 * amount) * patient.half_width)
        total = np.maximum(total, fluid * _half(thorax, side))
    # Fluid fills the recess behind the diaphragm too, whose outline is lost where it does.
    filled = total * min(1.0, 0.55 + 0.5 * s)
    change = filled * thorax.lung * np.float32(MU_SOFT - MU_LUNG * patient.lung_density)
    mask = (total > 0.45) & (thorax.above > 0.5) & (thorax.cavity > 0.3 * patient.scale) & (np.abs(thorax.u) > 0.1)
    return Effect(change, mask, 1.0 - 0.8 * total)


def _pneumothorax(thorax: Thorax, finding: Finding) -> Effect:
    """Air between the lung and the chest wall: a fine visceral line, nothing but black beyond it."""
    patient, frame, s = thorax.patient, thorax.frame, finding.severity
    rng = np.random.default_rng(finding.seed)
    w, h = patient.half_width, patient.half_height
    apical = (0.10 + 0.75 * s) * (1.0 if finding.form < 0.7 else 0.6)
    lateral = (0.055 + 0.36 * s) * (1.0 if finding.form > 0.3 else 0.55)
    wave = 0.012 * np.sin(thorax.v * np.float32(rng.uniform(5, 9)) + np.float32(rng.uniform(0, 6)))
    fall = smoothstep(thorax.v, 0.95 + 0.4 * s, -0.75)
    inward = thorax.edge - (lateral * (0.35 + 0.65 * fall) + wave) * np.float32(w)
    along = np.clip((np.abs(thorax.u) - 0.36) * np.float32(1 / 0.45), -1.0, 1.0)
    top = -1.0 + apical + 0.45 * apical * along * along
    downward = (thorax.v - top) * np.float32(h)
    # Distance inside the collapsed lung: a rounded corner where its lateral and apical borders meet.
    corner = np.float32(0.12 * w)
    inside = np.minimum(inward, downward) - np.maximum(corner - np.abs(inward - downward), 0.0) ** 2 / (4 * corner)
    half = _half(thorax, finding.side)
    lung = thorax.lung * half
    gap = smoothstep(inside, 0.04 * patient.scale, -0.04 * patient.scale) * half
    thin = max(0.045 * patient.scale, 0.45 * frame.pixel)
    line = np.exp(-((inside / np.float32(thin)) ** 2)) * half * np.float32(0.085 * patient.scale * 0.06 / thin + 0.035)
    present = smoothstep(thorax.lung, 0.2 * patient.scale, 1.5 * patient.scale)
    collapse = (1.0 - gap) * lung * np.float32(_FILL * (0.015 + 0.16 * s * s))
    change = line * present - gap * lung * np.float32(MU_LUNG * patient.lung_density * 0.9) + collapse
    return Effect(
        change, (gap > 0.5) & (lung > 1.2 * patient.scale) & (np.abs(thorax.u) > 0.17) & (thorax.above > 0.5), 1.0 - gap
    )


def _ball(thorax: Thorax, finding: Finding, radius: float, rough: float, share: float) -> Effect:
    """Make a rounded opacity of a radius in cm, lobulated and spiculated by `rough`; `share` is its density."""
    rng = np.random.default_rng(finding.seed)
    distance, angle = _polar(thorax, finding, float(rng.uniform(0.85, 1.2)))
    outline = np.ones_like(distance)
    for wave in range(2, 8):
        outline += np.float32(rough / wave * rng.normal()) * np.cos(wave * angle + np.float32(rng.uniform(0, 6.3)))
    relative = distance / (outline * np.float32(radius))
    chord = np.sqrt(np.maximum(1.0 - relative * relative, 0.0)) * np.float32(2 * radius)
    reach = relative - 1.0
    spike = np.maximum(np.sin(angle * 9 + np.float32(rng.uniform(0, 6))), 0.0) ** 4 * np.exp(-np.maximum(reach, 0) * 5)
    halo = np.where(reach > 0, spike * np.float32(rough * 0.35 * radius), 0.0)
    calcium = 1.7 if finding.form > 0.85 and radius < 1.3 * thorax.patient.scale else 1.0
    half = _half(thorax, finding.side)
    room = half * smoothstep(thorax.lung, 0.0, 1.0 * thorax.patient.scale)
    change = (chord + halo) * room * np.float32(share * calcium * _FILL)
    mask = (relative < 1.0) & (half > 0)
    if not mask.any():
        mask = distance == distance.min()
    return Effect(change, mask)


def _nodule(thorax: Thorax, finding: Finding) -> Effect:
    """Make a round opacity of 1 to 3 cm in an adult."""
    s = finding.severity
    return _ball(thorax, finding, (0.70 + 0.80 * s) * thorax.patient.scale, 0.10, 1.20 + 0.65 * s)


def _mass(thorax: Thorax, finding: Finding) -> Effect:
    """Make a lobulated or spiculated opacity of more than 3 cm."""
    s = finding.severity
    return _ball(thorax, finding, (1.55 + 2.0 * s) * thorax.patient.scale, 0.22 + 0.25 * finding.form, 0.55 + 0.42 * s)


def _cardiomegaly(thorax: Thorax, finding: Finding) -> Effect:
    """Mask the heart below the great vessels; `alter` has made it larger."""
    low = thorax.v > -0.25
    mask = (thorax.heart > 1.2 * thorax.patient.scale) & low & (thorax.above > 0.3)
    return Effect(np.zeros_like(thorax.x), mask)


def _edema(thorax: Thorax, finding: Finding) -> Effect:
    """Perihilar haze, wide upper-lobe vessels, septal (Kerley B) lines at the bases, cuffed bronchi."""
    patient, frame, s = thorax.patient, thorax.frame, finding.severity
    rng = np.random.default_rng(finding.seed)
    w, h, scale = patient.half_width, patient.half_height, patient.scale
    haze = np.zeros_like(thorax.x)
    for side in (-1, 1):
        dx = (thorax.u * side - np.float32(0.33)) * np.float32(1 / (0.22 + 0.16 * s))
        dy = (thorax.v - np.float32(0.12 + rng.normal(0, 0.05))) * np.float32(1 / (0.42 + 0.15 * s))
        haze = np.maximum(haze, np.exp(-0.5 * (dx * dx + dy * dy)) * np.float32(rng.uniform(0.85, 1.15)))
    field = noise(rng, frame, 1.1 * scale) + 0.9 * noise(rng, frame, 2.8 * scale)
    fluid = haze * np.clip(0.9 + 0.20 * field, 0.1, 1.6)
    layer = Layer(frame)
    count = int(6 + 26 * s)
    sides = np.where(rng.random(count) < 0.5, -1.0, 1.0)
    begin = np.stack([sides * rng.uniform(0.90, 0.985, count) * w, rng.uniform(0.25, 0.85, count) * h], axis=1)
    inward = np.stack([-sides * rng.uniform(0.07, 0.13, count) * w, rng.normal(0.01, 0.012, count) * h], axis=1)
    layer.lines(np.stack([begin, begin + inward], axis=1), 0.11 * scale, 0.75)
    turn = np.linspace(0, 2 * np.pi, 14)
    rings = np.stack([np.cos(turn), np.sin(turn)], axis=1) * (0.35 * scale)
    place = np.stack([rng.choice([-1, 1], 5) * rng.uniform(0.26, 0.42, 5) * w, rng.uniform(-0.3, 0.3, 5) * h], axis=1)
    layer.lines(rings + place[:, None, :], 0.16 * scale, 0.8)
    lung = np.minimum(thorax.lung, 12 * scale)
    lines = layer.array() * np.float32((0.5 + 1.0 * s) * scale * _FILL) * smoothstep(lung, 0.0, 1.0)
    change = fluid * lung * np.float32((0.12 + 0.46 * s) * _FILL) + lines
    upper = 1.0 + (0.15 + 0.45 * s) * smoothstep(thorax.v, 0.1, -0.4)
    return Effect(change, (haze > 0.45) & (thorax.lung > 0.5 * scale) & (thorax.above > 0.5), upper)


def _plates(thorax: Thorax, finding: Finding) -> Effect:
    """Plate-like atelectasis: one to three thin bands, nearly level, above the diaphragm."""
    rng = np.random.default_rng(finding.seed)
    patient, frame, s = thorax.patient, thorax.frame, finding.severity
    w, h, scale, side = patient.half_width, patient.half_height, patient.scale, finding.side or 1
    layer = Layer(frame)
    top = patient.dome_right if side < 0 else patient.dome_left
    for _ in range(1 + int(3 * s * rng.random())):
        centre = np.array([side * rng.uniform(0.5, 0.68) * w, (top - rng.uniform(0.06, 0.30)) * h])
        t = np.linspace(-0.5, 0.5, 9)
        long = rng.uniform(0.40, 0.62) * w * (0.8 + 0.3 * s)
        slope, bend = rng.normal(0, 0.22), rng.normal(0, 0.10)
        band = centre + np.stack([t * long, (slope * t + bend * (t * t - 0.08)) * long], axis=1)
        layer.lines(band[None], (0.36 + 0.70 * s * rng.uniform(0.7, 1.2)) * scale, 1.0)
    drawn = blur(layer.array(), 0.09 * scale / frame.pixel) * _half(thorax, side)
    room = smoothstep(thorax.lung, 0.0, 2.0 * scale) * thorax.above
    change = drawn * room * np.float32((2.2 + 2.6 * s) * scale * _FILL)
    return Effect(change, (drawn * room > 0.25))


def _atelectasis(thorax: Thorax, finding: Finding) -> Effect:
    """Plates, or a lobe that has lost its volume: a wedge at the heart's side below, or at the apex above."""
    if finding.form < 0.45:
        return _plates(thorax, finding)
    patient, s, side = thorax.patient, finding.severity, finding.side or 1
    rng = np.random.default_rng(finding.seed)
    scale = patient.scale
    away = thorax.u * side
    if finding.form < 0.8:
        # Lower lobe: a triangle behind the heart, its lateral border a line from the hilum to the diaphragm.
        border = 0.20 + (0.22 + 0.16 * s) * np.clip(thorax.v + 0.1, 0.0, 1.2) + 0.03 * np.sin(thorax.v * 4)
        inside = (border - away) * np.float32(patient.half_width)
        extent = smoothstep(thorax.v, -0.10, 0.12)
    else:
        # Upper lobe: bounded below by the raised fissure, concave downward.
        fissure = -0.52 + 0.18 * s - 0.55 * np.maximum(away - 0.15, 0.0) ** 1.5
        inside = (fissure - thorax.v) * np.float32(patient.half_height)
        extent = smoothstep(thorax.v, -1.05, -0.9)
    wedge = smoothstep(inside, -0.15 * scale, 0.25 * scale) * extent * smoothstep(away, 0.06, 0.20)
    room = np.minimum(np.maximum(thorax.cavity - 0.45 * thorax.heart, 0.0), 11 * scale) * thorax.above
    texture = np.clip(1.0 + 0.12 * noise(rng, thorax.frame, 1.2 * scale), 0.5, 1.5)
    change = wedge * room * texture * np.float32((0.28 + 0.6 * s) * _FILL)
    mask = (wedge > 0.5) & (room > 0.6 * scale)
    return Effect(change, mask, 1.0 - 0.5 * wedge)


_APPLY: dict[str, Callable[[Thorax, Finding], Effect]] = {
    "Consolidation": _consolidation,
    "Effusion": _effusion,
    "Pneumothorax": _pneumothorax,
    "Nodule": _nodule,
    "Mass": _mass,
    "Cardiomegaly": _cardiomegaly,
    "Edema": _edema,
    "Atelectasis": _atelectasis,
}


def apply(thorax: Thorax, finding: Finding) -> Effect:
    """Compute what a finding does to the film of a patient who was already altered by it.

    Parameters
    ----------
    thorax
        The altered patient's maps.
    finding
        Its parameters.

    Returns
    -------
    Effect
        Change of the line integral, mask, and factor on the vessels, each (size, size).
    """
    return _APPLY[finding.name](thorax, finding)
