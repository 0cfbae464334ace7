"""Random programs: scripts of draws, guards, branches and nested blocks, run as generators."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sapwood import nesy

Expression = Callable[[list[Any]], Any]
ROWS = 3


class ParentNet(nn.Module):
    """Logits from an input and the position of the parent's value."""

    def __init__(self, width: int, parents: int, k: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(parents, k))
        self.linear = nn.Linear(width, k)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x) + self.table[positions]
        return out


@dataclass
class Script:
    """One random program and the data it reads."""

    seed: int
    most: int = 5
    batched: bool = True
    branches: bool = True
    steps: list[tuple[Any, ...]] = field(default_factory=list)
    result: Expression = lambda env: True

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        torch.manual_seed(self.seed)
        self.x = torch.randn(ROWS, 3)
        self.n = torch.randint(-1, 6, (ROWS,))
        self.drawn = 0
        self.steps = self._block(0, depth=0)
        size = self._sizes(self.steps)
        self.result = self._predicate(size)

    def program(self) -> nesy.Program:
        """The program on all rows."""
        return self.on(self.x, self.n)

    def on(self, x: torch.Tensor, n: torch.Tensor) -> nesy.Program:
        """The program on some rows."""
        observed = nesy.observed(n, support=range(-1, 6))

        @nesy.do
        def run() -> Generator[Any, Any, Any]:
            env: list[Any] = [observed if self.batched else (yield nesy.uniform([2]))]
            yield from self._run(self.steps, env, x)
            return self.result(env)

        return run()

    def _run(
        self, steps: list[tuple[Any, ...]], env: list[Any], x: torch.Tensor
    ) -> Generator[Any, Any, None]:
        for kind, *arguments in steps:
            if kind == "draw":
                env.append((yield arguments[0](env, x)))
            elif kind == "guard":
                yield nesy.guard(arguments[0](env))
            elif kind == "branch":
                condition, first, second = arguments
                own = list(env)
                if condition(env):
                    yield from self._run(first, own, x)
                else:
                    yield from self._run(second, own, x)
                env.append(own[-1])
            else:
                env.append((yield self._nested(arguments[0], arguments[1], list(env), x)))

    def _nested(
        self, steps: list[tuple[Any, ...]], result: Expression, env: list[Any], x: torch.Tensor
    ) -> nesy.Program:
        @nesy.do
        def block() -> Generator[Any, Any, Any]:
            yield from self._run(steps, env, x)
            return result(env)

        return block()

    def _sizes(self, steps: list[tuple[Any, ...]]) -> int:
        return 1 + sum(1 for step in steps if step[0] != "guard")

    def _block(self, size: int, depth: int) -> list[tuple[Any, ...]]:
        """Steps after ``size`` earlier values (beside the observed one)."""
        steps: list[tuple[Any, ...]] = [("draw", self._draw(size + 1))]
        size += 1
        for _ in range(self.rng.randint(0, 3)):
            kind = self.rng.choice(["draw", "draw", "draw", "guard", "branch", "nested"])
            if kind == "draw" and self.drawn < self.most:
                steps.append(("draw", self._draw(size + 1)))
                size += 1
            elif kind == "guard":
                steps.append(("guard", self._predicate(size + 1)))
            elif kind == "branch" and depth < 1 and self.drawn < self.most - 1 and self.branches:
                first = self._block(size, depth + 1)
                second = self._block(size, depth + 1)
                steps.append(("branch", self._predicate(size + 1, data=False), first, second))
                size += 1
            elif kind == "nested" and depth < 2 and self.drawn < self.most:
                inner = self._block(size, depth + 1)
                result = self._number(size + self._sizes(inner), data=False)
                steps.append(("nested", inner, result))
                size += 1
        return steps

    def _draw(self, size: int) -> Callable[[list[Any], torch.Tensor], Any]:
        self.drawn += 1
        k = self.rng.randint(1, 6)
        support = self.rng.sample(range(-2, 8), k)
        kind = self.rng.choice(["choice", "choice", "expression", "net", "table", "parent net"])
        weights = [self.rng.random() if self.rng.random() < 0.9 else 0.0 for _ in range(k)]
        weights[0] += 0.01
        fixed = {v: w / sum(weights) for v, w in zip(support, weights, strict=True)}
        if kind == "net" and self.batched:
            symbol = nesy.Categorical(nn.Linear(3, k), support)
            return lambda env, x: symbol(x)
        if size > 1 and kind == "expression":
            p = nesy.table([self.rng.random() for _ in range(4)])
            pick = self._number(size, data=False)
            return lambda env, x: nesy.bernoulli(p[pick(env) % 4])
        if size > 1 and kind in ("table", "parent net"):
            parent = self._number(size, data=False)
            if kind == "table" or not self.batched:
                logs = torch.randn(3, k, dtype=torch.float64).log_softmax(-1)
                given = nesy.Conditional(logs, support, range(3))
                return lambda env, x: given(parent(env) % 3)
            given = nesy.Conditional(ParentNet(3, 3, k), support, range(3))
            return lambda env, x: given(parent(env) % 3, x)
        return lambda env, x: nesy.choice(fixed)

    def _value(self, size: int, data: bool) -> Expression:
        start = 0 if data and self.rng.random() < 0.15 else 1
        index = self.rng.randrange(start, size) if size > start else 0
        index = 0 if start == 0 else index
        return lambda env: env[min(index, len(env) - 1)]

    def _number(self, size: int, data: bool = True) -> Expression:
        first, second = self._value(size, data), self._value(size, data)
        c = self.rng.randint(1, 4)
        lookup = nesy.table([self.rng.randint(0, 3) for _ in range(5)])
        return self.rng.choice(
            [
                first,
                lambda env: first(env) + second(env),
                lambda env: first(env) - second(env),
                lambda env: first(env) * second(env) + c,
                lambda env: (first(env) + second(env)) % (c + 1),
                lambda env: first(env) // c,
                lambda env: lookup[abs(first(env)) % 5],
            ]
        )

    def _predicate(self, size: int, data: bool = True) -> Expression:
        first, second = self._number(size, data), self._number(size, data)
        third, c = self._value(size, data), self.rng.randint(-1, 5)
        return self.rng.choice(
            [
                lambda env: first(env) == (env[0] if data else c),
                lambda env: first(env) == c,
                lambda env: first(env) <= second(env),
                lambda env: first(env) <= second(env) + c,
                lambda env: (first(env) != c) | (third(env) == second(env)),
                lambda env: (first(env) != c) & (second(env) < 4),
                lambda env: (first(env) == (env[0] if data else c)) & (third(env) != c),
                lambda env: (first(env) == c) | (third(env) > second(env)),
                lambda env: ~(first(env) >= second(env)) | (third(env) == c),
            ]
        )
