"""Attacks of hostile clients in a simulation: changes to their updates before the server gets them."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

import numpy as np
from flwr.app import Message

from fedslm.config import AttackConfig
from fedslm.errors import FederationError
from fedslm.protocol.messages import Reply, Request
from fedslm.records import AdapterState


def attacked(
    message: Message, request: Request, attack: AttackConfig, shapes: dict[str, tuple[int, ...]]
) -> Message:
    """A hostile client's reply, which replaces its honest one.

    Its hash is valid, since the attacker computes it too.

    Args:
        message: The reply that the client would have sent.
        request: The server's request.
        attack: The attack.
        shapes: Shapes of the expected tensors.
    """
    if message.has_error():
        return message
    try:
        reply = Reply.from_records(message.content, request.packing, shapes)
    except FederationError:
        return message
    if reply.delta is not None:
        delta = changed(reply.delta, attack)
        reply = replace(reply, delta=delta, delta_sha256=delta.sha256())
        message.content = reply.to_records(request.packing)
    return message


def changed(delta: AdapterState, attack: AttackConfig) -> AdapterState:
    """A hostile client's update.

    Args:
        delta: The update that an honest client would send.
        attack: The attack; data poisoning changes nothing here.
    """
    match attack.kind:
        case "sign-flip":
            factor = -1.0
        case "scale":
            factor = attack.strength
        case "nan":
            factor = float("nan")
        case "none" | "label-flip" | "backdoor":
            return delta
        case _:
            assert_never(attack.kind)
    return AdapterState({key: np.float32(factor) * delta[key] for key in delta})
