"""Batches of phantoms to pretrain on, each film varied so that nothing but anatomy is worth learning.

In: a seed, a stream, the number of a batch, from which all chance comes. Out: what `Batches` returns, tensors of one
batch. Patients and exposures are drawn more widely than the generator does, half of them children; then geometry,
markings of the lungs, veils, chins and arms, collimation, tone, sharpness and print vary, never by what is found. The
reader's own tone step comes after them, so that the network sees what it will see in training proper.

How widely was set by looking at real films without their labels: the medians of their local contrast at three scales,
of the brightness of lungs and mediastinum, and of their borders lie within what 80 % of these films span.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import gaussian_blur

from cxr_fastai.images.tone import equalise, resize
from cxr_fastai.phantom import FINDINGS, Parameters, Patient, render, sample, sample_patient
from cxr_fastai.phantom.acquisition import Acquisition
from cxr_fastai.phantom.findings import alter
from cxr_fastai.phantom.patient import seen

TRAINING, HELD_OUT = 1, 2  # streams of seeds
STRIDE = 32  # pixels a place of the last features
FOLD = 4  # pixels a cell of the masks that move with the film


def film(seed: int, stream: int, number: int, size: int) -> dict[str, Any]:
    """Draw phantom `number` of a stream, with its truth.

    Returns
    -------
    dict
        pixels (size, size) float32 in [0, 1]; masks (8, size/4, size/4) float32, the covered share of each cell;
        findings (8,), view (1 for AP), heart (its size, 0 for a usual one, about -1 to 3).
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, stream, number]))
    names = draw_findings(rng)
    difficulty = str(rng.choice(["easy", "medium", "hard"], p=[0.3, 0.4, 0.3]))
    drawn_at = 1.5 if stream == HELD_OUT else rng.uniform(1.0, 1.5)  # real films are reduced too
    patient = widen(sample_patient(rng, child=bool(rng.random() < 0.5)), rng)
    parameters = sample(rng, findings=names, difficulty=difficulty, patient=patient)
    parameters = replace(parameters, acquisition=expose_widely(parameters.acquisition, patient.child, rng))
    phantom = render(parameters, round(size * drawn_at))
    masks = np.zeros((len(FINDINGS), size // FOLD, size // FOLD), np.float32)
    for name, mask in phantom.masks.items():
        masks[FINDINGS.index(name)] = resize(mask.astype(np.float32), size // FOLD)
    return {
        "pixels": resize(phantom.pixels, size),
        "masks": masks,
        "findings": np.array([name in names for name in FINDINGS], np.float32),
        "view": np.float32(phantom.view == "AP"),
        "heart": np.float32((heart_size(parameters) - 1.05) / 0.2),
    }


def draw_findings(rng: np.random.Generator) -> list[str]:
    """Draw what a film shows: nothing on half of them; a consolidation, the commonest, on about half of the others."""
    count = 0 if rng.random() < 0.5 else int(rng.choice([1, 2, 3], p=[0.65, 0.25, 0.10]))
    weights = np.array([6.0 if name == "Consolidation" else 1.0 for name in FINDINGS])
    names = [str(name) for name in rng.choice(FINDINGS, count, replace=False, p=weights / weights.sum())]
    if "Edema" in names:  # seldom alone: its haze must not be all that there is to learn
        names += [name for name in ("Effusion", "Cardiomegaly") if name not in names and rng.random() < 0.35]
    return names


def widen(patient: Patient, rng: np.random.Generator) -> Patient:
    """Return someone less usual: greyer lungs, stronger markings and bones, a wider heart, a thymus, more flesh."""

    def factor(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(low, high)))

    raised = 0.5 if patient.child else 0.1
    stout = factor(0.0, 0.6) if rng.random() < 0.3 else 1.0
    return replace(
        patient,
        vessels=patient.vessels * factor(-0.2, 0.45),
        lung_density=patient.lung_density * factor(-0.2, 0.5),
        bone=patient.bone * factor(-0.25, 0.4),
        heart=patient.heart * (factor(-0.08, 0.13) if patient.child else factor(-0.05, 0.05)),
        mediastinum=patient.mediastinum * factor(-0.1, 0.25 if patient.child else 0.12),
        thymus=float(rng.uniform(0, 1)) if patient.age < 7 else 0.0,
        wall=patient.wall * stout,
        wall_depth=patient.wall_depth * stout,
        breast=patient.breast * factor(-0.2, 0.5),
        head=patient.head * factor(-0.15, 0.1),
        arm_angle=min(80.0, patient.arm_angle + (float(rng.uniform(0, 65)) if rng.random() < raised else 0.0)),
    )


def expose_widely(use: Acquisition, child: bool, rng: np.random.Generator) -> Acquisition:
    """Return a less usual exposure: a shallower breath, a closer, wider or lower view, other local contrast."""
    # A film wider than tall shows the arms, and is squeezed into a square.
    squeeze = float(np.exp(rng.uniform(-0.35 if child else -0.15, 0.05)))
    breath = float(rng.uniform(0.80, 1.0)) if rng.random() < 0.3 else 1.0
    return replace(
        use,
        inspiration=max(0.64, use.inspiration * breath),
        zoom=float(np.clip(use.zoom * np.exp(rng.uniform(-0.18, 0.2)) * squeeze**-0.8, 1.0, 2.1)),
        aspect=use.aspect * squeeze,
        shift_y=use.shift_y + float(rng.normal(0, 0.04)),
        # On a less steep, darker curve the mediastinum is grey and seen through, not burnt out.
        steepness=float(rng.uniform(1.4, 4.2)),
        middle=use.middle + (float(rng.uniform(0.0, 0.45)) if rng.random() < 0.5 else 0.0),
        sharpen=use.sharpen * float(np.exp(rng.uniform(-0.3, 0.4))),
        flatten=float(np.clip(use.flatten + rng.uniform(-0.1, 0.3), 0.0, 0.6)),
        edges=use.edges * float(np.exp(rng.uniform(-0.3, 0.7))),
    )


def heart_size(parameters: Parameters) -> float:
    """Return the heart's size as the film shows it, relative to the thorax's width; about 1."""
    patient = seen(parameters.patient, parameters.acquisition.view, parameters.acquisition.inspiration)
    for finding in parameters.findings:
        patient = alter(patient, finding)
    return patient.heart


class Batches(torch.utils.data.Dataset):
    """Batch `i` of a stream: films `i * batch` to `(i + 1) * batch - 1`, varied if they are for training.

    A batch is a dict of float32 tensors: pixels (N, 1, S, S) in [0, 1]; findings (N, 8); known (N, 8), 0 where a
    finding was cut off; places (N, 8, S/32, S/32), how much of each place a finding covers, relative to where it
    covers most; view and heart (N,), see `film`.
    """

    def __init__(self, seed: int, stream: int, size: int, batch: int):
        self.seed, self.stream, self.size, self.batch = seed, stream, size, batch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        numbers = range(index * self.batch, (index + 1) * self.batch)
        films = [film(self.seed, self.stream, number, self.size) for number in numbers]
        # Not 0 at the end, which a SeedSequence does not tell from nothing: that would be film `index`.
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, self.stream, index, 1]))
        if self.stream == TRAINING:
            for one in films:
                one["pixels"] = print_on(one["pixels"], rng)
        batch = {key: torch.from_numpy(np.stack([one[key] for one in films])) for key in films[0]}
        batch["pixels"] = batch["pixels"][:, None]
        whole = batch["masks"].sum((2, 3))
        if self.stream == TRAINING:
            chance = torch.Generator().manual_seed(int(rng.integers(2**62)))
            batch["pixels"], batch["masks"], grown = move(batch["pixels"], batch["masks"], chance)
            whole = whole * grown[:, None]
            batch["pixels"] = vary_tone(clutter(batch["pixels"], chance), chance)
            batch["pixels"], batch["masks"] = collimate(batch["pixels"], batch["masks"], chance)
        batch["pixels"] = torch.from_numpy(np.stack([equalise(pixels) for pixels in batch["pixels"].numpy()]))
        if self.stream == TRAINING:
            batch["pixels"] = last_touch(batch["pixels"], chance)
        # A finding that was cut off for the most part is neither there nor absent.
        batch["known"] = ((whole == 0) | (batch["masks"].sum((2, 3)) > 0.5 * whole)).float()
        cells = F.avg_pool2d(batch.pop("masks"), STRIDE // FOLD)
        batch["places"] = cells / cells.amax((2, 3), keepdim=True).clamp(min=1e-6)
        return batch


# ---- variation ----


def print_on(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put up to four words, boxes, discs or lines on two in five films, anywhere."""
    if rng.random() > 0.4:
        return pixels
    side = pixels.shape[0]
    ink = Image.new("L", (side, side))
    draw = ImageDraw.Draw(ink)
    for _ in range(int(rng.integers(1, 5))):
        x, y = (rng.beta(0.6, 0.6, 2) * side).tolist()
        kind, long = rng.integers(5), float(rng.uniform(0.02, 0.10)) * side
        if kind < 2:
            letters = "".join(rng.choice(list("ABCDEFGHIKLMNOPRSTUVWX0123456789:/-"), int(rng.integers(1, 9))))
            draw.text((x, y), letters, fill=255, font=ImageFont.load_default(max(6, int(long))), anchor="mm")
        elif kind == 2:
            draw.rectangle((x, y, x + long, y + float(rng.uniform(0.3, 1.0)) * long), fill=255)
        elif kind == 3:
            draw.ellipse((x, y, x + long, y + long), fill=255 if rng.random() < 0.5 else 0, outline=255)
        else:
            end = rng.normal(0, 3 * long, 2)
            draw.line((x, y, x + end[0], y + end[1]), fill=255, width=1)
    opaque = np.asarray(ink, np.float32) * np.float32(rng.uniform(0.4, 1.0) / 255)
    return pixels * (1 - opaque) + opaque * np.float32(rng.choice([1.0, 1.0, 0.0, rng.random()]))


def uniform(chance: torch.Generator, n: int, low: float, high: float, share: float = 1.0, usual: float = 0.0):
    """Draw (n, 1, 1, 1) from [low, high] for a share of the films; the others get the usual value."""
    drawn = low + (high - low) * torch.rand(n, 1, 1, 1, generator=chance)
    return torch.where(torch.rand(n, 1, 1, 1, generator=chance) < share, drawn, torch.full_like(drawn, usual))


def move(pixels: torch.Tensor, masks: torch.Tensor, chance: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Turn, zoom, stretch, shear, shift and mirror films (N, 1, S, S) and masks alike; add by how much areas grow."""
    n, side = len(pixels), pixels.shape[-1]

    def draw(low: float, high: float, share: float = 0.8) -> torch.Tensor:
        return uniform(chance, n, low, high, share).flatten()

    angle, zoom, aspect = draw(-0.17, 0.17), torch.exp(draw(-0.30, 0.12)), torch.exp(draw(-0.10, 0.10))
    mirror = 1.0 - 2.0 * (torch.rand(n, generator=chance) < 0.5)
    across = torch.stack([zoom * aspect * angle.cos() * mirror, -zoom * aspect * angle.sin(), draw(-0.15, 0.15)], 1)
    down = torch.stack([(zoom / aspect * (angle + draw(-0.08, 0.08)).sin()) * mirror, zoom / aspect * angle.cos(),
                        draw(-0.15, 0.15)], 1)  # fmt: skip
    theta = torch.stack([across, down], 1)
    grid = F.affine_grid(theta, [n, 1, side, side], align_corners=False)
    half = -(-4 * n // 5)  # what comes in at the edge repeats it, or is black
    moved = torch.cat([
        F.grid_sample(pixels[:half], grid[:half], padding_mode="border", align_corners=False),
        F.grid_sample(pixels[half:], grid[half:], padding_mode="zeros", align_corners=False),
    ])  # fmt: skip
    coarse = F.affine_grid(theta, [n, 1, side // FOLD, side // FOLD], align_corners=False)
    masks = F.grid_sample(masks, coarse, padding_mode="zeros", align_corners=False)
    return moved, masks, 1 / torch.linalg.det(theta[:, :, :2]).abs()


def clutter(pixels: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Lay over films (N, 1, S, S) what is no finding: markings of lungs, veils, a chin above, arms or black beside."""
    n, side = len(pixels), pixels.shape[-1]

    def draw(low: float, high: float, share: float = 1.0) -> torch.Tensor:
        return uniform(chance, n, low, high, share)

    def field(cells: int, size: int) -> torch.Tensor:
        drawn = torch.randn(n, 1, cells, cells, generator=chance)
        return F.interpolate(drawn, size=(size, size), mode="bicubic", align_corners=False)

    # All but the markings is smooth: a quarter of the pixels along each side do.
    small = side // FOLD
    at = (torch.arange(small) + 0.5) / small
    x, y = at.view(1, 1, 1, small), at.view(1, 1, small, 1)
    low = F.avg_pool2d(pixels, FOLD)
    body = (low * 5).clamp(0, 1)

    def disc(x0: torch.Tensor, y0: torch.Tensor, wide: torch.Tensor, high: torch.Tensor, soft: torch.Tensor):
        return torch.sigmoid((1 - ((x - x0) / wide) ** 2 - ((y - y0) / high) ** 2) * soft)

    apart, level, wide, high = draw(0.15, 0.28), draw(0.5, 0.8), draw(0.12, 0.24), draw(0.10, 0.26)
    breasts = sum(disc(0.5 + sign * apart, level, wide, high, draw(3, 15)) for sign in (-1, 1)) * draw(0.05, 0.35, 0.25)
    lower = torch.sigmoid((y - draw(0.4, 0.8)) / draw(0.03, 0.2)) * draw(0.05, 0.5, 0.3)
    uneven = torch.sigmoid(1.5 * field(3, small)) * draw(0.05, 0.5, 0.4)
    chin = disc(draw(0.38, 0.62), draw(-0.25, 0.0), draw(0.10, 0.25), draw(0.12, 0.3), draw(2, 15))
    chin = chin * draw(0.3, 1.0, 0.25)
    flanks = torch.sigmoid(((x - 0.5).abs() - draw(0.3, 0.45)) / draw(0.01, 0.08))
    flanks = flanks * torch.sigmoid((y - draw(0.2, 0.7)) / draw(0.03, 0.15)) * draw(0.1, 0.6, 0.25)
    dark = 1 - torch.sigmoid(((x - 0.5).abs() - draw(0.37, 0.48)) / draw(0.005, 0.03)) * draw(0.6, 1.0, 0.3)
    arms = torch.zeros_like(low)
    for sign in (-1, 1):
        away, lean = 0.5 + sign * draw(0.34, 0.5), draw(-1.2, 1.2)
        bar = ((x - away) + (y - draw(0.0, 0.4)) * lean).abs() / draw(0.02, 0.10)
        aside = torch.sigmoid(((x - 0.5) * sign - 0.33) * 40) * torch.sigmoid((draw(0.2, 0.7) - y) * 20)
        arms = arms + torch.sigmoid((1 - bar) * 4) * aside * draw(0.1, 0.6, 0.2)
    clear = (
        (1 - breasts * body)
        * (1 - lower * body)
        * (1 - uneven * body)
        * (1 - chin)
        * (1 - flanks)
        * (1 - arms).clamp(min=0)
    )
    # Ridges of random fields, coarse and fine, are like markings; they show where the film is dark, but not black.
    net = sum(
        (1 - 1.4 * field(max(4, int(side / pitch)), side).abs()).clamp(min=0) * weight
        for pitch, weight in ((3.5, draw(0, 1)), (7.0, draw(0, 1)))
    )
    broken = torch.sigmoid(3 * field(max(4, small // 3), small)) * torch.sigmoid(2 * field(3, small))
    where = low * (1 - low) ** 4 * 12 * broken * draw(0.0, 0.25, 0.6)
    # Clouds of three sizes: a lung's grey wavers without being ill.
    loud = body * (1.2 - low) * draw(0.0, 0.05, 0.5)
    clouds = (0.7 * field(max(4, small // 5), small) + 0.5 * field(max(4, small // 2), small)) * loud
    layers = torch.cat([clear, where, clouds, 0.5 * loud, dark.expand_as(low)], 1)
    layers = F.interpolate(layers, size=(side, side), mode="bilinear", align_corners=False)
    clear, where, clouds, loud, dark = layers.split(1, 1)
    pixels = pixels + (net - 0.3) * where + clouds + loud * field(side // 4, side)
    return (1 - (1 - pixels).clamp(0, 1) * clear) * dark


def collimate(pixels: torch.Tensor, masks: torch.Tensor, chance: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay borders around some films: black, white or grey, up to three tenths of a side, through which some still show.

    What lies under a border counts as cut off, however well it shows.
    """
    n, side = len(pixels), pixels.shape[-1]
    edges = (0.02 + 0.28 * torch.rand(n, 4, 1, 1, generator=chance) ** 2) * uniform(chance, n, 1, 1, 0.3)
    edges = edges * (torch.rand(n, 4, 1, 1, generator=chance) < 0.55)
    shade = uniform(chance, n, 0, 1, 0.3) + uniform(chance, n, 0.85, 1, 0.45)
    dense = uniform(chance, n, 0.6, 1, 0.5, usual=1.0)
    rim = uniform(chance, n, 0.0, 0.03, 0.3)  # a black line inside the border
    within = frame(edges + rim * (edges > 0), side)
    inside, coarse_inside = (frame(edges, s) for s in (side, side // FOLD))
    border = torch.lerp(pixels, shade.clamp(max=1).expand_as(pixels), dense)
    return pixels * within + border * (1 - inside), masks * coarse_inside


def frame(edges: torch.Tensor, side: int) -> torch.Tensor:
    """Return 1 within the edges (N, 4, 1, 1; left, top, right, bottom as shares of the side), else 0: (N, 1, S, S)."""
    at = (torch.arange(side) + 0.5) / side
    left, top, right, bottom = edges.unbind(1)
    wide, high = (at >= left) & (at <= 1 - right), (at >= top) & (at <= 1 - bottom)
    return (high.transpose(1, 2) & wide)[:, None].float()


def vary_tone(pixels: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Vary tone curve, sharpness, unevenness, noise and compression of films (N, 1, S, S) in [0, 1]."""
    n, side = len(pixels), pixels.shape[-1]
    steps = torch.rand(n, 8, generator=chance).clamp(min=0.1)  # a rising curve of eight pieces
    knots = F.pad(steps.cumsum(1) / steps.sum(1, keepdim=True), (1, 0))
    place = (pixels * 8).flatten(1).clamp(0, 7.999)
    low = place.long()
    curve = torch.lerp(knots.gather(1, low), knots.gather(1, low + 1), place - low).view_as(pixels)
    pixels = torch.lerp(pixels, curve, uniform(chance, n, 0, 1, 0.5)).clamp(0, 1)
    pixels = pixels ** torch.exp(uniform(chance, n, -0.6, 0.6, 0.5))
    field = torch.randn(n, 1, 4, 4, generator=chance)
    field = F.interpolate(field, size=(side, side), mode="bicubic", align_corners=False)
    pixels = pixels * (1 + uniform(chance, n, 0, 0.15, 0.3) * field)
    # Above 0 sharpened, at -1 blurred; the kernels of two halves differ in width.
    amount, half = uniform(chance, n, -1.0, 0.8, 0.6), n // 2
    wide = gaussian_blur(pixels[:half], 7, 1.0 * side / 128 + 0.2)
    wider = gaussian_blur(pixels[half:], 19, 3.0 * side / 128)
    local = (pixels[half:] - wider) * amount[half:].clamp(min=-0.3)
    pixels = torch.cat([pixels[:half] + (pixels[:half] - wide) * amount[:half], pixels[half:] + local])
    poor = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear", align_corners=False)
    pixels = torch.lerp(pixels, poor, uniform(chance, n, 0.5, 1, 0.15))
    fine = torch.randn(n, 1, side, side, generator=chance)
    grains = F.interpolate(torch.randn(n, 1, side // 2, side // 2, generator=chance), scale_factor=2, mode="bilinear")
    noise = fine * uniform(chance, n, 0, 0.03, 0.25) + grains * uniform(chance, n, 0, 0.04, 0.1)
    pixels = pixels + noise * (4 * pixels.std((2, 3), keepdim=True)).clamp(max=1)  # a flat film is not a noisy one
    pixels = compress(pixels, uniform(chance, n, 0.01, 0.12, 0.12, usual=1e-4))
    return torch.where(uniform(chance, n, 1, 1, 0.02) > 0, 1 - pixels, pixels)


def compress(pixels: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Round the cosine transform of 8x8 blocks to multiples of a step that grows with frequency, as JPEG does."""
    n, _, side, _ = pixels.shape
    k = torch.arange(8.0)
    cosine = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / 8) * 0.5
    cosine[0] /= math.sqrt(2)
    blocks = pixels.view(n, side // 8, 8, side // 8, 8)
    waves = torch.einsum("ui,naibj,vj->naubv", cosine, blocks, cosine)
    coarse = step.view(n, 1, 1, 1, 1) * (1 + (k[:, None, None] + k) / 2)
    return torch.einsum("ui,naubv,vj->naibj", cosine, torch.round(waves / coarse) * coarse, cosine).reshape_as(pixels)


def last_touch(pixels: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Shift brightness and contrast after the reader's tone step a little, as training proper does."""
    n = len(pixels)
    contrast = torch.exp(uniform(chance, n, -0.2, 0.2, 0.4))
    return ((pixels - 0.5) * contrast + 0.5 + uniform(chance, n, -0.1, 0.1, 0.4)).clamp(0, 1)
