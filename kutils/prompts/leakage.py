"""Reports how many similar prompts are in different folds, and how much folds differ in sources and topics."""

from collections.abc import Mapping

import numpy as np

from kutils.prompts.partition import groups_by_components, leaked_prompts
from kutils.prompts.similarity import SimilarPairs

STRATA = ("source", "topic")  # properties of prompts that should be balanced over folds
LARGE_LEAK = 0.25  # share of leaked prompts from which the report warns


def leakage_report(
    folds: np.ndarray,
    num_rows: np.ndarray,
    pairs: SimilarPairs,
    num_folds: int,
    strata: Mapping[str, np.ndarray] | None = None,
) -> dict:
    """Count fold sizes, similar pairs, and the prompts that have a similar one in another fold.

    Args:
        folds: int8 [prompts].
        num_rows: int [prompts], rows of the data sets that hold the prompt.
        strata: name -> int [prompts], such as the `source` of each; folds get a `source_distance`, see `distances`.
    Returns: numbers ready for JSON; every `_share` is a share of prompts, except `rows_share` and `edges_cut_share`.
    """
    num_prompts, num_edges = len(folds), len(pairs.first)
    leaked = leaked_prompts(folds, pairs)
    has_neighbour = np.zeros(num_prompts, bool)
    has_neighbour[pairs.first] = has_neighbour[pairs.second] = True
    edges_cut = int((folds[pairs.first] != folds[pairs.second]).sum())
    largest = float(np.bincount(groups_by_components(num_prompts, pairs), num_rows).max() / num_rows.sum())
    apart = {f"{name}_distance": distances(folds, num_rows, of, num_folds) for name, of in (strata or {}).items()}
    per_fold = []
    for fold in range(num_folds):
        here = folds == fold
        rows = int(num_rows[here].sum())
        per_fold.append(
            {
                "fold": fold,
                "rows": rows,
                "rows_share": rows / int(num_rows.sum()),
                "prompts": int(here.sum()),
                "leaked": int(leaked[here].sum()),
                "leaked_share": float(leaked[here].mean()) if here.any() else 0.0,
                **{name: float(values[fold]) for name, values in apart.items()},
            }
        )
    return {
        "rows": int(num_rows.sum()),
        "prompts": num_prompts,
        "edges": num_edges,
        "edges_cut": edges_cut,
        "edges_cut_share": edges_cut / num_edges if num_edges else 0.0,
        "neighbour_share": float(has_neighbour.mean()),
        "leaked_share": float(leaked.mean()),
        "largest_component_rows_share": largest,
        "folds": per_fold,
    }


def distances(folds: np.ndarray, num_rows: np.ndarray, stratum: np.ndarray, num_folds: int) -> np.ndarray:
    """The total variation distance (0 to 1) between the sources, or topics, of each fold and those of all rows.

    It is the share of a fold's rows that would need another source (or topic) for the fold to be like all rows.

    Args:
        stratum: int [prompts], from 0: the source or topic of each prompt.
    Returns: float64 [num_folds]; 0 for a fold without rows.
    """
    width = int(stratum.max()) + 1
    rows = np.bincount(folds.astype(np.int64) * width + stratum, num_rows, num_folds * width).reshape(num_folds, width)
    shares = rows / np.maximum(rows.sum(axis=1, keepdims=True), 1)
    return np.where(rows.any(axis=1), np.abs(shares - rows.sum(axis=0) / rows.sum()).sum(axis=1) / 2, 0)


def report_warnings(report: dict) -> list[str]:
    """Messages about folds that are uneven or leak much."""
    messages = []
    num_folds, largest = len(report["folds"]), report["largest_component_rows_share"]
    if largest > 1.2 / num_folds:
        messages.append(
            f"the largest connected component holds {largest:.1%} of the rows: folds by components would be uneven"
        )
    shares = [fold["rows_share"] * num_folds for fold in report["folds"]]
    if min(shares) < 0.8 or max(shares) > 1.2:
        messages.append(f"fold sizes are uneven: {min(shares):.2f} to {max(shares):.2f} of their mean")
    if report["leaked_share"] > LARGE_LEAK:
        messages.append(
            f"{report['leaked_share']:.1%} of the prompts have a similar one in another fold: look at the cosine on "
            "clean rows, the one on all rows flatters"
        )
    return messages


def format_leakage(report: dict) -> str:
    """The report as lines to print."""
    lines = [
        f"{report['rows']:,} rows, {report['prompts']:,} distinct prompts; folds by {report['method']} at cosine "
        f">= {report['threshold']:g}",
        f"{report['edges']:,} similar pairs, {report['edges_cut_share']:.1%} of them across folds",
        f"{report['neighbour_share']:.1%} of the prompts have a similar one, {report['leaked_share']:.1%} have one in "
        "another fold",
        f"largest connected component: {report['largest_component_rows_share']:.1%} of the rows",
    ]
    names = {f"{name}_distance": f"{name}s" for name in STRATA if f"{name}_distance" in report["folds"][0]}
    if names:  # reports of earlier versions have none
        what = " and ".join(names.values())
        lines.append(f"{what}: total variation distance between each fold and all rows")
    heads = "".join(f"{name:>9}" for name in names.values())
    lines.append(f"{'fold':>6}{'rows':>12}{'share':>8}{'prompts':>12}{'leaked':>8}{heads}")
    for fold in report["folds"]:
        lines.append(
            f"{fold['fold']:>6}{fold['rows']:>12,}{fold['rows_share']:>8.1%}{fold['prompts']:>12,}"
            f"{fold['leaked_share']:>8.1%}" + "".join(f"{fold[name]:>9.1%}" for name in names)
        )
    return "\n".join(lines + [f"warning: {text}" for text in report["warnings"]])
