"""Who is where: the hash table, links to peers, mDNS on the local network, the gossip of offers. Imports layers 0 to 3 only."""
