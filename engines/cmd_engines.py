"""`fluxkiln engines`: what the store holds, which of it runs here, and why not the rest."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from fluxkiln.engines.store import Store, Stored, default_root, refuse_here

LEFTOVER_SECONDS = 24 * 3600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", type=Path, default=default_root(), help="folder of the engines")
    parser.add_argument("--verify", action="store_true", help="read every engine whole and compare its sha256")
    parser.add_argument("--prune", action="store_true", help="delete damaged engines and what killed builds left")
    parser.add_argument("--remove", metavar="KEY", help="delete one engine")
    parser.add_argument("--export", nargs=2, metavar=("KEY", "FOLDER"), help="copy an engine and its manifest")
    parser.add_argument("--import", dest="take", type=Path, metavar="FOLDER", help="add an engine that --export wrote")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    store = Store(args.store)
    if args.take:
        print(f"added {store.take(args.take).folder}")
    elif args.export:
        print(f"wrote {store.export(store.one(args.export[0]), args.export[1])}")
    elif args.remove:
        store.remove(store.one(args.remove))
        print(f"removed {args.remove}")
    elif args.prune:
        damaged = [stored for stored in store if store.verify(stored)]
        for stored in damaged:
            store.remove(stored)
        print(f"removed {len(damaged)} damaged engines and {store.prune(LEFTOVER_SECONDS)} leftovers")
    else:
        _list(store, args.verify, args.json)
    return 0


def _list(store: Store, verify: bool, as_json: bool) -> None:
    arch, versions = this_machine()
    rows = []
    for stored in store:
        refusal = store.verify(stored) if verify else stored.refusal
        if refusal is None and stored.manifest is not None:
            refusal = refuse_here(stored.manifest, arch, versions)
        rows.append((stored, refusal))
    if as_json:
        listing = [
            {
                "folder": str(s.folder),
                "manifest": asdict(s.manifest) if s.manifest else None,
                "header": asdict(s.header) if s.header else None,
                "refused": refusal,
            }
            for s, refusal in rows
        ]
        print(json.dumps(listing, indent=1))
        return
    if not rows:
        print(f"no engines in {store.root}: `fluxkiln build --model MODEL --precision fp8 --arch sm_89` makes one")
    for stored, refusal in rows:
        print(
            f"{stored.folder.name}  {_line(stored)}\n    {'runs here' if refusal is None else f'not here: {refusal}'}"
        )


def _line(stored: Stored) -> str:
    if stored.manifest is None:
        return "damaged"
    m, s = stored.manifest, stored.manifest.subject
    inside = f" ({stored.header.weight_bytes / 1e6:.1f} MB)" if stored.header and s.weights == "inside" else ""
    return (
        f"{m.model_name} {s.precision} {s.arch}, weights {s.weights}{inside}, {m.nbytes / 1e6:.1f} MB, "
        f"{s.flavour} {s.version}, built in {m.seconds:.0f} s"
    )


def this_machine() -> tuple[str | None, dict[str, str]]:
    """The GPU's architecture, and installed flavour -> version."""
    import torch

    from fluxkiln.engines.flavour import installed

    versions, arch = installed(), None
    if torch.cuda.is_available():
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return arch, versions
