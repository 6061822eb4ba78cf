"""The commands of `labkit`, one a module; `labkit/__main__` reads their options.

`parser` and `terminal` are what all share. `page_server` is the child process of `watch`.
"""
