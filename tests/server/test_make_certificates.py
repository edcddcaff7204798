from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedpeft.errors import ConfigError, FederationError
from server.make_certificates import add_node, certificate, certificates, days_left, hosts_of, make_certificates, renew

PRIVATE = {"ca.key", "server.key", "node-0", "node-1"}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_certificates(tmp_path / "keys", ["lab.example", "10.0.0.7"], nodes=2, days=3)
    return tmp_path / "keys"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_keys_are_private_and_the_certificate_is_for_the_hosts_and_the_own_machine(keys: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) & 0o077 for path in keys.iterdir()}
    assert {name for name, others in modes.items() if not others} == PRIVATE
    assert modes.keys() - PRIVATE == {"ca.crt", "server.pem", "node-0.pub", "node-1.pub"}
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    leaf = certificate(keys / "server.pem")
    leaf.verify_directly_issued_by(certificate(keys / "ca.crt"))
    assert hosts_of(leaf) == ["lab.example", "localhost", "10.0.0.7", "127.0.0.1"]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert len(names.get_values_for_type(x509.IPAddress)) == 2


def test_a_nodes_two_halves_belong_together_and_are_of_the_curve_that_flower_takes(keys: Path) -> None:
    private = load_ssh_private_key((keys / "node-1").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    assert load_ssh_public_key((keys / "node-1.pub").read_bytes()) == private.public_key()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("mine")
    with pytest.raises(ConfigError, match="found files in it"):
        make_certificates(tmp_path, ["localhost"], nodes=1, days=1)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_one_more_node_changes_nothing_else(keys: Path) -> None:
    before = contents(keys)
    add_node(keys, "site-berlin")
    after = contents(keys)
    assert after.keys() - before.keys() == {"site-berlin", "site-berlin.pub"}
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("missing", ["node-1", "node-1.pub", ""])
def test_half_a_key_is_not_overwritten(keys: Path, missing: str) -> None:
    if missing:
        (keys / missing).unlink()
    before = contents(keys)
    with pytest.raises(ConfigError, match="found a key of node-1"):
        add_node(keys, "node-1")
    assert contents(keys) == before


@pytest.mark.parametrize("name", ["server.key", "../x", "a/b", "", ".ssh", "N", "x.pub"])
def test_a_name_that_is_no_nodes_is_refused(keys: Path, name: str) -> None:
    before = contents(keys)
    with pytest.raises(ConfigError, match="name the node otherwise"):
        add_node(keys, name)
    assert contents(keys) == before


def test_the_renewed_certificate_is_another_of_the_same_authority_for_the_same_hosts(keys: Path) -> None:
    before, old = contents(keys), certificate(keys / "server.pem")
    renew(keys, [], days=30)
    after, new = contents(keys), certificate(keys / "server.pem")
    assert {name for name in after if after[name] != before[name]} == {"server.key", "server.pem"}
    new.verify_directly_issued_by(certificate(keys / "ca.crt"))
    assert set(hosts_of(new)) == set(hosts_of(old))
    assert days_left(old) < 4 < 29 < days_left(new)
    assert stat.S_IMODE((keys / "server.key").stat().st_mode) == 0o600


def test_renewal_needs_the_authoritys_own_key(keys: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path / "other", ["localhost"], nodes=0, days=1)
    (keys / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    before = contents(keys)
    with pytest.raises(ConfigError, match=r"expected the key of ca\.crt, found another"):
        renew(keys, [], days=30)
    (keys / "ca.key").unlink()
    with pytest.raises(ConfigError, match="found none to read"):
        renew(keys, [], days=30)
    assert {name: data for name, data in before.items() if name != "ca.key"} == contents(keys)


@pytest.mark.parametrize("host", ["https://lab.example", "lab.example:9092", "a b", "", "x" * 65, "fé"])
def test_a_host_that_is_none_is_refused_before_anything_is_written(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="expected a name or an address"):
        make_certificates(tmp_path / "keys", [host], nodes=1, days=1)
    assert not (tmp_path / "keys").exists()


def test_show_tells_what_expires_and_fails_where_that_is_soon(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (keys / "node-0").unlink()
    with pytest.raises(FederationError, match=r"server.pem: expected 14 days or more, found fewer"):
        certificates(keys, None, 2, 90, None, False, True)
    printed = capsys.readouterr().out
    assert "server.pem: valid until" in printed
    assert "node-0: a node's key, whose private half is elsewhere\nnode-1: a node's key\n" in printed
    renew(keys, [], days=30)
    certificates(keys, None, 2, 90, None, False, True)


def test_two_wishes_at_once_are_refused(keys: Path) -> None:
    before = contents(keys)
    with pytest.raises(ConfigError, match="expected one of --add, --renew, --show"):
        certificates(keys, None, 2, 90, ["node-5"], True, False)
    assert contents(keys) == before
