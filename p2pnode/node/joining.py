"""First contact beyond the local network: invite to this node, join by somebody's link, find a node by its id."""

from typing import Any, Final

import trio

from p2pnode.discovery.addresses import check_usable, is_global
from p2pnode.discovery.peers.invitations import check_invitation, make_link, parse_link
from p2pnode.errors import ConfigError, PeerError
from p2pnode.ids import NODE, NodeId, node_text, parse_id
from p2pnode.node.node import Node

DIAL_SECONDS: Final = 15.0


def invite(node: Node, address: str = "", valid_seconds: float = 0.0) -> dict[str, Any]:
    """Give the link that invites to a node, with what is in it. address: instead of the node's own. Raises ConfigError."""
    discovery = node.discovery
    addresses: tuple[str, ...]
    if address:
        addresses = (check_usable(address),)
    else:
        known = (*discovery.roles.confirmed, *discovery.roles.addresses, *discovery.own_addresses())
        # An address that the whole internet reaches serves everybody; one of the local network only those who are in it.
        addresses = tuple(sorted(dict.fromkeys(known), key=lambda each: not is_global(each)))
    now_ms = node.environment.clock.wall_ms()
    expires_ms = now_ms + round(valid_seconds * 1000) if valid_seconds else 0
    link = make_link(node.node_id, addresses, node.config.network.id, expires_ms)
    said = parse_link(link)
    return {
        "link": link, "node": node_text(node.node_id), "addresses": list(said.addresses), "network": said.network,
        "expires_ms": expires_ms, "reached_at": list(discovery.roles.confirmed),
    }  # fmt: skip


async def join(node: Node, link: str) -> dict[str, Any]:
    """Dial the node that a link invites to, now, and say what happened. Raises ConfigError for a link that is no use here."""
    invitation = parse_link(link)
    check_invitation(invitation, node.node_id, node.config.network.id, node.environment.clock.wall_ms())
    for entry in invitation.entries():
        node.discovery.add_peer(entry, is_bootstrap=True)
    outcome = {"node": node_text(invitation.node_id), "addresses": list(invitation.addresses), "is_connected": False,
               "what": f"no answer within {DIAL_SECONDS:g} s"}  # fmt: skip
    with trio.move_on_after(DIAL_SECONDS):
        try:
            opened = await node.transport.connect(invitation.addresses, NodeId(invitation.node_id))
        except PeerError as error:
            outcome["what"] = str(error)
        else:
            outcome.update(is_connected=True, what=f"connected at {opened.peer.seen_address}, {opened.peer.agent}")
    return outcome


async def look_up(node: Node, text: str) -> dict[str, Any]:
    """Find the node with this id, or the nodes nearest to it, in the hash table. Raises ConfigError for what is no id."""
    try:
        target = parse_id(NODE, text)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    outcome = await node.discovery.find_node(target)
    return {
        "target": text,
        "found": any(contact.node_id == target for contact in outcome.contacts),
        "hops": outcome.hops,
        "asked": outcome.asked,
        "failed": outcome.failed,
        "seconds": round(outcome.seconds, 3),
        "nearest": [{"node": node_text(each.node_id), "addresses": list(each.addresses)} for each in outcome.contacts],
    }
