"""Implementations of the primitive: :mod:`.base` is their contract, :mod:`.registry` chooses one."""
