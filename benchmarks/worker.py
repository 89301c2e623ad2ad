"""Measure cases of one mode in this process. Read cases as JSON from standard input, and print one line for each.

python worker.py MODULE            times programs in turn
python worker.py MODULE PROGRAM    runs one program alone, and measures the memory of the process
"""

import dataclasses
import gc
import importlib
import importlib.metadata
import json
import os
import random
import sys
import time
from pathlib import Path

from cases import Case
from machine import Load
from timing import in_turn, timed

# A measurement counts if others used at most this share of the cores. Otherwise it is repeated, at most this often.
SHARE_OF_OTHERS, REPEATS = 0.03, 5


def measure(programs, case):
    """Measure a case.

    Returns:
        By program: seconds per step for each cycle, seconds of the first call, and sizes. And, for each placement, the
        share of the cores that others used meanwhile.
    """
    make_program = programs.training_program if case.kind == "training" else programs.step_program
    optimizers = programs.optimizers(case)
    if case.kind == "scaling":
        optimizers = {name: make for name, make in optimizers.items() if name in ("bare", "lookahead-optim")}
    else:
        # The framework's own start in a process does not belong to the first call.
        timed(make_program(case, optimizers["bare"]), 1)
    result = {name: {"seconds": []} for name in optimizers}
    # All programs stay in memory, so that later ones lie elsewhere.
    placements, rng, others = [], random.Random(json.dumps(dataclasses.asdict(case))), []
    for _ in range(case.placements):
        made = {}
        placements.append(made)
        for name, make in optimizers.items():
            start = time.perf_counter()
            made[name] = make_program(case, make)
            timed(made[name], 1)
            result[name].setdefault("first_call", time.perf_counter() - start)
        calls = 1 if made["bare"].steps > 1 else case.period
        # Another process that takes a core for a moment makes all threads of a step wait.
        for _ in range(1 + REPEATS):
            load = Load()
            times = in_turn(made, calls, case.cycles, rng)
            if (share := load.of_others()) <= SHARE_OF_OTHERS:
                break
        others.append(round(share, 3))
        for name, program in made.items():
            result[name]["seconds"] += times[name]
            result[name]["graph_size"] = program.size() if program.size else None
            result[name]["bytes_planned"] = program.bytes_planned
    return result, others


def memory_of(programs, case, name):
    """Return the bytes that the process holds after four cycles, and their peak during the last two cycles."""
    program = programs.step_program(case, programs.optimizers(case)[name])
    timed(program, 2 * case.period)
    gc.collect()
    # This resets the peak.
    Path("/proc/self/clear_refs").write_text("5")
    timed(program, 2 * case.period)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"steady": _bytes(status["VmRSS"]), "peak": _bytes(status["VmHWM"])}


def _bytes(kibibytes):
    return int(kibibytes.split()[0]) * 1024


def installed(names):
    """Return the versions of the packages in `names` that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def threads():
    """Return the number of threads of each loaded library that reports it."""
    found = {}
    if "torch" in sys.modules:
        found["torch"] = sys.modules["torch"].get_num_threads()
    if "tensorflow" in sys.modules:
        threading = sys.modules["tensorflow"].config.threading
        # Zero means one thread for each core.
        found["tensorflow"] = threading.get_intra_op_parallelism_threads() or os.cpu_count()
    return found


def main(module, name=None):
    """Measure the cases on standard input."""
    programs = importlib.import_module(module)
    about = {"versions": installed(programs.versions()), "threads": threads()}
    for line in sys.stdin:
        case = Case(**json.loads(line))
        more = {}
        if name:
            result = memory_of(programs, case, name)
        elif case.kind == "memory":
            result = list(programs.optimizers(case))
        else:
            result, more["others"] = measure(programs, case)
            gc.collect()
        # The marker is needed as frameworks print, too.
        print("\nRESULT " + json.dumps({"result": result, **more, **about}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
