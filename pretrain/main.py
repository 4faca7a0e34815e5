"""Entry point of training: ``deepspeed pretrain/main.py --recipe recipes/demo.yaml``."""

import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

# The launcher puts this file's folder first on the path; the packages are one above, whether or not they are installed.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.fault_tolerance.signals import StopFlag, first_reports, watch_launcher  # noqa: E402

if __name__ == "__main__":  # before the imports that take seconds: a launcher may die meanwhile
    FLAG = StopFlag()
    watch_launcher(FLAG)
    from pretrain.arguments import parse_arguments

    parse_arguments()  # --help and wrong usage end here

import torch.distributed as dist  # noqa: E402

from data_pipeline.errors import DataError, without_secrets  # noqa: E402
from data_pipeline.gpu_memory import gpu_memory_is_full  # noqa: E402
from pretrain.arguments import parse_arguments  # noqa: E402
from pretrain.build import build_trainer  # noqa: E402
from pretrain.engine.deepspeed_config import read_deepspeed_config, resolve_for  # noqa: E402
from pretrain.engine.distributed import (  # noqa: E402
    Rank,
    choose_device,
    has_bf16,
    init_distributed,
    read_rank,
    use_deterministic_algorithms,
)
from pretrain.engine.engine import compilation_error  # noqa: E402
from pretrain.fault_tolerance.preflight import measure, meet  # noqa: E402
from pretrain.fault_tolerance.watchdog import REPORT_FIRST_S, Watchdog  # noqa: E402
from pretrain.monitoring.profile import parse_steps  # noqa: E402
from pretrain.outcome import ExitCode, UserError, exit_code, explain_full_memory, record_exit  # noqa: E402
from pretrain.recipe import load_recipe  # noqa: E402
from pretrain.run_folder import RunFolder, summary_lines  # noqa: E402
from pretrain.run_log import RunStatus, StartUp  # noqa: E402
from pretrain.trainer import Trainer  # noqa: E402

SECONDARY_EXIT_S = 3.0
"""Delay of the exit on secondary failures: the launcher propagates the first exit code that it polls, once a second."""


def main(flag: StopFlag, arguments: list[str] | None = None) -> ExitCode:
    """Train until the end or until ``flag`` is set; the result is the exit status."""
    options = parse_arguments(arguments)
    flag.install_signal_handlers()
    rank: Rank | None = None
    status: RunStatus | None = None
    trainer: Trainer | None = None
    try:
        rank = read_rank()
        device = choose_device(rank, options.device)
        steps = parse_steps(options.profile) if options.profile else None
        recipe = load_recipe(options.recipe, options.assignments)
        if recipe.deterministic:
            use_deterministic_algorithms()  # the preflight multiplies, and torch asks about cuBLAS only then
        folder = RunFolder(options.runs / recipe.name)
        status = RunStatus(folder, first=rank.is_first)
        config = read_deepspeed_config(
            options.deepspeed_config, recipe.deepspeed, recorded_stage=folder.recorded_stage()
        )
        folder.check_recipe(recipe, config)
        if _already_finished(folder, rank):
            return ExitCode.FINISHED
        resolved = resolve_for(
            recipe,
            config,
            world_size=rank.world_size,
            has_gpu=device.type == "cuda",
            has_bf16_gpu=has_bf16(device),
        )
        startup = StartUp("imports")  # DeepSpeed's among them
        limits = recipe.watchdog
        watchdog = Watchdog(
            folder.hangs,
            rank.rank,
            start_s=60 * limits.start_minutes,
            step_s=60 * limits.step_minutes,
            on_hang=status.fail,
        )
        # A third of the time to start: a node that is not there by then is named, rather than waited for.
        late = meet(rank, 20 * limits.start_minutes)
        control = init_distributed(device, 60 * limits.start_minutes + REPORT_FIRST_S)
        for line in filter(None, (late, *measure(rank, device, control))):
            print(line, flush=True)  # noqa: T201
        startup.end("rendezvous")
        trainer = build_trainer(
            recipe,
            resolved,
            folder,
            rank=rank,
            device=device,
            flag=flag,
            control=control,
            watchdog=watchdog,
            status=status,
            profiled=steps if rank.is_first or options.profile_ranks == "all" else None,
            startup=startup,
            verbose=options.verbose,
        )
        code = trainer.train()
        trainer.close()
    except (UserError, DataError) as error:
        if trainer is not None or rank is None or rank.local_rank == 0 or not first_reports(flag):
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
        _give_up(trainer, status, str(error), exit_code(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, it must be reported and end this rank
        explained, code = _explain(error, trainer)
        reason = f"rank {rank.rank if rank else '?'}: {explained or f'{type(error).__name__}: {error}'}"
        report = f"error: {reason}\n" if explained else without_secrets(traceback.format_exc())
        print(report, end="", file=sys.stderr)  # noqa: T201
        _give_up(trainer, status, reason, code)
    if code is ExitCode.FINISHED and rank.is_first:
        print("\n".join(summary_lines(folder)))  # noqa: T201
    dist.barrier(control)  # the launcher ends the others as soon as one is gone
    dist.destroy_process_group()
    return code


def _explain(error: Exception, trainer: Trainer | None) -> tuple[str, ExitCode]:
    """One line for what users may meet on their GPUs, "" for any other error; and the exit status."""
    if gpu_memory_is_full(error):
        phase, state = (trainer.watchdog.phase, trainer.state) if trainer else ("starting", None)
        return explain_full_memory(error, phase, state)
    refused = compilation_error(error)
    return ("", ExitCode.RETRY) if refused is None else (str(refused), refused.code)


def _already_finished(folder: RunFolder, rank: Rank) -> bool:
    state = folder.read_state()
    if state is None or state.state != "finished":
        return False
    if rank.is_first:
        print(f"{folder.path} is finished; to train again choose --set name=..., or remove the folder")  # noqa: T201
        print("\n".join(summary_lines(folder)))  # noqa: T201
    return True


def _give_up(trainer: Trainer | None, status: RunStatus | None, reason: str, code: ExitCode) -> NoReturn:
    """Record in run.json why a run failed, restore the terminal, and end this rank whatever happens."""
    try:
        record_exit(trainer.watchdog.phase if trainer else "starting", reason, error=sys.exception())
        if trainer is not None:
            trainer.log.console.close()
        if status is not None and not status.fail(reason.splitlines()[0] if reason else ""):
            time.sleep(SECONDARY_EXIT_S)
    except OSError as error:
        print(f"WARNING the run's state could not be written: {error}", file=sys.stderr)  # noqa: T201
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # the log may be on a full disk
                stream.flush()
        os._exit(code)  # an orderly end would wait for peers and threads that may be gone


if __name__ == "__main__":
    sys.exit(main(FLAG))
