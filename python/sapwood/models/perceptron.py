"""Multilayer perceptrons."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from sapwood.models._layers import require_positive


def mlp(features: int, classes: int, hidden: Sequence[int] = (300, 100)) -> nn.Sequential:
    """A perceptron with rectified hidden layers ``fc1``, ``fc2``, and so on.

    ``mlp(784, 10, (300, 100))`` is LeNet-300-100 as the pruning papers use it, 266 610 parameters.
    The original has other nonlinearities. The weights are initialised as torch initialises them.

    Example:
        >>> from sapwood.models import mlp
        >>> sum(parameter.numel() for parameter in mlp(784, 10, (300, 100)).parameters())
        266610

    Args:
        features: inputs; images are flattened.
        classes: outputs.
        hidden: widths of the hidden layers; may be empty.

    Returns:
        The network, freshly initialised.

    Raises:
        ValueError: if a size is not a positive integer.

    References:
        LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998; Han et al.,
        arXiv:1506.02626, and Frankle and Carbin, arXiv:1803.03635, for its use in pruning.
    """
    where = "sapwood.models.mlp"
    require_positive(features, "features", where)
    require_positive(classes, "classes", where)
    for width in hidden:
        require_positive(width, "every width in hidden", where)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (k, n) in enumerate(pairwise((features, *hidden, classes)), 1):
        if number > 1:
            layers[f"relu{number - 1}"] = nn.ReLU()
        layers[f"fc{number}"] = nn.Linear(k, n)
    return nn.Sequential(layers)
