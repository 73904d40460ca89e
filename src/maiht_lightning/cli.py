"""`maiht`: which command is meant, and what becomes of errors. Heavy libraries are loaded by the commands alone."""

import os
import signal
import sys
from collections.abc import Sequence

from .command_line.catalog import COMMANDS, command_help, group_help, unknown_command
from .command_line.quiet import noise_silenced, prepare_process
from .interrupts import interrupts

# What the user can mend, beside Lightning's MisconfigurationException.
USER_ERRORS = (ValueError, TypeError, OSError, ModuleNotFoundError)
# W&B itself names no way but an account.
WITHOUT_WANDB = "Runs need no account with --trainer.logger.offline true; `wandb sync` sends them later."
# They have a Trainer.
RUNS = ("fit", "prune", "validate", "test")


def main(args: Sequence[str] | None = None) -> None:
    """Run `maiht`. What the user can mend ends with one screen at most and exit status 2, not with a traceback.

    Args:
        args: The command and its settings. None: those of this process, whose output and threads are then set up, too.
    """
    given = sys.argv[1:] if args is None else list(args)
    if args is None:
        prepare_process()
    try:
        with interrupts.listening(), noise_silenced():
            _run(given, None if args is None else given)
    except (SystemExit, KeyboardInterrupt) as stop:
        if interrupts.signum is None:
            raise
        _tell_resumption(given)
        raise SystemExit(128 + interrupts.signum) from stop
    except BrokenPipeError:
        if _runs_folder() is not None:
            raise
        # Who reads has enough, as in `maiht fit --help_all | head`. Python would complain when it closes the output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except Exception as error:
        if not _is_the_users(error) or os.environ.get("MAIHT_TRACEBACK"):
            raise
        told = f"W&B: {error}\n{WITHOUT_WANDB}" if _is_of_wandb(error) else error
        print(f"maiht: error: {told}\n(MAIHT_TRACEBACK=1 shows where.)", file=sys.stderr)
        raise SystemExit(2) from error


def _run(given: list[str], args: list[str] | None) -> None:
    """Show help, or run the command.

    Args:
        given: The command and its settings.
        args: The same for Lightning, which warns of arguments that are not the process's own; None for those.
    """
    command = given[0] if given else None
    if command is None:
        print(group_help(), file=sys.stderr)
        raise SystemExit(2)
    if command in ("-h", "--help", "--help_all"):
        print(group_help())
    elif command == "--version":
        from . import __version__

        print(f"maiht {__version__}")
    elif command in COMMANDS and not {"-h", "--help"}.isdisjoint(given):
        print(command_help(command))
        raise SystemExit(0)
    # Lightning also takes `--config FILE` before the command.
    elif command in RUNS or command.startswith("-"):
        from .command_line.runs import MAIHTCLI, report_failures

        if failures := MAIHTCLI(args).failures:
            raise SystemExit(report_failures(failures))
    elif command == "doctor":
        from .command_line.doctor import doctor

        raise SystemExit(doctor(given[1:]))
    elif command in COMMANDS:
        from .commands import COMMANDS as functions

        functions[command](given[1:])
    else:
        print(f"maiht: error: {unknown_command(command)}", file=sys.stderr)
        raise SystemExit(2)


def _runs_folder() -> str | None:
    """The folder of the run at work in this process, if there is one."""
    runs = sys.modules.get("maiht_lightning.command_line.runs")
    # Where it was not loaded no run has begun.
    return None if runs is None or runs.MAIHTCLI.folder is None else str(runs.MAIHTCLI.folder)


def _tell_resumption(args: Sequence[str]) -> None:
    """Print the command that resumes the run at work, if there is one."""
    if (folder := _runs_folder()) is not None:
        from .command_line.runs import is_first_process
        from .training.run_state import resume_command

        if is_first_process():
            command = resume_command(args, folder)
            print(f"maiht: stopped; nothing that was finished is lost. To resume:\n{command}", file=sys.stderr)


def _is_the_users(error: BaseException) -> bool:
    """Whether an error is one that the user can mend, and its message says how.

    It is not where it comes from deep inside a library, where its message alone would not help.
    """
    # Loaded already wherever it can have been raised.
    lightning = sys.modules.get("lightning.pytorch.utilities.exceptions")
    if isinstance(error, OSError) or (lightning and isinstance(error, lightning.MisconfigurationException)):
        return True
    if _is_of_wandb(error):
        return True
    if not isinstance(error, USER_ERRORS):
        return False
    traceback, raised_in = error.__traceback__, ""
    while traceback is not None:
        raised_in = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return raised_in.split(".")[0] in ("maiht_lightning", "jsonargparse")


def _is_of_wandb(error: BaseException) -> bool:
    """Whether W&B refuses or cannot be reached; wandb-workspaces makes a bare Exception of it."""
    wandb = sys.modules.get("wandb.errors")
    return wandb is not None and any(isinstance(each, wandb.Error) for each in (error, error.__cause__))


if __name__ == "__main__":
    main()
