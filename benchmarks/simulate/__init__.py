"""A discrete-event simulator of the cluster, thousands of times faster than real time.

Runs the production policies (`router.policies`, `router.costs`, `cluster.scaling`) on simulated
engines, links and clocks. Never imports Ray or vLLM. `python -m benchmarks.simulate --help` lists
what it answers.
"""
