"""`fluxkiln verify`: do the numbers hold on this machine?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", nargs="+", default=["eager", "triton"], choices=("eager", "triton"))
    parser.add_argument("--device", help="default: the GPU if there is one; on a CPU the kernels are interpreted")
    parser.add_argument("--engines", action="store_true", help="run TensorRT engines instead, and print a report")
    parser.add_argument("--store", type=Path, metavar="FOLDER", help="of the engines (default: where build puts them)")
    parser.add_argument("--model", help="to run the engines with (default: what each was built for)")
    parser.add_argument("--json", action="store_true", help="a list with one object for each verdict")


def run(args: argparse.Namespace) -> int:
    if args.engines:
        return engines(args)
    from fluxkiln.load import default_device
    from fluxkiln.verify import SLACK, Verdict, verify

    def show(verdict: Verdict) -> None:
        if args.json:
            return
        if verdict.failed is not None:
            result = f"FAILED: {verdict.failed}"
        elif verdict.error is None:
            result = f"not run: {verdict.refused}"
        else:
            mark = "ok" if verdict.passed else "WRONG"
            result = f"{verdict.error:.1e}  {verdict.eager_error:11.1e}  {verdict.seconds:5.1f} s  {mark}"
        print(f"{verdict.op:21} {verdict.format:6} {verdict.backend:7} {result}", flush=True)

    device = default_device(args.device)
    if not args.json:
        interpreted = ", where Triton's kernels are interpreted" * (device.type == "cpu")
        print(f"errors against float64, relative, in the mean square, on {device}{interpreted}")
        print(f"{'operation':21} format backend   error  eager's own     time")
    verdicts = verify(device, args.backend, progress=show)
    wrong = [verdict for verdict in verdicts if not verdict.passed]
    if args.json:
        rows = [dataclasses.asdict(verdict) | {"passed": verdict.passed} for verdict in verdicts]
        print(json.dumps(rows, indent=1))
    elif wrong:
        print(
            f"{len(wrong)} of {len(verdicts)} failed, or are more than {SLACK:g} times as wrong as eager and this "
            "GPU's FP8 sums: do not trust them here"
        )
    else:
        ran = sum(verdict.refused is None for verdict in verdicts)
        print(f"all {ran} that ran are within {SLACK:g} times eager's own error against float64")
    return 1 if wrong else 0


def engines(args: argparse.Namespace) -> int:
    """Exit code 1 if an engine failed, or none ran."""
    from fluxkiln.engines.store import Store, default_root
    from fluxkiln.record import versions
    from fluxkiln.verify_engines import EngineVerdict, report, verify_engines

    verdicts: list[EngineVerdict] = []

    def show(verdict: EngineVerdict) -> None:
        verdicts.append(verdict)
        result = verdict.failed or verdict.refused or ("ok" if verdict.passed else "WRONG")
        what = (verdict.key, verdict.model, verdict.precision, verdict.weights, verdict.tokens)
        print(f"{' '.join(filter(None, what))}: {result}", file=sys.stderr, flush=True)

    try:
        verify_engines(Store(args.store or default_root()), args.model, progress=show)
    finally:
        if verdicts:  # an interrupted run too has found what it has found
            machine = versions("cuda")
            if args.json:
                rows = [dataclasses.asdict(verdict) | {"passed": verdict.passed} for verdict in verdicts]
                print(json.dumps({"machine": machine, "engines": rows}, indent=1))
            else:
                print(report(verdicts, machine))
    ran = [verdict for verdict in verdicts if verdict.refused is None]
    return 0 if ran and all(verdict.passed for verdict in ran) else 1
