"""runtime/ddpm_runtime/plans/cache.py"""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from plan_worlds import key_for

from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.plans import PlanCache, PlanError, PlanKey, default_cache_directory
from ddpm_runtime.plans import cache as cache_module
from ddpm_runtime.plans.sealed import write_sealed

PLAN = b"a plan" * 100


@pytest.fixture
def cache(tmp_path):
    return PlanCache(tmp_path / "plans")


def build(cache, key, payload=PLAN, label="tiny", **options):
    """Ask for a plan; return it and what was said."""
    said: list[str] = []
    found = cache.get_or_build(key, lambda: payload, label=label, notice=said.append, **options)
    return found, said


def never():
    raise AssertionError("built although it was there")


def test_the_second_time_a_plan_is_found(cache):
    first, said = build(cache, key_for())
    assert first.built
    assert said == ["building a plan for tiny: there is none for this network yet"]
    again = PlanCache(cache.directory).get_or_build(key_for(), never, label="tiny")
    assert (again.payload, again.built) == (PLAN, False)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(PlanKey)])
def test_each_part_of_the_key_that_changes_builds_again_and_is_named(cache, field):
    key = key_for()
    build(cache, key)
    changed = dataclasses.replace(key, **{field: "other"})
    found, (said,) = build(cache, changed, payload=b"another")
    assert found.payload == b"another"
    assert found.reason in said
    assert "something changed since the last one was built" in said
    old, new = getattr(key, field)[:8], "other"
    assert old in said
    assert f"→ {new}" in said
    assert build(cache, key)[0].payload == PLAN  # the first one is still there


def test_the_reason_is_taken_from_the_entry_most_like_it(cache):
    key = key_for()
    build(cache, dataclasses.replace(key, gpu="a", cuda="b", precision="c"))
    build(cache, dataclasses.replace(key, library_version="9.9"))
    found, _ = build(cache, key)
    assert found.reason.endswith("(the library's version: 9.9 → 10.13)")


def test_another_networks_plans_are_no_reason(cache):
    build(cache, key_for(b"one network"), label="one")
    assert build(cache, key_for(b"another"), label="two")[0].reason == (
        "there is none for this network yet"
    )


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "foreign", "swapped"])
def test_an_entry_that_cannot_be_used_is_built_again_with_the_reason(cache, tmp_path, damage):
    key = key_for()
    build(cache, key)
    (path,) = cache.directory.glob("*.plan")
    whole = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "truncated":
        path.write_bytes(whole[:-10])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        write_sealed(path, b"evil", kind="plan", label="tiny", key=key, secret=bytes(32))
    else:  # a good entry of ours under another's name
        other = dataclasses.replace(key, precision="fp16")
        write_sealed(path, b"x", kind="plan", label="tiny", key=other, secret=cache.secret)
    found, (said,) = build(cache, key, payload=b"fresh")
    assert found.built
    assert "the one in the cache cannot be used" in said
    assert build(cache, key)[0].payload == b"fresh"


def test_a_build_that_fails_leaves_nothing(cache):
    with pytest.raises(PlanError):
        cache.get_or_build(key_for(), lambda: (_ for _ in ()).throw(PlanError("no")), label="tiny")
    assert not list(cache.directory.glob("*.plan"))
    assert build(cache, key_for())[0].built


def test_a_full_disk_costs_the_entry_and_not_the_plan(cache, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "write_sealed", full)
    found, said = build(cache, key_for())
    assert found.payload == PLAN
    assert "No space left on device" in said[-1]
    assert "DDPM_PLAN_CACHE" in said[-1]


def test_the_directory_is_made_for_its_user_alone(cache):
    assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o700


def test_a_directory_that_others_may_write_in_is_refused(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ConfigurationError, match="chmod 700"):
        PlanCache(shared)


def test_a_link_to_a_directory_is_refused(tmp_path):
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(ConfigurationError, match="not a directory of this user alone"):
        PlanCache(tmp_path / "link")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("DDPM_PLAN_CACHE", str(tmp_path / "a"))
    assert default_cache_directory() == tmp_path / "a"
    monkeypatch.delenv("DDPM_PLAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert default_cache_directory() == tmp_path / "b" / "ddpm-engine" / "plans"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_directory() == tmp_path / ".cache" / "ddpm-engine" / "plans"


def test_other_things_are_kept_beside_plans(cache):
    key = key_for()
    assert cache.get(key, "timing") is None
    cache.put(key, "timing", b"timings", label="tiny")
    assert cache.get(key, "timing") == b"timings"
    assert cache.get(key, "kernels") is None
    (path,) = cache.directory.glob("*.timing")
    path.rename(path.with_suffix(".plan"))  # a timing cache is no plan
    assert "made for something else" in build(cache, key)[0].reason


def test_prune_removes_what_was_used_longest_ago(cache):
    keys = [key_for(name) for name in (b"a", b"b", b"c")]
    for age, key in enumerate(keys):
        build(cache, key, payload=bytes(1000))
        (path,) = cache.directory.glob(f"{key.identity}.plan")
        os.utime(path, (1000 + age, 1000 + age))
    build(cache, keys[0])  # used just now
    assert len(cache.prune(keep_bytes=4000)) == 1
    assert [build(cache, key)[0].built for key in (keys[0], keys[2], keys[1])] == [
        False, False, True,
    ]  # fmt: skip


# --- several processes ---------------------------------------------------------------------------

BUILDER = """
import os, sys, time
from pathlib import Path
from ddpm_runtime.plans import PlanCache
from plan_worlds import key_for

directory, mark, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def build():
    with mark.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(seconds)
    return b"built by somebody" * 200_000

found = PlanCache(directory).get_or_build(
    key_for(), build, label="tiny", notice=lambda message: print(message, flush=True))
print(found.reason, len(found.payload), flush=True)
"""


def start_builder(cache, mark, seconds):
    paths = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(cache.directory), str(mark), str(seconds)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def test_of_two_processes_one_builds_and_the_other_waits_and_reads(cache, tmp_path):
    mark = tmp_path / "builders"
    first = start_builder(cache, mark, 1.0)
    wait_for(mark.exists)
    second = start_builder(cache, mark, 1.0)
    told = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert len(mark.read_text().split()) == 1
    assert "there is none for this network yet 3400000" in told[0]
    assert f"waiting for process {first.pid}" in told[1]
    assert "another process built it 3400000" in told[1]


def test_a_builder_that_takes_too_long_is_named(cache, tmp_path):
    mark = tmp_path / "builders"
    with start_builder(cache, mark, 30.0) as slow:
        try:
            wait_for(mark.exists)
            with pytest.raises(PlanError, match=rf"process {slow.pid} .*kill {slow.pid}"):
                build(cache, key_for(), timeout_s=0.3)
        finally:
            slow.kill()


def test_a_builder_that_is_killed_gives_up_its_lock(cache, tmp_path):
    mark = tmp_path / "builders"
    with start_builder(cache, mark, 30.0) as process:
        wait_for(mark.exists)
        process.kill()
    found, _ = build(cache, key_for(), timeout_s=5.0)
    assert found.built


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from ddpm_runtime import atomic
from ddpm_runtime.plans import PlanCache
from plan_worlds import key_for

real, calls = os.replace, []
def replace(source, destination):
    if str(destination).endswith(".plan"):
        os.kill(os.getpid(), signal.SIGKILL)   # written and flushed, not yet in its place
    real(source, destination)
atomic.os.replace = replace
PlanCache(Path(sys.argv[1])).get_or_build(key_for(), lambda: b"half a plan", label="tiny")
"""


def test_a_process_killed_while_writing_leaves_no_plan_and_its_temporary_is_swept(cache):
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(cache.directory)],
        env={**os.environ, "PYTHONPATH": paths}, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert not list(cache.directory.glob("*.plan"))
    assert list(cache.directory.glob(".*.tmp"))
    found, (said,) = build(cache, key_for())
    assert found.built
    assert "there is none" in said
    assert not list(cache.directory.glob(".*.tmp"))
    assert build(cache, key_for())[0].payload == PLAN
