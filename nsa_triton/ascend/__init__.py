"""The Ascend toolchain on any machine: lower a kernel, compile it for a chip, or run its lowered form on this CPU."""
