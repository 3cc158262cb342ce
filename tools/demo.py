"""The main job on the bundled model: a picture from a prompt, a Kontext edit of it, a masked edit, one contact sheet.

python tools/demo.py FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw

import fluxkiln

PROMPT = "a large red circle in the center of a blue background"
EDIT = "make the circle yellow"
MASKED = "a small green square in the top left of a blue background"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    pipe = fluxkiln.Pipeline.from_pretrained("shapes")
    picture = pipe(PROMPT, seed=7).images[0]
    edited = pipe(EDIT, image=picture, seed=7).images[0]
    mask = Image.new("L", picture.size, 0)
    ImageDraw.Draw(mask).rectangle((0, 0, picture.width // 2 - 1, picture.height // 2 - 1), fill=255)
    masked = pipe(MASKED, image=picture, mask_image=mask, seed=7).images[0]

    captions = {"prompt": PROMPT, "edit": EDIT, "masked edit": MASKED}
    for (name, text), image in zip(captions.items(), (picture, edited, masked), strict=True):
        path = folder / f"{name.replace(' ', '-')}.png"
        image.save(path)
        print(f"{name:12} {text!r} -> {path}")
    sheet = contact_sheet([picture, edited, mask.convert("RGB"), masked], ["prompt", "edit", "mask", "masked edit"])
    sheet.save(folder / "sheet.png")
    print(f"{pipe.summary()}; all of it took {time.perf_counter() - start:.1f} s")
    print(f"look at {folder / 'sheet.png'}")


def contact_sheet(images: list[Image.Image], names: list[str], side: int = 256, text: int = 18) -> Image.Image:
    sheet = Image.new("RGB", (side * len(images), side + text), "white")
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (i * side, text))
        ImageDraw.Draw(sheet).text((i * side + 4, 3), name, fill="black")
    return sheet


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
