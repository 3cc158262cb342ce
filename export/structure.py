"""What an engine really runs, read from the builder's own listing and held to what the graph asks for.

The builder lists every kernel it chose, with the types of its inputs. Nothing else tells without a GPU whether a
product that was asked for in FP8 or FP4 was quietly built in bf16.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

HEADER = "Layers:"  # how the builder's message begins
TYPES = {"BFloat16": "bf16", "Float": "fp32", "Half": "fp16", "FP8": "fp8", "FP4E2M1": "nvfp4", "FP4": "nvfp4"}
_LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>.*?), Constants: (?P<constants>.*?), Outputs: "
    r".*?(?:, Metadata: (?P<nodes>.*))?$"
)
_TYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


class StructureError(RuntimeError):
    """The engine does not run what was asked for."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of an engine: its name and kind, the types of what it reads, the graph's nodes that it covers."""

    name: str
    kind: str
    reads: tuple[str, ...]
    nodes: frozenset[str]

    @property
    def multiplies(self) -> bool:
        return self.kind == "gemm" or (self.kind == "runtime_fusion" and "Fc" in self.name)

    @property
    def attends(self) -> bool:
        return "gemm_mha" in self.name

    @property
    def format(self) -> str:
        """Of a matrix product: FP4 codes come with FP8 scales, so the narrowest type is the product's."""
        return next((type for type in ("nvfp4", "fp8", "bf16", "fp16", "fp32") if type in self.reads), "unknown")


@dataclass(frozen=True)
class Structure:
    """What was found.

    Attributes:
        products: number format -> how many layer products run in it.
        attentions: number format -> how many fused attention kernels read it.
        kernels: kind -> how many kernels.
        fallen: layer product, or `attention`, -> (format asked for, format found), where they differ.
    """

    products: dict[str, int]
    attentions: dict[str, int]
    kernels: dict[str, int]
    fallen: dict[str, tuple[str, str]]


def read_listing(message: str) -> list[Kernel]:
    """The kernels of a listing: the builder's message that begins with `Layers:`."""
    kernels = []
    for line in filter(None, map(_LINE.match, message.splitlines())):
        reads = tuple(TYPES.get(type, type) for type in _TYPE.findall(line["inputs"] + line["constants"]))
        kernels.append(Kernel(line["name"], line["kind"], reads, frozenset(_NODE.findall(line["nodes"] or ""))))
    return kernels


def check(
    kernels: Sequence[Kernel], products: Mapping[str, str], attentions: int | None, attention: str = "bf16"
) -> Structure:
    """Compare an engine with its graph.

    Args:
        kernels: of the engine.
        products: node of each layer product -> the format it was asked for in.
        attentions: number of attentions, each of which is to be one fused kernel; None: they need not be.
        attention: the format they were asked for in.

    Raises:
        StructureError: the listing lacks a product, or attention is not one fused kernel each: nothing can be said
            about such an engine. (What is in another format than asked for is returned, not raised.)
    """
    found: dict[str, str] = {}
    for kernel in kernels:
        if kernel.multiplies:
            found |= dict.fromkeys(kernel.nodes & products.keys(), kernel.format)
    if lacking := sorted(products.keys() - found.keys()):
        raise StructureError(
            f"no kernel of the engine covers {len(lacking)} of {len(products)} products: {lacking[:3]}"
        )
    fused = [kernel for kernel in kernels if kernel.attends]
    if attentions is not None and len(fused) != attentions:
        small = ": TensorRT takes FP8 attention apart where the profile's best sizes are small" * (attention == "fp8")
        raise StructureError(f"attention must be {attentions} fused kernels, the engine has {len(fused)}{small}")
    fallen = {name: (asked, found[name]) for name, asked in products.items() if found[name] != asked}
    if other := {kernel.format for kernel in fused} - {attention} if attentions else None:
        fallen["attention"] = (attention, "+".join(sorted(other)))
    return Structure(
        products=dict(Counter(found.values())),
        attentions=dict(Counter(kernel.format for kernel in fused)),
        kernels=dict(Counter(kernel.kind for kernel in kernels)),
        fallen=fallen,
    )
