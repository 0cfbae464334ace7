"""The data that a criterion is given by the recipes."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.pruning.class_balance import class_balanced_batch
from sapwood.pruning.criteria import Criterion, resolve_criterion
from sapwood.pruning.gradient_criteria import GraSP
from sapwood.pruning.train_config import TrainConfig
from sapwood.pruning.training import Data


def scoring_batch(
    criterion: str | Criterion, data: Data, config: TrainConfig, where: str
) -> tuple[Tensor, Tensor] | None:
    """What a criterion needs of the training data, drawn with the seed; None when it needs none."""
    rule = resolve_criterion(criterion, where)
    if not rule.needs_data:
        return None
    device = config.resolve_device()
    if isinstance(rule, GraSP) and rule.samples_per_class is not None:
        x, y = class_balanced_batch(data, rule.samples_per_class, seed=config.seed)
        return x.to(device), y.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if isinstance(data, tuple):
            picked = torch.randperm(len(data[0]))[: config.batch_size].to(data[0].device)
            x, y = data[0][picked], data[1][picked]
        else:
            x, y = next(iter(data))
    return x.to(device), y.to(device)
