"""``python -m nckernels report``: training runs as one self-contained HTML page.

:mod:`.load` reads histories, and :mod:`.rows` groups them into the rows of a table. :mod:`.tables` and :mod:`.figures`
show them, the latter with :mod:`.charts`. :mod:`.page` puts the sections together.
"""

from .cli import main

__all__ = ["main"]
