"""Layer 10: configuration, the real environment, the router from message to handler, ordered start and stop."""
