"""``fedslm audit``: for the privacy officer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedslm.cli.answers import stages
from fedslm.cli.console import ERRORS, Json, clear_errors
from fedslm.errors import plural, printable
from fedslm.extras import is_installed, missing
from fedslm.storage import json_text

if TYPE_CHECKING:
    from fedslm.audit.ledgers import LedgerAudit

audit_app = typer.Typer(help="Audit privacy spending, runs and the privacy code.", no_args_is_help=True)


@audit_app.command("ledger")
def ledger(
    path: Annotated[Path, typer.Argument(help="A ledger, or the node directory that contains it.")],
    public_key: Annotated[
        str, typer.Option(help="The node's public key: a PEM file, or 64 hexadecimal digits.")
    ],
    head: Annotated[
        list[str],
        typer.Option(help="A saved head: the hash of a line that was once the last; may be repeated."),
    ] = [],  # noqa: B006  (typer copies it)
    statements: Annotated[
        Path | None, typer.Option(help="A server's statements.jsonl, to check the ledger against.")
    ] = None,
    delta: Annotated[
        list[float], typer.Option(help="Report epsilon at this delta too; may be repeated.")
    ] = [],  # noqa: B006
    policy: Annotated[
        Path | None, typer.Option(help="The node's policy.toml: check its budget, show what is left.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a ledger offline: chain, signatures, gaps, rollback, and epsilon by three accountants.

    Exits with 0 if the ledger is sound and 1 on any finding. A problem that cannot be ruled out is an
    open question: it is printed and does not change the exit code.

    Example: `fedslm audit ledger node/ledger.jsonl --public-key node/ledger-key.pub.pem`
    """
    with clear_errors():
        from fedslm.audit.ledgers import Evidence, audit_ledger
        from fedslm.audit.ledgers import as_json as values_of
        from fedslm.audit.statements import read_statements
        from fedslm.privacy.keys import read_public_key
        from fedslm.privacy.policy import open_policy

        key = read_public_key(public_key)
        allowed = None if policy is None else open_policy(policy)
        evidence = Evidence(
            heads=tuple(each.strip().lower() for each in head),
            statements=() if statements is None else read_statements(statements, key),
            deltas=tuple(delta),
            budget=None if allowed is None else (allowed.epsilon, allowed.delta),
        )
        found = audit_ledger(path, key, evidence)
        if as_json:
            typer.echo(json_text(values_of(found)))
        else:
            _print_ledger(found)
        if not found.sound:
            raise typer.Exit(1)


@audit_app.command("run")
def run(
    path: Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")],
    others: Annotated[
        list[Path],
        typer.Option("--with", help="Another run on the same data, such as tuning; may be repeated."),
    ] = [],  # noqa: B006
    records_per_person: Annotated[
        list[int],
        typer.Option(
            help="Records of one person: also report epsilon for them (unit = record); may be repeated."
        ),
    ] = [2, 4],  # noqa: B006
    empirical: Annotated[
        bool,
        typer.Option(help="Attack the mechanism with canaries to measure a lower bound on epsilon."),
    ] = True,
    as_json: Json = False,
) -> None:
    """Write the audit of a run: audit.md, audit.json and a printable audit.html.

    The attack needs fedslm[train]; without it, give --no-empirical.

    Exits with 0 if nothing is wrong and 1 on any finding.

    Example: `fedslm audit run runs/mine --with runs/tuning`
    """
    with clear_errors():
        from fedslm.audit.runs import audit_run

        if empirical and not is_installed("torch"):
            raise missing("torch", "the attack with canaries (--no-empirical leaves it out)")
        with stages() as watcher:
            audit = audit_run(
                path,
                others=tuple(others),
                group_sizes=tuple(records_per_person),
                empirical=empirical,
                on_progress=watcher.on_progress,
            )
        if as_json:
            typer.echo(json_text(audit))
        else:
            from fedslm.rendering import spent as shown

            g, console = audit["guarantee"], Console()
            text = f"ε = [bold]{shown(g['epsilon'])}[/bold] at δ = {g['delta']:g} for one "
            console.print(text + audit["privacy"]["unit"], highlight=False)
            for name in ("audit.md", "audit.html", "audit.json"):
                console.print(f"  {path / name}", highlight=False, markup=False, soft_wrap=True)
        for finding in audit["findings"]:
            text = f"finding: {printable(finding)}"
            ERRORS.print(text, style="red")
        if audit["findings"]:
            raise typer.Exit(1)


@audit_app.command("self-test")
def self_test(as_json: Json = False) -> None:
    """Test the guarantees of the privacy code on this machine; a node does so before it trains.

    Exits with 0 if all hold and 1 if not.

    Example: `fedslm audit self-test`
    """
    with clear_errors():
        from fedslm.verification.self_test import run_self_test

        if not as_json:
            ERRORS.print("testing; this takes about ten seconds …")
        result = run_self_test()
        if as_json:
            checks = [vars(check) for check in result.checks]
            values = {"passed": result.passed, "seconds": result.seconds, "checks": checks}
            typer.echo(json_text(values))
        else:
            table = Table(title=f"Self-test: {result.seconds:.1f} s")
            for column in ("", "promise", "figures"):
                table.add_column(column)
            for check in result.checks:
                mark = "[green]held[/green]" if check.passed else "[red bold]BROKEN[/red bold]"
                table.add_row(mark, check.name, check.detail)
            Console().print(table)
        if not result.passed:
            raise typer.Exit(1)


def _table(found: LedgerAudit) -> Table:
    """Builds a table of the privacy loss at each delta."""
    from fedslm.rendering import spent as shown

    table = Table(title="ε spent, failed work included")
    columns = ["δ", "ε", "PLD", "PRV", "RDP", "if plans were adaptive", "budget", "releases left"]
    if any(each.all_collude is not None for each in found.spent):
        columns.append("if all others collude")
    for column in columns:
        table.add_column(column, justify="right")
    for spent in found.spent:
        accounts, adaptive = spent.accounts, "–"
        if spent.adaptive is not None:
            adaptive = f"{spent.adaptive:.3f} at δ = {spent.adaptive_delta:g}"
        figures = [
            "–" if each is None else f"{each:.3f}"
            for each in (accounts.pld, accounts.prv, accounts.rdp)
        ]
        whole = "∞" if math.isinf(spent.epsilon) else f"{spent.epsilon:.3f}"
        budget = "–" if spent.budget is None else f"{spent.budget:.3f}"
        left = "–" if spent.remaining_releases is None else str(spent.remaining_releases)
        weaker = [] if spent.all_collude is None else [shown(spent.all_collude)]
        table.add_row(f"{spent.delta:g}", whole, *figures, adaptive, budget, left, *weaker)
    return table


def _print_ledger(found: LedgerAudit) -> None:
    """Prints an audit for people."""
    console = Console()
    verdict = "[green]sound[/green]" if found.sound else "[red bold]not sound[/red bold]"
    if found.sound and found.open_questions:
        verdict = "[yellow]sound, with open questions[/yellow]"
    console.print(f"{verdict}: ", found.path, highlight=False, soft_wrap=True)
    if found.entries:
        by = f" by the column {found.unit_column!r}" if found.unit_column is not None else ""
        text = (
            f"{plural(found.entries, 'line')}, {plural(found.charges, 'charge')} for one "
            f"{found.unit or 'unit'}{by} ({found.adjacency}), {found.open_reservations} of them "
            f"released nothing; {plural(found.unprotected, 'release')} without privacy; "
            f"{plural(len(found.runs), 'run')}"
        )
        console.print(printable(text), highlight=False, markup=False)
        console.print(f"head {found.head}", highlight=False, soft_wrap=True)
    if found.spent:
        console.print(_table(found))
    for question in found.open_questions:
        console.print(f"open: {question}", style="yellow", highlight=False, markup=False)
    for note in found.notes:
        console.print(f"note: {printable(note)}", highlight=False, markup=False)
    for finding in found.findings:
        ERRORS.print(f"finding: {printable(finding)}", style="red")
