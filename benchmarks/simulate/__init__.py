"""A discrete-event simulator of the cluster, thousands of times faster than real time.

Runs what production runs to decide (`router.placement`, `router.ledger`, `engine.lateness`,
`cluster.scaling`) on simulated engines, links and clocks. Never imports Ray or vLLM.
`python -m benchmarks.simulate --help` lists what it answers.

model        the simulated cluster, and runs of workloads on it
workloads    what is sent to it; imports model
autoscalers  who decides the pools' sizes; imports workloads
studies      the questions; imports all
"""
