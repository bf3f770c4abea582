"""A file of named tensors that tells whether it is whole: safetensors with a SHA-256 digest in its header."""

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedlora.core.adapter import digest
from fedlora.errors import CheckpointError
from fedlora.storage.atomic import write_whole

DIGEST = "digest"  # the key of the digest in a file's header

Header = Mapping[str, str]
DigestRule = Callable[[Mapping[str, Tensor], Header], str]


def digest_of(tensors: Mapping[str, Tensor], header: Header) -> str:
    """SHA-256 over the header's texts in the order of their keys, and over all tensors in that of names."""
    return digest("".join(header[key] for key in sorted(header)), sorted(tensors.items()))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Header | None = None, rule: DigestRule = digest_of
) -> None:
    """Write tensors and a header of texts, with their digest, whole or not at all.

    Args:
        path: the file; a file of that name is replaced.
        tensors: by name; no two may share memory.
        header: texts to keep beside them.
        rule: how the digest is computed.
    """
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    texts = dict(header or {})
    texts[DIGEST] = rule(kept, texts)
    write_whole(path, lambda file: save_file(kept, file, texts))


def read_tensors(path: Path, rule: DigestRule = digest_of) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header that `write_tensors` wrote.

    Raises:
        CheckpointError: the file is missing, is not a safetensors file, or does not match its digest. The
            message is the reason alone, so that the caller says what the file is.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        expected = header.pop(DIGEST, None)
        if expected is None or rule(tensors, header) != expected:
            raise CheckpointError("its digest does not match")
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"it cannot be read: {error}") from error
    return tensors, header
