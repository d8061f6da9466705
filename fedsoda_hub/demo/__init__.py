"""The embedded default: a small pretrained model, its public text, generated task data, and one command that runs it all."""
