"""Runs a function in several processes that form a gloo group on this machine."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist


def launch(scenario, folder, *, ranks=2, expect_success=True):
    """Run `scenario(rank, folder)` in so many processes, with one thread each; return their exit codes."""
    # Forked from a server that has imported everything once, and that has no threads which a fork could break.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([scenario.__module__])
    processes = [context.Process(target=_in_group, args=(scenario, rank, ranks, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    codes = [process.exitcode for process in processes]
    assert not expect_success or codes == [0] * ranks
    return codes


def _in_group(scenario, rank, ranks, folder):
    torch.set_num_threads(1)
    if "lo" in (name for _, name in socket.if_nameindex()):
        # Else gloo looks up the host's name, which takes seconds where no name server answers.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # As torchrun names them, for transformers and accelerate.
    for name, value in {"RANK": rank, "WORLD_SIZE": ranks}.items():
        os.environ[name] = os.environ[f"LOCAL_{name}"] = str(value)
    init = f"file://{folder}/rendezvous"
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=ranks, timeout=timeout)
    scenario(rank, Path(folder))
    dist.destroy_process_group()
