"""What can go wrong in the `pdserve` command; each error reads as one line.

ClusterError
├── ConfigError       a config file or its args are wrong: exit status 2  (also a ValueError)
├── StartError        the cluster cannot be started here: exit status 1
└── ClusterInternalsChanged    Ray Serve lacks a name that scaling relies on
"""


class ClusterError(Exception):
    """Something the user can put right; its text is one line."""


class ConfigError(ClusterError, ValueError):
    """A wrong value; the text names the field and what it may be."""


class StartError(ClusterError):
    """A busy port, or a deployment that does not come up."""


class ClusterInternalsChanged(ClusterError):
    """Another version of Ray than the pinned one; the text names what is missing."""
