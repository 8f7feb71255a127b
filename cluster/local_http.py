"""HTTP to what runs on this machine. Owns how it is reached."""

import urllib.request

# Whatever proxy the environment names, these are not asked through it.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
