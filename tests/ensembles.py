"""What several tests of prediction start from: images of many kinds, an ensemble, and a network's output by hand."""

import json
from dataclasses import asdict

import numpy as np
import torch
from PIL import Image

from kutils.data import transforms
from kutils.ensemble import fit, weight_files


def save_images(folder):
    """Twelve readable files of many kinds, a truncated one, an empty one, and files that are no images."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(3)
    pixels = [random.integers(0, 256, (40 + number, 50, 3)).astype(np.uint8) for number in range(12)]
    pictures = [Image.fromarray(values) for values in pixels]
    pictures[0].save(folder / "b.png")
    pictures[1].save(folder / "a.JPG", quality=90)
    pictures[2].convert("CMYK").save(folder / "c.jpeg")
    pictures[3].save(folder / "d.webp")
    pictures[4].quantize(8).save(folder / "e.gif")
    pictures[5].save(folder / "f.gif", save_all=True, append_images=[pictures[5].rotate(90)])
    pictures[6].convert("RGBA").save(folder / "g.png")
    Image.fromarray(random.integers(0, 65536, (30, 30)).astype(np.uint16)).save(folder / "h.png")
    pictures[8].convert("L").save(folder / "i.tiff")
    pictures[9].save(folder / "j.bmp")
    pictures[10].save(folder / "k.dotted.name.png")
    pictures[11].save(folder / "l.webp", save_all=True, append_images=[pictures[11].rotate(180)])
    (folder / "m.png").write_bytes((folder / "b.png").read_bytes()[:200])
    (folder / "n.jpg").write_bytes(b"")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    (folder / "below").mkdir()
    pictures[0].save(folder / "below" / "z.png")


def by_hand(model, recipe, files):
    pixels = [transforms.resize_square(transforms.decode_rgb(path), recipe.input_size) for path in files]
    with torch.no_grad():
        return model(transforms.normalize(torch.stack(pixels), recipe.mean, recipe.std)).numpy()


def write_ensemble(folder, families, weights, mean, scores=None, rows=None, leave_one_out=None):
    """The file of an ensemble that was never fitted."""
    fitted = fit.Ensemble(
        method="family",
        families=families,
        weights=weights,
        mean_embedding=[float(value) for value in mean],
        scores=scores or {},
        over_equal={},
        leave_one_out=leave_one_out or {},
        error_correlations={},
        rows=rows or {},
        folds_hash="{}",
        targets_hash="",
    )
    (folder / "weights.json").write_text(json.dumps({"kind": weight_files.ENSEMBLE_KIND, **asdict(fitted)}))
    return folder / "weights.json"
