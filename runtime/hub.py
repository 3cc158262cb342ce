"""Where a model is: bundled with the package, on this disk, or on the Hugging Face hub, which is asked for one copy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fluxkiln.safetensors_file import CheckpointError

BUNDLED = ("shapes",)
PIPELINE_FOLDERS = (
    "scheduler",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "transformer",
    "vae",
)

_EXAMPLE = "black-forest-labs/FLUX.1-dev"
_HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<file>[^\\]+\.(?:safetensors|sft)))?")
_WEIGHTS = re.compile(r"(?P<stem>diffusion_pytorch_model|model)(?:-\d{5}-of-\d{5})?\.safetensors")
_SETTINGS = (".json", ".txt", ".model")  # configurations, vocabularies


class ModelUnavailableError(FileNotFoundError):
    """A model is not here and cannot be fetched; the message says why and lists the three steps that get it."""


def resolve(model: str | Path, folders: Sequence[str] = PIPELINE_FOLDERS) -> Path:
    """The local path of a model, downloaded if it has to be.

    Args:
        model: a bundled model (`shapes`), a file or folder, a hub repository (`owner/name`), or a file in one
            (`owner/name/file.safetensors`).
        folders: which folders of a diffusers repository are needed, e.g. only `transformer`.

    Raises:
        ModelUnavailableError: it is not here, and not to be had from the hub.
        CheckpointError: the repository does not say which of its files is meant.
    """
    if model in BUNDLED:
        return Path(__file__).parent / "models" / str(model)
    path = Path(model).expanduser()
    if path.exists():
        return path
    match = _HUB_NAME.fullmatch(str(model)) if isinstance(model, str) else None
    if match is None:
        raise ModelUnavailableError(
            f"{model} is not there, and is neither a bundled model ({', '.join(BUNDLED)}) nor a name on the hub "
            f"like {_EXAMPLE}\n{_steps(_EXAMPLE)}"
        )
    return _fetch(match["repo"], match["file"], folders)


def choose_files(names: Iterable[str], folders: Sequence[str], repo: str) -> list[str]:
    """The files of a repository that make up one copy of the model.

    FLUX.1's repositories hold the transformer twice, as one file for the original code and in shards for diffusers,
    and some hold pickles, variants and ONNX graphs beside: of a diffusers repository the shards are taken, of any
    other the one safetensors file there is.

    Raises:
        CheckpointError: no safetensors weights, or several without a word on which.
    """
    names = sorted(names)
    if "model_index.json" in names:
        chosen = ["model_index.json"]
        for folder in folders:
            inside = [name for name in names if name.startswith(f"{folder}/") and name.count("/") == 1]
            weights = _one_copy(inside)
            if not weights and any(name.endswith((".bin", ".pt", ".onnx", ".safetensors")) for name in inside):
                raise CheckpointError(f"{repo} has no safetensors weights of the usual names in {folder}/")
            chosen += [name for name in inside if name.endswith(_SETTINGS)] + weights
        return chosen
    single = [name for name in names if name.endswith((".safetensors", ".sft"))]
    weights = _one_copy([name for name in names if "/" not in name]) or single
    if not weights or (weights is single and len(single) > 1):
        advice = f"name one, e.g. {repo}/{single[0]}" if single else "nothing here can be read"
        raise CheckpointError(f"{repo} has no model_index.json and {len(single)} safetensors files: {advice}")
    folder = weights[0].rpartition("/")[0]
    return [name for name in names if name.rpartition("/")[0] == folder and name.endswith(".json")] + weights


def _one_copy(names: Sequence[str]) -> list[str]:
    """The weights of one folder, under the names that are looked for first when it is opened."""
    for stem in ("diffusion_pytorch_model", "model"):
        matches = [
            name for name in names if (match := _WEIGHTS.fullmatch(name.rpartition("/")[2])) and match[1] == stem
        ]
        if matches:
            return [name for name in matches if "-of-" in name] or matches
    return []


def _fetch(repo: str, file: str | None, folders: Sequence[str]) -> Path:
    """Download what the cache lacks; where the hub refuses or does not answer, be content with a whole cached copy."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        if file:
            return Path(hf_hub_download(repo, file))
        # not `list_repo_files`: without a network it retries for half a minute before the cache is asked
        listed = HfApi().model_info(repo).siblings or []
        chosen = choose_files((entry.rfilename for entry in listed), folders, repo)
        snapshot = Path(snapshot_download(repo, allow_patterns=[_literal(name) for name in chosen]))
    except CheckpointError:
        raise
    except Exception as error:  # the hub's own errors, and those of whichever HTTP library it uses
        cached = None if file else _cached(repo, folders)
        if cached is None:
            raise ModelUnavailableError(f"{repo} {_reason(error, file)}\n{_steps(repo)}") from error
        snapshot, chosen = cached
    weights = [name for name in chosen if name.endswith((".safetensors", ".sft"))]
    return snapshot if "model_index.json" in chosen or len(weights) > 1 else snapshot / weights[0]


def _cached(repo: str, folders: Sequence[str]) -> tuple[Path, list[str]] | None:
    """The cached snapshot and what is to be read from it, if every folder is there."""
    from huggingface_hub import snapshot_download

    try:
        # asking for one file finds the snapshot; asking for all would want those that were left out on purpose
        snapshot = Path(snapshot_download(repo, allow_patterns=["model_index.json"], local_files_only=True))
        names = [entry.relative_to(snapshot).as_posix() for entry in snapshot.rglob("*") if entry.is_file()]
        chosen = choose_files(names, folders, repo)
    except (OSError, CheckpointError):
        return None
    whole = "model_index.json" not in chosen or all((snapshot / folder).is_dir() for folder in folders)
    return (snapshot, chosen) if whole else None


def _reason(error: Exception, file: str | None) -> str:
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "is gated: its licence has to be accepted before it can be downloaded"
    if isinstance(error, RepositoryNotFoundError):
        return "is not on the hub, or is private"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"has no file {file}"
    return f"is not in the cache, and the hub did not answer ({type(error).__name__}: {error})"


def _steps(repo: str) -> str:
    return (
        f"  1. open https://huggingface.co/{repo}, log in and accept the licence\n"
        "  2. run `hf auth login` with a read token from https://huggingface.co/settings/tokens\n"
        f"  3. give {repo} as the model again, or the path of a folder or file downloaded by hand"
    )


def _literal(name: str) -> str:
    """A file name as the pattern that matches it alone."""
    return re.sub(r"([*?[])", r"[\1]", name)
