"""The model that both sides must build alike. No sockets."""
