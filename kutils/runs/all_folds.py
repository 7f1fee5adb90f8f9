"""Trains every fold of a recipe, one after the other; each leaves an executed notebook in its run's folder.

`kutils train-folds` and `working/dist_train.sh` start it. Papermill runs `notebooks/train.ipynb` or `refine.ipynb`.
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kutils.runs import finished, folders, recipes
from kutils.runs.launch import Run, count_processes, plan, train_on_ranks
from kutils.runs.nodes import Node, this_node
from kutils.runs.published_names import RecipeParser
from kutils.system import paths
from kutils.system.children import SAVING_SECONDS, CommandFailed, interrupt_once

OPEN_FILES = 128  # file descriptors; a notebook's kernel needs some 90
HELP = """\
several nodes: start the same command on each, with NNODES, NODE_RANK (0 on the first, which keeps the notebook),
  MASTER_ADDR (of the first) and MASTER_PORT (29500) set, or torchrun's own PET_NNODES, PET_NODE_RANK,
  PET_MASTER_ADDR, PET_MASTER_PORT or PET_RDZV_ENDPOINT; all see the same input/ and working/
stop: Ctrl-C or SIGTERM; the ranks save their state, which may take minutes: allow 10 before SIGKILL
resume: the same command again; finished folds are skipped, an interrupted fold continues"""


def run_folds(num_processes: int, config_name: str, overrides: Sequence[str]) -> None:
    """Train every fold of a recipe, one after the other; each leaves an executed notebook in its run folder.

    Finished folds are skipped, and an interrupted one continues. On all nodes but the first, ranks run without a
    notebook.
    """
    if 0 <= (limit := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < OPEN_FILES:
        raise ValueError(f"{limit} open files are allowed and {OPEN_FILES} are needed; before it: ulimit -n 1024")
    first = plan(config_name, 0, overrides)
    recipe, node = with_absolute_paths(first.recipe), this_node()
    num_processes = count_processes(num_processes, recipe.device)  # raises now, not after a minute, if GPUs are missing
    for number, fold in enumerate(recipe.train_folds, start=1):
        run = replace(first, recipe=recipe, fold=fold)
        print(f"fold {fold} ({number} of {len(recipe.train_folds)}): {run.folder}", flush=True)
        notebook = run.folder / ("train.ipynb" if recipe.stage == 1 else "refine.ipynb")
        if is_finished(run, notebook, node):
            print(f"already finished: {finished.read_result(run.folder).summary()}", flush=True)
        elif node.rank > 0:
            train_on_ranks(run, num_processes)
        else:
            execute(notebook, {"planned": str(run.write()), "fold": fold, "num_processes": num_processes})


def is_finished(run: Run, notebook: Path, node: Node) -> bool:
    """True if there is nothing left to do for a fold; ValueError if the folder holds a run of another configuration.

    On one node the notebook must have finished too, else figures are missing. With several nodes only the run's result
    counts, so that all nodes decide in the same way.
    """
    if run.recipe.resume == "never" or not finished.read_result(run.folder):
        return False
    folders.check_same_configuration(run.folder, run.recipe)
    if node.count > 1:
        return True
    try:
        record = json.loads(notebook.read_text(encoding="utf-8"))["metadata"]["papermill"]
        return record["end_time"] is not None and not record["exception"]
    except (OSError, ValueError, KeyError):
        return False


def with_absolute_paths(recipe: recipes.Recipe) -> recipes.Recipe:
    """The recipe with absolute paths, since notebook and ranks run in other folders."""
    values = {key: getattr(recipe, key) for key in ("run_dir", "model_dir", "pretrained")}
    given = {key: value for key, value in values.items() if value not in (True, False, "", recipes.FROM_PACKAGE)}
    absolute = {key: str(Path(value).absolute()) for key, value in given.items()}
    return replace(recipe, **absolute)


def execute(notebook: Path, parameters: dict) -> None:
    """Run the repository's notebook of this name and save the executed copy; an interrupt stops its cell cleanly.

    Raises: CommandFailed with the message of the cell that failed, or if the kernel dies; KeyboardInterrupt once the
        notebook has stopped.
    """
    import jupyter_client  # these take a second; only this command needs them
    import papermill
    import zmq

    manager, died = jupyter_client.AsyncKernelManager(kernel_name="python3"), False
    # in the main thread papermill would kill the kernel 5 s after a signal; in another thread it ignores signals
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        done = thread.submit(
            papermill.execute_notebook,
            paths.repository_path(f"notebooks/{notebook.name}"),
            notebook,
            parameters=parameters,
            cwd=str(paths.repository_root()),
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            km=manager,
        )
        try:
            done.result()
        except papermill.PapermillExecutionError as error:
            raise CommandFailed(f"{error.evalue}\n(the notebook as far as it came: {notebook})") from None
        except KeyboardInterrupt:
            interrupt(manager, done)
            raise
        except (RuntimeError, zmq.ZMQError) as error:
            died = True
            raise CommandFailed(
                f"the notebook's kernel has ended ({error}): too little memory, or `ulimit -n`?"
            ) from None
        finally:
            if manager.has_kernel:
                asyncio.run(manager.shutdown_kernel(now=died))  # a dead kernel answers no request


def interrupt(manager, done: concurrent.futures.Future) -> None:
    """Interrupt a notebook's kernel again and again until the notebook stops: an interrupt between two cells is
    lost."""
    deadline = time.monotonic() + SAVING_SECONDS + 120  # longer than a cell waits for its ranks
    while not done.done() and time.monotonic() < deadline:
        if manager.has_kernel:
            with contextlib.suppress(ProcessLookupError):
                os.kill(manager.provisioner.pid, signal.SIGINT)
        concurrent.futures.wait([done], timeout=10)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = RecipeParser(
        prog="kutils train-folds",
        description="Train every fold of a recipe on the GPUs of this machine, one fold after the other: what "
        "`bash dist_train.sh` runs.",
        epilog=f"{HELP}\n\nkeys of a recipe, for key=value:\n{recipes.describe_keys()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("num_processes", type=int, help="ranks on this machine: its number of GPUs")
    parser.add_argument("config", help="recipe file, as given or below the repository's conf/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to change for these runs")
    arguments = parser.parse_args(argv)
    interrupt_once(f"stopping: ranks that train save their state first, for up to {SAVING_SECONDS // 60} minutes\n")
    run_folds(arguments.num_processes, arguments.config, arguments.overrides)
    return 0
