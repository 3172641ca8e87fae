import contextlib
@contextlib.contextmanager
def track_bytes(what, parameters, enabled):
    yield lambda n: None
