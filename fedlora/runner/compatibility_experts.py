"""Refused pairings with experts that are kept in one parameter; `compatibility` lists them all."""

from pathlib import Path

from fedlora.models import adapts_experts

from .spec import RunSpec


def experts_of_own_client(spec: RunSpec) -> str | None:
    """Such a client looks at the modules that are adapted, and an expert is none."""
    if spec.strategy.client and _experts(spec):
        return (
            f"lora.target_parameters: strategy {spec.strategy_class} trains with a client of its own, which "
            "adapts modules only; leave it out, or use another strategy"
        )
    return None


def experts_by_dora(spec: RunSpec) -> str | None:
    """PEFT's file holds DoRA of modules only."""
    if spec.lora.form.peft_names and _experts(spec):
        return "lora.target_parameters: PEFT has no DoRA of experts, got lora.dora=true; leave one out"
    return None


def _experts(spec: RunSpec) -> bool:
    """Whether experts that are kept in one parameter are adapted."""
    given = spec.lora.adapter is not None and adapts_experts(Path(spec.lora.adapter))
    return given or bool(spec.lora.target_parameters)
