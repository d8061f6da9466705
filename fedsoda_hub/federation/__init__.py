"""Decide federated rounds: events in, effects out. Torch, sockets, clock and disk are other rooms'."""
