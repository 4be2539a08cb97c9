"""Who is where: the peer book, mDNS on the local network, and links kept to known peers. Imports layers 0 to 3 only."""
