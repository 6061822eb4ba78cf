"""The dashboard: pages in a browser, what they are sent, and what their buttons do.

Reading order: `dashboard` (the widget), `pages` (what may be sent when), `frame_writer` and `columns` (what is sent),
`local_source`, `commands` (the buttons). `remote_service` answers pages in other processes, `remote_source` asks it.
`lasting_picture` is what a notebook keeps.
"""
