"""A first-order sentence with learnable fuzzy predicates: friends of smokers smoke."""

from __future__ import annotations

from typing import Any

import torch

from sapwood import nesy
from sapwood.nesy import syntax as S

PEOPLE = ["ann", "bob", "cem", "dua"]
FRIENDS = {("ann", "bob"), ("bob", "ann"), ("bob", "cem"), ("cem", "bob")}
KNOWN = {"ann": 1.0, "dua": 0.0}


def theory() -> S.Term:
    """For all x and y: friends(x, y) and smokes(x) imply smokes(y)."""
    x, y = S.Var("x", "Person"), S.Var("y", "Person")
    friends, smokes = S.relation("friends", "Person", "Person"), S.relation("smokes", "Person")
    return S.Forall(x, S.Forall(y, (friends(x, y) & smokes(x)).implies(smokes(y))))


def learn(algebra: nesy.Algebra, steps: int = 300) -> dict[str, float]:
    """Degrees of smoking that satisfy the sentence and what is known."""
    logits = torch.zeros(len(PEOPLE), requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.05)
    for _ in range(steps):
        degrees = dict(zip(PEOPLE, logits.sigmoid(), strict=True))
        symbols: dict[str, Any] = {
            "smokes": degrees.__getitem__,
            "friends": lambda a, b: float((a, b) in FRIENDS),
        }
        reading = nesy.Interpretation(nesy.Identity, algebra, {"Person": PEOPLE}, symbols)
        sentence = S.truth(theory(), reading)
        facts = torch.stack([1 - (degrees[a] - v).abs() for a, v in KNOWN.items()])
        known = nesy.forall(facts.log(), "pmean").exp()
        loss = (1 - sentence) + (1 - known)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: round(d, 2) for name, d in zip(PEOPLE, logits.sigmoid().tolist(), strict=True)}


def main() -> None:
    """Learns in two algebras; cem smokes because bob does, because ann does."""
    for algebra in (nesy.Lukasiewicz, nesy.Product):
        print(f"{algebra}: {learn(algebra)}")


if __name__ == "__main__":
    main()
