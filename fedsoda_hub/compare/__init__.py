"""Compare methods x seeds x splits on one task, with the rounds and codecs of the daemon, which are other rooms'."""
