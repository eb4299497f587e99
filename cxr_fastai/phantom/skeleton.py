"""What is drawn rather than computed: ribs, spine, shoulder girdle, airways and the lungs' vessels.

Each function takes the `Thorax` of a patient and returns a float32 map (size, size) of line integrals of attenuation
(dimensionless: path length in cm times 1/cm), to be added to that of the soft tissue.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxr_fastai.phantom.anatomy import MU_BONE, MU_LUNG, MU_SOFT, Thorax, cavity_half_width, spine_x
from cxr_fastai.phantom.canvas import Layer, Map, Points, blur, ellipsoid, noise, shrink, smoothstep
from cxr_fastai.phantom.patient import Patient

RIBS = 11
# Half-width of the loop of each rib, in half-widths of the thorax; the first are narrower than the lung at their
# height.
_LOOP = (0.42, 0.64, 0.78, 0.88, 0.95, 0.99, 1.02, 1.03, 1.03, 1.0, 0.96)
# How far a rib's sternal end lies below its head, in half-heights of the lungs.
_DROP = (0.24, 0.40, 0.52, 0.61, 0.68, 0.74, 0.78, 0.80, 0.80, 0.76, 0.62)


def _strip(points: Points, width: Points) -> Points:
    """Outlines (n, 2k, 2) of bands of the given widths (n, k) in cm around polylines (n, k, 2)."""
    along = np.empty_like(points)
    along[:, 1:-1] = points[:, 2:] - points[:, :-2]
    along[:, 0], along[:, -1] = points[:, 1] - points[:, 0], points[:, -1] - points[:, -2]
    half = 0.5 * width / (np.hypot(along[..., 0], along[..., 1]) + 1e-9)
    normal = along[..., ::-1] * np.array([-1.0, 1.0]) * half[..., None]
    return np.concatenate([points + normal, (points - normal)[:, ::-1]], axis=1)


def _shifted(patient: Patient, points: Points) -> Points:
    """Points (..., 2) moved along with the spine's curve."""
    moved = np.array(points, dtype=np.float64)
    moved[..., 0] += spine_x(patient, moved[..., 1] / patient.half_height)
    return moved


def rib_paths(patient: Patient, sides: Points, numbers: NDArray[np.integer[Any]], angle: Points) -> Points:
    """Project the centre lines of ribs.

    A rib is taken as a tilted half ellipse around the thorax: `angle` 0 is its head beside the spine, 90 the lateral
    chest wall, 180 the midline in front.

    Parameters
    ----------
    patient
        Whose ribs they are.
    sides
        -1 the image's left, +1 the image's right, (n, 1).
    numbers
        0 for the first rib, (n, 1) integers.
    angle
        Degrees along the loop, (n, k) or (1, k).

    Returns
    -------
    ndarray (n, k, 2)
        Patient coordinates in cm.
    """
    w, h = patient.half_width, patient.half_height
    turn = np.radians(angle)
    head = -1.06 + 0.183 * numbers + 0.0012 * numbers * numbers
    drop = np.array(_DROP)[numbers] * patient.rib_drop * (1.0 + 0.5 * sides * patient.scoliosis)
    bucket = patient.rib_bucket * 0.012 * (numbers + 2)
    wall = 1.015 * cavity_half_width(patient, head + 0.5 * drop + bucket) + 0.015 * w
    wide = np.minimum(np.array(_LOOP)[numbers] * w, wall)
    x = sides * (0.1 * w + (wide - 0.1 * w) * np.sin(turn) ** 0.92)
    rise = -0.018 * np.exp(-(((angle - 14) / 12) ** 2))
    y = head + rise + drop * 0.5 * (1 - np.cos(turn)) + bucket * np.sin(turn) ** 2
    return _shifted(patient, np.stack([x, y * h], axis=-1))


def ribs(thorax: Thorax) -> Map:
    """Attenuation of the ribs: posterior arcs, fainter anterior ones, brighter cortex, brightest where seen edge-on."""
    patient, frame = thorax.patient, thorax.frame
    rng = np.random.default_rng(patient.seed + 1)
    back, front = Layer(frame), Layer(frame)
    sides = np.repeat([-1, 1], RIBS)[:, None]
    numbers = np.tile(np.arange(RIBS), 2)[:, None]
    width = 0.095 * patient.half_width * patient.rib_width * np.where(numbers == 0, 0.8, 1.0)
    width = width * rng.normal(1, 0.05, sides.shape)
    rear, fore = np.linspace(2, 95, 20)[None, :], np.linspace(0, 1, 14)[None, :]
    taper = 0.78 + 0.30 * np.sin(np.radians(rear)) - 0.12 * np.clip((rear - 75) / 20, 0, 1)
    level = 0.46 + rng.normal(0, 0.04, 2 * RIBS)
    outline = _strip(rib_paths(patient, sides, numbers, rear), width * taper)
    back.polygons(outline, level, np.minimum(0.95, level + 0.26), 0.10 * patient.scale, capped=False)
    angle = 86 + fore * (52 + rng.uniform(-6, 6, sides.shape))
    outline = _strip(rib_paths(patient, sides, numbers, angle), width * (0.95 + 0.35 * fore**2))
    front.polygons(outline[numbers[:, 0] < 10], 0.36, 0.52, 0.09 * patient.scale, capped=False)
    edge_on = 1.0 + (0.8 if patient.child else 0.28) * smoothstep(thorax.edge, 0.22 * patient.half_width, 0.0)
    # Cartilage takes over in front: the anterior ribs fade out towards the sternum.
    fade = smoothstep(np.abs(thorax.u), 0.30, 0.72) * np.float32(0.75)
    thick = 0.62 * patient.scale * patient.bone * MU_BONE
    # Belly and scatter leave little of the ribs to be seen below the diaphragm.
    left = np.float32(0.52 if patient.child else 0.40)
    shown = edge_on * (left + (1 - left) * thorax.above * smoothstep(thorax.v, 1.0, 0.55))
    return (back.array() + front.array() * fade) * shown * np.float32(thick)


def spine(thorax: Thorax) -> Map:
    """Attenuation of the vertebrae: bodies with end plates, pedicles, spinous and transverse processes."""
    patient = thorax.patient
    w, h = patient.half_width, patient.half_height
    layer = Layer(thorax.frame)
    turn = np.radians(np.arange(0, 360, 30))
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    number = np.arange(-8, 19)
    below = np.maximum(number, 0)
    centre = np.stack([0.0 * number, (-1.06 + 0.183 * number + 0.0012 * below**2) * h], axis=1)[:, None, :]
    size = (0.118 + 0.0035 * number) * (1.08 if patient.child else 1.0) * w
    box = np.stack([size, np.where(number >= 0, 0.078, 0.068) * h], axis=1)[:, None, :]
    wing = np.array([[-1.7, -0.5], [-1.0, -0.2], [1.0, -0.2], [1.7, -0.5], [1.0, -0.55], [-1.0, -0.55]])
    waist = np.array([[-1, -1], [-0.9, 0], [-1, 1], [1, 1], [0.9, 0], [1, -1]])
    layer.polygons(_shifted(patient, centre + wing * box), 0.20, 0.22, 0.08)
    layer.polygons(_shifted(patient, centre + waist * box), 0.44, 0.54, 0.12 * patient.scale)
    for side in (-1, 1):
        pedicle = circle * (0.19, 0.34) + (side * 0.68, -0.25)
        layer.polygons(_shifted(patient, centre + pedicle * box), 0.55, 0.70, 0.08)
    process = circle * (0.13, 0.42) + (0.0, 0.75)
    layer.polygons(_shifted(patient, centre + process * box), 0.62, 0.72, 0.06)
    return layer.array() * np.float32(0.52 * patient.scale * patient.bone * MU_BONE)


def _clavicles(patient: Patient) -> Points:
    """Outlines (2, n, 2) of both clavicles in cm: an S from the sternum over the lung's upper zone to the shoulder."""
    w, h = patient.half_width, patient.half_height
    s = np.linspace(0, 1, 18)
    y = -0.70 - (0.22 + patient.clavicle_rise) * s - 0.04 * np.sin(2 * np.pi * (s - 0.05)) + patient.shoulder * s
    right = np.stack([(0.13 + (0.95 if patient.child else 1.12) * s) * w, y * h], axis=1)
    thick = 0.075 if patient.child else 0.102
    width = (thick - 0.035 * np.sin(np.pi * s)) * np.minimum(1.0, 0.35 + 9 * np.minimum(s, 1 - s)) * w
    return _strip(np.stack([right * (-1, 1), right]), np.stack([width, width]))


def _scapulae(patient: Patient) -> tuple[Points, Points]:
    """Blades (2, n, 2) of the shoulder blades and their spines with the acromia (2, m, 2), in cm."""
    blade = np.array(
        [[1.30, -0.86], [1.20, -0.80], [1.06, -0.84], [0.94, -0.87], [0.90, -0.70], [0.915, -0.45], [0.96, -0.16],
        [1.00, -0.10],
         [1.05, -0.15], [1.13, -0.38], [1.22, -0.58], [1.32, -0.66]]
    )  # fmt: skip
    ridge = np.array([[0.93, -0.68], [1.06, -0.80], [1.22, -0.91], [1.38, -0.99], [1.46, -0.95]])
    move = np.array([0.09 + patient.scapula, patient.shoulder])
    sides = np.array([[[-1.0, 1.0]], [[1.0, 1.0]]]) * (patient.half_width, patient.half_height)
    return (blade + move) * sides, (ridge + move) * sides


def shoulders(thorax: Thorax) -> Map:
    """Attenuation of clavicles, shoulder blades, upper arms and jaw."""
    patient, frame = thorax.patient, thorax.frame
    w, h = patient.half_width, patient.half_height
    long, flat = Layer(frame), Layer(frame)
    turn = np.radians(np.arange(0, 360, 24))
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    mirror = np.array([[[-1.0, 1.0]], [[1.0, 1.0]]])
    swing = np.tan(np.radians(max(3.0, patient.arm_angle)))
    thin = 0.10 * patient.scale
    blades, ridges = _scapulae(patient)
    flat.polygons(blades, 0.28, 0.42, 0.25 * patient.scale)
    flat.lines(ridges, 0.085 * w, 0.60)
    head = np.array([(1.40 + patient.scapula) * w, (-0.78 + patient.shoulder) * h])
    shaft = (head + np.linspace(0, 1, 8)[:, None] * (swing * 3.4 * w, 3.4 * w)) * mirror
    long.polygons(_strip(shaft, np.linspace(0.19, 0.14, 8) * w * np.ones((2, 1))), 0.46, 0.64, 2.5 * thin)
    long.polygons((circle * 0.165 * w + head) * mirror, 0.56, 0.68, thin)
    long.polygons(_clavicles(patient), 0.60, 0.86, 1.2 * thin)
    arc = np.radians(np.linspace(200, -20, 22))
    jaw = np.stack([0.42 * w * np.cos(arc), -(patient.head + 0.28) * h + 0.30 * h * np.sin(arc)], axis=1)
    long.polygons(_strip(jaw[None], np.full((1, len(arc)), 0.16 * w)), 0.8, 0.9, thin)
    return (long.array() + 0.8 * blur(flat.array(), 0.08 / frame.pixel)) * np.float32(
        1.2 * patient.scale * patient.bone * MU_BONE
    )


def airways(thorax: Thorax) -> Map:
    """Attenuation that trachea and main bronchi take away (zero or negative)."""
    patient = thorax.patient
    w, h = patient.half_width, patient.half_height
    layer = Layer(thorax.frame)
    lean = (0.02 + 0.5 * patient.heart_shift) * w
    carina = np.array([-lean, -0.33 * h])
    trachea = np.array([[0.0, -2.4 * h], [0.0, -1.1 * h], [-0.4 * lean, -0.7 * h], carina])
    layer.lines(trachea[None], 0.135 * w, 0.85)
    bronchi = carina + np.array([[[0.0, 0.0], [-0.17 * w, 0.20 * h]], [[0.0, 0.0], [0.22 * w, 0.19 * h]]])
    layer.lines(bronchi, 0.08 * w, 0.58)
    return blur(layer.array(), 0.14 * patient.scale / thorax.frame.pixel) * np.float32(-2.2 * patient.scale * MU_SOFT)


# Directions of the vessels that leave a hilum, in degrees from the lateral, downward positive, and their radii in cm:
# more and wider ones go to the bases than to the apices. The widest stay below the 1.6 cm across that bound a normal
# descending pulmonary artery (Chang, AJR 87, 1962).
_FAN = np.tile([-84.0, -62, -44, -20, 6, 22, 36, 50, 62, 74, 84], 2)
_TRUNK = np.tile([0.40, 0.40, 0.36, 0.34, 0.36, 0.40, 0.46, 0.54, 0.60, 0.64, 0.50], 2)


def _turned(length: Points, angle: Points, side: Points) -> Points:
    """Vectors (n, 2) of given lengths and angles, mirrored on the image's left."""
    return np.stack([side * np.cos(angle) * length, np.sin(angle) * length], axis=1)


def _grow(patient: Patient, rng: np.random.Generator) -> list[tuple[Points, Points]]:
    """Grow the vessels of both lungs: generations of paths (n, 3, 2) and radii (n,), in cm."""
    w, h = patient.half_width, patient.half_height
    side = np.repeat([-1.0, 1.0], 11)
    angle = np.radians(_FAN + rng.normal(0, 5, 22))
    radius = _TRUNK * patient.scale * patient.vessels * rng.uniform(0.75, 1.15, 22)
    starts = np.stack([side * 0.215 * w, (-0.09 - 0.03 * side + 0.14 * np.sin(angle)) * h], axis=1)
    starts = starts + rng.normal(0, 0.03, (22, 2)) * w
    length = rng.uniform(0.12, 0.22, 22) * (1.0 + 0.35 * np.maximum(np.sin(angle), 0)) * w
    generations: list[tuple[Points, Points]] = []
    for _ in range(7):
        count = len(angle)
        bends, (split, spread) = rng.normal(0, 0.19, (2, count)), rng.uniform((0.72,), (0.92,), (2, count))
        bend, turn = angle + bends[0], angle + bends[0] + bends[1]
        middles = starts + _turned(0.5 * length, bend, side)
        ends = middles + _turned(0.5 * length, turn, side)
        generations.append((np.stack([starts, middles, ends], axis=1), radius))
        spread = (spread - 0.61) * np.where(rng.random(count) < 0.5, -1.6, 1.6)
        # Murray's law: the cube of the parent's radius is the sum of the children's cubes.
        radius = np.concatenate([radius * split, radius * np.cbrt(1 - split**3)]) * 0.94
        angle = np.concatenate([turn + spread * (1 - split) * 2, turn - spread * 1.5])
        length = np.concatenate([length, length * 0.9]) * rng.uniform(0.72, 1.04, 2 * count)
        starts, side = np.concatenate([ends, ends]), np.concatenate([side, side])
        reach = np.abs(starts) / (w, h)
        kept = (reach[:, 0] < 1.0) & (reach[:, 1] < 1.08) & (radius > 0.036 * patient.scale)
        starts, angle, radius, length, side = starts[kept], angle[kept], radius[kept], length[kept], side[kept]
    return generations


def _splat(thorax: Thorax, begin: Points, end: Points, radius: Points) -> Map:
    """Add vessels thinner than a pixel as the volume that they bring into each pixel, in cm of path length."""
    frame, side = thorax.frame, 2 * thorax.frame.size
    begin, end = frame.to_pixels(begin) * 2, frame.to_pixels(end) * 2
    span = end - begin
    length = np.hypot(span[:, 0], span[:, 1])
    steps = max(2, int(np.quantile(length, 0.9) / 1.5))
    cells = (begin + span * ((np.arange(steps) + 0.5) / steps)[:, None, None]).astype(np.int32).reshape(-1, 2)
    # Path length is volume over area: a quarter of a pixel each, at twice the film's size.
    weight = np.pi * radius**2 * length * (0.5 * frame.pixel) * (4 / (steps * frame.pixel**2))
    inside = ((cells >= 0) & (cells < side)).all(axis=1)
    index = cells[inside, 1] * side + cells[inside, 0]
    drawn = np.bincount(index, np.tile(weight, steps)[inside], minlength=side * side)
    return shrink(drawn.astype(np.float32).reshape(side, side), 2)


def vessels(thorax: Thorax) -> Map:
    """Attenuation of the pulmonary vessels and the fine texture between them, not yet confined to the lungs."""
    patient, frame = thorax.patient, thorax.frame
    rng = np.random.default_rng(patient.seed + 2)
    layer = Layer(frame)
    full = 1.9 * patient.scale  # cm of blood at the layer's level 1
    paths, radius = (np.concatenate(part) for part in zip(*reversed(_grow(patient, rng)), strict=True))
    thick = 2 * radius > 2.0 * frame.pixel
    layer.lines(paths[thick], 2 * radius[thick], 2.4 * radius[thick] / full)
    if frame.size > 320:  # a round profile, which smaller films cannot show
        layer.lines(paths[thick], 1.2 * radius[thick], 3.0 * radius[thick] / full)
    path = layer.array() * np.float32(full)
    if not thick.all():
        paths, radius = paths[~thick], radius[~thick]
        path += _splat(thorax, paths[:, :2].reshape(-1, 2), paths[:, 1:].reshape(-1, 2), np.repeat(radius, 2))
    path = blur(path, 0.08 * patient.scale / frame.pixel)
    for side in (-1, 1):
        spot = (side * 0.225 * patient.half_width, (-0.06 if side < 0 else -0.13) * patient.half_height)
        axes = (0.30 * patient.half_height, 0.10 * patient.half_width, 0.75 * patient.scale)
        path = path + ellipsoid(thorax.x, thorax.y, spot, axes, 90 - side * 14)
    grain = noise(rng, frame, 0.24 * patient.scale) + 0.6 * noise(rng, frame, 0.6 * patient.scale)
    path = path + np.float32(0.05 * patient.scale) * grain
    return path * np.float32(1.65 * (MU_SOFT - MU_LUNG))
