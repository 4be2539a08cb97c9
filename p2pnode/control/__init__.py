"""The daemon's control socket as its users see it: where it lies, what a body looks like, a client. Stands below the API."""
