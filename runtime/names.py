"""Tensor names: the original release's, which fluxkiln uses, and diffusers'.

The names differ, and so do two layouts: diffusers keeps apart what the original stacks row by row (q, k, v; in
single blocks also the first half of the MLP), and swaps the shift and scale halves of the final layer's modulation.
"""

from __future__ import annotations

import re

_EMBEDDERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{
        f"{native}_in.{part}": f"time_text_embed.{theirs}_embedder.{linear}"
        for native, theirs in (("time", "timestep"), ("guidance", "guidance"), ("vector", "text"))
        for part, linear in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    },
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
# after diffusers' `fuse_qkv_projections`: one tensor covers several parts
_FUSED = {"attn.to_qkv": ("attn.to_q", 3), "attn.to_added_qkv": ("attn.add_q_proj", 3)}

_BLOCKS = {"double_blocks": ("transformer_blocks", _DOUBLE), "single_blocks": ("single_transformer_blocks", _SINGLE)}
_THEIR_BLOCKS = {
    theirs: (ours, {part: (native, i) for native, parts in table.items() for i, part in enumerate(parts)})
    for ours, (theirs, table) in _BLOCKS.items()
}
_THEIR_EMBEDDERS = {part: native for native, part in _EMBEDDERS.items()}
_BLOCK = re.compile(r"(\w+)\.(\d+)\.(.+)")

SWAPPED = frozenset({"final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias"})
"""Native names whose halves along the rows stand in the other order in diffusers."""


def to_diffusers(name: str) -> tuple[str, ...]:
    """The diffusers tensors whose rows, stacked, are the native tensor `name`.

    Raises:
        KeyError: no FLUX.1 transformer has a tensor of that name.
    """
    module, _, leaf = name.rpartition(".")
    if (leaf == "scale") != module.endswith("_norm"):
        raise KeyError(name)
    leaf = "weight" if leaf == "scale" else leaf
    if module in _EMBEDDERS:
        return (f"{_EMBEDDERS[module]}.{leaf}",)
    match = _BLOCK.fullmatch(module)
    if not match or match[1] not in _BLOCKS or match[3] not in _BLOCKS[match[1]][1]:
        raise KeyError(name)
    blocks, table = _BLOCKS[match[1]]
    return tuple(f"{blocks}.{match[2]}.{part}.{leaf}" for part in table[match[3]])


def to_native(name: str) -> tuple[str, int, int]:
    """Where the diffusers tensor `name` goes: native name, index of its first part there, how many parts it covers.

    Raises:
        KeyError: no FLUX.1 transformer has a tensor of that name.
    """
    module, _, leaf = name.rpartition(".")
    if module in _THEIR_EMBEDDERS:
        return f"{_THEIR_EMBEDDERS[module]}.{leaf}", 0, 1
    match = _BLOCK.fullmatch(module)
    if not match or match[1] not in _THEIR_BLOCKS:
        raise KeyError(name)
    blocks, table = _THEIR_BLOCKS[match[1]]
    part, covered = _FUSED.get(match[3], (match[3], 1))
    if part not in table:
        raise KeyError(name)
    native, index = table[part]
    leaf = "scale" if native.endswith("_norm") and leaf == "weight" else leaf
    return f"{blocks}.{match[2]}.{native}.{leaf}", index, covered
