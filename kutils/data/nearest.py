"""Finds the rows with the largest products with a query, exactly; short rows rule most rows out first."""

from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from kutils.data.checked_rows import CheckedRows
from kutils.prompts.candidates import reached
from kutils.prompts.shortening import Shortening, fit_shortening, float32_margin, principal_axes, products, squares
from kutils.prompts.similar_blocks import products_of, silence_sparse
from kutils.system.embedding_files import EMBEDDING_DIM, UNIT_TOLERANCE

WIDTHS, WIDE = (64, 96, 128, 160, 192), (256, EMBEDDING_DIM)  # of short rows, in bytes
BYTE_COST, LOOK_COST = 0.05, 1500  # ns of a byte of a short row, and of a look at a whole row, on one core
USELESS = 1 / 100  # share of the rows that a query has to look at from which short rows are wide
FEW = 1 / 50  # share of the rows that a query may have to look at; from more on, all float32 products cost less
BLOCK_QUERIES = 256  # of one matrix product: 67 MB of cosines
LOOKED_AT, PRODUCTS = 1024, 2**20  # short rows, and their products with queries, that are looked at together: 4 MB
VERIFIED = 1024  # rows looked at in float64 at a time: 3 MB
LONGEST = 1 + UNIT_TOLERANCE  # of all rows
FLOAT32_ERROR = 1e-6  # of a product that is rounded to float32
FLOAT32_MARGIN = 1e-6 + LONGEST * float32_margin(EMBEDDING_DIM)  # of products in float32 of rounded queries


@dataclass(frozen=True)
class Block:
    """Some rows of a bank."""

    start: int  # number of the first
    rows: CheckedRows  # [n, D] float32 or float16
    short: CheckedRows | None = None  # int8 [n, width]
    error: float = 0.0  # the largest of a short row


def choose_shortening(sample: Tensor) -> Shortening:
    """The way to shorten rows by which the nearest of a sample's rows (float64 [n, D]) cost least.

    Queries are half-way between two rows: a prediction is as far from the prompts. Short rows are wide where too many
    narrow ones would have to be looked at; those of random rows are as wide as the rows.
    """
    sample = sample[torch.from_numpy(np.random.default_rng(0).permutation(len(sample)))]
    half, axes = min(len(sample) // 4, 256), principal_axes(sample)
    queries, rows = torch.nn.functional.normalize(sample[:half] + sample[half : 2 * half], dim=1), sample[2 * half :]
    nearest = (queries @ rows.T).amax(dim=1)

    def measure(width: int) -> tuple[float, float, Shortening]:
        how = fit_shortening(rows, axes, width, torch.int8)
        short, error = how.apply(rows)
        some = ShortQueries.of(queries, how)
        row, _ = some.reaching(short, some.limits(nearest, error), np.zeros(len(short), bool), np.inf)
        share = len(row) / max(1, half * len(short))
        return BYTE_COST * width + LOOK_COST * share, share, how

    _, share, how = min(map(measure, WIDTHS), key=itemgetter(0))
    return how if share < USELESS else min(map(measure, WIDE), key=itemgetter(0))[2]


@dataclass(frozen=True)
class ShortQueries:
    """Queries shortened as the rows are, each on a scale of its own."""

    how: Shortening
    numbers: Tensor  # int8 [q, width]
    scales: Tensor  # float64 [q]
    errors: Tensor  # float64 [q]

    @classmethod
    def of(cls, queries: Tensor, how: Shortening) -> "ShortQueries":
        """Shorten queries, float64 [q, D], of length 1."""
        exact = how.exactly(queries)
        scales = 127 / exact.abs().amax(dim=1, keepdim=True)
        rounded = (exact * scales).round()
        errors = squares(rounded / scales - exact).sqrt() + 1e-6
        return cls(how, rounded.to(torch.int8), scales[:, 0], errors)

    def limits(self, least: Tensor, error: float) -> np.ndarray:
        """The least product with a short row, int32 [q], where that of the whole rows is `least` (float64 [q]).

        Args:
            error: the largest of a short row (`shortening` has the proof).
        """
        limits = (least - self.errors * (LONGEST + error) - error) * self.scales * self.how.scale
        return limits.clamp(-(2.0**31), 2.0**31 - 1).floor().int().numpy()

    def reaching(
        self, short: Tensor, limits: np.ndarray, excluded: np.ndarray, most: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Queries and rows whose products reach the limits, in order; None if there are more than `most`.

        Args:
            short: int8 [n, width].
            excluded: bool [n], rows to leave out.
        """
        found, count = [], 0
        size = max(LOOKED_AT, PRODUCTS // len(limits))  # rows whose products a core's cache holds
        for start in range(0, len(short), size):
            values = products(self.numbers, short[start : start + size]).numpy()
            query, row = np.divmod(np.flatnonzero(values >= limits[:, None]), values.shape[1])
            keep = ~excluded[start + row]
            found.append((query[keep], start + row[keep]))
            count += len(found[-1][0])
            if count > most:
                return None
        query, row = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.argsort(query, kind="stable")
        return query[order], row[order]


class Nearest:
    """The k best rows of each query so far; of equal products in float32 the lower number first."""

    def __init__(self, queries: np.ndarray, k: int, how: Shortening | None, device: torch.device):
        self.queries = torch.from_numpy(queries)  # float64 [q, D], of length 1
        self.k, self.device = k, device
        starts = range(0, len(queries), BLOCK_QUERIES)
        self.short = how and [ShortQueries.of(self.queries[start : start + BLOCK_QUERIES], how) for start in starts]
        silence_sparse()
        self.indices = np.full((len(queries), k), np.iinfo(np.int64).max)
        self.cosines = np.full((len(queries), k), -np.inf, np.float32)

    def look_at(self, block: Block, excluded: np.ndarray) -> None:
        """Compare the queries with the rows of a block.

        Args:
            excluded: bool [n], rows to leave out.
        """
        whole = None
        for start in range(0, len(self.queries), BLOCK_QUERIES):
            some = slice(start, start + BLOCK_QUERIES)
            pairs = None if self.short is None else self.candidates_by_short_rows(block, some, excluded)
            if pairs is None:
                if whole is None:
                    whole = torch.from_numpy(np.asarray(block.rows[:], np.float32)).to(self.device)
                pairs = self.candidates(whole, some, excluded)
            self.merge(block, start, *pairs)

    def candidates_by_short_rows(
        self, block: Block, some: slice, excluded: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Queries (from the first of `some`) and rows that may be among the best; None if they are too many."""
        least = torch.from_numpy(self.cosines[some, -1]).double() - FLOAT32_ERROR
        short, queries = torch.from_numpy(block.short[:]), self.short[some.start // BLOCK_QUERIES]
        if torch.isinf(least).any():  # the best short rows show how good the best rows are at least
            if self.k > len(short):
                return None
            values = products(queries.numbers, short).masked_fill_(torch.from_numpy(excluded), -(2**31))
            best = values.topk(self.k, dim=1).indices.numpy()
            exact = self.verify(block, some.start, np.repeat(np.arange(len(best)), self.k), best.ravel())
            exact[excluded[best.ravel()]] = -np.inf
            seen = torch.from_numpy(exact.reshape(best.shape).min(axis=1)).double() - FLOAT32_ERROR
            least = torch.maximum(least, seen)
            if torch.isinf(least).any():
                return None
        most = max(FEW * len(short), 4 * self.k) * len(least)
        pairs = queries.reaching(short, queries.limits(least, block.error), excluded, most)
        return None if pairs is None else self.sift(block, some, *pairs, least)

    def sift(self, block: Block, some: slice, query: np.ndarray, row: np.ndarray, least: Tensor):
        """Those of the candidates that float32 products of whole rows leave."""
        distinct, place = np.unique(row, return_inverse=True)  # in the order of the disk
        rows = torch.from_numpy(np.asarray(block.rows[distinct], np.float32))
        values = products_of(self.queries[some].float(), rows, torch.from_numpy(query), torch.from_numpy(place))
        keep = (values >= least[query] - FLOAT32_MARGIN).numpy()
        return query[keep], row[keep]

    def candidates(self, rows: Tensor, some: slice, excluded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `candidates_by_short_rows` returns, by float32 products with all rows (float32 [n, D])."""
        values = self.queries[some].to(self.device).float() @ rows.T
        values.masked_fill_(torch.from_numpy(excluded).to(self.device), -torch.inf)
        least = torch.from_numpy(self.cosines[some, -1]).double()
        if len(rows) >= self.k:
            least = torch.maximum(least, values.topk(self.k, dim=1).values[:, -1].double().cpu())
        return reaching(values, least - FLOAT32_ERROR - FLOAT32_MARGIN, excluded)

    def verify(self, block: Block, start: int, query: np.ndarray, row: np.ndarray) -> np.ndarray:
        """The products of pairs in float64, rounded to float32: [pairs]."""
        exact = np.empty(len(row), np.float32)
        for first in range(0, len(row), VERIFIED):
            part = slice(first, first + VERIFIED)
            rows = torch.from_numpy(np.asarray(block.rows[row[part]], np.float64))
            exact[part] = torch.linalg.vecdot(self.queries[start + query[part]], rows)
        return exact

    def merge(self, block: Block, start: int, query: np.ndarray, row: np.ndarray) -> None:
        """Take pairs of queries (from `start` on) and rows of a block up among the best."""
        touched = np.unique(query)
        cosines = np.concatenate([self.cosines[start + touched].ravel(), self.verify(block, start, query, row)])
        indices = np.concatenate([self.indices[start + touched].ravel(), block.start + row])
        query = np.concatenate([np.repeat(touched, self.k), query])
        order = np.lexsort((indices, -cosines, query))
        first = np.searchsorted(query[order], touched)
        chosen = order[first[:, None] + np.arange(self.k)]
        self.indices[start + touched], self.cosines[start + touched] = indices[chosen], cosines[chosen]


def reaching(values: Tensor, limits: Tensor, excluded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries and rows whose values [q, n] reach the queries' limits [q], in order; without the excluded rows."""
    found = []
    for row, limit in zip(values, limits, strict=True):
        places = reached(row, limit) if row.device.type == "cpu" else (row >= limit).nonzero()[:, 0].cpu().numpy()
        found.append(places[~excluded[places]])
    counts = [len(places) for places in found]
    return np.repeat(np.arange(len(found)), counts), np.concatenate([np.empty(0, np.int64), *found])
