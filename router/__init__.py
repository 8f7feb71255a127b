"""The OpenAI endpoint: the life of each request across the two pools.

Owns membership of the pools, the ledger of outstanding work, and the choice of replicas. Never
loads a model.
"""
