"""A client's side of secure aggregation: its legs without records, and what it requires of a cohort."""

from __future__ import annotations

from fedslm.client.node import Node
from fedslm.client.round import ClientRound
from fedslm.errors import PolicyRefused, Refused
from fedslm.privacy.keys import signing_key
from fedslm.privacy.plan import PrivatePlan
from fedslm.protocol.messages import Reply
from fedslm.protocol.setup import Setup
from fedslm.secagg import membership
from fedslm.secagg.cohort import Requirements
from fedslm.secagg.kept import KEYS, SHARES, SURVIVORS, UNMASK
from fedslm.secagg.node import Node as Member


def answer_leg(client_round: ClientRound) -> Reply:
    """Answers a leg in which no record is read.

    Formal guarantees:
        * A node whose policy does not allow the plan answers none of them
          (:func:`fedslm.client.round.admitted`).
        * Nothing is charged: what leaves depends on no record.

    Raises:
        PolicyRefused: The plan shares no noise by this protocol, or the node refuses the leg.
        FederationError: The leg cannot be read.
    """
    leg, plan, node = client_round.request.leg, client_round.plan, client_round.node
    if leg is None or not isinstance(plan, PrivatePlan):
        raise PolicyRefused("the request is not a leg of secure aggregation")
    if node.deployed and leg.name == KEYS:
        try:
            membership.accept(node.directory, leg.roster)
        except Refused as error:
            raise PolicyRefused(str(error)) from error
    member = member_of(node, client_round.setup)
    answers = {
        KEYS: member.keys,
        SHARES: member.shares,
        SURVIVORS: member.survivors,
        UNMASK: member.unmask,
    }
    if leg.name not in answers:
        raise PolicyRefused("a masked part of a sum is asked for in a training request")
    return Reply("ok", client_round.request.round, body=answers[leg.name](leg.body))


def member_of(node: Node, setup: Setup) -> Member:
    """This node in one run.

    Raises:
        PolicyRefused: The plan shares no noise by this protocol, or no process of the node has begun a
            session.
        FederationError: The node has no roster.
    """
    place = node.directory if node.deployed else node.directory.parent
    return membership.member(
        place,
        node.directory,
        setup.run_id,
        key=signing_key(node.directory),
        requirements=requirements_of(setup),
    )


def requirements_of(setup: Setup) -> Requirements:
    """What the noise of a run's plan requires of a cohort: the policy allowed the plan.

    Raises:
        PolicyRefused: The plan shares no noise by this protocol.
    """
    plan = setup.plan
    shares = plan.shares if isinstance(plan, PrivatePlan) else None
    if shares is None or shares.protocol != "masked":
        raise PolicyRefused('the plan shares no noise by secure_aggregation.protocol="masked"')
    return Requirements(shares.max_colluding, shares.honest_nodes, setup.plan_sha256)
