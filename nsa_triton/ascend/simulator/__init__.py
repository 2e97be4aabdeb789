"""An Ascend NPU without the NPU: execute, check and time the final on-chip program of a kernel."""
