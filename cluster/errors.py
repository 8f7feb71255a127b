"""What can go wrong in the `pdserve` command; each error reads as one line.

ClusterError
├── ConfigError       a config file or its args are wrong: exit status 2  (also a ValueError)
├── StartError        the cluster cannot be started here: exit status 1
└── ClusterInternalsChanged    Ray Serve lacks a name that scaling relies on
"""

MAX_LINE = 290
"""Characters of a refusal; with the command's name before it, it stays below 300."""


def printable(text: str) -> str:
    """`text` in one line, with what a terminal might obey, or not show, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, length: int) -> str:
    """`text`, its middle left out where it is longer than `length`."""
    if len(text) <= length:
        return text
    left_out = " ... "
    end = (length - len(left_out)) // 3
    return text[: length - len(left_out) - end] + left_out + text[-end:]


class ClusterError(Exception):
    """Something the user can put right; its text is one line."""


class ConfigError(ClusterError, ValueError):
    """A wrong value; the text names the field and what it may be, in one line that is not long."""

    def __init__(self, text: str) -> None:
        super().__init__(shortened(printable(text), MAX_LINE))


class StartError(ClusterError):
    """A busy port, or a deployment that does not come up."""


class ClusterInternalsChanged(ClusterError):
    """Another version of Ray than the pinned one; the text names what is missing."""
