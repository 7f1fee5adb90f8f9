"""Shortens embeddings to fewer numbers whose products are upper bounds of the embeddings', up to a known error.

Proof. Let u and v be rows, y the coordinates of u along some orthonormal axes, and z those along all other axes.
Then u . v = y . y' + z . z' <= y . y' + |z| |z'| = r . r', where r = (y, |z|) is as long as u (Cauchy-Schwarz).
Turning r and r' alike changes no product. What is stored is s = r + d, rounded, with a measured |d| <= e.
r . r' = s . s' - d . s' - r . d', so that r . r' <= s . s' + e |s'| + |r| e', where |s'| <= |r'| + e'.
A pair of product t therefore has s . s' >= t - e (|r'| + e') - |r| e'.

The axes are the principal ones: they leave the least to the tail z. They come from a sample, which the proof allows.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

FLOAT64_ERROR = 1e-6  # of |z|, the root of a difference of numbers that err by 1e-13


@dataclass(frozen=True)
class Shortening:
    """How rows of D numbers become short ones of `width` numbers; at full width they stay as they are."""

    axes: Tensor | None  # float64 [D, width - 1], orthonormal columns; None at full width, as `turn`
    turn: Tensor | None  # float64 [width, width], orthonormal: evens the numbers out, so that int8 rounds them less
    dtype: torch.dtype  # int8, bfloat16, float16 or float32
    scale: float  # the numbers are multiplied by it: to fill the range of int8, else 1
    width: int  # of the short rows

    def exactly(self, rows: Tensor) -> Tensor:
        """Short rows in float64, [n, width], of float64 [n, D]; each as long as its row."""
        if self.axes is None:
            return rows
        head = rows @ self.turned_axes
        tail = (squares(rows) - squares(head)).clamp_(min=0).sqrt_()
        return head.addr_(tail, self.turn[-1])

    @functools.cached_property
    def turned_axes(self) -> Tensor:
        """float64 [D, width]: products with it are coordinates along the axes, turned."""
        return self.axes @ self.turn[:-1]

    def round(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Short rows in `dtype`, [n, width], of float64 [n, D], and the error |d| of each, float32 [n], rounded up."""
        scaled = self.exactly(rows) * self.scale
        stored = scaled.round().clamp_(-127, 127).to(self.dtype) if self.dtype == torch.int8 else scaled.to(self.dtype)
        errors = squares(scaled.sub_(stored)).sqrt_() / self.scale + FLOAT64_ERROR
        return stored, (errors * (1 + 1e-6)).float()

    def apply(self, rows: Tensor) -> tuple[Tensor, float]:
        """The same with the largest error."""
        stored, errors = self.round(rows)
        return stored, float(errors.amax()) if len(rows) else 0.0


def squares(rows: Tensor) -> Tensor:
    """The squared lengths of rows [n, D]: [n]."""
    return torch.linalg.vecdot(rows, rows)


def principal_axes(sample: Tensor) -> Tensor:
    """Orthonormal axes, float64 [D, D] in columns, the one with most of the rows' length first, of float64 [n, D]."""
    return torch.linalg.eigh(sample.T @ sample).eigenvectors.flip(1)


def fit_shortening(
    sample: Tensor, axes: Tensor | None, width: int, dtype: torch.dtype, spare: float = 1.2
) -> Shortening:
    """The shortening to `width` numbers along the first axes; a sample of rows (float64 [n, D]) sets the scale.

    Args:
        spare: int8 holds numbers of up to this many times the sample's largest; the less, the less it rounds.
    """
    how = Shortening(None, None, dtype, 1.0, sample.shape[1])
    if width < sample.shape[1]:
        random = torch.from_numpy(np.random.default_rng(0).standard_normal((width, width)))
        how = Shortening(axes[:, : width - 1], torch.linalg.qr(random).Q.to(axes.device), dtype, 1.0, width)
    if dtype == torch.int8 and len(sample):  # few rows have larger numbers, which are cut: their |d| says so
        how = replace(how, scale=127 / max(spare * float(how.exactly(sample).abs().amax()), 1e-3))
    return how


def products(left: Tensor, right: Tensor) -> Tensor:
    """Products of all rows of left with all of right, [m, n]: int32 of int8, else in the dtype of the rows."""
    return torch._int_mm(left, right.T) if left.dtype == torch.int8 else left @ right.T


def smallest_product(threshold: float, how: Shortening, errors: tuple[float, float]) -> Tensor:
    """The smallest entry of `products` that two rows of length 1 and a product of at least `threshold` can have.

    Sums in float32 err by less than `float32_margin`, those of int8 not at all. Rounding products to 16 bits keeps
    their order, so that a limit that is rounded alike is not above them.

    Args:
        errors: of the rows of left and right, as `Shortening.apply` returns them.
    """
    limit = threshold - errors[0] * (1 + errors[1]) - errors[1]
    if how.dtype == torch.int8:
        return torch.tensor(math.floor(limit * how.scale**2), dtype=torch.int32)
    return torch.tensor(limit - float32_margin(how.width), dtype=torch.float64).to(how.dtype)


def float32_margin(dimension: int) -> float:
    """Twice the bound D * u on the rounding error of a scalar product of unit rows in float32."""
    return dimension * 2.0**-23


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 products without TF32, and sums in float32, inside the block, as the error bounds assume."""
    matmul, precision = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    settings = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = settings
