"""On PYTHONPATH, lets accelerate use FSDP2 on CPUs in the processes that a launcher starts."""

import os

if "LOCAL_RANK" in os.environ:
    from accelerate_on_cpu import allow_fsdp

    allow_fsdp()
