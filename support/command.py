"""A script as a command: one data set or several, and errors that are one line."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable

from support import InputError, parallel, stop
from support.report import Elsewhere, report_average


def command(main: Callable) -> None:
    """Run a script's `main`, for each name of --dataset; an `InputError` becomes one clear message
    and exit code 2. After Ctrl-C it is 130, after SIGTERM 143, as a shell has it."""
    try:
        with stop.listening():
            parallel.init_process_group()
            lines = command_lines(sys.argv[1:])
            if len(lines) > 1:
                until_settled(lambda: several(main, lines))
            else:
                until_settled(main)
    except Elsewhere as elsewhere:
        print(f"\n{elsewhere}")
    except stop.Stopped as stopped:
        number = stop.heard.number
        print(f"stopped by {signal.Signals(number).name};", stopped, file=sys.stderr)
        sys.exit(128 + number)
    except InputError as error:
        print("error:", message_of(error), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def until_settled(go: Callable) -> None:
    """With --share: `go` on until all runs are complete, or as many as before are in other hands.

    A process that is through with what was free so looks again at what others had: one of them may
    have been killed.
    """
    left = math.inf
    while True:
        try:
            go()
            return
        except Elsewhere as elsewhere:
            if len(elsewhere.runs) >= left:
                raise
            left = len(elsewhere.runs)


def message_of(error: InputError) -> str:
    """From a reader process the message arrives inside a traceback."""
    return str(error).rsplit("InputError: ", 1)[-1].strip()


def command_lines(arguments: list[str]) -> dict[str, list[str]]:
    """{data set: the arguments with this one alone}, for every name behind --dataset."""
    if "--dataset" not in arguments:
        return {"": arguments}
    start = end = arguments.index("--dataset") + 1
    while end < len(arguments) and not arguments[end].startswith("--"):
        end += 1
    lines = {}
    for name in arguments[start:end]:
        lines[name] = [*arguments[:start], name, *arguments[end:]]
    return lines


def several(main: Callable, lines: dict[str, list[str]]) -> None:
    """Run `main`, which returns its records and their main measure, for one data set after another;
    then average. Raises, in the end: Elsewhere, if runs were left to other processes; InputError
    that names what could not be run."""
    for argument in sys.argv:
        if argument.startswith("--summary"):
            raise InputError("--summary holds the records of one data set: give one --dataset")
    found, missing, left = {}, [], []
    for name, arguments in lines.items():
        print(f"\n=== {name}", flush=True)
        sys.argv[1:] = arguments
        try:
            found[name], measure = main()
        except Elsewhere as elsewhere:
            left += elsewhere.runs
        except InputError as error:
            missing.append(name)
            print(f"{name} is left out: {message_of(error)}", flush=True)
    if left:
        raise Elsewhere(left)
    if found:
        report_average(found, measure)
    if missing:
        raise InputError(f"not in the average: {', '.join(missing)}; it is said above why")
