"""accelerate turns FSDP2 on for GPUs only; tests need it on the CPU too."""

from __future__ import annotations


def allow_fsdp():
    """Let accelerate do on CPUs, with gloo, what it does on GPUs where FSDP is asked for."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    initialise = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **options):
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched


def forget_accelerator():
    """Let the next Trainer of this process configure accelerate anew; the process group stays."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
