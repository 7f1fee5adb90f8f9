"""`python gen_prompt_embedding.py FILE.tsv [FILE.tsv ...]` embeds their prompts: FILE.npy beside each."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the clone's kutils, from any current folder

from kutils.__main__ import main
from kutils.system.output import make_safe

if __name__ == "__main__":
    make_safe()
    sys.exit(main(["embed", *sys.argv[1:]]))
