"""The model as a REST service, and the page on which a person drops films.

    browser or client ──► protocol.py ──► guard.py ──► app.py ──► workers.py ══pipe══► worker.py ──► row
                          deadlines       host, origin, routes,    queue, time         decoding and
                          of each byte    token, headers limits    limit, restart      inference

The server process holds no model and decodes nothing: bytes of strangers are opened in worker processes, each with
limits of memory and time and without the right to write a file; one that hangs or dies is replaced, and its film gets a
row with `error`. Nothing uploaded is written to disk or logged. Start: `server.run_server(ServeConfig(), console)`.
"""

from cxr_fastai.serving.config import ServeConfig

__all__ = ["ServeConfig"]
