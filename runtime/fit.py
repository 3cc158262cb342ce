"""Compare the tensors of a file with those that a network has."""

from __future__ import annotations

from collections.abc import Mapping

from fluxkiln.safetensors_file import CheckpointError

_SHOWN = 3  # names of each sort in an error

Shapes = Mapping[str, tuple[int, ...]]


def check_fit(what: str, expected: Shapes, found: Shapes) -> None:
    """Compare names and shapes; `what` begins the error, for example "x.safetensors does not fit an autoencoder".

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; it names the first few of each.
    """
    faults = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "misshapen": [
            f"{name} {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    if any(faults.values()):
        raise CheckpointError(f"{what}: " + "; ".join(_listed(sort, names) for sort, names in faults.items() if names))


def _listed(sort: str, names: list[str]) -> str:
    return f"{len(names)} {sort} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
