"""Attention: dimensions of the scores, dimensions of the values, and whole heads."""

from __future__ import annotations

from typing import Any

from sapwood.minimize._leaves import Site
from sapwood.minimize.modules import RaggedAttention
from sapwood.minimize.rules._registry import Step, opaque


def attention(
    step: Step, site: Site, module: RaggedAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return opaque(step)
