"""How fast phantoms are written: images a second, through the real dataset writer (PNG and masks).

python bench/generate.py --n 400 --size 224 --workers 2
"""

import argparse
import tempfile
import time
from pathlib import Path

from cxr_fastai.config import GenerateConfig
from cxr_fastai.phantom import generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--format", default="png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        generate(GenerateConfig(out=str(Path(folder) / "warm"), n=2, size=options.size, workers=1))
        config = GenerateConfig(
            out=str(Path(folder) / "set"),
            n=options.n,
            size=options.size,
            workers=options.workers,
            format=options.format,
        )
        start = time.perf_counter()
        generate(config)
        seconds = time.perf_counter() - start
    rate = options.n / seconds
    print(f"{options.n} films of {options.size}x{options.size} ({options.format}) in {seconds:.2f} s")
    print(f"{rate:.1f} images/s, {rate / options.workers:.1f} images/s a core with {options.workers} worker(s)")


if __name__ == "__main__":
    main()
