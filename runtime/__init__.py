"""fluxkiln runs FLUX.1 on the NVIDIA GPU you own, and proves that what ran is what was asked for.

pipe = fluxkiln.Pipeline.from_pretrained("shapes")      the bundled little model; runs anywhere
out = pipe("a small red star on the left of a blue background", seed=7)
out.images[0].save("star.png")

model = fluxkiln.load_transformer("flux1-dev.safetensors", precision="fp8")
vae = fluxkiln.load_autoencoder("ae.safetensors")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxkiln.autoencoder import load_autoencoder
    from fluxkiln.load import load_transformer
    from fluxkiln.pipeline import Pipeline

__all__ = ["Pipeline", "__version__", "load_autoencoder", "load_transformer"]
__version__ = "0.1.0"

_HOME = {"Pipeline": "pipeline", "load_transformer": "load", "load_autoencoder": "autoencoder"}


def __getattr__(name: str) -> Any:
    """Public names and submodules are imported when first used, so that `import fluxkiln` costs nothing."""
    if name in _HOME:
        return getattr(importlib.import_module(f"fluxkiln.{_HOME[name]}"), name)
    if name == "sampling":
        return importlib.import_module("fluxkiln.sampling")
    raise AttributeError(f"module 'fluxkiln' has no attribute {name!r}")
