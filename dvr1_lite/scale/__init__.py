r"""Full scale: readers of the paper's data sets, a check of a data set, predicted memory, and merging an adapter."""
