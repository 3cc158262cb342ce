"""Write the benchmark's held-out prompts and edits: `python -m shapes.make_suite FILE` (in tools/)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from . import captions

COUNTS = {"single": 150, "pair": 150, "count": 100, "word": 100}
EDITS_EACH = 72  # of each of the seven kinds


def samples(seed: int = 2024) -> list[captions.Sample]:
    """Held-out samples, each combination once, every attribute said in the caption."""
    rng, seen, result = Random(seed), set[str](), []
    wanted = {**COUNTS, **dict.fromkeys(captions.EDITS, EDITS_EACH)}
    for kind, n in wanted.items():
        while n:
            sample = captions.edit(rng, kind) if kind in captions.EDITS else captions.text_to_image(rng, kind, True)
            if sample.held_out and sample.combination not in seen:
                seen.add(sample.combination)
                result.append(sample)
                n -= 1
    return result


def main() -> None:
    numbers: dict[str, int] = {}
    lines = []
    for sample in samples():
        number = numbers[sample.kind] = numbers.get(sample.kind, -1) + 1
        item = {"id": f"{sample.kind}-{number:03}", "category": sample.kind, "prompt": sample.caption}
        item["scene"] = sample.scene.to_dict()
        if sample.before:
            item["before"] = sample.before.to_dict()
        if sample.scene.word:
            item["text"] = sample.scene.word
        lines.append(json.dumps(item, separators=(",", ":")))
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
