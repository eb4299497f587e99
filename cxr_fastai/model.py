"""The network: a body of torchvision or timm, and a head that makes the explanation exact.

    film -> body -> ReLU -> mean over places -> dropout -> one linear layer -> logits

DenseNet's own final ReLU, which fastai's cut drops, is put back, as in the original DenseNet (Huang 2017) and
CheXNet (Rajpurkar 2017). The head is linear in the mean over places, so each class logit is the sum of a map of
local contributions, plus a bias: that map is the evidence, part of the forward pass.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.data.all import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai.vision.learner import add_head, vision_learner
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from cxr_fastai.architectures import (
    architecture,
    count_features,
    first_line,
    groups_of_layers,
    imagenet_state,
    known_to_fastai,
    make_body,
    names_in_body,
)
from cxr_fastai.config import TrainConfig
from cxr_fastai.data import normalised
from cxr_fastai.errors import ModelFileError, UsageError
from cxr_fastai.runs import SHIPPED_WEIGHTS


class EvidenceHead(nn.Module):
    """Map of features (N, F, h, w) -> logits (N, K), with the evidence for each."""

    def __init__(self, n_features: int, n_classes: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(n_features, n_classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.linear(self.dropout(self.pool(features)))

    @staticmethod
    def pool(features: torch.Tensor) -> torch.Tensor:
        """Return the mean over places of the features that fire, (N, F)."""
        return torch.relu(features).mean((2, 3))

    def evidence(self, features: torch.Tensor) -> torch.Tensor:
        """Return the contribution of each place to each logit, (N, K, h, w): its sum plus the bias is the logit."""
        places = features.shape[2] * features.shape[3]
        return torch.einsum("nfhw,kf->nkhw", torch.relu(features), self.linear.weight) / places


@dataclass(frozen=True)
class LoadedWeights:
    """What a body starts from: its kind, one line for people, and whether anything was learned before.

    `whole` is set where a run trains all layers from the first epoch; see `fitting.whole_at_once`.
    """

    kind: str
    detail: str
    pretrained: bool
    whole: bool = False


def adam(groups: Sequence[Any], lr: float) -> OptimWrapper:
    """Return PyTorch's AdamW, all tensors of a step at once, for fastai: that one's defaults, and its momentum by name.

    fastai's own Adam, the same rule, takes eight operations for each of 364 tensors.
    """
    return OptimWrapper(groups, torch.optim.AdamW, lr=lr, betas=(0.9, 0.99), eps=1e-5, fused=True)


def make_learner(dls: DataLoaders, config: TrainConfig, loss: nn.Module) -> tuple[Learner, LoadedWeights]:
    """Make the fastai Learner of a run: `vision_learner` with the evidence head, weights as `config.weights` says."""
    features = count_features(config.arch, config.size)
    head = EvidenceHead(features, len(dls.vocab), config.dropout)
    settings = {
        "loss_func": loss,
        "opt_func": adam,
        "train_bn": False,  # a frozen body then needs no gradients
        "lr": config.lr or TrainConfig.lr,
        "wd": config.weight_decay,
        "path": Path(config.out),
    }
    if known_to_fastai(config.arch):
        learn = vision_learner(
            dls,
            architecture(config.arch),
            normalize=False,  # it stands in the batch transforms already
            pretrained=False,
            custom_head=head,
            **settings,
        )
    else:
        model = add_head(make_body(config.arch)[0], features, len(dls.vocab), head=head)
        learn = Learner(dls, model, splitter=groups_of_layers, **settings)
    # A linear layer after ReLU features: zero bias and small weights, as torchvision's own DenseNet starts.
    nn.init.zeros_(learn.model[1].linear.bias)
    return learn, load_weights(learn.model[0], config.arch, config.weights)


def load_weights(body: nn.Module, arch: str, weights: str) -> LoadedWeights:
    """Put weights into `body`; see "Weights, in order" in the README.

    Raises
    ------
    UsageError
        Where weights asked for by name cannot be had.
    ModelFileError
        Where a file is not readable as weights, or does not hold every tensor of the body.
    """
    if weights == "none":
        return LoadedWeights("none", "random weights, as asked for (--weights none)", False)
    if weights == "auto":
        return _best_at_hand(body, arch)
    if weights == "imagenet":
        try:
            return _load_imagenet(body, arch)
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"--weights imagenet: not in the cache ({torch.hub.get_dir()}) and the download failed "
                f"({first_line(error)}); put the file there, or use --weights auto"
            ) from error
    if weights == "phantom":
        return _load_phantom(body, arch)
    return _load_file(body, arch, Path(weights), str(weights))


def _best_at_hand(body: nn.Module, arch: str) -> LoadedWeights:
    try:
        return _load_imagenet(body, arch)
    except (OSError, RuntimeError) as error:
        reason = f"ImageNet's are not in the cache and could not be downloaded ({first_line(error)})"
    if arch == "densenet121" and SHIPPED_WEIGHTS.is_file():
        loaded = _load_phantom(body, arch)
        return LoadedWeights(loaded.kind, f"{loaded.detail}, since {reason}", True)
    return LoadedWeights("none", f"RANDOM weights: {reason}, and none are shipped for {arch}", False)


def _load_imagenet(body: nn.Module, arch: str) -> LoadedWeights:
    state, detail = imagenet_state(arch)
    _fill(body, arch, state, f"imagenet ({arch})")
    return LoadedWeights("imagenet", detail, True)


def _load_phantom(body: nn.Module, arch: str) -> LoadedWeights:
    if arch != "densenet121" or not SHIPPED_WEIGHTS.is_file():
        raise UsageError(
            f"--weights phantom: none are shipped for {arch}; use --weights auto, imagenet, none or a file"
        )
    loaded = _load_file(body, arch, SHIPPED_WEIGHTS, "phantom")
    return LoadedWeights(loaded.kind, "phantom weights (trained on synthetic films, shipped with this package)", True)


def _load_file(body: nn.Module, arch: str, path: Path, name: str) -> LoadedWeights:
    if not path.is_file():
        raise UsageError(
            f"--weights {name}: no such file; give a .safetensors or .pth file, or auto, imagenet, phantom, none"
        )
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything in either library
        raise ModelFileError(f"--weights {name}: not a file of weights ({first_line(error)})") from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    matched = _fill(body, arch, state, name)
    kind = "phantom" if _of_phantoms(path) else "file"
    return LoadedWeights(kind, f"weights from {path} ({matched} tensors matched)", True)


def _of_phantoms(path: Path) -> bool:
    """Tell whether a file's record says that it was learned from our phantoms, as `scripts/pretrain.py` writes it."""
    if path.suffix != ".safetensors":
        return False
    with safe_open(path, "pt") as opened:
        record = opened.metadata() or {}
    generators = [value for key, value in record.items() if key.endswith("generator")]
    return bool(generators) and all(value.startswith("cxr_fastai.phantom") for value in generators)


def _fill(body: nn.Module, arch: str, state: object, name: str) -> int:
    """Copy `state` into `body`; every tensor of the body must be there with its shape. Return how many."""
    if not isinstance(state, dict):
        raise ModelFileError(f"--weights {name}: holds a {type(state).__name__}, not a state dict of named tensors")
    names = names_in_body(arch)
    # A fastai Learner is a body, 0., and a head, 1.
    learners = all(key.startswith(("0.", "1.")) for key in state) and any(key.startswith("1.") for key in state)
    plain = {
        key.removeprefix("0.") if learners else _plain_key(key): value
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    found = {names.get(key, key): value for key, value in plain.items()}
    wanted = body.state_dict()
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    wrong = [k for k in wanted if k in found and found[k].shape != wanted[k].shape]
    if missing or wrong:
        raise ModelFileError(
            f"--weights {name}: {len(missing)} of {len(wanted)} tensors missing (first: {(missing or ['-'])[0]}), "
            f"{len(wrong)} of another shape (first: {(wrong or ['-'])[0]}); is it of another architecture?"
        )
    matched = {key: found[key] for key in wanted if key in found}
    body.load_state_dict(matched, strict=False)
    return len(matched)


def _plain_key(key: str) -> str:
    """Return a tensor's name without the wrappers of DataParallel and CheXNet, in today's spelling."""
    key = re.sub(r"^(module\.)?(densenet121\.|model\.)?", "", key)
    # The naming of torchvision before 0.4, as in the CheXNet files that circulate: norm.1 is norm1.
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.", r"\1\2.", key)


def cpu_multiplies_bf16() -> bool:
    """Tell whether the processor has instructions for bfloat16, so that it is faster than float32."""
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))


class Bodies(nn.ModuleList):
    """Several bodies side by side: film -> the maps of features of all, (N, F_1 + F_2 + ..., h, w)."""

    def forward(self, films: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return torch.cat([body(films) for body in self], dim=1)


def ensemble(models: Sequence[nn.Module]) -> nn.Module:
    """Return one network, a body and an `EvidenceHead`, whose logits are the mean of those of `models`.

    The mean of linear heads is a linear head on all their features, so that its evidence is as exact as theirs.
    """
    if len(models) == 1:
        return models[0]
    linears = [model[1].linear for model in models]  # type: ignore[index]
    head = EvidenceHead(sum(linear.in_features for linear in linears), linears[0].out_features, 0.0)
    with torch.no_grad():
        head.linear.weight.copy_(torch.cat([linear.weight for linear in linears], dim=1) / len(models))
        head.linear.bias.copy_(torch.stack([linear.bias for linear in linears]).mean(0))
    return nn.Sequential(Bodies([model[0] for model in models]), head)  # type: ignore[index]


def features_of_batch(
    body: Callable[[torch.Tensor], torch.Tensor], films: torch.Tensor, precision: torch.dtype | None
) -> np.ndarray:
    """Return what a head makes its logits of, (N, F) float32, for films (N, 1, H, W) in [0, 1] on the body's device."""
    whole = normalised(films).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast(films.device.type, precision, enabled=precision is not None):
        return EvidenceHead.pool(body(whole)).float().cpu().numpy()


def body_and_head(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the two groups of parameters of an `ensemble`, for who trains its learner on (fastai's splitter)."""
    return [list(part.parameters()) for part in model.children()]


def without_class_weights(model: nn.Module, class_weights: torch.Tensor) -> None:
    """Take the class weights (K,) of the loss out of the head's logits, in place.

    Weighted cross-entropy shifts each logit by the logarithm of its class weight; calibrated ones are without it.
    """
    linear = model[1].linear  # type: ignore[index]
    with torch.no_grad():
        linear.bias.sub_(class_weights.log().to(linear.bias))


def cooled(model: nn.Module, temperature: float) -> None:
    """Divide the head's logits by `temperature` (Guo et al., ICML 2017), in place.

    It folds into the last linear layer, so that learner.pkl, model.onnx and the evidence all speak of the same
    probabilities.
    """
    linear = model[1].linear  # type: ignore[index]
    with torch.no_grad():
        linear.weight /= temperature
        linear.bias /= temperature
