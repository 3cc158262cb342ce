"""A TensorRT engine as FLUX.1's network: how one is found, and the `step` that runs it.

The modulation stays outside the engine and is computed in torch, as for every backend.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxkiln import workload
from fluxkiln.config import FluxConfig
from fluxkiln.engines.session import Scratch, Session
from fluxkiln.engines.store import (
    Manifest,
    Store,
    Stored,
    StoreError,
    default_root,
    open_engine,
    refuse_here,
    refuse_tokens,
)
from fluxkiln.kernels import Binding
from fluxkiln.kernels.recipe import Recipe
from fluxkiln.transformer import Network

PART = "transformer"  # of the engines that run a step
INPUTS = ("hidden_states", "encoder_hidden_states", "modulation", "img_ids", "txt_ids")

# Calls of a block -> the layers that run in them, by the ends of their native names.
_LAYERS = {
    "double_blocks": {"qkv": "attn.qkv", "proj": "attn.proj", "mlp_in": "mlp.0", "mlp_out": "mlp.2"},
    "single_blocks": {"qkv": "linear1", "mlp_in": "linear1", "out": "linear2"},
}


# --- finding one ------------------------------------------------------------------------------


def find(
    config: FluxConfig,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    shadow: Callable[[], Mapping[str, Any]],
    identity: str | None = None,
    engine: str | Path | None = None,
    store: Store | None = None,
    arch: str | None = None,
) -> Stored | str:
    """The engine in the store that runs a model here, or a sentence that says why there is none.

    An engine with weights inside runs the checkpoint it was built from; one without runs every model that has the
    same graph.

    Args:
        shadow: makes the model's layers on the meta device, for its graph.
        identity: of the checkpoint; None finds only engines without weights.
        engine: take none but this: the beginning of a key, or a folder.
        store: where to look; None is the user's.
        arch: of the GPU; None is that of `device`.
    """
    if device.type != "cuda" and arch is None:
        return f"an engine runs on an NVIDIA GPU, the model is to run on {device.type}"
    if dtype != torch.bfloat16:
        return f"engines compute in bfloat16, the model's dtype is {str(dtype).removeprefix('torch.')}"
    from fluxkiln.engines.flavour import PACKAGE, RTX_TARGETS, installed

    versions, store = installed(), store or Store(default_root())
    arch = arch or "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if not versions:
        return f"no TensorRT is installed: {PACKAGE['tensorrt_rtx']}"
    flag = "" if arch in RTX_TARGETS else " --flavour tensorrt"
    if flag and "tensorrt" not in versions:
        return f"TensorRT-RTX makes engines for {', '.join(RTX_TARGETS)}, this GPU is {arch}"
    try:
        candidates = list(store) if engine is None else [_named(store, engine)]
    except StoreError as error:
        return str(error)
    recipes = recipe.to_json()
    candidates = [stored for stored in candidates if engine or _meant(stored, recipes, arch)]
    if not candidates:
        return (
            f"{store.root} has no engine for {arch} and {recipe.name}: "
            f"`fluxkiln build --model MODEL --precision {recipe.name} --arch {arch}{flag}` makes one"
        )
    reasons = {stored.key: _refuse(stored, recipes, identity, arch, versions) for stored in candidates}
    able = [stored for stored in candidates if reasons[stored.key] is None]
    if able:
        try:
            from fluxkiln.export.graph import trace

            graph = digest(trace(config, shadow(), attention=recipe.attention).proto)
        except ImportError as error:
            return f"finding its engine needs {error.name}, which is not installed: pip install 'fluxkiln[trt]'"
        for stored in able:
            if stored.subject.graph != graph:
                other = "it was built from another graph: of a model of other sizes, or by another version of fluxkiln"
                reasons[stored.key] = other
        able = [stored for stored in able if reasons[stored.key] is None]
    if able:
        return max(able, key=_reach)
    return "; ".join(f"engine {key}: {reason}" for key, reason in reasons.items())


def digest(graph: Any) -> str:
    """Of the ONNX that an engine is built from, as in its key."""
    return hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest()


def differences(recipe: Recipe) -> tuple[str, ...]:
    """Where an engine's numbers differ from eager's in the same recipe by rule, a sentence each."""
    from fluxkiln.export.graph import FP8_ATTENTION

    return (f"an engine differs from eager in {FP8_ATTENTION}",) if recipe.attention == "fp8" else ()


def _named(store: Store, engine: str | Path) -> Stored:
    folder = Path(engine).expanduser()
    return open_engine(folder) if folder.is_dir() else store.one(str(engine))


def _meant(stored: Stored, recipe: str, arch: str) -> bool:
    """Whether an engine was built for such a model on such a GPU, so that it is worth saying why it does not run."""
    if stored.manifest is None:
        return False
    return (stored.subject.part, stored.subject.recipe, stored.subject.arch) == (PART, recipe, arch)


def _refuse(stored: Stored, recipe: str, identity: str | None, arch: str, versions: dict[str, str]) -> str | None:
    if stored.refusal or stored.manifest is None:
        return stored.refusal or "it has no manifest"
    subject = stored.subject
    if subject.part != PART:
        return f"it runs the part {subject.part}"
    if subject.recipe != recipe:
        return f"it was built by another recipe, in {subject.precision}"
    if subject.weights == "inside" and subject.model != identity:
        return f"the weights inside are those of another model, {stored.manifest.model_name}"
    return refuse_here(stored.manifest, arch, versions)


def _reach(stored: Stored) -> tuple[int, float]:
    """The most tokens it takes; of equals the one built last."""
    assert stored.manifest is not None
    batch, image, _ = stored.subject.profile["hidden_states"][2]
    return batch * image, stored.manifest.built


# --- running one ------------------------------------------------------------------------------


class EngineTransformer(Network):
    """FLUX.1's velocity network whose step is an engine.

    Args:
        config: its sizes.
        tensors: as for `Transformer`, where the engine runs; only those of the modulation are asked for.
        stored: the engine.
        session: runs it, of `open_session`: inputs by name -> outputs by name, overwritten by the next call.
    """

    def __init__(
        self,
        config: FluxConfig,
        tensors: Mapping[str, Any],
        stored: Stored,
        session: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    ) -> None:
        assert stored.manifest is not None
        super().__init__(config, tensors)
        self.manifest, self.session = stored.manifest, session
        self._calls = {call.name: call for call in workload.step(config, workload.Tokens(1, 1))}

    def rope(self, txt_ids: Tensor, img_ids: Tensor) -> Tensor:
        """Positions `[L, 3]` in fp32, text then image: the engine computes the angles.

        Raises:
            ValueError: the images of a batch have different positions.
        """
        return positions(txt_ids, img_ids).to(self.device, torch.float32)

    def step(self, img: Tensor, txt: Tensor, mods: Tensor, rope: Tensor) -> Tensor:
        """Velocity `[B, L_img, C_out]`; a batch larger than the engine takes runs in parts.

        Raises:
            ValueError: more or fewer tokens than the engine takes; the message has the command that builds one.
            SessionError: TensorRT refused.
        """
        if reason := self.refuse(img.shape[1], txt.shape[1]):
            raise ValueError(reason)
        most = self.manifest.subject.profile["hidden_states"][2][0]
        txt_ids, img_ids = rope.split((txt.shape[1], img.shape[1]))
        parts = zip(img.split(most), txt.split(most), mods.split(most), strict=True)
        inputs = (dict(zip(INPUTS, (*part, img_ids, txt_ids), strict=True)) for part in parts)
        return torch.cat([self.session(each)["latent"].clone() for each in inputs])

    def refuse(self, image: int, text: int) -> str | None:
        return refuse_tokens(self.manifest, image, text)

    def describe(self, name: str, op: str) -> Binding:
        return describe(self.manifest, name, op, self._calls[name].weights)


def open_session(
    stored: Stored,
    weights: Iterable[tuple[str, Tensor]] | None,
    device: torch.device | str = "cuda",
    scratch: Scratch | None = None,
) -> Session:
    """An engine of a step, loaded.

    Args:
        weights: of `supply`.
        scratch: shared with other engines; None makes its own.

    Raises:
        StoreError: its file is damaged, or it has other inputs than a step.
        SessionError: it cannot be loaded here.
    """
    cache = default_root().parent / "compiled"
    session = Session(stored, weights=weights, scratch=scratch, cache=cache, device=device)
    if set(session.inputs) != set(INPUTS):
        raise StoreError(f"{stored.folder} reads {', '.join(session.inputs)}, a step has {', '.join(INPUTS)}")
    return session


def supply(stored: Stored, tensors: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]] | None:
    """(name, tensor on the CPU) of every parameter of an engine without weights; None for one that has its own.

    Args:
        tensors: as for `Transformer`.
    """
    if stored.manifest is None or stored.subject.weights == "inside":
        return None
    from fluxkiln.export.graph import Parameter
    from fluxkiln.export.weights import values

    def parameter(data: dict[str, Any]) -> Parameter:
        fields: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in data.items()}
        return Parameter(**fields)

    parameters = {name: parameter(data) for name, data in stored.manifest.parameters.items()}
    # From the CPU: the GPU has room for the engine's own copy, and may not have it for two.
    return ((name, tensor.cpu()) for name, tensor in values(parameters, tensors))


def positions(txt_ids: Tensor, img_ids: Tensor) -> Tensor:
    """`[L, 3]`, text then image, of positions `[L, 3]` or `[B, L, 3]`.

    Raises:
        ValueError: the images of a batch have different ones.
    """
    for ids in (txt_ids, img_ids):
        if ids.ndim == 3 and not (ids == ids[:1]).all():
            raise ValueError("an engine takes one set of positions for all images of a batch, these differ")
    return torch.cat([ids[0] if ids.ndim == 3 else ids for ids in (txt_ids, img_ids)])


def describe(manifest: Manifest, name: str, op: str, weights: int) -> Binding:
    """What an engine runs a call as: by its recipe, and by the products that its build found to have fallen back."""
    structure, recipe = manifest.structure, Recipe.from_json(manifest.subject.recipe)
    if op == "attention":
        return Binding("trt", "+".join(sorted(structure["attentions"])) or recipe.attention)
    *block, field = name.split(".")
    if not block or field not in _LAYERS[block[0]]:
        return Binding("trt", "bf16", weights)
    streams = ("txt_", "img_") if block[0] == "double_blocks" else ("",)
    layers = [f"{'.'.join(block)}.{stream}{_LAYERS[block[0]][field]}" for stream in streams]
    rules = {recipe.rule(layer).format for layer in layers}
    formats = {"bf16" if format == "dense" else format for format in rules}
    for product, (_, found) in structure["fallen"].items():
        if product.startswith(tuple(f"{layer}." for layer in layers)):
            formats.add(found)
    return Binding("trt", "+".join(sorted(formats)), weights)
