"""What a user should know of a run that goes on all the same, a line each, before round 1."""

from collections.abc import Iterator

from fedlora.clients import LocalTraining
from fedlora.data import Row
from fedlora.runner.assemble import Assembly


def notices(job: Assembly) -> list[str]:
    """One line about each setting or set of rows that does not do what it seems to do.

    Counts that follow from training rows are left out where privacy or secure sums protect those rows, since
    a terminal's text goes into logs that others read. Rows of packaged sets are as they are published.
    """
    found = [*_sampling(job), *_schedule(job)]
    if job.parts and not job.dataset.published:
        found += [*_pooled(job), *_repeated(job)]
    return [*found, *_cut(job)]


def _protected(job: Assembly) -> bool:
    return job.spec.privacy is not None or job.rules.secure_sum


def _sampling(job: Assembly) -> Iterator[str]:
    asked, clients = job.rules.clients_per_round, job.rules.clients
    if asked is not None and asked > clients:
        yield f"clients_per_round={asked}, but there are {clients} clients; every round takes all of them"


def _schedule(job: Assembly) -> Iterator[str]:
    client = job.runtime.client
    if not isinstance(client, LocalTraining) or client.schedule == "constant":
        return
    if client.steps is None and (client.max_tokens is not None or not job.counts_public):
        return  # the number of steps tells of the rows
    steps = [client.count_steps(len(part.rows)) for part in job.parts] or [client.steps or 0]
    if (single := steps.count(1)) == len(steps):
        who = "every client has" if job.parts else "a client has"
    elif single:
        who = f"{single} of {len(steps)} clients have"
    else:
        return
    yield (
        f"client.schedule={client.schedule} starts anew in every round and does nothing where {who} one step "
        "a round; raise client.steps or client.epochs, or leave it out"
    )


def _pooled(job: Assembly) -> Iterator[str]:
    """Rows that name their clients, dealt to others."""
    how, column = job.spec.data.partition, job.spec.data.client
    by_client = not job.dataset.task.labelled and how in ("dirichlet", "shards")
    if (
        not isinstance(how, str)
        or how == "natural"
        or by_client
        or all(row.client is None for row in job.dataset.train)
    ):
        return
    named = f"data.client={column} names" if column else "the files name"
    yield (
        f"{named} the client of each row, but data.partition={how} pools all rows and deals them anew; say "
        "data.partition=natural to keep each client's rows together"
    )


def _repeated(job: Assembly) -> Iterator[str]:
    """Rows to evaluate on that clients train on as well."""
    if _protected(job):
        return
    texts = job.dataset.task.labelled

    def content(row: Row) -> tuple[str, str]:
        return row.source, "" if texts else row.target

    known = {content(job.dataset.train[i]) for part in job.parts for i in part.rows}
    count = sum(content(row) in known for row in job.dataset.test)
    if count:
        same = "text" if texts else "prompt and response"
        yield (
            f"{count} of {len(job.dataset.test)} {job.spec.evaluate.rows} rows have the {same} of a training "
            "row, so that the result is better than on new rows; remove the repeated rows, or name other "
            "rows to test on"
        )


def _cut(job: Assembly) -> Iterator[str]:
    """Rows that are longer than `data.max_length`."""
    dataset, most = job.dataset, job.spec.data.max_length
    sets = [(job.spec.evaluate.rows, [(dataset.test, job.test, job.base)])]
    if job.parts and not _protected(job):
        bases = job.runtime.bases or [job.base]
        held = [
            (tuple(dataset.train[i] for i in part.rows), job.runtime.rows(k), bases[k % len(bases)])
            for k, part in enumerate(job.parts)
        ]
        sets.insert(0, ("training", held))
    said = []
    for name, pieces in sets:
        cut = sum(dataset.task.count_cut(rows, made, b.tokenizer, most) for rows, made, b in pieces)
        if cut:
            said.append(f"{cut} of {sum(len(rows) for rows, _, _ in pieces)} {name} rows")
    if said:
        yield (
            f"{' and '.join(said)} are longer than data.max_length={most} tokens and lose their "
            f"{dataset.task.cut}; raise it where that matters"
        )
