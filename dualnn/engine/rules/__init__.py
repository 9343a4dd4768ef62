"""Op rules, by family. Importing this package registers all of them."""

from dualnn.engine.rules import (
    arithmetic,
    elementwise,
    indexing,
    losses,
    norms,
    pooling,
    products,
    queries,
    random,
    reductions,
    shape,
)

__all__ = [
    "arithmetic",
    "elementwise",
    "indexing",
    "losses",
    "norms",
    "pooling",
    "products",
    "queries",
    "random",
    "reductions",
    "shape",
]
