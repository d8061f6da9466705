"""Pure: messages, codec and session rules of the wire. No torch, sockets, clock or disk."""
