"""What Serve says of a deployment, in one line.

Owns the reading of Serve's texts. Light: whoever starts a cluster reads them too.
"""

import re

_SLOW = "taken more than"
_SLOW_AT_WORK = "to initialize"
_ERROR = "Error:\n"
_OUR_EXCEPTION = re.compile(r"^(?:engine\.errors\.|router\.errors\.)\w+: ")


def one_line(message: str) -> str | None:
    """What is wrong, or None where nothing is: a start that takes long is no trouble."""
    message = message.strip()
    if not message or (_SLOW in message and _SLOW_AT_WORK in message):
        return None
    if _ERROR not in message:
        return message.splitlines()[0]
    # A traceback ends in the exception; ours say all that is to be said.
    return _OUR_EXCEPTION.sub("", message.splitlines()[-1].strip())
