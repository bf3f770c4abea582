"""Keys and certificates of a deployment: an authority of its own, the server's, a key a site."""

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS = 3650
SERVER_DAYS = 730
SKEW = datetime.timedelta(hours=1)  # of a site's clock that is behind the operator's


@dataclass(frozen=True)
class Signed:
    """A certificate and its private key, both in PEM."""

    certificate: bytes
    key: bytes


def authority(name: str) -> Signed:
    """A certificate authority that signs server certificates and nothing below it.

    Args:
        name: its common name.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    built = (
        _builder(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return _signed(built.sign(key, hashes.SHA256()), key)


def server(signer: Signed, names: Sequence[str]) -> Signed:
    """A certificate for TLS servers.

    Args:
        signer: the authority.
        names: host names and addresses under which it is reached; the first is the common name.
    """
    issuer = x509.load_pem_x509_certificate(signer.certificate)
    (common,) = issuer.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    signs = serialization.load_pem_private_key(signer.key, None)
    assert isinstance(signs, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    known = x509.AuthorityKeyIdentifier.from_issuer_public_key(signs.public_key())
    built = (
        _builder(names[0][:64], str(common.value), key.public_key(), SERVER_DAYS)  # X.509 allows 64 letters
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(known, critical=False)
    )
    return _signed(built.sign(signs, hashes.SHA256()), key)


def node_key(comment: str) -> tuple[bytes, bytes]:
    """A private and a public key in OpenSSH's form, on the curve that Flower asks of a SuperNode.

    Args:
        comment: whose, at the end of the public one.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    openssh = serialization.PrivateFormat.OpenSSH
    private = key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption())
    form = serialization.PublicFormat.OpenSSH
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, form)
    return private, public + f" {comment}\n".encode()


def _builder(
    subject: str, issuer: str, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(**uses: bool) -> x509.KeyUsage:
    """These uses of a key and no other."""
    every = "digital_signature content_commitment key_encipherment data_encipherment key_agreement"
    every += " key_cert_sign crl_sign encipher_only decipher_only"
    return x509.KeyUsage(**{use: uses.get(use, False) for use in every.split()})


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _signed(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Signed:
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    return Signed(certificate.public_bytes(pem), private)
