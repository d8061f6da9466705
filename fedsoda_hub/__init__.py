"""Serve federated runs: the daemon and the methods. What happens on devices is `fedsoda_edge`'s."""
