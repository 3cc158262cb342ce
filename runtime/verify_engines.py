"""`fluxkiln verify --engines`: load, supply and run TensorRT engines on the GPU at hand, beside eager.

What a test without a GPU cannot show. Small engines of every precision, with weights inside and supplied, are built
for this GPU and held to float64; then every engine of the store that is valid here is held to eager on the model it
was built for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fluxkiln import sampling
from fluxkiln.config import FluxConfig
from fluxkiln.engine import PART, EngineTransformer, find, open_session, supply
from fluxkiln.engines.session import Scratch, SessionError
from fluxkiln.engines.store import Store, Stored, StoreError, refuse_here
from fluxkiln.kernels import RefusedError, eager_ops
from fluxkiln.kernels.recipe import RECIPES, Recipe
from fluxkiln.transformer import Network, Transformer
from fluxkiln.verify import SLACK, TINY, exact, tiny_model, to
from fluxkiln.workload import Tokens

# Largest relative difference from eager, in the L2 norm, of a whole network in the same precision: both round, at
# different places.
LIMITS = {"bf16": 0.05, "fp8": 0.1, "nvfp4": 0.2}
STEPS = 2
RUNS = 5  # timed
WEIGHTS: tuple[Literal["inside", "refit"], ...] = ("inside", "refit")
TRIAL = "trial"  # model name of the small engines


@dataclass(frozen=True)
class EngineVerdict:
    """One row of the report.

    Attributes:
        model, precision, weights, key: of the engine.
        refused: why it was not run; failed: what TensorRT said when it was.
        tokens: `text+image` of the denoise.
        error: relative difference of its latents from the truth's (a trial's) or eager's; limit: what is allowed.
            None where eager had no room on the GPU.
        repeated: the second image has the bytes of the first.
        load_seconds: deserialising, supplying weights, making a context.
        first_seconds: of the first step, which compiles its kernels; step_seconds: median of later ones.
    """

    model: str
    precision: str
    weights: str
    key: str = ""
    refused: str | None = None
    failed: str | None = None
    tokens: str = ""
    error: float | None = None
    limit: float | None = None
    repeated: bool | None = None
    load_seconds: float | None = None
    first_seconds: float | None = None
    step_seconds: float | None = None

    @property
    def passed(self) -> bool:
        """A refused engine is not wrong; NaN is."""
        if self.refused is not None:
            return True
        near = self.error is None or (self.limit is not None and self.error <= self.limit)
        return self.failed is None and near and self.repeated is True


def verify_engines(
    store: Store,
    model: str | None = None,
    progress: Callable[[EngineVerdict], None] = lambda verdict: None,
) -> list[EngineVerdict]:
    """Run everything.

    Args:
        store: its engines are run; it is not written to.
        model: to run them with, where those that they were built for are not found by name.
        progress: told every verdict as it comes.

    Raises:
        RefusedError: there is no GPU, or no TensorRT.
    """
    from fluxkiln.engines.flavour import PACKAGE, installed

    if not torch.cuda.is_available():
        raise RefusedError("engines run on an NVIDIA GPU, and torch finds none here: run this on the machine with one")
    if not installed():
        raise RefusedError(f"no TensorRT is installed: {PACKAGE['tensorrt_rtx']}")
    device = torch.device("cuda")
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    scratch, verdicts = Scratch(device), []
    with tempfile.TemporaryDirectory() as folder:
        small, kept = trials(Store(folder), arch, device, scratch), stored(store, arch, device, scratch, model)
        for verdict in itertools.chain(small, kept):
            verdicts.append(verdict)
            progress(verdict)
    return verdicts


# --- small engines ----------------------------------------------------------------------------


def trials(store: Store, arch: str, device: torch.device, scratch: Scratch) -> Iterator[EngineVerdict]:
    """Engines of the small network, built for this GPU and held to float64."""
    for precision, weights in itertools.product(LIMITS, WEIGHTS):
        row = EngineVerdict(TRIAL, precision, weights)
        yield from check(row, partial(prepare_trial, store, precision, weights, arch, device), scratch)


def prepare_trial(
    store: Store, precision: str, weights: Literal["inside", "refit"], arch: str, device: torch.device
) -> Prepared:
    """A small engine, and what float64 makes of two sizes.

    Raises:
        RefusedError, BuildError, StructureError: as `build_trial`.
    """
    recipe = RECIPES[precision]
    layers = tiny_model(recipe)
    engine = build_trial(store, precision, weights, arch, layers)
    layers = {name: to(layer, device) for name, layer in layers.items()}
    wide = {name: exact(layer) for name, layer in layers.items()}
    truth = Transformer(TINY, wide, eager_ops(recipe.attention))
    eager = Transformer(TINY, layers, eager_ops(recipe.attention))
    cases = []
    for inputs in (Inputs.of(truth, Tokens(9, 24)), Inputs.of(truth, Tokens(16, 64))):
        want = inputs.denoise(truth)
        cases.append(Case(inputs, want, SLACK * relative(inputs.denoise(eager), want)))
    return Prepared(engine, TINY, layers, cases)


def build_trial(
    store: Store, precision: str, weights: Literal["inside", "refit"], arch: str, layers: Mapping[str, Any]
) -> Stored:
    """A small engine in the store.

    Raises:
        RefusedError: TensorRT does not build this precision for this architecture; the message says why.
        BuildError, StructureError: it did not build it.
    """
    from fluxkiln.engines.flavour import FLAVOURS, flavour, installed
    from fluxkiln.export.build import Profile, build, refuse
    from fluxkiln.export.graph import trace
    from fluxkiln.export.parts import Exported
    from fluxkiln.export.weights import values

    reasons = {name: refuse(precision, arch, flavour(name)) for name in FLAVOURS if name in installed()}
    name = next((name for name, reason in reasons.items() if reason is None), None)
    if name is None:
        raise RefusedError("; ".join(map(str, reasons.values())))
    traced, profile = trace(TINY, layers), Profile(image=(16, 24, 64), text=(1, 16, 16))
    trial = Exported(PART, traced, TRIAL, RECIPES[precision], lambda: values(traced.parameters, layers))
    subject = trial.subject(precision, arch, profile, weights, flavour(name))
    built = build(traced, arch, profile, trial.values() if weights == "inside" else None, name=name)
    parameters = {name: dataclasses.asdict(parameter) for name, parameter in traced.parameters.items()}
    structure = dataclasses.asdict(built.structure)
    store.add(subject, built.plan, model_name=TRIAL, structure=structure, parameters=parameters, seconds=built.seconds)
    engine = store.find(subject)
    assert engine is not None
    return engine


# --- the store's engines ----------------------------------------------------------------------


def stored(
    store: Store, arch: str, device: torch.device, scratch: Scratch, model: str | None
) -> Iterator[EngineVerdict]:
    """Every engine of the store, held to eager on its model at its least and its best size."""
    for engine in store:
        row = EngineVerdict("", "", "", engine.key)
        if engine.manifest is not None:
            subject = engine.subject
            row = EngineVerdict(engine.manifest.model_name, subject.precision, subject.weights, engine.key)
        yield from check(row, partial(prepare_stored, store, engine, arch, device, model), scratch)


def prepare_stored(store: Store, engine: Stored, arch: str, device: torch.device, model: str | None) -> Prepared:
    """An engine of the store, and what eager makes of its model.

    Raises:
        RefusedError: it does not run here, or its model is not here.
    """
    from fluxkiln.checkpoint import open_checkpoint
    from fluxkiln.engines.flavour import installed
    from fluxkiln.export.weights import shadow
    from fluxkiln.hub import resolve
    from fluxkiln.quantize import Layers

    if engine.manifest is None:
        raise RefusedError(engine.refusal)
    subject = engine.subject
    if subject.part != PART:
        raise RefusedError(f"it runs the part {subject.part}, not a step")
    # Before the model, which may have to be downloaded.
    if reason := engine.refusal or refuse_here(engine.manifest, arch, installed()):
        raise RefusedError(reason)
    recipe = Recipe.from_json(subject.recipe)
    try:
        checkpoint = open_checkpoint(resolve(model or engine.manifest.model_name, ("transformer",)))
    except (ValueError, OSError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise RefusedError(f"its model is not here, name it with --model: {said}") from error
    meta = partial(shadow, checkpoint, recipe, torch.bfloat16)
    found = find(checkpoint.config, recipe, device, torch.bfloat16, meta, checkpoint.identity, engine.folder, store)
    if isinstance(found, str):
        raise RefusedError(found)
    layers = Layers(checkpoint, recipe, device, torch.bfloat16)
    return Prepared(engine, checkpoint.config, layers, of_eager(checkpoint.config, recipe, layers, engine))


def of_eager(config: FluxConfig, recipe: Recipe, layers: Mapping[str, Any], engine: Stored) -> list[Case]:
    """An engine's least and best size, and what eager makes of them if it has room."""
    images, texts = (engine.subject.profile[name] for name in ("hidden_states", "encoder_hidden_states"))
    sizes = [Tokens(*size) for size in sorted({(texts[i][1], images[i][1]) for i in (0, 1)})]
    cases: list[Case] = []
    with contextlib.suppress(torch.OutOfMemoryError):
        for case in by_eager(config, recipe, layers, sizes, LIMITS[engine.subject.precision]):
            cases.append(case)
    if len(cases) < len(sizes):
        alone = Network(config, layers)
        cases += [Case(Inputs.of(alone, size)) for size in sizes[len(cases) :]]
    return cases


def by_eager(
    config: FluxConfig, recipe: Recipe, layers: Mapping[str, Any], sizes: Sequence[Tokens], limit: float
) -> Iterator[Case]:
    """What eager makes of each size; its weights are gone when this ends or fails."""
    eager = Transformer(config, layers, eager_ops(recipe.attention))
    for size in sizes:
        inputs = Inputs.of(eager, size)
        yield Case(inputs, inputs.denoise(eager), limit)


# --- one engine -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What an engine is to make: `want` of the inputs, nearer than `limit`; None where nothing can say."""

    inputs: Inputs
    want: Tensor | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Prepared:
    """An engine, the model that it runs with, and what it is to make."""

    engine: Stored
    config: FluxConfig
    layers: Mapping[str, Any]
    cases: Sequence[Case]


def check(row: EngineVerdict, prepare: Callable[[], Prepared], scratch: Scratch) -> Iterator[EngineVerdict]:
    """Load an engine; of each case make two images, compare, and time a step.

    Whatever `prepare` or the engine raises is a row of the report: the other engines are still to come.
    """
    try:
        prepared = prepare()
        engine, config, layers = prepared.engine, prepared.config, prepared.layers
        row = replace(row, key=engine.key)
        gc.collect()
        torch.cuda.empty_cache()  # the engine comes next, by another allocator
        start = time.perf_counter()
        session = open_session(engine, supply(engine, layers), scratch=scratch)
        model = EngineTransformer(config, layers, engine, session)
        row = replace(row, load_seconds=time.perf_counter() - start)
        for case in prepared.cases:
            inputs = case.inputs
            row = replace(row, tokens=f"{inputs.txt.shape[1]}+{inputs.img.shape[1]}", limit=case.limit)
            step = partial(inputs.step, model, 0, inputs.img)
            first = seconds(step)
            one, two = inputs.denoise(model), inputs.denoise(model)
            yield replace(
                row,
                error=None if case.want is None else relative(one, case.want),
                repeated=torch.equal(one, two) and bool(one.isfinite().all()),
                first_seconds=first,
                step_seconds=statistics.median(seconds(step) for _ in range(RUNS)),
            )
    except RefusedError as refusal:
        yield replace(row, refused=str(refusal))
    except (SessionError, StoreError) as error:
        yield replace(row, failed=str(error))
    except Exception as error:
        yield replace(row, failed=f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Inputs:
    """Of a denoise of `STEPS` steps: noise, text, the modulation of each step, positions."""

    img: Tensor
    txt: Tensor
    mods: Tensor  # [STEPS, 1, M, D]
    txt_ids: Tensor
    img_ids: Tensor

    @classmethod
    def of(cls, network: Network, tokens: Tokens) -> Inputs:
        """Random ones, always the same; the modulation is the network's own."""
        config, device, g = network.config, network.device, torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).bfloat16().to(device)

        schedule = torch.tensor(sampling.schedule(STEPS, tokens.image)[:STEPS], device=device)
        guidance = torch.full((STEPS,), 3.5, device=device) if config.guidance_embed else None
        rows = next(rows for rows in range(math.isqrt(tokens.image), 0, -1) if tokens.image % rows == 0)
        with torch.inference_mode():
            mods = network.modulate(normal(1, config.vec_in_dim).expand(STEPS, -1), schedule, guidance)
        return cls(
            normal(1, tokens.image, config.in_channels),
            normal(1, tokens.text, config.context_in_dim),
            mods[:, None],
            torch.zeros(tokens.text, 3),
            sampling.positions(rows, tokens.image // rows),
        )

    def step(self, network: Network, i: int, x: Tensor) -> Tensor:
        dense = (x.to(network.dtype), self.txt.to(network.dtype), self.mods[i].to(network.dtype))
        with torch.inference_mode():
            return network.step(*dense, network.rope(self.txt_ids, self.img_ids))

    def denoise(self, network: Network) -> Tensor:
        """Latents `[1, L, C]` in float64."""
        schedule = sampling.schedule(STEPS, self.img.shape[1])
        x = self.img.double()
        channels = network.config.out_channels
        for i, (now, then) in enumerate(itertools.pairwise(schedule)):
            velocity = self.step(network, i, x).double()
            x = torch.cat((x[..., :channels] + (then - now) * velocity, x[..., channels:]), dim=-1)
        return x[..., :channels]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


# --- the report -------------------------------------------------------------------------------


def report(verdicts: Sequence[EngineVerdict], machine: Mapping[str, str]) -> str:
    """Markdown, to be sent back."""
    lines = ["## fluxkiln verify --engines", "", *(f"- {name} {version}" for name, version in machine.items()), ""]
    lines.append(
        "| engine | precision | weights | text+image | error | limit | image 2 = 1 | load s | first s | step s |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for v in verdicts:
        if v.refused or v.failed:
            what = f"**FAILED**: {v.failed}" if v.failed else f"not run: {v.refused}"
            what = " ".join(what.split()).replace("|", "/")
            lines.append(f"| {v.key} {v.model} | {v.precision} | {v.weights} | {what} | | | | | | |")
            continue
        error = "no room for eager" if v.error is None else f"{v.error:.2e}"
        limit = "" if v.limit is None else f"{v.limit:.2e}"
        mark = "" if v.passed else " **WRONG**"
        times = " | ".join("" if s is None else f"{s:.4f}" for s in (v.load_seconds, v.first_seconds, v.step_seconds))
        repeated = "yes" if v.repeated else "no"
        lines.append(
            f"| {v.key} {v.model}{mark} | {v.precision} | {v.weights} | {v.tokens} | {error} | {limit} | {repeated} "
            f"| {times} |"
        )
    return "\n".join(lines)
