"""fastai's own distributed training, on any device; imported where several processes train (it needs accelerate)."""

import torch
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL, DistributedTrainer
from fastai.learner import Learner

from cxr_fastai.config import rank, world


class SplitBatches(DistributedDL):
    """fastai's loader of a part of each epoch, also where there is no CUDA device to send the order through.

    In training, a step of all ranks sees the films that one process would see in that step; fastai gives each rank a
    half, say, of the whole epoch.
    """

    def __len__(self) -> int:
        return self.dl.n // (self.bs * self.world_size) if self.drop_last else super().__len__()

    def get_idxs(self) -> list[int]:  # noqa: D102
        if not self.drop_last:
            return super().get_idxs()
        order = self._broadcast(list(self.dl.get_idxs()), 0)
        steps = torch.tensor(order[: len(self) * self.bs * self.world_size]).view(-1, self.world_size, self.bs)
        self.n = self.n_padded = steps.numel()
        return steps[:, self.rank].flatten().tolist()

    def _broadcast(self, t: list[int], rank: int) -> list[int]:
        order = [t]
        torch.distributed.broadcast_object_list(order, rank)
        return order[0]


class TrainTogether(DistributedTrainer):
    """fastai's DistributedTrainer on any device; batch norms see all films of a step on CUDA, on a CPU their part."""

    def __init__(self, cuda: bool):
        super().__init__(sync_bn=cuda, cpu=not cuda)

    def _wrap_dl(self, dl: DataLoader) -> DistributedDL:
        return dl if isinstance(dl, DistributedDL) else SplitBatches(dl, device=self.learn.dls.device)


def train_together(learn: Learner, seed: int) -> None:
    """Make `learn` train with the other processes, each with its part of a batch and chance of its own."""
    cuda = learn.dls.device.type == "cuda"
    for dl in learn.dls.loaders:
        dl.bs = max(1, dl.bs // world())
    learn.add_cb(TrainTogether(cuda))
    torch.manual_seed(seed + rank())
