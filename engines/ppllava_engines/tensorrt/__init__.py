"""A bundle on TensorRT and TensorRT-RTX: its graphs lowered, built into plans, and run.

`graphs` writes what the parsers take, `builder` makes plans of it, `engine` runs them. Importing
any of it needs neither TensorRT nor a GPU: a package is imported where it is used.
"""
