"""Runs the command `kutils COMMAND ...`; without installation, `python -m kutils COMMAND ...`."""

import difflib
import errno
import importlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path

# step of the pipeline: {command: (module with `main(argv) -> int`, what the command does)}
STEPS = {
    "prompts": {
        "sources": ("kutils.prompts.collection", "collect prompts from files into one clean prompts file"),
        "templates": ("kutils.prompts.grammar", "make prompts from a grammar, or by joining two prompts"),
        "embed": ("kutils.prompts.embedding", "embed the prompts of tables: NAME.npy beside NAME.tsv"),
        "dedup": ("kutils.prompts.near_duplicates", "leave out prompts that resemble an earlier one"),
        "folds": ("kutils.prompts.folds", "assign folds to data sets so that similar prompts share one"),
    },
    "images with their prompts": {
        "generate": ("kutils.generation.generate", "make a data set of images from prompts"),
        "import": ("kutils.data.pair_import", "make a data set of downloaded pairs: tars, Parquet, folders, lists"),
        "export": ("kutils.data.pair_export", "write a data set as tars or Parquet files, to share it"),
        "check": ("kutils.data.checking", "examine every image and row, and move bad rows to a quarantine table"),
        "shards": ("kutils.data.shards", "pack images at the size of training into few large files"),
    },
    "one model": {
        "pretrained": ("kutils.models.pretrained", "download pretrained weights for machines without network"),
        "train": ("kutils.training.train", "train one fold of a recipe; continues an interrupted run"),
        "train-folds": ("kutils.runs.all_folds", "train all folds of a recipe, as working/dist_train.sh does"),
        "evaluate": ("kutils.training.evaluate", "score a checkpoint, and save its predictions or features"),
        "predict": ("kutils.ensemble.predict", "predict the embeddings of a folder of images"),
        "report": ("kutils.views.report", "write report.html for finished runs"),
    },
    "many models": {
        "ensemble": ("kutils.ensemble.fit", "fit the weights of an ensemble"),
        "neighbours": ("kutils.ensemble.neighbours", "score the nearest training prompts as predictions"),
        "ladder": ("kutils.views.ladder_plots", "score models beside simpler and ideal predictions, with intervals"),
        "bank": ("kutils.data.bank_command", "write prompts and embeddings as one file to search in"),
        "ask": ("kutils.ensemble.trained_models", "print the prompts nearest to what trained models predict"),
    },
    "Kaggle": {
        "kaggle": ("kutils.kaggle.sending", "upload code and weights, push kernels, submit"),
    },
    "everything": {
        "demo": ("kutils.demo", "run the whole pipeline at small scale, and print the scores"),
        "benchmark": ("kutils.benchmarks.notebook", "measure speed and memory beside the published pipeline"),
        "gpu-check": ("kutils.benchmarks.gpu_check", "check and measure on GPUs, in 8 minutes: speed, hours, cost"),
    },
}
COMMANDS = {name: module for commands in STEPS.values() for name, (module, _) in commands.items()}
AGAIN_SECONDS = 5  # after these, a second Ctrl-C also interrupts what the first one left running
FIRST_RANK_SECONDS = 10  # the first rank has printed an error that all ranks have within these


def overview() -> str:
    """All commands, by step, one line each."""
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: kutils COMMAND ...    (kutils COMMAND --help lists what it takes)"]
    for step, commands in STEPS.items():
        lines += ["", f"{step}:", *(f"  {name:{width}}{text}" for name, (_, text) in commands.items())]
    return "\n".join(lines)


def run(command: str, arguments: list[str], *, is_process: bool = False) -> int:
    """Run a command; returns its exit status: 0, 130 after Ctrl-C, 143 after SIGTERM, or 1 after an error that the user
    can fix, which is printed as `error: ...`.

    KUTILS_DEBUG=1 shows the traceback instead. An error that all ranks of torchrun have before they join the process
    group is printed only by the first rank of each machine.

    Args:
        is_process: the command is alone in this process, so it may set the handlers of SIGINT and SIGTERM.
    """
    from kutils.system import output
    from kutils.system.children import (
        STOPPED,
        CommandFailed,
        end_with_parent,
        exit_at_once,
        handle_signals,
        interrupt_once,
    )

    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank whose torchrun was killed would go on holding its GPU
        end_with_parent()
    if is_process:
        handle_signals(exit_at_once)
    try:
        module = importlib.import_module(COMMANDS[command])
        if is_process:
            interrupt_once(again_seconds=AGAIN_SECONDS)
        code = module.main(arguments, ensure_report) if command == "train" else module.main(arguments)
        if lost := output.lost_error():
            print(f"error: what was printed is lost ({lost}); what was written is whole", file=sys.stderr, flush=True)
        return code or int(lost is not None)
    except (ValueError, OSError, CommandFailed) as error:
        if os.environ.get("KUTILS_DEBUG"):
            raise
        if int(os.environ.get("LOCAL_RANK", 0)) and not have_joined():
            time.sleep(FIRST_RANK_SECONDS)  # torchrun ends all ranks as soon as one ends
            return 1
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        advice = "; make room, and the same command goes on" if full else ""
        print(f"error: {output.shorten_lines(str(error))}{advice}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        loaders = sys.modules.get("kutils.system.loaders")  # not imported here: it loads torch
        if not (message := loaders and loaders.describe_loss(error)) or os.environ.get("KUTILS_DEBUG"):
            raise
        print(f"error: {output.shorten_lines(message)}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt as error:
        message = str(error) or f"{STOPPED}; start the same command again to go on"
        print(f"error: {message}", file=sys.stderr, flush=True)
        return 128 + getattr(error, "number", signal.SIGINT)
    finally:
        if have_joined():
            sys.modules["kutils.system.ranks"].leave_ranks()


def have_joined() -> bool:
    """Whether this process has joined a process group of several ranks."""
    ranks = sys.modules.get("kutils.system.ranks")  # not imported here: it loads torch
    return ranks is not None and ranks.dist.is_initialized()


def ensure_report(run_folder: Path) -> None:
    """Write a finished run's `report.html` if it is missing; an error is only printed, since the run itself is
    finished."""
    if (run_folder / "report.html").is_file():
        return
    try:
        from kutils.views import report  # loads pandas and Matplotlib, which no other rank needs

        print(f"report: {report.write_report(run_folder)}", flush=True)
    except Exception as error:
        again = f"kutils report {shlex.quote(str(run_folder))}"
        print(f"no report ({type(error).__name__}: {error}); make it with: {again}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` begins with; exit status 2 where there is no such command.

    Args:
        argv: command and arguments; None: those of this process, run by the code of the clone in which it was started.
    """
    is_process = argv is None
    if argv is None:
        from kutils.system import output

        argv = sys.argv[1:]
        continue_in_clone(argv)
        output.make_safe()
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(overview())
        return 0
    if argv[0] not in COMMANDS:
        close = difflib.get_close_matches(argv[0], COMMANDS, 1, 0.5)
        nearest = f"did you mean {close[0]!r}? " if close else ""
        print(f"error: there is no command {argv[0][:80]!r}; {nearest}`kutils --help` lists all", file=sys.stderr)
        return 2
    return run(argv[0], argv[1:], is_process=is_process)


def continue_in_clone(arguments: list[str]) -> None:
    """Restart with the current folder's clone if this code is of another clone.

    An environment may hold an editable install of another clone, which would read and write that clone's folders. Code
    that PYTHONPATH names is used as it is.
    """
    from kutils.system import paths

    search_path = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    clone = next(filter(paths.is_clone, (Path.cwd(), *Path.cwd().parents)), None)
    if clone and paths.code_root() not in (path.resolve() for path in map(Path, [clone, *search_path])):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(clone), *search_path])
        os.environ["PYTHONSAFEPATH"] = "1"  # the current folder is not searched before PYTHONPATH
        os.execv(sys.executable, [sys.executable, "-m", "kutils", *arguments])


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun then shows the traceback of the rank that failed first
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)
    sys.exit(main())
