"""What the commands that train offer: tasks, networks, methods, and where weights compete."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Task(str, Enum):
    """What can be learnt."""

    digits = "digits"
    mnist = "mnist"
    cifar10 = "cifar10"


class Arch(str, Enum):
    """The networks."""

    mlp = "mlp"
    lenet300 = "lenet300"
    smallcnn = "smallcnn"
    resnet20 = "resnet20"


class Shrinkable(str, Enum):
    """The networks of ``sapwood minimize``."""

    mlp = "mlp"
    lenet300 = "lenet300"
    smallcnn = "smallcnn"
    resnet20 = "resnet20"
    convnext_micro = "convnext_micro"
    vit_micro = "vit_micro"


class Rules(str, Enum):
    """How far ``sapwood minimize --run`` goes."""

    exact = "exact"
    merge = "exact+merge"


class Score(str, Enum):
    """What ``sapwood minimize`` ranks weights by."""

    group = "group"
    activation = "activation"
    magnitude = "magnitude"


class Method(str, Enum):
    """How weights are switched off."""

    progressive = "progressive"
    cubic = "cubic"
    one_shot = "one-shot"
    finetune = "finetune"
    lth = "lth"
    snip = "snip"
    grasp = "grasp"
    rigl = "rigl"
    random = "random"
    dense = "dense"


class Scope(str, Enum):
    """Over what the weights compete."""

    everything = "global"
    layer = "layer"
    erk = "erk"


@dataclass(frozen=True)
class MethodInfo:
    """What a method does, in one line, and the scopes it knows, its own one first."""

    summary: str
    scopes: tuple[str, ...] = ("global", "layer", "erk")


METHODS = {
    "progressive": MethodInfo("prunes while it trains, sparsity rising on a line"),
    "cubic": MethodInfo("the same with a cubic curve, fast first; weights may return"),
    "one-shot": MethodInfo("trains densely, then cuts; no training after the cut"),
    "finetune": MethodInfo("trains densely, cuts, fine-tunes"),
    "lth": MethodInfo(
        "trains, cuts a fifth, rewinds, trains again: many trainings", ("layer", "global")
    ),
    "snip": MethodInfo("prunes before training, by |w x gradient|"),
    "grasp": MethodInfo("prunes before training, to keep the gradient's norm"),
    "rigl": MethodInfo("sparse from the start, masks follow the gradients", ("erk", "layer")),
    "random": MethodInfo("prunes before training, at random: the control"),
    "dense": MethodInfo("no pruning", ("global",)),
}

#: Below the options of the commands that take a method; an empty line ends each line there.
METHOD_HELP = "\n\n".join(f"{name:<12} {info.summary}" for name, info in METHODS.items())


@dataclass(frozen=True)
class Variant:
    """A method and where its weights compete, as one word: ``cubic``, ``cubic:layer``.

    ``random:METHOD`` is the control of another method: random masks with the layer sizes that the
    masks of the other have, for the same seed and sparsity.
    """

    method: str
    scope: str
    like: str | None = None  # the method whose layer sizes are taken

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Reads METHOD, METHOD:SCOPE or random:METHOD.

        >>> str(Variant.parse("rigl:erk")), Variant.parse("random:snip").like
        ('rigl', 'snip')

        Raises:
            ValueError: when there is no such method, or the method has no such scope.
        """
        method, colon, rest = text.partition(":")
        if method not in METHODS:
            raise ValueError(f"{method!r} is not one of {', '.join(METHODS)}")
        scopes = METHODS[method].scopes
        if not colon:
            return cls(method, scopes[0])
        controlled = [name for name in METHODS if name not in ("dense", "random")]
        if method == "random" and rest in controlled:
            return cls(method, "global", like=rest)
        if method == "dense":
            raise ValueError(f"dense has no scope, got {text!r}")
        if rest not in scopes:
            known = [*scopes, *(controlled if method == "random" else ())]
            raise ValueError(f"{method}:X knows X = {', '.join(known)}, got {text!r}")
        return cls(method, rest)

    def __str__(self) -> str:
        own = METHODS[self.method].scopes[0]
        extra = self.like or ("" if self.scope == own else self.scope)
        return f"{self.method}:{extra}" if extra else self.method
