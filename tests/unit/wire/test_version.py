"""Which versions understand each other."""

import pytest

from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason
from p2pnode.wire.version import PROTOCOL_VERSION, SPOKEN, VersionRange, agree


def test_neighbours_agree_on_the_newest_version_of_both() -> None:
    assert agree(SPOKEN, SPOKEN) == PROTOCOL_VERSION
    assert agree(VersionRange(4, 5), VersionRange(5, 6)) == 5
    assert agree(VersionRange(5, 6), VersionRange(4, 5)) == 5


@pytest.mark.parametrize("peer", [VersionRange(1, 3), VersionRange(6, 7), VersionRange(5, 4), VersionRange(0, 0)])
def test_strangers_do_not(peer: VersionRange) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        agree(VersionRange(4, 5), peer)
    assert caught.value.reason is Reason.WRONG_VERSION
