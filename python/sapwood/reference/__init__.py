"""The maths of every op in plain torch: oracle of the tests, fallback, documentation."""

from sapwood.reference import masked_matmul

__all__ = ["masked_matmul"]
