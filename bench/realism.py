"""How far phantoms lie from real films: grey-level percentiles and the slope of the power spectrum.

python bench/realism.py --real DIR --out DIR [--n 200] [--age adult|child|all]

DIR is walked for png and jpg files; --age says which phantoms to hold against them. Both kinds are reduced to 224 x
224 grey. Writes realism.png and realism.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from cxr_fastai.phantom import FINDINGS, render, sample, sample_patient

SIZE = 224
LEVELS = (1, 5, 25, 50, 75, 95, 99)


def spectrum(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Radial mean of the power spectrum under a Hann window: frequency in cycles a pixel, and power."""
    window = np.hanning(grey.shape[0])
    power = np.abs(np.fft.fft2((grey - grey.mean()) * window[:, None] * window[None, :])) ** 2
    axis = np.fft.fftfreq(grey.shape[0])
    radius = np.hypot(axis[:, None], axis[None, :])
    edges = np.linspace(0, 0.5, 57)
    ring = np.digitize(radius.ravel(), edges) - 1
    total = np.bincount(ring, power.ravel(), minlength=57)[:56]
    return 0.5 * (edges[1:] + edges[:-1]), total / np.maximum(np.bincount(ring, minlength=57)[:56], 1)


def numbers(grey: np.ndarray) -> dict[str, float]:
    """Percentiles in grey levels of 255, and the log-log slope between 0.02 and 0.35 cycles a pixel."""
    result = {f"p{level}": float(value) for level, value in zip(LEVELS, np.percentile(grey, LEVELS), strict=True)}
    frequency, power = spectrum(grey)
    band = (frequency > 0.02) & (frequency < 0.35)
    result["slope"] = float(np.polyfit(np.log(frequency[band]), np.log(power[band] + 1e-9), 1)[0])
    return result


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS), dtype=np.float32)


def phantoms(n: int, seed: int, age: str) -> list[np.ndarray]:
    """Render n films, every other one with a finding."""
    child = {"adult": False, "child": True, "all": None}[age]
    films = []
    for index in range(n):
        rng = np.random.default_rng([seed, index])
        names = [str(rng.choice(FINDINGS))] if index % 2 else []
        patient = sample_patient(rng, child=child)
        films.append(np.rint(render(sample(rng, findings=names, patient=patient), SIZE).pixels * 255))
    return films


def compare(real: list[dict[str, float]], made: list[dict[str, float]]) -> dict[str, dict[str, float | bool]]:
    """For each number: the real films' range, the phantoms' median, and the share of phantoms inside."""
    result: dict[str, dict[str, float | bool]] = {}
    for name in real[0]:
        low, middle, high = np.percentile([row[name] for row in real], (2.5, 50, 97.5))
        values = np.array([row[name] for row in made])
        median = float(np.median(values))
        result[name] = {
            "real_low": float(low),
            "real_median": float(middle),
            "real_high": float(high),
            "phantom_median": median,
            "median_inside": bool(low <= median <= high),
            "share_inside": float(np.mean((values >= low) & (values <= high))),
        }
    return result


def draw(real: list[np.ndarray], made: list[np.ndarray], path: Path) -> None:
    """Plot mean spectra and histograms of percentiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5))
    left, right = figure.subplots(1, 2)
    for name, films, colour in (("real", real, "tab:blue"), ("phantom", made, "tab:orange")):
        rows = [spectrum(film) for film in films]
        power = np.log10(np.array([row[1] for row in rows]) + 1e-9)
        left.plot(rows[0][0], power.mean(0), color=colour, label=name)
        left.fill_between(rows[0][0], *np.percentile(power, (2.5, 97.5), axis=0), color=colour, alpha=0.2)
        levels = np.percentile([np.percentile(film, LEVELS) for film in films], (2.5, 50, 97.5), axis=0)
        right.plot(LEVELS, levels[1], "o-", color=colour, label=name)
        right.fill_between(LEVELS, levels[0], levels[2], color=colour, alpha=0.2)
    left.set(xscale="log", xlabel="cycles a pixel", ylabel="log10 power", title="Radial power spectrum")
    right.set(xlabel="percentile", ylabel="grey level", title="Grey levels (median, 2.5-97.5 %)")
    left.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, required=True, help="folder of real films")
    parser.add_argument("--out", type=Path, required=True, help="folder for figure and numbers")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--age", choices=("adult", "child", "all"), default="all")
    options = parser.parse_args()
    found = sorted(p for p in options.real.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not found:
        print(f"skipped: no png or jpg films under {options.real}; give --real a folder of real radiographs")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = np.random.default_rng(options.seed).permutation(len(found))[:600]
    real, made = [read(found[index]) for index in chosen], phantoms(options.n, options.seed, options.age)
    result = compare([numbers(film) for film in real], [numbers(film) for film in made])
    for name, row in result.items():
        place = "inside" if row["median_inside"] else "OUTSIDE"
        print(
            f"{name:6s} real {row['real_low']:7.2f} .. {row['real_median']:7.2f} .. {row['real_high']:7.2f}   "
            f"phantom median {row['phantom_median']:7.2f} {place}   share inside {row['share_inside']:.3f}"
        )
    (options.out / "realism.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(real, made, options.out / "realism.png")
    print(f"wrote {options.out / 'realism.json'} and realism.png")


if __name__ == "__main__":
    main()
