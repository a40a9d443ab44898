"""The neural-collapse lab: each claim of the papers as an experiment that measures it beside its closed form.

``python -m nckernels lab NAME`` prints a table and writes a picture, see ``nckernels/lab/cli.py``. A file is an
experiment: its docstring is the claim, its ``run`` measures, and what ``run`` returns can be drawn.
"""
