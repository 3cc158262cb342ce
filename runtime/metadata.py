"""Image files that say how they were made, written whole or not at all.

    PNG         text chunk `parameters` (the format of the A1111 web UI), text chunk `fluxkiln` (the record, JSON)
    JPEG, WebP  EXIF UserComment, `UNICODE` + UTF-16BE:  parameters, a line break, `fluxkiln: `, the record, JSON
    all         XMP with IPTC's digital source type

A JPEG's EXIF ends at 64 KiB: a longer comment is cut short there, and the whole of it follows as UTF-8 in APP10
segments, each beginning with `fluxkiln\0`.

The record in a file has no measurements, so the same request writes the same file.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import itertools
import json
import os
import re
import secrets
import string
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from fluxkiln.record import Record

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
FIELDS = ("date", "height", "index", "model", "prompt", "seed", "steps", "time", "width")

_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
}
_MAX_SIDE = {"JPEG": 65_500, "WEBP": 16_383}  # pixels that the format can hold
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_EXIF_IFD, _USER_COMMENT, _SOFTWARE = 0x8769, 0x9286, 0x0131
_UNICODE = b"UNICODE\0"  # EXIF's name for UTF-16
_JSON_MARK = "\nfluxkiln: "
_JPEG_APP10, _SEGMENT_ID, _SEGMENT_BYTES = b"\xff\xea", b"fluxkiln\0", 65_000
_EXIF_CHARACTERS = 32_000  # UTF-16 characters that leave room for the rest of a 64 KiB segment


def save(image: Image.Image, path: str | Path, record: Record | None = None, overwrite: bool = False) -> Path:
    """Write an image: PNG and WebP without loss, JPEG at quality 95 without chroma subsampling.

    The file appears complete or not at all. If the name is taken, `name-1`, `name-2` and so on is used instead.

    Args:
        image: 8-bit RGB or grayscale.
        path: ends in .png, .jpg, .jpeg or .webp; missing folders are made.
        record: what the file shall say; None for no metadata.
        overwrite: replace a file of that name.

    Returns:
        the path written.

    Raises:
        ValueError: another suffix, or a picture too large for the format.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    data = encode(image, format_of(path), record)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        temporary.write_bytes(data)
        if overwrite:
            os.replace(temporary, path)
            return path
        for n in itertools.count():
            candidate = path.with_name(f"{path.stem}-{n}{path.suffix}") if n else path
            if _rename_to_free(temporary, candidate):
                return candidate
        raise AssertionError("unreachable")
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # not the temporary name, and a full disk has none
        raise
    finally:
        temporary.unlink(missing_ok=True)


def encode(image: Image.Image, format: str, record: Record | None = None) -> bytes:
    """An image file as bytes; `format` is PNG, JPEG or WEBP. See `save`."""
    if max(image.size) > (side := _MAX_SIDE.get(format, max(image.size))):
        raise ValueError(f"{image.width} x {image.height} pixels, but a {format} file holds {side:,} a side: use .png")
    options = dict(_OPTIONS[format])
    if record is not None:
        record = dataclasses.replace(record, timings=None, peak_memory=None)
        parameters, source, xmp = parameters_text(record), record.to_json(), _xmp_packet(record)
        if format == "PNG":
            chunks = PngImagePlugin.PngInfo()
            chunks.add_text("parameters", parameters)
            chunks.add_text("fluxkiln", source)
            chunks.add_itxt("XML:com.adobe.xmp", xmp)
            options["pnginfo"] = chunks
        else:
            comment = parameters + _JSON_MARK + source
            if format == "JPEG" and len(comment.encode("utf-16-be")) > 2 * _EXIF_CHARACTERS:
                options["extra"] = _segments(comment.encode())
                comment = comment[: _EXIF_CHARACTERS // 2] + " …"
            options |= {"exif": _exif(comment), "xmp": xmp.encode()}
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def read(path: str | Path) -> Record:
    """The record that an image file carries.

    Raises:
        ValueError: not an image, or one without a record.
        OSError: it cannot be read.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            return _record(image, Path(path))
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a PNG, JPEG or WebP image") from None
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    except OSError as error:
        if error.errno is None:  # Pillow's own, not the system's
            raise ValueError(f"{path} is damaged: {error}") from None
        raise


def _record(image: Image.Image, path: Path) -> Record:
    source: str | None
    if isinstance(image, PngImagePlugin.PngImageFile):
        source = image.text.get("fluxkiln")
    else:
        segments = [data for marker, data in getattr(image, "applist", []) if marker == "APP10"]
        whole = b"".join(data[len(_SEGMENT_ID) :] for data in segments if data.startswith(_SEGMENT_ID))
        comment = whole.decode("utf-8", "replace") or _user_comment(image)
        # The prompt stands before the record and may contain anything, the mark included.
        _, mark, source = comment.rpartition(_JSON_MARK + '{"schema": ')
        source = '{"schema": ' + source if mark else None
    if source is None:
        raise ValueError(f"{path} carries no fluxkiln record: it was saved without metadata, or by another program")
    return Record.from_json(source)


def parameters_text(record: Record) -> str:
    """How the image was made, in the one-text format of the A1111 web UI that other programs read."""
    request, at = record.request, record.index or 0
    lines = [record.prompt]
    if request.negative_prompts is not None:
        lines.append(f"Negative prompt: {request.negative_prompts[at]}")
    fields: dict[str, object] = {
        "Steps": request.num_inference_steps,
        "Sampler": "Euler",
        "CFG scale": f"{request.true_cfg_scale:g}",
    }
    if request.guidance:
        fields["Distilled CFG Scale"] = ", ".join(f"{g:g}" for g in dict.fromkeys(request.guidance))
    fields |= {"Seed": record.seed, "Size": f"{request.width}x{request.height}"}
    if transformer := next((part for part in record.parts if part.name == "transformer"), None):
        fields |= {"Model hash": transformer.identity[:10], "Model": Path(transformer.source).stem}
    if request.strength is not None:
        fields["Denoising strength"] = f"{request.strength:g}"
    fields["Version"] = f"fluxkiln {record.versions.get('fluxkiln', 'unknown')}"
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items())])


def format_of(path: str | Path) -> str:
    """The image format that a file name asks for.

    Raises:
        ValueError: none that can be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{str(path)!r} must end in {', '.join(SUFFIXES)}")
    return SUFFIXES[suffix]


def check_template(template: str) -> None:
    """Refuse a name that is no image or asks for an unknown field.

    Raises:
        ValueError: says which.
    """
    format_of(template)
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"output name {template!r}: {error}; write {{{{ and }}}} for braces themselves") from None
    for _, name, specification, conversion in parts:
        if name is None:
            continue
        if name not in FIELDS or conversion:
            raise ValueError(f"output name {template!r}: no field {{{name}}}; the fields are {', '.join(FIELDS)}")
        if specification and (name not in ("index", "seed") or not re.fullmatch(r"0?\d{1,2}", specification)):
            raise ValueError(f"output name {template!r}: {{{name}:{specification}}} must be like {{index:03}}")


def expand(template: str, record: Record, index: int, when: datetime.datetime | None = None) -> Path:
    """The path that an output name stands for: `{date}/{prompt}-{seed}.png`.

    Field values never contain a path separator, so only the template itself decides the folder.

    Args:
        template: a path with fields, see `FIELDS`; `{index:03}` pads with zeros.
        record: of the image.
        index: number of the image in the run, from 0.
        when: local time to use for `{date}` and `{time}`, now by default.

    Raises:
        ValueError: see `check_template`.
    """
    check_template(template)
    when = when or datetime.datetime.now()
    transformer = next((Path(part.source).stem for part in record.parts if part.name == "transformer"), "model")
    request = record.request
    return Path(
        template.format(
            date=f"{when:%Y-%m-%d}",
            time=f"{when:%H%M%S}",
            index=index,
            model=_slug(transformer),
            prompt=_slug(record.prompt),
            seed=record.seed,
            steps=request.num_inference_steps,
            width=request.width,
            height=request.height,
        )
    )


def digital_source_type(record: Record) -> str:
    """IPTC's word for where the picture comes from.

    A model's alone, or a composite if a picture went in that does not itself say that a model made it.
    """
    real = any(p.role in ("image", "reference") and not p.synthetic for p in record.request.pictures)
    return _SOURCE_TYPE + ("compositeWithTrainedAlgorithmicMedia" if real else "trainedAlgorithmicMedia")


def _slug(text: str) -> str:
    return re.sub(r"[^\w]+", "-", text).strip("-_")[:48].rstrip("-_") or "untitled"


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def _xmp_packet(record: Record) -> str:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n'
        '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">\n'
        f"<xmp:CreatorTool>fluxkiln {record.versions.get('fluxkiln', 'unknown')}</xmp:CreatorTool>\n"
        f"<Iptc4xmpExt:DigitalSourceType>{digital_source_type(record)}</Iptc4xmpExt:DigitalSourceType>\n"
        "</rdf:Description></rdf:RDF></x:xmpmeta>\n"
        '<?xpacket end="r"?>'
    )


def _exif(comment: str) -> Image.Exif:
    exif = Image.Exif()
    exif[_SOFTWARE] = "fluxkiln"
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNICODE + comment.encode("utf-16-be")
    return exif


def _user_comment(image: Image.Image) -> str:
    value = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
    if not isinstance(value, bytes) or not value.startswith(_UNICODE):
        return ""
    return value[len(_UNICODE) :].decode("utf-16-be", "replace")


def _segments(text: bytes) -> bytes:
    cut = (text[i : i + _SEGMENT_BYTES] for i in range(0, len(text), _SEGMENT_BYTES))
    return b"".join(
        _JPEG_APP10 + (2 + len(_SEGMENT_ID) + len(part)).to_bytes(2, "big") + _SEGMENT_ID + part for part in cut
    )


def _rename_to_free(source: Path, target: Path) -> bool:
    """Rename unless the name is taken; False if it is."""
    try:
        os.link(source, target)  # unlike a rename, never replaces
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: claim the name, then replace the empty file
        try:
            target.touch(exist_ok=False)
        except FileExistsError:
            return False
        os.replace(source, target)
    return True
