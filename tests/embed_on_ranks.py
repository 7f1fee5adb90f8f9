"""`gen_prompt_embedding.py` with small chunks; test_prompts.py runs this file by torchrun.

Arguments: CHUNK_PROMPTS, a folder where each rank notes the prompts that it encodes, and those of the command.
"""

import os
import sys
from pathlib import Path

from kutils.prompts import embedding

encode = embedding.TextEncoder.encode


def noting_encode(self, texts, *arguments, **options):
    if texts != ["a"]:  # with which load_encoder asks for the dimension
        with (notes / f"rank{os.environ['RANK']}.txt").open("a") as stream:
            stream.writelines(text + "\n" for text in texts)
    return encode(self, texts, *arguments, **options)


if __name__ == "__main__":
    embedding.CHUNK_PROMPTS, notes = int(sys.argv[1]), Path(sys.argv[2])
    embedding.TextEncoder.encode = noting_encode
    embedding.main(sys.argv[3:])
