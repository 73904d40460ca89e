"""Measure what threads that wait by spinning cost mAIHT on layers that are not large, alone and beside other work.

    python scripts/bench_spinning.py
    python scripts/bench_spinning.py --beside      # beside a process for each core

Each row is a layer and a number of threads, each column a `GOMP_SPINCOUNT`. That must be set before torch is loaded, so
that each is measured in a process of its own. They take turns, so that a slow moment of the machine meets all, and
medians count. Ratios within one run of this script can be relied upon, seconds of two runs cannot be compared. The
smallest layer is solved with one thread, however many there are (`solvers/threads.py`).
"""

import argparse
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(512, 256), (512, 512), (1536, 576), (576, 1536)]
SPINS = ["1000", "3000", "10000", "default"]

PROGRAM = """
import json, sys, time, torch
from maiht_lightning import prune_layer
shapes, config, found = json.loads(sys.argv[1]), sys.argv[2], []
for out, inputs in shapes:
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(out, inputs, generator=random), torch.randn(4 * inputs, inputs, generator=random)
    gram = x.T @ x
    prune_layer(weight[:8], gram, config=config)
    start = time.perf_counter()
    prune_layer(weight, gram, config=config)
    found.append(time.perf_counter() - start)
print(json.dumps(found))
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", action="store_true", help="beside as many busy processes as there are cores")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind; the median counts")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--config", default="paper", help="a preset; see MAIHTConfig")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    return parser.parse_args()


def seconds(threads: int, spins: str, config: str) -> list[float]:
    """Time each layer in a new process."""
    variables = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    variables |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "src")}
    if spins != "default":
        variables["GOMP_SPINCOUNT"] = spins
    command = [sys.executable, "-c", PROGRAM, json.dumps(SHAPES), config]
    found: list[float] = json.loads(
        subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True).stdout
    )
    return found


def main() -> None:
    args = parse_arguments()
    # With one thread nobody waits.
    kinds = [(threads, spins) for threads in args.threads for spins in (SPINS if threads > 1 else SPINS[:1])]
    found: dict[tuple[int, str], list[list[float]]] = {kind: [] for kind in kinds}
    with ExitStack() as stack:
        for _ in range((os.cpu_count() or 1) if args.beside else 0):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(busy.wait)
            stack.callback(busy.kill)
        for _ in range(args.rounds):
            for kind in kinds:
                found[kind].append(seconds(*kind, args.config))
    rows = []
    print(f"{'layer':>11} {'threads':>7} " + " ".join(f"{spins:>9}" for spins in SPINS) + "   seconds, medians")
    for index, shape in enumerate(SHAPES):
        for threads in args.threads:
            times = {
                spins: median(times[index] for times in found[threads, spins])
                for spins in SPINS
                if (threads, spins) in found
            }
            rows.append({"shape": shape, "threads": threads, "seconds": times})
            cells = " ".join(f"{times[spins]:9.3f}" if spins in times else " " * 9 for spins in SPINS)
            print(f"{shape[0]:>6}x{shape[1]:<4} {threads:>7} {cells}")
    if args.json:
        settings = {"beside": args.beside, "rounds": args.rounds, "config": args.config}
        args.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
