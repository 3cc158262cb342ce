"""The text encoders: CLIP's pooled vector and T5's sequence, run by transformers.

Neither is given an attention mask, and T5 reads its padding: the padded length is part of what the model was trained
with. One prompt at a time goes through them, so that a batch cannot change a row.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fluxkiln.checkpoint import CheckpointError, Tensors, open_clip, open_t5
from fluxkiln.hub import ModelUnavailableError, resolve

LONGEST = 512  # tokens of T5 that FLUX.1 was trained with
CACHED = 32  # prompts whose embeddings are kept
# Bytes of a GPU that encoders leave to a step's activations and the autoencoder's; an estimate, no GPU has run it.
ROOM = 6 << 30
TOKENIZERS = "black-forest-labs/FLUX.1-schnell"  # the one repository of the originals that needs no login
_IGNORED = ("text_projection.weight", "logit_scale", "embeddings.position_ids")  # of CLIP, beside its text tower


@dataclass
class _Encoder:
    """A text encoder that is in memory or can be brought back, and its tokenizer."""

    name: str
    tokenizer: Any
    load: Callable[[], nn.Module]
    device: torch.device
    model: nn.Module | None = None

    def tokens(self, prompt: str, length: int) -> Tensor:
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(prompt, **options).input_ids

    def cut(self, prompt: str, length: int) -> str | None:
        """The end of a prompt that the encoder does not see, or None."""
        ids = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
        return None if len(ids) <= length else self.tokenizer.decode(ids[length - 1 : -1])  # the last is the end mark

    def run(self, ids: Tensor) -> Any:
        self.model = self.model or place(self.load(), self.device)
        return self.model(ids.to(self.device))


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, ready to run on a device: it lies there, or, where a GPU has no room for it, in the CPU's memory.

    Beside FLUX.1 in FP8 (15 GB), T5 (9.5 GB) leaves no room for pictures on a card of 24 GB. So its blocks come to the
    GPU one by one: the same kernels and bytes, at a copy over the bus for each prompt that is not known.
    """
    if device.type == "cuda":
        size = sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own to give
        if torch.cuda.mem_get_info(device)[0] + idle < size + ROOM:
            return stream(model, device)
    return model.to(device)


def stream(model: nn.Module, device: torch.device) -> nn.Module:
    """Have each block of a transformer on the device only while it runs; what is outside of them stays there."""
    blocks = next(part for part in model.modules() if isinstance(part, nn.ModuleList))
    inside = set(itertools.chain(blocks.parameters(), blocks.buffers()))
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor not in inside:
            tensor.data = tensor.data.to(device)
    for block in blocks:
        _visit(block, device)
    return model


def _visit(block: nn.Module, device: torch.device) -> None:
    tensors = [*block.parameters(), *block.buffers()]
    home = [tensor.data for tensor in tensors]

    def point(data: Iterable[Tensor]) -> None:
        for tensor, its in zip(tensors, data, strict=True):
            tensor.data = its

    block.register_forward_pre_hook(lambda *_: point(data.to(device, copy=True) for data in home))
    block.register_forward_hook(lambda *_: point(home), always_call=True)


class TextEncoders:
    """CLIP and T5 with their tokenizers; `from_pretrained` and `from_files` make one.

    Attributes:
        length: most tokens of T5: 512, or less where its tokenizer says so.
    """

    def __init__(
        self,
        clip: Callable[[], nn.Module],
        clip_tokenizer: Any,
        t5: Callable[[], nn.Module],
        t5_tokenizer: Any,
        device: torch.device | str = "cpu",
    ) -> None:
        device = torch.device(device)
        self._clip = _Encoder("CLIP", clip_tokenizer, clip, device)
        self._t5 = _Encoder("T5", t5_tokenizer, t5, device)
        self._known: OrderedDict[tuple[str, str, int], tuple[Tensor, Tensor]] = OrderedDict()
        self.length = min(LONGEST, t5_tokenizer.model_max_length)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> TextEncoders:
        """Both encoders of a diffusers folder: `text_encoder`, `text_encoder_2`, `tokenizer`, `tokenizer_2`.

        Raises:
            CheckpointError, FileNotFoundError: a part is missing or damaged.
        """
        return cls.from_files(clip=folder, t5=folder, tokenizers=folder, device=device, dtype=dtype)

    @classmethod
    def from_files(
        cls,
        clip: str | Path,
        t5: str | Path,
        tokenizers: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> TextEncoders:
        """Encoders from ComfyUI's single files (fp16, fp8, scaled fp8), an all-in-one file, or folders.

        Args:
            clip, t5: file or folder of each; nothing but headers is read until a prompt is encoded.
            tokenizers: folder with `tokenizer` and `tokenizer_2`; None takes the original's from the hub or its cache.
            device: where they run, see `place`; dtype: fp32 or bf16, in which they run.

        Raises:
            CheckpointError, FileNotFoundError: a part is missing, damaged, or something else.
        """
        folder = _tokenizer_folder(tokenizers)
        clip_tensors, t5_tensors = open_clip(clip, dtype), open_t5(t5, dtype)
        return cls(
            lambda: _build_clip(clip_tensors),
            _tokenizer(folder / "tokenizer"),
            lambda: _build_t5(t5_tensors),
            _tokenizer(folder / "tokenizer_2"),
            device,
        )

    @torch.no_grad()
    def encode(
        self, prompt: str, prompt_2: str | None = None, max_sequence_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode one prompt.

        Args:
            prompt: what CLIP reads, and T5 too unless there is a second.
            prompt_2: what T5 reads; `prompt` if it is None or empty, as in diffusers.
            max_sequence_length: tokens of T5, padding included; None is the most.

        Returns:
            `prompt_embeds [1, max_sequence_length, D_ctx]` and `pooled [1, D_vec]`; shared between equal calls, so
            not to be written to.

        Raises:
            ValueError: more tokens than the encoder takes, or none.
        """
        length = self._length(max_sequence_length)
        key = (prompt, prompt_2 or prompt, length)
        if key not in self._known:
            pooled = self._clip.run(self._clip.tokens(key[0], self._clip.tokenizer.model_max_length)).pooler_output
            sequence = self._t5.run(self._t5.tokens(key[1], length)).last_hidden_state
            self._known[key] = (sequence, pooled)
            if len(self._known) > CACHED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def cut(self, prompt: str, prompt_2: str | None = None, max_sequence_length: int | None = None) -> list[str]:
        """What each encoder does not see of a prompt, in a sentence each; empty when both see all."""
        length = self._length(max_sequence_length)
        limits = ((self._clip, prompt, self._clip.tokenizer.model_max_length), (self._t5, prompt_2 or prompt, length))
        cuts = ((encoder.name, limit, encoder.cut(text, limit)) for encoder, text, limit in limits)
        return [
            f"{name} reads {limit} tokens; it does not see the end of the prompt: {cut!r}"
            for name, limit, cut in cuts
            if cut
        ]

    def drop(self) -> None:
        """Release both encoders' memory; embeddings stay known, and the next new prompt loads the encoders again."""
        self._clip.model = self._t5.model = None

    def _length(self, asked: int | None) -> int:
        length = self.length if asked is None else asked
        if not 1 <= length <= self.length:
            raise ValueError(f"max_sequence_length must be from 1 to {self.length}, got {length}")
        return length


def _tokenizer_folder(folder: str | Path | None) -> Path:
    if folder is not None:
        return Path(folder).expanduser()
    try:
        return resolve(TOKENIZERS, ("tokenizer", "tokenizer_2"))
    except ModelUnavailableError as error:
        raise ModelUnavailableError(
            "single files bring no tokenizers: give tokenizers=FOLDER, a folder with tokenizer and tokenizer_2 as any "
            f"diffusers FLUX.1 folder has them ({error})"
        ) from error


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there: expected the folder of a tokenizer")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _build_clip(tensors: Tensors) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    # A configuration of all of CLIP has its text tower's inside.
    sizes = tensors.config.get("text_config") or tensors.config or clip_sizes(tensors)
    state = {name: tensors[name] for name in tensors if name not in _IGNORED}
    return _build(CLIPTextModel, CLIPTextConfig(**sizes), state)


def _build_t5(tensors: Tensors) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    sizes = tensors.config or t5_sizes(tensors)
    state = {name: tensors[name] for name in tensors}
    # Files store the embedding once, under either name, or twice.
    shared = "shared.weight" if "shared.weight" in state else "encoder.embed_tokens.weight"
    state["shared.weight"] = state["encoder.embed_tokens.weight"] = state[shared]
    return _build(T5EncoderModel, T5Config(**sizes), state)


def clip_sizes(tensors: Tensors) -> dict[str, Any]:
    """CLIP-L's configuration as far as shapes tell it; its heads are 64 wide."""
    vocabulary, width = tensors.shape("embeddings.token_embedding.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors.shape("encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _count(tensors, "encoder.layers."),
        "num_attention_heads": width // 64,
        "max_position_embeddings": tensors.shape("embeddings.position_embedding.weight")[0],
        # The released configuration's value, by which transformers pools at the largest token id.
        "eos_token_id": 2,
    }


def t5_sizes(tensors: Tensors) -> dict[str, Any]:
    """T5 v1.1's configuration as far as shapes tell it."""
    shared = "shared.weight" if "shared.weight" in tensors else "encoder.embed_tokens.weight"
    vocabulary, width = tensors.shape(shared)
    first = "encoder.block.0.layer"
    buckets, heads = tensors.shape(f"{first}.0.SelfAttention.relative_attention_bias.weight")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": tensors.shape(f"{first}.0.SelfAttention.q.weight")[0] // heads,
        "d_ff": tensors.shape(f"{first}.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": _count(tensors, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def _count(tensors: Tensors, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def _build(kind: Any, config: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """A transformers model around tensors as they are: no weight is initialised or copied.

    Raises:
        CheckpointError: tensors are missing or unexpected.
    """
    with torch.device("meta"):
        model = kind(config)
    prefix = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    named = {prefix + name: tensor for name, tensor in state.items()}
    try:
        missing, unexpected = model.load_state_dict(named, strict=False, assign=True)
    except RuntimeError as error:  # its first line is a title, the others name shapes
        raise CheckpointError(
            f"not the {kind.__name__} of its configuration: {str(error).splitlines()[1].strip()}"
        ) from None
    if missing or unexpected:
        raise CheckpointError(
            f"not the {kind.__name__} of its configuration: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(unexpected)} are unexpected {unexpected[:3]}"
        )
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # CLIP's position ids, which no file holds
            parent = model.get_submodule(name.rpartition(".")[0])
            parent.register_buffer(name.rpartition(".")[2], torch.arange(buffer.shape[-1])[None], persistent=False)
    return model.eval().requires_grad_(False)
