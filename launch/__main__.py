"""The process `framemesh` (also `python -m launch …`), from its first import to its last flush. Knows no command."""

import os
import sys

INTERRUPTED, PIPE_CLOSED = 130, 141
"""What a shell makes of SIGINT and SIGPIPE."""


def main() -> int:
    """Run the command line; returns the exit code, 141 if nobody reads what it prints."""
    try:
        # These imports take long enough for a Ctrl-C.
        from launch.cli import main as run

        code = run()
        # Here, and not at the interpreter's end, which would tell of a closed pipe in its own way.
        print(end="", flush=True)
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return _forget_output()
    except SystemExit as end:
        # What rich makes of a closed pipe, on its own.
        if isinstance(end.__context__, BrokenPipeError):
            return _forget_output()
        raise


def _forget_output() -> int:
    """Have what nobody reads go nowhere, the rest of a buffer included."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return PIPE_CLOSED


if __name__ == "__main__":
    sys.exit(main())
