"""How the tensors of a transformer file make up the native ones: names, shapes, sizes, variant. Reads headers only."""

from __future__ import annotations

from collections.abc import Mapping

from fluxkiln.config import FluxConfig
from fluxkiln.fit import refuse_misfit
from fluxkiln.locate import Located
from fluxkiln.names import SWAPPED, to_diffusers, to_native
from fluxkiln.safetensors_file import CheckpointError

_VARIANT_WORDS = ("kontext", "canny", "depth", "fill", "schnell", "krea", "dev")  # `flux1-dev-kontext` is Kontext
_TELLING = {  # dimensions of the tensors off which the sizes are read
    "img_in.weight": 2,
    "txt_in.weight": 2,
    "vector_in.in_layer.weight": 2,
    "double_blocks.0.img_attn.norm.key_norm.scale": 1,
    "double_blocks.0.img_mlp.0.bias": 1,
    "final_layer.linear.weight": 2,
}
_TITLES = ("modelspec.title", "modelspec.architecture", "title", "name")


class Native:
    """The native view of the transformer in some files.

    Attributes:
        source: its tensors as they are stored.
        config: its sizes: of `config.json` if there is one, else read off the shapes.
        variant: `dev`, `schnell`, `kontext`, `fill`, `canny`, `depth`, `control` or `custom`.
    """

    def __init__(self, located: Located) -> None:
        prefix = located.kind.parts["transformer"]
        self._path = located.path
        self._diffusers = any(
            name.startswith(f"{prefix}transformer_blocks.") for file in located.files for name in file.entries
        )
        # nobody writes ComfyUI's NVFP4 under diffusers' names
        self.source = located.tensors("transformer", linear_nvfp4=self._diffusers)
        self._parts: dict[str, dict[int, tuple[str, int]]] = {}  # native -> first part -> stored, parts it covers
        self._unknown: list[str] = []
        for name in self.source:
            self._place(name)
        self.config = self._read_config(located.config)
        self.variant = _variant(self.config, located)

    @property
    def stored_names(self) -> list[str]:
        """The stored tensors that make up native ones."""
        return [part for name in self._parts for part in self.parts(name)]

    def parts(self, name: str) -> tuple[str, ...]:
        """The stored tensors whose rows, stacked, are the native tensor `name`."""
        return tuple(part for _, (part, _) in sorted(self._parts[name].items()))

    def swapped(self, name: str) -> bool:
        """Whether the stored halves stand in the other order."""
        return self._diffusers and name in SWAPPED

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [self.source.shape(part) for part in self.parts(name)]
        if len(shapes) == 1:
            return shapes[0]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def format(self, name: str) -> str:
        formats = {self.source.format(part) for part in self.parts(name)}
        return formats.pop() if len(formats) == 1 else "mixed"

    def check(self, config: FluxConfig) -> None:
        """Compare with the tensors that a transformer of this configuration has.

        Raises:
            CheckpointError: some are missing, unexpected or of another shape; it names the first few of each.
        """
        expected = config.tensor_shapes()
        missing = [part for name in expected for part in self._missing(name)]
        extra = [part for name in self._parts if name not in expected for part in self.parts(name)]
        misshapen = [
            f"{' + '.join(f'{part} {list(self.source.shape(part))}' for part in self.parts(name))}, "
            f"expected {list(shape)}"
            for name, shape in expected.items()
            if name in self._parts and not self._missing(name) and not self._fits(name, shape)
        ]
        what = f"a FLUX.1 transformer of {config.depth} + {config.depth_single_blocks} blocks"
        refuse_misfit(f"{self._path} does not fit {what}", missing, self._unknown + extra, misshapen)

    def _place(self, name: str) -> None:
        """Note which rows of which native tensor the stored tensor `name` is."""
        try:
            native, first, covered = to_native(name) if self._diffusers else (_spelled(name), 0, 1)
        except KeyError:
            self._unknown.append(name)
            return
        parts = self._parts.setdefault(native, {})
        # diffusers saves a fused projection together with the parts it no longer reads
        if covered > 1:
            for index in range(first, first + covered):
                parts.pop(index, None)
        if first not in self._covered_parts(native):
            parts[first] = (name, covered)

    def _covered_parts(self, name: str) -> set[int]:
        parts = self._parts.get(name, {})
        return {index for first, (_, covered) in parts.items() for index in range(first, first + covered)}

    def _missing(self, name: str) -> tuple[str, ...]:
        covered = self._covered_parts(name)
        parts = to_diffusers(name) if self._diffusers else (name,)
        return tuple(part for i, part in enumerate(parts) if i not in covered)

    def _fits(self, name: str, shape: tuple[int, ...]) -> bool:
        columns = {self.source.shape(part)[1:] for part in self.parts(name)}
        return columns == {shape[1:]} and self.shape(name) == shape

    def _read_config(self, config: Mapping[str, object]) -> FluxConfig:
        try:
            if config:
                return FluxConfig.from_diffusers(config)
            shapes = {name: self.shape(name) for name in self._parts}
            for name in _TELLING:
                if name in shapes and (len(shapes[name]) != _TELLING[name] or 0 in shapes[name]):
                    raise ValueError(f"{name} is {list(shapes[name])}, expected {_TELLING[name]} dimensions")
            if not _TELLING.keys() <= shapes.keys():
                self.check(FluxConfig.from_shapes(_guesses(shapes) | shapes))  # raises, and tells what else is amiss
            return FluxConfig.from_shapes(shapes)
        except CheckpointError:
            raise
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise CheckpointError(f"{self._path} does not fit a FLUX.1 transformer: {error}") from None


def _guesses(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes for the tensors off which the sizes are read, from what the others tell and what is usual."""

    def width(ending: str, usual: int) -> int:
        return next((shape[-1] for name, shape in shapes.items() if name.endswith(ending) and shape), usual)

    hidden = width("_mod.lin.weight", 3072)
    return {
        "img_in.weight": (hidden, 64),
        "txt_in.weight": (hidden, 4096),
        "vector_in.in_layer.weight": (hidden, 768),
        "double_blocks.0.img_attn.norm.key_norm.scale": (width("_norm.scale", 128),),
        "double_blocks.0.img_mlp.0.bias": (width("_mlp.0.bias", 4 * hidden),),
        "final_layer.linear.weight": (width("final_layer.linear.bias", 64), hidden),
    }


def _spelled(name: str) -> str:
    """ComfyUI's newer files call the norm weights `weight`, the original release `scale`."""
    return f"{name.removesuffix('.weight')}.scale" if name.endswith("_norm.weight") else name


def _variant(config: FluxConfig, located: Located) -> str:
    """What the sizes tell, and, where variants share their sizes, what the model is called.

    Names are asked in this order, and the first that says anything counts: the class of the pipeline, titles in the
    header, the file's name, its folders', the hub repository's.
    """
    folder = located.path.absolute()
    names = [] if located.path.is_dir() else [folder.stem]
    folder = folder if located.path.is_dir() else folder.parent
    names += [folder.name, folder.parent.name]
    names += [part for part in folder.parts if part.startswith("models--")]
    titles = [file.metadata.get(key, "") for file in located.files for key in _TITLES]
    texts = (located.pipeline, *titles, *names)
    named = next((word for text in texts for word in _VARIANT_WORDS if word in text.lower()), "")
    if config.variant == "dev" and named == "kontext":
        return "kontext"
    if config.variant == "control" and named in ("canny", "depth"):
        return named
    return config.variant
