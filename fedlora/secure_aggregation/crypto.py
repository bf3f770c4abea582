"""The primitives of secure aggregation: fixed-point numbers, masks, secret shares and encryption.

All keys have 32 bytes. Key pairs are of X25519 (RFC 7748). Keys of ciphers are derived by HKDF with SHA-256
(RFC 5869) under the name of their purpose, so that no key serves two purposes.
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

Words = NDArray[np.uint64]  # a vector over the integers mod 2^64, in which sums are computed

POINT = 2.0**32  # a fixed-point number is a multiple of 1 / POINT
KEY = 32  # bytes
SHARE = 48  # bytes of a share of a 32-byte secret, which flwr pads to whole blocks of 16
INDEX = 4  # bytes with a share's index, which flwr puts before it; the receivers know the index
NONCE, TAG = 12, 16  # bytes that AES-GCM adds to a plaintext


def encode(values: Tensor, clients: int) -> Words:
    """Round floating-point numbers to multiples of 2^-32, in two's complement.

    Args:
        values: numbers of any shape and floating dtype.
        clients: the largest number of such vectors in a sum.

    Returns:
        The fixed-point numbers, (values.numel(),); the error of each is at most 2^-33.

    Raises:
        IncompatibleUpdates: a value is not finite, or is at least 2^31 / clients, so the sum could overflow.
    """
    steps = values.detach().double().cpu().flatten().mul(POINT).round_()
    if not steps.isfinite().all():
        raise IncompatibleUpdates("expected finite values to sum, got NaN or infinity; training has diverged")
    largest = int(steps.abs().max()) if len(steps) else 0  # an int, so that the bound is exact
    if largest * clients >= 2**63:
        raise IncompatibleUpdates(
            f"expected values below 2^31 / {clients} = {2**31 / clients:.4g} for a sum of {clients} clients, "
            f"got {largest / POINT:.4g}; scale the update or the weights down"
        )
    return steps.long().numpy().view(np.uint64)


def decode(vector: Words) -> Tensor:
    """The inverse of `encode`, also for a sum of its results: float64, exact up to its 53 bits."""
    return torch.from_numpy(vector.view(np.int64).astype(np.float64)).div_(POINT)


def new_key() -> bytes:
    """A new private key of X25519."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public(private: bytes) -> bytes:
    """The public key that belongs to a private key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreement(private: bytes, public: bytes, purpose: str) -> bytes:
    """The key that two clients share for one purpose: Diffie-Hellman from one private and one public key.

    Args:
        private: the private key of either client.
        public: the public key of the other.
        purpose: what the key is used for; another purpose gives another key.

    Raises:
        ValueError: the public key has small order, so the result would be known to everybody.
    """
    own, other = X25519PrivateKey.from_private_bytes(private), X25519PublicKey.from_public_bytes(public)
    return derive(own.exchange(other), purpose)


def usable(public: bytes) -> bool:
    """Whether a public key is valid; a key of small order is not."""
    try:
        agreement(new_key(), public, "test")
    except ValueError:
        return False
    return True


def derive(secret: bytes, purpose: str) -> bytes:
    """A key for one purpose from a 32-byte secret; it reveals nothing about the secret or its other keys."""
    return HKDF(SHA256(), KEY, salt=None, info=f"fedlora secure aggregation, {purpose}".encode()).derive(
        secret
    )


def self_mask(seed: bytes, round: int, length: int) -> Words:
    """The self-mask of a client, PRG(b_u) in the paper, (length,)."""
    return _keystream(derive(seed, f"self-mask of round {round}"), length)


def pairwise_mask(private: bytes, public: bytes, node: int, peer: int, round: int, length: int) -> Words:
    """The mask that `node` adds for `peer`, (length,); the mask that `peer` adds for `node` is its negative.

    Args:
        private: the private mask key of one of the two.
        public: the public mask key of the other.
        node: the id of the client that adds the mask.
        peer: the id of the other client.
        round: the round.
        length: the length of the vector.
    """
    mask = _keystream(agreement(private, public, f"pairwise mask of round {round}"), length)
    return mask if node < peer else np.negative(mask)


def split(secret: bytes, least: int, count: int) -> list[bytes]:
    """Shamir shares (1979) of a 32-byte secret, SHARE bytes each; fewer than `least` reveal nothing."""
    return [share[INDEX:] for share in create_shares(secret, least, count)]


def join(shares: Mapping[int, bytes]) -> bytes:
    """Reconstruct a secret from `least` of its shares.

    Args:
        shares: the shares by their index in the list that `split` returned.

    Raises:
        ValueError: the shares are not of one secret. This is not always detected; the result is then wrong.
    """
    secret: bytes = combine_shares(
        [(place + 1).to_bytes(INDEX, "little") + share for place, share in shares.items()]
    )
    return secret


def encrypt(private: bytes, public: bytes, plaintext: bytes, associated: str) -> bytes:
    """Encrypt a message between two clients with AES-256-GCM; the result is NONCE + TAG bytes longer.

    Args:
        private: the sender's private channel key.
        public: the receiver's public channel key.
        plaintext: the message.
        associated: associated data, such as sender and receiver; decryption fails with any other.
    """
    nonce = os.urandom(NONCE)
    return nonce + AESGCM(agreement(private, public, "channel")).encrypt(
        nonce, plaintext, associated.encode()
    )


def decrypt(private: bytes, public: bytes, ciphertext: bytes, associated: str) -> bytes:
    """Decrypt a message, with the receiver's private channel key and the sender's public one.

    Raises:
        IncompatibleUpdates: the message was changed, or was encrypted with other associated data.
    """
    cipher = AESGCM(agreement(private, public, "channel"))
    try:
        return cipher.decrypt(ciphertext[:NONCE], ciphertext[NONCE:], associated.encode())
    except (InvalidTag, ValueError) as error:
        raise IncompatibleUpdates(f"encrypted shares were changed on their way: {associated}") from error


def _keystream(key: bytes, length: int) -> Words:
    """AES-256 in counter mode; each key is used for one stream, so the counter may start at 0."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * length))
    return np.frombuffer(stream, "<u8").astype(np.uint64, copy=False)
