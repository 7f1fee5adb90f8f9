"""Runs the notebook `benchmark` as a command: `kutils benchmark`."""

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path

from kutils.runs import all_folds
from kutils.system import paths
from kutils.system.children import interrupt_once

PATHS = ("pictures", "prompts_path")  # parameters that name files; the notebook has another current folder


def main(argv: Sequence[str] | None = None) -> int:
    import papermill  # takes a second; only this command needs it

    parser = argparse.ArgumentParser(
        prog="kutils benchmark",
        description="Measure speed and memory on this machine beside the published pipeline or the plain way. The "
        "options are the parameters of notebooks/benchmark.ipynb; the executed copy and results.json are written to "
        "working/benchmark/.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, parameter in papermill.inspect_notebook(paths.repository_path("notebooks/benchmark.ipynb")).items():
        default = ast.literal_eval(parameter["default"])
        kind = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        parser.add_argument(f"--{name.replace('_', '-')}", help=parameter["help"].replace("%", "%%"), **kind)
    values = vars(parser.parse_args(argv))
    from kutils.benchmarks import measuring  # brings torch

    measuring.choose_sections(values["sections"])  # a wrong name stops here
    values |= {name: str(Path(values[name]).absolute()) for name in PATHS if values[name]}
    interrupt_once("stopping\n")
    notebook = measuring.results_path().with_name("benchmark.ipynb")
    notebook.parent.mkdir(parents=True, exist_ok=True)
    all_folds.execute(notebook, values)
    print(f"the executed notebook: {notebook}")
    return 0
