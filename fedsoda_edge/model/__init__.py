"""Build the model, which both sides must build alike. No sockets."""

import logging
import sys

# On CPUs with AVX512-BF16 bitsandbytes, which PEFT imports, would fetch compiled code from a model hub through `kernels`,
# and warns where it cannot. Nothing from the network becomes code here, and nf4.py has no use for it.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # how Python marks what must not be imported
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
