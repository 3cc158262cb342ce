"""Compare the tensors of a file with those that a network has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fluxkiln.safetensors_file import CheckpointError

_SHOWN = 3  # names of each sort in an error

Shapes = Mapping[str, tuple[int, ...]]


def check_fit(what: str, expected: Shapes, found: Shapes) -> None:
    """Compare names and shapes; `what` begins the error, for example "x.safetensors does not fit an autoencoder".

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; it names the first few of each.
    """
    misshapen = [
        f"{name} {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    missing = [name for name in expected if name not in found]
    refuse_misfit(what, missing, [name for name in found if name not in expected], misshapen)


def refuse_misfit(what: str, missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]) -> None:
    """Raise where anything is wrong; arguments and error as of `check_fit`."""
    faults = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    said = (
        f"{len(names)} {sort} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for sort, names in faults.items()
        if names
    )
    if text := "; ".join(said):
        raise CheckpointError(f"{what}: {text}")
