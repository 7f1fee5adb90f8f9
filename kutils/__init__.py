"""Predicts the embedding of a prompt from the image that was generated from it."""

import importlib
import os
import shlex
import sys
import time

# before there was one command, each was a module: `python -m kutils.NAME`
RENAMED = {"prompts": "embed", "prompt_bank": "bank", "retrieval": "ask", "launch": "train-folds"}
UNCHANGED = (
    *("sources", "templates", "generate", "check", "shards", "pretrained", "train", "evaluate", "predict", "report"),
    *("ensemble", "neighbours", "kaggle", "demo"),
)


def command_of(module: str, arguments: list[str]) -> list[str]:
    """The command and its arguments for what `python -m <module> <arguments>` did or seems to do; empty for others."""
    name = module.removeprefix("kutils.")
    if name == "grouping":  # its first argument, folds or dedup, is a command by now
        return arguments if arguments[:1] in (["folds"], ["dedup"]) else ["folds"]
    if name in (*RENAMED, *UNCHANGED):
        return [RENAMED.get(name, name), *arguments]
    if not module.startswith("kutils."):
        return []
    commands = importlib.import_module("kutils.__main__").COMMANDS  # a command's module does nothing by itself
    del sys.modules["kutils.__main__"]  # `-m kutils` must find its own module unloaded
    return next(([command, *arguments] for command, found in commands.items() if found == module), [])


if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv:  # Python looks up the module that it is to run
    position = sys.orig_argv.index("-m") + 1
    if command := command_of(sys.orig_argv[position], sys.orig_argv[position + 1 :]):
        if int(os.environ.get("LOCAL_RANK", 0)):
            time.sleep(2)  # torchrun ends the first rank, which may not have said it yet, as soon as another one ends
        else:
            line = f"-m {sys.orig_argv[position]} is no command; write -m kutils {command[0]}, or: kutils"
            print(f"error: {line} {shlex.join(command)}", file=sys.stderr)
        sys.exit(2)
