"""What is written into image files, read back by this module and by code that knows nothing of it."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import os
import struct
import threading
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxkiln import metadata
from fluxkiln.record import Part, Picture, Record, Request, Timings

SUFFIXES = [".png", ".jpg", ".webp"]
PROMPTS = {
    "plain": "a red fox",
    "empty": "",
    "lines": "a red fox\nNegative prompt: no\r\n\ttabs, commas: all",
    "unicode": "Füchsin – 雪の中の狐 🦊 \u200d\u0301 e\u0301",
    "long": "very " * 10_000 + "long 狐",
    "our own mark": 'x\nfluxkiln: {"schema": 1}',
    "null": "a\0b",
}


def make(prompt: str = "a red fox", pictures: tuple[Picture, ...] = (), **changes: Any) -> Record:
    request = Request(
        "text-to-image", (prompt,), (7,), 1024, 768, 28, (1.0, 0.5, 0.0), guidance=(3.5,) * 28, pictures=pictures
    )
    record = Record(
        request=request,
        parts=(Part("transformer", "flux1-dev.safetensors", "bfl", "0123456789abcdef" * 4),),
        backend="eager",
        precision="bf16",
        dtype="bfloat16",
        device="cpu",
        plan=(),
        determinism="rows-to-rounding",
        versions={"fluxkiln": "0.1.0"},
        timings=Timings(total=1.0),
        peak_memory=5,
    )
    return dataclasses.replace(record, **changes)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_round_trip(tmp_path: Path, image: Image.Image, suffix: str, prompt: str) -> None:
    record = make(prompt)
    path = metadata.save(image, tmp_path / f"a{suffix}", record)
    assert metadata.read(path) == dataclasses.replace(record, timings=None, peak_memory=None)
    with Image.open(path) as saved:
        saved.load()
        if suffix != ".jpg":
            assert np.array_equal(np.asarray(saved.convert("RGB")), np.asarray(image))


def png_text(path: Path) -> dict[str, str]:
    """The text chunks of a PNG by the letter of its specification."""
    data, at, found = path.read_bytes(), 8, {}
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        if kind == b"tEXt":
            name, text = body.split(b"\0", 1)
            found[name.decode()] = text.decode("latin-1")
        elif kind == b"iTXt":
            name, rest = body.split(b"\0", 1)
            assert rest[0] == 0  # not compressed
            found[name.decode()] = rest[2:].split(b"\0", 2)[2].decode()
        at += 12 + length
    return found


@pytest.mark.parametrize("prompt", ["a red fox", "Füchsin", "狐"])
def test_png_chunks_by_the_specification(tmp_path: Path, image: Image.Image, prompt: str) -> None:
    text = png_text(metadata.save(image, tmp_path / "a.png", make(prompt)))
    assert text["parameters"].split("\n")[0] == prompt
    assert Record.from_json(text["fluxkiln"]).prompt == prompt


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_exif_user_comment_is_utf16_with_its_mark(tmp_path: Path, image: Image.Image, suffix: str) -> None:
    path = metadata.save(image, tmp_path / f"a{suffix}", make("Füchsin 🦊"))
    with Image.open(path) as saved:
        comment = saved.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be").startswith("Füchsin 🦊\nSteps: 28, ")


def test_a_long_jpeg_comment_stays_readable_for_others(tmp_path: Path, image: Image.Image) -> None:
    path = metadata.save(image, tmp_path / "a.jpg", make(PROMPTS["long"]))
    with Image.open(path) as saved:
        comment = saved.getexif().get_ifd(0x8769)[0x9286][8:].decode("utf-16-be")
    assert comment.startswith("very very ")
    assert comment.endswith(" …")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("pictures", "kind"),
    [
        ((), "trainedAlgorithmicMedia"),
        ((Picture("reference", None, "", (1, 1), (1, 1), "none"),), "compositeWithTrainedAlgorithmicMedia"),
        ((Picture("image", None, "", (1, 1), (1, 1), "none", synthetic=True),), "trainedAlgorithmicMedia"),
        ((Picture("control", None, "", (1, 1), (1, 1), "none"),), "trainedAlgorithmicMedia"),
    ],
)
def test_xmp_names_the_digital_source(
    tmp_path: Path, image: Image.Image, suffix: str, pictures: Any, kind: str
) -> None:
    path = metadata.save(image, tmp_path / f"a{suffix}", make(pictures=pictures))
    with Image.open(path) as saved:
        packet = saved.info.get("xmp") or saved.info["XML:com.adobe.xmp"]
        assert Picture.of("image", saved, (1, 1)).synthetic == (kind == "trainedAlgorithmicMedia")
    packet = packet if isinstance(packet, str) else packet.decode()
    tree = ET.fromstring(packet[packet.index("<x:xmpmeta") : packet.index("<?xpacket end")])
    found = tree.findall(".//{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert [e.text for e in found] == [f"http://cv.iptc.org/newscodes/digitalsourcetype/{kind}"]


def test_parameters_text() -> None:
    assert metadata.parameters_text(make()) == (
        "a red fox\nSteps: 28, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 7, Size: 1024x768, "
        "Model hash: 0123456789, Model: flux1-dev, Version: fluxkiln 0.1.0"
    )
    request = dataclasses.replace(
        make().request,
        prompts=("a", "b"),
        seeds=(1, 2),
        negative_prompts=("", "blurry"),
        true_cfg_scale=2.5,
        guidance=(4.0, 4.0, 1.5),
        strength=0.6,
    )
    assert metadata.parameters_text(make(request=request, index=1)) == (
        'b\nNegative prompt: blurry\nSteps: 28, Sampler: Euler, CFG scale: 2.5, Distilled CFG Scale: "4, 1.5", '
        "Seed: 2, Size: 1024x768, Model hash: 0123456789, Model: flux1-dev, Denoising strength: 0.6, "
        "Version: fluxkiln 0.1.0"
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_metadata(tmp_path: Path, image: Image.Image, suffix: str) -> None:
    path = metadata.save(image, tmp_path / f"a{suffix}")
    data = path.read_bytes()
    assert b"fluxkiln" not in data
    assert b"digitalsourcetype" not in data
    with pytest.raises(ValueError, match="carries no fluxkiln record"):
        metadata.read(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_same_record_same_file(image: Image.Image, suffix: str) -> None:
    format = metadata.SUFFIXES[suffix]
    slow = make(timings=Timings(total=99.0), peak_memory=1)
    assert metadata.encode(image, format, make()) == metadata.encode(image, format, slow)


def test_read_refuses_what_is_no_image(tmp_path: Path, image: Image.Image) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match="is not a PNG, JPEG or WebP image"):
        metadata.read(tmp_path / "text.png")
    whole = metadata.encode(image, "PNG", make())
    (tmp_path / "cut.png").write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"cut\.png"):
        metadata.read(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError):
        metadata.read(tmp_path / "absent.png")


def test_never_overwrites_unless_asked(tmp_path: Path, image: Image.Image) -> None:
    first = metadata.save(image, tmp_path / "sub" / "a.png")
    before = first.read_bytes()
    assert metadata.save(image, first, make()).name == "a-1.png"
    assert metadata.save(image, first, make()).name == "a-2.png"
    assert first.read_bytes() == before
    assert metadata.save(image, first, make(), overwrite=True) == first
    assert first.read_bytes() != before
    assert sorted(p.name for p in first.parent.iterdir()) == ["a-1.png", "a-2.png", "a.png"]


def test_writers_of_one_name_do_not_meet(tmp_path: Path, image: Image.Image) -> None:
    written: list[Path] = []

    def write(i: int) -> None:
        written.append(metadata.save(image.copy(), tmp_path / "a.png", make(str(i))))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(written)) == 8
    assert {metadata.read(path).prompt for path in written} == {str(i) for i in range(8)}


def test_without_hard_links(tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise PermissionError("not on this file system")

    monkeypatch.setattr(os, "link", link)
    paths = [metadata.save(image, tmp_path / "a.png", make()) for _ in range(2)]
    assert [p.name for p in paths] == ["a.png", "a-1.png"]
    assert metadata.read(paths[1]).seed == 7
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_leaves_nothing(tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="disk full") as refusal:
        metadata.save(image, tmp_path / "a.png", overwrite=True)
    assert refusal.value.filename == str(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_name_templates() -> None:
    when = datetime.datetime(2026, 11, 21, 5, 4, 3)
    record = make("../a fox: \\ {seed} 狐")
    name = metadata.expand(
        "{date}/{time}_{model}_{prompt}_{seed:03}_{index:4}_{width}x{height}_{steps}.png", record, 2, when
    )
    assert str(name) == "2026-11-21/050403_flux1-dev_a-fox-seed-狐_007_   2_1024x768_28.png"
    assert str(metadata.expand("{prompt}.jpg", make("/"), 0)) == "untitled.jpg"
    assert str(metadata.expand("{{x}}.webp", make(), 0)) == "{x}.webp"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a.gif", r"must end in .png, .jpg, .jpeg, .webp"),
        ("a", "must end in"),
        ("{user}.png", r"no field {user}; the fields are date, height"),
        ("{seed.__class__}.png", "no field"),
        ("{0}.png", "no field"),
        ("{}.png", "no field"),
        ("{seed!r}.png", "no field"),
        ("{seed:999999999}.png", "must be like"),
        ("{prompt:.3}.png", "must be like"),
        ("{seed.png", "for braces"),
    ],
)
def test_name_templates_that_are_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metadata.check_template(template)


@pytest.mark.parametrize(("name", "side"), [("a.webp", 16_383), ("a.jpg", 65_500)])
def test_a_picture_too_large_for_its_format_is_refused(tmp_path: Path, name: str, side: int) -> None:
    metadata.save(Image.new("RGB", (side, 1)), tmp_path / name)
    with pytest.raises(ValueError, match=f"{side + 1} x 1 pixels, but a .* file holds {side:,} a side: use .png"):
        metadata.save(Image.new("RGB", (side + 1, 1)), tmp_path / f"large-{name}")
    assert [file.name for file in tmp_path.iterdir()] == [name]
