"""`python -m cxr_fastai ...` is `cxr ...`."""

from cxr_fastai.cli import main

main()
