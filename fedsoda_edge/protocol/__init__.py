"""Define what both sides, and agent and worker, may say to each other. Pure: no torch, sockets, clock or disk."""
