"""How the patient is seen: view, geometry, Beer-Lambert, scatter, noise, exposure, tone, markers, lines and leads.

Nothing here looks at the findings, and nothing is drawn for them: view, devices, markers, tone and collimation are
sampled without the label. Exposure control goes one step further (see `equalise`), because a film's grey levels must
not give away that something was added to it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cxr_fastai.phantom.anatomy import MU_SOFT, Thorax
from cxr_fastai.phantom.canvas import Frame, Layer, Map, Points, blur, resize, shrink, smoothstep, wide_blur
from cxr_fastai.phantom.patient import Patient

_LEVELS = np.linspace(0.0, 1.0, 21)


@dataclass(frozen=True)
class Acquisition:
    """One exposure, as plain numbers.

    `zoom` is the field of view over the thorax's width, `shift_x` and `shift_y` are fractions of the film. `energy`
    scales the attenuation, `scatter` the fluence of scattered photons, `photons` is the count in an unattenuated pixel
    of 1 mm². `steepness`, `middle`, `black`, `white`, `flatten`, `sharpen` and `edges` describe the tone curve.
    `margins` are collimated fractions (left, top, right, bottom).
    """

    view: str
    zoom: float
    aspect: float
    angle: float
    shift_x: float
    shift_y: float
    inspiration: float
    energy: float
    scatter: float
    photons: float
    unsharp_cm: float
    steepness: float
    middle: float
    black: float
    white: float
    flatten: float
    sharpen: float
    edges: float
    heel: float
    margins: tuple[float, float, float, float]
    tilt: float
    rim: float
    marker: str
    marker_note: str
    marker_x: float
    marker_y: float
    marker_size: float
    marker_turn: float
    marker_disc: bool
    leads: bool
    tube: bool
    line: bool
    gastric: bool
    pacemaker: bool
    seed: int


def _margins(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Collimated fractions of the film's sides; most films have none."""
    if rng.random() > 0.35:
        return (0.0, 0.0, 0.0, 0.0)
    left, top, right, bottom = (float(m) for m in np.clip(rng.normal(0.015, 0.03, 4), 0.0, 0.085))
    return (left, top, right, bottom)


def _marker(rng: np.random.Generator, view: str) -> dict[str, str | float | bool]:
    """Side marker: letter, place in one of the upper corners, size, turn, and now and then a line of print."""
    letter = "L" if rng.random() < 0.62 else "R"
    place = rng.uniform(0.85, 0.95) if letter == "L" else rng.uniform(0.05, 0.14)
    note = str(rng.choice(["", "", "", "PORTABLE", "ERECT", "SUPINE", "AP", "PA", "MS", "GV", "12", "KS"]))
    return {
        "marker": letter if rng.random() < 0.9 else "",
        "marker_note": note if note not in ("AP", "PA") else view,
        "marker_x": float(place),
        "marker_y": float(rng.uniform(0.05, 0.14) if rng.random() < 0.8 else rng.uniform(0.2, 0.55)),
        "marker_size": float(rng.uniform(0.035, 0.07)),
        "marker_turn": float(rng.choice([0.0, 0.0, 90.0, -90.0, 180.0])) + float(rng.normal(0, 6)),
        "marker_disc": bool(rng.random() < 0.15),
    }


def sample_acquisition(rng: np.random.Generator, patient: Patient) -> Acquisition:
    """Draw an exposure for a patient.

    Parameters
    ----------
    rng
        Source of randomness.
    patient
        Children are collimated closer; nothing else of the patient matters, least of all what is found.

    Returns
    -------
    Acquisition
        View PA in three of five films, else AP.
    """
    bedside = bool(rng.random() < 0.40)
    view = "AP" if bedside or patient.age < 5 else "PA"
    ill = (0.5 if bedside else 0.05) * (0.5 if patient.child else 1.0)
    usual = 1.22 if patient.child else 1.37 if bedside else 1.33
    zoom = float(np.clip(rng.normal(usual, 0.10), 1.10, 1.75))
    return Acquisition(
        view=view,
        zoom=zoom,
        aspect=float(rng.normal(1.0, 0.04)),
        angle=float(rng.normal(0, 3.2 if bedside else 1.8)),
        shift_x=float(rng.normal(0, 0.025)),
        shift_y=float(rng.normal(0.035, 0.035)),
        inspiration=float(np.clip(rng.normal(0.87 if bedside else 0.985, 0.05), 0.74, 1.06)),
        energy=float(np.clip(rng.normal(0.92, 0.07), 0.75, 1.15)),
        scatter=float(rng.uniform(0.15, 0.42) * (1.6 if bedside else 1.0) * (0.6 if patient.child else 1.0)),
        photons=float(10 ** rng.uniform(4.7, 5.6)),
        unsharp_cm=float(rng.uniform(0.02, 0.055)),
        steepness=float(rng.uniform(2.2, 4.0)),
        middle=float(rng.normal(0.21 if patient.child else 0.06, 0.09)),
        black=float(np.clip(rng.normal(0.0, 0.045), 0.0, 0.16)),
        white=float(rng.uniform(0.84, 0.99)) * (0.93 if patient.child else 1.0),
        flatten=float(rng.uniform(0.0, 0.32)),
        sharpen=float(rng.uniform(1.0, 1.5)),
        edges=float(rng.uniform(0.25, 0.85)) * (0.5 if patient.child else 1.0),
        heel=float(rng.normal(0, 0.07)),
        margins=_margins(rng),
        tilt=float(rng.normal(0, 1.3)),
        rim=float(rng.uniform(0.0, 0.05)) if rng.random() < 0.9 else 1.0,
        leads=bool(rng.random() < ill),
        tube=bool(rng.random() < 0.4 * ill),
        line=bool(rng.random() < 0.7 * ill),
        gastric=bool(rng.random() < 0.35 * ill),
        pacemaker=bool(rng.random() < 0.04 and patient.age > 40),
        seed=int(rng.integers(2**31)),
        **_marker(rng, view),  # type: ignore[arg-type]
    )


def frame_of(patient: Patient, acquisition: Acquisition, size: int) -> Frame:
    """Return the field of view that an exposure of a patient, as `seen`, has."""
    width = 2 * patient.half_width * acquisition.zoom + 0.5 * patient.wall
    height = width * acquisition.aspect
    # With a shallow breath the diaphragm stands higher; the apices, which the technologist centres by, stay where they
    # are.
    risen = patient.half_height * (1 / acquisition.inspiration - 1)
    return Frame(
        size, width, height, acquisition.angle, acquisition.shift_x * width, acquisition.shift_y * height + risen
    )


def _bow(begin: Points, end: Points, sag: Points, count: int = 14) -> Points:
    """Smooth curve (count, 2) from a point to another through a control point, all in cm."""
    t = np.linspace(0, 1, count)[:, None]
    return (1 - t) ** 2 * begin + 2 * t * (1 - t) * sag + t**2 * end


def devices(thorax: Thorax, acquisition: Acquisition) -> Map | float:
    """Attenuation of ECG leads, tubes, venous lines and pacemakers; 0 if there are none."""
    use = acquisition
    if not (use.leads or use.tube or use.line or use.gastric or use.pacemaker):
        return 0.0
    patient = thorax.patient
    rng = np.random.default_rng(use.seed + 7)
    w, h, scale = patient.half_width, patient.half_height, max(patient.scale, 0.6)
    unit = np.array([w, h])
    layer = Layer(thorax.frame)
    turn = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if use.leads:
        for side, v in zip((-1, 1, -1, 1), rng.uniform((-0.8, -0.8, 0.3, 0.4), (-0.4, -0.4, 0.9, 1.0)), strict=True):
            pad = np.array([side * rng.uniform(0.45, 0.95), v]) * unit
            way = np.array([rng.choice([-1.0, 1.0]) * rng.uniform(1.7, 2.6), rng.uniform(0.6, 2.6)]) * unit
            layer.lines(_bow(pad, way, pad + rng.normal(0, 0.6, 2) * unit)[None], 0.17 * scale, 0.30)
            layer.polygons((circle * 0.45 * scale + pad)[None], 0.42, 0.65, 0.2 * scale)
    top = np.array([rng.normal(0, 0.03), -2.2]) * unit
    if use.tube:
        tip = np.array([-0.01, rng.uniform(-0.66, -0.46)]) * unit
        way = _bow(top, tip, np.array([0.01 * w, -1.1 * h]))
        layer.lines(way[None], 0.75 * scale, 0.10)
        layer.lines(way[None] + (0.25 * scale, 0.0), 0.13 * scale, 0.45)
    if use.gastric:
        way = _bow(top, np.array([0.06, 0.55]) * unit, np.array([0.05 * w, -0.4 * h]))
        tail = _bow(way[-1], np.array([rng.uniform(0.2, 0.5), 1.1]) * unit, np.array([0.12, 0.95]) * unit)
        layer.lines(np.concatenate([way, tail])[None], 0.26 * scale, 0.36)
    if use.line:
        side = rng.choice([-1.0, 1.0])
        entry = np.array([side * rng.uniform(0.35, 2.2), rng.uniform(-2.2, -1.5)]) * unit
        tip = np.array([-0.13, rng.uniform(-0.25, 0.15)]) * unit
        layer.lines(_bow(entry, tip, np.array([-0.10 + 0.1 * side, -0.80]) * unit)[None], 0.19 * scale, 0.42)
    if use.pacemaker:
        can = np.array([rng.choice([-1.0, 1.0], p=[0.2, 0.8]) * 0.72, -0.52]) * unit
        box = np.sign(circle) * np.sqrt(np.abs(circle)) * (2.3 * scale, 1.9 * scale) + can
        layer.lines(_bow(can, np.array([0.25, 0.5]) * unit, np.array([-0.45, -0.75]) * unit)[None], 0.2 * scale, 0.6)
        layer.polygons(box[None], 0.92, 1.0, 0.2)
    return layer.array() * np.float32(1.7)


def expose(attenuation: Map, body: Map, pixel_cm: float, acquisition: Acquisition, patient: Patient) -> Map:
    """Compute the fluence that reaches the detector.

    Parameters
    ----------
    attenuation
        Line integrals, (size, size).
    body
        Path length in cm through the body, (size, size).
    pixel_cm
        Pixel pitch in cm.
    acquisition, patient
        Energy and scatter; scatter spreads over about a third of the patient's depth.

    Returns
    -------
    ndarray of float32 (size, size)
        Primary (Beer-Lambert) plus scattered fluence, 1 where the beam is unattenuated.
    """
    primary = np.exp(attenuation * np.float32(-acquisition.energy))
    fold = max(1, attenuation.shape[0] // 56)
    small = shrink(primary, fold) * (1.0 - np.exp(-MU_SOFT * shrink(body, fold)))
    spread = blur(small, 0.36 * patient.depth / (pixel_cm * fold))
    return primary + np.float32(acquisition.scatter) * resize(spread, attenuation.shape[0])


def equalise(signal: Map, seen: Map, reference: Map) -> Map:
    """Map the grey levels of a film onto those of the same patient's film without the finding.

    Automatic exposure and histogram-based processing hold a film's grey levels where they always are, whatever the
    film shows. Here they do so exactly: the quantiles of the film as `seen` go to those of `reference`, along a
    monotone curve. So neither the mean nor the histogram tells that something was added, and the finding shows as
    structure alone.

    Parameters
    ----------
    signal
        Log signal (size, size).
    seen, reference
        Noise-free log signals with and without the finding on the same coarse grid.

    Returns
    -------
    ndarray of float32 (size, size)
    """
    here, there = np.quantile(seen, _LEVELS), np.quantile(reference, _LEVELS)
    here = np.maximum.accumulate(here + np.linspace(0, 1e-4, len(here)))
    fine = np.linspace(here[0] - 0.5, here[-1] + 0.5, 1024)
    shift = np.interp(fine, here, there - here)
    index = np.clip((signal - np.float32(fine[0])) * np.float32(1023 / (fine[-1] - fine[0])), 0, 1023).astype(np.intp)
    return signal + blur_curve(shift)[index]


def blur_curve(values: Points, width: int = 41) -> Map:
    """Round off the corners of a tabulated curve."""
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid").astype(np.float32)


def tone(signal: Map, anchors: tuple[float, float], pixel_cm: float, acquisition: Acquisition) -> Map:
    """Turn the log signal into grey levels in [0, 1] as a film or a digital detector's processing does.

    `anchors` are the log signals of lung and of mediastinum. The slowly varying part is compressed and detail raised,
    as in multi-frequency processing (Vuylsteke & Schoeters, SPIE 2167, 1994), then a sigmoid like a film's
    characteristic curve sets the greys.
    """
    size = signal.shape[0]
    relative = (signal - np.float32(anchors[0])) * np.float32(1 / (anchors[1] - anchors[0]))
    slow = wide_blur(relative, 3.5 / pixel_cm)
    kept = np.float32(1 - acquisition.flatten)
    relative = (slow - 0.5) * kept + 0.5 + (relative - slow) * np.float32(acquisition.sharpen)
    fine = blur(relative, max(0.79, 0.2 / pixel_cm))
    relative = relative + (relative - fine) * np.float32(acquisition.edges)
    slope = (np.arange(size, dtype=np.float32) / size - 0.5) * np.float32(acquisition.heel)
    relative = relative + slope[:, None]
    grey = 1.0 / (1.0 + np.exp((np.float32(acquisition.middle) - relative) * np.float32(acquisition.steepness)))
    # Unexposed film is taken as the level far below the lung's.
    floor = 1.0 / (1.0 + np.exp((acquisition.middle + 0.30) * acquisition.steepness))
    grey = np.maximum((grey - np.float32(floor)) * np.float32(1 / (1 - floor)), 0.0)
    return grey * np.float32(acquisition.white - acquisition.black) + np.float32(acquisition.black)


def grain(fluence: Map, pixel_cm: float, acquisition: Acquisition, rng: np.random.Generator) -> Map:
    """Add quantum noise: Poisson counts in their normal limit, deviation sqrt(N), on the fluence."""
    counts = acquisition.photons * (pixel_cm * 10) ** 2
    white = rng.standard_normal(fluence.shape, dtype=np.float32)
    return np.maximum(fluence + np.sqrt(fluence * np.float32(1 / counts)) * white, np.float32(1e-5))


@lru_cache(maxsize=256)
def _letters(text: str, height: int) -> Image.Image:
    """Text in Pillow's built-in font, scaled to a height in pixels."""
    font = ImageFont.load_default(32)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (int(right - left) + 2, int(bottom - top) + 1))
    ImageDraw.Draw(image).text((1 - left, 1 - top), text, fill=255, font=font)
    crop = image.crop(image.getbbox() or (0, 0, 1, 1))
    return crop.resize((max(1, crop.width * height // max(1, crop.height)), height), Image.Resampling.BICUBIC)


def _stamp(film: Map, text: str, height: float, centre: tuple[float, float], turn: float) -> None:
    """Write lead letters into a film in place; height and centre are fractions of its side."""
    size = film.shape[0]
    image = _letters(text, max(5, round(height * size))).rotate(turn, expand=True, resample=Image.Resampling.BILINEAR)
    column, row = (round(c * size) - side // 2 for c, side in zip(centre, image.size, strict=True))
    column, row = min(max(column, 0), size - 1), min(max(row, 0), size - 1)
    ink = np.asarray(image, dtype=np.float32)[: size - row, : size - column] / 255
    part = film[row : row + ink.shape[0], column : column + ink.shape[1]]
    part += (0.97 - part) * ink


def _open_field(size: int, use: Acquisition) -> Map:
    """1 inside the collimated field, 0 outside, with a penumbra of about one part in a hundred of the film."""
    steps = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    turn = np.float32(np.tan(np.radians(use.tilt)))
    across, down = steps[None, :] + turn * steps[:, None], steps[:, None] - turn * steps[None, :]
    left, top, right, bottom = (0.5 - margin for margin in use.margins)
    near = np.minimum(np.minimum(across + left, right - across), np.minimum(down + top, bottom - down))
    return smoothstep(near, -0.006, 0.006)


def finish(film: Map, acquisition: Acquisition, rng: np.random.Generator) -> Map:
    """Collimate, and put the side marker on."""
    size, use = film.shape[0], acquisition
    if any(use.margins):
        inside = _open_field(size, use)
        film = film * inside + (1 - inside) * np.float32(use.rim)
    if use.marker:
        spot = (use.marker_x, use.marker_y)
        if use.marker_disc:
            grid = (np.arange(size, dtype=np.float32) + 0.5) / size
            away = np.hypot(grid[None, :] - spot[0], grid[:, None] - spot[1])
            film = np.where(away < use.marker_size * 0.75, np.float32(0.04), film)
            film = np.where(np.abs(away - use.marker_size * 0.8) < 0.004, np.float32(0.95), film)
        _stamp(film, use.marker, use.marker_size, spot, 0.0 if use.marker_disc else use.marker_turn)
        if use.marker_note:
            _stamp(film, use.marker_note, 0.36 * use.marker_size, (spot[0], spot[1] + 0.06), 0.0)
    return np.clip(film + rng.normal(0, 0.002), 0.0, 1.0).astype(np.float32)
