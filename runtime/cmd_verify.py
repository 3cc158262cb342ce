"""`fluxkiln verify`: do the numbers hold on this machine?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", nargs="+", default=["eager", "triton"], choices=("eager", "triton"))
    parser.add_argument("--device", help="default: the GPU if there is one; on a CPU the kernels are interpreted")
    parser.add_argument("--json", action="store_true", help="a list with one object for each verdict")


def run(args: argparse.Namespace) -> int:
    from fluxkiln.verify import SLACK, Verdict, verify

    def show(verdict: Verdict) -> None:
        if args.json:
            return
        if verdict.error is None:
            result = f"not run: {verdict.refused}"
        else:
            mark = "ok" if verdict.passed else "WRONG"
            result = f"{verdict.error:.1e}  eager {verdict.eager_error:.1e}  {verdict.seconds:5.1f} s  {mark}"
        print(f"{verdict.op:21} {verdict.format:6} {verdict.backend:7} {result}", flush=True)

    verdicts = verify(args.device, args.backend, progress=show)
    wrong = [verdict for verdict in verdicts if not verdict.passed]
    if args.json:
        rows = [dataclasses.asdict(verdict) | {"passed": verdict.passed} for verdict in verdicts]
        json.dump(rows, sys.stdout, indent=1)
        print()
    elif wrong:
        print(
            f"{len(wrong)} of {len(verdicts)} are more than {SLACK:g} times as wrong as eager: do not trust them here"
        )
    else:
        ran = sum(verdict.refused is None for verdict in verdicts)
        print(f"all {ran} that ran are within {SLACK:g} times eager's own error against float64")
    return 1 if wrong else 0
