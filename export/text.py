"""The text encoders as ONNX graphs: CLIP's pooled vector and T5's sequence, without attention masks, as in FLUX.1."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from fluxkiln.export.graph import Graph, Traced, Value
from fluxkiln.text import LONGEST

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, T5Config

ARGMAX_IDS = 2  # CLIP's released configuration has this end mark, by which the largest token id is meant


def trace_clip(config: CLIPTextConfig, high: torch.dtype = torch.bfloat16) -> Traced:
    """input_ids int64 [B, 77]  ->  pooled [B, D]: the state at the first end mark.

    Raises:
        ValueError: an activation that no CLIP of FLUX.1 has.
    """
    if config.hidden_act != "quick_gelu":
        raise ValueError(f"CLIP's activation must be quick_gelu, got {config.hidden_act!r}")
    graph, width, length = Graph(high), config.hidden_size, config.max_position_embeddings
    net = _Network(graph)

    def norm(x: Value, name: str) -> Value:
        weight, bias = (graph.tensor(f"{name}.{part}", (width,)) for part in ("weight", "bias"))
        return graph.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=config.layer_norm_eps)

    ids = graph.input("input_ids", torch.int64, ("batch", length))
    words = graph.tensor("embeddings.token_embedding.weight", (config.vocab_size, width))
    places = graph.tensor("embeddings.position_embedding.weight", (length, width))
    x = graph.op("Add", graph.op("Gather", words, ids, axis=0), places)
    # -1e4 is nothing after softmax, and a number in every dtype.
    later = graph.constant(torch.full((length, length), -1e4).triu(1))
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layers.{i}"
        h = norm(x, f"{layer}.layer_norm1")
        q, k, v = (net.linear(h, f"{layer}.self_attn.{part}_proj", width, width) for part in "qkv")
        q = graph.op("Mul", q, graph.constant((width // config.num_attention_heads) ** -0.5))
        o = net.attention(q, k, v, config.num_attention_heads, later)
        x = graph.op("Add", x, net.linear(o, f"{layer}.self_attn.out_proj", width, width))
        h = net.linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1", width, config.intermediate_size)
        h = graph.op("Mul", h, graph.op("Sigmoid", graph.op("Mul", h, graph.constant(1.702))))
        x = graph.op("Add", x, net.linear(h, f"{layer}.mlp.fc2", config.intermediate_size, width))
    x = norm(x, "final_layer_norm")
    if config.eos_token_id != ARGMAX_IDS:
        end = graph.op("Equal", ids, graph.integers([config.eos_token_id]))
        ids = graph.cast(end, torch.float32)
    last = graph.op("ArgMax", ids, axis=1, keepdims=1)  # the first of equals, [B, 1]
    pooled = graph.op("GatherND", x, last, batch_dims=1)
    return Traced(graph.model("clip", {"pooled": (pooled, ("batch", width))}), graph.parameters)


def trace_t5(config: T5Config, embedding: str = "shared.weight", high: torch.dtype = torch.bfloat16) -> Traced:
    """input_ids int64 [B, txt]  ->  text_embeddings [B, txt, D].

    Args:
        embedding: name of the embedding's tensor, of which files have one of two.

    Raises:
        ValueError: another kind of T5 than FLUX.1's.
    """
    if config.feed_forward_proj != "gated-gelu":
        raise ValueError(f"T5's MLP must be gated-gelu, got {config.feed_forward_proj!r}")
    graph, width, inner = Graph(high), config.d_model, config.num_heads * config.d_kv
    net = _Network(graph)

    def norm(x: Value, name: str) -> Value:
        wide = graph.cast(x, torch.float32)
        square = graph.op("ReduceMean", graph.op("Mul", wide, wide), graph.integers([-1]), keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", square, graph.constant(config.layer_norm_epsilon, torch.float32)))
        y = graph.cast(graph.op("Div", wide, root), high)
        return graph.op("Mul", y, graph.tensor(f"{name}.weight", (width,)))

    ids = graph.input("input_ids", torch.int64, ("batch", "txt"))
    x = graph.op("Gather", graph.tensor(embedding, (config.vocab_size, width)), ids, axis=0)
    bias = _position_bias(graph, config, ids)
    for i in range(config.num_layers):
        attention, mlp = (f"encoder.block.{i}.layer.{part}" for part in (0, 1))
        h = norm(x, f"{attention}.layer_norm")
        q, k, v = (net.linear(h, f"{attention}.SelfAttention.{part}", width, inner, bias=False) for part in "qkv")
        o = net.attention(q, k, v, config.num_heads, bias)
        x = graph.op("Add", x, net.linear(o, f"{attention}.SelfAttention.o", inner, width, bias=False))
        h, dense = norm(x, f"{mlp}.layer_norm"), f"{mlp}.DenseReluDense"
        gate = graph.op("Gelu", net.linear(h, f"{dense}.wi_0", width, config.d_ff, bias=False), approximate="tanh")
        h = graph.op("Mul", gate, net.linear(h, f"{dense}.wi_1", width, config.d_ff, bias=False))
        x = graph.op("Add", x, net.linear(h, f"{dense}.wo", config.d_ff, width, bias=False))
    x = norm(x, "encoder.final_layer_norm")
    return Traced(graph.model("t5", {"text_embeddings": (x, ("batch", "txt", width))}), graph.parameters)


def _position_bias(graph: Graph, config: T5Config, ids: Value) -> Value:
    """What is added to the scores `[1, H, L, L]`: one number for each head and bucket of distances."""
    table = graph.tensor(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        (config.relative_attention_num_buckets, config.num_heads),
    )
    distances = np.arange(1 - LONGEST, LONGEST)
    buckets = bucket(distances, config.relative_attention_num_buckets, config.relative_attention_max_distance)
    each = graph.op("Gather", table, graph.integers(buckets), axis=0)  # [2 * LONGEST - 1, H]
    length = graph.op("Squeeze", ids.shape[1])
    places = graph.op("Range", graph.integers(0), length, graph.integers(1))
    rows = graph.op("Unsqueeze", places, graph.integers([1]))
    index = graph.op("Add", graph.op("Sub", places, rows), graph.integers(LONGEST - 1))  # [L, L]
    bias = graph.op("Transpose", graph.op("Gather", each, index, axis=0), perm=[2, 0, 1])
    return graph.op("Unsqueeze", bias, graph.integers([0]))


def bucket(distance: np.ndarray, buckets: int, most: int) -> np.ndarray:
    """T5's bucket of each distance (key minus query): half of them ahead, half behind; of those the first half one for
    each distance, the others for distances that grow geometrically up to `most`."""
    half = buckets // 2
    exact, far = half // 2, np.abs(distance)
    growth = np.log(np.maximum(far, 1).astype(np.float32) / exact) / math.log(most / exact)
    geometric = np.minimum(exact + (growth * (half - exact)).astype(np.int64), half - 1)
    return np.where(distance > 0, half, 0) + np.where(far < exact, far, geometric)


class _Network:
    """What both encoders consist of."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def linear(self, x: Value, name: str, inputs: int, outputs: int, bias: bool = True) -> Value:
        weight = self.graph.tensor(f"{name}.weight", (outputs, inputs))
        y = self.graph.op("MatMul", x, self.graph.op("Transpose", weight, perm=[1, 0]))
        return self.graph.op("Add", y, self.graph.tensor(f"{name}.bias", (outputs,))) if bias else y

    def attention(self, q: Value, k: Value, v: Value, heads: int, bias: Value) -> Value:
        """`[B, L, H * d]`; softmax in fp32. Taken apart, because of the bias."""
        graph = self.graph
        perms = ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3))
        q, k, v = (
            graph.op("Transpose", graph.reshape(x, (0, 0, heads, -1)), perm=perm)
            for x, perm in zip((q, k, v), perms, strict=True)
        )
        scores = graph.cast(graph.op("Add", graph.op("MatMul", q, k), bias), torch.float32)
        weights = graph.cast(graph.op("Softmax", scores, axis=-1), graph.high)
        o = graph.op("Transpose", graph.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        return graph.reshape(o, (0, 0, -1))
