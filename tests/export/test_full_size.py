"""The whole 12 B network, really built in every precision, without a GPU and without its weights."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch

from fluxkiln.config import DEV
from fluxkiln.export.build import Profile, build, memory_needed
from fluxkiln.export.graph import trace
from fluxkiln.export.weights import shadow
from fluxkiln.kernels.recipe import RECIPES

pytest.importorskip("tensorrt_rtx", reason="builds engines: pip install 'fluxkiln[trt]'")

GIB = 2**30
# 19 double blocks of 2 x (q, k, v, proj, mlp in, mlp out), 38 single blocks of q, k, v, mlp in and linear2, which is
# one product or, quantised, two; both embedders and the final linear stay bf16.
PRODUCTS = {
    "bf16": {"bf16": 19 * 12 + 38 * 5 + 3},
    "fp8": {"fp8": 19 * 12 + 38 * 6, "bf16": 3},
    "nvfp4": {"nvfp4": 19 * 4 + 38 * 6, "fp8": 19 * 6, "bf16": 19 * 2 + 3},
}


class Dev:
    """FLUX.1 [dev] as a checkpoint that has shapes and no weights."""

    names = tuple(DEV.tensor_shapes())
    shape = staticmethod(DEV.tensor_shapes().__getitem__)

    @staticmethod
    def input_scale(name: str) -> None:
        return None


def memory(field: str) -> int:
    """Bytes that this process has resident (`VmRSS`), or had at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.mark.long
@pytest.mark.parametrize(("precision", "arch"), [("bf16", "sm_89"), ("fp8", "sm_89"), ("nvfp4", "sm_120")])
def test_the_whole_network_builds(precision: str, arch: str, record_property: pytest.RecordProperty) -> None:
    traced = trace(DEV, shadow(Dev(), RECIPES[precision], torch.bfloat16))  # type: ignore[arg-type]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    built = build(traced, arch, Profile.of((2048, 2048), references=2))
    assert built.structure.products == PRODUCTS[precision]
    assert built.structure.attentions == {"bf16": 57}
    peak = memory("VmHWM")
    assert peak - before < memory_needed(traced, "refit")
    facts = {
        "seconds": round(built.seconds),
        "engine MB": round(len(built.plan) / 1e6, 1),
        "compressed MB": round(len(zlib.compress(built.plan, 1)) / 1e6, 1),
        "peak GiB": round(peak / GIB, 2),
    }
    print(precision, arch, facts)
    for name, value in facts.items():
        record_property(name, value)
