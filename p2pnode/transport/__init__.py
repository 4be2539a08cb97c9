"""One encrypted, multiplexed, flow-controlled session per peer over any ordered byte stream. May use trio; imports 0 to 2."""
