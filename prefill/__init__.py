"""The prefill phase: reads prompts, samples first tokens, keeps KV blocks until decode has them.

Owns the blocks that were handed over and not pulled yet. Never chooses where a request goes.
"""
