"""Latency reports: one picture's whole way, measured so that the numbers can be trusted.

    plan -> runner -> worker (a process of its own for every round) -> report -> tables, page

`report.Report` is the schema; docs/benchmarks.md says what every number means.
"""
