"""`fedsoda-hub compare`: methods x seeds x splits on one task, through the machine and codecs that daemons use."""
