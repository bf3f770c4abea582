"""What secure aggregation is made of: fixed-point numbers, masks, shares, and letters between two clients.

All keys are 32 bytes. Private and public ones are of X25519 (RFC 7748); those of a cipher come out of HKDF
with SHA-256 (RFC 5869) under a purpose, so that no two uses share one.
"""

import os
from collections.abc import Mapping

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from numpy.typing import NDArray
from torch import Tensor

from fedlora.errors import IncompatibleUpdates

Words = NDArray[np.uint64]  # a vector of the group in which is summed, the integers mod 2^64

POINT = 2.0**32  # steps to the unit of the fixed-point numbers
KEY = 32  # bytes
SHARE = 48  # bytes of a share of 32, which flwr pads to whole blocks of 16
INDEX = 4  # bytes that flwr puts before a share for its place, which all who need it know
NONCE, TAG = 12, 16  # bytes that AES-GCM adds to a letter


def encode(values: Tensor, clients: int) -> Words:
    """Floating-point numbers as two's complement fixed-point ones, in steps of 2^-32.

    Args:
        values: of any shape and floating dtype.
        clients: how many such vectors will be summed at most.

    Returns:
        Of shape (values.numel(),); off by at most 2^-33 each.

    Raises:
        IncompatibleUpdates: a value is not finite, or so large (2^31 / clients) that the sum could overflow.
    """
    steps = values.detach().double().cpu().flatten().mul(POINT).round_()
    if not steps.isfinite().all():
        raise IncompatibleUpdates("expected finite values to sum, got NaN or infinity; was it diverging?")
    largest = int(steps.abs().max()) if len(steps) else 0  # exact, as the bound then is, too
    if largest * clients >= 2**63:
        raise IncompatibleUpdates(
            f"expected values below 2^31 / {clients} = {2**31 / clients:.4g} for a sum of {clients} clients, "
            f"got {largest / POINT:.4g}; scale the update or the weights down"
        )
    return steps.long().numpy().view(np.uint64)


def decode(vector: Words) -> Tensor:
    """The numbers of `encode`, or of a sum of its results: float64, exact up to that type's 53 bits."""
    return torch.from_numpy(vector.view(np.int64).astype(np.float64)).div_(POINT)


def new_key() -> bytes:
    """A fresh private key."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public(private: bytes) -> bytes:
    """The public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreement(private: bytes, public: bytes, purpose: str) -> bytes:
    """The key of two clients for one purpose, from the private key of either and the other's public one.

    Raises:
        ValueError: the public key is of small order, so that everybody knows what would be agreed upon.
    """
    own, other = X25519PrivateKey.from_private_bytes(private), X25519PublicKey.from_public_bytes(public)
    return derive(own.exchange(other), purpose)


def usable(public: bytes) -> bool:
    """Whether a public key is one with which anything secret can be agreed upon."""
    try:
        agreement(new_key(), public, "test")
    except ValueError:
        return False
    return True


def derive(secret: bytes, purpose: str) -> bytes:
    """A key for one purpose from a secret of 32 bytes; tells nothing of the secret or of its other keys."""
    return HKDF(SHA256(), KEY, salt=None, info=f"fedlora secure aggregation, {purpose}".encode()).derive(
        secret
    )


def self_mask(seed: bytes, round: int, length: int) -> Words:
    """The mask of shape (length,) that a client adds for itself, PRG(b_u) of the paper."""
    return _keystream(derive(seed, f"self-mask of round {round}"), length)


def pairwise_mask(private: bytes, public: bytes, node: int, peer: int, round: int, length: int) -> Words:
    """The mask of shape (length,) that `node` adds for `peer`; what `peer` adds for `node` is its negative.

    Args:
        private: the mask key of one of the two.
        public: that of the other.
        node: the id of who adds it.
        peer: the other's id.
        round: the round.
        length: of the vector.
    """
    mask = _keystream(agreement(private, public, f"pairwise mask of round {round}"), length)
    return mask if node < peer else np.negative(mask)


def split(secret: bytes, least: int, count: int) -> list[bytes]:
    """Shares of a secret of 32 bytes (Shamir, 1979), SHARE bytes each; fewer than `least` tell nothing."""
    return [share[INDEX:] for share in create_shares(secret, least, count)]


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret from as many shares as it needs, each under its place in `split`'s list.

    Raises:
        ValueError: they are not of one secret. This may go unnoticed, and another secret comes out.
    """
    secret: bytes = combine_shares(
        [(place + 1).to_bytes(INDEX, "little") + share for place, share in shares.items()]
    )
    return secret


def seal(private: bytes, public: bytes, text: bytes, bound: str) -> bytes:
    """A letter that only its receiver can open, under AES-256-GCM; NONCE + TAG bytes longer than its text.

    Args:
        private: the sender's channel key.
        public: the receiver's.
        text: what it says.
        bound: what it belongs to; it cannot be opened as anything else.
    """
    nonce = os.urandom(NONCE)
    return nonce + AESGCM(agreement(private, public, "channel")).encrypt(nonce, text, bound.encode())


def unseal(private: bytes, public: bytes, letter: bytes, bound: str) -> bytes:
    """The text of a letter, from the receiver's private channel key and the sender's public one.

    Raises:
        IncompatibleUpdates: it is not as it was sealed, or bound to something else.
    """
    cipher = AESGCM(agreement(private, public, "channel"))
    try:
        return cipher.decrypt(letter[:NONCE], letter[NONCE:], bound.encode())
    except (InvalidTag, ValueError) as error:
        raise IncompatibleUpdates(f"shares were changed on their way: those of {bound}") from error


def _keystream(key: bytes, length: int) -> Words:
    """AES-256 in counter mode; a key makes one stream only, so the counter may start at 0."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * length))
    return np.frombuffer(stream, "<u8").astype(np.uint64, copy=False)
