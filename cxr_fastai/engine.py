"""The bytes of a model.onnx -> what runs films through it, as fast as this machine can without another answer.

    fp32   onnxruntime; on CUDA where onnxruntime-gpu finds one, else on the CPU
    bf16   OpenVINO on the CPU, multiplying in bfloat16, about twice as fast where the processor has it in hardware;
           a film that it is not sure of is run again in full precision

`auto` takes bf16 where the processor has it, the card says that the export found both to agree on the validation films
(`export.compare_precisions`), and there is more to do than a few films: to prepare a network for bf16 takes as long as
to run some thirty films in fp32. Both give a film the same probability within what that comparison allows, 0.01.
Rounding to bfloat16 moves logits by some hundredths, which a probability shows only far from 0 and 1: there, where the
verdict hangs on it, is where films are run again.
`bench/predict.py` measures both. int8 was tried as well (static, a channel at a time): it changes probabilities by up
to 0.05 and is no faster than bf16.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cxr_fastai.config import usable_cores
from cxr_fastai.errors import ModelFileError, UsageError

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
FP32, BF16 = "fp32", "bf16"
UNSURE = 0.1  # a probability between it and 1 minus it is one that bf16 is not sure of
FEW_FILMS = 32  # so many are done sooner in fp32


class Engine(Protocol):
    """What runs a network."""

    precision: str

    def run(self, films: np.ndarray) -> dict[str, np.ndarray]:
        """Run films (N, size, size) float32 in [0, 1]; return the outputs of `export` by name."""


def open_engine(model: bytes, card: dict[str, Any], precision: str = FP32, threads: int | None = None) -> Engine:
    """Return the engine of a model.

    Parameters
    ----------
    model
        The checked bytes of a model.onnx. card: what `modelfile.read_model` returned with them.
    precision
        fp32, bf16 or auto.
    threads
        Of the arithmetic; None is as many as this process may use.

    Raises
    ------
    UsageError
        Where bf16 is asked for and cannot be had.
    ModelFileError
        Where the model cannot be run.
    """
    threads = threads or usable_cores()
    passed = card.get("precision", {}).get(BF16, {}).get("passed", False)
    if precision == BF16 and not multiplies_bf16():
        raise UsageError("--precision is bf16, but this processor multiplies bfloat16 no faster; use auto or fp32")
    if precision == BF16 or (precision == "auto" and passed and multiplies_bf16() and not _has_cuda()):
        try:
            return OpenVino(model, threads)
        except ImportError:
            if precision == BF16:
                raise UsageError("--precision is bf16, which needs OpenVINO: pip install openvino") from None
    return OnnxRuntime(model, threads)


def precision_for(films: int, asked: str) -> str:
    """Return the precision to open an engine with for so many films: as asked, but a few are not kept waiting."""
    return FP32 if asked == "auto" and films <= FEW_FILMS else asked


def multiplies_bf16() -> bool:
    """Tell whether the processor has instructions for bfloat16; only Linux tells."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    flags = next((line for line in facts.splitlines() if line.startswith("flags")), "")
    return not BF16_FLAGS.isdisjoint(flags.split())


def _has_cuda() -> bool:
    """Tell whether onnxruntime is the one for CUDA, by its files: to import it takes longer than to read a film."""
    found = importlib.util.find_spec("onnxruntime")
    folders = found.submodule_search_locations if found else None
    return any(list(Path(folder, "capi").glob("*onnxruntime_providers_cuda.*")) for folder in folders or ())


class OnnxRuntime:
    """onnxruntime in full precision."""

    precision = FP32

    def __init__(self, model: bytes, threads: int):
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin while they wait would take the cores from those that read films.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        had = onnxruntime.get_available_providers()
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in had]
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=providers)
        except Exception as error:
            # onnxruntime has no common class of its errors
            reason = (str(error).strip().splitlines() or ["?"])[0][:200]
            raise ModelFileError(f"not a model that can be run ({reason}); export it again") from error
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, films: np.ndarray) -> dict[str, np.ndarray]:  # noqa: D102
        return dict(zip(self._names, self._session.run(self._names, {"pixels": films[:, None]}), strict=True))


class OpenVino:
    """OpenVINO on the CPU with bfloat16 multiplications; sums and outputs are float32. See `UNSURE`."""

    precision = BF16

    def __init__(self, model: bytes, threads: int):
        # Its converter is not needed, takes a tenth of a second, and brings code that reports usage to its makers.
        sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": BF16, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        try:
            core = openvino.Core()
            self._network = core.compile_model(core.read_model(model), "CPU", settings)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or ["?"])[0][:200]
            raise ModelFileError(f"not a model that can be run ({reason}); export it again") from error
        self._request = self._network.create_infer_request()
        # OpenVINO may give an output more names than the file does.
        self._outputs = [(output.names, output) for output in self._network.outputs]
        self._full = OnnxRuntime(model, threads)

    def run(self, films: np.ndarray) -> dict[str, np.ndarray]:  # noqa: D102
        told = self._request.infer({"pixels": np.ascontiguousarray(films[:, None])})
        found = {name: np.array(told[output]) for names, output in self._outputs for name in names}
        p = found["probabilities"]
        unsure = ((p > UNSURE) & (p < 1 - UNSURE)).any(axis=1)
        if unsure.any():
            for name, values in self._full.run(films[unsure]).items():
                found[name][unsure] = values
        return found
