"""The questions that the simulator answers, a module each; `benchmarks.simulate.cli` asks them."""
