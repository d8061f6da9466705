"""The daemon and the paper's algorithms."""
