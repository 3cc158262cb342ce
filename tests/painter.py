"""A pipeline that draws what a suite asks for, and suites for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from fluxkiln.bench import suite
from fluxkiln.bench.shapes_scene import Background, Scene, Thing, draw

SCENE = Scene(Background("plain", "blue"), (Thing.of("star", "red", "large"),))
AFTER = SCENE.replace(things=(SCENE.things[0].replace(color="white"),))
LAST = AFTER.replace(background=Background("plain", "green"))
ITEMS = [
    suite.Item("single-0", "single", "a large red star on a blue background", scene=SCENE, number=1),
    suite.Item("recolor-0", "recolor", "make the star white", scene=AFTER, before=SCENE, number=2),
    suite.Item("free-0", "free", "a fox", width=32, height=48, number=3),
]
TURNS = [
    suite.Item("t-1", "turn 1", "make the star white", scene=AFTER, before=SCENE, number=1),
    suite.Item("t-2", "turn 2", "put it on green", scene=LAST, before=AFTER, follows="t-1", number=2),
]


class Painter:
    """Stands in for a pipeline: makes what the suite asks for, or something else where `wrong` names the prompt.

    At guidance 0 everything is wrong.
    """

    side = 64
    transformer: Any = None

    def __init__(self, wrong: str = "", version: str = "1") -> None:
        self.wrong, self.version, self.calls = wrong, version, list[dict[str, Any]]()
        self.weights = "mine"

    def __call__(self, prompt: str, dry_run: bool = False, callback: object = None, **options: Any) -> Any:
        source = options.pop("image")
        seen = None if source is None else hashlib.sha256(source.tobytes()).hexdigest()
        key = json.dumps([self.version, self.wrong, self.weights, prompt, seen, options], sort_keys=True, default=str)
        timings = {"text": 0.1, "encode": 0.0, "modulate": 0.1, "steps": [0.2, 0.3], "decode": 0.1, "total": 1.0}
        parts = [{"name": "transformer", "identity": self.weights}]
        asked = {"num_inference_steps": options["num_inference_steps"] or 28}
        said = json.dumps({"request": asked, "timings": timings, "backend": "painter", "parts": parts})
        record = SimpleNamespace(key=key, to_json=lambda: said)
        if dry_run:
            return SimpleNamespace(images=[], record=record)
        self.calls.append({"prompt": prompt, "image": source, **options})
        scenes = {item.prompt: item.scene for item in (*ITEMS, *TURNS)}
        wrong = prompt == self.wrong or options["guidance_scale"] == 0
        scene = None if wrong else scenes.get(prompt)
        size = (options["width"] or 64, options["height"] or 64)
        picture = Image.new("RGB", size, "green") if scene is None else draw(scene, *size)
        return SimpleNamespace(images=[picture], record=record)


def suite_file(folder: Path, items: list[suite.Item]) -> Path:
    lines = []
    for item in items:
        data = {k: v for k, v in dataclasses.asdict(item).items() if v is not None and k != "number"}
        data |= {key: getattr(item, key).to_dict() for key in ("scene", "before") if getattr(item, key)}
        lines.append(json.dumps(data))
    (folder / "suite.jsonl").write_text("\n".join(lines))
    return folder / "suite.jsonl"
