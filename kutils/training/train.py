"""Trains one fold of a recipe: `kutils train --config conf/RECIPE.yaml --fold 0 [key=value ...]`.

Every rank runs this file (torchrun starts several). From top to bottom: saved state, data, model, optimiser, then for
each epoch: update, log, save, evaluate, publish.
"""

import argparse
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kutils.data import datasets, validation_check
from kutils.data.datasets import PromptImages
from kutils.data.sampler import EpochSampler
from kutils.models import checkpoints, networks, positions
from kutils.models.networks import PromptEmbedder
from kutils.runs import finished, folders, launch, recipes
from kutils.runs.finished import RunResult
from kutils.runs.published_names import RecipeParser
from kutils.runs.recipes import Recipe
from kutils.system import children, devices, locks
from kutils.system.ranks import Ranks, join_ranks, leave_ranks
from kutils.training import (
    averaging,
    engine,
    loading,
    optimizers,
    out_of_fold,
    profiling,
    resume,
    ridge_head,
    validation,
)
from kutils.training.clock import Clock
from kutils.training.log import RunLog
from kutils.training.meter import Meter


def train(recipe: Recipe, fold: int, ranks: Ranks, **origin) -> RunResult:
    """Run or resume one fold; returns the result that is also written to the run folder's `result.json`.

    Args:
        origin: config and overrides of the recipe, for `environment.json`.
    """
    state, folder, best_path = resume.State(), recipe.run_folder(fold), recipe.checkpoint_path(fold)
    if result := resume.check_start(recipe, fold, ranks):
        return result

    # ---------------------------------------------------------------- data
    data = datasets.load_datasets(recipe.datasets)
    training_rows, validation_rows = loading.split_rows(data, fold)
    local_batch_size, accumulation = loading.batch_split(recipe, ranks.world_size)
    sampler = EpochSampler(
        data,
        training_rows,
        recipe.seed,
        global_batch_size=recipe.global_batch_size,
        local_batch_size=local_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        block_rows=data.block_rows,
    )
    training_loader = loading.training_loader(data, training_rows, sampler, recipe, ranks)
    validation_loader = loading.validation_loader(data, validation_rows, recipe, ranks)
    clean = None if data.clean is None else data.clean[validation_rows]
    baseline = data.mean_prompt_baseline(fold)

    # ---------------------------------------------------------------- model
    torch.manual_seed(recipe.seed)
    network = networks.build_model(recipe, pretrained=recipe.initialize_from is None)
    load_initial_weights(network, recipe, fold, data, ranks)
    network.to(ranks.device, memory_format=torch.channels_last)
    torch.manual_seed(recipe.seed + 1000 * ranks.rank)  # drop path differs between ranks
    dtype = devices.autocast_dtype(recipe.amp_dtype, ranks.device)

    # ---------------------------------------------------------------- optimiser
    optimizer = optimizers.build_optimizer(network, recipe)
    schedule = optimizers.build_schedule(optimizer, recipe, sampler.steps_per_epoch)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)
    average = averaging.start_average(network, recipe)

    # ---------------------------------------------------------------- before the first update
    check_space(recipe, fold, network)
    resume_file = resume.ResumeFile(folder, network, optimizer, scaler, ranks, average)
    is_resumed = resume_file.exists()
    if not is_resumed:
        validation_check.check_validation_images(data, validation_rows, recipe.num_workers, ranks)
    ranks.barrier()
    resume_file.load(state, data, recipe)
    total_steps = recipe.epochs * sampler.steps_per_epoch
    device_name = devices.device_name(ranks.device)
    if ranks.is_main:
        facts = {"fold": fold, "ranks": ranks.world_size, "device": device_name, "dtype": str(dtype)}
        folders.start(folder, recipe, **origin, **facts, **devices.machine_facts(ranks.device))
    log = RunLog(folder, recipe, state, total_steps, ranks)
    log.say(
        f"{recipe.prefix}, fold {fold}: {sampler.num_prompts:,} training prompts with {len(training_rows):,} images, "
        f"{len(validation_rows):,} validation images, mean-prompt baseline {baseline:.4f}\n"
        f"{recipe.epochs} epochs of {sampler.steps_per_epoch:,} updates of {recipe.global_batch_size} images = "
        f"{ranks.world_size} ranks x {local_batch_size} x {accumulation} accumulated, on {device_name} in "
        f"{str(dtype).removeprefix('torch.')}"
        + (f"; going on after update {state.step:,}" if state.step else "")
        + loading.describe_sam(recipe, local_batch_size)
    )
    if recipe.head_init == "ridge" and not is_resumed:
        fit = ridge_head.fit_head(network, data, training_rows, fold, recipe, dtype, ranks)
        state.seen, state.bad = fit.images, fit.bad
        loading.check_bad_images(state.bad, state.seen, folder, data, ranks, new=len(fit.bad))
        with torch.no_grad():
            network.last_linear.weight.copy_(fit.weight)
        log.say(
            f"head in closed form from {fit.images:,} images: penalty {fit.penalty:.3g}, cosine {fit.cosine:.4f} on "
            "held-out training prompts"
        )
        resume_file.save(state)  # so that an interrupted run does not repeat the pass
    num_profiled = recipe.profile_steps if ranks.is_main else 0
    profiler = profiling.UpdateProfiler(folder, num_profiled, total_steps - state.step, ranks.device, log.say)
    clock = Clock(recipe, sampler.steps_per_epoch)

    # ---------------------------------------------------------------- epochs
    first_epoch, compiles = state.epoch, recipe.compile
    for epoch in range(first_epoch, recipe.epochs):
        if epoch < recipe.freeze_epochs:
            network.freeze_backbone()
        else:
            network.unfreeze()
        model = engine.distribute(network, ranks).train()
        if compiles and epoch in (first_epoch, recipe.freeze_epochs):  # unfreezing changes the graph
            compiles = engine.compile_network(model, local_batch_size, recipe, dtype, ranks)
        meter = Meter(ranks.device)
        for local_batches in loading.updates(training_loader, epoch, state.step, accumulation, meter):
            schedule.step_update(state.step)
            loss = engine.update(model, local_batches, optimizer, scaler, recipe, dtype)
            meter.add(loss, local_batches)
            state.step += 1
            if average:
                average.update(network, state.step)
            profiler.step()
            if due := clock.due(state.step, ranks):
                interval = meter.close(ranks, state.step)
                clock.adapt(interval)
                state.count(interval)
                loading.check_bad_images(state.bad, state.seen, folder, data, ranks, new=len(interval.bad))
                log.updates(interval, state, lr=optimizer.param_groups[0]["lr"])
                if due.save:
                    resume_file.save(state)
                    clock.saved()
                if due.stop:
                    ranks.barrier()  # if a rank ended now, torchrun would kill the one that still writes
                    reason = f"{children.STOPPED} after update {state.step}; the same command goes on from there"
                    raise children.Interrupted([*clock.signals, signal.SIGTERM][0], reason)
        state.epoch += 1
        models = averaging.validated_models(network, average)
        kind, evaluation, scores = validation.validate(models, validation_loader, recipe, dtype, ranks, state.epoch)
        clean_score = None if clean is None else engine.mean(evaluation.cosines, clean)
        log.evaluation(state, scores[kind], clean_score, scores)
        facts = {"fold": fold, "folds_hashes": data.folds_hashes, "epoch": state.epoch}
        if state.epoch == recipe.epochs and ranks.is_main:
            for each, path in recipe.last_checkpoints(fold).items():
                own = {"weights": each, "cosine_similarity": scores[each]}
                checkpoints.save_checkpoint(path, models[each], recipe, **facts, **own)
        if scores[kind] > state.best:
            state.best, state.best_clean, state.best_epoch = scores[kind], clean_score, state.epoch
            if ranks.is_main:
                own = {"weights": kind, "cosine_similarity": scores[kind]}
                checkpoints.save_checkpoint(best_path, models[kind], recipe, **facts, **own)
            path, origin = out_of_fold.predictions_path(folder, fold), {"fold": fold, "prefix": recipe.prefix}
            origin["checkpoint"] = str(best_path.relative_to(recipe.models_folder()))
            predicted = evaluation.embeddings, evaluation.lengths
            out_of_fold.save_predictions(path, data, validation_rows, *predicted, ranks, **origin)
        resume_file.save(state)
        clock.saved()

    # ---------------------------------------------------------------- result
    result = RunResult(
        prefix=recipe.prefix,
        fold=fold,
        cosine_similarity=state.best,
        cosine_similarity_clean=state.best_clean,
        best_epoch=state.best_epoch,
        epochs=recipe.epochs,
        mean_prompt_baseline=baseline,
        validation_rows=len(validation_rows),
        clean_rows=None if clean is None else int(clean.sum()),
        unreadable_images=len({row for row, _ in state.bad}),
        updates=total_steps,
        seconds=state.seconds,
        checkpoint=str(best_path.relative_to(recipe.models_folder())),
    )
    log.close()
    if ranks.is_main:
        result.write(folder)
        resume_file.remove()
        print(f"finished: {result.summary()}\nsaved {best_path}", flush=True)
    ranks.barrier()
    return result


def load_initial_weights(network: PromptEmbedder, recipe: Recipe, fold: int, data: PromptImages, ranks: Ranks) -> None:
    """Load the checkpoint that the recipe starts from, if it names one; ValueError if it was trained on other folds."""
    if path := recipe.initial_checkpoint(fold):
        content = checkpoints.read(path)
        if not checkpoints.check_folds(content, fold, data.folds_hashes, path) and ranks.is_main:
            print(f"warning: {path} does not say which fold it has not trained on: scores may flatter", flush=True)
        weights, resampled = positions.resample_positions(network, content["model"])
        if resampled and ranks.is_main:
            print(f"position embeddings of {path.name} resampled from {resampled}", flush=True)
        checkpoints.load_weights(network, weights, path)


def check_space(recipe: Recipe, fold: int, network: PromptEmbedder) -> None:
    """Raise an error if checkpoints or the resume file cannot be written or do not fit on their disks."""
    weight_bytes = 4 * sum(parameter.numel() for parameter in network.parameters())
    averages = 1 if recipe.ema_decay else 0
    folders.check_writable(recipe.checkpoint_path(fold).parent, (3 + averages) * weight_bytes)
    # the resume file holds the weights, their average, and up to three optimiser tensors per weight; when replaced, it
    # exists twice
    folders.check_writable(recipe.run_folder(fold).parent, (9 + 2 * averages) * weight_bytes)


def main(argv: Sequence[str] | None = None, when_finished: Callable[[Path], object] | None = None) -> int:
    """Train as the arguments say; at the end the main rank calls `when_finished` with the run's folder."""
    parser = RecipeParser(
        prog="kutils train",
        description="Train one fold, alone or as a rank of torchrun. Run again, it continues a stopped run.",
        epilog=f"keys of a recipe, for key=value:\n{recipes.describe_keys()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="recipe file, as given or below the repository's conf/")
    parser.add_argument("--fold", type=int, choices=range(10), help="validation fold")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="instead: a run that the launcher has planned")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to change for this run")
    arguments = parser.parse_args(argv)
    own = (arguments.config, arguments.fold)
    if (None in own) if arguments.plan is None else (own != (None, None) or arguments.overrides):
        parser.error("give --config and --fold, or --plan alone")
    # torchrun and job systems signal a rank's whole process group: its data loaders would end, and the rank with them
    # before it has saved
    os.register_at_fork(after_in_child=os.setpgrp)
    if arguments.plan:
        run = launch.read_plan(arguments.plan)
    else:
        run = launch.plan(arguments.config, arguments.fold, arguments.overrides)
    ranks = join_ranks(run.recipe.device)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    path = finished.relative_to_repository(run.config_path)
    try:
        with locks.held([run.folder], ranks):
            train(run.recipe, run.fold, ranks, config=str(path), overrides=list(run.overrides))
    finally:
        for number, handler in handlers.items():  # `Clock` no longer handles the signals
            signal.signal(number, handler)
    leave_ranks()
    if ranks.is_main and when_finished:  # the others need not wait
        when_finished(run.folder)
    return 0
