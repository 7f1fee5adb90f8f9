"""Finds the products of short rows that reach a limit: the candidates for similar pairs."""

import functools
import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kutils.prompts.shortening import products

GROUP = 64  # rows whose largest product is looked at first on a GPU: most groups hold no candidate
CPU_GROUP = 8  # products whose largest is looked at first on a CPU
TILE = 2048, 256  # rows and columns whose products are looked at together on a CPU: few columns are laid out anew


def candidates(
    left: Tensor, right: Tensor, limit: Tensor, most: float = 1, fused: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Find the products of a short row of left and one of right that are not below the limit.

    Args:
        left, right, limit: [m, width], m a multiple of GROUP; [n, width]; and as `smallest_product` returns it. If
            right is left, products of a row and an earlier one may be left out.
        most: share of the products on a CPU, or of their groups on a GPU, that may be candidates or hold some.
        fused: on a GPU, compare products in the kernel that makes them.
    Returns: row and column of each, int64, sorted by row on a CPU; None if there are more.
    """
    if left.device.type != "cpu":
        limit = limit.to(left.device)
        if fused:
            return candidates_by_group(reaching_products(left, right, limit), torch.ones_like(limit, dtype=bool), most)
        return candidates_by_group(products(left, right), limit, most)
    rows, columns, count = [], [], 0
    for top, start in itertools.product(range(0, len(left), TILE[0]), range(0, len(right), TILE[1])):
        others = right[start : start + TILE[1]]
        short = left[top : min(top + TILE[0], start + len(others)) if left is right else top + TILE[0]]
        if not len(short):
            continue
        places = reached(products(short, others), limit)
        row = places // len(others)  # several times as fast as divmod
        rows.append(row + top)
        columns.append(places - row * len(others) + start)
        count += len(places)
        if count > most * len(left) * len(right):
            return None
    row, column = np.concatenate(rows), np.concatenate(columns)
    order = np.argsort(row.astype(np.min_scalar_type(len(left))), kind="stable")  # numbers of 16 bits by radix
    return torch.from_numpy(row[order]), torch.from_numpy(column[order])


def reached(values: Tensor, limit: Tensor) -> np.ndarray:
    """The places of the values on a CPU that are not below the limit: int64. NumPy looks 10 times as fast as torch.

    The largest of each group of values is looked at first: most groups hold no candidate.
    """
    if values.element_size() == 2 and limit > 0:  # bits of positive 16-bit floats have the order of the numbers
        values, limit = values.view(torch.int16), limit.view(torch.int16)
    elif values.element_size() == 2:
        values = values.float()
    groups = values.numpy().reshape(CPU_GROUP if values.numel() % CPU_GROUP == 0 else 1, -1)
    some = np.flatnonzero(groups.max(axis=0) >= limit.item())
    member, place = np.divmod(np.flatnonzero(groups.take(some, axis=1) >= limit.item()), max(1, len(some)))
    return member * groups.shape[1] + some[place]


def candidates_by_group(values: Tensor, limit: Tensor, most: float) -> tuple[Tensor, Tensor] | None:
    """The same of products [m, n] on a GPU: groups of rows whose largest product is below the limit are left out."""
    groups = values.view(-1, GROUP, values.shape[1])
    group, column = (groups.amax(dim=1) >= limit).nonzero(as_tuple=True)
    if len(group) > most * len(groups) * values.shape[1]:
        return None
    hit, member = (groups[group, :, column] >= limit).nonzero(as_tuple=True)
    return group[hit] * GROUP + member, column[hit]


def reaching_products(left: Tensor, right: Tensor, limit: Tensor) -> Tensor:
    """Whether each product is not below the limit, bool [m, n], in one pass that writes no products.

    Products may or may not be rounded to 16 bits before the comparison, so a 16-bit limit is lowered by one step: it is
    then below what it was before it was rounded.
    """
    if limit.element_size() == 2:
        limit = limit - torch.finfo(limit.dtype).eps * limit.abs()
    return compiled_comparison()(left, right, limit)


@functools.cache
def compiled_comparison() -> Callable:
    """A matrix product with a comparison as its epilogue, where a Triton kernel is as fast as the library's."""
    compiler = functools.partial(torch.compile, mode="max-autotune-no-cudagraphs", dynamic=False)
    return compiler(lambda left, right, limit: products(left, right) >= limit)
