"""``python -m nckernels report``: training runs as one HTML page that needs nothing else.

:mod:`.load` reads histories, :mod:`.rows` makes the rows of a table of them, :mod:`.tables` and :mod:`.figures` show
them, the latter by :mod:`.charts`, and :mod:`.page` puts the sections together.
"""

from .cli import main

__all__ = ["main"]
