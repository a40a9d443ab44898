"""The neural-collapse lab: each claim of the papers as an experiment that measures it beside its closed form.

``python -m nckernels lab NAME`` prints a table and writes a picture, see ``nckernels/lab/cli.py``. Each module is one
experiment: its docstring states the claim, its ``run`` measures, and the result of ``run`` can be drawn.
"""
