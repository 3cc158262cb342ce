"""The command line: one table of commands, each in its own module, imported only when it is the one asked for."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import fluxkiln
from fluxkiln.config import TOKEN_PIXELS

# Command -> (module with `add_arguments(parser)` and `run(args) -> exit code`, what it does), or a group of commands.
Table = Mapping[str, "tuple[str, str] | tuple[Table, str]"]
COMMANDS: Table = {
    "generate": ("fluxkiln.cmd_generate", "make images from text"),
    "edit": ("fluxkiln.cmd_edit", "change a picture by instruction, all of it or inside a mask"),
    "info": ("fluxkiln.cmd_info", "say what a model file is, or how an image was made"),
    "verify": ("fluxkiln.cmd_verify", "hold every backend that runs here to float64"),
    "kernels": ("fluxkiln.cmd_kernels", "list kernels with their compiled resources, or why one does not exist"),
    "bench": (
        {
            "kernels": ("fluxkiln.bench.kernels", "time every kernel"),
            "step": ("fluxkiln.bench.step", "time one denoise step and measure its memory"),
            "image": ("fluxkiln.bench.image", "make the pictures of a suite, judge them, compare runs"),
            "tune": ("fluxkiln.bench.tune", "search launch tables"),
        },
        "measure",
    ),
    "quantize": ("fluxkiln.cmd_quantize", "write a checkpoint in fp8 or nvfp4"),
    "export": ("fluxkiln.export.cmd_export", "write the transformer or another part as ONNX"),
    "build": ("fluxkiln.export.cmd_build", "build TensorRT engines"),
    "engines": ("fluxkiln.engines.cmd_engines", "list the engines in the store"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 for an error (one sentence on stderr), 2 for a wrong argument."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        args = _parse(argv)
        return args.run(args)
    except SystemExit as stop:  # argparse has said what was wrong, or printed help
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        print("fluxkiln: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough; keep Python from complaining again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        print(f"fluxkiln: {sentence(error)}", file=sys.stderr)
        return 1


def process() -> NoReturn:
    """`main` as a process of its own, which may set its garbage collector: what imports make stays to the end."""
    gc.set_threshold(50_000)  # imports make 600,000 objects, and a full pass looks at all that are there
    status = main()
    gc.freeze()  # exiting frees all memory at once: looking for garbage in it before takes a second
    sys.exit(status)


def sentence(error: Exception) -> str:
    """An exception for the user of a command."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | OSError | RuntimeError | ImportError | MemoryError) and str(error):
        return str(error)
    return f"unexpected {type(error).__name__}: {error}; run the command with --debug for where it happened"


def pixels(text: str) -> tuple[int, int]:
    """(width, height) of an argument like 1024x768."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and min(int(width), int(height)) >= TOKEN_PIXELS):
        sides = f"WIDTHxHEIGHT in pixels, each at least {TOKEN_PIXELS}"
        raise argparse.ArgumentTypeError(f"must be {sides}, such as 1024x768, got {text!r}")
    return int(width), int(height)


def above_zero(text: str) -> float:
    """A number of an argument that has to be above 0, such as seconds."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def finite(text: str) -> float:
    """A number of an argument that must be neither infinite nor nan."""
    value = float(text)
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def file_path(text: str) -> Path:
    """A file to write: said to be no such thing now, not after the work."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that is there, got {text!r}")
    return path


def at_least_one(text: str) -> int:
    """A count of an argument that has to be 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
    return value


above_zero.__name__, finite.__name__, at_least_one.__name__ = (
    "float",
    "float",
    "int",
)  # what argparse calls them where the text is no number


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments, the prompt wherever it stands: argparse gives an optional word up at the first option before it."""
    parser = _parser(argv)
    args, rest = parser.parse_known_args(argv)
    if len(rest) == 1 and rest[0].isprintable() and rest[0][:1] != "-" and getattr(args, "prompt", "") is None:
        args.prompt, rest = rest[0], []
    if rest:
        words = getattr(args, "prompt", None) and not any(word.startswith("-") for word in rest)
        quotes = ": put a prompt of several words in quotes" if words else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{quotes}")
    return args


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """All commands by name, but arguments only of the one that `argv` names: the others are not imported."""
    parser = _Parser(prog="fluxkiln", description="Run FLUX.1 (dev, schnell, Kontext) on the GPU you own.")
    parser.add_argument("--version", action="version", version=f"fluxkiln {fluxkiln.__version__}")
    _add(parser, COMMANDS, [word for word in argv if not word.startswith("-")])
    return parser


def _add(parser: argparse.ArgumentParser, table: Table, words: Sequence[str]) -> None:
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (target, what) in table.items():
        command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
        if not words or words[0] != name:
            continue
        if isinstance(target, str):
            module = importlib.import_module(target)
            module.add_arguments(command)
            command.add_argument("--debug", action="store_true", help="show where an error happened")
            command.set_defaults(run=module.run)
        else:
            _add(command, target, words[1:])


if __name__ == "__main__":
    process()
