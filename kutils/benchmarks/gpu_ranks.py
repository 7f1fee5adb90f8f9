"""Measures training on several GPUs for `kutils gpu-check`: SAM of both kinds, and scaling from one GPU to all."""

import dataclasses
import multiprocessing
import os
import socket
import time
from collections.abc import Iterator

from kutils.benchmarks import measuring, step
from kutils.benchmarks.gpu_report import Setting, Skipped
from kutils.benchmarks.gpu_training import build_step, untrained_recipe
from kutils.system import children
from kutils.system.ranks import join_ranks, leave_ranks
from kutils.training import engine

RANK_UPDATES = 10  # that all ranks time together


def several_gpus(setting: Setting) -> Iterator:
    """Updates on one rank and on all: plain, SAM by each rank's own gradient, SAM by the average."""
    world_size = 2 if setting.device == "cpu" else setting.gpus
    if world_size < 2:
        raise Skipped("one GPU")
    rates = {}
    for size in (1, world_size):
        rates[size] = on_ranks(setting, size)
    for name, rate in rates[world_size].items():
        yield measuring.make_entry(f"ranks_{world_size}_{name}", "images/s", [rate])
        scaling = 100 * rate / (world_size * rates[1][name])
        yield measuring.make_entry(f"scaling_{world_size}_{name}", "% of as many times one GPU", [scaling])


def on_ranks(setting: Setting, world_size: int) -> dict[str, float]:
    """Images per second of all ranks by kind of update. Ranks are forked: CUDA has not started in this process."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with socket.socket() as reserved:  # else another process may be given the port before rank 0 listens
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        arguments = (world_size, reserved.getsockname()[1], setting, results)
        ranks = [context.Process(target=work_as_rank, args=(rank, *arguments)) for rank in range(world_size)]
        for rank in ranks:
            rank.daemon = True
            rank.start()
        while any(rank.exitcode is None for rank in ranks) and not any(rank.exitcode for rank in ranks):
            time.sleep(0.1)
    failed = [number for number, rank in enumerate(ranks) if rank.exitcode]
    for rank in ranks:
        rank.kill()  # those that wait for one that failed
    if failed:
        raise ValueError(f"rank {failed[0]} of {world_size} failed; the log says why")
    return results.get()


def work_as_rank(rank: int, world_size: int, port: int, setting: Setting, results) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    children.end_with_parent()
    ranks = join_ranks(setting.device)
    recipe = untrained_recipe("convnext_large", 1, setting)
    ours, batch = build_step(recipe, ranks.device), step.random_batch(recipe, ranks.device, seed=rank)
    model, rates = engine.distribute(ours.network, ranks).train(), {}
    kinds = {"plain": {}, "sam_local": {"sam_rho": step.RHO}, "sam_averaged": {"sam_rho": step.RHO}}
    kinds["sam_averaged"] |= {"sam_gradient": "averaged"}
    for name, changes in kinds.items():
        changed = dataclasses.replace(recipe, **changes)

        def update(changed=changed) -> None:
            engine.update(model, [batch], ours.optimizer, ours.scaler, changed, ours.dtype)

        measuring.timed(update, 2, ranks.device)
        ranks.barrier()
        seconds = measuring.timed(update, 1 if setting.tiny else RANK_UPDATES, ranks.device)
        rates[name] = world_size * recipe.max_local_batch_size / max(ranks.gather_objects(seconds))
        sums = ranks.gather_vectors(ours.network.fc.weight.detach().sum(dim=1))
        if not (sums == sums[0]).all():
            raise ValueError(f"after updates ({name}) the ranks have other weights")
    if ranks.is_main:
        results.put(rates)
    leave_ranks()
