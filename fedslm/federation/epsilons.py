"""Epsilon of a run so far, from the statements that its clients signed."""

from __future__ import annotations

import math

from fedslm.config import PrivacyConfig
from fedslm.privacy import accounting
from fedslm.privacy.statement import Statement


def of_network(privacy: PrivacyConfig, statements: dict[int, Statement]) -> float:
    """Epsilon of the network so far, from the clients' statements; infinite without privacy."""
    if privacy.unit == "none" or privacy.delta is None:
        return math.inf
    clients = [statement.events for statement in statements.values()]
    return accounting.network_epsilon(clients, privacy.delta, overlapping=privacy.overlapping)


def of_clients(privacy: PrivacyConfig, statements: dict[int, Statement]) -> dict[int, float]:
    """Epsilon of each client so far, from its statement; empty without privacy."""
    if privacy.unit == "none" or privacy.delta is None:
        return {}
    return {k: accounting.epsilon(v.events, privacy.delta) for k, v in statements.items()}
