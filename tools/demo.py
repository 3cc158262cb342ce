"""The main job on the bundled model: a picture from a prompt, a Kontext edit of it, a masked edit, one contact sheet.

python tools/demo.py FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import fluxkiln
from fluxkiln.bench.fidelity import contact_sheet

PROMPT = "a medium white star on the left of a blue background"
EDIT = "move the star to the right"
MASKED = "add a small black circle at the top right"
SIDE = 256  # of a picture on the sheet, pixels


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # steps of 10 ms gain little by two, which wait for each other when a core is busy
    start = time.perf_counter()
    pipe = fluxkiln.Pipeline.from_pretrained("shapes")
    picture = pipe(PROMPT, seed=7).images[0]
    edited = pipe(EDIT, image=picture, seed=7).images[0]
    mask = Image.new("L", picture.size, 0)
    ImageDraw.Draw(mask).rectangle((picture.width // 2, 0, picture.width, picture.height // 2 - 1), fill=255)
    masked = pipe(MASKED, image=picture, mask_image=mask, seed=7).images[0]

    made = {"prompt": (PROMPT, picture), "edit": (EDIT, edited), "masked edit": (MASKED, masked)}
    for name, (text, image) in made.items():
        path = folder / f"{name.replace(' ', '-')}.png"
        image.save(path)
        print(f"{name:12} {text!r} -> {path}")
    shown = [(f"{name}: {text}", [image]) for name, (text, image) in made.items()]
    shown.insert(2, ("mask: white is repainted", [mask]))
    contact_sheet(shown, SIDE).save(folder / "sheet.png")
    print(f"{pipe.summary()}; all of it took {time.perf_counter() - start:.1f} s")
    print(f"look at {folder / 'sheet.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
