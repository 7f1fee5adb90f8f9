"""Reads the saved state of an interrupted run, and checks that it belongs to what is trained now."""

import os
import time
from pathlib import Path

import torch

from kutils.data import datasets
from kutils.models import checkpoints
from kutils.system.ranks import Ranks


def check_same_folder(folder: Path, ranks: Ranks) -> None:
    """Raise ValueError on every rank if nodes do not share the run folder: only one of them could resume."""
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:  # torchrun's number of nodes
        return
    mark = folder / ranks.gather_objects(f".shared-{os.getpid()}-{time.time_ns()}")[0]
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    ranks.barrier()
    blind = [rank for rank, sees in enumerate(ranks.gather_objects(mark.is_file())) if not sees]
    if ranks.is_main:
        mark.unlink()
    if blind:
        raise ValueError(
            f"ranks {', '.join(map(str, blind))} do not see what rank 0 writes to {folder}: the nodes must share "
            "working/runs and working/models, or be given such places by run_dir= and model_dir="
        )


def random_state(ranks: Ranks) -> dict:
    """torch's generators of this rank; augmentation and sampling need none, they are keyed by seed, epoch and row."""
    state = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return state


def load_resume(path: Path, network, optimizer, scaler, ranks: Ranks) -> dict:
    """Put a cut run's state back; returns epoch, step, best score and counts."""
    content = checkpoints.read(path)
    network.load_state_dict(content.pop("model"))
    optimizer.load_state_dict(content.pop("optimizer"))
    scaler.load_state_dict(content.pop("scaler"))
    random, world_size = content.pop("random"), content.pop("world_size")
    if world_size == ranks.world_size:
        torch.set_rng_state(random[ranks.rank]["cpu"])
        if ranks.device.type == "cuda" and "cuda" in random[ranks.rank]:
            torch.cuda.set_rng_state(random[ranks.rank]["cuda"], ranks.device)
    elif ranks.is_main:
        print(
            f"warning: cut with {world_size} ranks, going on with {ranks.world_size}: drop path is drawn anew",
            flush=True,
        )
    return content


def check_order(state: dict, data: datasets.PromptImages, ranks: Ranks) -> None:
    """Say so where images were packed, or unpacked, since a run was cut: the rest of its epoch has another order."""
    if state["block_rows"] != data.block_rows and ranks.is_main:
        print(
            "warning: images were packed or unpacked since the run was cut: in the epoch it goes on with, some prompts "
            "come twice and others not",
            flush=True,
        )
    state["block_rows"] = data.block_rows
