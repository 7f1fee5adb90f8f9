"""Trains one fold of a recipe: `kutils train --config conf/RECIPE.yaml --fold 0 [key=value ...]`.

Every rank runs this file (torchrun starts several). It reads from top to bottom: where the run stands, data, model,
optimiser, then epoch by epoch: train, evaluate, save.
"""

import argparse
import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.autograd.profiler import record_function
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from kutils.data import datasets, transforms, validation_check
from kutils.models import checkpoints, networks
from kutils.runs import finished, folders, recipes
from kutils.runs.recipes import Recipe
from kutils.system import children, devices, progress
from kutils.system.devices import device_name, machine_facts
from kutils.system.ranks import Ranks, join_ranks, leave_ranks
from kutils.training import engine, optimizers, out_of_fold, profiling
from kutils.training.loading import batch_split, check_bad_images, loader_options
from kutils.training.log_interval import Interval
from kutils.training.resume import check_order, check_same_folder, load_resume, random_state

POLL_SECONDS = 5.0  # between two looks for a signal: most of a cluster's grace period is left for saving
LOGGED = ("images_per_second", "data_wait", "gpu_memory_gb")  # of an interval; the last where there is a GPU


def train(recipe: Recipe, fold: int, ranks: Ranks, **origin) -> finished.RunResult:
    """Run or resume one fold; returns the result that is also written to the run folder's `result.json`.

    Args:
        origin: where the recipe is from (config, overrides), for `environment.json`.
    """
    started = time.monotonic()

    # ---------------------------------------------------------------- where the run stands
    folder, best_path, models_folder = recipe.run_folder(fold), recipe.checkpoint_path(fold), recipe.models_folder()
    last_path = recipe.checkpoint_path(fold, f"epoch{recipe.epochs}")
    if recipe.resume == "never" and ranks.is_main and (aside := folders.move_aside(folder, [best_path, last_path])):
        print(f"the former run is now {aside}", flush=True)
    ranks.barrier()
    check_same_folder(folder, ranks)
    folders.check_same_configuration(folder, recipe)
    folders.check_no_foreign_checkpoint(folder, best_path)
    if result := finished.read_result(folder):
        if ranks.is_main:
            print(f"already finished: {result.summary()}\n(resume=never trains it again)", flush=True)
            (folder / "resume.pt").unlink(missing_ok=True)  # of a run that was killed after its result
        return result

    # ---------------------------------------------------------------- data
    data = datasets.load_datasets(recipe.datasets)
    training_rows, validation_rows = data.training_rows(fold), data.validation_rows(fold)
    if not len(validation_rows) or not len(training_rows):
        have = sorted({int(value) for value in np.unique(data.folds)})
        raise datasets.DataError(f"fold {fold} leaves nothing to train or to validate on; the data holds folds {have}")
    local_batch_size, accumulation = batch_split(recipe, ranks.world_size)
    sampler = datasets.EpochSampler(
        data,
        training_rows,
        recipe.seed,
        global_batch_size=recipe.global_batch_size,
        local_batch_size=local_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        block_rows=data.block_rows,
    )
    training_loader = DataLoader(
        datasets.TrainingImages(data, training_rows, recipe),
        batch_sampler=sampler,
        persistent_workers=recipe.num_workers > 0,
        **loader_options(recipe, ranks),
    )
    validation_images = datasets.ValidationImages(data, validation_rows, recipe.input_size)
    # its processes are not kept: starting 8 takes 0.5 s per evaluation, and epochs of the large recipes take 5 minutes
    # and more; on 8 ranks they would hold 64 times 36 to 73 MB meanwhile
    validation_loader = DataLoader(
        validation_images,
        sampler=range(ranks.rank, len(validation_rows), ranks.world_size),
        batch_size=recipe.max_local_batch_size,
        **loader_options(recipe, ranks),
    )
    clean = None if data.clean is None else data.clean[validation_rows]
    baseline = data.mean_prompt_baseline(fold)

    # ---------------------------------------------------------------- model
    torch.manual_seed(recipe.seed)
    network = networks.build_model(recipe, pretrained=recipe.initialize_from is None)
    if initial := recipe.initial_checkpoint(fold):
        content = checkpoints.read(initial)
        if not checkpoints.check_folds(content, fold, data.folds_hashes, initial) and ranks.is_main:
            print(f"warning: {initial} does not say which fold it has not trained on: scores may flatter", flush=True)
        checkpoints.load_weights(network, content["model"], initial)
        del content
    network.to(ranks.device, memory_format=torch.channels_last)
    torch.manual_seed(recipe.seed + 1000 * ranks.rank)  # drop path differs between ranks
    dtype = devices.autocast_dtype(recipe.amp_dtype, ranks.device)

    # ---------------------------------------------------------------- optimiser
    optimizer = optimizers.build_optimizer(network, recipe)
    schedule = optimizers.build_schedule(optimizer, recipe, sampler.steps_per_epoch)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)

    # ---------------------------------------------------------------- before the first step
    weight_bytes = 4 * sum(parameter.numel() for parameter in network.parameters())
    folders.check_writable(best_path.parent, 3 * weight_bytes)
    folders.check_writable(
        folder.parent, 9 * weight_bytes
    )  # resume state: weights and three of MADGRAD's, twice for a moment
    resume_path = folder / "resume.pt"
    if not resume_path.is_file():
        validation_check.check_images(data, validation_rows, recipe.num_workers, ranks)
    ranks.barrier()
    state = {
        "epoch": 0,
        "step": 0,
        "best": -1.0,
        "best_epoch": 0,
        "best_clean": None,
        "seen": 0,
        "bad": [],
        "seconds": 0.0,
        "block_rows": data.block_rows,
    }
    if resume_path.is_file():
        state |= {"block_rows": 0} | load_resume(resume_path, network, optimizer, scaler, ranks)
        check_order(state, data, ranks)
    step, earlier_seconds = state["step"], state["seconds"]
    total_steps = recipe.epochs * sampler.steps_per_epoch
    if ranks.is_main:
        machine = machine_facts(ranks.device)
        facts = {"fold": fold, "ranks": ranks.world_size, "device": device_name(ranks.device), "dtype": str(dtype)}
        folders.start(folder, recipe, **origin, **facts, **machine)
        metrics, board = (
            folders.Metrics(folder / "metrics.jsonl", step, state["epoch"]),
            SummaryWriter(folder / "tensorboard", purge_step=step),
        )
        print(
            f"{recipe.prefix}, fold {fold}: {sampler.num_prompts:,} training prompts with {len(training_rows):,} "
            f"images, {len(validation_rows):,} validation images, mean-prompt baseline {baseline:.4f}\n"
            f"{recipe.epochs} epochs of {sampler.steps_per_epoch:,} updates of {recipe.global_batch_size} images = "
            f"{ranks.world_size} ranks x {local_batch_size} x {accumulation} accumulated, on "
            f"{device_name(ranks.device)} in {str(dtype).removeprefix('torch.')}"
            + (f"; going on after update {step:,}" if step else ""),
            flush=True,
        )
        shown = progress.Progress(total_steps, step, machine.get("gpu_gb"))

    def save_state(epoch: int) -> float:
        """Write all that the next start needs; returns when, for the clock of checkpoint_every_minutes."""
        random = ranks.gather_objects(random_state(ranks))
        if ranks.is_main:
            state.update(epoch=epoch, step=step, seconds=earlier_seconds + time.monotonic() - started)
            state.update(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), model=network.state_dict())
            checkpoints.save(resume_path, {**state, "random": random, "world_size": ranks.world_size})
        return time.monotonic()

    # ---------------------------------------------------------------- epochs
    log_interval = max(1, min(50, sampler.steps_per_epoch // 10))
    poll_interval = 1  # updates between two looks for a signal, as many as take about POLL_SECONDS
    stop_requested = watch_for_sigterm()
    saved_at = time.monotonic()
    profiler, data_wait = None, profiling.DataWait()
    if recipe.profile_steps and ranks.is_main:
        left = total_steps - step
        profiler = profiling.UpdateProfiler(folder, recipe.profile_steps, left, ranks.device, shown.say)
    compiled, first_epoch = recipe.compile, state["epoch"]
    for epoch in range(first_epoch, recipe.epochs):
        # ------------------------------------------------------------ train
        if epoch < recipe.freeze_epochs:
            network.freeze_backbone()
        else:
            network.unfreeze()
        model = engine.distribute(network, ranks).train()
        if compiled and epoch in (first_epoch, recipe.freeze_epochs):
            compiled = engine.compile_network(model, local_batch_size, recipe, dtype, ranks)
        sampler.set_epoch(epoch, first_step=step - epoch * sampler.steps_per_epoch)
        loader, interval, settled = iter(training_loader), Interval(ranks.device), False
        while step < (epoch + 1) * sampler.steps_per_epoch:
            with interval.waiting():
                local_batches = list(itertools.islice(loader, accumulation))
            schedule.step_update(step)
            loss = engine.update(model, local_batches, optimizer, scaler, recipe, dtype)
            interval.add(loss, local_batches)
            step += 1
            if profiler:
                profiler.step()
            last_of_epoch = step % sampler.steps_per_epoch == 0
            save_due = recipe.checkpoint_every_steps > 0 and step % recipe.checkpoint_every_steps == 0
            log_due = step % log_interval == 0 or last_of_epoch or save_due
            stop = too_long = False
            if log_due or step % poll_interval == 0:
                minutes = recipe.checkpoint_every_minutes
                minutes = min(minutes, 1.0) if last_of_epoch else minutes  # no signal is heard during an evaluation
                too_long = 0 < 60 * minutes < time.monotonic() - saved_at
                stop, too_long = ranks.any(stop_requested(), too_long)
            if not (log_due or stop or too_long):
                continue
            report = interval.close(ranks, step)
            poll_interval = max(1, int(POLL_SECONDS * report["updates_per_second"]))
            state["seen"] += report["images"]
            state["bad"] += report["bad"]
            check_bad_images(state["bad"], state["seen"], folder, data, ranks)
            if ranks.is_main:
                line = {"loss": report["loss"], "lr": optimizer.param_groups[0]["lr"]}
                line |= {name: report[name] for name in LOGGED if name in report}
                metrics.add(epoch=epoch + 1, step=step, **line)
                for name, value in line.items():
                    board.add_scalar(f"train/{name}", value, step)
                shown.show(step, f"epoch {epoch + 1}/{recipe.epochs}", line)
                if settled and (waiting := data_wait.add(report)):
                    shown.say(profiling.advice(recipe, waiting, machine["cores"], machine["ranks_per_machine"]))
            settled = True  # the first interval of an epoch waits for the loader to start
            if stop or too_long or (save_due and not last_of_epoch):
                saved_at = save_state(epoch)
            if stop:
                ranks.barrier()  # a rank that ended now would have torchrun kill the one that still writes
                raise ValueError(f"{children.STOPPED} after update {step}; the same command goes on from there")

        # ------------------------------------------------------------ evaluate
        try:
            with record_function(profiling.EVALUATION):
                found = engine.evaluate(network, validation_loader, recipe, dtype, ranks, total=len(validation_rows))
        except transforms.ImageError as error:
            validation_check.forget_checked(data, validation_rows)
            reason = (
                str(error).splitlines()[-1].removeprefix("kutils.data.transforms.ImageError: ")
            )  # of a worker's traceback
            raise ValueError(
                f"a validation image was in order when it was checked, and is not any more: {reason}; put it back, and "
                "the same command goes on"
            ) from error
        score = engine.mean(found.cosines)
        clean_score = None if clean is None else engine.mean(found.cosines, clean)
        if not np.isfinite(score):
            raise ValueError(
                f"the validation cosine after epoch {epoch + 1} is {score}; the best checkpoint is untouched"
            )

        # ------------------------------------------------------------ log, save
        facts = {"fold": fold, "folds_hashes": data.folds_hashes, "epoch": epoch + 1, "cosine_similarity": score}
        if ranks.is_main:
            metrics.add(epoch=epoch + 1, step=step, cosine_similarity=score, cosine_similarity_clean=clean_score)
            board.add_scalar("validation/cosine_similarity", score, step)
            shown.say(f"epoch {epoch + 1}/{recipe.epochs}: validation cosine {score:.4f}")
            if score > state["best"]:
                checkpoints.save_checkpoint(best_path, network, recipe, **facts)
            if epoch + 1 == recipe.epochs:
                checkpoints.save_checkpoint(last_path, network, recipe, **facts)
        if score > state["best"]:
            state.update(best=score, best_epoch=epoch + 1, best_clean=clean_score)
            origin = {"fold": fold, "prefix": recipe.prefix, "checkpoint": str(best_path.relative_to(models_folder))}
            path = out_of_fold.predictions_path(folder, fold)
            out_of_fold.save_predictions(path, data, validation_rows, found.embeddings, ranks, **origin)
        saved_at = save_state(epoch + 1)

    # ---------------------------------------------------------------- result
    result = finished.RunResult(
        prefix=recipe.prefix,
        fold=fold,
        cosine_similarity=state["best"],
        cosine_similarity_clean=state["best_clean"],
        best_epoch=state["best_epoch"],
        epochs=recipe.epochs,
        mean_prompt_baseline=baseline,
        validation_rows=len(validation_rows),
        clean_rows=None if clean is None else int(clean.sum()),
        unreadable_images=len({row for row, _ in state["bad"]}),
        updates=total_steps,
        seconds=earlier_seconds + time.monotonic() - started,
        checkpoint=str(best_path.relative_to(models_folder)),
    )
    if ranks.is_main:
        board.close()
        shown.close()
        result.write(folder)
        resume_path.unlink()  # four times the size of the checkpoint, and of no more use
        print(f"finished: {result.summary()}\nsaved {best_path}", flush=True)
    ranks.barrier()
    return result


def watch_for_sigterm():
    """Turn SIGTERM into a question that is asked between two updates, where the state can be saved."""
    received = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    return lambda: bool(received)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kutils train",
        description="Train one fold of a recipe, alone or as a rank of torchrun. Run again, it goes on after a cut.",
        epilog=f"keys of a recipe, for key=value:\n{recipes.describe_keys()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="recipe file, as given or below the repository's conf/")
    parser.add_argument("--fold", required=True, type=int, choices=range(10), help="validation fold")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to change for this run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, when_finished: Callable[[Path], object] | None = None) -> int:
    """Train as the arguments say; `when_finished` is called with the run's folder, in the main rank alone."""
    arguments = parse_arguments(argv)
    # torchrun and job systems signal a rank's whole process group: its data loaders would end, and the rank with them
    # before it has saved
    os.register_at_fork(after_in_child=os.setpgrp)
    recipe = recipes.load_recipe(arguments.config, arguments.overrides)
    path = finished.shown_path(recipes.find_config(arguments.config))
    ranks = join_ranks(recipe.device)
    train(recipe, arguments.fold, ranks, config=str(path), overrides=arguments.overrides)
    leave_ranks()
    if ranks.is_main and when_finished:  # the others need not wait
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing looks for `watch_for_sigterm`'s signal any more
        when_finished(recipe.run_folder(arguments.fold))
    return 0
