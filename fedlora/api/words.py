"""Messages that name keys of the command line, in the words of who called from Python."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from fedlora.errors import FedLoraError

# What the command line says of a part that Python gives as an object.
PHRASES = {
    **{f"{name}=none": f"{name}=None" for name in ("privacy", "robust", "rule", "compression", "server")},
    "privacy=dp_sgd": "privacy=DPSGD(...)",
    "privacy=client_level": "privacy=ClientLevel(...)",
    "scheduler=synchronous": "scheduler=None",
    "engine=inprocess": "engine=None",
    "stop=early": "EarlyStopping",
    "keep=last": "leave it out of callbacks",
    "keep:": "callbacks:",
}
ARGUMENTS = {name: name for name in ("text", "label", "prompt", "response", "labels", "test", "test_rows")}
ARGUMENTS |= {"client": "client_column", "partition": "partition", "train": "data", "path": "data"}
OPTIONS = ("alpha", "shards", "min_rows", "max_rows", "max_length")  # of `data_options`
PHRASE = re.compile(rf"(?<![\w./'])(?:{'|'.join(map(re.escape, PHRASES))})(?!\w)")
VALUE = r"\[[^\]]*\]|\.\.\.|[^\s;,\[\]()]*[^\s;,.:?\[\]()]"
KEY = re.compile(rf"(?<![\w./'])(data|evaluate|lora)\.(\w+)(?:=({VALUE})?)?(?![\w/])")


@contextmanager
def in_python() -> Iterator[None]:
    """Raise what is raised within in the words of Python."""
    try:
        yield
    except FedLoraError as error:
        error.args = (translated(str(error)),)
        raise


def translated(text: str) -> str:
    """A message with arguments of `simulate` in the place of keys of the command line.

    `data.label=topic` is label='topic', `data.max_length=64` data_options={'max_length': 64}, and
    `evaluate.rows=validation` evaluate={'rows': 'validation'}. What has no argument stays as it is.
    """
    return KEY.sub(_argument, PHRASE.sub(lambda found: PHRASES[found[0]], text))


def _argument(found: re.Match[str]) -> str:
    group, name, value = found[1], found[2], found[3]
    said = "=" in found[0]
    if name == "parametrization":  # a class in Python, a name on the command line
        return found[0]
    if group != "data":
        return f"{group}={{'{name}': {_literal(value)}}}" if said and value else found[0]
    if name in OPTIONS:
        return f"data_options={{'{name}': {_literal(value)}}}" if said else f"data_options['{name}']"
    if name not in ARGUMENTS:
        return found[0]
    return f"{ARGUMENTS[name]}={_literal(value) if value else ''}" if said else ARGUMENTS[name]


def _literal(value: str | None) -> str:
    """A value of the command line as Python writes it."""
    if not value or value == "...":
        return "..."
    if value.startswith("["):
        return f"[{', '.join(_literal(item.strip()) for item in value[1:-1].split(','))}]"
    if value in ("null", "true", "false"):
        return {"null": "None", "true": "True", "false": "False"}[value]
    return value if re.fullmatch(r"-?\d+(\.\d+)?", value) else repr(value.strip("'\""))
