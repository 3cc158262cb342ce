"""What an image benchmark asks for: a JSONL file of our own, or a folder in KontextBench's format.

Our format has one object per line:

    {"id": "pair-017", "category": "pair", "prompt": "a red star above a white cross on a blue background"}

Optional keys: `image` (picture to edit), `mask` (its white part is painted) and `control` (edges or depth), paths
relative to the file; `follows` (edit the picture made for the item with that id, which comes earlier), `text` (words
the picture must show), `negative_prompt` (used where true classifier-free guidance is on), `width`, `height`, `seed`;
and for the bundled world `scene` and `before` (see `shapes_scene.Scene.to_dict`), from which the judge measures and,
unless it `follows`, the picture to edit is drawn, and `without` (the prompt leaves the background open, and it must
not have this colour).

A KontextBench folder has a `metadata.jsonl` with `file_name`, `instruction`, `category` and `key` on every line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from fluxkiln import images
from fluxkiln.bench import fidelity
from fluxkiln.bench.shapes_scene import COLORS, Scene, draw

BUNDLED = Path(__file__).parent / "suites"
REQUIRED: dict[str, tuple[type, ...]] = {"id": (str, int), "category": (str,), "prompt": (str,)}
KONTEXT: dict[str, tuple[type, ...]] = {
    "key": (str, int),
    "category": (str,),
    "instruction": (str,),
    "file_name": (str,),
}
FILES = ("image", "mask", "control")
SUMMARIES = ("prompts", "edits", "all")  # of several categories
OPTIONAL: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*FILES, "follows", "text", "negative_prompt", "without"), (str,)),
    **dict.fromkeys(("width", "height", "seed"), (int,)),
    **dict.fromkeys(("scene", "before"), (dict,)),
}


@dataclass(frozen=True)
class Item:
    """One picture to make, the `number`-th of its suite. The rest as in the format above; absent ones are None."""

    id: str
    category: str
    prompt: str
    image: Path | None = None
    mask: Path | None = None
    control: Path | None = None
    follows: str | None = None
    text: str | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    scene: Scene | None = None
    before: Scene | None = None
    without: str | None = None
    number: int = 0

    @property
    def is_edit(self) -> bool:
        return not (self.image is None and self.follows is None and self.before is None)

    def source(self, side: int = 64, made: Path | None = None) -> Image.Image | None:
        """The picture to edit as its file has it, with its own mode and rotation; None for text to image.

        Args:
            side: of a drawn one, unless the item says its width and height.
            made: folder with the pictures made for other items, `ID.png` or another picture's suffix.

        Raises:
            ValueError: the picture that it follows has not been made.
        """
        path = self.image
        if self.follows is not None:
            path = None if made is None else fidelity.files(made).get(self.follows)
            if path is None:
                raise ValueError(f"{self.id} edits the picture of {self.follows}, which is not made: select both")
        if path is not None:
            return images.open_picture(path)
        return None if self.before is None else draw(self.before, self.width or side, self.height or side)


def locate(name: str | Path) -> Path:
    """The file of a suite: that of a bundled one, a JSONL file, or a folder's `metadata.jsonl`.

    A folder of a bundled one's name is meant by `./name`, as with models.

    Raises:
        ValueError: no such suite.
    """
    path, bundled = Path(name), {file.stem: file for file in BUNDLED.glob("*.jsonl")}
    if str(name) in bundled:
        path = bundled[str(name)]
    elif path.is_dir():
        path /= "metadata.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(bundled))
        raise ValueError(
            f"no suite {str(name)!r}: expected one of {known}, a JSONL file, or a folder with metadata.jsonl"
        )
    return path


def load(name: str | Path) -> list[Item]:
    """Read a suite, see `locate`.

    Raises:
        ValueError: no such suite, or a line that is not as the format wants it.
    """
    path = locate(name)
    items = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from None
    # Not splitlines: a prompt may hold U+2028 and the like.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(replace(_item(json.loads(line), path.parent), number=len(items) + 1))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}, line {number}: {reason}") from None
    known = set[str]()
    for item in items:
        if not item.id or Path(item.id).name != item.id:
            raise ValueError(f"{path}: the id {item.id!r} is no name for a file")
        for file in filter(None, (item.image, item.mask, item.control)):
            if not file.is_file():
                raise ValueError(f"{path}: {item.id} needs {file}, which is not there")
        if item.category in SUMMARIES:
            raise ValueError(f"{path}: no category can be called {item.category!r}, as a summary of several is")
        if item.id in known:
            raise ValueError(f"{path}: two items have the same id {item.id!r}")
        if item.follows is not None and item.follows not in known:
            raise ValueError(f"{path}: {item.id} follows {item.follows!r}, which no earlier line has")
        known.add(item.id)
    return items


def _item(data: Any, folder: Path) -> Item:
    if not isinstance(data, dict):
        raise ValueError(f"expected an object with the keys {', '.join(REQUIRED)}, got {data!r}")
    if "instruction" in data:
        found = _checked(data, KONTEXT)
        return Item(str(found["key"]), found["category"], found["instruction"], folder / found["file_name"])
    if unknown := [key for key in data if key not in REQUIRED | OPTIONAL]:
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(REQUIRED | OPTIONAL)}")
    found = _checked(data, REQUIRED | {key: kinds for key, kinds in OPTIONAL.items() if data.get(key) is not None})
    if found.get("without", "red") not in COLORS:
        raise ValueError(f"without must be one of {', '.join(COLORS)}, got {found['without']!r}")
    found |= {key: folder / found[key] for key in FILES if key in found}
    found |= {key: Scene.from_dict(found[key]) for key in ("scene", "before") if key in found}
    return Item(**found | {"id": str(found["id"])})


def _checked(data: dict[str, Any], wanted: dict[str, tuple[type, ...]]) -> dict[str, Any]:
    for key, kinds in wanted.items():
        if not isinstance(data[key], kinds) or isinstance(data[key], bool):
            raise ValueError(f"{key} must be {' or '.join(kind.__name__ for kind in kinds)}, got {data[key]!r}")
    return {key: data[key] for key in wanted}
