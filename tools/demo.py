"""The main job on the bundled model: a picture from a prompt, a Kontext edit of it, a masked edit, one contact sheet.

python tools/demo.py FOLDER
"""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import fluxkiln

PROMPT = "a medium white star on the left of a blue background"
EDIT = "move the star to the right"
MASKED = "add a small black circle at the top right"
SIDE, GAP, LINE = 256, 8, 14  # pixels: of a picture, between two, and of a line of text


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
    white = ("mask", ("white is repainted", mask.convert("RGB")))
    contact_sheet([*list(made.items())[:2], white, *list(made.items())[2:]]).save(folder / "sheet.png")
    print(f"{pipe.summary()}; all of it took {time.perf_counter() - start:.1f} s")
    print(f"look at {folder / 'sheet.png'}")


def contact_sheet(columns: list[tuple[str, tuple[str, Image.Image]]]) -> Image.Image:
    """Pictures side by side, each under its name and what was asked for."""
    top = 3 * LINE + GAP
    sheet = Image.new("RGB", (len(columns) * (SIDE + GAP) + GAP, top + SIDE + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (name, (text, image)) in enumerate(columns):
        x = GAP + i * (SIDE + GAP)
        pen.text((x, GAP // 2), "\n".join([name, *textwrap.wrap(text, SIDE // 6)]), fill="black")
        sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, top))
    return sheet


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
