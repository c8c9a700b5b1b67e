"""Break the samplers in every small way, and count which breaks the tests notice.

    python tests/mutation.py --minutes 10 --jobs 2 [--seed 0] [--only unipc.py]

A mutant is one change to one file of ``ddpm_runtime`` (samplers/*.py, trajectory.py, schedule.py,
spacing.py): a constant moved, an operator or comparison exchanged, a sign or condition turned over,
an index shifted, a raise left out. Each runs in a forked process against its own copy of the
package, first the tests nearest to the file, then all fast tests of tests/samplers; the first
failure kills it. Survivors are printed with their line, for a person to judge: a test is missing,
or the mutant does what the original does.

What survives rightly does what the original does: a limit that was refused before it is reached, an
index into a single register, a term of a series below rounding, how many near names are looked for
when one is told.

Not mutated: text, annotations, ``__all__``, and the tables of names (their numbers are opinions).
The unchanged package is run first and must survive. Not part of ``make test``: it takes minutes to
hours.
"""

from __future__ import annotations

import argparse
import ast
import copy
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "runtime" / "ddpm_runtime"
TESTS = ROOT / "tests" / "samplers"
TIMEOUT_SECONDS = 400  # a mutant may loop for ever

# what to run first for a file; everything fast in tests/samplers comes after
NEAREST = {
    "schedule.py": ["test_schedules.py", "test_spacings.py"],
    "spacing.py": ["test_spacings.py", "test_schedules.py"],
    "trajectory.py": ["test_trajectories.py"],
    "__init__.py": ["test_registry.py"],
    "aliases.py": ["test_registry.py"],
    "options.py": ["test_registry.py"],
    "_rows.py": ["test_registry.py", "test_program_checks.py"],
}
SKIPPED_NAMES = {"__all__", "SAMPLERS", "ALIASES"}

_SWAPPED: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
}


# --- making mutants ---------------------------------------------------------------------------


def mutants(tree: ast.Module) -> Iterator[tuple[int, str, ast.Module]]:
    """Every mutant of a module: line, what was changed, the changed tree."""
    nodes = list(_code(tree))
    for index, node in enumerate(nodes):
        for description, change in _changes(node):
            mutated = copy.deepcopy(tree)
            twin = list(_code(mutated))[index]
            change(twin)
            yield getattr(node, "lineno", 0), description, ast.fix_missing_locations(mutated)


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes in order, without text, annotations, imports and tables of names."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr):
        return
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(t, ast.Name) and t.id in SKIPPED_NAMES for t in targets):
            return
    yield node
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "decorator_list", "type_params"}:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _code(child)


def _changes(node: ast.AST):
    if isinstance(node, ast.Constant):
        yield from _constant_changes(node)
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in _SWAPPED:
        new = _SWAPPED[type(node.op)]
        yield f"{type(node.op).__name__} → {new.__name__}", lambda n: setattr(n, "op", new())
    elif isinstance(node, ast.AugAssign) and type(node.op) in _SWAPPED:
        new = _SWAPPED[type(node.op)]
        yield f"{type(node.op).__name__}= → {new.__name__}=", lambda n: setattr(n, "op", new())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPPED:
        for at, old in enumerate(node.ops):
            new = _SWAPPED[type(old)]
            yield (
                f"{type(old).__name__} → {new.__name__}",
                lambda n, at=at, new=new: n.ops.__setitem__(at, new()),
            )
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        if isinstance(node.op, ast.USub):
            yield "−x → x", lambda n: setattr(n, "op", ast.UAdd())
        else:
            yield "not x → bool(x)", _drop_not
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "condition turned over", _turn_over
    elif isinstance(node, ast.Raise):
        yield "raise left out", _leave_out
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name):
        yield f"[{node.slice.id}] → [{node.slice.id} - 1]", _shift_index


def _constant_changes(node: ast.Constant):
    value = node.value
    if isinstance(value, bool):
        yield f"{value} → {not value}", lambda n: setattr(n, "value", not value)
    elif isinstance(value, int):
        for other in (value + 1, value - 1):
            yield f"{value} → {other}", lambda n, other=other: setattr(n, "value", other)
    elif isinstance(value, float):
        other = value * 1.01 if value else 0.01
        yield f"{value:g} → {other:g}", lambda n: setattr(n, "value", other)


def _drop_not(node):
    node.op = ast.Not()
    node.operand = ast.UnaryOp(op=ast.Not(), operand=node.operand)


def _turn_over(node):
    node.test = ast.UnaryOp(op=ast.Not(), operand=node.test)


def _leave_out(node):
    node.exc, node.cause = None, None
    node.__class__ = ast.Pass
    node._fields = ()


def _shift_index(node):
    node.slice = ast.BinOp(left=node.slice, op=ast.Sub(), right=ast.Constant(value=1))


# --- running them -----------------------------------------------------------------------------


def survives(source: str, file: str) -> bool:
    """Whether all tests pass with ``source`` in the place of ``file``. Runs in a child process."""
    import pytest

    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        twin = Path(folder) / "ddpm_runtime"
        shutil.copytree(PACKAGE, twin, ignore=shutil.ignore_patterns("__pycache__"))
        (twin / file).write_text(source, encoding="utf-8")
        sys.path.insert(0, folder)
        sys.dont_write_bytecode = True
        # plain asserts: hypothesis, imported before the fork, can no longer be rewritten
        quiet = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain"]
        for stage in _stages(file):
            code = pytest.main([*quiet, *stage])
            assert code in (0, 1, 2), "the tests of this stage cannot be run at all"
            if code:  # a failure, or a package that cannot even be imported
                return False
        import ddpm_runtime

        assert Path(ddpm_runtime.__file__).is_relative_to(folder)
        return True


def _stages(file: str) -> list[list[str]]:
    name = Path(file).name
    near = [str(TESTS / test) for test in NEAREST.get(name, [])]
    words = {
        "dpm_solver_multistep.py": "dpmpp_2m or dpmpp_3m",
        "dpm_solver_singlestep.py": "dpmpp_2s or dpmpp_3s or dpm_solver",
        "pndm.py": "ipndm or plms",
        "langevin.py": "langevin or predictor",
    }.get(name, Path(name).stem)
    if not near:
        near = [str(TESTS / "test_coefficients.py"), str(TESTS / "test_registry.py"), "-k", words]
    fast = [str(TESTS / f"test_{t}.py") for t in ("registry", "trajectories", "schedules",
            "spacings", "program_checks", "coefficients")]  # fmt: skip
    return [near, fast, [str(TESTS), "-m", "not slow"]]


def _child(source: str, file: str) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    os.chdir(ROOT)
    os._exit(10 if survives(source, file) else 20)


def run(
    jobs: list[tuple[str, int, str, str]],
    minutes: float,
    parallel: int,
    timeout_seconds: float = TIMEOUT_SECONDS,
):
    """Run mutants until the time is up; yield (file, line, description, outcome)."""
    context = multiprocessing.get_context("fork")
    deadline = time.monotonic() + 60 * minutes
    waiting, running = list(reversed(jobs)), []
    while running or (waiting and time.monotonic() < deadline):
        while waiting and len(running) < parallel and time.monotonic() < deadline:
            file, line, description, source = waiting.pop()
            process = context.Process(target=_child, args=(source, file))
            process.start()
            running.append((process, time.monotonic(), file, line, description))
        time.sleep(0.02)
        for entry in list(running):
            process, started, file, line, description = entry
            if process.is_alive() and time.monotonic() - started < timeout_seconds:
                continue
            outcome = {10: "survived", 20: "killed"}.get(process.exitcode, "broke the tester")
            if process.is_alive():
                process.kill()
                outcome = "timed out"
            process.join()
            running.remove(entry)
            yield file, line, description, outcome


def collect(only: str | None) -> list[tuple[str, int, str, str]]:
    """Every mutant there is."""
    files = ["schedule.py", "spacing.py", "trajectory.py"]
    files += [f"samplers/{path.name}" for path in sorted((PACKAGE / "samplers").glob("*.py"))]
    # written and tested with the conditions, in tests/runtime
    files = [f for f in files if Path(f).name not in {"repaint.py", "inversion.py"}]
    found = []
    for file in files:
        if only and only not in file:
            continue
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        original = ast.unparse(tree)
        for line, description, mutated in mutants(tree):
            source = ast.unparse(mutated)
            if source != original:
                found.append((file, line, description, source))
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="part of a file name")
    arguments = parser.parse_args()

    everything = collect(arguments.only)
    random.Random(arguments.seed).shuffle(everything)
    # what every child needs, imported once before forking
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import scipy.integrate
    import scipy.stats  # noqa: F401
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "tests"))

    file = everything[0][0]
    original = (file, 0, "nothing changed", (PACKAGE / file).read_text(encoding="utf-8"))
    ((*_, outcome),) = run([original], 10.0, 1, timeout_seconds=900.0)
    if outcome != "survived":
        print(f"The tests fail before anything is changed ({outcome}); nothing can be measured.")
        return 1

    counts: dict[str, int] = {}
    survivors = []
    for file, line, description, outcome in run(everything, arguments.minutes, arguments.jobs):
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome == "survived":
            survivors.append(f"{file}:{line}  {description}")
            print("survived", survivors[-1], flush=True)
    tried = sum(counts.values())
    killed = counts.get("killed", 0) + counts.get("timed out", 0)
    print(
        f"{killed} of {tried} mutants killed ({100 * killed / max(tried, 1):.1f} %), "
        f"{len(everything)} exist; {counts}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
