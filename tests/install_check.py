"""Does `pip install -r requirements.txt` suffice? Runs every command of the README in a fresh copy of the repository.

The copy has an environment of its own with nothing else in it, not even the development tools. Networks and data are
tiny: what is tried is that each command works, under its own name, in its own folder.
`python tests/install_check.py [--keep FOLDER]` (the copy stays there for another look)
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "device=cpu datasets=shapes pretrained=false backbone=test_convnext head=pooled patch_mode=interpolated "
    "input_size=32 epochs=1 warmup_epochs=0 freeze_epochs=0 drop_path_rate=0 gradient_checkpointing=false "
    "global_batch_size=32 max_local_batch_size=16 num_workers=0 train_folds=0"
)
STAGES = {  # the recipes of the README, by network; each starts from the checkpoint of the one before
    "convnext_large": (
        "3data_input384_bs32_lr1e-4_1e-6_wd5e-2_madgrad_wawrmup3_15epoch",
        "8data_noaug_input384_bs16_lr1e-5_1e-7_wd5e-2_sam_madgrad_wawrmup0_5epoch",
    ),
    "vit_large": (
        "3data_input336_bs32_lr1e-4_1e-6_wd5e-2_madgrad_wawrmup3_15epoch",
        "8data_noaug_input336_bs16_lr1e-5_1e-7_wd5e-2_sam_madgrad_wawrmup0_5epoch",
    ),
    "convnext_xxlarge": (
        "3data_input384_bs32_lr1e-4_1e-6_wd5e-2_madgrad_wawrmup1_10epoch",
        "8data_noaug_input384_bs16_lr1e-6_1e-7_wd5e-2_sam_madgrad_wawrmup0_3epoch",
        "8data_noaug_input384_bs16_lr1e-6_1e-7_wd5e-2_sam_madgrad_wawrmup0_1epoch_fold6",
    ),
    "eva02_large_clsavg": (
        "3data_input448_bs32_lr1e-4_1e-6_wd5e-2_madgrad_wawrmup1_10epoch",
        "8data_noaug_input448_bs16_lr1e-6_1e-7_wd5e-2_sam_madgrad_wawrmup0_3epoch",
        "8data_noaug_input448_bs16_lr1e-6_1e-7_wd5e-2_sam_madgrad_wawrmup0_1epoch_fold2",
    ),
    "eva02_large_clsonly": (
        "3data_input448_bs32_lr1e-4_1e-6_wd5e-2_madgrad_wawrmup1_10epoch",
        "8data_noaug_input448_bs16_lr1e-6_1e-7_wd5e-2_sam_madgrad_wawrmup0_3epoch",
    ),
}


def copy_repository(target: Path) -> None:
    """Copy the files that a commit of everything here would hold."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


class Copy:
    """The repository as a fresh clone would have it, in a folder and an environment of its own."""

    def __init__(self, folder: Path):
        self.root = folder / "repository"
        copy_repository(self.root)
        bin_folder = self.root / ".venv" / "bin"
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("KUTILS_", "PYTHON"))}
        self.environment = kept | {
            "VIRTUAL_ENV": str(bin_folder.parent),
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def run(self, command: str, folder: str = ".", fails_with: str | None = None) -> str:
        """Run a command line in a folder of the copy; returns its output. Anything unexpected ends this program."""
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.root / folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        seconds = time.monotonic() - began
        print(f"{seconds:6.1f} s  {folder}$ {command if len(command) < 150 else command[:147] + '...'}", flush=True)
        expected = done.returncode == 0 if fails_with is None else done.returncode != 0 and fails_with in done.stdout
        if not expected:
            wanted = "to succeed" if fails_with is None else f"to fail and to say {fails_with!r}"
            sys.exit(f"{done.stdout[-6000:]}\nerror: exit code {done.returncode}, expected {wanted}: {command}")
        return done.stdout

    def expect(self, *names: str) -> None:
        """End this program if a file of the copy is missing or empty."""
        for name in names:
            path = self.root / name
            if not path.is_file() or not path.stat().st_size:
                sys.exit(f"error: {name} was not written")


def train_family(copy: Copy, network: str) -> None:
    """The README's dist_train.sh commands of one network, in order."""
    for stage in STAGES[network]:
        prefix = f"{network}_{stage}"
        copy.run(f"bash dist_train.sh 1 conf/{prefix}.yaml {TINY}", folder="working")
        run = prefix.removesuffix("_fold6").removesuffix("_fold2") + "_fold0"
        copy.expect(*(f"working/runs/{run}/{name}" for name in ("result.json", "metrics.jsonl", "config.yaml")))
        found = [path.name for path in (copy.root / "working" / "models").rglob(f"{run}_best_cossim.pth")]
        if len(found) != 1:
            sys.exit(f"error: checkpoints {run}_best_cossim.pth: {found}")


def check(copy: Copy) -> None:
    python = shlex.quote(sys.executable)
    copy.run(f"{python} -m venv .venv")
    copy.run("pip install --quiet -r requirements.txt")
    for tool in ("pytest", "ruff", "nbstripout"):  # or the environment is more than what is tried
        copy.run(f"python -c 'import {tool}'", fails_with="ModuleNotFoundError")

    # data: generate, embed, de-duplicate, fold
    copy.run("kutils generate --shapes-dataset shapes --num-prompts 200 --images-per-prompt 2 --size 48")
    copy.run("python gen_prompt_embedding.py shapes.tsv --overwrite", folder="input")
    copy.run("python input/gen_prompt_embedding.py input/shapes.tsv")
    copy.run("kutils folds input/shapes.tsv --threshold 0.7 --folds 10 --method stratified")
    copy.run("kutils dedup input/shapes.tsv --threshold 0.9 --kept input/k.tsv --rest input/r.tsv")
    copy.run("papermill notebooks/prepare_data.ipynb working/prepare_data.ipynb -p dataset shapes")
    copy.run("papermill notebooks/generate_images.ipynb working/generate_images.ipynb")
    copy.run("kutils templates --count 60 --output input/grammar.tsv")
    copy.run("kutils templates --join input/grammar.tsv --clusters 5 --count 20 --output input/joined.tsv")
    copy.run("kutils sources input/grammar.tsv input/joined.tsv --output input/collected.tsv")
    copy.run("kutils check input/shapes.tsv")
    copy.run("kutils shards input/drawn.tsv --size 32")
    copy.run("papermill notebooks/prepare_prompts.ipynb working/prepare_prompts.ipynb -p num_prompts 200")
    copy.expect("input/grammar.npy", "input/joined.tsv", "input/collected.tsv", "working/prepare_prompts.ipynb")
    diffusion = "kutils generate input/shapes.tsv --backend diffusers --output input/diffusion"
    copy.run(diffusion, fails_with="pip install -e '.[generate]'")
    copy.expect("input/drawn.tsv", "working/generate_images.ipynb")
    copy.expect("input/shapes.npy", "input/shapes.folds.json", "input/k.tsv", "working/prepare_data.ipynb")

    # every recipe by the command of the README; on a machine without GPUs it says so at once
    recipes = sorted(f"{network}_{stage}" for network, stages in STAGES.items() for stage in stages)
    seed_recipes = sorted(path.stem for path in (copy.root / "conf").glob("*_madgrad_*.yaml"))
    if recipes != seed_recipes:
        sys.exit(f"error: conf/ holds other recipes: {set(recipes) ^ set(seed_recipes)}")
    copy.run(f"bash dist_train.sh 8 conf/{recipes[0]}.yaml", folder="working", fails_with="error: ")
    copy.run(f"bash dist_train.sh 2 conf/{recipes[0]}.yaml {TINY} prefix=ranks save_dir=ranks", folder="working")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(lambda network: train_family(copy, network), STAGES))

    # the notebooks, with and without an output path, from both folders
    tiny = f'-p overrides "{TINY}"'
    named = f'-p overrides "{TINY} prefix=named save_dir=named"'
    copy.run(f"papermill notebooks/train.ipynb working/runs/t.ipynb -p model convnext_large -p fold 0 {named}")
    copy.run(f"papermill train.ipynb -p model vit_large -p fold 0 {tiny} > ../working/t.json", folder="notebooks")
    copy.run(f"papermill notebooks/refine.ipynb working/runs/r.ipynb -p model vit_large -p fold 0 {tiny}")
    copy.expect("working/runs/t.ipynb", "working/t.json", "working/runs/r.ipynb")

    # what came out: several runs, the data, an image of one's own, a report
    copy.run("papermill notebooks/compare.ipynb working/compare.ipynb")
    copy.run("papermill notebooks/explore.ipynb working/explore.ipynb -p map_prompts 200")
    copy.run("kutils report")
    copy.run("kutils ask $(find input/drawn_images -name '*_0.*' | sort | head -2)")
    copy.expect("working/compare.ipynb", "working/explore.ipynb")

    names = copy.run("python -c 'from kutils.__main__ import COMMANDS; print(*COMMANDS)'").split()
    for name in names:
        copy.run(f"kutils {name} --help")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=Path, help="folder for the copy; default: a temporary one")
    arguments = parser.parse_args()
    began = time.monotonic()
    if arguments.keep:
        check(Copy(arguments.keep.absolute()))
    else:
        with tempfile.TemporaryDirectory(prefix="kutils_install_") as folder:
            check(Copy(Path(folder)))
    print(f"requirements.txt suffices ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
