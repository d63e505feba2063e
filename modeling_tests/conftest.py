"""What every test runs under: no network, no display, no more threads than asked for.

The variables are read when their libraries are first imported, so they are set before any test module is.
"""

import os
import sys


os.environ["HF_HUB_OFFLINE"] = "1"  # an unreachable hub costs a minute and a half of retries
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.append(os.path.join(sys.prefix, "torchao"))  # where `make test` puts it

import torch


# Each runs in a process of its own, started by test_ssd_kernels.py and test_upstream.py: Triton's interpreter is
# chosen when Triton is first imported, and transformers' own tests are downloaded and patch global tables.
collect_ignore = ["interpreted"] if os.environ.get("TRITON_INTERPRET") != "1" else []
if not any("upstream" in argument for argument in sys.argv):
    collect_ignore.append("upstream")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))
