"""Predicts the embedding of a prompt from the image that was generated from it."""

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
    """The command and its arguments that do what `python -m <module> <arguments>` did; empty for any other module."""
    name = module.removeprefix("kutils.")
    if name == "grouping":  # its first argument, folds or dedup, is a command by now
        return arguments if arguments[:1] in (["folds"], ["dedup"]) else ["folds"]
    return [RENAMED.get(name, name), *arguments] if name in (*RENAMED, *UNCHANGED) else []


if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv:  # Python looks up the module that it is to run
    position = sys.orig_argv.index("-m") + 1
    if command := command_of(sys.orig_argv[position], sys.orig_argv[position + 1 :]):
        if int(os.environ.get("LOCAL_RANK", 0)):
            time.sleep(2)  # torchrun ends the first rank, which may not have said it yet, as soon as another one ends
        else:
            line = f"-m {sys.orig_argv[position]} is gone; it is now -m kutils {command[0]}, or: kutils"
            print(f"error: {line} {shlex.join(command)}", file=sys.stderr)
        sys.exit(2)
