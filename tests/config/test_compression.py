"""`compression=...` of a configuration, from Python and at a site, and what is refused before loading."""

from typing import Any

import pytest

import fedlora as fl
from fedlora.api.simulate import make_spec
from fedlora.compression import BF16, NF4, Int8, RandK, Segments, TopK
from fedlora.compression.words import for_downloads, for_uploads
from fedlora.config.composition import compose
from fedlora.config.instantiate import received
from fedlora.config.translate import run_spec
from fedlora.deploy.site import OF_SERVER
from fedlora.errors import ConfigError
from fedlora.runner.compatibility import BEFORE_LOADING, check
from fedlora.runner.compatibility_compression import masked_ranks

BASE = ("model=tiny", "data=tiny")
NAMED = {
    "none": None,
    "bf16": BF16(),
    "int8": Int8(),
    "nf4": NF4(),
    "randk": RandK(),
    "segments": Segments(),
    "topk": TopK(),
}


def spec_of(**settings: Any) -> Any:
    return make_spec("tiny", "tiny", settings)


@pytest.mark.parametrize("name", NAMED)
def test_a_name_is_the_class_with_its_defaults_and_a_run_keeps_it(name: str) -> None:
    made = spec_of(compression=name)
    assert made.compression == NAMED[name]
    assert run_spec(received(made.settings)).compression == NAMED[name]  # as a site or a resumed run makes it


def test_all_settings_come_from_the_command_line() -> None:
    words = ("density=0.02", "values=bf16", "error_feedback=true", "download=int8")
    want = TopK(density=0.02, values="bf16", error_feedback=True, download="int8")
    config = compose([*BASE, "compression=topk", *(f"compression.{word}" for word in words)])
    assert run_spec(config).compression == want
    before = type(config)({name: config[name] for name in config if name != "compression"})
    assert run_spec(before).compression is None  # of a run of before there was any


def test_downloads_are_in_the_code_of_values_that_is_named_or_suits() -> None:
    ways = [
        (None, None, None),
        (Int8(block=16), Int8(block=16), Int8(block=16)),
        (Int8(download="none"), Int8(download="none"), None),
        (TopK(), TopK(), None),
        (TopK(download="nf4"), TopK(download="nf4"), NF4()),
        (TopK(density=1), None, None),
        (Segments(count=1), None, None),
        (RandK(density=1, download="bf16"), RandK(density=1, download="bf16"), BF16()),
    ]
    for given, up, down in ways:
        assert (for_uploads(given), for_downloads(given)) == (up, down)


def test_sites_make_it_since_they_code_and_decode() -> None:
    assert "compression" not in OF_SERVER


FEEDBACK = TopK(error_feedback=True)
CENTRAL = fl.privacy.ClientLevel()
REFUSED = {
    "feedback where factors turn": (
        {"compression": FEEDBACK, "strategy": "flexlora"},
        "error_feedback: strategy FlexLoRA gives .* use federa, fedexlora, fedit, fedsalora, ffalora",
    ),
    "places under masks": ({"compression": "topk", "secure_sum": True}, "numbers of TopK cannot be summed"),
    "segments under masks": ({"compression": "segments", "secure_sum": True}, "of Segments cannot be summed"),
    "codes under masks": ({"compression": "int8", "secure_sum": True}, "masked as 8 bytes, so Int8"),
    "values under masks": (
        {"compression": RandK(values="bf16"), "secure_sum": True},
        r"compression\.values=bf16: under secure_sum",
    ),
}
ALLOWED: list[dict[str, Any]] = [
    {"compression": FEEDBACK, "strategy": "ffalora"},
    {"compression": FEEDBACK, "strategy": "ffalora", "privacy": fl.privacy.DPSGD()},
    {"compression": FEEDBACK, "strategy": "ffalora", "privacy": CENTRAL},
    {"compression": "randk", "strategy": "ffalora", "privacy": CENTRAL, "secure_sum": True},
    {"compression": TopK(density=1), "secure_sum": True},
    {"compression": "nf4", "robust": fl.robust.Median(), "record_updates": True},
]


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_together_is_refused_in_one_line(what: str) -> None:
    settings, message = REFUSED[what]
    with pytest.raises(ConfigError, match=message) as caught:
        check(BEFORE_LOADING, spec_of(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", ALLOWED, ids=str)
def test_what_goes_together_is_not_refused(settings: dict[str, Any]) -> None:
    check(BEFORE_LOADING, spec_of(**settings))


class _Known:
    def __init__(self, spec: Any, ranks: list[int]) -> None:
        self.spec, self.ranks = spec, ranks


def test_clients_that_share_places_under_masks_have_one_rank() -> None:
    masked = spec_of(compression="randk", secure_sum=True, strategy="ffalora")
    assert "got ranks [2, 4]" in str(masked_ranks(_Known(masked, [2, 4])))  # type: ignore[arg-type]
    assert masked_ranks(_Known(masked, [4, 4])) is None  # type: ignore[arg-type]
    plain = spec_of(compression="randk", strategy="ffalora")
    assert masked_ranks(_Known(plain, [2, 4])) is None  # type: ignore[arg-type]


def test_a_step_s_own_code_is_refused() -> None:
    class Both(fl.UpdateStep):
        def on_client(self, given: fl.ClientUpdate) -> fl.ClientUpdate:
            return given

        def on_server(self, given: fl.RoundUpdates) -> fl.RoundUpdates:
            return given

    with pytest.raises(ConfigError, match="compression: Both makes a code of its own"):
        check(BEFORE_LOADING, spec_of(compression="bf16", steps=[Both()]))
    check(BEFORE_LOADING, spec_of(compression="bf16", steps=[fl.robust.Clip(1)]))


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="none, bf16, int8, nf4, randk, segments, topk, got 'gzip'"):
        spec_of(compression="gzip")
