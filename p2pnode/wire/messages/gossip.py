"""What is spread from neighbour to neighbour: signed documents about offers, and the requests that carry them.

Most of these travel all the time, so a field that holds its default is left out of the bytes, and lists of short ids and
fingerprints are packed into one byte string each; `discovery/gossip/items.py` packs and unpacks them.
"""

from typing import Annotated

from msgspec import Meta, Struct

from p2pnode.wire.messages.discovery import Contact
from p2pnode.wire.messages.fields import Address, Amount, Count, Hash32, Label, Labels, TimeMs
from p2pnode.wire.registry import message

# Bounds of one message. An entry is 8 bytes of an item's key and 6 of its sequence; a fingerprint is 8 bytes.
KEY_PREFIX_SIZE = 8
ENTRY_SIZE = 14
FINGERPRINT_SIZE = 8
ENTRIES_MAX = 4096
WANTED_MAX = 64
DOCUMENTS_MAX = 64
DOCUMENT_BYTES_MAX = 4096
SAMPLE_MAX = 8
MODELS_HINTED_MAX = 16

Entries = Annotated[bytes, Meta(max_length=ENTRIES_MAX * ENTRY_SIZE)]
KeyPrefixes = Annotated[bytes, Meta(max_length=WANTED_MAX * KEY_PREFIX_SIZE)]
Documents = Annotated[tuple[Annotated[bytes, Meta(max_length=DOCUMENT_BYTES_MAX)], ...], Meta(max_length=DOCUMENTS_MAX)]
Sample = Annotated[tuple[Contact, ...], Meta(max_length=SAMPLE_MAX)]
ModelHint = Annotated[bytes, Meta(min_length=8, max_length=8)]


@message(31)
class Neighbour(Struct, frozen=True, omit_defaults=True):
    """Ask to become (`join`, or `urgent` when the sender has no other), to stop being (`leave`) a neighbour, or exchange
    samples of peers (`shuffle`). Answered by Neighbours. After HyParView. is_server: the sender can be dialled.
    """

    wish: Label
    is_server: bool = False
    sample: Sample = ()


@message(32)
class Neighbours(Struct, frozen=True, omit_defaults=True):
    """Whether the two are neighbours now, and a sample of peers that the sender believes can be dialled."""

    is_neighbour: bool = False
    sample: Sample = ()


@message(33)
class Announce(Struct, frozen=True, omit_defaults=True):
    """Documents that are new, and entries (key, sequence) of others that the sender holds. Answered by Wanted."""

    entries: Entries = b""
    documents: Documents = ()


@message(34)
class Wanted(Struct, frozen=True, omit_defaults=True):
    """Keys, as prefixes, of the entries that the receiver lacks. is_repeat: every document was known; the sender need not
    push here. is_stranger: the two are no neighbours (any more).
    """

    keys: KeyPrefixes = b""
    is_repeat: bool = False
    is_stranger: bool = False


@message(35)
class Reconcile(Struct, frozen=True, omit_defaults=True):
    """Compare what both hold. Answered by Differences. One of:

    fingerprints alone: 8 bytes over everything. parts with fingerprints: numbers of sixteenths of the key space, one byte
    each, and for each the fingerprints of its 16 buckets. buckets: give the entries of these, one byte each.
    wanted: give the documents behind these keys.
    """

    fingerprints: Annotated[bytes, Meta(max_length=256 * FINGERPRINT_SIZE)] = b""
    parts: Annotated[bytes, Meta(max_length=16)] = b""
    buckets: Annotated[bytes, Meta(max_length=256)] = b""
    wanted: KeyPrefixes = b""


@message(39)
class Differences(Struct, frozen=True, omit_defaults=True):
    """The answer to Reconcile; empty when nothing differs.

    fingerprints: of the 16 parts, when the whole differs. buckets: those that differ; entries: all that the sender holds
    in the first `covered` of them. documents: those that were wanted and are held.
    """

    fingerprints: Annotated[bytes, Meta(max_length=16 * FINGERPRINT_SIZE)] = b""
    buckets: Annotated[bytes, Meta(max_length=256)] = b""
    covered: Annotated[int, Meta(ge=0, le=256)] = 0
    entries: Entries = b""
    documents: Documents = ()


@message(47)
class Listing(Struct, frozen=True, omit_defaults=True):
    """An offer in the few hundred bytes that everybody can keep of everybody. Signed by the provider; newest sequence wins.

    It is for finding; the whole Offer is asked of the provider, and a quote alone binds. gigaops: measured 10^9 operations a
    second. price: micro-credits per 10^9 operations. engines: execution providers without the words every name ends in.
    models: first 8 bytes of the ids of up to 16 models held; model_count: how many there are. classes: numeric classes.
    unreached: no stranger has dialled the provider so far, its addresses are only hints.
    """

    sequence: Count
    expires_ms: TimeMs
    addresses: Annotated[tuple[Address, ...], Meta(max_length=4)] = ()
    cores: Count = 0
    memory_mib: Count = 0
    gpus: Annotated[tuple[Label, ...], Meta(max_length=8)] = ()
    gpu_memory_mib: Count = 0
    gigaops: Count = 0
    engines: Annotated[tuple[Label, ...], Meta(max_length=8)] = ("CPU",)
    classes: Annotated[tuple[Label, ...], Meta(max_length=8)] = ("fast",)
    sandbox: Label = "full"
    models: Annotated[tuple[ModelHint, ...], Meta(max_length=MODELS_HINTED_MAX)] = ()
    model_count: Count = 0
    price: Amount = 0
    call_price: Amount = 0
    region: Labels = ()
    version: Count = 1
    unreached: bool = False


@message(48)
class Withdrawal(Struct, frozen=True):
    """The signer takes its offers up to this sequence back. Kept until the last of them would have expired."""

    sequence: Count
    expires_ms: TimeMs


@message(49)
class Suspicion(Struct, frozen=True):
    """The signer, a monitor of this publisher, could not reach it. Void once the publisher signs above `sequence`."""

    publisher: Hash32
    sequence: Count
    made_ms: TimeMs
    expires_ms: TimeMs


# --- adverts by topic, for networks too large to tell everybody everything --------------------------------------------

ADVERTS_MAX = 8
ADVERT_CONTACTS_MAX = 16
Ticket = Annotated[bytes, Meta(max_length=64)]


@message(60)
class Advertise(Struct, frozen=True, omit_defaults=True):
    """Ask a registrar to hold a signed offer, or its withdrawal, under a topic. Answered by Advertised.

    ticket: from the last answer, empty the first time; it proves how long the sender has waited.
    """

    topic: Hash32
    document: Annotated[bytes, Meta(max_length=DOCUMENT_BYTES_MAX)]
    ticket: Ticket = b""


@message(61)
class Advertised(Struct, frozen=True, omit_defaults=True):
    """held_seconds: for how long the advert is held now; 0: come again with the ticket after wait_seconds.

    contacts: nodes the sender knows that are nearer to the topic.
    """

    held_seconds: Annotated[int, Meta(ge=0, le=86_400)] = 0
    wait_seconds: Annotated[int, Meta(ge=0, le=86_400)] = 0
    ticket: Ticket = b""
    contacts: Annotated[tuple[Contact, ...], Meta(max_length=ADVERT_CONTACTS_MAX)] = ()


@message(62)
class FindAdverts(Struct, frozen=True):
    """Ask a registrar for adverts under a topic. Answered by Adverts."""

    topic: Hash32


@message(63)
class Adverts(Struct, frozen=True, omit_defaults=True):
    """A random sample of the adverts held, and nodes the sender knows that are nearer to the topic."""

    documents: Annotated[tuple[Annotated[bytes, Meta(max_length=DOCUMENT_BYTES_MAX)], ...], Meta(max_length=ADVERTS_MAX)] = ()
    contacts: Annotated[tuple[Contact, ...], Meta(max_length=ADVERT_CONTACTS_MAX)] = ()
