"""Runs a function on several real ranks (gloo, DeepSpeed) in processes of their own."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pretrain.ports import free_port


def run_ranks(world_size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(control_group, *arguments)`` on every rank; an exception on any of them is raised here."""
    start_ranks(world_size, _joined, function, arguments)


def start_ranks(world_size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(*arguments)`` on every rank as a launcher would: the ranks are named, but have not met yet."""
    port = free_port()
    preload()
    mp.start_processes(_rank, (world_size, port, function, arguments), nprocs=world_size, start_method="forkserver")


def preload() -> None:
    """Ranks are forked from a server that has imported once what takes seconds, torch._dynamo with an optimizer."""
    multiprocessing.set_forkserver_preload(["deepspeed", "pretrain.main", "torch._dynamo"])
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"):  # which DeepSpeed reads when it is imported
        forkserver.ensure_running()


def _rank(rank: int, world_size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "DS_ACCELERATOR": "cpu",  # several ranks are wanted, whatever GPUs there are
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    sys.path.insert(0, str(Path(__file__).parents[2]))
    function(*arguments)


def _joined(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    from pretrain.engine.distributed import choose_device, init_distributed, read_rank

    control = init_distributed(choose_device(read_rank()))
    function(control, *arguments)
    dist.barrier(control)
    dist.destroy_process_group()
