"""The simulated cluster: engines, pools, routers, a clock, and runs of workloads on them."""
