"""`fluxkiln edit`: change a picture by instruction, all of it or inside a mask."""

from __future__ import annotations

import argparse

from fluxkiln import cmd_generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photo", help="the picture to change")
    parser.add_argument("prompt", nargs="?", type=cmd_generate.unicode_text, help="what to change")
    parser.add_argument("--mask", metavar="FILE", help="change only its white part")
    parser.add_argument("--crop", nargs="?", type=int, const=32, metavar="PIXELS", help="render only around the mask")
    parser.add_argument(
        "--reference", action="append", default=[], metavar="FILE", help="a further picture to refer to"
    )
    cmd_generate.add_shared(parser)


def run(args: argparse.Namespace) -> int:
    args.image, args.control_image, args.repeat = [args.photo, *args.reference], None, None
    return cmd_generate.run(args)
