"""The client's side of the market: placement, retries, hedging, budgets, batches over many providers, sessions.

May import market, work, discovery, store, wire, crypto and layer 0. Promises: nothing is spent that was not reserved first,
nothing is sent that was not saved first, and every job ends with exactly one reason.
"""
