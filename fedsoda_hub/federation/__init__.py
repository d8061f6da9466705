"""Decide federated rounds: events in, effects out. No torch, sockets, clock or disk."""
