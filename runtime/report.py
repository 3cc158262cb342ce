"""A record as a page of text: what `--dry-run` prints before a run and `fluxkiln info` about an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fluxkiln.record import DETERMINISM, Record


def to_text(record: Record) -> str:
    """One line for each thing a person asks; the JSON form has everything."""
    request = record.request
    lines: list[tuple[str, str]] = [("mode", request.mode)]
    at = range(len(request.prompts)) if record.index is None else [record.index]
    for i in at:
        lines.append(("prompt", f"{request.prompts[i]!r}, seed {request.seeds[i]}"))
        for name, texts in (("for T5", request.prompts_2), ("negative", request.negative_prompts)):
            if texts is not None:
                lines.append((name, repr(texts[i])))
    for picture in request.pictures:
        seen = "" if picture.used == picture.size else f", seen as {_size(picture.used)} ({picture.resize})"
        lines.append((picture.role, f"{picture.name or 'in memory'}, {_size(picture.size)}{seen}"))
    lines.append(("size", _size((request.width, request.height))))
    lines.append(("schedule", f"{len(request.schedule) - 1} steps: {_shortened(request.schedule)}"))
    if request.guidance:
        lines.append(("guidance", _shortened(dict.fromkeys(request.guidance))))
    if request.true_cfg_scale != 1:
        lines.append(("true cfg", f"{request.true_cfg_scale:g}, two passes a step"))
    if request.strength is not None:
        lines.append(("strength", f"{request.strength:g}"))
    lines += [(name, str(value)) for name, value in request.options.items() if value is not None]
    lines += [(part.name, f"{part.source} ({part.kind}, {part.identity[:12]})") for part in record.parts]
    lines.append(("backend", f"{record.backend}, {record.precision} on {record.device}, dtype {record.dtype}"))
    if record.why:
        lines.append(("chosen", record.why))
    lines += [(f"not {backend}", reason) for backend, reason in record.reasons.items()]
    if record.plan:
        layers = Counter(f"{layer.op} by {layer.implementation}" for layer in record.plan)
        lines.append(("plan", ", ".join(f"{count} x {what}" for what, count in layers.items())))
        lines.append(
            ("coverage", ", ".join(f"{share:.1%} of the weights in {f}" for f, share in record.coverage.items()))
        )
    lines.append(("promise", DETERMINISM[record.determinism]))
    lines.append(("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())))
    lines += [("notice", notice) for notice in record.notices]
    if record.timings:
        lines.append(("time", timings_text(record)))
    if record.peak_memory is not None:
        lines.append(("peak memory", f"{record.peak_memory / 2**20:,.0f} MiB"))
    return "\n".join(f"{name:12} {value}" for name, value in lines)


def timings_text(record: Record) -> str:
    """Seconds of each part that took any."""
    timings = record.timings
    if timings is None:
        return "not run"
    steps = f"{len(timings.steps)} steps {sum(timings.steps):.2f} s"
    parts = [
        f"{name} {seconds:.2f} s"
        for name, seconds in (("text", timings.text), ("encode", timings.encode), ("decode", timings.decode))
        if seconds
    ]
    return f"{timings.total:.2f} s ({', '.join([*parts[:-1], steps, *parts[-1:]])})"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _shortened(values: Iterable[float]) -> str:
    """All of a few values, the ends of many."""
    texts = [f"{value:.4g}" for value in values]
    return " ".join(texts if len(texts) <= 6 else [*texts[:3], "…", *texts[-3:]])
