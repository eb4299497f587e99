"""A batch on a processor's cores: each takes a part of it through the network, instead of all through a layer.

Within a layer, cores wait for one another some hundred times a step, and what one wrote the other reads. Parts of a
batch stay in a core's own cache: a step of DenseNet121 takes a quarter less time on two cores. Where norms keep their
statistics (`callbacks.KeepNorms`), parts give what the whole would give, and a norm right after a convolution costs
nothing: it is folded into the weights of each pass. The blocks of a DenseNet then need fewer passes, too (`dense`).
Else batch norms see films of their part alone, as with several processes. Both are the same from run to run.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fastai.callback.core import Callback
from torch import nn

from cxr_fastai.config import usable_cores
from cxr_fastai.dense import lean
from cxr_fastai.folding import fold, norms_after_convolutions

FILMS_IN_PART = 8  # at least: a batch norm of fewer is too noisy, and a core has too little to do at once


def own_cores() -> int:
    """Return on how many cores this process may work: workers that share a machine have fewer threads of torch."""
    return min(usable_cores(), torch.get_num_threads())


class Parts:
    """The forward pass of a body, in parts on threads of their own.

    Each part has a copy of the body with the same parameters. With `kept_norms` the statistics of batch norms are the
    same, too, and never change; else each copy has its own, which are averaged after each pass.
    """

    def __init__(self, body: nn.Module, count: int, threads: int, kept_norms: bool = False):
        self.body, self.threads, self.kept_norms = body, threads, kept_norms
        self.copies = [copy.deepcopy(body) for _ in range(count)]
        self.pairs = [pair for one in self.copies for pair in zip(one.modules(), body.modules(), strict=True)]
        for own, original in self.pairs:
            own._parameters.update(original._parameters)
            if kept_norms:
                own._buffers.update(original._buffers)
        if kept_norms:
            foldable = norms_after_convolutions(body)
            for one in self.copies:
                fold(one, foldable)
                lean(one)
        self.pool = ThreadPoolExecutor(count)
        self.learned = [p for p in body.parameters() if p.requires_grad]

    def __call__(self, films: torch.Tensor) -> torch.Tensor:
        """Return what the body makes of films (N, 3, H, W), which it learns from."""
        if self.learned and torch.is_grad_enabled():
            return _Pass.apply(self, films, *self.learned)
        return torch.cat(self.run(films))

    def run(self, films: torch.Tensor) -> list[torch.Tensor]:
        """Return the features of each part."""
        on, kind, grad = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()
        parts = films.chunk(len(self.copies))

        def forward(one: nn.Module, part: torch.Tensor) -> torch.Tensor:
            # What is switched on in one thread is not in another.
            with torch.set_grad_enabled(grad), torch.autocast("cpu", kind, enabled=on, cache_enabled=False):
                return one(part)

        for own, original in self.pairs:
            own.training = original.training
        with contextlib.nullcontext() if self.kept_norms else self.averaged(len(parts)):
            return self.each(forward, self.copies[: len(parts)], parts)

    @contextlib.contextmanager
    def averaged(self, count: int) -> Iterator[None]:
        """Give each copy the statistics of the body, and the body the mean of those that `count` copies end with."""
        ours, theirs = _statistics(self.body), [_statistics(one) for one in self.copies[:count]]
        for one in theirs:
            torch._foreach_copy_(one, ours)
        yield
        torch._foreach_copy_(ours, theirs[0])
        for number, one in enumerate(theirs[1:], 2):
            torch._foreach_lerp_(ours, one, 1 / number)

    def each(self, work: Callable[..., Any], *given: Sequence[Any]) -> list[Any]:
        """Do the work for each part at the same time; return the results in the order of the parts."""

        def alone(*one: Any) -> Any:
            torch.set_num_threads(self.threads)  # of this thread
            return work(*one)

        return list(self.pool.map(alone, *given))


class _Pass(torch.autograd.Function):
    """One forward pass in parts, and its backward pass."""

    @staticmethod
    def forward(ctx: Any, parts: Parts, films: torch.Tensor, *learned: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            ctx.features = parts.run(films)
        ctx.parts, ctx.learned = parts, learned
        return torch.cat([one.detach() for one in ctx.features])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        given = gradients[0].split([len(one) for one in ctx.features])

        def back(features: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
            return list(torch.autograd.grad(features, ctx.learned, gradient))

        first, *others = ctx.parts.each(back, ctx.features, given)
        for other in others:  # in the order of the parts: the same sum in every run
            torch._foreach_add_(first, other)
        del ctx.features
        return None, None, *first


def _statistics(body: nn.Module) -> list[torch.Tensor]:
    return [buffer for buffer in body.buffers() if buffer.is_floating_point()]


class InParts(Callback):
    """Take the body of a learner's network in parts for the length of a fit, where there are films and cores enough.

    With kept norms a single part is worth it, too: it is faster than the whole.
    """

    def before_fit(self) -> None:  # noqa: D102
        self.after_fit()  # fastai does not tell of a fit that ended with an error, as where memory runs out
        cores, kept_norms = own_cores(), hasattr(self.learn, "keep_norms")
        count = max(min(cores, self.dls.train.bs // FILMS_IN_PART), 1)
        least = count * (1 if kept_norms else FILMS_IN_PART)
        if count > 1 or kept_norms:
            body = self.learn.model[0]
            parts = Parts(body, count, cores // count, kept_norms)
            whole = type(body).forward

            def forward(films: torch.Tensor) -> torch.Tensor:
                return parts(films) if len(films) >= least else whole(body, films)

            body.forward = forward

    def after_fit(self) -> None:  # noqa: D102
        self.learn.model[0].__dict__.pop("forward", None)  # the class's own stands again
