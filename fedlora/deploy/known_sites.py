"""What the operator of a server has registered: which node is whose."""

import os
from pathlib import Path

NODES = "FEDLORA_NODES"  # names the file that register.sh writes; env.sh of a server sets it


def names_of(file: Path) -> dict[int, str]:
    """The names of sites by the numbers of their nodes, from lines of a name and a number.

    A site that was registered again, with another key, is its last node.
    """
    found = dict[str, int]()
    if file.is_file():
        for line in file.read_text("utf-8").splitlines():
            name, _, node = line.partition(" ")
            if node.strip().isdigit():
                found[name] = int(node)
    return {node: name for name, node in found.items()}


def registered() -> dict[int, str]:
    """The names that the environment of a server's scripts tells of; empty where it tells none."""
    return names_of(Path(os.environ[NODES])) if os.environ.get(NODES) else {}
