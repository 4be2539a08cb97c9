"""Coverage-guided fuzzing of the decoder, where `atheris` installs: `python tests/property/fuzz_codec.py [-runs=N] [CORPUS]`."""

import sys
from collections.abc import Callable


def make_target() -> Callable[[bytes], None]:
    """Give the function to fuzz. The imports stand here so that atheris can follow the code that they load."""
    from p2pnode.errors import ProtocolViolation
    from p2pnode.wire.canonical import check_canonical
    from p2pnode.wire.codec import decode_numbered
    from p2pnode.wire.tensors import decode_values, parse_headers

    def one_input(data: bytes) -> None:
        """Give the bytes to every decoder; anything raised but a ProtocolViolation is a finding."""
        for decoder in (decode_numbered, check_canonical, parse_headers):
            try:
                decoder(data)
            except ProtocolViolation:
                continue
        headers_size = data[0] if data else 0
        try:
            decode_values(parse_headers(data[1 : 1 + headers_size]), data[1 + headers_size :])
        except ProtocolViolation:
            return

    return one_input


def main() -> int:
    """Fuzz until a finding or the number of runs asked for; says so where atheris is missing."""
    try:
        import atheris
    except ImportError:
        sys.stderr.write("atheris is not installed here: `pip install atheris`, then run this again\n")
        return 2
    with atheris.instrument_imports(include=["p2pnode"]):
        target = make_target()
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
