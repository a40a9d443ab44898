"""Losses that span processes: negatives from all ranks of a group, exactly.

:mod:`groups <nckernels.distributed.groups>` says which processes a loss spans, :mod:`collectives
<nckernels.distributed.collectives>` has the exchanges and their gradients, :mod:`contrast
<nckernels.distributed.contrast>` the losses with prototypes and :mod:`samples <nckernels.distributed.samples>` those
that compare samples with samples. :mod:`micro_batches <nckernels.distributed.micro_batches>` makes batches that are
larger than one device takes at a time.
"""
