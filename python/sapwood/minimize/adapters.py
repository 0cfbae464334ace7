"""The call signature of an attention module around the attention that replaces it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sapwood import _check
from sapwood.minimize.modules import RaggedAttention

__all__ = ["AttentionCall"]


class AttentionCall(nn.Module):
    """Stands in the place of a hand-written attention module and is called as that was.

    Example:
        >>> import torch
        >>> from sapwood.minimize import AttentionCall, RaggedAttention
        >>> ragged = RaggedAttention(8, 8, heads=2, qk_width=4, v_width=4, scale=0.5)
        >>> AttentionCall(ragged)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])

    Args:
        attention: what computes.
        sources: where query, key and value stand among the arguments: positions or names.
        causal: whether later keys are hidden.
        outputs: None returns a tensor; a number n returns a tuple of the tensor and n - 1 times
            None, as modules do that may return attention weights.

    Raises:
        ValueError: in ``forward``, if it is given a tensor that the original was not traced with,
            such as a mask.
    """

    def __init__(
        self,
        attention: RaggedAttention,
        *,
        sources: tuple[int | str, int | str, int | str] = (0, 0, 0),
        causal: bool = False,
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.sources, self.causal, self.outputs = tuple(sources), causal, outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments of the original module; its result."""
        self._check_arguments(args, kwargs)
        q, k, v = (args[s] if isinstance(s, int) else kwargs[s] for s in self.sources)
        output: Tensor = self.attention(q, k, v, is_causal=self.causal)[0]
        return output if self.outputs is None else (output, *[None] * (self.outputs - 1))

    def _check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*enumerate(args), *kwargs.items()]
        extra = [key for key, x in given if isinstance(x, Tensor) and key not in self.sources]
        if extra:
            expected = f"be called with the tensors {self.sources} that it was minimized with"
            _check.fail(ValueError, "minimize.AttentionCall", "module", expected, extra)

    def extra_repr(self) -> str:
        return f"sources={self.sources}, causal={self.causal}"
