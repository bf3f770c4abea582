"""Which settings of a run exclude one another: every refused pairing, as a list of conditions.

A condition reads what strategy, client, privacy, robust rule and engine declare of themselves. It is a
function from what is known to a sentence, or to None where there is nothing to refuse. `BEFORE_LOADING` needs
the description of the run alone, `WITH_DATA` its rows and clients too, `WITH_MODEL` the base model as well.
"""

from collections.abc import Callable, Sequence

from fedlora.errors import ConfigError
from fedlora.models.parametrizations import LORA

from . import compatibility_callbacks as callbacks
from . import compatibility_compression as compression
from . import compatibility_experts as experts
from . import compatibility_privacy as privacy
from . import compatibility_rules as rules
from . import compatibility_schedulers as schedulers
from . import compatibility_server as server
from . import compatibility_steps as steps
from . import compatibility_tree as tree
from .dealt import Dealt
from .spec import RunSpec


def check(conditions: Sequence[Callable[..., str | None]], known: RunSpec | Dealt) -> None:
    """Raise ConfigError with the first refusal of a list of conditions; nothing where there is none."""
    for condition in conditions:
        if why := condition(known):
            raise ConfigError(why)


def number_of_clients(spec: RunSpec, parts: int) -> int:
    """How many clients take part: as many as have rows here, or as the user says.

    Raises:
        ConfigError: the rows are elsewhere, and nobody has said how many sites there are.
    """
    clients = parts or spec.clients
    if clients is None:
        raise ConfigError("clients: how many sites take part? say clients=N")
    return clients


def own_client(spec: RunSpec) -> str | None:
    """A strategy that has a part of its algorithm in a client class of its own."""
    needed, given = spec.strategy.client, type(spec.client).__name__
    if needed and given != needed:
        return (
            f"strategy {spec.strategy_class} needs the client {needed}, which does its part of the "
            f"algorithm, got {given}; leave client=... out, the strategy brings its own"
        )
    return None


def plain_lora_of_own_client(spec: RunSpec) -> str | None:
    """Such a client trains plain LoRA."""
    init = spec.lora.init or spec.strategy.start
    if spec.strategy.client and (init != "lora" or spec.lora.form != LORA):
        return (
            f"strategy {spec.strategy_class} trains with a client of its own, which knows plain LoRA "
            f"only, got lora.init={init} and lora.dora={spec.lora.dora}; use lora.init=lora lora.dora=false"
        )
    return None


def form_of_pairs(spec: RunSpec) -> str | None:
    """A parametrization whose A and B are no update by themselves, which is what strategies combine."""
    form = spec.lora.form
    if form.pairs and form.has_own_low_rank:
        return (
            f"lora.parametrization={type(form).__name__}: its A and B are no update by themselves, which is "
            "what strategies combine; use one without pairs, or strategy=privatelora for a core matrix"
        )
    return None


def form_without_pairs(spec: RunSpec) -> str | None:
    """A parametrization without A and B, where something needs them."""
    form, name = spec.lora.form, type(spec.lora.form).__name__
    if form.pairs:
        return None
    init = spec.lora.init or spec.strategy.start
    if init != "lora" or spec.lora.adapter is not None:
        what = "lora.adapter" if spec.lora.adapter is not None else f"lora.init={init}"
        return f"{what}: gives factors A and B, and lora.parametrization={name} has none; leave one out"
    if not (isinstance(spec.ranks, int) or len({*spec.ranks}) == 1):
        return (
            f"ranks: lora.parametrization={name} has factors of one size for all clients, got "
            f"{spec.ranks}; use one rank"
        )
    return None


def start_and_adapter(spec: RunSpec) -> str | None:
    """Either an adapter to start from, or a start taken out of the base."""
    init = spec.lora.init or spec.strategy.start
    if spec.lora.adapter is not None and init != "lora":
        return (
            f"lora.adapter and a start from the base, {init}, exclude each other: strategy "
            f"{spec.strategy_class} with lora.init=lora goes on from the adapter, lora.adapter=null "
            "starts from the base"
        )
    return None


def rows_elsewhere(spec: RunSpec) -> str | None:
    """Rows at sites, under an engine that has none."""
    if spec.data.at_sites and not spec.engine.sites:
        return "data=sites: the rows are at the sites, on other machines; say engine=deploy, or data=files"
    return None


def updates_of_personal(spec: RunSpec) -> str | None:
    """What a client of a personal strategy sends is no whole model that could be evaluated."""
    if spec.evaluate.updates and spec.strategy.personal:
        return (
            f"evaluate.updates: what a client of {spec.strategy_class} sends is no whole model; leave it "
            "out, its clients evaluate their own models"
        )
    return None


def answers_of_personal(spec: RunSpec) -> str | None:
    """Nor is there one model that could answer."""
    if spec.evaluate.answers and spec.strategy.personal:
        return (
            f"evaluate.answers: the result of {spec.strategy_class} is a model for each client, and the "
            "server has none that could answer; leave it out"
        )
    return None


def recorded_updates(spec: RunSpec) -> str | None:
    """Updates that must not be kept."""
    if spec.record_updates and (spec.privacy is not None or spec.secure_sum or spec.strategy.personal):
        return (
            "record_updates: private and secret updates must not be kept, and those of personal strategies "
            "are no whole models; leave it out"
        )
    return None


def answers_of_labels(known: Dealt) -> str | None:
    """A classifier writes no text."""
    task = known.dataset.task
    if known.spec.evaluate.answers and not task.generates:
        return (
            f"evaluate.answers: a {task.model} writes no text, its {task.headline} says all; leave it out, "
            "or name data.prompt and data.response"
        )
    return None


def robust_rule(known: Dealt) -> str | None:
    """What a robust rule says of itself."""
    if known.spec.robust is not None:
        try:
            known.spec.robust.check(
                known.spec.strategy, known.spec.round_config(known.clients), known.spec.privacy
            )
        except ConfigError as error:
            return str(error)
    return None


def least_updates(known: Dealt) -> str | None:
    """More updates than a round has clients."""
    most = known.spec.round_config(known.clients).enough(known.clients)
    if known.spec.min_updates > most:
        return f"min_updates: expected at most {most}, the clients of a round; got {known.spec.min_updates}"
    return None


def mixed_ranks(known: Dealt) -> str | None:
    """Ranks that differ, under a strategy of one rank."""
    if len(set(known.ranks)) > 1 and not known.spec.strategy.mixed_ranks:
        return (
            f"strategy {known.spec.strategy_class} combines clients of one rank only, ranks are "
            f"{sorted(set(known.ranks))}; use strategy=flexlora, or one rank"
        )
    return None


def adapter_apart(known: Dealt) -> str | None:
    """A client that shares an adapter beside the model, under a strategy of the model's own LoRA."""
    name = type(known.spec.client).__name__
    if known.apart and known.spec.strategy.client != name:
        return (
            f"client {name} shares an adapter that is no part of the model, strategy "
            f"{known.spec.strategy_class} expects the model's own LoRA; use strategy=pfedlora"
        )
    return None


def adapter_apart_given(known: Dealt) -> str | None:
    """Nor can such a client start from an adapter of the model."""
    if known.apart and known.spec.lora.adapter is not None:
        name = type(known.spec.client).__name__
        return f"lora.adapter: client {name} shares no LoRA of the model, leave it out"
    return None


def several_models(known: Dealt) -> str | None:
    """Clients of several models, under a strategy of one."""
    if known.spec.models and not known.apart:
        names = [model.name for model in known.spec.models]
        return (
            f"models: {known.spec.strategy_class} combines LoRA of one model, got models={names}; use "
            "model=NAME, or strategy=pfedlora, whose clients may have different ones"
        )
    return None


BEFORE_LOADING = (
    rows_elsewhere,
    own_client,
    rules.rule_of_client,
    rules.rule_at_server,
    rules.basis_of_rule,
    rules.steps_of_rule,
    rules.weights_of_rule,
    rules.products_without_pairs,
    updates_of_personal,
    recorded_updates,
    privacy.privacy_of_personal,
    privacy.privacy_of_client_evaluation,
    privacy.record_level_dora,
    privacy.client_level_strategy,
    privacy.client_level_updates,
    privacy.client_level_least,
    privacy.client_level_rounds,
    privacy.client_level_scheduler,
    privacy.privacy_of_client,
    privacy.private_training,
    plain_lora_of_own_client,
    form_of_pairs,
    form_without_pairs,
    experts.experts_of_own_client,
    experts.experts_by_dora,
    start_and_adapter,
    answers_of_personal,
    callbacks.metrics_of_callbacks,
    callbacks.selected_rounds,
    callbacks.tracked_clients,
    steps.steps_without_updates,
    steps.updates_in_code,
    schedulers.versions_of_strategy,
    schedulers.versions_under_masks,
    schedulers.versions_under_robust_rule,
    schedulers.recorded_versions,
    schedulers.ledgers_of_sites,
    schedulers.absences_of_clients,
    compression.feedback_without_basis,
    compression.feedback_in_buffers,
    compression.steps_in_code,
    compression.codes_under_robust_rule,
    compression.masked_codes,
    server.server_without_space,
    server.server_over_a_tree,
    server.server_of_rebased_buffers,
    server.server_of_numbers,
    tree.strategy_over_a_tree,
    tree.single_updates_over_a_tree,
    tree.clipping_over_a_tree,
    tree.scheduler_over_a_tree,
)
WITH_DATA = (
    privacy.cut_private_rows,
    privacy.undeclared_labels,
    answers_of_labels,
    robust_rule,
    privacy.secure_strategy,
    privacy.secure_updates,
    privacy.secure_few,
    privacy.secure_clip,
    least_updates,
    steps.least_for_steps,
    schedulers.full_buffer,
    compression.masked_ranks,
    server.server_of_padded_sum,
    rules.scales_of_rule,
    tree.room_of_a_tree,
    mixed_ranks,
)
WITH_MODEL = (adapter_apart, adapter_apart_given, several_models)
