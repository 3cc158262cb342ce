"""The autoencoder's two halves as ONNX graphs, with height and width dynamic."""

from __future__ import annotations

import torch

from fluxkiln.autoencoder import NORM_EPS, AutoencoderConfig, tensor_shapes
from fluxkiln.export.graph import Graph, Traced, Value


def trace_decoder(config: AutoencoderConfig, high: torch.dtype = torch.bfloat16) -> Traced:
    """latents [B, C, height, width], shifted and scaled  ->  images [B, 3, 8 height, 8 width]: `Autoencoder.decode`."""
    graph = Graph(high)
    net = _Network(graph, config)
    latents = graph.input("latent", high, ("batch", config.latent_channels, "height", "width"))
    raw = graph.op("Div", latents, graph.constant(config.scaling_factor))
    x = net.conv(graph.op("Add", raw, graph.constant(config.shift_factor)), "decoder.conv_in")
    x = net.middle(x, "decoder.mid")
    for level in reversed(range(config.levels)):
        for block in range(config.layers_per_block + 1):
            x = net.block(x, f"decoder.up.{level}.block.{block}")
        if level:
            scales = graph.constant([1.0, 1.0, 2.0, 2.0], torch.float32)
            nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            x = net.conv(graph.op("Resize", x, None, scales, **nearest), f"decoder.up.{level}.upsample.conv")
    x = net.conv(graph.silu(net.norm(x, "decoder.norm_out")), "decoder.conv_out")
    shape = ("batch", 3, "pixel_height", "pixel_width")
    return Traced(graph.model("flux_vae_decoder", {"images": (x, shape)}), graph.parameters)


def trace_encoder(config: AutoencoderConfig, high: torch.dtype = torch.bfloat16) -> Traced:
    """images [B, 3, H, W] in -1..1  ->  latents [B, C, H / 8, W / 8], shifted and scaled: `Autoencoder.encode`."""
    graph = Graph(high)
    net = _Network(graph, config)
    x = net.conv(graph.input("images", high, ("batch", 3, "pixel_height", "pixel_width")), "encoder.conv_in")
    for level in range(config.levels):
        for block in range(config.layers_per_block):
            x = net.block(x, f"encoder.down.{level}.block.{block}")
        if level < config.levels - 1:
            x = net.conv(x, f"encoder.down.{level}.downsample.conv", stride=2, pads=(0, 0, 1, 1))
    x = net.middle(x, "encoder.mid")
    x = net.conv(graph.silu(net.norm(x, "encoder.norm_out")), "encoder.conv_out")
    bounds = (graph.integers([n]) for n in (0, config.latent_channels, 1))
    mean = graph.op("Slice", x, *bounds)  # the log-variance follows
    latents = graph.op("Sub", mean, graph.constant(config.shift_factor))
    latents = graph.op("Mul", latents, graph.constant(config.scaling_factor))
    shape = ("batch", config.latent_channels, "height", "width")
    return Traced(graph.model("flux_vae_encoder", {"latent": (latents, shape)}), graph.parameters)


class _Network:
    """The autoencoder's parts, by the native names of their tensors."""

    def __init__(self, graph: Graph, config: AutoencoderConfig) -> None:
        self.graph, self.config, self.shapes = graph, config, tensor_shapes(config)

    def tensor(self, name: str) -> Value:
        return self.graph.tensor(name, self.shapes[name])

    def conv(self, x: Value, name: str, stride: int = 1, pads: tuple[int, ...] | None = None) -> Value:
        edge = self.shapes[f"{name}.weight"][-1] // 2
        options = {"strides": [stride] * 2, "pads": pads or [edge] * 4}
        return self.graph.op("Conv", x, self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias"), **options)

    def norm(self, x: Value, name: str) -> Value:
        weight, bias = self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")
        options = {"num_groups": self.config.norm_num_groups, "epsilon": NORM_EPS}
        return self.graph.op("GroupNormalization", x, weight, bias, **options)

    def block(self, x: Value, name: str) -> Value:
        h = self.conv(self.graph.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = self.conv(self.graph.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2")
        if f"{name}.nin_shortcut.weight" in self.shapes:
            x = self.conv(x, f"{name}.nin_shortcut")
        return self.graph.op("Add", x, h)

    def middle(self, x: Value, name: str) -> Value:
        return self.block(self.attention(self.block(x, f"{name}.block_1"), f"{name}.attn_1"), f"{name}.block_2")

    def attention(self, x: Value, name: str) -> Value:
        """One head as wide as the channels; TensorRT has no fused kernel for 512, so it is taken apart."""
        graph, h = self.graph, self.norm(x, f"{name}.norm")
        width = self.shapes[f"{name}.q.weight"][0]
        q, k, v = (graph.reshape(self.conv(h, f"{name}.{part}"), (0, width, -1)) for part in "qkv")  # [B, C, HW]
        q = graph.op("Mul", graph.op("Transpose", q, perm=[0, 2, 1]), graph.constant(width**-0.5))
        weights = graph.op("Softmax", graph.op("MatMul", q, k), axis=-1)
        o = graph.op("MatMul", v, graph.op("Transpose", weights, perm=[0, 2, 1]))
        o = graph.op("Reshape", o, graph.op("Shape", x))
        return graph.op("Add", x, self.conv(o, f"{name}.proj_out"))
