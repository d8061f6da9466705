"""Run the whole job on this machine with a small embedded model, its public text and generated data.

Serving, training and judging are other rooms'.
"""
