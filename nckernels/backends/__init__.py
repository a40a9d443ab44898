"""Implementations of the primitive; :mod:`.base` is the contract, :mod:`.registry` picks one."""
