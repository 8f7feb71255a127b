"""The fuzz run: whatever a client or a neighbour on the network may send, next to good requests.

What is sent follows from a seed and the API's own schema; what must hold is in `verdict`.
"""
