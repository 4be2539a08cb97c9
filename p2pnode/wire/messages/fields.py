"""Bounded field types that message classes are made of: everything from the network has a size."""

from typing import Annotated

from msgspec import Meta

Hash32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
PublicKey = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
MaybeHash32 = Annotated[bytes, Meta(max_length=32)]
Nonce = Annotated[bytes, Meta(min_length=16, max_length=16)]
Body = Annotated[bytes, Meta(max_length=65536)]
Label = Annotated[str, Meta(max_length=64)]
ShortText = Annotated[str, Meta(max_length=256)]
LongText = Annotated[str, Meta(max_length=1024)]
Address = Annotated[str, Meta(max_length=262)]
Addresses = Annotated[tuple[Address, ...], Meta(max_length=8)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Amount = Annotated[int, Meta(ge=0, le=2**62)]
TimeMs = Annotated[int, Meta(ge=0, le=2**53)]
PartsPerMillion = Annotated[int, Meta(ge=0, le=1_000_000)]
Labels = Annotated[tuple[Label, ...], Meta(max_length=32)]
Hashes = Annotated[tuple[Hash32, ...], Meta(max_length=256)]
