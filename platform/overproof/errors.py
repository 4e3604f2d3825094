"""The two ways a run ends early, and the exit code of each."""


class InputError(Exception):
    """What was given cannot be used. The message says where, what was found, what was expected, what to do.

    The command line prints the message alone and exits with 2.
    """


class GateRefused(Exception):
    """No candidate passed the gate. The message lists the reasons; the command line exits with 1."""
