"""Everything that only a GPU can prove, in one call of under ten minutes: ``make gpu-check``.

    machine     GPU, driver, library versions
    tests       every test marked ``gpu``, but those of the next phase
    parity      the device against the host: noise, rows and trajectories, bits in every batch,
                nothing that waits inside a chunk, NaN in one lane, memory that is out
    sanitizer   compute-sanitizer's memcheck and racecheck over every kernel, where it is on PATH
    benchmark   ddpm-bench gpu, with the time that is left

A phase that fails is reported, and the next one begins. Each is a process of its own, ended when
its time is up. At the end: one JSON, one Markdown page, and exit code 1 if any check failed.

It runs in the interpreter it is started with and needs nothing but what is imported there: no
network, and not even an installed ddpm-engine. Standard library alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("runtime", "export", "train", "benchmarks")
PARITY = (
    "tests/cuda/test_cuda_gpu_chunks.py",
    "tests/plans/test_plan_gpu_promises.py",
)
NOTHING_RAN = "nothing ran"
_LEAST_S = 5.0
_KEPT_S = {"parity": 90.0, "sanitizer": 40.0, "benchmark": 120.0}  # for each, until its turn


@dataclass
class Outcome:
    """How a phase ended: "passed", "failed", "timed out", "not here" or "no time"."""

    name: str
    outcome: str
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    page: str = ""

    @property
    def failed(self) -> bool:
        """Whether the whole check fails with it; a tool that is not here does not."""
        return self.outcome not in ("passed", "not here")


@dataclass
class Done:
    """A process that ended, or was ended."""

    code: int
    text: str
    timed_out: bool


class Check:
    """One run of all phases.

    Args:
        options: of the command line.
        folder: for what the phases write on the way.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.waiting = list(options.only or PHASES)  # the phases still to come
        self._end: float = time.monotonic() + options.budget_s

    @property
    def left_s(self) -> float:
        """Seconds until the budget is spent."""
        return self._end - time.monotonic()

    def run(self, words: list[str], *, limit_s: float) -> Done:
        """Run a process and what it starts; end them all when the time is up. Shows what it says.

        Args:
            words: the command.
            limit_s: how long it may take.
        """
        paths = [*(str(ROOT / source) for source in SOURCES), str(self.folder)]
        paths = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *paths]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        sys.stderr.write(f"$ {' '.join(map(_short, words))}\n")
        lines: list[str] = []
        with subprocess.Popen(  # noqa: S603  # this interpreter, our own commands
            words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        ) as process:  # fmt: skip

            def follow() -> None:
                for line in process.stdout or ():
                    lines.append(line)
                    sys.stderr.write(line)

            follower = threading.Thread(target=follow, daemon=True)
            follower.start()
            timed_out = False
            try:
                process.wait(timeout=max(limit_s, _LEAST_S))
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            follower.join(timeout=_LEAST_S)
        return Done(process.returncode, "".join(lines), timed_out)

    def python(self, *words: str) -> list[str]:
        """This interpreter with these words."""
        return [sys.executable, *words]

    @property
    def limit_s(self) -> float:
        """What a phase may take, so that those after it have their time too."""
        return self.left_s - sum(_KEPT_S.get(name, 0.0) for name in self.waiting)

    # --- the phases ----------------------------------------------------------------------------

    def machine(self) -> Outcome:
        """What this is."""
        done = self.run(self.python("-m", "ddpm_bench.gpu_machine"), limit_s=60)
        lines = [line for line in done.text.splitlines() if line.startswith("{")]
        if done.code == 0 and lines:
            return Outcome("machine", "passed", found=json.loads(lines[-1]))
        return Outcome("machine", "failed", said=_last_words(done))

    def tests(self) -> Outcome:
        """Every file of tests that has some for a GPU."""
        files = sorted(
            str(path.relative_to(ROOT))
            for path in (ROOT / "tests").rglob("test_*.py")
            if "mark.gpu" in path.read_text()
        )
        return self._pytest("tests", [file for file in files if file not in PARITY])

    def parity(self) -> Outcome:
        """The device against the host."""
        return self._pytest("parity", list(PARITY))

    def sanitizer(self) -> Outcome:
        """Every kernel under compute-sanitizer."""
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            return Outcome("sanitizer", "not here", said=["compute-sanitizer is not on PATH"])
        said: list[str] = []
        for check, level in (("memcheck", "L0"), ("racecheck", "L0"), ("memcheck", "L1")):
            words = [tool, "--tool", check, "--error-exitcode", "9"]
            words += self.python("-m", "ddpm_bench.gpu_exercise", "--level", level)
            done = self.run(words, limit_s=min(60.0, self.limit_s))
            if done.timed_out:
                return Outcome("sanitizer", "timed out", said=[*said, f"{check} at {level}"])
            if done.code != 0:
                said.append(f"{check} at {level}: {' | '.join(_last_words(done))}")
                return Outcome("sanitizer", "failed", said=said)
            said.append(f"{check} at {level}: no error")
        return Outcome("sanitizer", "passed", said=said)

    def benchmark(self) -> Outcome:
        """The matrix, in what time is left."""
        report, page = self.folder / "gpu.json", self.folder / "gpu.md"
        budget_s = self.left_s - 15  # to start, and to write
        if budget_s < _LEAST_S:
            return Outcome("benchmark", "no time", said=[f"{self.left_s:.0f} s were left"])
        words = ["-m", "ddpm_bench.gpu_command", "gpu", "--budget-s", f"{budget_s:.0f}"]
        words += ["--json", str(report), "--markdown", str(page)]
        for flag in ("engine", "batch_size", "rounds"):
            for value in getattr(self.options, flag) or ():
                words += [f"--{flag.replace('_', '-')}", value]
        done = self.run(self.python(*words), limit_s=self.left_s)
        if not report.exists():
            return Outcome("benchmark", _how(done) or "failed", said=_last_words(done))
        found = {"report": json.loads(report.read_text())}
        cases, skipped = len(found["report"]["cases"]), len(found["report"]["skipped"])
        outcome = Outcome("benchmark", _how(done), said=[f"{cases} cases, {skipped} skipped"])
        outcome.found, outcome.page = found, page.read_text() if page.exists() else ""
        return outcome

    def _pytest(self, phase: str, files: list[str]) -> Outcome:
        """Tests marked ``gpu`` of some files; it fails if none of them ran."""
        limit_s = self.limit_s
        if limit_s < _LEAST_S:
            return Outcome(phase, "no time", said=[f"{self.left_s:.0f} s were left in all"])
        words = ["-m", "pytest", "-m", "gpu", "-vv", "-rsfE", "--tb=short", *files]
        if importlib.util.find_spec("pytest_timeout") is None:
            self._stand_in_for_pytest_timeout()
            words += ["-p", "no_pytest_timeout"]
        if self.options.select:
            words += ["-k", self.options.select]
        done = self.run(self.python(*words), limit_s=limit_s)
        counts = {
            word.lower(): len(re.findall(rf"^\S*::.* {word}\b", done.text, re.MULTILINE))
            for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")
        }
        reasons: Counter[str] = Counter()
        for many, why in re.findall(r"^SKIPPED \[(\d+)\] \S+: (.*)$", done.text, re.MULTILINE):
            reasons[why] += int(many)
        broken = re.findall(r"^(?:FAILED|ERROR) .*$", done.text, re.MULTILINE)
        outcome = _how(done)
        if outcome == "passed" and not counts["passed"]:
            outcome, broken = "failed", [NOTHING_RAN]
        if outcome == "failed" and not broken:
            broken = _last_words(done)
        skipped = [f"{many} skipped: {why}" for why, many in reasons.most_common()]
        return Outcome(phase, outcome, said=[*broken, *skipped], found=counts)

    def _stand_in_for_pytest_timeout(self) -> None:
        """pyproject.toml sets ``timeout``, which pytest refuses where nobody knows it."""
        plugin = "def pytest_addoption(parser):\n    parser.addini('timeout', 'not installed')\n"
        (self.folder / "no_pytest_timeout.py").write_text(plugin)


PHASES: dict[str, Callable[[Check], Outcome]] = {
    "machine": Check.machine,
    "tests": Check.tests,
    "parity": Check.parity,
    "sanitizer": Check.sanitizer,
    "benchmark": Check.benchmark,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the phases that were asked for; the exit code."""
    options = _parser().parse_args(arguments)
    for path in (options.json, options.markdown):
        path.parent.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        check = Check(options, Path(folder))
        while check.waiting:
            name = check.waiting.pop(0)
            began = time.monotonic()
            try:
                outcome = PHASES[name](check)
            except Exception as error:  # a broken phase must not take the others with it
                outcome = Outcome(name, "failed", said=[f"{type(error).__name__}: {error}"])
            outcome.seconds = round(time.monotonic() - began, 1)
            outcomes.append(outcome)
    failed = [one.name for one in outcomes if one.failed]
    _write(options, outcomes, failed)
    sys.stdout.write(_page(outcomes, failed))
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--budget-s", type=float, default=540.0, help="for all phases together [540]")
    add("--only", action="append", choices=list(PHASES), help="run this phase; repeatable")
    add("--json", type=Path, default=Path("out/gpu-check.json"), help="[out/gpu-check.json]")
    add("--markdown", type=Path, default=Path("out/gpu-check.md"), help="[out/gpu-check.md]")
    add("--select", help="only tests that pytest -k finds with this expression")
    add("--engine", action="append", help="benchmark this engine bundle; repeatable")
    add("--batch-size", action="append", help="benchmark this batch size; repeatable")
    add("--rounds", nargs=1, help="of the benchmark, at most")
    return parser


def _write(options: argparse.Namespace, outcomes: list[Outcome], failed: list[str]) -> None:
    """The JSON and the page."""
    report = {
        "report": "gpu-check",
        "report_version": 1,
        "passed": not failed,
        "failed": failed,
        "budget_s": options.budget_s,
        "phases": [
            {name: value for name, value in asdict(one).items() if name != "page"}
            for one in outcomes
        ],
    }
    options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    options.markdown.write_text(_page(outcomes, failed))


def _page(outcomes: list[Outcome], failed: list[str]) -> str:
    """Every phase in a row, what it said, and the benchmark's own page."""
    lines = ["# GPU check\n", "| phase | outcome | s | |", "|---|---|---:|---|"]
    for one in outcomes:
        counts = ", ".join(f"{n} {word}" for word, n in one.found.items() if isinstance(n, int))
        if one.name == "machine":
            counts = str(one.found.get("name", ""))
        lines.append(f"| {one.name} | {one.outcome} | {one.seconds:.1f} | {counts} |")
    lines.append("")
    for one in outcomes:
        lines += [f"- {one.name}: {said}" for said in one.said]
    lines.append(f"\n{'failed: ' + ', '.join(failed) if failed else 'all passed'}\n")
    lines += [one.page for one in outcomes if one.page]
    return "\n".join(lines)


def _how(done: Done) -> str:
    if done.timed_out:
        return "timed out"
    return "passed" if done.code == 0 else "failed"


def _last_words(done: Done) -> list[str]:
    """Its last lines; a process that was ended by a signal may have said nothing."""
    said = [line for line in done.text.strip().splitlines() if line.strip()][-3:]
    return said or [f"exit code {done.code}, and it said nothing"]


def _short(word: str) -> str:
    """Without the folders."""
    return Path(word).name if word.startswith("/") else word


if __name__ == "__main__":
    sys.exit(main())
