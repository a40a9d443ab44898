"""Losses that span processes: exact losses with the negatives of all ranks of a group.

:mod:`groups <nckernels.distributed.groups>` resolves which processes a loss spans, and :mod:`collectives
<nckernels.distributed.collectives>` has the exchanges and their gradients. :mod:`contrast
<nckernels.distributed.contrast>` has the losses with prototypes, :mod:`samples <nckernels.distributed.samples>` those
that compare samples with samples. :mod:`micro_batches <nckernels.distributed.micro_batches>` is for batches that do not
fit on one device.
"""
