"""This process among the others: rank, device, process groups."""

import os
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_pipeline.errors import DataError
from pretrain.deepspeed_compat import check_version, skip_op_compilation
from pretrain.devices import use_gpu
from pretrain.fault_tolerance.signals import StopFlag, first_reports
from pretrain.outcome import ExitCode, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """The place of this process among the ranks, from the environment variables of its launcher."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    host: str
    job_id: str
    """Slurm's, or ""."""
    nodes: tuple[str, ...] = ()
    """Names of the nodes in the order of their ranks, where the launcher gives them."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes to the run's folder and prints."""
        return self.rank == 0

    def node_of(self, rank: int) -> str:
        """Name of the node that a rank runs on, as far as it is known here."""
        node = rank // self.local_world_size
        if node < len(self.nodes):
            return self.nodes[node]
        return self.host if node == self.rank // self.local_world_size else f"node {node}"


def read_rank() -> Rank:
    """Read RANK, WORLD_SIZE and LOCAL_RANK as ``deepspeed`` and ``torchrun`` set them; alone where none is set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if len(missing) == len(names):
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    elif missing:
        raise UserError(
            f"{', '.join(missing)} not set though other rank variables are: start with `deepspeed`, or set "
            f"all of {', '.join(names)}"
        )
    world_size = int(os.environ["WORLD_SIZE"])
    local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1" if world_size == 1 else ""))
    if not local:
        raise UserError(
            "LOCAL_WORLD_SIZE is not set: set it to the number of ranks on this machine, which share its cores"
        )
    return Rank(
        int(os.environ["RANK"]),
        world_size,
        int(os.environ["LOCAL_RANK"]),
        int(local),
        host=os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        job_id=os.environ.get("SLURM_JOB_ID", ""),
        nodes=tuple(filter(None, os.environ.get("NODE_NAMES", "").split(","))),
    )


def has_bf16(device: torch.device) -> bool:
    """Whether the device is a GPU that computes in bfloat16."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def choose_device(rank: Rank, wanted: str = "auto") -> torch.device:
    """The GPU of this local rank, or the CPU with its cores shared among the local ranks.

    Raises:
        UserError: as ``use_gpu(wanted)``, or there are more local ranks than GPUs.
    """
    if use_gpu(wanted):
        os.environ["DS_ACCELERATOR"] = "cuda"  # DeepSpeed reads it while it is imported
        if rank.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {rank.local_rank} has no GPU: there are {torch.cuda.device_count()}; "
                "start no more ranks than there are GPUs"
            )
        device = torch.device("cuda", rank.local_rank)
        torch.cuda.set_device(device)
        return device
    os.environ["DS_ACCELERATOR"] = "cpu"
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // rank.local_world_size))
    return torch.device("cpu")


def use_deterministic_algorithms() -> str:
    """Let torch compute the same bits on every run; an operation that cannot is an error that names it.

    Call it before the device computes. Returns a line for the log.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it is first used
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)
    # It only helps to find reads of such memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return "deterministic: torch uses only operations that give the same bits every time"


def limit_collectives(seconds: float, *, exclude: Sequence[dist.ProcessGroup]) -> None:
    """End collectives that take longer than this with an error, on all groups of this process except ``exclude``.

    The watchdog should report first, since it knows where each rank is: give more than its limit. ``exclude`` are the
    CPU groups on which ranks wait for what only one of them does, such as the hand-off.
    """
    for group in list(dist.distributed_c10d._world.pg_map):  # noqa: SLF001 - DeepSpeed makes some of its own
        if all(group is not other for other in exclude):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)  # noqa: SLF001


def init_distributed(device: torch.device, timeout_s: float = 1800.0) -> dist.ProcessGroup:
    """Start DeepSpeed's default group (NCCL on GPUs, gloo on CPUs), whose collectives may take ``timeout_s`` seconds.

    Returns:
        a gloo group of all ranks for flags and small objects, which never touches the device.
    """
    import deepspeed  # noqa: PLC0415 - slow to import, and only after choose_device

    check_version()
    skip_op_compilation()
    warnings.filterwarnings(
        "ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*", category=FutureWarning
    )
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout_s), verbose=False)
    return new_cpu_group(timeout_s)


def gather_rows(rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """What all ranks hold one after the other along ``dim``, on every rank; each holds as much. Collective.

    Without a process group this process is alone, and its own is all.
    """
    if not dist.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts, dim)


def new_cpu_group(timeout_s: float) -> dist.ProcessGroup:
    """A further gloo group of all ranks, whose collectives may take ``timeout_s`` seconds. Collective."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert group is not None
    return group


def first_rank_decides(group: dist.ProcessGroup, decide: Callable[[], T]) -> T:
    """Run ``decide`` on rank 0 and give its result, or its ``UserError``, to every rank. Collective."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, group=group)
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result


def fail(reason: str, rank: Rank | None, *, started: bool, code: ExitCode) -> int:
    """Print the error of a command, and return its exit status. With several ranks, exit at once: others may wait.

    Unless they have ``started``, all ranks meet the same error, and the first of a node prints it.
    """
    flag = StopFlag()
    if not started and rank is not None and rank.local_rank > 0:
        flag.install_signal_handlers()
        if first_reports(flag):  # rank 0 has printed the same error
            os._exit(code)
    print(f"error: {reason}", file=sys.stderr, flush=True)  # noqa: T201
    if rank is not None and rank.world_size > 1:
        os._exit(code)
    return code


def first_of_node_checks(rank: Rank, group: dist.ProcessGroup, open_sets: Callable[[bool], T]) -> T:
    """Open datasets, with a check of their files by the first rank of each node only. Collective.

    ``open_sets`` opens them; its argument is ``check_files`` of ``Dataset.open``.

    Raises:
        DataError: on all ranks alike where a node's first rank refuses them.
    """
    opened: list[T] = []
    problem: DataError | None = None
    if rank.local_rank == 0:
        try:
            opened.append(open_sets(True))
        except DataError as error:
            problem = error
    problems: list[Any] = [None] * rank.world_size
    dist.all_gather_object(problems, problem, group=group)
    for problem in filter(None, problems):
        raise problem
    return opened[0] if opened else open_sets(False)
