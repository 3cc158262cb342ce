"""What an image benchmark asks for: a JSONL file of our own, or a folder in KontextBench's format.

Our format has one object per line:

    {"id": "pair-017", "category": "pair", "prompt": "a red star above a white cross on a blue background"}

Optional keys: `image` (picture to edit, a path relative to the file), `text` (words the picture must show),
`width`, `height`, `seed`; and for the bundled world `scene` and `before` (see `shapes_scene.Scene.to_dict`), from which
the judge measures and, where `before` is given, the picture to edit is drawn.

A KontextBench folder has a `metadata.jsonl` with `file_name`, `instruction`, `category` and `key` on every line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fluxkiln.bench.shapes_scene import Scene, draw

BUNDLED = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class Item:
    """One picture to make. `image`, `scene`, `before` and `text` as in the format above; absent ones are None."""

    id: str
    category: str
    prompt: str
    image: Path | None = None
    text: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    scene: Scene | None = None
    before: Scene | None = None

    def source(self, side: int = 64) -> Image.Image | None:
        """The picture to edit, None for text to image."""
        if self.image is not None:
            with Image.open(self.image) as picture:
                return picture.convert("RGB")
        return None if self.before is None else draw(self.before, self.width or side, self.height or side)


def load(name: str | Path) -> list[Item]:
    """Read a suite: the name of a bundled one, a JSONL file, or a folder with `metadata.jsonl`.

    Raises:
        ValueError: no such suite, or a line that is not as the format wants it.
    """
    path = Path(name)
    bundled = BUNDLED / f"{name}.jsonl"
    if path.is_dir():
        path /= "metadata.jsonl"
    elif not path.exists() and bundled.exists():
        path = bundled
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in BUNDLED.glob("*.jsonl")))
        raise ValueError(
            f"no suite {str(name)!r}: expected one of {known}, a JSONL file, or a folder with metadata.jsonl"
        )
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            items.append(_item(json.loads(line), path.parent))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}, line {number}: {reason}") from None
    if len({item.id for item in items}) != len(items):
        raise ValueError(f"{path}: two items have the same id")
    return items


def _item(data: dict[str, Any], folder: Path) -> Item:
    if "instruction" in data:
        return Item(str(data["key"]), data["category"], data["instruction"], folder / data["file_name"])
    scenes = {k: Scene.from_dict(data[k]) for k in ("scene", "before") if data.get(k)}
    image = folder / data["image"] if data.get("image") else None
    rest = {k: data[k] for k in ("text", "width", "height", "seed") if k in data}
    return Item(str(data["id"]), data["category"], data["prompt"], image, **rest, **scenes)
