"""An engine of the store as a transformer: found by its graph, supplied by name, held to its profile.

Only the last test runs engines: that needs an RTX card (`fluxkiln verify --engines` does the same there). What comes
before is done with a really built engine.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from fluxkiln import engine, sampling, verify_engines
from fluxkiln.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from fluxkiln.cli import main, pixels
from fluxkiln.config import FluxConfig
from fluxkiln.engines.flavour import flavour, log
from fluxkiln.engines.session import Session, SessionError, load
from fluxkiln.engines.store import PLAN, Manifest, Store, Stored, StoreError, refuse_tokens
from fluxkiln.kernels import Binding, RefusedError
from fluxkiln.kernels.recipe import RECIPES, Recipe
from fluxkiln.quantize import Layers
from fluxkiln.transformer import Transformer
from fluxkiln.verify import tiny_model

from parity import SMALL, random_tensors, relative

pytest.importorskip("tensorrt_rtx", reason="builds an engine: pip install 'fluxkiln[trt]'")

CPU = torch.device("cpu")


def checkpoint(folder: Path, config: FluxConfig = SMALL, seed: int = 0) -> Checkpoint:
    path = folder / f"{config.hidden_size}-{seed}.safetensors"
    save_checkpoint(path, ((name, t.bfloat16()) for name, t in random_tensors(config, seed).items()))
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Store:
    """A store with one engine, as `fluxkiln build` leaves it."""
    folder = tmp_path_factory.mktemp("store")
    model = str(checkpoint(models).path)
    sizes = ["--max-size", "256x256", "--references", "0"]
    assert main(["build", "--model", model, "--precision", "fp8", "--store", str(folder), *sizes, "--json"]) == 0
    return Store(folder)


def only(store: Store) -> Stored:
    (stored,) = store
    return stored


def find(store: Store, model: Checkpoint, recipe: Recipe = RECIPES["fp8"], **options: Any) -> Stored | str:
    from fluxkiln.export.weights import shadow

    meta = partial(shadow, model, recipe, torch.bfloat16)
    options = {"arch": "sm_89", "store": store, "identity": model.identity} | options
    return engine.find(model.config, recipe, CPU, torch.bfloat16, meta, **options)


# --- finding ------------------------------------------------------------------------------------


def test_an_engine_without_weights_serves_every_model_of_its_graph(built: Store, models: Path) -> None:
    for model in (checkpoint(models), checkpoint(models, seed=1)):
        found = find(built, model)
        assert isinstance(found, Stored), found
        assert found.key == only(built).key


def test_an_engine_that_does_not_fit_says_why(built: Store, models: Path) -> None:
    model, key = checkpoint(models), only(built).key
    wider = checkpoint(models, replace(SMALL, depth_single_blocks=2))
    assert "it was built from another graph" in str(find(built, wider))
    assert find(built, model, arch="sm_120") == (
        f"{built.root} has no engine for sm_120 and fp8: `fluxkiln build --model MODEL --precision fp8 --arch sm_120` "
        "makes one"
    )
    assert "has no engine for sm_89 and bf16" in str(find(built, model, RECIPES["bf16"]))
    assert (
        find(built, model, engine=key[:6], arch="sm_120") == f"engine {key}: it was built for sm_89, this GPU is sm_120"
    )
    assert "it was built by another recipe, in fp8" in str(find(built, model, RECIPES["bf16"], engine=key))
    narrow = replace(RECIPES["fp8"], attention="fp8")
    assert "has no engine for sm_89 and fp8" in str(find(built, model, narrow))
    assert engine.differences(RECIPES["fp8"]) == ()
    assert "one scale of v for each head" in engine.differences(narrow)[0]
    assert "0 engines in" in str(find(built, model, engine="fffff"))
    assert "has no readable manifest" in str(find(built, model, engine=models))
    assert str(find(built, model, arch="sm_90")).endswith("sm_120, sm_121, this GPU is sm_90")
    assert find(built, model, arch=None) == "an engine runs on an NVIDIA GPU, the model is to run on cpu"


def test_weights_inside_are_those_of_one_model(built: Store, models: Path, tmp_path: Path) -> None:
    stored, model = only(built), checkpoint(models)
    inside = Store(tmp_path)
    assert stored.manifest is not None
    subject = replace(stored.subject, weights="inside")
    plan = stored.plan.read_bytes()
    inside.add(subject, plan, model_name="m", structure=stored.manifest.structure)
    assert isinstance(find(inside, model), Stored)
    assert "the weights inside are those of another model, m" in str(find(inside, checkpoint(models, seed=1)))
    assert "another model" in str(find(inside, model, identity=None))


def test_of_several_the_one_that_takes_most_is_found(built: Store, models: Path, tmp_path: Path) -> None:
    store, stored = Store(tmp_path), only(built)
    assert stored.manifest is not None
    for tokens in (256, 1024, 512):
        shapes = stored.subject.profile | {"hidden_states": [[1, 256, 16], [1, 256, 16], [1, tokens, 16]]}
        subject = replace(stored.subject, profile=shapes)
        store.add(subject, stored.plan.read_bytes(), model_name="m", structure=stored.manifest.structure)
    found = find(store, checkpoint(models))
    assert isinstance(found, Stored)
    assert found.subject.profile["hidden_states"][2][1] == 1024


# --- running, as far as it goes without a GPU ---------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_session_without_a_gpu_says_so(built: Store) -> None:
    with pytest.raises(SessionError, match="an engine runs on an NVIDIA GPU, and torch finds none here"):
        Session(only(built))
    with pytest.raises(SessionError, match=r"does not load the engine .*: .*CUDA driver"):
        load(only(built))
    assert log().listeners == []  # nobody listens on: an engine's memory would live as long


def test_a_swapped_engine_is_not_loaded(built: Store, tmp_path: Path) -> None:
    """Same header, other content: only reading all of it tells."""
    stored = only(built)
    shutil.copytree(stored.folder, tmp_path / stored.key)
    plan = tmp_path / stored.key / PLAN
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    (swapped,) = Store(tmp_path)
    assert swapped.refusal is None
    with pytest.raises(StoreError, match="was changed after it was built"):
        load(swapped)


def test_every_weight_is_supplied_by_name_in_the_engines_form(built: Store, models: Path) -> None:
    stored, model = only(built), checkpoint(models)
    assert stored.manifest is not None
    layers = Layers(model, RECIPES["fp8"], CPU, torch.bfloat16)
    weights = engine.supply(stored, layers)
    assert weights is not None
    given = dict(weights)
    assert given.keys() == stored.manifest.parameters.keys()
    for name, parameter in stored.manifest.parameters.items():
        assert list(given[name].shape) == parameter["shape"], name
        assert given[name].is_contiguous()
    key = given["double_blocks.0.img_attn.qkv.outputs256.weight"]
    whole = layers.layer("double_blocks.0.img_attn.qkv").weight
    assert torch.equal(key.view(torch.uint8), whole.data[256:512].view(torch.uint8))  # type: ignore[union-attr]
    assert engine.supply(_inside(stored), layers) is None


def _inside(stored: Stored) -> Stored:
    assert stored.manifest is not None
    return replace(stored, manifest=replace(stored.manifest, subject=replace(stored.subject, weights="inside")))


def test_the_plan_says_what_the_build_found(built: Store) -> None:
    manifest = only(built).manifest
    assert manifest is not None
    assert engine.describe(manifest, "double_blocks.0.qkv", "qkv_rope", 7) == Binding("trt", "fp8", 7)
    assert engine.describe(manifest, "single_blocks.0.out", "linear_gate_residual", 7) == Binding("trt", "fp8", 7)
    assert engine.describe(manifest, "final", "linear", 7) == Binding("trt", "bf16", 7)
    assert engine.describe(manifest, "single_blocks.0.norm", "norm_modulate", 0) == Binding("trt", "bf16")
    assert engine.describe(manifest, "single_blocks.0.attention", "attention", 0) == Binding("trt", "bf16")
    fell = manifest.structure | {"fallen": {"double_blocks.0.txt_attn.qkv.outputs0": ["fp8", "bf16"]}}
    fallen = replace(manifest, structure=fell)
    assert engine.describe(fallen, "double_blocks.0.qkv", "qkv_rope", 7) == Binding("trt", "bf16+fp8", 7)
    assert engine.describe(fallen, "double_blocks.0.proj", "linear_gate_residual", 7) == Binding("trt", "fp8", 7)


@torch.no_grad()
def test_a_step_hands_the_graph_what_it_reads(built: Store, models: Path, tmp_path: Path) -> None:
    """onnxruntime in the engine's place, with the same graph in fp32: names, order, positions and batches are right.

    It says nothing of TensorRT.
    """
    model = checkpoint(models)
    folder = tmp_path / "onnx"
    assert main(["export", "--model", str(model.path), "--precision", "fp32", "-o", str(folder)]) == 0
    graph = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    batches = []

    def session(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batches.append(len(inputs["hidden_states"]))
        (latent,) = graph.run(None, {name: value.numpy() for name, value in inputs.items()})
        return {"latent": torch.from_numpy(latent)}

    layers = Layers(model, RECIPES["fp32"], CPU, torch.float32)
    by_graph = engine.EngineTransformer(SMALL, layers, only(built), session)
    g = torch.Generator().manual_seed(0)
    img, txt, pooled = (torch.randn(shape, generator=g) for shape in ((3, 256, 16), (3, 5, 48), (3, 24)))
    timestep, guidance = torch.tensor([0.25, 0.5, 1.0]), torch.tensor([3.5, 1.0, 7.0])
    img_ids, txt_ids = sampling.positions(16, 16), torch.zeros(3, 5, 3)
    call = (img, txt, pooled, timestep, guidance, img_ids, txt_ids)
    assert relative(by_graph(*call), Transformer(SMALL, layers)(*call)) < 5e-6
    assert batches == [1, 1, 1]  # the engine was built for one image
    with pytest.raises(ValueError, match=r"takes 256 to 256 image tokens .*, got 255: `fluxkiln build --model"):
        by_graph(img[:, 1:], *call[1:5], img_ids[1:], txt_ids)


def test_positions_are_those_of_one_image() -> None:
    txt, img = torch.zeros(3, 3), torch.arange(12.0).reshape(4, 3)
    assert torch.equal(engine.positions(txt, img.expand(2, -1, -1)), torch.cat((txt, img)))
    with pytest.raises(ValueError, match="one set of positions for all images"):
        engine.positions(txt, torch.stack((img, img + 1)))


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "text", "size"),
    [
        (256, 512, None),
        (24616, 512, None),
        (24617, 512, "2512x2512"),  # 157 x 157 = 24,649 tokens
        (255, 512, "272x240"),  # an engine's least is met exactly
        (251, 512, "4016x16"),  # a prime
        (1, 1, "16x16"),
    ],
)
def test_sizes_outside_name_the_command_that_builds_a_fitting_one(image: int, text: int, size: str | None) -> None:
    from fluxkiln.export.build import Profile

    profile = Profile.of((2048, 2048), references=2)
    manifest = _manifest(profile)
    reason = refuse_tokens(manifest, image, text)
    if size is None:
        assert reason is None
        return
    assert reason is not None
    assert f"--precision fp8 --arch sm_89 --weights refit --max-size {size} --references 0`" in reason
    assert "--model 'my model'" in reason
    assert refuse_tokens(_manifest(Profile.of(pixels(size), references=0)), image, text) is None


def test_text_outside_says_so() -> None:
    from fluxkiln.export.build import Profile

    reason = refuse_tokens(_manifest(Profile.of()), 1024, 513)
    assert reason == "the engine takes 1 to 512 text tokens, got 513: set max_sequence_length"


def _manifest(profile: Any) -> Manifest:
    from fluxkiln.engines.store import Subject

    inputs: Mapping[str, tuple[Any, ...]] = {
        "hidden_states": ("batch", "img", 64),
        "encoder_hidden_states": ("batch", "txt", 4096),
    }
    shapes = {name: [list(shape) for shape in three] for name, three in profile.shapes(inputs).items()}
    subject = Subject(
        "transformer", "ab", "cd", "fp8", "{}", shapes, "sm_89", "tensorrt_rtx", flavour().version, "refit"
    )
    return Manifest(subject, "my model", 1, "x", {})


# --- verify --------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_verify_engines_without_a_gpu_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--engines"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "fluxkiln: engines run on an NVIDIA GPU, and torch finds none here: run this on the machine with one\n"
    )


def test_small_engines_for_a_card_are_built_and_kept(tmp_path: Path) -> None:
    """What `verify --engines` builds on the machine with the card."""
    store, layers = Store(tmp_path), tiny_model(RECIPES["bf16"])
    trial = verify_engines.build_trial(store, "bf16", "inside", "sm_120", layers)
    assert (trial.refusal, trial.subject.arch, trial.subject.weights) == (None, "sm_120", "inside")
    assert [stored.key for stored in store] == [trial.key]
    with pytest.raises(RefusedError, match="NVFP4 needs Blackwell"):
        verify_engines.build_trial(store, "nvfp4", "refit", "sm_89", {})


def test_a_verdict_fails_on_anything_wrong() -> None:
    row = verify_engines.EngineVerdict("m", "fp8", "refit", tokens="9+24", error=1e-3, limit=2e-3, repeated=True)
    assert row.passed
    assert replace(row, error=None, limit=None).passed
    for wrong in ({"error": 3e-3}, {"error": float("nan")}, {"repeated": False}, {"failed": "out of memory"}):
        assert not replace(row, **wrong).passed
        assert "WRONG" in (text := verify_engines.report([replace(row, **wrong)], {"gpu": "x"})) or "FAILED" in text
    refused = replace(row, refused="for sm_120")
    assert refused.passed
    assert "not run: for sm_120" in verify_engines.report([refused], {"gpu": "x"})


@pytest.mark.gpu
def test_engines_run_here() -> None:
    """On a card that TensorRT-RTX knows: deserialised, supplied, compiled, captured, and right."""
    verdicts = verify_engines.verify_engines(Store("no such folder"))
    assert any(v.refused is None for v in verdicts), verdicts
    assert all(v.passed for v in verdicts), verdicts
