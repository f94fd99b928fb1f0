"""The one exception type whose message is written for the person at the keyboard."""


class CembedError(Exception):
    """A mistake in what was given: one line saying what, what was given, what is available, what to do.

    The command line prints the message without a traceback and exits with status 1.
    """
