"""Launcher: `python cli.py ...` is `cxr ...` is `python -m cxr_fastai ...`."""

from cxr_fastai.cli import main

if __name__ == "__main__":
    main()
