"""Measures the search for similar pairs and nearest prompts, compared with FAISS, and what folds leak."""

import importlib.util
import tempfile
import time
from pathlib import Path

import numpy as np

from kutils.benchmarks import measuring
from kutils.data import prompt_bank
from kutils.data.prompt_bank import PromptBank
from kutils.prompts import embedding, fold_methods, grammar, partition
from kutils.prompts.similarity import BLOCK_ROWS, SimilarPairs, share_strips, similar_pairs, strip_path
from kutils.system import paths
from kutils.system.devices import pick_device
from kutils.system.ranks import Ranks
from kutils.system.tables import read_table, write_table

THRESHOLD = 0.7  # of the published folds
SIZES = (15_000, 30_000, 60_000, 120_000, 240_000)  # prompts
GROWN = (*SIZES, 1_000_000, 3_400_000)  # prompts; those beyond the given ones are made of them
GROWN_BLOCKS = 1750  # that are searched of so many prompts: all of 240,000, a 17th of 1 M, a 200th of 3.4 M
COMPARED = 60_000  # prompts at most that FAISS searches, in 13 s on two cores; twice as many would take four times that
NUM_FOLDS = 10
NEIGHBOURS = 10


def embedded_prompts(prompts_path: str, count: int) -> tuple[list[str], np.ndarray]:
    """Prompts to measure with and their embeddings: float32 [n, 384], n up to `count`, in random order.

    Args:
        prompts_path: a prompts file; "" takes `count` prompts from the grammar. They are embedded in bfloat16 where
            that has not been done.
    """
    path = Path(prompts_path)
    if not prompts_path:
        path = paths.working_dir() / "benchmark" / f"prompts_{count}.tsv"
        texts = grammar.compose_prompts(count, seed=0)
        write_table(path, {"prompt": texts, "source": ["templates"] * len(texts)})
    embeddings = np.load(embedding.embed_table(path, dtype="bfloat16"), mmap_mode="r")
    rows = np.random.default_rng(0).permutation(len(embeddings))[:count]
    return read_table(path, ["prompt"])["prompt"].take(rows).to_pylist(), embeddings[rows]


def time_pairs(embeddings: np.ndarray, dtype: str, threshold: float = THRESHOLD) -> tuple[float, SimilarPairs]:
    """Seconds, and the pairs."""
    began = time.monotonic()
    pairs = similar_pairs(embeddings, threshold, dtype=dtype, progress=True)
    return time.monotonic() - began, pairs


def time_faiss(embeddings: np.ndarray, threshold: float = THRESHOLD) -> tuple[float, int]:
    """Seconds of FAISS's exact range search of all rows among all, by the CPU, and the number of pairs."""
    import faiss

    began = time.monotonic()
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings)
    _, _, hits = index.range_search(embeddings, threshold)
    return time.monotonic() - began, (len(hits) - len(embeddings)) // 2  # each pair twice, and each row with itself


def measure_similar_pairs(embeddings: np.ndarray, repeats: int = 3) -> list[measuring.Entry]:
    """Seconds for all pairs at 0.7 and 0.9 among growing numbers of prompts, beside FAISS; growth at 0.7; the memory.

    The memory is what is held at most beyond a copy of the embeddings and the pairs.

    Args:
        embeddings: float32 [n, 384]; SIZES beyond n are left out.
    """
    sizes = [size for size in SIZES if size <= len(embeddings)] or [len(embeddings)]
    has_faiss = importlib.util.find_spec("faiss") is not None
    if not has_faiss:
        print("faiss is not installed, so that there is nothing to compare with: pip install faiss-cpu", flush=True)
    entries, seconds = [], []
    time_pairs(embeddings[:2000], "auto")  # threads and libraries are there from now on
    for size in sizes:
        rows = embeddings[:size]
        ways = {"": ("auto", THRESHOLD), "_float32": ("float32", THRESHOLD), "_at_0.9": ("auto", 0.9)}
        ours: dict[str, list[float]] = {name: [] for name in ways}
        theirs: dict[float, list[float]] = {threshold: [] for _, threshold in ways.values()}
        for _ in range(repeats):
            for name, (dtype, threshold) in ways.items():
                took, pairs = time_pairs(rows, dtype, threshold)
                ours[name].append(took)
                if has_faiss and size <= COMPARED and dtype == "auto":
                    took, count = time_faiss(rows, threshold)
                    theirs[threshold].append(took)
                    # its float32 errs
                    assert abs(count - len(pairs.first)) <= max(2, 1e-5 * count), "FAISS finds other pairs"
        for name, (_, threshold) in ways.items():
            entries.append(measuring.make_entry(f"similar_pairs_{size}{name}", "s", ours[name], theirs[threshold]))
        entries.append(measuring.make_entry(f"similar_pairs_{size}_memory", "MB", [extra_megabytes(rows)]))
        seconds.append(entries[-4].ours)
    if len(sizes) > 1:
        exponent = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        entries.append(measuring.make_entry("similar_pairs_exponent", "", [exponent]))
    return entries


class LoneRank(Ranks):
    """One of many ranks, which searches its own blocks and waits for no other."""

    def barrier(self) -> None:
        pass

    def gather_objects(self, value) -> list:
        return [value]


def measure_growth(embeddings: np.ndarray) -> list[measuring.Entry]:
    """CPU seconds for all pairs at 0.7 among up to 3.4 M prompts; of many, a share of the blocks is searched.

    The rows beyond the given ones lie half-way between two of them. Measured once: ten minutes of two cores, 5 GB of
    disk and 12 GB of memory.

    Args:
        embeddings: float32 [n, 384].
    """
    entries, path = [], paths.working_dir() / "benchmark" / "grown.npy"
    time_pairs(embeddings[:2000], "auto")  # threads and libraries are there from now on
    for count in GROWN:
        with paths.atomic_path(path) as temporary:
            write_grown(temporary, embeddings, count)
        rows = np.load(path, mmap_mode="r")
        blocks = (count / BLOCK_ROWS["cpu"]) ** 2 / 2
        seconds, share = time_share(rows, max(1, round(blocks / GROWN_BLOCKS)))
        name = f"similar_pairs_grown_{count}"
        entries.append(measuring.make_entry(name, "CPU s", [seconds]))
        entries.append(measuring.make_entry(f"{name}_searched", "% of blocks", [100 * share]))
        path.unlink()
    return entries


def write_grown(path: Path, embeddings: np.ndarray, count: int) -> None:
    """An .npy file of `count` rows: the given ones, and then such that lie half-way between two of them."""
    random = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (count, embeddings.shape[1]))
    rows[: len(embeddings)] = embeddings[:count]
    for start in range(len(embeddings), count, prompt_bank.BLOCK_PROMPTS):
        block = rows[start : start + prompt_bank.BLOCK_PROMPTS]
        one, other = random.integers(0, len(embeddings), (2, len(block)))
        block[:] = embeddings[one] + embeddings[other]
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    rows.flush()


def time_share(rows: np.ndarray, shares: int) -> tuple[float, float]:
    """CPU seconds for all pairs at 0.7, by a search of one of so many shares of the blocks, and the share searched.

    What is done for all rows before, as copying them, is measured by a search of which everything has been done.
    """
    if shares == 1:
        began = time.process_time()
        time_pairs(rows, "auto")
        return time.process_time() - began, 1.0
    ranks, tops = LoneRank(1, shares, pick_device("cpu")), np.arange(0, len(rows), BLOCK_ROWS["cpu"])
    own = np.array(share_strips(tops.tolist(), ranks))
    searched = float((len(rows) - own).sum() / (len(rows) - tops).sum())
    with tempfile.TemporaryDirectory(dir=paths.working_dir()) as folder:
        times = [time.process_time()]
        for _ in range(2):
            similar_pairs(rows, THRESHOLD, ranks=ranks, folder=Path(folder), progress=True)
            times.append(time.process_time())
            for top in tops:
                strip_path(Path(folder), int(top), BLOCK_ROWS["cpu"]).touch()
    whole, before = np.diff(times)
    return before + (whole - before) / searched, searched


def extra_megabytes(embeddings: np.ndarray) -> float:
    """`measure_memory` in a process of its own, in which nothing is left from earlier searches."""
    npy_path = paths.working_dir() / "benchmark" / "similar_pairs.npy"
    with paths.atomic_path(npy_path) as temporary:
        np.save(temporary, embeddings)
    measured = measuring.in_child(measure_memory, str(npy_path))["megabytes"]
    npy_path.unlink()
    return measured


def measure_memory(npy_path: str) -> dict[str, float]:
    """The most memory of a search beyond a copy of the embeddings and the pairs, MB."""
    embeddings = np.load(npy_path, mmap_mode="r")
    similar_pairs(embeddings[:64], THRESHOLD)  # threads and libraries are there from now on
    with measuring.peak_megabytes() as peak:
        before = peak[0]
        pairs = similar_pairs(embeddings, THRESHOLD)
    copies = embeddings.size * 4 + 2 * sum(column.nbytes for column in pairs)  # pairs: strips, and joined
    return {"megabytes": peak[0] - before - copies / 1e6}


def measure_nearest(count: int = 1_000_000, repeats: int = 3) -> list[measuring.Entry]:
    """Seconds for the ten nearest of random prompts to one embedding, and to 256, beside FAISS's exact search.

    Of a mapped file in memory; and once from a file that has to be read first, where FAISS reads it and adds its rows.
    It takes 1.9 GB of disk per million, and as much memory.
    """
    folder = paths.working_dir() / "benchmark" / "nearest_prompts"
    path = folder / "bank.arrow"
    write_random_bank(path, count)
    queries = PromptBank.load(path).vectors(np.linspace(0, count - 1, 256, dtype=int))
    ours: dict[str, list[float]] = {"first": [], "1": [], "256": []}
    theirs: dict[str, list[float]] = {"first": [], "1": [], "256": []}
    for _ in range(repeats):
        for times, search in ((ours, search_bank), (theirs, search_faiss)):
            if search is search_faiss and importlib.util.find_spec("faiss") is None:
                continue
            measuring.forget_files(folder)
            indices, seconds = search(path, queries)
            for name, took in zip(times, seconds, strict=True):
                times[name].append(took)
            assert np.array_equal(indices[:, 0], np.linspace(0, count - 1, 256, dtype=int)), "others are nearer"
    path.unlink()
    name = f"nearest_prompts_{count}"
    return [
        measuring.make_entry(name, "s", ours["1"], theirs["1"]),
        measuring.make_entry(f"{name}_first", "s", ours["first"], theirs["first"]),
        measuring.make_entry(f"{name}_256_queries", "s", ours["256"], theirs["256"]),
    ]


def write_random_bank(path: Path, count: int) -> None:
    """A bank of random unit rows, which have as much of their length along few axes as embeddings of real prompts."""
    random, rows = np.random.default_rng(0), np.empty((count, 384), np.float32)
    for start in range(0, count, prompt_bank.BLOCK_PROMPTS):
        block = rows[start : start + prompt_bank.BLOCK_PROMPTS]
        block[:] = random.standard_normal(block.shape, np.float32) / np.sqrt(np.arange(1, 385, dtype=np.float32))
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    PromptBank([f"{number:09d}, oil on canvas, highly detailed" for number in range(count)], rows).save(path)


def search_bank(path: Path, queries: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """The nearest prompts, and seconds: of opening and the first look-up, of one more, and of all queries."""
    began = time.monotonic()
    bank = PromptBank.load(path)
    times = [began]
    for some in (queries[:1], queries[-1:], queries):
        indices, _ = bank.nearest(some, NEIGHBOURS)
        times.append(time.monotonic())
    return indices, np.diff(times).tolist()


def search_faiss(path: Path, queries: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """The same by FAISS, which holds its rows in memory."""
    import faiss

    began = time.monotonic()
    index = faiss.IndexFlatIP(queries.shape[1])
    for _, block in PromptBank.load(path).blocks():
        index.add(block.numpy())
    times = [began]
    for some in (queries[:1], queries[-1:], queries):
        _, indices = index.search(some, NEIGHBOURS)
        times.append(time.monotonic())
    return indices, np.diff(times).tolist()


def measure_fused(embeddings: np.ndarray, device: str) -> measuring.Entry:
    """Seconds for all pairs on a GPU if products are compared in the kernel that makes them, beside apart."""
    similar_pairs(embeddings, THRESHOLD, device=device, fused=True)  # compiles
    seconds: dict[bool, list[float]] = {True: [], False: []}
    pairs = {}
    for fused in (True, False) * 2:
        began = time.monotonic()
        pairs[fused] = similar_pairs(embeddings, THRESHOLD, device=device, fused=fused)
        seconds[fused].append(time.monotonic() - began)
    if not np.array_equal(pairs[True], pairs[False]):
        raise ValueError("the fused comparison finds other pairs")
    return measuring.make_entry("similar_pairs_fused", "s, beside apart", seconds[True], seconds[False])


def measure_leakage(embeddings: np.ndarray, repeats: int = 3) -> list[measuring.Entry]:
    """What ten folds of up to 60,000 prompts leak, by partition and beside leader groups and random rows; seconds."""
    rows = embeddings[:COMPARED]
    _, pairs = time_pairs(rows, "auto")
    num_rows = np.ones(len(rows), np.int64)
    seconds, leaked = [], {}
    for _ in range(repeats):
        began = time.monotonic()
        folds = fold_methods.assign(num_rows, pairs, NUM_FOLDS, "partition", seed=0)
        seconds.append(time.monotonic() - began)
    assignments = {
        "partition": folds,
        "leader": fold_methods.assign(num_rows, pairs, NUM_FOLDS, "leader", seed=0),
        "random": np.random.default_rng(0).permutation(len(rows)) % NUM_FOLDS,
    }
    for method, assigned in assignments.items():
        leaked[method] = 100 * float(partition.leaked_prompts(assigned, pairs).mean())
    sizes = 100 * np.bincount(folds, minlength=NUM_FOLDS) / len(rows)
    name = f"folds_{len(rows)}"
    return [
        measuring.make_entry(name, "s", seconds),
        measuring.make_entry(f"{name}_smallest", "% of prompts", [sizes.min()]),
        measuring.make_entry(f"{name}_largest", "% of prompts", [sizes.max()]),
        measuring.make_entry(f"{name}_leaked_beside_leader", "% of prompts", [leaked["partition"]], [leaked["leader"]]),
        measuring.make_entry(f"{name}_leaked_beside_random", "% of prompts", [leaked["partition"]], [leaked["random"]]),
    ]
