import hashlib
import ipaddress
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from glora_server.rounds.ids import DeviceId
from glora_server.security.authority import FileAuthority
from glora_wire.errors import GloraError, Reason

DEVICE = DeviceId("dev123")
START = datetime(2030, 1, 1, tzinfo=UTC).timestamp()
PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey | dsa.DSAPrivateKey


class Clock:
    def __init__(self) -> None:
        self.at = START

    def __call__(self) -> float:
        return self.at


def request_pem(key: PrivateKey, subject: str = "whatever", *, asks_for_ca: bool = False) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    )
    if asks_for_ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(Encoding.PEM).decode()


@pytest.fixture
def authority(tmp_path: Path) -> FileAuthority:
    return FileAuthority.open(tmp_path / "authority", now=Clock())


def ca_of(authority: FileAuthority) -> x509.Certificate:
    return x509.load_pem_x509_certificate(authority.certificate_pem.encode())


def leaf_of(authority: FileAuthority) -> x509.Certificate:
    return x509.load_pem_x509_certificates(authority.server_chain_pem)[0]


def test_ca_may_sign_leaves_only_for_twenty_years(authority: FileAuthority) -> None:
    ca = ca_of(authority)
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert basic.critical
    assert basic.value.ca
    assert basic.value.path_length == 0
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature
    assert ca.not_valid_after_utc.timestamp() - START == pytest.approx(20 * 365 * 86400)
    ca.verify_directly_issued_by(ca)


def test_pin_is_the_sha256_of_the_ca_that_ends_the_chain(authority: FileAuthority) -> None:
    chain = x509.load_pem_x509_certificates(authority.server_chain_pem)
    assert len(chain) == 2
    assert hashlib.sha256(chain[1].public_bytes(Encoding.DER)).hexdigest() == authority.pin
    chain[0].verify_directly_issued_by(chain[1])


def test_files_are_closed_to_others(tmp_path: Path) -> None:
    folder = tmp_path / "authority"
    FileAuthority.open(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {file.name for file in folder.iterdir()} == {"ca.pem", "server.pem"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


def test_second_start_finds_the_same_certificates(tmp_path: Path) -> None:
    first = FileAuthority.open(tmp_path, ["a.example"])
    second = FileAuthority.open(tmp_path, ["a.example"])
    assert second.pin == first.pin
    assert second.server_chain_pem == first.server_chain_pem
    assert second.server_key_pem == first.server_key_pem


def test_server_certificate_has_local_and_public_names(tmp_path: Path) -> None:
    authority = FileAuthority.open(tmp_path, ["glora.example.org", "203.0.113.7", "2001:db8::1"])
    leaf = leaf_of(authority)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"localhost", "glora.example.org"} <= set(names.get_values_for_type(x509.DNSName))
    assert {str(address) for address in names.get_values_for_type(x509.IPAddress)} == {
        "127.0.0.1",
        "::1",
        "203.0.113.7",
        "2001:db8::1",
    }
    assert ipaddress.ip_address("203.0.113.7") in names.get_values_for_type(x509.IPAddress)
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_changed_names_renew_the_server_certificate_and_keep_the_ca(tmp_path: Path) -> None:
    first = FileAuthority.open(tmp_path, ["a.example"])
    second = FileAuthority.open(tmp_path, ["b.example"])
    assert second.pin == first.pin
    names = leaf_of(second).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "b.example" in names.get_values_for_type(x509.DNSName)
    assert "a.example" not in names.get_values_for_type(x509.DNSName)


def test_a_running_server_renews_its_certificate_near_its_end_only(tmp_path: Path) -> None:
    clock = Clock()
    authority = FileAuthority.open(tmp_path, now=clock)
    first = authority.server_chain_pem
    clock.at += timedelta(days=500).total_seconds()
    assert not authority.renew_server()
    assert authority.server_chain_pem == first
    clock.at += timedelta(days=100).total_seconds()
    assert authority.renew_server()
    assert authority.server_chain_pem != first
    assert FileAuthority.open(tmp_path, now=clock).server_chain_pem == authority.server_chain_pem
    assert not authority.renew_server()


def test_server_certificate_is_renewed_near_its_end_only(tmp_path: Path) -> None:
    clock = Clock()
    first = FileAuthority.open(tmp_path, now=clock)
    clock.at += timedelta(days=500).total_seconds()
    assert FileAuthority.open(tmp_path, now=clock).server_chain_pem == first.server_chain_pem
    clock.at += timedelta(days=100).total_seconds()
    renewed = FileAuthority.open(tmp_path, now=clock)
    assert renewed.server_expires_at > first.server_expires_at
    assert renewed.pin == first.pin


def test_server_certificate_of_another_ca_is_replaced(tmp_path: Path) -> None:
    first = FileAuthority.open(tmp_path)
    (tmp_path / "ca.pem").unlink()
    second = FileAuthority.open(tmp_path)
    assert second.pin != first.pin
    leaf_of(second).verify_directly_issued_by(ca_of(second))


def test_bad_public_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GloraError, match=r"grpc\.public_names or http\.public_names.*https://x") as caught:
        FileAuthority.open(tmp_path, ["https://x"])
    assert caught.value.reason is Reason.SETTINGS_INVALID


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["p256", "p384", "rsa2048"],
)
def test_device_certificate_says_what_the_server_decided(authority: FileAuthority, key: PrivateKey) -> None:
    request = request_pem(key, subject="admin", asks_for_ca=True)
    issued = authority.issue(request, DEVICE, "pi-7")
    certificate = x509.load_pem_x509_certificate(issued.pem.encode())
    certificate.verify_directly_issued_by(ca_of(authority))
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == DEVICE
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == [f"glora://device/{DEVICE}"]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert issued.expires_at - START == pytest.approx(90 * 86400)
    assert certificate.not_valid_after_utc.timestamp() == issued.expires_at
    assert int(issued.serial, 16) == certificate.serial_number
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == public
    expected = hashlib.sha256(public).hexdigest()
    assert authority.key_of(request) == expected
    assert authority.key_of_certificate(issued.pem.encode()) == expected


def test_serials_differ_and_lifetime_is_a_setting(tmp_path: Path) -> None:
    authority = FileAuthority.open(tmp_path, device_lifetime=timedelta(hours=1), now=Clock())
    request = request_pem(ec.generate_private_key(ec.SECP256R1()))
    one, two = authority.issue(request, DEVICE, "a"), authority.issue(request, DEVICE, "a")
    assert one.serial != two.serial
    assert one.expires_at == START + 3600
    assert authority.renewal_overdue_seconds < 3600 / 3, "a device that renews in time is not overdue"


def test_no_certificate_outlives_the_ca(tmp_path: Path) -> None:
    clock = Clock()
    FileAuthority.open(tmp_path, now=clock)
    clock.at += timedelta(days=20 * 365 - 10).total_seconds()
    authority = FileAuthority.open(tmp_path, now=clock)
    issued = authority.issue(request_pem(ec.generate_private_key(ec.SECP256R1())), DEVICE, "")
    assert issued.expires_at == ca_of(authority).not_valid_after_utc.timestamp()


def test_ended_ca_is_a_sentence(tmp_path: Path) -> None:
    clock = Clock()
    FileAuthority.open(tmp_path, now=clock)
    clock.at += timedelta(days=20 * 365 + 1).total_seconds()
    with pytest.raises(GloraError, match="join again") as caught:
        FileAuthority.open(tmp_path, now=clock)
    assert caught.value.reason is Reason.DATA_DIR_UNUSABLE


def tampered_request() -> str:
    """A request whose key was exchanged after signing."""
    request = x509.load_pem_x509_csr(request_pem(ec.generate_private_key(ec.SECP256R1())).encode())
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    spki = request.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    forged = other.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    der = request.public_bytes(Encoding.DER).replace(spki, forged)
    return x509.load_der_x509_csr(der).public_bytes(Encoding.PEM).decode()


@pytest.mark.parametrize(
    ("request_text", "says"),
    [
        ("", "PEM"),
        ("hello", "PEM"),
        ("x" * 20_000, "longer"),
        (request_pem(ec.generate_private_key(ec.SECP521R1())), "secp521r1"),
        (request_pem(rsa.generate_private_key(65537, 1024)), "1024"),
        (request_pem(dsa.generate_private_key(1024)), "kind"),
        (request_pem(ed25519.Ed25519PrivateKey.generate()), "Ed25519"),
        (tampered_request(), "signature"),
    ],
    ids=["empty", "text", "long", "curve", "short-rsa", "dsa", "ed25519", "tampered"],
)
def test_unusable_requests_are_refused(authority: FileAuthority, request_text: str, says: str) -> None:
    for use in (authority.key_of, lambda text: authority.issue(text, DEVICE, "x")):
        with pytest.raises(GloraError, match=says) as caught:
            use(request_text)
        assert caught.value.reason is Reason.CSR_INVALID


def test_unknown_bytes_are_no_certificate(authority: FileAuthority) -> None:
    with pytest.raises(GloraError) as caught:
        authority.key_of_certificate(b"nonsense")
    assert caught.value.reason is Reason.CERTIFICATE_UNKNOWN


@pytest.mark.parametrize("name", ["ca.pem", "server.pem"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    FileAuthority.open(tmp_path)
    (tmp_path / name).write_bytes(b"-----BEGIN nothing")
    with pytest.raises(GloraError, match=f"{name} is damaged") as caught:
        FileAuthority.open(tmp_path)
    assert caught.value.reason is Reason.DATA_DIR_UNUSABLE


def test_key_and_certificate_that_do_not_match_are_refused(tmp_path: Path) -> None:
    authority = FileAuthority.open(tmp_path)
    key = ec.generate_private_key(ec.SECP256R1())
    other = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "ca.pem").write_bytes(other + authority.certificate_pem.encode())
    with pytest.raises(GloraError, match="do not belong together"):
        FileAuthority.open(tmp_path)


def test_open_key_file_is_refused(tmp_path: Path) -> None:
    FileAuthority.open(tmp_path)
    (tmp_path / "ca.pem").chmod(0o644)
    with pytest.raises(GloraError, match="chmod 600") as caught:
        FileAuthority.open(tmp_path)
    assert caught.value.reason is Reason.DATA_DIR_UNUSABLE


def test_unwritable_place_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GloraError, match="data folder") as caught:
        FileAuthority.open(tmp_path / "file" / "authority")
    assert caught.value.reason is Reason.DATA_DIR_UNUSABLE
