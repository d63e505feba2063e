"""What every test runs under: no network, no display, no more threads than asked for.

The variables are read when their libraries are first imported, so they are set before any test module is.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # an unreachable hub costs a minute and a half of retries
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch


# Needs Triton's interpreter, chosen when Triton is first imported: test_ssd_kernels.py gives it a process of its own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))
