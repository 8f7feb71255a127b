"""The decode phase: pulls prefilled KV blocks and writes the answer, token by token.

Also serves the few requests that one engine must do whole. Never chooses where a request goes.
"""
