r"""Compare methods: the paper's tables with seeds, their runs, intervals, tables, figures, and the speed of a step.

`tables` declares what is compared, `runner` makes and records the runs, `report` turns recorded runs into tables and
figures, `bench` measures a training step. Nothing here is needed to train.
"""
