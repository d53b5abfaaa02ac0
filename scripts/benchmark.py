"""Step time, memory and traffic of masked training, as ratios of interleaved runs.

    python scripts/benchmark.py              # all but the last three, with a table of goals; a quarter of an hour
    python scripts/benchmark.py step         # a training step in every way
    python scripts/benchmark.py memory       # peak memory of every way, of a ranking, and the size of mask files
    python scripts/benchmark.py phases       # freeze, then unfreeze; and the time of a change of mask
    python scripts/benchmark.py density      # step time and memory against density; draws benchmark.png
    python scripts/benchmark.py ddp          # two processes
    python scripts/benchmark.py holders      # the ways of holding one tensor, by density and by size
    python scripts/benchmark.py profile      # where the time of a step goes
    python scripts/benchmark.py scaling      # one process, two, two hosts with a limited link (root, iproute2); a projection

Each run is a ``Trainer.fit`` on the MiniLM checkpoint (22.6 M parameters, batches of 8 x 32 tokens, AdamW fused with
weight decay, 2 threads or 2 processes of one). The runs live side by side and take turns of a few steps in random order.
A time is the median over all turns, a ratio the median over all rounds of the ratio within the round. Other libraries are
in the extra ``bench``; what is not installed is left out, and said so.
The figures are printed as tables and written as JSON.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from benchmark import ddp, density, holders, phases, scaling, stages, steps
from benchmark.memory import quiet
from benchmark.model import BATCH, DENSITY, THREADS, TOKENS, load
from benchmark.pair import why_no_hosts
from benchmark.ways import installed
from rich.console import Console
from rich.table import Table

Rows = list[dict[str, Any]]
SECTIONS = ("step", "memory", "phases", "density", "ddp")
ALONE = ("holders", "profile", "scaling")
OTHERS = {"peft": "SHiRA", "finetuning_scheduler": "finetuning-scheduler", "matplotlib": "the plot"}


def measure(what: str, rounds: int, length: int, output: Path, compute_ms: float) -> tuple[dict[str, Rows], Rows]:
    """Measure one section; return its tables by name, and its goals with what was measured."""
    if what == "holders":
        return {"holders": holders.holders(rounds), "lines": holders.lines(rounds)}, []
    if what == "memory":
        peaks, files, goals = steps.memory()
        return {"memory": peaks, "mask files": files}, goals
    if what == "ddp":
        tables = ddp.two_processes(half(rounds), length)
        ours = next(row for row in tables["ddp"] if row["way"] == ddp.OURS)
        return dict(tables), [
            steps.goal("bytes on the wire over density * dense", 1.02, ours["sent over density * dense"]),
            steps.goal("two processes at 1 %: step over dense DDP", 0.81, ours["over dense"]),
        ]
    base = load()
    if what == "profile":
        return {"profile": stages.profile(base, rounds, length)}, []
    if what == "scaling":
        rows, goals = scaling.scaling(base, half(half(rounds)), max(length // 2, 2), not why_no_hosts())
        return {"scaling": rows, "projection": scaling.projection(*scaling.sent_bytes(rows), compute_ms)}, goals
    if what == "step":
        rows, goals = steps.step(base, rounds, length)
        return {"step": rows}, goals
    if what == "phases":
        changes = phases.mask_changes(base, half(rounds // 2))
        slowest = max(row["steps"] for row in changes)
        tables = {"phases": phases.phases(base, half(rounds), length), "mask changes": changes}
        return tables, [steps.goal("a phase switch or mask change, in training steps", 2.0, slowest)]
    rows = density.density(base, half(half(rounds)), length)
    if installed("matplotlib"):
        density.plot(rows, output.with_suffix(".png"))
    return {"density": rows}, []


def half(rounds: int) -> int:
    return max(rounds // 2, 1)


def titles(compute_ms: float) -> dict[str, str]:
    batch = f"{BATCH} x {TOKENS} tokens"
    return {
        "step": f"A training step, masks at {DENSITY:.0%} ({batch}, {THREADS} threads)",
        "memory": "Peak resident memory beyond the model, up to the last step and with what follows it",
        "mask files": "Mask files",
        "phases": f"The last layer and the head first, then everything ({batch}, {THREADS} threads)",
        "mask changes": "A change of mask, beyond the time of the steps around it",
        "density": f"Step time and memory by density ({batch}, {THREADS} threads)",
        "ddp": f"A training step of two processes, masks at {DENSITY:.0%} ({batch} each, one thread each)",
        "ddp phases": "Two processes: the last layer and the head first, then everything",
        "holders": "Mask the gradients and restore the weights of MiniLM",
        "lines": f"A step of a Linear of which one in {holders.SHARE} rows is active ({BATCH * TOKENS} tokens)",
        "profile": f"Where the time of a step goes, ms ({batch}, {THREADS} threads)",
        "scaling": f"Masks at {DENSITY:.0%} against dense DDP ({scaling.BATCH} x {TOKENS} tokens and one thread each)",
        "projection": f"A PROJECTION, not measured: a step on many GPUs\n{scaling.assumptions(compute_ms)}",
        "bytes": "Bytes of an active entry, measured (mask: of every entry)",
        "at scale": "On paper: GB of one rank, from the bytes of an entry\n" + formula(),
        "goals": "Goals",
    }


def formula() -> str:
    return (
        "optimizer, gradients = bytes * d * n; wire = bytes * d * n * 2 (R - 1) / R\n"
        "mask = bytes * n + bytes of index and values * d * n; sharded: over R"
    )


def show(console: Console, title: str, rows: Rows) -> None:
    """Print rows as a table."""
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    console.print(table)


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 0.1 else f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def write(results: dict[str, Any], path: Path) -> None:
    """Write the figures; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(results, indent=1))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=["all", *SECTIONS, *ALONE])
    parser.add_argument("--rounds", type=int, default=20, help="how often each run takes its turn (default: 20)")
    parser.add_argument("--steps", type=int, default=4, help="training steps of one turn; the first is not counted")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"), help="the plot goes beside it, as .png")
    parser.add_argument(
        "--compute-ms", type=float, default=20.0, help="scaling: a step's computing on one GPU of the projection"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.steps < 2:
        parser.error("--rounds must be at least 1 and --steps at least 2: the first step of a turn is not counted")
    if not arguments.compute_ms > 0:
        parser.error(f"--compute-ms must be above 0, and is {arguments.compute_ms:g}")
    quiet()
    torch.set_num_threads(THREADS)
    console = Console(width=120)
    for package, what in OTHERS.items():
        if not installed(package):
            console.print(f"{package} is not installed, so {what} is left out; install the extra 'bench'.")
    if arguments.what == "scaling" and (why := why_no_hosts()):
        console.print(f"Two hosts with a limited link are left out: {why}.")
    headings = titles(arguments.compute_ms)
    sections = SECTIONS if arguments.what == "all" else (arguments.what,)
    results: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    goals: Rows = []
    seconds: dict[str, float] = {}
    for section in sections:
        begin = time.perf_counter()
        tables, promises = measure(section, arguments.rounds, arguments.steps, arguments.output, arguments.compute_ms)
        seconds[section] = time.perf_counter() - begin
        goals += promises
        for name, rows in tables.items():
            show(console, headings[name], rows)
        console.print(f"{section}: {seconds[section]:.0f} s\n")
        results |= tables
    if arguments.what == "all":
        base = load()
        each = [f(base, results["step"], results["ddp"]) for f in (steps.dense_bytes_per_entry, steps.bytes_per_entry)]
        results["bytes"] = [{"way": way, **row} for way, row in zip(("dense", "ours"), each, strict=True)]
        results["at scale"] = steps.at_scale(*each)
        show(console, headings["bytes"], results["bytes"])
        show(console, headings["at scale"], results["at scale"])
    if goals:
        show(console, headings["goals"], goals)
    write({**results, "goals": goals, "seconds": seconds}, arguments.output)


if __name__ == "__main__":
    main()
