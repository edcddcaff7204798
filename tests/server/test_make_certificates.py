from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography import x509

from server.make_certificates import make_certificates


def test_keys_are_private_and_the_certificate_is_for_the_hosts(tmp_path: Path) -> None:
    make_certificates(tmp_path / "keys", ["lab.example", "10.0.0.7"], nodes=2, days=3)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (tmp_path / "keys").iterdir()}
    assert {name for name, others in modes.items() if not others} == {"server.key", "node-0", "node-1"}
    assert modes.keys() - {"server.key", "node-0", "node-1"} == {"ca.crt", "server.pem", "node-0.pub", "node-1.pub"}
    ca, leaf = (
        x509.load_pem_x509_certificate((tmp_path / "keys" / name).read_bytes()) for name in ("ca.crt", "server.pem")
    )
    leaf.verify_directly_issued_by(ca)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["lab.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("mine")
    with pytest.raises(FileExistsError, match="files in it"):
        make_certificates(tmp_path, ["localhost"], nodes=1, days=1)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
