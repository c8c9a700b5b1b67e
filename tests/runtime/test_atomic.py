"""ddpm_runtime/atomic.py: a writer killed at any moment leaves the old or the new."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ddpm_runtime.atomic import atomic_directory, atomic_file

KILLS = 60


def test_the_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.bin"
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_file(path) as file:
        file.write(b"first")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "bundle"
    with atomic_directory(path) as directory:
        (directory / "a").write_text("1")
    with pytest.raises(RuntimeError), atomic_directory(path) as directory:
        (directory / "b").write_text("2")
        raise RuntimeError
    assert (path / "a").read_text() == "1"
    with atomic_directory(path) as directory:
        (directory / "b").write_text("2")
    assert [file.name for file in path.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [path]


def test_temporaries_of_dead_writers_are_swept_and_others_are_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".file.{dead.pid}-0.tmp").write_text("left by a dead writer")
    (tmp_path / f".file.{os.getppid()}-0.tmp").write_text("a living writer's")
    (tmp_path / f".other.{dead.pid}-0.tmp").write_text("of another file")
    with atomic_file(tmp_path / "file") as file:
        file.write(b"new")
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"file", f".file.{os.getppid()}-0.tmp", f".other.{dead.pid}-0.tmp"}


FILE_WRITER = """
import sys
from ddpm_runtime.atomic import atomic_file
size = 1 << 18
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        with atomic_file(sys.argv[1]) as file:
            for _ in range(16):
                file.write(letter * (size // 16))
"""

DIRECTORY_WRITER = """
import sys
from ddpm_runtime.atomic import atomic_directory
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        with atomic_directory(sys.argv[1]) as directory:
            for name in "xyz":
                (directory / name).write_bytes(letter * (1 << 16))
"""


def kill_at_a_random_moment(code: str, path, delay: float) -> None:
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    writer.stdout.readline()
    time.sleep(delay)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_killed_writers_leave_nothing_torn(tmp_path, kind):
    path = tmp_path / "artefact"
    code = FILE_WRITER if kind == "file" else DIRECTORY_WRITER
    delays = np.random.default_rng(0).uniform(0.0, 0.03, KILLS // 2)
    present = 0
    for delay in delays:
        kill_at_a_random_moment(code, path, delay)
        if not path.exists():
            continue
        present += 1
        files = [path] if kind == "file" else sorted(path.iterdir())
        assert len(files) == (1 if kind == "file" else 3)
        contents = [file.read_bytes() for file in files]
        assert {len(content) for content in contents} == {1 << (18 if kind == "file" else 16)}
        assert {byte for content in contents for byte in content} in ({97}, {98})
    assert present > len(delays) / 2
    # the next writer sweeps what the killed ones left
    if kind == "file":
        with atomic_file(path) as file:
            file.write(b"x")
    else:
        with atomic_directory(path) as directory:
            (directory / "x").write_text("x")
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"), atomic_file(path) as file:
            file.write(b"n" * (1 << 20))
            file.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error_and_stays_missing(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "no" / "file") as file:
        file.write(b"x")
    assert not list(tmp_path.iterdir())
