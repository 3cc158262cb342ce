"""The record: nothing is lost on the way through JSON, and its key is what decides the bytes, no more and no less."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fluxkiln.kernels import tiles
from fluxkiln.record import (
    DETERMINISM,
    ORIENTATION,
    Layer,
    Part,
    Picture,
    Record,
    Request,
    Timings,
    pixel_digest,
    versions,
)


def make(**changes: Any) -> Record:
    """A record of a batch of two with something in every field."""
    pictures = (Picture("reference", "photo.jpg", "ab" * 32, (640, 480), (1184, 880), "lanczos"),)
    request = Request(
        mode="edit",
        prompts=("a fox\nin the snow", "ein Fuchs, im Schnee – 雪狐 🦊"),
        seeds=(7, 2**63 - 1),
        width=1184,
        height=880,
        num_inference_steps=3,
        schedule=(1.0, 0.8571428571428571, 0.1, 0.0),
        guidance=(2.5, 2.5, 1e-3),
        negative_prompts=("", "blurry"),
        true_cfg_scale=1.5,
        pictures=pictures,
        options={"padding_mask_crop": 32, "mask_feather": None},
    )
    blocks = tuple(
        Layer(f"double_blocks.{i}.{name}", op, "eager", "fp8" if i else "bf16", 100, emulated=bool(i))
        for i in range(3)
        for name, op in (("qkv", "qkv_rope"), ("proj", "linear_gate_residual"))
    )
    record = Record(
        request=request,
        parts=(Part("transformer", "tiny.safetensors", "bfl", "12" * 32), Part("vae", "ae", "bfl", "34" * 32)),
        backend="eager",
        precision="fp8",
        dtype="bfloat16",
        device="cpu",
        plan=(Layer("embed", "linear", "eager", "bf16", 50), *blocks, Layer("final", "linear", "eager", "bf16", 50)),
        determinism="rows-to-rounding",
        versions={"torch": "2.13.0", "fluxkiln": "0.1.0"},
        reasons={"triton": "no GPU"},
        notices=("1000 is not a multiple of 16",),
        timings=Timings(text=0.25, steps=(0.5, 0.5, 0.5), total=2.0),
        peak_memory=2**40,
    )
    return dataclasses.replace(record, **changes)


def test_json_round_trip_keeps_everything() -> None:
    record = make()
    assert Record.from_json(record.to_json()) == record
    assert Record.from_json(record.image(1).to_json(indent=2)).index == 1
    plain = make(timings=None, peak_memory=None, plan=(), reasons={}, notices=())
    assert Record.from_json(plain.to_json()) == plain


def test_json_is_the_same_whatever_order_mappings_were_filled_in() -> None:
    turned = make(versions=dict(reversed(make().versions.items())))
    assert turned.to_json() == make().to_json()
    assert turned.key == make().key


def test_the_plan_is_grouped_by_what_layers_share() -> None:
    record = make()
    plan = json.loads(record.to_json())["plan"]
    assert [(entry["name"], entry["format"], entry.get("blocks")) for entry in plan] == [
        ("embed", "bf16", None),
        ("double_blocks.*.qkv", "bf16", [[0, 0]]),
        ("double_blocks.*.proj", "bf16", [[0, 0]]),
        ("double_blocks.*.qkv", "fp8", [[1, 2]]),
        ("double_blocks.*.proj", "fp8", [[1, 2]]),
        ("final", "bf16", None),
    ]


def test_the_plans_order_is_kept_where_blocks_differ() -> None:
    names = [(f"double_blocks.{i}.{name}", name) for i in range(12) for name in ("qkv", "proj")]
    plan = tuple(
        Layer(name, part, "eager", "bf16" if name.startswith("double_blocks.0.q") else "fp8") for name, part in names
    )
    assert Record.from_json(make(plan=plan).to_json()).plan == plan


def test_coverage_counts_weights_and_says_what_is_emulated() -> None:
    assert make().coverage == pytest.approx({"bf16": 300 / 700, "fp8 (emulated)": 400 / 700})
    assert make(plan=()).coverage == {}


def changed_request(**changes: Any) -> Record:
    return make(request=dataclasses.replace(make().request, **changes))


PHOTO = make().request.pictures[0]
DECIDES = {
    "prompt": changed_request(prompts=("a fox", "a dog")),
    "seed": changed_request(seeds=(7, 8)),
    "schedule": changed_request(schedule=(1.0, 0.8571428571428572, 0.1, 0.0)),
    "guidance": changed_request(guidance=None),
    "negative prompt": changed_request(negative_prompts=None),
    "option": changed_request(options={"padding_mask_crop": 33, "mask_feather": None}),
    "picture": changed_request(pictures=(dataclasses.replace(PHOTO, sha256="ac" * 32),)),
    "role": changed_request(pictures=(dataclasses.replace(PHOTO, role="control"),)),
    "weights": make(parts=(Part("transformer", "tiny.safetensors", "bfl", "13" * 32), make().parts[1])),
    "backend": make(backend="triton"),
    "precision": make(precision="bf16"),
    "device": make(device="cuda"),
    "variant": make(variant="kontext"),
    "recipe": make(recipe='{"name": "fp8"}'),
    "plan": make(plan=(*make().plan[:-1], Layer("final", "linear", "triton", "bf16", 50))),
    "version": make(versions={"torch": "2.13.1", "fluxkiln": "0.1.0"}),
}


@pytest.mark.parametrize("name", DECIDES)
def test_key_changes_with(name: str) -> None:
    assert DECIDES[name].key != make().key


def test_key_ignores_measurements_names_and_sentences() -> None:
    moved = tuple(dataclasses.replace(part, source="elsewhere") for part in make().parts)
    renamed = (dataclasses.replace(make().request.pictures[0], name="copy.png"),)
    assert make(timings=None, peak_memory=1, notices=(), reasons={}, index=1, parts=moved).key == make().key
    assert changed_request(pictures=renamed).key == make().key


def test_one_image_of_a_batch() -> None:
    second = make().image(1)
    assert (second.seed, second.prompt) == (2**63 - 1, make().request.prompts[1])
    with pytest.raises(ValueError, match="2 images, there is no image 2"):
        make().image(2)


def test_arguments_repeat_the_call() -> None:
    assert make().request.arguments() == {
        "prompt": list(make().request.prompts),
        "negative_prompt": ["", "blurry"],
        "true_cfg_scale": 1.5,
        "width": 1184,
        "height": 880,
        "num_inference_steps": 3,
        "guidance_scale": [2.5, 2.5, 1e-3],
        "seed": [7, 2**63 - 1],
        "max_sequence_length": 512,
        "padding_mask_crop": 32,
    }
    with pytest.raises(ValueError, match="does not hold the latents"):
        changed_request(unrepeatable=("latents",)).request.arguments()


def test_differences_name_what_changed() -> None:
    assert make().differences(make(timings=None, notices=())) == []
    now = make(
        parts=(Part("transformer", "other.safetensors", "bfl", "99" * 32),),
        device="cuda",
        recipe='{"name": "mine"}',
        plan=(*make().plan[:-2], Layer("final", "linear", "triton", "bf16", 50)),
        versions={"torch": "2.14.0", "fluxkiln": "0.1.0", "gpu": "L4"},
    )
    recorded = make(recipe='{"name": "fp8"}')
    assert recorded.differences(recorded) == []
    assert recorded.differences(now) == [
        "transformer: recorded tiny.safetensors (121212121212), here other.safetensors (999999999999)",
        "vae: recorded ae (343434343434), here none",
        "device: recorded cpu, here cuda",
        "recipe: other rules than recorded",
        "plan: 2 layers are bound otherwise, first double_blocks.2.proj",
        "gpu: recorded none, here L4",
        "torch: recorded 2.13.0, here 2.14.0",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: "{", "not a fluxkiln record"),
        (lambda d: "[]", "no schema number"),
        (lambda d: d | {"schema": 2}, "schema 2, this fluxkiln reads up to 1"),
        (lambda d: d | {"colour": "red"}, "no field 'colour'"),
        (lambda d: {k: v for k, v in d.items() if k != "backend"}, "backend"),
        (lambda d: d | {"plan": 3}, "not a fluxkiln record"),
        (lambda d: d | {"plan": [d["plan"][1] | {"blocks": [[0, 20_000]]}]}, "no model has them"),
        (lambda d: d | {"plan": [d["plan"][1] | {"blocks": [[-(10**12), 0]]}]}, "no model has them"),
        (lambda d: d | {"plan": [d["plan"][1] | {"blocks": [[0, 999]] * 10**6}]}, "after 11000 layers"),
        (lambda d: d | {"determinism": "surely"}, "surely"),
        (lambda d: d | {"request": d["request"] | {"prompts": "abc"}}, "abc"),
        (lambda d: d | {"request": d["request"] | {"seeds": ["7", "8"]}}, "'7'"),
        (lambda d: d | {"index": 2}, "no image 2"),
    ],
)
def test_what_is_no_record_is_refused_with_a_sentence(change: Any, message: str) -> None:
    data = change(json.loads(make().to_json()))
    with pytest.raises(ValueError, match="record") as refusal:
        Record.from_json(data if isinstance(data, str) else json.dumps(data))
    assert message in str(refusal.value)


def test_pixel_digest_is_of_the_pixels(tmp_path: Any) -> None:
    image = Image.effect_noise((20, 10), 60).convert("RGB")
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.webp", lossless=True)
    one, two = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.webp")
    assert pixel_digest(one) == pixel_digest(two) == pixel_digest(image)
    assert pixel_digest(image.transpose(Image.Transpose.ROTATE_90)) != pixel_digest(image)
    assert pixel_digest(image.convert("RGBA")) != pixel_digest(image)
    red, blue = Image.new("P", (2, 2)), Image.new("P", (2, 2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert pixel_digest(red) != pixel_digest(blue)
    # What makes other pictures of the same pixels.
    turned = Image.Exif()
    turned[ORIENTATION] = 3
    image.save(tmp_path / "turned.png", exif=turned)
    image.save(tmp_path / "holes.png", transparency=image.getpixel((0, 0)))
    digests = [pixel_digest(Image.open(tmp_path / f"{name}.png")) for name in ("turned", "holes")]
    assert len({*digests, pixel_digest(image)}) == 3
    picture = Picture.of("reference", one, (32, 16), "lanczos")
    assert (picture.name, picture.size, picture.sha256) == ("a.png", (20, 10), pixel_digest(image))


def test_versions_are_those_installed() -> None:
    found = versions("cpu")
    assert found["torch"] == torch.__version__
    assert {"fluxkiln", "python", "numpy", "pillow", "transformers", "cpu"} <= found.keys()


def test_measured_tiles_are_a_version_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(tiles, "MEASURED", tmp_path / "tiles.json")
    found = [versions("cuda")]
    for text in ("{}", "[]"):
        tiles.MEASURED.write_text(text)
        found.append(versions("cuda"))
    assert "tiles" not in found[0]
    assert len({version.pop("tiles", None) for version in found}) == 3
    assert found[0] == found[1] == found[2]


def test_printed_it_is_a_page() -> None:
    page = str(make()).splitlines()
    assert page[0] == "mode         edit"
    assert len(page) < 30


def test_every_promise_is_explained() -> None:
    assert make().determinism in DETERMINISM
