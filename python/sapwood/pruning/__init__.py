"""Pruning: masks, criteria, schedules, exact selection, and training that ends sparse.

The pieces, from the outside in:

- ``ProgressiveMagnitude`` trains and prunes in one run, ``prune`` cuts at once.
- ``TrainPruneFinetune``, ``LotteryTicket``, ``PruneAtInit`` and ``DynamicSparseTraining`` are the
  other ways, under the same training loop.
- ``Pruner`` follows an optimizer of your own training loop; ``RigL`` is one whose masks move.
- ``Linear``, ``Cubic``, ``OneShot``, ``Constant``, ``Iterative`` say how much is off when.
- ``Magnitude``, ``Random`` say what matters, and with data ``SNIP``, ``GraSP``, ``Taylor``,
  ``GradientMagnitude``, ``ActivationMagnitude`` and ``GroupScore``, which empties whole units;
  ``register_criterion`` adds others, ``class_balanced_batch`` draws data.
- ``select`` decides, exactly; ``LayerPlan`` and ``erk_densities`` divide the budget.
- ``MaskSet`` holds the result and its file; ``SparsityReport`` counts it twice.
- ``from_torch_prune``, ``to_torch_prune``, ``from_torchao`` exchange masks with other tools.

Masks alone make nothing faster; ``sapwood.nn`` packs pruned layers where that pays.

Progressive magnitude pruning is our implementation of arXiv:2606.12278, of which the abstract was
read: the sparsity that rises linearly within one training cycle is ``Linear``; removal of the
smallest weights of the whole network is ``Magnitude`` with ``select(scope="global")``; the cycle is
``ProgressiveMagnitude``. The cubic curve is that of Zhu and Gupta, arXiv:1710.01878; the densities
of ``erk_densities`` those of Evci et al., arXiv:1911.11134.
"""

from sapwood.pruning._names import MaskMatchError
from sapwood.pruning.allocation import LayerPlan, erk_densities
from sapwood.pruning.baselines import DynamicSparseTraining, PruneAtInit
from sapwood.pruning.class_balance import class_balanced_batch
from sapwood.pruning.criteria import Criterion, Magnitude, Random, register_criterion
from sapwood.pruning.gradient_criteria import SNIP, GradientMagnitude, GraSP, Taylor
from sapwood.pruning.interop import from_torch_prune, from_torchao, to_torch_prune
from sapwood.pruning.lottery import LotteryTicket
from sapwood.pruning.masks import MaskSet
from sapwood.pruning.prune_finetune import PruneFinetuneConfig, TrainPruneFinetune
from sapwood.pruning.pruner import Pruner
from sapwood.pruning.recipe import Recipe
from sapwood.pruning.recipes import ProgressiveMagnitude, prune
from sapwood.pruning.report import SparsityReport, TensorReport
from sapwood.pruning.rigl import RigL
from sapwood.pruning.schedules import Constant, Cubic, Iterative, Linear, OneShot, Schedule
from sapwood.pruning.select import select
from sapwood.pruning.structure_criteria import ActivationMagnitude, GroupScore
from sapwood.pruning.train_config import TrainConfig
from sapwood.pruning.training import Progress, PruningResult, accuracy

__all__ = [
    "SNIP",
    "ActivationMagnitude",
    "Constant",
    "Criterion",
    "Cubic",
    "DynamicSparseTraining",
    "GraSP",
    "GradientMagnitude",
    "GroupScore",
    "Iterative",
    "LayerPlan",
    "Linear",
    "LotteryTicket",
    "Magnitude",
    "MaskMatchError",
    "MaskSet",
    "OneShot",
    "Progress",
    "ProgressiveMagnitude",
    "PruneAtInit",
    "PruneFinetuneConfig",
    "Pruner",
    "PruningResult",
    "Random",
    "Recipe",
    "RigL",
    "Schedule",
    "SparsityReport",
    "Taylor",
    "TensorReport",
    "TrainConfig",
    "TrainPruneFinetune",
    "accuracy",
    "class_balanced_batch",
    "erk_densities",
    "from_torch_prune",
    "from_torchao",
    "prune",
    "register_criterion",
    "select",
    "to_torch_prune",
]
