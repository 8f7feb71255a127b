"""Measures: a load generator and the comparison with peers. Never imported by the product."""
