# The one who receives a model: `cxr predict`, `cxr inspect` and `cxr serve` for a model.onnx, without torch and fastai.
#
#   docker build -t cxr .
#   docker run --rm --read-only --network none -v "$PWD/exports/train-001:/model:ro" -v "$PWD/films:/films:ro" \
#       cxr predict /films --model /model --json
FROM python:3.13-slim

# Nothing is written at run time, so the file system can be read-only; the user has a fixed number and no home.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# onnxruntime reports its use to its maker from 1.29 on, unless it is told not to.
ENV ORT_DISABLE_TELEMETRY=1
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin cxr

WORKDIR /app
COPY pyproject.toml ./
RUN python -m pip install "pip>=25.1" && python -m pip install --group predict
COPY README.md LICENSE ./
COPY cxr_fastai ./cxr_fastai
RUN python -m pip install --no-deps . && rm -rf /app/*

USER 10001:10001
WORKDIR /
ENTRYPOINT ["cxr"]
