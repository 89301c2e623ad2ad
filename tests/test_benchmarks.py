"""The benchmark suite measures in turn and reports failures, and the docs' tables are made from its results alone."""

import dataclasses
import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpu
import machine
import processes
import report
import report_gpu
from cases import MODES, Case, full, quick
from report import OURS
from timing import Program, in_turn, limit, quartiles, ratios

ROOT = Path(__file__).parent.parent

# The results in the docs. Measuring on another machine makes another file.
RESULTS = [
    ROOT / "benchmarks" / "results" / f"{name}.json"
    for name in ("amd_epyc", "amd_epyc_designs", "intel_xeon_processor")
]


GPU_RESULTS = [ROOT / "benchmarks" / "results" / "gpu_nvidia_h100_80gb_hbm3.json"]


def test_programs_run_in_turn_one_cycle_at_a_time_and_are_waited_for():
    calls = []
    programs = {
        name: Program(lambda name=name: calls.append(name), lambda name=name: calls.append(f"wait for {name}"))
        for name in ("bare", "wrapped")
    }
    times = in_turn(programs, calls=3, cycles=20, rng=random.Random(0), warm_up=1)
    cycles = [calls[start : start + 4] for start in range(0, len(calls), 4)]
    assert all(cycle == [cycle[0]] * 3 + [f"wait for {cycle[0]}"] for cycle in cycles)
    # Each turn has all programs, in an order of its own.
    turns = [(one[0], other[0]) for one, other in zip(cycles[::2], cycles[1::2])]
    assert len(turns) == 21
    assert {*turns} == {("bare", "wrapped"), ("wrapped", "bare")}
    assert {name: len(seconds) for name, seconds in times.items()} == {"bare": 20, "wrapped": 20}


def test_times_are_seconds_a_step(monkeypatch):
    clock = iter(range(0, 1000, 12))
    monkeypatch.setattr("timing.time.perf_counter", lambda: next(clock))
    # Every cycle takes twelve seconds, for three calls of two steps each.
    assert in_turn({"bare": Program(lambda: None, steps=2)}, calls=3, cycles=2, rng=random.Random(0)) == {
        "bare": [2.0, 2.0]
    }


def test_ratios_are_of_the_same_turn_and_the_limit_is_that_of_the_bytes():
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (1.5, 3.0, 4.5)
    assert round(limit(3, 6), 2) == 1.22
    assert round(limit(7, 6), 2) == 1.10
    assert limit(3, 6, fused=True) == 1 + 2 / 18


def made(command, cores=2, results=()):
    """Return a run of cases and its results."""
    machine = {"processor": "any", "cores": cores, "accelerator": "none", "system": "Linux"}
    results = [{"case": dataclasses.asdict(case), "result": result} for case, result in results]
    return {"command": command, "date": "today", "commit": "abc", "machine": machine, "results": results}


def test_of_two_runs_the_last_result_of_a_case_counts():
    first, *_, last = full()
    again = dataclasses.replace(last, cycles=1000)
    run = report.merged([made("old", results=[(last, 1)]), made("new", results=[(again, 2), (first, 3)])])
    # In the order of the suite, whatever was measured first.
    assert [one["result"] for one in run["results"]] == [3, 2]
    assert run["runs"] == [["`old`", "today", "abc", "Linux"], ["`new`", "today", "abc", "Linux"]]


def test_what_is_written_is_read_in_the_order_of_time(tmp_path):
    first, *_, last = full()
    early, late = made("early", results=[(first, 1), (last, 2)]), made("late")
    early["date"], early["time"], late["date"], late["time"] = "2026-01-02", "09:30", "2026-01-02", "10:00"
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, runs in zip(paths, ([late], [early, early])):
        path.write_text(report.written(runs))
    assert report.read(paths) == [early, early, late]


def test_machines_have_tables_of_their_own_the_last_one_first():
    runs = [made("first"), made("second", cores=16), made("third"), made("fourth", cores=16)]
    commands = [[command for command, *_ in run["runs"]] for run in report.by_machine(runs)]
    assert commands == [["`second`", "`fourth`"], ["`first`", "`third`"]]


def test_an_aim_is_met_missed_or_open_as_far_as_the_median_is_known():
    quarter = (1.1, 1.2, 1.3)
    assert report.verdict(quarter, 100, aim=1.25) == "1.20 / 1.25 yes"
    assert report.verdict(quarter, 100, aim=1.15) == "1.20 / 1.15 no"
    # 1.82 times 0.2 divided by 2 is 0.182.
    assert report.verdict(quarter, 4, aim=1.02) == "1.20 / 1.02 open"
    assert report.verdict(quarter, 4, aim=1.01) == "1.20 / 1.01 no"
    assert report.verdict(quarter, 4, aim=1.01, at_least=True) == "1.20 / 1.01 yes"


def test_growth_is_fitted_in_logarithms():
    assert report.exponent([(10, 3.0), (100, 30.0), (1000, 300.0)]) == pytest.approx(1.0)
    assert report.exponent([(10, 3.0), (100, 300.0), (1000, -1.0)]) == pytest.approx(2.0)
    assert report.exponent([(10, 3.0)]) is None


@pytest.mark.parametrize("cases", [full, quick])
def test_every_mode_has_a_case(cases):
    assert {case.mode for case in cases() if case.kind == "step"} == set(MODES)


@pytest.mark.parametrize("cases", [full, quick])
def test_no_case_comes_twice(cases):
    listed = list(cases())
    assert len(set(listed)) == len(listed)


def test_a_case_that_fails_says_why_and_the_next_one_runs():
    good = Case("step", "Optax", "SGD", weights=2, side=4, cycles=4)
    bad = Case("step", "Optax", "unknown", weights=2, side=4, cycles=4)
    failed, passed = processes.ask("Optax", [bad, good])
    assert "KeyError: 'unknown'" in failed["failed"]
    assert {len(program["seconds"]) for program in passed["result"].values()} == {4}
    assert passed["versions"].keys() == {"optax", "jax"}


def test_the_tables_of_the_docs_are_made_of_the_committed_results(tmp_path):
    report.main(tmp_path, RESULTS)
    docs = ROOT / "docs" / "benchmarks"
    for pattern in ("**/*.md", "**/*.svg"):
        names = [{path.relative_to(folder) for path in folder.glob(pattern)} for folder in (tmp_path, docs)]
        assert names[0] == names[1]
    # Plots depend on the version of Matplotlib, so only their names are compared.
    for path in tmp_path.glob("**/*.md"):
        assert (docs / path.relative_to(tmp_path)).read_text() == path.read_text(), path.name


def test_the_tables_of_the_gpu_are_made_of_the_committed_results(tmp_path):
    report_gpu.main(tmp_path, GPU_RESULTS)
    docs = ROOT / "docs" / "benchmarks_gpu"
    assert {path.name for path in docs.iterdir()} == {path.name for path in tmp_path.iterdir()}
    for path in tmp_path.glob("*.md"):
        assert (docs / path.name).read_text() == path.read_text(), path.name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, of what its compiler imports
def test_what_is_measured_on_a_gpu_can_be_measured_on_the_cpu_and_shown(tmp_path):
    names = {part.name for part in gpu.PARTS if not part.tests}
    parts = []
    for name in names:
        for case, measure in importlib.import_module(f"on_device.{name}").cases("cpu").items():
            parts.append({"part": name, "case": case, "result": measure()})
    assert {one["part"] for one in parts} == names
    for one in parts:
        if one["part"] == "torch_sync_designs":
            ran = {name: figures for name, figures in one["result"].items() if "does not run" not in figures}
            # Triton is not there.
            assert {name.split(",")[0] for name in one["result"].keys() - ran.keys()} <= {"kernel"}
            assert all(figures["equal bits"] for figures in ran.values())
    (tmp_path / "results.json").write_text(
        json.dumps([{"parts": parts, "machine": machine.describe(), "command": "", "date": "", "commit": ""}])
    )
    report_gpu.main(tmp_path / "tables", [tmp_path / "results.json"])
    for name in ("training", "steps", "optax", "syncs", "memory", "graphs", "sync_designs", "optax_designs"):
        assert "Not measured" not in (tmp_path / "tables" / f"{name}.md").read_text(), name


def test_the_command_for_a_gpu_runs_on_the_cpu(tmp_path):
    # The tests that it also runs belong to the suites of their front ends.
    parts = ["--only", "torch_waits", "--only", "keras_steps torch", "--only", "jax_training"]
    command = [sys.executable, gpu.FOLDER / "gpu.py", "--device", "cpu", "--output", tmp_path / "out.json", *parts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (run,) = json.loads((tmp_path / "out.json").read_text())
    ends = [one["part"] for one in run["parts"] if one["case"] == "end"]
    assert ends == ["torch_waits", "keras_steps on torch", "jax_training"]


def test_a_part_of_the_gpu_that_fails_or_takes_too_long_does_not_stop_the_others(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(gpu.FOLDER)}
    findings = gpu.Findings(tmp_path / "out.json", {"device": "cuda"})
    gpu.run_part(gpu.Part("unknown", 60), "cuda", environment, findings)
    gpu.run_part(gpu.Part("torch_waits", 0), "cuda", environment, findings)
    (run,) = json.loads((tmp_path / "out.json").read_text())
    unknown, late = (one["result"]["failed"] for one in run["parts"] if one["case"] == "end")
    assert "No module named 'on_device.unknown'" in unknown
    assert late == "stopped after 0 s"
    # The next run is added to the file.
    gpu.Findings(tmp_path / "out.json", {"device": "cuda"}).add("part", "case", {})
    assert len(json.loads((tmp_path / "out.json").read_text())) == 2


# Rows of the README's table, and the results that they show.
README = {
    "ten weights of 1024 x 1024 on a CPU: PyTorch": ("PyTorch, foreach", OURS),
    "Keras on TensorFlow, graph": ("Keras, TensorFlow graph", OURS),
    "Keras on JAX": ("Keras, JAX", OURS),
    "Keras on PyTorch": ("Keras, PyTorch", OURS),
    "Keras 2, graph": ("tf_keras, graph", OURS),
    "Optax": ("Optax", OURS),
    "*TensorFlow Addons 0.23*": ("tf.keras 2.15, graph", "tensorflow_addons"),
    "*`optax.lookahead`*": ("Optax", "optax"),
    "*timm, fused*": ("PyTorch, fused", "timm"),
    "*pytorch_optimizer, fused*": ("PyTorch, fused", "pytorch_optimizer"),
}


def rows_of_the_readme():
    """Return the cells of the README's tables by the first cell of their row."""
    lines = [line.strip("|\n ").split(" | ") for line in (ROOT / "README.md").read_text().splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_the_figures_of_the_readme_are_those_of_the_results():
    run, medians, training = report.by_machine(report.read(RESULTS))[0], {}, {"SGD": [], "Adam": []}
    for one in report.of_kind(run, "step"):
        case = one["case"]
        if (case["period"], case["weights"]) == (6, 10):
            for name in one["result"]:
                medians[case["mode"], name, case["inner"]] = f"{report.ratio_of(one['result'], name)[1]:.2f}"
    for one in report.of_kind(run, "training"):
        training[one["case"]["inner"]].append(report.ratio_of(one["result"], OURS)[1])
    rows = rows_of_the_readme()
    for label, program in README.items():
        assert rows[label] == [medians[(*program, inner)] for inner in ("SGD", "Adam")], label
    (label,) = (label for label in rows if label.startswith("**a training step**"))
    assert rows[label] == [f"{np.median(training[inner]):.2f}" for inner in ("SGD", "Adam")]


def test_the_figures_of_a_gpu_in_the_readme_are_those_of_the_results():
    runs = report_gpu.read(GPU_RESULTS)
    steps = report_gpu.cases_of(runs, "torch_steps")
    cases = [steps[f"1 GiB, large, {inner}, period 6"] for inner in ("SGD, foreach", "AdamW, fused")]
    found = rows_of_the_readme()["the optimizer's step alone, 1 GiB of weights on an H100: PyTorch"]
    assert found == [f"{case[OURS]['median']:.2f}" for case in cases]
    training = [result[OURS]["median"] for result in report_gpu.cases_of(runs, "torch_training").values()]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"took {min(training):.2f} to {max(training):.2f} of the bare one" in text
