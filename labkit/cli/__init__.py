"""The commands of `labkit`, one a module; `labkit/__main__` reads their options.

`page_server` is the child process of `watch`.
"""
