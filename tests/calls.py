"""What functions were called with, for tests of what passes arguments on."""


class Calls(list):
    """What a function was called with, in place of its work.

    Args:
        owner: of the function, under this name.
        result: what it gives instead.
    """

    def __init__(self, monkeypatch, owner, name, result):
        super().__init__()

        def record(*args, **kwargs):
            self.append((args, kwargs))
            return result

        monkeypatch.setattr(owner, name, record)
