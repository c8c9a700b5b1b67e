"""runtime/ddpm_runtime/plans/sealed.py"""

from __future__ import annotations

import os
import stat

import pytest
from plan_worlds import key_for

from ddpm_runtime.errors import ConfigurationError, DamagedPlanError, UntrustedPlanError
from ddpm_runtime.plans.sealed import read_header, read_sealed, user_secret, write_sealed

SECRET = bytes(range(32))
PAYLOAD = bytes(range(256))


@pytest.fixture
def plan_path(tmp_path):
    path = tmp_path / "one.plan"
    write_sealed(path, PAYLOAD, kind="plan", label="tiny", key=key_for(), secret=SECRET)
    return path


def load(path, secret=SECRET):
    return read_sealed(path, secret, lambda header: header.require_ours())[1]


def test_what_was_written_is_read_back(plan_path):
    assert load(plan_path) == PAYLOAD
    header = read_header(plan_path, SECRET)
    assert (header.kind, header.label, header.key) == ("plan", "tiny", key_for())
    assert stat.S_IMODE(plan_path.stat().st_mode) == 0o600


def test_a_file_cut_anywhere_is_refused(plan_path):
    whole = plan_path.read_bytes()
    for length in range(len(whole)):
        plan_path.write_bytes(whole[:length])
        with pytest.raises((DamagedPlanError, UntrustedPlanError)):
            load(plan_path)


def test_a_file_with_any_byte_changed_is_refused(plan_path):
    whole = plan_path.read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << (position % 8)
        plan_path.write_bytes(changed)
        with pytest.raises((DamagedPlanError, UntrustedPlanError)):
            load(plan_path)


def test_bytes_after_the_end_are_refused(plan_path):
    plan_path.write_bytes(plan_path.read_bytes() + b"more")
    with pytest.raises(
        DamagedPlanError, match=r"holds 260 bytes .* says 256\. Build the plan again"
    ):
        load(plan_path)


def test_a_plan_sealed_by_somebody_else_is_refused_with_the_remedy(plan_path):
    with pytest.raises(UntrustedPlanError, match="--trust-plan"):
        load(plan_path, secret=bytes(32))


def test_a_bare_plan_is_refused(tmp_path):
    path = tmp_path / "bare.plan"
    path.write_bytes(b"ftrt" + bytes(1000))
    with pytest.raises(DamagedPlanError, match="does not say what it was built for"):
        load(path)


def test_links_directories_and_pipes_are_refused(plan_path, tmp_path):
    link, pipe = tmp_path / "link.plan", tmp_path / "pipe.plan"
    link.symlink_to(plan_path)
    os.mkfifo(pipe)
    for path in (link, pipe, tmp_path):
        with pytest.raises(DamagedPlanError, match="not a regular file"):
            load(path)


def test_a_secret_is_made_once_and_is_its_users_alone(tmp_path):
    secret = user_secret(tmp_path)
    assert len(secret) == 32
    assert user_secret(tmp_path) == secret
    assert stat.S_IMODE((tmp_path / "seal.secret").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["seal.secret"]


@pytest.mark.parametrize("spoil", ["readable", "short"])
def test_a_secret_that_others_may_know_is_refused(tmp_path, spoil):
    user_secret(tmp_path)
    path = tmp_path / "seal.secret"
    if spoil == "readable":
        path.chmod(0o644)
    else:
        path.write_bytes(b"short")
    with pytest.raises(ConfigurationError, match="Remove the directory"):
        user_secret(tmp_path)
