"""The reliability campaign: faults on purpose, everywhere. A part is a module with CASES, COUNT and EXPECTED."""

PARTS = ["mutations", "crashes", "writes", "processes", "numerics", "memory", "soak"]
