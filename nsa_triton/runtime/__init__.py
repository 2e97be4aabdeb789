"""Where kernels run: targets, their configs, and the executors that launch on them. Never imports ops."""
