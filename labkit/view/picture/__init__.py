"""The dashboard as a PNG, for readers without a front end.

`snapshot` draws it from a scene, with `heat_map`, `canvas` (what can be drawn) and `formatting` (numbers in words).
"""
