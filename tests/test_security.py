"""Keys, key files, and who may connect."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from labkit.errors import LabkitError
from labkit.wire.security import Admission, Identity, answer_zap, key_text, parse_key, read_key_list, write_key_list


def test_a_key_file_belongs_to_its_owner_alone_and_gives_the_same_identity(tmp_path: Path) -> None:
    identity = Identity.generate()
    identity.save(tmp_path / "key")
    assert stat.S_IMODE(os.stat(tmp_path / "key").st_mode) == 0o600
    assert Identity.load(tmp_path / "key").public_key == identity.public_key


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    Identity.generate().save(tmp_path / "key")
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(LabkitError, match="chmod 600"):
        Identity.load(tmp_path / "key")


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    Identity.generate().save(tmp_path / "key")
    with pytest.raises(LabkitError, match="never overwritten"):
        Identity.generate().save(tmp_path / "key")


@pytest.mark.parametrize("content", ["", "labkit-key-1 abcd", "ssh-ed25519 AAAA", "labkit-key-1 " + "z" * 64])
def test_a_file_that_is_no_key_says_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(LabkitError, match="cannot be used"):
        Identity.load(tmp_path / "key")


def test_a_missing_key_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(LabkitError, match="labkit keygen"):
        Identity.load(tmp_path / "none")


def test_an_identity_does_not_print_its_secret() -> None:
    identity = Identity.generate()
    assert identity.seed.hex() not in repr(identity) and str(identity.seed) not in repr(identity)


def test_keys_for_different_purposes_differ() -> None:
    identity = Identity.generate()
    assert len({identity.seed, identity.secret_key, identity.derive(b"signing"), identity.public_key}) == 4


def test_a_public_key_survives_as_text() -> None:
    key = Identity.generate().public_key
    assert parse_key(key_text(key)) == key
    with pytest.raises(ValueError, match="not a public key"):
        parse_key("hello")


def test_a_list_of_members_is_read_again_when_it_changes(tmp_path: Path) -> None:
    one, other = Identity.generate().public_key, Identity.generate().public_key
    write_key_list(tmp_path / "members", [one])
    admission = Admission(file=tmp_path / "members")
    assert admission.admits(one) and not admission.admits(other)
    write_key_list(tmp_path / "members", [one, other])
    assert admission.admits(other)
    assert read_key_list(tmp_path / "members") == {one, other}


def test_a_list_of_members_that_is_gone_or_damaged_admits_nobody(tmp_path: Path) -> None:
    key = Identity.generate().public_key
    assert not Admission(file=tmp_path / "none").admits(key)
    (tmp_path / "members").write_text("not a key\n")
    assert not Admission(file=tmp_path / "members").admits(key)


def zap(domain: bytes = b"here", mechanism: bytes = b"CURVE", key: bytes = b"k" * 32) -> list[bytes]:
    return [b"route", b"", b"1.0", b"1", domain, b"127.0.0.1", b"", mechanism, key]


def test_zap_answers_with_the_key_and_the_address_as_user_id_and_refuses_the_rest() -> None:
    admissions = {b"here": Admission([b"k" * 32])}
    admitted = answer_zap(zap(), admissions)
    assert admitted == [b"route", b"", b"1.0", b"1", b"200", b"OK", (b"k" * 32).hex().encode() + b"127.0.0.1", b""]
    for request in (zap(domain=b"elsewhere"), zap(mechanism=b"NULL"), zap(key=b"x" * 32)):
        refused = answer_zap(request, admissions)
        assert refused is not None and refused[4] == b"400"
    assert answer_zap([b"noise"], admissions) is None
