"""Kill compilations of a small real model with SIGKILL, over and over, and see that nothing finished is lost and nothing half-written is seen.

    python -m tools.kill_test [--kills 50] [--model llama] [--backend onnxruntime] [--seed 0]

Each kill hits a stage drawn evenly from those still to come (a pass, with the writing of its checkpoint; lowering; saving) at a moment drawn
evenly over the time that the stage takes. The next process must begin at the first pass that the checkpoint on disk doesn't hold. Where an
artifact stands it must be whole. Every artifact, and one that a new interpreter makes of a last checkpoint, must equal that of an undisturbed
run, times aside.
Linux; run it from the repository's root.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import fxcompress as fxc
from fxcompress import artifact, checkpoint
from tests.zoo import ZOO

RECIPE = {
    "name": "killed",
    "passes": [
        "tidy.fold_constants",
        "tidy.no_ops",
        "tidy.fold_norm_gain",
        "rotate.residual",
        {"quant.weight_only": {"weights": "int8/group:32", "range": "mse"}},
        "quant.finalize",
    ],
}
STAGES = (*(s if isinstance(s, str) else next(iter(s)) for s in RECIPE["passes"]), "lowering", "saving")


class Killer:
    """One model, one folder with a checkpoint and an artifact in it. times: seconds of each stage in an undisturbed run."""

    def __init__(self, program: fxc.Program, backend: str, place: Path, seed: int) -> None:
        self.program, self.backend, self.place, self.draw = program, backend, place, random.Random(seed)
        self.run, self.out = place / "run", place / "out"
        self.killed: Counter[str] = Counter()
        self.attempts = self.completed = 0
        self.times = self._undisturbed()
        self.expected = content(self.out)

    def series(self, kills: int) -> None:
        """Attempts on one checkpoint until one lives to its end, all kills are used, or by chance, so that early stages are hit as well."""
        while self.killed.total() < kills:
            before = finished(self.run)
            stage = self.draw.randrange(before, len(STAGES))
            events, is_killed = self._attempt(stage, self.draw.uniform(0, self.times[stage]))
            self.attempts += 1
            assert events[:1] in ([], [before]), f"{before} passes were finished, the next process began at number {events[0]}"
            assert finished(self.run) >= max([before, *events[:-1]]), "a finished pass is lost"
            if self.out.exists():
                artifact.read_manifest(self.out)
                assert content(self.out) == self.expected
            if not is_killed:
                self.completed += 1
                return
            self.killed[STAGES[stage]] += 1
            if self.draw.random() < 0.3:
                return

    def _attempt(self, stage: int, delay: float) -> tuple[list[int], bool]:
        """(numbers of the stages that were begun, whether it was killed). It is killed some seconds after the stage has begun."""
        pid, lines = self._forked()
        events = []
        for line in lines:
            events.append(int(line))
            if events[-1] == stage:
                time.sleep(delay)
                os.kill(pid, signal.SIGKILL)
                break
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL), f"the process failed with {status}"
        return events, status != 0

    def _forked(self) -> tuple[int, Any]:
        """A process that compiles and saves, and a file that gets a line when a stage begins."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writing)
            return pid, os.fdopen(reading, "r")
        try:
            work(self.program, self.backend, self.place, lambda number: os.write(writing, f"{number}\n".encode()))
            os._exit(0)
        finally:
            os._exit(1)

    def _undisturbed(self) -> list[float]:
        pid, lines = self._forked()
        moments = [time.monotonic() for _ in lines]
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert len(moments) == len(STAGES)
        ends = [*moments[1:], time.monotonic()]
        clear(self.run)
        return [end - start for start, end in zip(moments, ends, strict=True)]


def work(program: Any, backend: str, place: Path, begun: Any) -> None:
    """Compile with a checkpoint, save."""
    model = fxc.compile(program, RECIPE, backend=backend, checkpoint=place / "run", progress=lambda name, number, total: begun(number))
    model.save(place / "out")


def finished(run: Path) -> int:
    """How many passes a checkpoint on disk holds."""
    path = run / checkpoint.STATE
    return len(json.loads(path.read_bytes())["kept"]["run"]["passes"]) if path.exists() else 0


def content(folder: Path) -> dict[str, Any]:
    """The files of an artifact, without measured times and what follows from them."""
    files: dict[str, Any] = {f.name: f.read_bytes() for f in folder.iterdir() if f.name != artifact.MANIFEST}
    report = json.loads(files.pop("report.json"))
    for done in report["passes"]:
        del done["cpu_seconds"]
    files["report.html"] = re.sub(rb'"cpu":[^,]*', b"", files["report.html"])
    return {**files, "report": report}


def clear(folder: Path) -> None:
    """Remove a checkpoint."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def main() -> None:
    """Kill, check, print what was hit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model", choices=sorted(ZOO), default="llama")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--finish", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    program = fxc.capture(*ZOO[options.model]())
    if options.finish:
        begun: list[int] = []
        before = finished(options.finish / "run")
        work(program, options.backend, options.finish, begun.append)
        assert begun[0] == before, f"a new interpreter began at {begun[0]} of {before}"
        return
    with tempfile.TemporaryDirectory() as place:
        os.environ["TMPDIR"] = tempfile.tempdir = place  # what killed processes leave goes with it
        report(killed(program, options, Path(place)))


def killed(program: fxc.Program, options: argparse.Namespace, place: Path) -> Killer:
    """Series after series until the kills are used; then a new interpreter finishes what the last one left."""
    killer = Killer(program, options.backend, place, options.seed)
    while killer.killed.total() < options.kills:
        clear(killer.run)
        killer.series(options.kills)
    if finished(killer.run) == len(RECIPE["passes"]):  # leave it something to do
        clear(killer.run)
        killer._attempt(len(RECIPE["passes"]) // 2, 0.0)
    command = [sys.executable, "-m", "tools.kill_test", "--model", options.model, "--backend", options.backend, "--finish", str(place)]
    subprocess.run(command, check=True)
    assert content(killer.out) == killer.expected
    left = [p.name for p in place.iterdir() if p.name.startswith(".out-")]
    assert not left, f"a killed save left {left[0]}"
    return killer


def report(killer: Killer) -> None:
    """Print the counts."""
    print(
        f"{killer.killed.total()} kills in {killer.attempts} runs, {killer.completed} of which lived to their end: no finished pass repeated,"
    )
    print("no artifact half-written, every result as that of the undisturbed run")
    for name, seconds in zip(STAGES, killer.times, strict=True):
        print(f"  {name:24}{killer.killed[name]:4} kills in {seconds:6.2f} s")


if __name__ == "__main__":
    main()
