"""Assigns small groups of similar prompts to folds so that every fold has its share of each source and topic.

A balanced partition keeps large groups of similar prompts together, and so puts most of one source, or of one topic,
into one fold. Here large groups are first cut into small parts: more prompts leak, but the folds resemble each other.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from kutils.prompts.partition import cut_graph, edge_weights, groups_by_kmeans, similarity_graph
from kutils.prompts.similarity import SimilarPairs

# no part is larger than a fifth of a fold. Of 40,000 real prompts 2.0 % leak, with 10 and 20 parts 3.1 % and 6.0 %, and
# the sources of folds are off by 5 %, 2 % and 1 %; in a balanced partition 0.3 % leak, and sources are off by 31 %
PARTS_PER_FOLD = 5
MOST_LEAKED = 0.25  # largest share of a component's rows that may leak by a cut; denser ones are cut less, or not
NUM_TOPICS = 50
SIZE_WEIGHT = 10.0  # weight of a fold's total size in the balance; each source and topic has weight 1


def topics_of(embeddings: np.ndarray, seed: int = 0) -> np.ndarray:
    """Cluster prompts into at most NUM_TOPICS topics: int [prompts]."""
    return groups_by_kmeans(embeddings, 1, seed, NUM_TOPICS)


def folds_by_strata(
    num_rows: np.ndarray, pairs: SimilarPairs, num_folds: int, strata: Sequence[np.ndarray], seed: int = 0
) -> np.ndarray:
    """Cut large groups of similar prompts into parts, see `small_parts`, and deal these as `deal_parts` does.

    Args:
        num_rows: int [prompts], rows of the data sets that hold the prompt; fold sizes count these.
        strata: int [prompts] each, to be balanced over folds: the prompts' sources, their topics.
        seed: of METIS.
    Returns: int8 [prompts].
    """
    graph = similarity_graph(len(num_rows), pairs, edge_weights(len(num_rows), pairs))
    parts = small_parts(graph, num_rows, num_rows.sum() / num_folds, seed)
    columns, width = [np.zeros(len(parts), np.int64)], 1
    for stratum in strata:
        columns.append(width + stratum)
        width += int(stratum.max()) + 1
    entries = np.tile(num_rows, len(columns)).astype(float), (np.tile(parts, len(columns)), np.concatenate(columns))
    return deal_parts(csr_array(entries, shape=(int(parts.max()) + 1, width)), num_folds)[parts]


def small_parts(graph: csr_array, num_rows: np.ndarray, fold_rows: float, seed: int) -> np.ndarray:
    """Number the connected components of the graph of similar prompts, and cut large ones into parts.

    A part has at most a fifth of a fold's rows. If more than MOST_LEAKED of a component's rows would then have a
    similar prompt in another part, its parts may have half a fold's rows, or a whole fold's.

    Args:
        graph: as of `similarity_graph`.
        num_rows: int [prompts].
        fold_rows: rows of an even fold.
        seed: of METIS.
    Returns: int [prompts], from 0, without gaps. Sizes are approximate (METIS), and one prompt may have more rows.
    """
    parts = connected_components(graph, directed=False)[1].astype(np.int64)
    rows, next_part = np.bincount(parts, num_rows), int(parts.max()) + 1
    for component in np.flatnonzero((rows > fold_rows / PARTS_PER_FOLD) & (np.bincount(parts) > 1)):
        members = np.flatnonzero(parts == component)
        inner, weights = graph[members][:, members], num_rows[members]
        for parts_per_fold in (PARTS_PER_FOLD, 2, 1):
            count = min(len(members), int(np.ceil(rows[component] / fold_rows * parts_per_fold)))
            cuts = (cut_graph(inner, weights, count, seed, recursive) for recursive in (False, True))
            cut = next((cut for cut in cuts if len(np.unique(cut)) == count), np.arange(len(members)))  # none is empty
            first, second = inner.nonzero()
            leaked = np.unique(first[cut[first] != cut[second]])
            if weights[leaked].sum() <= MOST_LEAKED * rows[component]:
                break
        parts[members] = next_part + cut
        next_part += int(cut.max()) + 1
    return np.unique(parts, return_inverse=True)[1]


def deal_parts(rows: csr_array, num_folds: int) -> np.ndarray:
    """Deal parts to folds, the largest first, each to the fold where that makes the folds most even.

    This minimises the sum over columns of (rows in the fold - rows in an even fold)^2 / rows in all folds, much as
    scikit-learn's StratifiedGroupKFold does for classes. Empty folds are filled first.

    Args:
        rows: [parts, 1 + classes]: all rows of each part, then its rows of each source and each topic.
    Returns: int8 [parts].
    """
    totals = np.asarray(rows.sum(axis=0)).ravel()
    weights = 1 / np.maximum(totals, 1)
    weights[0] *= SIZE_WEIGHT
    missing = np.tile(totals / num_folds, (num_folds, 1))
    folds = np.empty(rows.shape[0], np.int8)
    for part in np.argsort(-rows[:, [0]].toarray()[:, 0], kind="stable"):
        entries = slice(rows.indptr[part], rows.indptr[part + 1])
        columns, added = rows.indices[entries], rows.data[entries]
        folds[part] = np.argmin((added - 2 * missing[:, columns]) @ (weights[columns] * added))
        missing[folds[part], columns] -= added
    return folds
