"""Tables and plots of what was measured, and of nothing else.

    python -m fluxkiln.bench.report --results bench/results --readme README.md --plots docs

reads the files that `bench kernels` and `bench.gpu` wrote, puts a table of every GPU between the marks in the README,
and draws a roofline of the kernels and the milliseconds of a step by operation. Rows that failed, or that were wrong,
do not count.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxkiln.files import write_text

START, END = "<!-- measured -->\n", "<!-- /measured -->"
SIZE = "1024x1024"
ABOVE_ROOF = (
    "What is bound by memory may be above 100 % of the roof: a kernel's last writes may still be in the L2 cache "
    "when its time ends, while the copy that is the roof pays for all of its own."
)

Row = dict[str, Any]


def lines(path: Path) -> Iterator[Row]:
    """The rows of a file, but for one that was cut off when a run was stopped."""
    for text in path.read_text().splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            continue


def read(path: Path) -> tuple[Row, list[Row]]:
    """The last run's header, and all rows of the same kernels, GPU and versions."""
    header: Row = {}
    rows: list[tuple[Any, Row]] = []
    identity = None
    for row in lines(path):
        if row["kind"] == "run":
            header, identity = row, row["identity"]
        else:
            rows.append((identity, row))
    return header, [row for of, row in rows if of == identity]


def timed(rows: Iterable[Row]) -> list[Row]:
    """What was measured and right."""
    return [row for row in rows if ("us" in row or "ms" in row) and row.get("passed", True)]


# --- tables -----------------------------------------------------------------------------------


def kernels_table(header: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Our kernels at one size, each beside the fastest of the library and the unfused chain."""
    cases: dict[str, dict[str, Row]] = {}
    for row in timed(rows):
        if row["kind"] == "kernel" and row["size"] == SIZE:
            cases.setdefault(row["case"], {})[row["contestant"]] = row
    table = [
        "| operation | shape | format | µs | rate | % of roof | library | unfused |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases.values():
        ours = case.pop("triton", None)
        if ours is None:
            continue
        rate = f"{ours['tflops']:.0f} TFLOP/s" if "tflops" in ours else f"{ours['gbytes_per_s']:.0f} GB/s"
        library = [row["us"] for name, row in case.items() if name in ("flash", "cudnn") or name.startswith("product")]
        unfused = [row["us"] for name, row in case.items() if name in ("unfused", "eager" * (ours["format"] == "bf16"))]
        table.append(
            f"| `{ours['place']}` | {ours['shape']} | {_formats(ours)} | {ours['us']:.1f} | {rate} "
            f"| {ours['percent_of_roof']:.0f} | {_best(library)} | {_best(unfused)} |"
        )
    caption = _caption(header, f"Kernels at {SIZE}, batch 1, cold L2, medians; library and unfused in µs")
    return "\n".join([caption, *table, "", ABOVE_ROOF])


def step_table(header: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """A step by each contestant."""
    table = ["| step of FLUX.1 dev | ms | TFLOP/s | peak memory |", "|---|---|---|---|"]
    for row in sorted(timed(rows), key=lambda row: (row["size"], row["ms"])):
        memory = f"{row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else "–"
        table.append(f"| {row['contestant']} | {row['ms']:.1f} | {row['tflops']:.0f} | {memory} |")
    return "\n".join([_caption(header, "One denoise step, random weights, medians"), *table])


def _formats(row: Row) -> str:
    return row["format"] if row["format"] == row["result"] else f"{row['format']} → {row['result']}"


def _best(values: Sequence[float]) -> str:
    return f"{min(values):.1f}" if values else "–"


def _caption(header: Mapping[str, Any], what: str) -> str:
    found, card = header["identity"]["versions"], header["card"]
    machine = found.get("gpu") or found["cpu"]
    rest = ", ".join(f"{name} {found[name]}" for name in ("driver", "torch", "triton") if name in found)
    return f"{what}. {machine}, {rest}, {card['date'][:10]}.\n"


def markdown(folder: Path) -> str:
    """Every table that the results in a folder give, or nothing."""
    tables = []
    for prefix, table in (("step-", step_table), ("kernels-", kernels_table)):
        for path in sorted(folder.glob(f"{prefix}*.jsonl")):
            header, rows = read(path)
            if timed(rows) and not path.stem.endswith("-tiny"):
                tables.append(table(header, rows))
    return "\n\n".join(tables)


def write_readme(path: Path, tables: str) -> None:
    """Put the tables between the marks.

    Raises:
        ValueError: the file has no marks.
    """
    text = path.read_text()
    start, end = text.find(START), text.find(END)
    if min(start, end) < 0:
        raise ValueError(f"{path} has no {START.strip()} and {END} to write between")
    write_text(path, text[: start + len(START)] + (f"\n{tables}\n\n" if tables else "") + text[end:])


# --- plots ------------------------------------------------------------------------------------

COLOURS = {
    "qkv_rope": "#4269d0", "attention": "#efb118", "linear_gelu": "#ff725c", "linear_gate_residual": "#6cc5b0",
    "norm_modulate": "#3ca951", "linear": "#9c6b4e", "others": "#9498a0", "between kernels": "#d8dbe0",
}  # fmt: skip


def roofline(header: Mapping[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Rate over intensity of every kernel, under the roofs of the same run."""
    import matplotlib.pyplot as plt

    ours = [row for row in timed(rows) if row["kind"] == "kernel" and row["contestant"] == "triton" and row["flops"]]
    figure, axes = plt.subplots(figsize=(8, 5))
    roofs = header["roofs"]
    reach = [1, *(row["flops"] / row["bytes"] for row in ours), 10_000]
    for format in (name for name in roofs if name != "copy"):
        x = sorted({min(reach), roofs[format] / roofs["copy"], max(reach)})
        y = [min(at * roofs["copy"], roofs[format]) / 1e12 for at in x]
        axes.plot(x, y, color="#555", linewidth=1)
        axes.annotate(f"library {format}", (x[-1], y[-1]), ha="right", va="bottom", fontsize=8)
    for format, marker in (("bf16", "o"), ("fp8", "s"), ("nvfp4", "^")):
        for op, colour in COLOURS.items():
            points = [row for row in ours if row["format"] == format and row["op"] == op]
            if points:
                x = [row["flops"] / row["bytes"] for row in points]
                y = [row["tflops"] for row in points]
                axes.scatter(x, y, color=colour, marker=marker, label=f"{op} {format}", s=24)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.set_title(_caption(header, "Kernels under measured roofs").strip(), fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    _save(figure, path)


def stacked(header: Mapping[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Milliseconds of a step by operation, one bar for each contestant."""
    import matplotlib.pyplot as plt

    bars = [row for row in timed(rows) if row.get("parts_ms")]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.45 * len(bars)))
    left = [0.0] * len(bars)
    names = [row["contestant"] for row in bars]
    for op, colour in COLOURS.items():
        widths = [max(0.0, row["parts_ms"].get(op, 0.0)) for row in bars]
        if any(widths):
            axes.barh(names, widths, left=left, color=colour, label=op)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms per step")
    axes.set_title(_caption(header, "One denoise step").strip(), fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})  # the same data gives the same file
    plt.close(figure)


# --- command ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fluxkiln.bench.report", description="Tables and plots of results.")
    parser.add_argument("--results", type=Path, metavar="FOLDER", default=Path("bench/results"))
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write the tables between its marks")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw into this folder")
    args = parser.parse_args(argv)
    tables = markdown(args.results)
    if args.readme:
        write_readme(args.readme, tables)
    else:
        print(tables or f"nothing was measured in {args.results}")
    if args.plots:
        import matplotlib

        matplotlib.use("Agg")
        for prefix, draw in (("kernels-", roofline), ("step-", stacked)):
            for path in sorted(args.results.glob(f"{prefix}*.jsonl")):
                header, rows = read(path)
                if timed(rows):
                    draw(header, rows, args.plots / f"{path.stem}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
