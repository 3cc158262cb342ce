"""A model's parts as ONNX graphs and TensorRT engines."""

PARTS = ("transformer", "vae_decoder", "vae_encoder", "clip", "t5")
FORMS = ("step", "compatible", "lora")  # of the transformer's graph, see `fluxkiln.export.graph`
